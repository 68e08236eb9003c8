"""AdamW and SGD against torch's own."""

from __future__ import annotations

import pytest
import torch

from smidgen.optim.adamw import AdamW
from smidgen.optim.sgd import SGD


def problem():
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)]
    return [t.requires_grad_() for t in tensors]


def loss_of(tensors):
    return sum(((t - 1) ** 4).sum() for t in tensors)


@pytest.mark.parametrize(
    "ours,theirs",
    [
        (lambda p: AdamW(p, lr=0.01, weight_decay=0.1, max_grad_norm=0), torch.optim.AdamW),
        (lambda p: SGD(p, lr=0.001, momentum=0.9, max_grad_norm=0), torch.optim.SGD),
        (lambda p: SGD(p, lr=0.001, max_grad_norm=0), torch.optim.SGD),
    ],
)
def test_updates_are_torchs(ours, theirs):
    a, b = problem(), problem()
    opt = ours(a)
    momentum = getattr(opt.config, "momentum", 0.0)
    if theirs is torch.optim.AdamW:
        groups = [{"params": [b[0]], "weight_decay": 0.1}, {"params": [b[1]], "weight_decay": 0.0}]
        reference = torch.optim.AdamW(groups, lr=0.01, foreach=False)
    else:
        reference = torch.optim.SGD(b, lr=0.001, momentum=momentum)
    for _ in range(12):
        opt.step(lambda: loss_of(a))
        reference.zero_grad()
        loss_of(b).backward()
        reference.step()
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b, strict=True))
    assert all(t.grad is None for t in a)


def test_clipping_is_torchs():
    a, b = problem(), problem()
    SGD(a, lr=0.1, max_grad_norm=0.5).step(lambda: loss_of(a))
    loss_of(b).backward()
    torch.nn.utils.clip_grad_norm_(b, 0.5)
    torch.optim.SGD(b, lr=0.1).step()
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("build", [lambda p: AdamW(p, lr=1e-4), lambda p: SGD(p, lr=1e-5)])
def test_small_updates_of_16_bit_weights_are_not_lost(build):
    """Each update is far below half an ulp of 1 in bfloat16; their sum is not."""
    weight = torch.ones(8192, dtype=torch.bfloat16).requires_grad_()
    opt = build([weight])
    for _ in range(30):
        opt.step(lambda: weight.float().mean() * 8192)
    assert 0 < float((1 - weight.detach().float()).mean()) < 0.02


def test_moments_of_16_bit_weights_are_float32_also_after_loading():
    weight = torch.ones(16, dtype=torch.bfloat16).requires_grad_()
    opt = AdamW([weight])
    opt.step(lambda: weight.float().sum())
    other = AdamW([torch.ones(16, dtype=torch.bfloat16).requires_grad_()])
    other.load_state_dict(opt.state_dict())
    for state in (*opt.state.values(), *other.state.values()):
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
