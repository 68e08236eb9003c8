"""CMA-ES: known targets, what becomes of the weights, the transcript, replay on a model, runs with a budget."""

from __future__ import annotations

import builtins
import math

import numpy as np
import pytest
import torch

from families import batch, make
from smidgen.adapt import dfo_lora
from smidgen.batched import BatchedEngine
from smidgen.config import ConfigError
from smidgen.objective import ClosureObjective, ModelObjective, Recorded, Replayed
from smidgen.optim import cma_es
from smidgen.optim._search import ranked
from smidgen.optim.cma_es import CMAES
from smidgen.params import ParamView
from smidgen.trainer import method_config


def ellipsoid(w, condition=1e3):
    scales = condition ** (torch.arange(len(w)) / (len(w) - 1))
    return lambda: (scales * (w - 0.5) ** 2).sum()


@pytest.mark.parametrize(("covariance", "incumbent"), [("full", "best_ever"), ("diagonal", "best"), ("diagonal", "mean")])
def test_reaches_the_minimum_of_an_ellipsoid(covariance, incumbent):
    w = torch.zeros(4)
    opt = CMAES([w], lr=0.5, covariance=covariance, incumbent=incumbent, population=10)
    first = float(ellipsoid(w)())
    for _ in range(120):
        opt.step(ellipsoid(w))
    assert float(ellipsoid(w)()) < 1e-6 * first


def test_the_generation_is_the_packages_own():
    """The same points and the same mean as cma's loop fed with the same normals."""
    import cma

    w = torch.zeros(6)
    opt = CMAES([w], lr=0.3, population=8, incumbent="mean", covariance="full", seed=7)
    points = []

    class Spy(ClosureObjective):
        def losses(self, probes, *, each=False):
            base = self.view["0"].storage.clone()
            points.append(torch.stack([base + z.values["0"] for ((z, _),) in probes]).double().numpy())
            return super().losses(probes, each=each)

    for _ in range(5):
        opt.step(Spy(ellipsoid(w), opt.view))
    twin = opt.strategy(6, opt.view["0"].id)
    options = {"popsize": 8, "randn": twin._randn, "seed": np.nan, "verbose": -9, "verb_log": 0}
    es = cma.CMAEvolutionStrategy(np.zeros(6), 0.3, options)
    for t in range(5):
        twin.t, twin.draws = t, 0
        X = es.ask()
        assert np.allclose(X, points[t], atol=1e-6)
        es.tell(X, opt.told[t][2][0])
    assert np.allclose(es.mean, w.double().numpy(), atol=1e-6)


def test_what_the_weights_become():
    values = iter([5.0, 1.0, 3.0, 4.0, 2.0, 8.0, 9.0, 7.0])
    seen = []

    class Given:
        key = None

        def losses(self, probes, *, each=False):
            seen.append([z.values["0"] for ((z, _),) in probes])
            return torch.tensor([next(values) for _ in probes], dtype=torch.float64)

    for incumbent in ("best_ever", "best"):
        values, seen = iter([5.0, 1.0, 3.0, 4.0, 2.0, 8.0, 9.0, 7.0]), []
        w = torch.zeros(3)
        opt = CMAES([w], population=4, incumbent=incumbent)
        opt.step(Given())
        best = w.clone()
        assert torch.allclose(best, seen[0][1], atol=1e-6)
        opt.step(Given())
        assert torch.equal(w, best) if incumbent == "best_ever" else torch.allclose(w, best + seen[1][0], atol=1e-6)


def test_a_candidate_without_a_finite_loss_ranks_last():
    assert ranked(np.array([-50.0, np.nan, -60.0, np.inf])).tolist() == [-50.0, 0.0, -60.0, 0.0]
    w = torch.zeros(4)
    opt = CMAES([w], population=6)
    losses = iter([math.nan, 3.0, math.inf, 1.0, math.nan, 2.0])
    assert opt.step(lambda: torch.tensor(next(losses))) == pytest.approx(2.0)
    assert opt.outcome.voided == 3 and opt.outcome.written
    assert opt.strategies[0].best == 1.0


