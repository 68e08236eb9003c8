"""The forward gradient against its formulas. Statistical bounds come from standard errors, with fixed seeds."""

from __future__ import annotations

import math

import pytest
import torch

from families import FAMILIES, batch, make
from smidgen.config import ConfigError
from smidgen.directions import Dense
from smidgen.objective import ModelObjective
from smidgen.optim.forward_grad import PRESETS, Config, ForwardGrad
from smidgen.params import ParamView
from smidgen.probing import Engine

D = 6
CURVATURE = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
START = torch.linspace(-1.0, 1.0, D)


def loss_of(w):
    return (0.5 * CURVATURE * w**2).sum() + (w**3).sum()


GRADIENT = (CURVATURE * START + 3 * START**2).double()


@pytest.mark.parametrize("distribution,fourth", [("rademacher", 1.0), ("gaussian", 3.0)])
@pytest.mark.parametrize("queries", [1, 4])
def test_the_estimate_is_unbiased_with_the_known_second_moment(distribution, fourth, queries):
    count, lr, samples = 300, 2.0**-10, []
    for seed in range(count):
        w = START.clone()
        ForwardGrad([w], lr=lr, seed=seed, distribution=distribution, queries=queries).step(lambda w=w: loss_of(w))
        samples.append((START - w).double() / lr)
    g = torch.stack(samples)
    error = g.std(0) / math.sqrt(count)
    assert ((g.mean(0) - GRADIENT).abs() < 4 * error + 1e-4).all()
    squares = g.square().sum(1) / GRADIENT.square().sum()
    spread = 4 * float(squares.std()) / math.sqrt(count)
    # E|g_hat|^2 = [|g|^2 (d + q - 1) + (fourth - 2) |g|^2 + ...] / q: as for zo_sgd, exact here without any eps
    assert abs(float(squares.mean()) - (D + queries - 2 + fourth) / queries) < spread


def test_a_step_is_the_exact_slope_along_the_noise():
    w = START.clone()
    opt = ForwardGrad([w], lr=0.01, seed=9, queries=3, distribution="gaussian")
    opt.step(lambda: loss_of(w))
    moved, slopes = torch.zeros(D, dtype=torch.float64), []
    for q in range(3):
        z = torch.zeros(D)
        Dense(9, 0, q, {"0": 0}, "gaussian").accumulate("0", slice(0, D), z, 1.0)
        slopes.append(float(GRADIENT @ z.double()))
        moved -= 0.01 / 3 * slopes[-1] * z.double()
    assert torch.allclose((w - START).double(), moved, atol=1e-6)
    assert opt.outcome.measures["zo/projected_grad"] == pytest.approx(sum(slopes) / 3, rel=1e-5)
    assert opt.outcome.loss == pytest.approx(float(loss_of(START)))


def test_decay_spares_vectors_and_rms_makes_the_rate_the_size_of_a_step():
    matrix, vector = torch.ones(3, 4), torch.ones(5)
    ForwardGrad([matrix, vector], lr=0.1, weight_decay=0.5).step(lambda: torch.zeros(()))
    assert torch.equal(matrix, torch.full((3, 4), 0.95)) and torch.equal(vector, torch.ones(5))
    for scale in (1.0, 1e6, 1e-6):
        w = START.clone()
        ForwardGrad([w], lr=1e-3, normalise="rms").step(lambda w=w, scale=scale: scale * loss_of(w))
        assert torch.allclose((w - START).abs(), torch.full((D,), 1e-3), rtol=1e-4)


def test_one_dead_query_is_voided():
    w, calls = START.clone(), []

    def loss():
        calls.append(1)
        return loss_of(w) * (math.nan if len(calls) == 2 else 1.0)

    opt = ForwardGrad([w], queries=3, lr=0.01)
    assert math.isfinite(opt.step(loss)) and opt.outcome.voided == 1 and len(calls) == 3


def test_presets_and_options():
    assert Config(**PRESETS["paper"]).distribution == "gaussian"
    with pytest.raises(ValueError):
        ForwardGrad([START.clone()], eps=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_every_family_falls_along_the_step(family):
    kind, model = make(family)
    view = ParamView.of_model(model)
    engine = Engine(model, view, kind)
    opt = ForwardGrad(view, lr=1e-4, normalise="rms", queries=2)
    objective = ModelObjective(engine, [batch(kind)])
    first = float(objective.losses([()]))
    for _ in range(2):
        assert math.isfinite(opt.step(objective))
    assert engine.jvps == 4 and float(objective.losses([()])) < first


def test_it_wants_our_loss():
    from transformers import Trainer

    import smidgen

    with pytest.raises(ConfigError, match=r"forward_grad differentiates smidgen's own loss.*smidgen\.Trainer"):
        smidgen.forward_only(Trainer, method="forward_grad")


@pytest.mark.trainer
def test_a_run_resumes_from_its_journal_with_the_same_bits_and_counts(tmp_path):
    from smidgen import journal
    from test_trainer import equal, run

    options = {"method": "forward_grad", "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    straight, t = run(tmp_path / "a", **options)
    assert {len(r.values) for r in journal.read(tmp_path / "a" / "journal.bin").steps()} == {2}  # loss and slope
    assert (t.engine.forwards, t.engine.jvps) == (12, 12)
    run(tmp_path / "b", stop=4, **options)
    resumed, again = run(tmp_path / "b", resume=True, **options)
    assert equal(straight, resumed)
    assert (again.engine.forwards, again.engine.jvps, again.engine.tokens) == (12, 12, t.engine.tokens)
