"""Compressed AdamW against dense AdamW on the reconstructed gradient, in float64."""

from __future__ import annotations

import pytest
import torch

from smidgen.activations._compressed import Compressed, accumulate
from smidgen.optim._gradients import adamw_
from smidgen.optim.adamw import AdamW
from smidgen.optim.velora_adamw import VeLoRAAdamW, compressed_adamw_

RATES = {"lr": 0.01, "betas": (0.9, 0.99)}


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vectors(rows, size, width, groups):
    v = draw(rows, size, seed=9)
    v[0, 0] = 0.0
    if rows == groups and groups * size > width:
        v[-1, width - groups * size :] = 0
    return v / v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("rows,groups,size,width", [(1, 4, 3, 12), (4, 4, 3, 12), (5, 5, 3, 13), (12, 12, 1, 12)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_dense_adam_on_the_reconstructed_gradient(rows, groups, size, width, decay):
    """To 1e-12 in float64: with the dense eps scaled by |v|, since a root of s v^2 plus eps |v| is |v| (root + eps)."""
    v, eps = vectors(rows, size, width, groups), 1e-3
    if size == 1:
        v = torch.ones_like(v)
    magnitude = v.abs().expand(groups, size).flatten()[:width]
    weight, state = draw(6, width, seed=1), {}
    dense, m, s = weight.clone(), torch.zeros(6, width).double(), torch.zeros(6, width).double()
    b1, b2 = RATES["betas"]
    for t in range(1, 20):
        gradient = Compressed(draw(6, groups, seed=100 + t), v, width)
        g = gradient.dense()
        dense.mul_(1 - RATES["lr"] * decay)
        m, s = b1 * m + (1 - b1) * g, b2 * s + (1 - b2) * g * g
        root = (s / (1 - b2**t)).sqrt() + eps * magnitude
        dense.sub_(torch.where(root > 0, RATES["lr"] * (m / (1 - b1**t)) / root, 0.0))
        compressed_adamw_(weight, gradient, state, eps=eps, decay=decay, **RATES)
        assert torch.allclose(weight, dense, atol=1e-12, rtol=0)
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (6, groups)


def test_without_eps_it_is_torchs_adamw():
    v = draw(1, 3, seed=9)
    v /= v.norm()
    weight, state, other = draw(6, 12, seed=1), {}, {}
    dense = weight.clone()
    for t in range(19):
        gradient = Compressed(draw(6, 4, seed=t), v, 12)
        adamw_(dense, gradient.dense(), other, eps=0.0, decay=0.1, **RATES)
        compressed_adamw_(weight, gradient, state, eps=0.0, decay=0.1, **RATES)
    assert torch.allclose(weight, dense, atol=1e-12, rtol=0)


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_clipping_is_that_of_the_dense_gradient(limit):
    """One compressed and one dense tensor: the global norm and the step are AdamW's, which builds the gradient."""
    ends = []
    for build in (AdamW, VeLoRAAdamW):
        weight, bias = torch.ones(6, 12).requires_grad_(), torch.ones(5).requires_grad_()
        v = torch.tensor([[0.6, 0.0, -0.8]])
        opt = build([weight, bias], lr=0.1, eps=1e-12, max_grad_norm=limit)

        def loss(weight=weight, bias=bias, v=v):
            accumulate(weight, draw(6, 4, seed=3).float(), v)
            return (bias**2).sum()

        opt.step(loss)
        opt.step(loss)
        ends.append((weight.detach().clone(), bias.detach().clone(), opt.outcome.measures["grad_norm"]))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ends[0][:2], ends[1][:2], strict=True))
    assert ends[0][2] == ends[1][2]
    assert torch.equal(ends[1][0][:, 1::3], torch.ones(6, 4))  # where v is zero nothing moves
