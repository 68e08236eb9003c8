"""ZO-SGD against its formulas; statistics of its estimate are in test_estimates.py."""

from __future__ import annotations

import math

import pytest
import torch

from smidgen.directions import Dense
from smidgen.objective import ClosureObjective, Recorded, Replayed
from smidgen.optim._values import RunningRMS, smallest_eps
from smidgen.optim.zo_sgd import PRESETS, ZOSGD, Config
from smidgen.params import ParamView

D = 6
CURVATURE = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
START = torch.linspace(-1.0, 1.0, D)


def loss_of(w):
    return (0.5 * CURVATURE.double() * w.detach().double() ** 2).sum()


def test_two_sided_is_exact_on_a_quadratic_and_one_sided_is_off_by_eps():
    w = START.clone()
    view = ParamView.of_tensors([w])
    z = Dense(3, 0, 0, view.ids)
    out = torch.zeros(D)
    z.accumulate("0", slice(0, D), out, 1.0)
    slope = float((CURVATURE * START * out).sum())
    bend = float((CURVATURE * out**2).sum())
    for sides, eps, want in ((2, 0.25, slope), (1, 0.25, slope + 0.25 * bend / 2), (1, 0.125, slope + 0.125 * bend / 2)):
        v = START.clone()
        opt = ZOSGD([v], lr=1e-3, seed=3, eps=eps, sides=sides)
        opt.step(lambda v=v: loss_of(v))
        assert opt.outcome.measures["zo/projected_grad"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    "sides,queries,forwards", [(2, 1, 2), (2, 3, 6), (1, 1, 2), (1, 3, 4), ("residual", 1, 1), ("residual", 3, 3)]
)
def test_forwards_a_step(sides, queries, forwards):
    calls = []
    w = START.clone()
    ZOSGD([w], sides=sides, queries=queries).step(lambda: calls.append(1) or loss_of(w))
    assert len(calls) == forwards


def test_several_queries_are_the_mean_of_single_steps():
    w = START.clone()
    opt = ZOSGD([w], lr=0.01, seed=9, queries=3, eps=1e-2)
    opt.step(lambda: loss_of(w))
    moved = torch.zeros(D, dtype=torch.float64)
    for q in range(3):
        z, out = Dense(9, 0, q, {"0": 0}), torch.zeros(D)
        z.accumulate("0", slice(0, D), out, 1.0)
        c = (loss_of(START + 1e-2 * out) - loss_of(START - 1e-2 * out)) / 2e-2
        moved -= 0.01 / 3 * c * out.double()
    assert torch.allclose((w - START).double(), moved, atol=1e-7)


def test_weight_decay_spares_vectors_and_follows_the_schedule():
    matrix, vector = torch.ones(3, 4), torch.ones(5)
    opt = ZOSGD([matrix, vector], lr=0.1, weight_decay=0.5)
    opt.step(lambda: torch.zeros(()))  # slope zero: only decay moves
    assert torch.equal(matrix, torch.full((3, 4), 0.95)) and torch.equal(vector, torch.ones(5))
    opt.param_groups[0]["lr"] = 0.0
    opt.step(lambda: torch.zeros(()))
    assert torch.equal(matrix, torch.full((3, 4), 0.95))


def test_groups_have_their_own_rate():
    slow, fast = torch.ones(4), torch.ones(4)
    opt = ZOSGD([{"params": [slow]}, {"params": [fast], "lr": 0.5}], lr=0.0625, eps=0.5)
    tilt = torch.tensor([1.0, 2.0, 4.0, 8.0])  # no signs of z make this slope zero
    opt.step(lambda: (tilt * slow).sum() + (16 * tilt * fast).sum())
    ratio = (1 - fast).abs() / (1 - slow).abs()
    assert torch.allclose(ratio, torch.full((4,), 8.0))


