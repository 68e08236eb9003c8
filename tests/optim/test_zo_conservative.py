"""ZO-SGD-Cons: the best of three positions, exact rejection, forwards, and the public code's AdamW moves."""

from __future__ import annotations

import math

import pytest
import torch

from smidgen.config import ConfigError
from smidgen.objective import ClosureObjective, Recorded, Replayed
from smidgen.optim.zo_conservative import PRESETS, ZOConservative
from smidgen.optim.zo_sgd import ZOSGD
from smidgen.trainer import method_config

SHAPES = ((4, 7), (13,), ())


def starts(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def loss_of(weights):
    return sum((a * w.double() ** 2).sum() for a, w in enumerate(weights, 1))


class Scripted:
    """Answers from a list; keeps the questions."""

    key = None

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def losses(self, probes, *, each=False):
        self.asked.append(list(probes))
        return torch.tensor([self.answers.pop(0) for _ in probes], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"distribution": "gaussian", "queries": 2}, {"sides": 1}, {"base": "mean"}])
@pytest.mark.parametrize("lr", [1e-4, 1e-2, 0.3])
def test_the_loss_is_the_least_of_the_three(dtype, options, lr):
    weights = starts(dtype)
    opt = ZOConservative(weights, lr=lr, eps=0.1, rounding="nearest", seed=1, **options)
    kept, writes, write = 0, [], opt.view.apply_
    opt.view.apply_ = lambda *a, **k: writes.append(write(*a, **k))
    for _ in range(6):
        before = [w.clone() for w in weights]
        recorded = Recorded(ClosureObjective(lambda: loss_of(weights), opt.view))
        opt.step(recorded)
        three = recorded.values[-3:] if len(recorded.values) % 2 else [loss_of(before).item(), *recorded.values[-2:]]
        if options.get("base") != "mean":
            assert float(loss_of(weights)) <= min(three) * (1 + 1e-9)
        if opt.outcome.measures["zo/move"] == 0.0:
            kept += 1
            assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert len(writes) == 6 - kept  # theta is written by accepted moves only
    if lr == 0.3:
        assert kept > 0


def test_scripted_comparisons():
    """(L+, L-), (L, L(theta - lr g), L(theta + lr g)) -> the move; ties stay, non-finite values come last."""
    nan, inf = math.nan, math.inf
    cases = [
        ((2.0, 1.0), (1.5, 1.0, 2.0), -1.0, 0),
        ((2.0, 1.0), (1.5, 2.0, 1.0), 1.0, 0),
        ((2.0, 1.0), (1.0, 1.0, 1.0), 0.0, 0),
        ((2.0, 1.0), (1.5, 1.0, 1.0), -1.0, 0),
        ((2.0, 1.0), (1.5, nan, 1.0), 1.0, 1),
        ((2.0, 1.0), (1.5, inf, 2.0), 0.0, 1),
        ((2.0, 1.0), (1.5, -inf, nan), 0.0, 2),
        ((2.0, 1.0), (nan, 3.0, 2.0), 1.0, 1),
    ]
    for pair, three, move, voided in cases:
        weights = starts()
        opt = ZOConservative(weights, lr=0.125, eps=0.5)
        asked = Scripted(*pair, *three)
        opt.step(asked)
        assert opt.outcome.measures["zo/move"] == move and opt.outcome.voided == voided and opt.outcome.written
        assert [len(a) for a in asked.asked] == [2, 3] and asked.asked[1][0] == ()
        z = asked.asked[0][0][0][0]
        for entry, start in zip(opt.view, starts(), strict=True):
            want = start.clone().view(-1)
            z.accumulate(entry.name, slice(0, 1), want, move * 0.125 * 1.0)
            assert torch.equal(entry.tensor.view(-1), want)


def test_nothing_finite_is_a_bad_step():
    weights = starts()
    opt = ZOConservative(weights, lr=0.1)
    assert math.isnan(opt.step(Scripted(2.0, 1.0, math.nan, math.inf, math.nan)))
    assert opt.outcome.voided == 3 and not opt.outcome.written and opt.bad_steps == 1
    assert all(torch.equal(w, s) for w, s in zip(weights, starts(), strict=True))


@pytest.mark.parametrize(
    "options,forwards",
    [
        ({}, 5),
        ({"base": "mean"}, 4),
        ({"sides": 1}, 4),
        ({"queries": 3}, 9),
        ({"sides": "residual"}, 4),
        ({"compat_adamw": True}, 5),
    ],
)
def test_forwards_a_step(options, forwards):
    weights, calls = starts(), []
    ZOConservative(weights, lr=1e-3, **options).step(lambda: calls.append(1) or loss_of(weights))
    assert len(calls) == forwards


def test_the_mean_of_the_probes_stands_in_for_the_loss():
    weights = starts()
    opt = ZOConservative(weights, lr=0.1, base="mean", eps=0.5)
    opt.step(Scripted(2.0, 1.0, 1.51, 1.49))  # the mean is 1.5
    assert opt.outcome.measures["zo/move"] == 1.0
    with pytest.raises(ConfigError, match="base"):
        method_config("zo_conservative", None, {"base": "mean", "sides": "residual"})


