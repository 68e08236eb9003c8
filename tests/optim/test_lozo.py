"""LOZO: lazy factors equal the eager update, a refresh keeps its direction, runs resume and replay to the same bits."""

from __future__ import annotations

import math

import pytest
import torch

from families import batch, make
from smidgen.batched import BatchedEngine
from smidgen.config import ConfigError
from smidgen.directions import Dense
from smidgen.lowrank import LowRank, matrices
from smidgen.objective import ModelObjective, Recorded, Replayed
from smidgen.optim.lozo import LOZO, Config
from smidgen.params import ParamView
from smidgen.probing import Engine

SHAPES = ((6, 5), (7,), (4, 2, 3), (1, 4), ())


def tensors(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng).requires_grad_() for shape in SHAPES]


def loss_of(weights):
    return lambda: sum(((w - 1.0) ** 2).sum() for w in weights)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_lazy_factors_equal_steps_that_are_written_at_once(rank, decay):
    """The eager twin keeps W itself and adds -lr c D to it in every step."""
    weights, twin = tensors(), tensors()
    lazy = LOZO(weights, Config(lr=1e-3, rank=rank, interval=4, weight_decay=decay))
    view = ParamView.of_tensors(twin)
    shapes = matrices(view)
    for t in range(11):
        recorded = Recorded(lazy_objective := _closure(weights, lazy))
        lazy.step(recorded)
        assert lazy_objective.view is lazy.view
        plus, minus = recorded.values
        c = (plus - minus) / (2 * lazy.config.eps)
        D = LowRank(0, t, 0, view.ids, shapes, rank, t // 4 * 4)
        factor = {n: 1 - 1e-3 * decay if view[n].tensor.ndim >= 2 else 1.0 for n in view.entries}
        view.apply_([(D, -1e-3 * c)], at=lazy.rounding_address(0), decay=factor)
    lazy.merge_()
    for a, b in zip(weights, twin, strict=True):
        assert torch.allclose(a, b, atol=2e-6)
    assert not torch.allclose(weights[0], tensors()[0], atol=1e-4)


def _closure(weights, opt):
    from smidgen.objective import ClosureObjective

    return ClosureObjective(loss_of(weights), opt.view)


def test_directions_have_unit_variance_and_are_unbiased():
    """E D_ij^2 = 1 and E[D <G, D>] = G over U and V, within four standard errors."""
    rng = torch.Generator().manual_seed(1)
    G = torch.randn(6, 5, generator=rng)
    draws = []
    for t in range(4000):
        A, B = LowRank(0, t, 0, {"w": 7}, {"w": (6, 5)}, 2, t).factors("w")
        draws.append(A @ B.T)
    D = torch.stack(draws)
    square = (D**2).flatten()
    assert abs(float(square.mean()) - 1.0) < 4 * float(square.std()) / math.sqrt(D.shape[0])  # entries of a draw are dependent
    estimate = D * (D * G).sum((1, 2))[:, None, None]
    error = estimate.std(0) / math.sqrt(len(D))
    assert bool(((estimate.mean(0) - G).abs() < 4.5 * error).all())


def test_a_refresh_changes_the_right_factor_only():
    a, b = (LowRank(0, 9, 0, {"w": 7}, {"w": (6, 5)}, 2, subspace) for subspace in (0, 5))
    assert torch.equal(a.left("w"), b.left("w")) and not torch.equal(a.right("w"), b.right("w"))
    assert a.right_key("w") != b.right_key("w")


def test_matrices_are_written_at_a_refresh_only():
    weights = tensors()
    opt = LOZO(weights, Config(lr=1e-3, interval=3))
    written = []
    for _ in range(7):
        before = [w.detach().clone() for w in weights]
        opt.step(loss_of(weights))
        written.append([not torch.equal(a, b) for a, b in zip(before, weights, strict=True)])
    assert [w[0] for w in written] == [False, False, True, False, False, True, False]
    assert all(w[1] and w[3] and w[4] for w in written)  # no matrices: a vector, one row, a scalar


def test_a_bad_step_at_the_end_of_an_interval_leaves_the_refresh_to_the_next_good_one():
    weights = tensors()
    opt = LOZO(weights, Config(lr=1e-3, interval=2))
    opt.step(loss_of(weights))
    before = [w.detach().clone() for w in weights]
    opt.step(lambda: torch.tensor(math.nan))
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True)) and opt.subspace == 0
    opt.step(loss_of(weights))
    assert not torch.equal(before[0], weights[0]) and opt.subspace == 3 and opt.offset()
    assert all(not s["left"].any() for s in (opt.state[w] for w in weights) if s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_the_batched_engine_replays_to_the_same_bits(dtype):
    ends = []
    transcript = []
    for replay in (False, True):
        kind, model = make("opt-tied")
        model = model.to(dtype)
        view = ParamView.of_model(model)
        engine, opt = BatchedEngine(model, view, kind), LOZO(view, Config(lr=1e-4, eps=1e-2, interval=2))
        for t in range(5):
            if replay:
                opt.step(Replayed(transcript[t]))
            else:
                recorded = Recorded(ModelObjective(engine, [batch(kind, seed=t, labels="all")]))
                opt.step(recorded)
                transcript.append(recorded.values)
        opt.merge_()
        ends.append(view.snapshot())
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_batched_and_sequential_engines_give_the_same_run_to_rounding():
    ends = []
    for kind_of in (Engine, BatchedEngine):
        kind, model = make("llama-untied")
        view = ParamView.of_model(model)
        engine, opt = kind_of(model, view, kind), LOZO(view, Config(lr=1e-4, eps=1e-2, interval=3))
        for t in range(4):
            opt.step(ModelObjective(engine, [batch(kind, seed=t, labels="all")]))
        opt.merge_()
        ends.append(view.snapshot())
    assert all(torch.allclose(ends[0][n], ends[1][n], atol=1e-5) for n in ends[0])


def test_rank_beyond_every_matrix_and_no_matrix_at_all():
    with pytest.raises(ConfigError, match="rank = 6, and the tuned matrices have at most 5"):
        LOZO(tensors(), Config(rank=6))
    with pytest.raises(ConfigError, match="no tuned tensor is a matrix"):
        LOZO([torch.zeros(4, requires_grad=True)], Config())


def test_shaped_keeps_the_address():
    opt = LOZO(tensors(), Config(rank=2))
    z = opt.shaped(Dense(5, 3, 1, opt.view.ids, "gaussian"))
    assert (z.seed, z.step, z.query, z.subspace, z.rank) == (5, 3, 1, 0, 2)