def test_one_dead_pair_is_voided_and_the_rest_goes_on():
    w, calls = START.clone(), []

    def loss():
        calls.append(1)
        return torch.tensor(math.nan) if len(calls) == 3 else loss_of(w)

    opt = ZOSGD([w], queries=3, lr=0.01)
    value = opt.step(loss)
    assert math.isfinite(value) and opt.outcome.voided == 1 and opt.outcome.written
    only = START.clone()
    twin = ZOSGD([only], queries=3, lr=0.01)
    z = [Dense(0, 0, q, {"0": 0}) for q in range(3)]
    moved = torch.zeros(D)
    for q in (0, 2):
        out = torch.zeros(D)
        z[q].accumulate("0", slice(0, D), out, 1.0)
        c = (loss_of(START + 1e-3 * out) - loss_of(START - 1e-3 * out)) / 2e-3
        moved -= 0.01 / 2 * float(c) * out
    assert torch.allclose(w - START, moved, atol=1e-6) and twin.t == 0


def test_a_dead_shared_base_voids_the_step():
    w, calls = START.clone(), []

    def loss():
        calls.append(1)
        return torch.tensor(math.inf) if len(calls) == 1 else loss_of(w)

    opt = ZOSGD([w], queries=2, sides=1)
    assert math.isnan(opt.step(loss))
    assert torch.equal(w, START) and opt.bad_steps == 1


def test_residual_feedback_is_the_difference_to_the_step_before():
    """L falls along a script; lr is small enough for theta to stand still in float64 terms."""
    losses = iter([5.0, 7.0, math.nan, 4.0])
    w = torch.zeros(64)
    opt = ZOSGD([w], lr=0.125, eps=0.5, seed=9, sides="residual")
    z = []
    for t in range(4):
        out = torch.zeros(64)
        Dense(9, t, 0, {"0": 0}).accumulate("0", slice(0, 64), out, 1.0)
        z.append(out)
    opt.step(lambda: next(losses))
    assert not w.any() and opt.outcome.written and opt.outcome.loss == 5.0  # nothing to compare with yet
    opt.step(lambda: next(losses))
    assert torch.equal(w, -0.125 * (7.0 - 5.0) / 0.5 * z[1])
    saved = w.clone()
    opt.step(lambda: next(losses))
    assert torch.equal(w, saved) and not opt.outcome.written and opt.last == 7.0  # the NaN is not kept
    opt.step(lambda: next(losses))
    assert torch.equal(w, saved - 0.125 * (4.0 - 7.0) / 0.5 * z[3])


def test_residual_feedback_compares_queries_with_the_mean_of_the_step_before():
    losses = iter([1.0, math.inf, 3.0, 4.0, 6.0, 8.0])
    w = torch.zeros(16)
    opt = ZOSGD([w], lr=0.125, eps=0.5, queries=3, sides="residual")
    opt.step(lambda: next(losses))
    assert opt.last == 2.0 and opt.outcome.voided == 1
    opt.step(lambda: next(losses))
    want = torch.zeros(16)
    for q, value in enumerate((4.0, 6.0, 8.0)):
        Dense(0, 1, q, {"0": 0}).accumulate("0", slice(0, 16), want, -0.125 * (value - 2.0) / 0.5 / 3)
    assert torch.allclose(w, want, atol=1e-7) and opt.last == 6.0


