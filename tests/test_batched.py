"""Batched probing equals the sequential engine, on every model family."""

from __future__ import annotations

import logging

import pytest
import torch

from families import FAMILIES, batch, make
from smidgen.batched import BatchedEngine, unsupported
from smidgen.lowrank import LowRank, matrices
from smidgen.params import ParamView
from smidgen.probing import Engine


def probes_of(view, count, *, same=True, scale=0.05, rank=2):
    shapes = matrices(view)
    z = [LowRank(3, 1, i, view.ids, shapes, rank, 0 if same else i) for i in range(count)]
    return [((d, s * scale),) for d in z for s in (1, -1)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("same", [True, False])
def test_equals_one_probe_at_a_time(family, same, caplog):
    kind, model = make(family)
    view = ParamView.of_model(model)
    engine = Engine(model, view, kind)
    before = view.snapshot()
    rows = batch(kind, seed=10, labels="all")
    probes = [*probes_of(view, 2, same=same), ()]
    slow = [engine.losses(rows, probe) for probe in probes]
    with caplog.at_level(logging.WARNING, "smidgen"):
        batched = BatchedEngine(engine)
        fast = batched.losses(rows, probes)
    base = slow[-1].nll
    for a, b in zip(slow, fast, strict=True):
        assert torch.equal(a.rows, b.rows) and a.size == b.size
        assert torch.allclose(a.nll, b.nll, atol=2e-4, rtol=1e-4)
    assert float((slow[0].nll - base).abs().max()) > 1e-3  # the probes matter
    assert all(torch.equal(before[e.name], e.storage) for e in view)
    print(family, unsupported(engine), [r.message for r in caplog.records])