def test_an_accepted_step_is_zo_sgds_and_decays_a_rejected_one_does_not():
    ours, theirs = starts(), starts()
    options = {"lr": 0.01, "weight_decay": 0.5, "normalise": "rms"}
    ZOConservative(ours, **options).step(Scripted(2.0, 1.0, 1.5, 1.0, 2.0))
    ZOSGD(theirs, **options).step(Scripted(2.0, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    still = starts()
    ZOConservative(still, **options).step(Scripted(2.0, 1.0, 1.0, 1.5, 2.0))
    assert all(torch.equal(a, b) for a, b in zip(still, starts(), strict=True))


def test_groups_are_tried_with_their_own_rate():
    slow, fast = torch.ones(8), torch.ones(8)
    opt = ZOConservative([{"params": [slow]}, {"params": [fast], "lr": 0.5}], lr=0.0625, eps=0.5)
    asked = Scripted(1.0, 0.0, 1.0, 0.5, 2.0)
    opt.step(asked)
    tried = [torch.ones(8), torch.ones(8)]
    for z, s in asked.asked[1][1]:
        for name in z.support:
            z.accumulate(name, slice(0, 8), tried[int(name)], s)
    assert torch.equal(tried[0], slow) and torch.equal(tried[1], fast)
    assert torch.equal((1 - fast).abs(), 8 * (1 - slow).abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"sides": "residual"}, PRESETS["zo_bench"]])
def test_resume_and_replay_are_exact(dtype, options, tmp_path):
    options = {**options, "lr": 1e-2, "eps": 0.1}
    straight, values = starts(dtype), []
    opt = ZOConservative(straight, **options)
    for _ in range(8):
        recorded = Recorded(ClosureObjective(lambda: loss_of(straight), opt.view))
        opt.step(recorded)
        values.append(recorded.values)
    weights = starts(dtype)
    first = ZOConservative(weights, **options)
    for v in values[:5]:
        first.step(Replayed(v))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = ZOConservative(weights, **options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for v in values[5:]:
        second.step(Replayed(v))
    assert all(torch.equal(a, b) for a, b in zip(straight, weights, strict=True))


# -- the public code's moves -----------------------------------------------------------------------------------------------


def positions(l0, l1, l2, lr=1e-3):
    """Where one weight stands at each evaluation of a step with g = 5, and at its end."""
    w = torch.zeros(1)
    seen, answers = [], iter((l0, l1, l2))

    class Watch(Scripted):
        def losses(self, probes, *, each=False):
            if len(probes) == 2:
                z = torch.zeros(1)
                probes[0][0][0].accumulate("0", slice(0, 1), z, 1.0)
                return torch.tensor([10.0, 0.0], dtype=torch.float64) * z.double()  # c z = 5
            seen.append(w.item())
            return torch.tensor([next(answers)], dtype=torch.float64)

    ZOConservative([w], lr=lr, eps=1.0, compat_adamw=True).step(Watch())
    return seen, w.item()


def test_compat_moves_do_not_undo_each_other():
    """The toy of one weight: stateless moves would visit -lr, +lr and come back to 0."""
    seen, end = positions(l0=1.0, l1=2.0, l2=2.0)
    assert seen[0] == 0.0
    assert seen[1:] == pytest.approx([-1.0e-3, -6.34e-4], abs=2e-6)
    assert end == pytest.approx(-6.37e-4, abs=2e-6)  # "rejected", and yet not at 0


def test_compat_follows_the_public_comparisons():
    def adamw(gradients):
        w = torch.zeros(1, requires_grad=True)
        opt = torch.optim.AdamW([w], lr=1e-3, weight_decay=0.0)
        for g in gradients:
            w.grad = torch.tensor([g])
            opt.step()
        return w.item()

    for (l0, l1, l2), moves in [
        ((1.0, 2.0, 2.0), (5.0, -10.0, 5.0)),
        ((2.0, 3.0, 1.0), (5.0, -10.0)),
        ((2.0, 1.0, 3.0), (5.0, -10.0, 10.0)),
        ((2.0, 1.5, 1.0), (5.0, -10.0)),
    ]:
        assert positions(l0, l1, l2)[1] == pytest.approx(adamw(moves), abs=1e-9)


def test_compat_holds_adamws_state():
    weights = starts()
    opt = ZOConservative(weights, lr=1e-3, compat_adamw=True)
    opt.step(lambda: loss_of(weights))
    held = sum(t.numel() * t.element_size() for s in opt.state.values() for t in s.values())
    shapes = {str(i): (s, torch.float32) for i, s in enumerate(SHAPES)}
    assert ZOConservative.state_bytes(shapes, opt.config) == held == 8 * 42
    assert not ZOConservative(starts()).state
