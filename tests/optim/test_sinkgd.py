"""SinkGD: the normalisation is the paper's, and converges to rows and columns of equal length."""

from __future__ import annotations

import math

import pytest
import torch

from smidgen.optim.sinkgd import SinkGD, multi_normalised


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (1, 6), (6, 1)])
def test_rows_and_columns_get_equal_lengths(shape):
    m, n = shape
    x = multi_normalised(draw(m, n), 50)
    assert torch.allclose(x.norm(dim=1), torch.full((m,), math.sqrt(n)), atol=1e-4)
    assert torch.allclose(x.norm(dim=0), torch.full((n,), math.sqrt(m)), atol=1e-4)


def test_one_round_is_diagonal_products_from_both_sides():
    g = draw(3, 4).double()
    rows = 2.0 * torch.diag(1 / g.norm(dim=1)) @ g
    wanted = math.sqrt(3) * rows @ torch.diag(1 / rows.norm(dim=0))
    assert torch.allclose(multi_normalised(g, 1), wanted, atol=1e-12)


def test_a_step_has_root_mean_square_lr_and_ignores_the_gradients_scale():
    steps = []
    for scale in (1.0, 1e4):
        w, b = torch.zeros(5, 8).requires_grad_(), torch.zeros(7).requires_grad_()
        a, c = draw(5, 8), draw(7, seed=1)
        SinkGD([w, b], lr=0.01).step(lambda w=w, b=b, a=a, c=c, k=scale: k * ((w * a).sum() + (b * c).sum()))
        steps.append((w.detach(), b.detach()))
    assert torch.allclose(steps[0][0], steps[1][0], atol=1e-7) and torch.allclose(steps[0][1], steps[1][1], atol=1e-7)
    for step in steps[0]:
        assert math.isclose(float(step.square().mean().sqrt()), 0.01, rel_tol=1e-4)


def test_rows_without_gradient_stay_and_weights_decay():
    w = torch.ones(4, 6).requires_grad_()
    SinkGD([w], lr=0.1, weight_decay=0.5).step(lambda: (w[:2] * draw(2, 6)).sum())
    assert torch.allclose(w[2:].detach(), torch.full((2, 6), 0.95))
