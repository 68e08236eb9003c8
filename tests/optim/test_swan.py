"""SWAN: standardised rows, whitening against the singular vectors, steps of one size."""

from __future__ import annotations

import math

import pytest
import torch

from smidgen.optim.swan import SWAN, standardised, whitened


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 7)])
def test_whitening_gives_the_orthogonal_factor(shape):
    """(G G^T)^(-1/2) G = U V^T of the singular value decomposition, up to the norm that the iteration starts from."""
    g = draw(*shape)
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    found = whitened(g, 40)
    assert torch.allclose(found / found.norm(), left @ right / (left @ right).norm(), atol=1e-6)


def test_standardised_rows():
    g = draw(4, 10) + 3
    plain, centred = standardised(g, centre=False), standardised(g, centre=True)
    assert torch.allclose(plain, g / g.square().mean(1, keepdim=True).sqrt())
    assert torch.allclose(centred, (g - g.mean(1, keepdim=True)) / g.std(1, keepdim=True, correction=0))
    assert torch.equal(standardised(torch.ones(2, 3), centre=True), torch.zeros(2, 3))


@pytest.mark.parametrize("centre", [False, True])
def test_a_step_has_root_mean_square_lr_and_ignores_the_gradients_scale(centre):
    steps = []
    for scale in (1.0, 1e4):
        w, b = torch.zeros(5, 8).requires_grad_(), torch.zeros(7).requires_grad_()
        a, c = draw(5, 8).float(), draw(7, seed=1).float()
        opt = SWAN([w, b], lr=0.01, centre=centre)
        opt.step(lambda w=w, b=b, a=a, c=c, k=scale: k * ((w * a).sum() + (b * c).sum()))
        steps.append((w.detach(), b.detach()))
    assert torch.allclose(steps[0][0], steps[1][0], atol=1e-6) and torch.allclose(steps[0][1], steps[1][1], atol=1e-6)
    for step in steps[0]:
        assert math.isclose(float(step.square().mean().sqrt()), 0.01, rel_tol=1e-4)
