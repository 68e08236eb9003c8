"""ZO-SGD-Sign against its formulas."""

from __future__ import annotations

import pytest
import torch

from smidgen import noise
from smidgen.optim import _blocks
from smidgen.optim.zo_sign import PRESETS, Config, ZOSign

LR = 2.0**-6  # a power of two, so that steps of weights near one are exact
SHAPES = ((40, 7), (300,), ())


def field(shape, tensor, step, query=0, distribution="rademacher", seed=2):
    out = torch.zeros(shape)
    noise.accumulate_(out, [(noise.Address(seed, tensor, step, query, noise.PROBE), 1.0)], distribution)
    return out


class Line:
    """A linear loss over tensors of several shapes; the slope of direction z is known."""

    def __init__(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        self.weights = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
        self.slopes = [torch.randn(shape, generator=generator).double() for shape in SHAPES]

    def __call__(self):
        return sum((s * w.double()).sum() for s, w in zip(self.slopes, self.weights, strict=True))

    def along(self, step, query, distribution):
        """(c, z per tensor)"""
        Z = [field(shape, i, step, query, distribution) for i, shape in enumerate(SHAPES)]
        return sum(float((s * z.double()).sum()) for s, z in zip(self.slopes, Z, strict=True)), Z


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("queries", [1, 2, 3])
def test_every_weight_moves_by_the_rate_against_the_sign_of_its_estimate(distribution, queries, monkeypatch):
    monkeypatch.setitem(_blocks.SIZES, "cpu", 64)  # several blocks a tensor
    line = Line()
    ZOSign(line.weights, lr=LR, seed=2, distribution=distribution, queries=queries, eps=0.5).step(line)
    found = [line.along(0, q, distribution) for q in range(queries)]
    for i, w in enumerate(line.weights):
        g = sum(c * Z[i].double() for c, Z in found)
        assert torch.equal(w.abs(), torch.full(w.shape, LR))
        assert torch.equal(w, (-LR * g.sign()).float())


def test_a_zero_of_the_averaged_estimate_does_not_move():
    """Two queries of equal slope: where their signs differ the sum is zero."""
    w = torch.zeros(256)
    values = iter([1.0, 0.0, 1.0, 0.0])
    ZOSign([w], lr=LR, seed=2, queries=2).step(lambda: next(values))
    first, second = field((256,), 0, 0, 0), field((256,), 0, 0, 1)
    assert torch.equal(w, -LR * (first + second) / 2)
    assert 64 < int((w == 0).sum()) < 192


@pytest.mark.parametrize("options", [{}, {"sign": "scalar"}, {"distribution": "gaussian"}, {"queries": 3}])
def test_a_tie_of_the_losses_moves_nothing(options):
    w = torch.linspace(-1, 1, 50)
    opt = ZOSign([w], lr=LR, **options)
    opt.step(lambda: torch.ones(()))
    assert torch.equal(w, torch.linspace(-1, 1, 50)) and opt.outcome.written


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_scalar_is_the_mean_of_signs_times_z(distribution):
    line = Line()
    ZOSign(line.weights, lr=LR, seed=2, sign="scalar", distribution=distribution, queries=3, eps=0.5).step(line)
    found = [line.along(0, q, distribution) for q in range(3)]
    for i, w in enumerate(line.weights):
        want = -LR / 3 * sum((1 if c > 0 else -1) * Z[i] for c, Z in found)
        assert torch.allclose(w, want, atol=1e-8)


def test_the_two_readings_are_one_for_one_rademacher_direction():
    ends = []
    for sign in ("element", "scalar"):
        line = Line()
        opt = ZOSign(line.weights, lr=LR, sign=sign)
        for _ in range(3):
            opt.step(line)
        ends.append(line.weights)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_weight_decay_and_groups_rates_in_blocks(monkeypatch):
    monkeypatch.setitem(_blocks.SIZES, "cpu", 64)
    matrix, vector = torch.ones(30, 4), torch.ones(5)
    groups = [{"params": [matrix]}, {"params": [vector], "lr": LR / 2}]
    ZOSign(groups, lr=LR, weight_decay=0.5, distribution="gaussian").step(lambda: (matrix.sum() + vector.sum()).double())
    away = (matrix - (1 - LR / 2)).abs()
    assert torch.allclose(away, torch.full_like(away, LR), atol=1e-6)
    assert torch.allclose((vector - 1).abs(), torch.full((5,), LR / 2), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_rounded_once_and_stochastically(dtype, monkeypatch):
    """Steps below half the spacing of the weights still move their mean."""
    monkeypatch.setitem(_blocks.SIZES, "cpu", 1 << 10)
    w = torch.ones(256, 64, dtype=dtype)
    lr = 2.0**-12
    opt = ZOSign([w], lr=lr, distribution="gaussian", eps=0.5)
    opt.step(lambda: w.double().sum())
    z = field(w.shape, 0, 0, 0, "gaussian", seed=0)
    spacing = torch.finfo(dtype).eps
    moved = w.double() - 1
    assert 0 < int((moved != 0).sum()) < w.numel()
    sign = 1 if z.sum() > 0 else -1
    mean = float((moved * -sign * z.sign()).mean())
    assert abs(mean - lr) < 4 * (lr * spacing) ** 0.5 / w.numel() ** 0.5


@pytest.mark.parametrize("options", [{}, {"distribution": "gaussian"}, {"sign": "element", "queries": 3}])
def test_compat_adamw_is_torchs_adamw_on_the_signs(options):
    options = {**PRESETS["zo_bench"], **options}
    line, twin = Line(), Line()
    opt = ZOSign(line.weights, **{**options, "lr": 1e-2, "seed": 2})
    for w in twin.weights:
        w.requires_grad_()
    adamw = torch.optim.AdamW(twin.weights, lr=1e-2, weight_decay=0.0)
    for step in range(5):
        opt.step(line)
        found = [line.along(step, q, options["distribution"]) for q in range(options.get("queries", 1))]
        for i, w in enumerate(twin.weights):
            if options["sign"] == "scalar":
                w.grad = sum((1.0 if c > 0 else -1.0) * Z[i] for c, Z in found) / len(found)
            else:
                w.grad = sum(c * Z[i] for c, Z in found).sign()
        adamw.step()
    assert all(torch.allclose(a, b.detach(), atol=1e-6) for a, b in zip(line.weights, twin.weights, strict=True))
    held = sum(t.numel() * t.element_size() for s in opt.state.values() for t in s.values())
    shapes = {str(i): (s, torch.float32) for i, s in enumerate(SHAPES)}
    assert ZOSign.state_bytes(shapes, opt.config) == held == 8 * (280 + 300 + 1)


def test_compat_state_survives_saving():
    straight, broken = Line(), Line()
    options = {**PRESETS["zo_bench"], "lr": 1e-2}
    opt = ZOSign(straight.weights, **options)
    first = ZOSign(broken.weights, **options)
    for _ in range(3):
        opt.step(straight), first.step(broken)
    second = ZOSign(broken.weights, **options)
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        opt.step(straight), second.step(broken)
    assert all(torch.equal(a, b) for a, b in zip(straight.weights, broken.weights, strict=True))


def test_there_is_no_option_without_effect():
    assert "normalise" not in Config.model_fields
