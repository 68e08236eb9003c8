"""Quantised linear layers: kinds, values, products and their gradients, on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smidgen import quantised
from smidgen.config import ConfigError

bnb = pytest.importorskip("bitsandbytes")

CODES = ["nf4", "fp4", "nf4-nested", "int8"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def drawn():
    """Layers draw their first weights from torch's global generator, which belongs to the caller."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def layer(code: str, dtype: torch.dtype = torch.float32, rows: int = 48, width: int = 37, bias: bool = True) -> nn.Module:
    """A quantised layer of drawn weights."""
    plain = nn.Linear(width, rows, bias=bias).to(dtype)
    if code == "int8":
        made = bnb.nn.Linear8bitLt(width, rows, bias=bias, has_fp16_weights=False, threshold=6.0)
        made.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        options = {"quant_type": code[:3], "compress_statistics": code.endswith("nested")}
        made = bnb.nn.Linear4bit(width, rows, bias=bias, compute_dtype=dtype, **options)
        made.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, **options)
    made.bias = plain.bias
    return made.to("cpu").eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", CODES)
def test_values_are_those_the_library_multiplies_with(code, dtype):
    made = layer(code, dtype)
    W = quantised.dequantise(made)
    assert quantised.kind(made) == code[:4].removesuffix("-") and W.shape == quantised.shape(made) == (48, 37)
    assert W.dtype == quantised.compute_dtype(made) == dtype
    x = torch.eye(37, dtype=dtype).requires_grad_()
    theirs = made.train()(x).detach() - made.bias.detach()  # in training bitsandbytes rounds no input on a CPU
    close = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 2e-3}  # one sum with the bias, half an ulp of 16 bits
    torch.testing.assert_close(theirs, W.T, **close)
    out = torch.empty(48, 37)
    assert quantised.dequantise(made, out) is out and torch.equal(quantised.dequantise(made, dtype=torch.float32), out)


@pytest.mark.parametrize("code", ["nf4", "nf4-nested", "int8"])
def test_a_steady_layer_is_the_plain_product_in_every_mode(code):
    model = nn.Sequential(layer(code, rows=64, width=64), layer(code, rows=48, width=64))
    quantised.steady(model)
    codes = [m.weight.detach().clone() for m in model]
    slow = [nn.Linear(64, 64), nn.Linear(64, 48)]
    for linear, made in zip(slow, model, strict=True):
        linear.weight, linear.bias = nn.Parameter(quantised.dequantise(made)), made.bias
    slow = nn.Sequential(*slow)
    x, again = torch.randn(5, 3, 64).requires_grad_(), None
    again = x.detach().clone().requires_grad_()
    with torch.no_grad():
        quiet = model(x)
    loud = model.train()(x)
    assert torch.equal(quiet, loud.detach()) and torch.equal(copy.deepcopy(model)(x), loud)
    torch.testing.assert_close(loud, slow(again), rtol=0, atol=1e-6)
    loud.square().sum().backward()
    slow(again).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[0].bias.grad, slow[0].bias.grad, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(m.weight, code) for m, code in zip(model, codes, strict=True))


def test_a_product_saves_no_input_and_follows_tangents():
    made = layer("int8", rows=20, width=12, bias=False)
    quantised.steady(made)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
        made(torch.randn(4, 12).requires_grad_())
    assert saved == []
    x, dx = torch.randn(4, 12), torch.randn(4, 12)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        y = made(torch.autograd.forward_ad.make_dual(x, dx))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, F.linear(dx, quantised.dequantise(made)))


def test_what_is_not_supported_is_refused():
    assert quantised.kind(nn.Linear(4, 4)) is None
    with pytest.raises(ConfigError, match="Linear is no quantised linear layer"):
        quantised.dequantise(nn.Linear(4, 4))
    quantised.refuse_unknown(nn.Sequential(nn.Linear(64, 64), layer("nf4"), layer("int8"), nn.Embedding(4, 4)))
    odd = bnb.nn.Embedding8bit(8, 4).to("cpu")
    with pytest.raises(ConfigError, match=r"0 \(Embedding8bit\) holds quantised weights"):
        quantised.refuse_unknown(nn.Sequential(odd))


def test_repacked_weights_are_refused():
    made = layer("nf4", rows=64, width=64)
    made.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ConfigError, match="has repacked these 4-bit weights"):
        quantised.dequantise(made)


def test_torchao_int8_weights():
    api = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(37, 48))
    api.quantize_(model, api.Int8WeightOnlyConfig())
    W = quantised.dequantise(model[0])
    assert quantised.kind(model[0]) == "torchao-int8" and W.shape == quantised.shape(model[0]) and W.dtype == torch.float32
    x = torch.randn(5, 37)
    torch.testing.assert_close(model(x), F.linear(x, W, model[0].bias), rtol=0, atol=1e-5)
    dynamic = nn.Sequential(nn.Linear(64, 64))
    api.quantize_(dynamic, api.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ConfigError, match="not supported"):
        quantised.refuse_unknown(dynamic)