def test_layers_take_turns_from_the_lowest_up_or_all_move_at_once():
    _, model = make("llama-tied")
    view = dfo_lora.build(model, dfo_lora.Config()).view
    opt = CMAES(view, dimension=40)
    assert [{name.split(".")[2] for name in block} for block in opt.blocks] == [{"0"}, {"1"}] and opt.dims == [40, 40]
    whole = CMAES(view, dimension=40, order="all")
    assert len(whole.blocks) == 1 and len(whole.blocks[0]) == 8


def test_hidden_states_replay_and_checkpoints_on_a_model():
    """A run from numbers alone, and one loaded in the middle, end at the bits of the live one."""
    ends, transcript, states = [], [], []
    for run in ("live", "replayed", "loaded"):
        kind, model = make("gpt2")
        adapted = dfo_lora.build(model, dfo_lora.Config(rank=2))
        view = adapted.view
        engine = BatchedEngine(adapted.model, view, kind)
        opt = CMAES(view, method_config("cma_es", "reference", {"dimension": 30, "population": 6}))
        for t in range(6):
            if run == "live":
                recorded = Recorded(ModelObjective(engine, [batch(kind, seed=10)]))
                opt.step(recorded)
                transcript.append(recorded.values)
                if t == 2:
                    states.append((opt.state_dict(), view.snapshot()))
            elif run == "replayed":
                replayed = Replayed(transcript[t])
                opt.step(replayed)
                assert replayed.done()
            elif t > 2:
                opt.step(Replayed(transcript[t]))
            elif t == 2:
                view.restore(states[0][1])
                opt.load_state_dict(states[0][0])
        if run == "live":
            assert engine.forwards == 6 * 6 + 1  # the statistics are one forward
            assert engine.reuse.skipped >= 3
        ends.append(view.snapshot())
    for other in ends[1:]:
        assert all(torch.equal(other[name], value) for name, value in ends[0].items())
    assert any(value.any() for value in ends[0].values())


def test_merged_is_unmerged_after_a_search():
    kind, model = make("roberta-masked")
    adapted = dfo_lora.build(model, dfo_lora.Config())
    data = batch(kind, seed=10)
    opt = CMAES(adapted.view, dimension=40, population=6, init="hidden")
    for _ in range(4):
        opt.step(ModelObjective(BatchedEngine(adapted.model, adapted.view, kind), [data]))
    with torch.no_grad():
        inputs = {k: v for k, v in data.items() if k != "labels"}
        mine, plain = adapted.model(**inputs).logits, adapted.merged()(**inputs).logits
    assert torch.allclose(mine, plain, atol=1e-4)


def test_bad_options():
    w = torch.zeros(3000, 2)
    with pytest.raises(ConfigError, match=r"budget 10 is smaller than one generation of 20 forwards"):
        method_config("cma_es", None, {"budget": 10})
    with pytest.raises(ConfigError, match=r"6,001 coordinates|dimension = 6001, but the block of '0' has 6000 weights"):
        CMAES([w], dimension=6001)
    with pytest.raises(ConfigError, match=r"a full covariance of 6,000 coordinates takes 0.6 GB"):
        CMAES([w], dimension=6000, covariance="full")
    with pytest.raises(ConfigError, match="init = hidden looks at a model, and a closure has none"):
        CMAES([w], init="hidden").step(lambda: w.sum())


def test_without_the_package_the_command_is_named(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "cma":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'smidgen\[dfo\]'"):
        CMAES([torch.zeros(3)])


@pytest.mark.parametrize("name", cma_es.PRESETS)
def test_presets_are_options(name):
    config = method_config("cma_es", name, {})
    assert config.budget == 8000 and config.population == 20 and config.steps == 400


def test_one_dimension_and_16_bits():
    w = torch.zeros((), dtype=torch.bfloat16)
    opt = CMAES(ParamView.of_tensors([w]), lr=0.5, population=6)
    for _ in range(30):
        opt.step(lambda: (w.float() - 2.0) ** 2)
    assert abs(float(w) - 2.0) < 0.02
