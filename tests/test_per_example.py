"""Examples with directions of their own: together as one at a time, on every family, over micro-batches and options."""

from __future__ import annotations

import logging

import pytest
import torch

from families import FAMILIES, batch, make
from smidgen.batched import BatchedEngine
from smidgen.config import ConfigError
from smidgen.directions import Dense
from smidgen.lowrank import LowRank, matrices
from smidgen.objective import ModelObjective
from smidgen.optim.node import OnOutputs
from smidgen.params import ParamView
from smidgen.per_example import Each, Span, examples_of, of_examples, only
from smidgen.probing import Engine
from smidgen.rewards import RewardObjective, accuracy

SEQUENTIAL = {"mixtral", "t5-tied", "t5-untied"}
LIKE_OTHERS = {"t5-untied", "opt-untied", "llama-tied", "bert-masked"}  # with another head, which tests/test_batched.py covers


def directions(view):
    """A low-rank direction, and noise on outputs."""
    low = LowRank(3, 1, 2, view.ids, matrices(view), 2, 0)
    vectors = [e.name for e in view if e.tensor.ndim == 1]
    return low, OnOutputs(Dense(3, 1, 0, view.ids), {n: 1.0 + i % 3 for i, n in enumerate(vectors)}, 0)


def by_hand(model, view, kind, rows, z, scale, first, total):
    """Each example alone in a copy of the model that is displaced in place."""
    found = []
    for n in range(examples_of(rows)):
        saved = view.snapshot()
        own = z.__class__(**{**vars(z), "query": z.query * total + first + n})
        for entry in view:
            if own.support is None or entry.name in own.support:
                own.displaced(entry.name, saved[entry.name], scale, entry.storage)
        found.append(Engine(model, view, kind).losses(only(rows, n)).nll)
        view.restore(saved)
    return torch.cat(found)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in LIKE_OTHERS])
def test_together_as_one_example_at_a_time(family, caplog):
    kind, model = make(family)
    view = ParamView.of_model(model)
    rows = batch(kind, seed=10, labels="all")
    slow, fast = Engine(model, view, kind), BatchedEngine(model, view, kind)
    for z in directions(view):
        probes = [((Each(z), s * 0.05),) for s in (1, -1)]
        expected = slow.together(rows, probes, None, Span(4, 9))
        assert slow.forwards == 2
        with caplog.at_level(logging.WARNING, "smidgen"):
            found = fast.together(rows, probes, None, Span(4, 9))
        assert torch.allclose(expected[0].nll, by_hand(model, view, kind, rows, z, 0.05, 4, 9), atol=1e-5)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a.rows, b.rows) and a.size == b.size
            assert torch.allclose(a.nll, b.nll, atol=2e-4, rtol=1e-4)
        assert float((expected[0].nll - expected[1].nll).abs().max()) > 1e-3  # the probes matter
        slow.forwards = 0
    assert fast.forwards == 4
    assert any("one at a time" in r.getMessage() for r in caplog.records) == (family in SEQUENTIAL)


def test_rows_count_over_micro_batches_and_ragged_labels():
    kind, model = make("opt-tied")
    view = ParamView.of_model(model)
    halves = [batch(kind, rows=r, seed=s, labels="all") for r, s in ((3, 1), (2, 2))]
    probes = [((Each(z), 0.05),) for z in directions(view)]
    slow = ModelObjective(Engine(model, view, kind), halves).losses(probes, each=True)
    fast = ModelObjective(BatchedEngine(model, view, kind), halves).losses(probes, each=True)
    assert slow.shape == (2, 5) and torch.allclose(slow, fast, atol=1e-5)
    last = of_examples(probes[0], Span(4, 5), 1)[0]
    assert last[0][0].query == 2 * 5 + 4
    alone = ModelObjective(Engine(model, view, kind), [only(halves[1], 1)]).losses([last], each=True)
    assert torch.allclose(alone[0, 0], slow[0, 4], atol=1e-6)


def test_options_of_an_example_share_its_direction():
    kind, model = make("gpt2")
    view = ParamView.of_model(model)
    rows = batch(kind, rows=5, seed=3, labels="all")
    rows |= {"groups": torch.tensor([0, 0, 0, 1, 1]), "golds": torch.tensor([1, 4]), "divisors": torch.ones(5)}
    probes = [((Each(z), s * 0.05),) for z in directions(view) for s in (1, -1)]
    slow = ModelObjective(Engine(model, view, kind), [rows]).losses(probes, each=True)
    fast = ModelObjective(BatchedEngine(model, view, kind), [rows]).losses(probes, each=True)
    assert slow.shape == (4, 2) and torch.allclose(slow, fast, atol=1e-5)


def test_a_reward_has_no_losses_of_rows_at_probes_of_their_own():
    kind, model = make("roberta-classification")
    view = ParamView.of_model(model)
    objective = RewardObjective(Engine(model, view, kind), [batch(kind)], accuracy)
    with pytest.raises(ConfigError, match="use the loss of the rows"):
        objective.losses([((Each(directions(view)[0]), 0.1),)], each=True)
