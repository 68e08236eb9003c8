"""ZO-Adam against torch.optim.Adam fed with the same estimates."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from smidgen import noise
from smidgen.config import ConfigError
from smidgen.optim import _blocks, _eight_bit
from smidgen.optim.zo_adam import ZOAdam

SHAPES = ((40, 7), (300,), ())
LARGE = ((300, 17), (5000,), (100,))  # two above and one below the least size of 8-bit state
needs_codec = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


class Loss:
    """A quadratic over tensors, and the estimate of a step written out."""

    def __init__(self, shapes=SHAPES, dtype=torch.float32):
        generator = torch.Generator().manual_seed(3)
        self.shapes, self.weights = shapes, [torch.randn(s, generator=generator).to(dtype) for s in shapes]

    def __call__(self):
        return sum((a * w.double() ** 2).sum() for a, w in enumerate(self.weights, 1))

    def estimate(self, opt):
        """Mean of c z over the step's queries for each tensor, made without the method."""
        cfg, found = opt.config, []
        for q in range(cfg.queries):
            Z = []
            for i, s in enumerate(self.shapes):
                Z.append(torch.zeros(s))
                noise.accumulate_(Z[i], [(noise.Address(cfg.seed, i, opt.t, q, noise.PROBE), 1.0)], cfg.distribution)
            L = []
            for sign in (1, -1):
                moved = [w.float() + sign * cfg.eps * z for w, z in zip(self.weights, Z, strict=True)]
                L.append(sum(float((a * m.double() ** 2).sum()) for a, m in enumerate(moved, 1)))
            found.append([(L[0] - L[1]) / (2 * cfg.eps) * z for z in Z])
        return [sum(g) / cfg.queries for g in zip(*found, strict=True)]


def compare(options, torchs, steps=8, shapes=SHAPES):
    """Largest difference between ours and torch's after some steps, both fed with our estimates; also the travel."""
    ours, twin = Loss(shapes), Loss(shapes)
    opt = ZOAdam(ours.weights, lr=1e-2, eps=0.125, seed=6, **options)
    for w in twin.weights:
        w.requires_grad_()
    adam = torch.optim.Adam(twin.weights, lr=1e-2, **torchs)
    for _ in range(steps):
        for w, g in zip(twin.weights, ours.estimate(opt), strict=True):
            w.grad = g.clone()
        adam.step()
        opt.step(ours)
    start = Loss(shapes).weights
    travel = min(float((a - b).abs().max()) for a, b in zip(ours.weights, start, strict=True))
    return max(float((a - b.detach()).abs().max()) for a, b in zip(ours.weights, twin.weights, strict=True)), travel


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("v_max", [False, True])
def test_it_is_torchs_adam_fed_with_c_z(distribution, queries, v_max, monkeypatch):
    monkeypatch.setitem(_blocks.SIZES, "cpu", 64)
    error, travel = compare({"distribution": distribution, "queries": queries, "v_max": v_max}, {"amsgrad": v_max})
    assert error < 2e-6 and travel > 1e-2  # c is a difference of float64 losses of float32 weights


@pytest.mark.parametrize("options", [{"beta1": 0.5, "beta2": 0.9}, {"beta1": 0.0}, {"adam_eps": 10.0}])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_other_constants(options, distribution):
    theirs = {"betas": (options.get("beta1", 0.9), options.get("beta2", 0.999)), "eps": options.get("adam_eps", 1e-8)}
    error, _ = compare({"distribution": distribution, **options}, theirs)
    assert error < 2e-6


def test_bias_correction_makes_the_first_step_the_rate():
    for distribution in ("rademacher", "gaussian"):
        loss = Loss()
        start = [w.clone() for w in loss.weights]
        ZOAdam(loss.weights, lr=2.0**-6, distribution=distribution).step(loss)
        for w, b in zip(loss.weights, start, strict=True):
            assert torch.allclose((w - b).abs(), torch.full(w.shape, 2.0**-6), atol=1e-6)


