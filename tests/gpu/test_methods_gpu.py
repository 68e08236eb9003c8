"""Methods on a CUDA device: every one runs there in float32 and bfloat16, and a run is replayed on the CPU bit for bit."""

from __future__ import annotations

import pytest
import torch

from families import batch, make
from smidgen import optim
from smidgen.objective import ModelObjective, Recorded, Replayed
from smidgen.params import ParamView
from smidgen.probing import Engine
from test_families import check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

KERNELS_ONLY = ["zo_sgd", "zo_sign", "zo_conservative"]  # methods that compute with the noise kernels alone


def on_gpu(family: str, dtype: torch.dtype):
    kind, model = make(family, dtype)
    return kind, model.cuda(), {key: value.cuda() for key, value in batch(kind).items()}


@pytest.mark.parametrize("method", optim.names())
@pytest.mark.parametrize("family", ["opt-tied", "llama-untied", "roberta-masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_runs(family, method, dtype):
    if method == "galore":
        pytest.importorskip("galore_torch")
    kind, model, data = on_gpu(family, dtype)
    check(method, kind, model, data)
    assert all(p.device.type == "cuda" and p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("method", KERNELS_ONLY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_on_the_gpu_is_replayed_on_the_cpu(method, dtype):
    module, config = optim.get(method), {"lr": 1e-3, "weight_decay": 0.1, "distribution": "gaussian"}
    kind, model, data = on_gpu("opt-tied", dtype)
    view = ParamView.of_model(model)
    engine, opt = Engine(model, view, kind), module.build(view, module.Config(**config))
    answers = []
    for _ in range(4):
        recorded = Recorded(ModelObjective(engine, [data]))
        opt.step(recorded)
        answers.append(recorded.values)
    _, twin = make("opt-tied", dtype)
    here = ParamView.of_model(twin)
    again = module.build(here, module.Config(**config))
    for values in answers:
        again.step(Replayed(values))
    assert all(torch.equal(entry.storage, view[entry.name].storage.cpu()) for entry in here)


def test_losses_on_the_gpu_are_those_of_the_cpu():
    kind, model, data = on_gpu("llama-untied", torch.float32)
    view = ParamView.of_model(model)
    ours = ModelObjective(Engine(model, view, kind), [data]).losses([()])
    _, twin = make("llama-untied")
    theirs = ModelObjective(Engine(twin, ParamView.of_model(twin), kind), [batch(kind)]).losses([()])
    assert torch.allclose(ours, theirs, atol=1e-4)  # float32 matrix products in another order (or tf32)
