"""Linear layers through oneDNN: the same numbers as F.linear, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from families import batch, make
from smidgen import linear
from test_probing import displaced_copy, engine_of, probe_of


@pytest.fixture
def onednn(monkeypatch):
    """Products of any size go through oneDNN, on any processor."""
    monkeypatch.setattr(linear, "SMALLEST", 1)
    monkeypatch.setattr(linear, "_available", lambda: True)


@pytest.mark.parametrize("capability,taken", [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_it_is_taken_where_the_processor_has_avx512(monkeypatch, capability, taken):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert linear._available.__wrapped__() is taken


@pytest.mark.parametrize("shape", [(1, 3), (5, 7), (2, 9, 41), (3, 0, 8), (13, 1)])
@pytest.mark.parametrize("outputs", [1, 6, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_agrees_with_torch(onednn, shape, outputs, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in (shape, (outputs, shape[-1]), (outputs,)))
    for b in (bias, None):
        with torch.no_grad():
            got, want = linear.linear(x, weight, b), F.linear(x, weight, b)
        assert got.dtype == dtype and got.shape == want.shape
        assert torch.allclose(got, want, atol=1e-5, rtol=1e-5)
        strided = weight.t().contiguous().t()
        exact = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2  # torch itself sums strided 16-bit weights otherwise
        with torch.no_grad():
            assert torch.allclose(linear.linear(x, strided, b), want, atol=exact, rtol=exact)


def test_gradients_and_autocast_take_torchs_own(onednn):
    x, weight = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    linear.linear(x, weight, None).sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 3), 2.0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear.linear(x, weight, None).dtype == torch.bfloat16


def test_layers_are_put_back_also_after_an_error():
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2)))
    found = linear.layers(model)
    with pytest.raises(RuntimeError, match="no"), linear.fast(found):
        assert all("forward" in m.__dict__ for m, _ in found)
        raise RuntimeError("no")
    assert len(found) == 2 and not any("forward" in m.__dict__ for m, _ in found)


@pytest.mark.parametrize("family", ["opt-tied", "llama-untied", "t5-tied", "bert-classification", "mixtral", "gemma2"])
def test_probes_are_bit_equal_through_onednn_too(onednn, monkeypatch, family):
    kind, model = make(family)
    data = batch(kind, labels="all")
    engine = engine_of(model, kind)
    probe = probe_of(engine.view)
    other = engine_of(displaced_copy(model, probe), kind)
    assert torch.equal(engine.losses(data, probe).nll, other.losses(data).nll)
    monkeypatch.setattr(linear, "SMALLEST", 1 << 60)
    plain = engine_of(model, kind)
    assert torch.allclose(engine.losses(data, probe).nll, plain.losses(data, probe).nll, atol=1e-5)