def test_one_rademacher_direction_keeps_v_as_one_number():
    one, several = Loss(), Loss()
    opt, more = ZOAdam(one.weights, lr=1e-2), ZOAdam(several.weights, lr=1e-2, queries=2)
    opt.step(one), more.step(several)
    shapes = {str(i): (s, torch.float32) for i, s in enumerate(SHAPES)}
    assert ZOAdam.state_bytes(shapes, opt.config) == 4 * 581 and ZOAdam.state_bytes(shapes, more.config) == 8 * 581
    assert opt.adam.v > 0 and [set(s) for s in opt.state.values()] == [{"exp_avg"}] * 3


def test_weight_decay_is_decoupled_and_spares_vectors():
    matrix, vector = torch.ones(3, 4), torch.ones(5)
    opt = ZOAdam([matrix, vector], lr=0.1, weight_decay=0.5)
    opt.step(lambda: torch.zeros(()))
    assert torch.equal(matrix, torch.full((3, 4), 0.95)) and torch.equal(vector, torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_in_blocks_of_rows_equal_one_block(dtype, monkeypatch):
    """Blocks, their rounding bits included, do not depend on how a tensor is cut."""
    ends = []
    for size in (1 << 9, 1 << 20):
        monkeypatch.setitem(_blocks.SIZES, "cpu", size)
        loss = Loss(LARGE, dtype)
        opt = ZOAdam(loss.weights, lr=1e-2, eps=0.125, distribution="gaussian")
        for _ in range(3):
            opt.step(loss)
        ends.append(loss.weights)
        assert all(s["exp_avg"].dtype == torch.float32 for s in opt.state.values())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@needs_codec
@pytest.mark.parametrize("options", [{}, {"distribution": "gaussian"}, {"queries": 2, "v_max": True}])
def test_eight_bit_state_is_near_float32_and_as_large_as_stated(options, monkeypatch):
    monkeypatch.setitem(_blocks.SIZES, "cpu", 1 << 9)
    error, travel = compare({"state": "8bit", **options}, {"amsgrad": options.get("v_max", False)}, shapes=LARGE)
    assert error < 0.2 * travel and travel > 1e-2
    loss = Loss(LARGE)
    opt = ZOAdam(loss.weights, lr=1e-2, state="8bit", **options)
    opt.step(loss)
    held = sum(t.numel() * t.element_size() for s in opt.state.values() for t in s.values())
    assert ZOAdam.state_bytes({str(i): (s, torch.float32) for i, s in enumerate(LARGE)}, opt.config) == held
    each = 5100 + 4 * 20 + 5000 + 4 * 20 + 4 * 100
    assert held == each * {0: 1, 1: 2, 2: 3}[len(options)]


@needs_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_resumes_exactly_and_does_not_depend_on_blocks(dtype, tmp_path, monkeypatch):
    options = {"lr": 1e-2, "eps": 0.125, "state": "8bit", "distribution": "gaussian"}
    straight = Loss(LARGE, dtype)
    opt = ZOAdam(straight.weights, **options)
    for _ in range(6):
        opt.step(straight)
    monkeypatch.setitem(_blocks.SIZES, "cpu", 1 << 9)
    loss = Loss(LARGE, dtype)
    first = ZOAdam(loss.weights, **options)
    for _ in range(3):
        first.step(loss)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = ZOAdam(loss.weights, **options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        second.step(loss)
    assert all(torch.equal(a, b) for a, b in zip(straight.weights, loss.weights, strict=True))


@needs_codec
def test_codes_keep_the_scale_of_small_entries():
    """The root of v is coded: an entry a thousandth of the largest does not become zero."""
    state = {}
    like = torch.zeros(8192)
    _eight_bit.allocate(state, "v", like, True)
    assert torch.equal(_eight_bit.read(state, "v", slice(0, 512), signed=False), torch.zeros(512))
    value = torch.logspace(-3, 0, 512)
    _eight_bit.write(state, "v", slice(512, 1024), value, signed=False)
    got = _eight_bit.read(state, "v", slice(512, 1024), signed=False)
    assert ((got / value - 1).abs() < 0.06).all()
    assert torch.equal(_eight_bit.read(state, "v", slice(1024, 1536), signed=False), torch.zeros(512))


def test_without_bitsandbytes_the_option_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    _eight_bit._codec.cache_clear()
    with pytest.raises(ConfigError, match="bitsandbytes"):
        ZOAdam([torch.zeros(8)], state="8bit")
    _eight_bit._codec.cache_clear()
    ZOAdam([torch.zeros(8)])
