"""The evolution strategy: shaped fitness, steps on the factors, members without a finite loss."""

from __future__ import annotations

import math

import pytest
import torch

from families import batch, make
from smidgen.batched import BatchedEngine
from smidgen.config import ConfigError
from smidgen.directions import Dense
from smidgen.objective import ClosureObjective, ModelObjective, Recorded
from smidgen.optim.es import ES, Config, shaped
from smidgen.params import ParamView
from smidgen.trainer import method_config


def problem(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=rng).requires_grad_() for s in ((6, 5), (7,))]


def quadratic(weights, scale=1.0):
    return lambda: scale * sum(((w - 1.0) ** 2).sum() for w in weights)


def test_shapes_of_fitness():
    losses = torch.tensor([[4.0], [1.0], [1.0], [2.0]])
    assert shaped(losses, "rank").tolist() == pytest.approx([0.5, -1 / 3, -1 / 3, 1 / 6])
    z = shaped(losses, "zscore")
    assert float(z.mean()) == pytest.approx(0.0, abs=1e-6) and float(z.square().mean()) == pytest.approx(1.0)
    assert shaped(torch.ones(4, 1), "zscore").tolist() == [0.0] * 4
    nan = torch.tensor([[4.0], [math.nan], [1.0], [2.0]])
    assert shaped(nan, "rank").tolist() == pytest.approx([1 / 6, 0.5, -0.5, -1 / 6])
    assert shaped(nan, "zscore").isnan().tolist() == [False, True, False, False]


def test_each_example_is_shaped_apart():
    """An example with a hundred times the loss does not decide the fitness."""
    losses = torch.tensor([[1.0, 300.0], [2.0, 100.0], [3.0, 200.0]])
    assert shaped(losses, "zscore").tolist() == pytest.approx([0.0, -math.sqrt(1.5) / 2, math.sqrt(1.5) / 2], abs=1e-6)


@pytest.mark.parametrize("shape", ["zscore", "rank"])
def test_the_update_by_hand_and_the_scale_of_the_loss(shape):
    for scale in (1.0, 1e3):
        weights, twin = problem(), problem()
        opt = ES(weights, Config(lr=1e-2, queries=3, rank=2, shape=shape, eps=1e-2))
        recorded = Recorded(ClosureObjective(quadratic(weights, scale), opt.view))
        opt.step(recorded)
        opt.merge_()
        s = shaped(torch.tensor(recorded.values, dtype=torch.float64)[:, None], shape).view(3, 2)
        for name, before in zip("01", twin, strict=True):
            step = torch.zeros(before.shape)
            for i in range(3):
                z = opt.shaped(Dense(0, 0, i, opt.view.ids, "gaussian"))
                z.accumulate(name, slice(0, len(step)), step.view(len(step), -1), -1e-2 / 3 * float(s[i, 0] - s[i, 1]) / 2)
            assert torch.allclose(opt.view[name].storage - before.detach(), step, atol=1e-5)


def test_adam_on_the_factors_is_torchs():
    weights = problem()
    opt = ES(weights, Config(lr=1e-2, queries=2, rank=2, step="adam", interval=100))
    twin = torch.zeros(6, 2, requires_grad=True)
    adam = torch.optim.Adam([twin], lr=1e-2)
    for t in range(5):
        recorded = Recorded(ClosureObjective(quadratic(weights), opt.view))
        opt.step(recorded)
        s = shaped(torch.tensor(recorded.values, dtype=torch.float64)[:, None], "zscore").view(2, 2)
        Z = [opt.shaped(Dense(0, t, i, opt.view.ids, "gaussian")) for i in range(2)]
        twin.grad = sum(float(p - m) / 4 * z.left("0") for z, (p, m) in zip(Z, s, strict=True))
        adam.step()
    assert torch.allclose(opt.state[weights[0]]["left"], twin, atol=1e-5)


@pytest.mark.parametrize("step", ["momentum", "adam"])
def test_state_is_what_is_declared_and_starts_anew_at_a_refresh(step):
    weights = problem()
    opt = ES(weights, Config(step=step, interval=3))
    for t in range(3):
        opt.step(quadratic(weights))
        held = sum(v.numel() * v.element_size() for s in opt.state.values() for v in s.values())
        assert held == ES.state_bytes({e.name: (tuple(e.tensor.shape), e.tensor.dtype) for e in opt.view}, opt.config)
        assert bool(opt.state[weights[0]]["first"].any()) == (t < 2)


def test_a_member_without_a_finite_loss_ranks_last_or_voids_its_pair():
    for shape, voided in (("rank", 0), ("zscore", 1)):
        weights = problem()
        opt = ES(weights, Config(queries=2, shape=shape))
        values = iter([1.0, math.nan, 3.0, 2.0])
        opt.step(lambda values=values: torch.tensor(next(values)))
        assert opt.outcome.written and opt.outcome.voided == voided
    assert not ES(weights, Config()).step(lambda: torch.tensor(math.nan)) < math.inf


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_pair_without_a_finite_loss_is_not_in_the_loss_that_is_reported(lost):
    weights = problem()
    opt = ES(weights, Config(queries=2, shape="rank"))
    values = iter([lost, lost, 3.0, 2.0])
    assert opt.step(lambda: torch.tensor(next(values))) == 2.5
    assert opt.outcome.written and opt.outcome.voided == 0 and opt.outcome.measures["zo/spread"] == pytest.approx(0.5**0.5)


def test_relative_fitness_on_a_model_with_ragged_micro_batches():
    kind, model = make("llama-tied")
    view = ParamView.of_model(model)
    opt = ES(view, Config(lr=1e-3, queries=3, relative=True, eps=1e-2))
    rows = [batch(kind, seed=s, labels="all") for s in (0, 1)]
    before = view.snapshot()
    opt.step(ModelObjective(BatchedEngine(model, view, kind), rows))
    opt.merge_()
    assert opt.outcome.written and not all(torch.equal(before[e.name], e.storage) for e in view)


@pytest.mark.parametrize(
    ("method", "option", "least"), [("es", "queries", 1), ("fzoo", "queries", 2), ("cma_es", "population", 4)]
)
def test_a_population_too_small_to_compare_is_refused(method, option, least):
    """es counts pairs: one is a population of two."""
    with pytest.raises(ConfigError, match=f"{method}: option '{option}' = {least - 1}: .*greater than or equal to {least}"):
        method_config(method, None, {option: least - 1})
