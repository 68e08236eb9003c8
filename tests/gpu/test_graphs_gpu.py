"""Captured evaluations on a CUDA device: the losses of ordinary ones, the same bits in whatever order, held directions."""

from __future__ import annotations

import pytest
import torch

from families import batch, make
from smidgen import noise
from smidgen.batched import BatchedEngine
from smidgen.directions import Dense
from smidgen.lowrank import LowRank, matrices
from smidgen.params import ParamView
from smidgen.population import Population
from smidgen.probing import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FAMILIES = ["opt-tied", "llama-untied", "qwen3", "gpt2", "roberta-masked", "bert-classification", "t5-tied"]


def engine(family: str, dtype: torch.dtype, graphs: bool = True):
    kind, model = make(family, dtype)
    view = ParamView.of_model(model.cuda())
    made = Engine(model, view, kind)
    if not graphs:
        made.graphs = None
    return kind, view, made


def probes(view: ParamView):
    z = [Dense(2**63 + 5, step, 1, view.ids) for step in (1, 2**32 - 1)]
    return [(), *([(d, scale)] for d in z for scale in (0.05, -0.1))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_those_of_ordinary_evaluations_and_repeat(family, dtype):
    kind, view, ours = engine(family, dtype)
    _, _, plain = engine(family, dtype, graphs=False)
    _, _, again = engine(family, dtype)
    data = [{k: v.cuda() for k, v in batch(kind, rows=3, seed=seed).items()} for seed in (0, 1)]
    first = {}
    for i, rows in enumerate(data):
        for j, probe in enumerate(probes(view)):
            first[i, j] = ours.together(rows, [probe])[0].nll
            other = plain.together(rows, [probe])[0].nll
            assert torch.allclose(first[i, j], other, atol=1e-4 if dtype == torch.float32 else 5e-2)
    assert ours.graphs is not None and ours.graphs.reason is None
    for (i, j), nll in reversed(first.items()):  # another history
        assert torch.equal(again.together(data[i], [probes(view)[j]])[0].nll, nll)


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("t5")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_populations_are_those_of_ordinary_evaluations_and_repeat(family, dtype, monkeypatch):
    kind, model = make(family, dtype)
    view = ParamView.of_model(model.cuda())
    ours, plain, again = (BatchedEngine(model, view, kind) for _ in range(3))
    plain.graphs = None
    monkeypatch.setattr(plain, "_population", Population)
    shapes, here = matrices(view), torch.device("cuda", torch.cuda.current_device())
    data = [{k: v.cuda() for k, v in batch(kind, rows=3, seed=seed).items()} for seed in (0, 1)]
    steps = [
        [[(z, s)] for z in (LowRank(7, step, i, view.ids, shapes, 2, 0, here) for i in range(2)) for s in (0.05, -0.1)]
        for step in (1, 2**32 - 1)
    ]
    first = {}
    for i, rows in enumerate(data):
        for j, probes in enumerate(steps):
            first[i, j] = torch.stack([found.nll for found in ours.together(rows, probes)])
            other = torch.stack([found.nll for found in plain.together(rows, probes)])
            assert torch.allclose(first[i, j], other, atol=1e-4 if dtype == torch.float32 else 5e-2)
    assert ours._reason is None and ours.graphs is not None and ours.graphs.reason is None and ours.graphs._graphs
    for (i, j), nll in reversed(first.items()):  # another history
        assert torch.equal(torch.stack([found.nll for found in again.together(data[i], steps[j])]), nll)


def test_held_terms_have_the_bits_of_terms():
    record = noise.Held(torch.zeros(6, dtype=torch.int32, device="cuda"), tensor=2**32 - 7)
    weights = [torch.randn(300, 64, device="cuda").to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    rows = torch.tensor([299, 0, 7, 7], device="cuda")
    for distribution in ("rademacher", "gaussian"):
        for address, scale in [
            (noise.Address(2**64 - 3, 2**32 - 7, 2**31, 5, noise.PROBE), 0.3),
            (noise.Address(4, 2**32 - 7, 1, 0, 0), -2e-3),
        ]:
            record.put(address, scale)
            for w in weights:
                a, b = torch.empty_like(w), torch.empty_like(w)
                noise.displace_(a, w, record, distribution)
                noise.displace_(b, w, [(address, scale)], distribution)
                assert torch.equal(a, b)
                few, same = torch.empty(4, 64, dtype=w.dtype, device="cuda"), torch.empty(4, 64, dtype=w.dtype, device="cuda")
                noise.displace_rows_(few, w, rows, record, distribution)
                noise.displace_rows_(same, w, rows, [(address, scale)], distribution)
                assert torch.equal(few, same)
            outs, others = [torch.empty_like(w) for w in weights], [torch.empty_like(w) for w in weights]
            noise.all_(outs, weights, [5, 6, 2**32 - 1], record, distribution)
            noise.all_(others, weights, [5, 6, 2**32 - 1], (address, scale), distribution)
            assert all(torch.equal(a, b) for a, b in zip(outs, others, strict=True))
