"""Candidates of one layer start from cached hidden states: the same losses as full forwards, a part of the layers run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from families import FAMILIES, batch, make
from smidgen.batched import BatchedEngine
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.reuse import Held
from smidgen.space import Space

NO_STACK = {"t5-tied", "t5-untied"}
SEQUENTIAL = NO_STACK | {"mixtral"}


def upper(view: ParamView) -> list[str]:
    """Attention matrices of the second layer."""
    return [n for n in view.entries if ".1." in n and ("attn" in n or "attention" in n) and view[n].tensor.ndim == 2]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in SEQUENTIAL])
def test_cached_is_uncached_is_one_at_a_time(family):
    kind, model = make(family)
    view = ParamView.of_model(model)
    space = Space(view, upper(view), seed=3, dimension=None)
    Z = np.random.default_rng(0).standard_normal((3, space.d)) * 0.3
    probes = [((z, 1.0),) for z in space.displacements(Z)]
    rows = batch(kind, seed=10, labels="all")
    slow, fast = Engine(model, view, kind), BatchedEngine(model, view, kind)
    uncached = fast.together(rows, probes)
    assert fast.reuse.skipped == 0
    held = Held()
    fast.together(rows, probes, held)  # finds the stack, and compares
    for again in (held, Held()):
        before, forwards = fast.reuse.skipped, fast.forwards
        cached = fast.together(rows, probes, again)
        assert fast.reuse.skipped == before + 1 and fast.forwards == forwards + 3
        for probe, a, b in zip(probes, cached, uncached, strict=True):
            assert torch.allclose(a.nll, b.nll, atol=1e-5)  # products of another number of rows, float32
            assert torch.allclose(a.nll, slow.losses(rows, probe).nll, atol=1e-4)
    assert float((uncached[0].nll - slow.losses(rows).nll).abs().max()) > 1e-3


def test_hidden_states_are_taken_anew_when_the_weights_below_move():
    kind, model = make("llama-tied")
    view = ParamView.of_model(model)
    probes = [((z, 1.0),) for z in Space(view, upper(view), seed=3).displacements(np.ones((2, 4 * 125)))]
    rows, fast, held = batch(kind, seed=10), BatchedEngine(model, view, kind), Held()
    first = fast.together(rows, probes, held)[0].nll
    lower = next(n for n in view.entries if ".0.self_attn" in n)
    view[lower].storage.mul_(2.0)
    view[lower].version += 1
    found = fast.together(rows, probes, held)[0].nll
    assert not torch.allclose(first, found) and torch.allclose(found, fast.together(rows, probes)[0].nll, atol=1e-5)


def test_a_model_whose_layers_hand_on_more_than_a_tensor_runs_in_full(caplog, monkeypatch):
    kind, model = make("opt-tied")
    view = ParamView.of_model(model)
    probes = [((z, 1.0),) for z in Space(view, upper(view), seed=3).displacements(np.ones((2, 500)))]
    fast, rows = BatchedEngine(model, view, kind), batch(kind, seed=10)
    expected = fast.together(rows, probes)
    monkeypatch.setattr("smidgen.reuse._pass", lambda state, width, *a, **k: (state if state is not None else a[0]) * 1.5)
    found = fast.together(rows, probes, Held())
    assert fast.reuse.start(probes) == 0
    assert all(torch.equal(a.nll, b.nll) for a, b in zip(expected, found, strict=True))
