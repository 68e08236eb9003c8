"""Layers in pinned host memory give the bits of a model that lies on the device as a whole."""

from __future__ import annotations

import pytest
import torch

from families import batch, make
from smidgen import batched, optim
from smidgen.layerwise import StreamedEngine, engine_of, from_host
from smidgen.objective import ModelObjective
from smidgen.params import ParamView

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("method", ["zo_sgd", "zo_sign", "lozo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_the_same(method, dtype, monkeypatch):
    monkeypatch.setattr(batched, "NARROW", 4)  # matrices of this tiny model count as wide, as in one that would not fit
    found = []
    for host in (False, True):
        kind, model = make("llama-untied", dtype)
        if host:
            from_host(model, torch.device("cuda"))
        else:
            model.cuda()
        view = ParamView.of_model(model)
        engine, module = engine_of(model, view, kind), optim.get(method)
        engine.graphs = None  # in a graph transformers makes masks explicit, and another attention kernel may run
        opt = module.build(view, module.Config(lr=1e-3))
        micro = [{k: v.cuda() for k, v in batch(kind, labels="all", rows=r, seed=r).items()} for r in (2, 3)]
        losses = [opt.step(ModelObjective(engine, micro)) for _ in range(4)]
        opt.merge_()
        found.append((losses, {e.name: e.storage.cpu() for e in view}))
        assert isinstance(engine, StreamedEngine) is host
    (losses, resident), (others, streamed) = found
    assert losses == others and all(torch.equal(resident[name], streamed[name]) for name in resident)
