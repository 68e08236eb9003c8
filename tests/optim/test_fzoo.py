"""FZOO: the step is the losses' differences over their standard deviation, whatever the scale of the loss."""

from __future__ import annotations

import math

import pytest
import torch

from smidgen.directions import Dense
from smidgen.objective import ClosureObjective, Recorded
from smidgen.optim.fzoo import FZOO, Config


def problem(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=rng).requires_grad_() for s in ((6, 5), (7,))]


def quadratic(weights, scale=1.0):
    return lambda: scale * sum(((w - 1.0) ** 2).sum() for w in weights)


def test_the_update_by_hand():
    weights, twin = problem(), problem()
    opt = FZOO(weights, Config(lr=1e-2, queries=4, rank=2, distribution="rademacher"))
    recorded = Recorded(ClosureObjective(quadratic(weights), opt.view))
    opt.step(recorded)
    base, *losses = recorded.values
    sigma = torch.tensor(losses).double().std().item()
    opt.merge_()
    for name, before in zip("01", twin, strict=True):
        step = torch.zeros(before.shape)
        for i, loss in enumerate(losses):
            z = opt.shaped(Dense(0, 0, i, opt.view.ids, "rademacher"))
            z.accumulate(name, slice(0, len(step)), step.view(len(step), -1), -1e-2 / 4 * (loss - base) / sigma)
        assert torch.allclose(opt.view[name].storage - before.detach(), step, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_loss_does_not_matter(scale):
    ends = []
    for factor in (1.0, scale):
        weights = [w.detach().double().requires_grad_() for w in problem()]
        opt = FZOO(weights, Config(lr=1e-2, eps=1e-2))
        opt.step(quadratic(weights, factor))
        opt.merge_()
        ends.append(weights)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*ends, strict=True))
    assert not torch.allclose(ends[0][1], problem()[1].double(), atol=1e-3)


def test_equal_losses_move_nothing_and_one_finite_query_is_a_bad_step():
    weights = problem()
    before = [w.detach().clone() for w in weights]
    opt = FZOO(weights, Config(queries=2))
    opt.step(lambda: torch.tensor(1.0))
    assert opt.outcome.written and all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    values = iter([1.0, math.nan, 2.0])
    opt.step(lambda: torch.tensor(next(values)))
    assert not opt.outcome.written and all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