def test_residual_feedback_starts_its_rms_with_the_first_difference():
    losses = iter([5.0, 7.0])
    w = torch.zeros(16)
    opt = ZOSGD([w], lr=2.0**-7, sides="residual", normalise="rms")
    opt.step(lambda: next(losses)), opt.step(lambda: next(losses))
    assert torch.allclose(w.abs(), torch.full((16,), 2.0**-7), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_feedback_resumes_and_replays_exactly_and_learns(dtype, tmp_path):
    options = {"lr": 0.01, "eps": 0.25, "sides": "residual", "normalise": "rms"}
    straight, values = START.to(dtype, copy=True), []
    opt = ZOSGD([straight], **options)
    for _ in range(400):
        recorded = Recorded(ClosureObjective(lambda: loss_of(straight), opt.view))
        opt.step(recorded)
        values.append(recorded.values)
    assert float(loss_of(straight)) < 0.5 * float(loss_of(START))
    w = START.to(dtype, copy=True)
    first = ZOSGD([w], **options)
    for v in values[:150]:
        first.step(Replayed(v))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = ZOSGD([w], **options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for v in values[150:]:
        second.step(Replayed(v))
    assert torch.equal(w, straight)


def test_running_rms_makes_the_rate_the_size_of_a_step():
    """The same rate moves a weight by as much whatever the scale of the loss."""
    ends = []
    for scale in (1.0, 1e6, 1e-6):
        w = START.clone()
        opt = ZOSGD([w], lr=1e-3, normalise="rms")
        opt.step(lambda w=w, scale=scale: scale * loss_of(w))
        assert torch.allclose((w - START).abs(), torch.full((D,), 1e-3), rtol=1e-4)
        for _ in range(20):
            opt.step(lambda w=w, scale=scale: scale * loss_of(w))
        ends.append(w)
    assert torch.allclose(ends[0], ends[1], atol=1e-6) and torch.allclose(ends[0], ends[2], atol=1e-6)
    rms = RunningRMS()
    values = [3.0, -4.0, 0.5]
    got = [rms([v])[0] for v in values]
    square, weight = 0.0, 0.0
    for v, g in zip(values, got, strict=True):
        square, weight = 0.99 * square + 0.01 * v * v, 0.99 * weight + 0.01
        assert g == pytest.approx(v / math.sqrt(square / weight))
    assert RunningRMS()([0.0]) == [0.0]


def test_preset_mezo_is_the_papers():
    config = Config(**PRESETS["mezo"])
    assert (config.distribution, config.normalise, config.lr, config.eps) == ("gaussian", "none", 1e-6, 1e-3)
    assert (config.sides, config.queries, config.weight_decay) == (2, 1, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_eps_below_the_rounding_is_named(dtype, caplog):
    weight = torch.full((4096,), 0.05, dtype=dtype)
    needed = smallest_eps(ParamView.of_tensors([weight]))
    moved = (weight.float() + 1.01 * needed).to(dtype) != weight
    stuck = (weight.float() + 0.4 * needed).to(dtype) == weight
    assert moved.all() and stuck.all()
    with caplog.at_level("WARNING", "smidgen"):
        ZOSGD([weight], eps=needed / 2).step(lambda: weight.float().sum())
        assert "use eps >=" in caplog.text
        caplog.clear()
        ZOSGD([weight], eps=2 * needed).step(lambda: weight.float().sum())
        assert not caplog.text


def test_a_dense_twin_written_out_gives_the_same_steps():
    """The slow twin: noise in full, a copied model, plain arithmetic."""
    from families import batch, make
    from smidgen.objective import ModelObjective
    from smidgen.probing import Engine

    kind, model = make("opt-tied")
    _, twin = make("opt-tied")
    view = ParamView.of_model(model)
    opt = ZOSGD(view, lr=1e-2, eps=1e-3, seed=5)
    engine = Engine(model, view, kind)
    data = batch(kind, labels="all")
    parameters = {e.name: p for e, p in zip(view, ParamView.of_model(twin), strict=True)}
    for t in range(3):
        opt.step(ModelObjective(engine, [data]))
        z = Dense(5, t, 0, view.ids)
        noise = {}
        for name, entry in parameters.items():
            noise[name] = torch.zeros(entry.tensor.shape)
            z.accumulate(name, slice(0, entry.tensor.shape[0]), noise[name], 1.0)
        values = []
        for sign in (1, -1):
            saved = {n: e.storage.clone() for n, e in parameters.items()}
            for name, entry in parameters.items():
                entry.storage.add_(noise[name], alpha=sign * 1e-3)
            with torch.no_grad():
                values.append(twin(**data).loss.double())
            for name, entry in parameters.items():
                entry.storage.copy_(saved[name])
        c = float(values[0] - values[1]) / 2e-3
        for name, entry in parameters.items():
            entry.storage.add_(noise[name], alpha=-1e-2 * c)
    assert all(torch.allclose(e.tensor, parameters[e.name].tensor, atol=2e-5) for e in view)
