"""ZO-SGD with momentum against the geometric sum."""

from __future__ import annotations

import pytest
import torch

from smidgen import noise
from smidgen.objective import ClosureObjective, Recorded, Replayed
from smidgen.optim import _blocks
from smidgen.optim.zo_momentum import PRESETS, Config, ZOMomentum

SHAPES = ((40, 7), (300,), ())
CURVATURE = [1.0, 2.0, 0.5]


def starts(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def loss_of(weights):
    return sum((a * w.double() ** 2).sum() for a, w in zip(CURVATURE, weights, strict=True))


def field(shape, tensor, step, query, distribution, seed):
    out = torch.zeros(shape)
    noise.accumulate_(out, [(noise.Address(seed, tensor, step, query, noise.PROBE), 1.0)], distribution)
    return out


def estimates(opt, weights, steps, queries=1):
    """Make steps; the mean of c z of each step and tensor, with c from the recorded losses."""
    found = []
    for t in range(steps):
        recorded = Recorded(ClosureObjective(lambda: loss_of(weights), opt.view))
        opt.step(recorded)
        L = torch.tensor(recorded.values, dtype=torch.float64)
        c = (L[0::2] - L[1::2]) / (2 * opt.config.eps) if opt.config.sides == 2 else (L[1:] - L[0]) / opt.config.eps
        cfg = opt.config
        fields = [
            [field(s, i, t, q, cfg.distribution, cfg.seed).double() * float(c[q]) for q in range(queries)]
            for i, s in enumerate(SHAPES)
        ]
        found.append([sum(f) / queries for f in fields])
    return found


def geometric(found, start, lr, mu, memory=None):
    """W after steps of v_t = sum_k mu^k g_(t-k)."""
    ends = [w.double() for w in start]
    for t in range(len(found)):
        first = 0 if memory is None else max(0, t - memory + 1)
        for i in range(len(ends)):
            ends[i] = ends[i] - lr * sum(mu ** (t - j) * found[j][i] for j in range(first, t + 1))
    return ends


@pytest.mark.parametrize("options", [{}, {"distribution": "gaussian"}, {"queries": 3}, {"queries": 2, "sides": 1}])
def test_the_steps_are_the_geometric_sum(options, monkeypatch):
    monkeypatch.setitem(_blocks.SIZES, "cpu", 64)
    weights = starts()
    opt = ZOMomentum(weights, lr=1e-5, eps=1e-2, seed=4, **options)
    found = estimates(opt, weights, 6, options.get("queries", 1))
    for w, want, start in zip(weights, geometric(found, starts(), 1e-5, 0.9), starts(), strict=True):
        assert torch.allclose(w.double(), want, atol=1e-6)
        assert not torch.allclose(w, start, atol=1e-5)


def test_the_first_step_is_zo_sgds():
    from smidgen.optim.zo_sgd import ZOSGD

    ours, theirs = starts(), starts()
    ZOMomentum(ours, lr=1e-4).step(lambda: loss_of(ours))
    ZOSGD(theirs, lr=1e-4).step(lambda: loss_of(theirs))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("memory", [1, 3, 20])
def test_memory_is_the_truncated_geometric_sum_without_tensor_state(memory):
    weights = starts()
    opt = ZOMomentum(weights, lr=1e-5, eps=1e-2, seed=4, memory=memory, queries=2)
    found = estimates(opt, weights, 7, 2)
    for w, want in zip(weights, geometric(found, starts(), 1e-5, 0.9, memory), strict=True):
        assert torch.allclose(w.double(), want, atol=1e-6)
    assert not opt.state and ZOMomentum.state_bytes({}, opt.config) == 0
    assert len(opt.past) == min(7, memory)


def test_a_long_memory_is_the_stored_momentum():
    ends = []
    for memory in (0, 50):
        weights = starts()
        opt = ZOMomentum(weights, lr=1e-4, memory=memory, weight_decay=0.1, normalise="rms")
        for t in range(12):
            opt.param_groups[0]["lr"] = 1e-4 / (1 + t)
            opt.step(lambda weights=weights, t=t: loss_of(weights) * (float("nan") if t == 5 else 1.0))
        ends.append(weights)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("memory", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_and_replay_are_exact(memory, dtype, tmp_path):
    options = {"lr": 1e-3, "eps": 0.1, "memory": memory, "sides": "residual", "queries": 2}
    straight, values = starts(dtype), []
    opt = ZOMomentum(straight, **options)
    for _ in range(8):
        recorded = Recorded(ClosureObjective(lambda: loss_of(straight), opt.view))
        opt.step(recorded)
        values.append(recorded.values)
    weights = starts(dtype)
    first = ZOMomentum(weights, **options)
    for v in values[:5]:
        first.step(Replayed(v))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = ZOMomentum(weights, **options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for v in values[5:]:
        second.step(Replayed(v))
    assert all(torch.equal(a, b) for a, b in zip(straight, weights, strict=True))


def test_v_is_float32_for_sixteen_bit_weights_and_a_bad_step_leaves_it():
    weights = starts(torch.bfloat16)
    opt = ZOMomentum(weights, lr=1e-3, eps=0.1)
    opt.step(lambda: loss_of(weights))
    kept = [opt.state[w]["momentum_buffer"].clone() for w in weights]
    assert all(v.dtype == torch.float32 for v in kept)
    opt.step(lambda: torch.tensor(float("nan")))
    assert all(torch.equal(opt.state[w]["momentum_buffer"], v) for w, v in zip(weights, kept, strict=True))


def test_a_transposed_weight_moves_as_a_contiguous_one():
    plain = torch.linspace(-1, 1, 60).view(6, 10)
    turned = plain.t().contiguous().t()
    assert not turned.is_contiguous()
    for w in (plain, turned):
        opt = ZOMomentum([w], lr=1e-3)
        for t in range(3):
            opt.step(Replayed([1.0 + t, 0.0]))
    assert torch.equal(plain, turned) and not torch.equal(plain, torch.linspace(-1, 1, 60).view(6, 10))


def test_preset_zo_bench_is_the_studys():
    config = Config(**PRESETS["zo_bench"])
    assert (config.momentum, config.distribution, config.memory, config.sides, config.queries) == (0.9, "gaussian", 0, 2, 1)
