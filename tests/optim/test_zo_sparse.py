"""Sparse ZO-SGD: the share that is asked for, one mask for probe and update, and nothing outside it moves."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

from families import FAMILIES, batch, make
from smidgen import noise
from smidgen.directions import Masked
from smidgen.objective import ClosureObjective, ModelObjective, Recorded, Replayed
from smidgen.optim import _masks
from smidgen.optim.zo_sgd import ZOSGD
from smidgen.optim.zo_sparse import PRESETS, Config, ZOSparse
from smidgen.params import ParamView, shapes
from smidgen.probing import Engine

MASKS = ["random", "small", "large"]  # those that need no model
SHAPES = [(64, 48), (300,), (5, 7, 9), (128, 130), (1,), ()]


def tensors(dtype=torch.float32, sizes=SHAPES):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in sizes]


def loss_of(tensors):
    return sum(((t.double() - 1) ** 2).sum() for t in tensors)


class Spy:
    """Any objective, with the probes it was asked for."""

    def __init__(self, inner):
        self.inner, self.key, self.probes, self.asked = inner, None, [], 0

    def losses(self, probes, *, each=False):
        self.probes.extend(probes)
        return self.inner.losses(probes, each=each)

    def input_squares(self, names, onto=None):
        self.asked += 1
        return self.inner.input_squares(names)


def probed(opt, spy):
    """Where the first probe of the last step displaces each tensor."""
    ((z, _),) = spy.probes[0]
    assert type(z) is Masked
    return {e.name: noise.kept(z.masks[e.name], e.tensor.numel()).view(e.tensor.shape) for e in opt.view}


def run(weights, steps=1, **options):
    """An optimizer after some steps, and the masks that each step probed."""
    opt, seen = ZOSparse(weights, **{"lr": 1e-3, "normalise": "rms", **options}), []
    for _ in range(steps):
        spy = Spy(ClosureObjective(lambda: loss_of(weights), opt.view))
        opt.step(spy)
        seen.append(probed(opt, spy))
    return opt, seen


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_masks_leave_out_the_asked_share(sparsity, seed):
    _, (mask,) = run(tensors(sizes=[(700, 301), (40_001,), (3, 5)]), sparsity=sparsity, seed=seed)
    for keep in mask.values():
        n = keep.numel()
        assert abs(int((~keep).sum()) - sparsity * n) <= 4 * math.sqrt(sparsity * (1 - sparsity) * n) + 1e-9


@pytest.mark.parametrize("kind", ["small", "large"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_by_magnitude_are_exact_and_in_order(kind, sparsity, dtype):
    weights = tensors(dtype)
    weights[1].zero_()  # equal entries: the earlier are kept
    before = [w.clone() for w in weights]
    for group in ("layer", "global"):
        for w, b in zip(weights, before, strict=True):
            w.copy_(b)
        _, (mask,) = run(weights, sparsity=sparsity, mask=kind, group=group)
        flat = [b.float().abs().flatten() for b in before]
        for parts in [flat] if group == "global" else [[f] for f in flat]:
            names = [str(i) for i, f in enumerate(flat) if any(f is p for p in parts)]
            scores, keep = torch.cat(parts), torch.cat([mask[n].flatten() for n in names])
            count = round((1 - sparsity) * len(scores))
            order = scores.sort(stable=True, descending=kind == "large").indices[:count]
            assert int(keep.sum()) == count and bool(keep[order].all())


def test_masks_over_several_blocks_agree_with_those_over_one(monkeypatch):
    entries = list(ParamView.of_tensors([*tensors(torch.bfloat16), torch.ones(50)]))
    whole = _masks.by_magnitude(entries, 0.37, largest=True)
    monkeypatch.setattr(_masks, "_BLOCK", 64)
    parts = _masks.by_magnitude(entries, 0.37, largest=True)
    assert all(torch.equal(whole[n], parts[n]) for n in whole)


def test_wanda_ranks_weight_times_input_norm_in_each_row():
    """Written out: norms 3, 2, 1 turn (1, 2, 3.5) into (3, 4, 3.5) and (-6, 1, 1) into (18, 2, 1)."""
    W, squares = torch.tensor([[1.0, 2.0, 3.5], [-6.0, 1.0, 1.0]]), torch.tensor([[9.0, 4.0, 1.0]]).double()
    for weight, s in ((W, squares), (W.T.contiguous(), squares.T)):
        entry = ParamView.of_tensors([weight])["0"]
        for share, expected in [
            (1 / 3, [[0, 1, 0], [1, 0, 0]]),
            (2 / 3, [[0, 1, 1], [1, 1, 0]]),
            (0.0, [[0, 0, 0], [0, 0, 0]]),
            (1.0, [[1, 1, 1], [1, 1, 1]]),
        ]:
            keep = noise.kept(_masks.by_wanda(entry, share, s), 6).view(weight.shape)
            assert (keep if weight is W else keep.T).int().tolist() == expected
    tied = ParamView.of_tensors([torch.ones(2, 4)])["0"]
    assert noise.kept(_masks.by_wanda(tied, 0.5, torch.ones(1, 4)), 8).tolist() == [True, True, False, False] * 2


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 3])
def test_the_mask_that_is_probed_is_updated_and_the_rest_never_changes(kind, dtype, queries):
    weights = tensors(dtype)
    start, ever = [w.clone() for w in weights], [torch.zeros_like(w, dtype=torch.bool) for w in weights]
    options = {"mask": kind, "queries": queries, "sparsity": 0.6, "weight_decay": 0.1, "lr": 0.05}
    if kind == "random":
        options["resample"] = 20
    opt = ZOSparse(weights, normalise="rms", **options)
    for _ in range(20):
        before = [w.clone() for w in weights]
        spy = Spy(ClosureObjective(lambda: loss_of(weights), opt.view))
        opt.step(spy)
        masks = probed(opt, spy)
        assert all(z.masks is spy.probes[0][0][0].masks for probe in spy.probes for z, _ in probe)
        for moved, w, b in zip(ever, weights, before, strict=True):
            moved |= w != b
    # bfloat16 may round all 20 changes of a large weight away, float32 none
    share = float(torch.cat([moved[masks[str(i)]] for i, moved in enumerate(ever)]).double().mean())
    assert share == 1.0 or (dtype == torch.bfloat16 and share > 0.9)
    for i, (w, s) in enumerate(zip(weights, start, strict=True)):
        outside = ~masks[str(i)]
        view = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(w[outside].view(view), s[outside].view(view))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_no_sparsity_is_zo_sgd_bit_for_bit(dtype, kind, distribution):
    dense, sparse = tensors(dtype), tensors(dtype)
    options = {"lr": 0.01, "weight_decay": 0.1, "queries": 2, "sides": 1, "seed": 3, "distribution": distribution}
    one, two = ZOSGD(dense, **options), ZOSparse(sparse, sparsity=0.0, mask=kind, **options)
    for _ in range(5):
        one.step(lambda: loss_of(dense))
        two.step(lambda: loss_of(sparse))
    assert all(torch.equal(a, b) for a, b in zip(dense, sparse, strict=True))


@pytest.mark.parametrize("sides,queries", [(2, 1), (1, 1), (1, 3), ("residual", 1)])
def test_an_update_is_the_estimate_along_the_masked_noise(sides, queries):
    """The slow twin: masks and noise in full, plain arithmetic."""
    weights = tensors(sizes=[(5, 7), (9,)])
    opt = ZOSparse(weights, lr=0.01, sparsity=0.4, sides=sides, queries=queries, eps=1e-2, seed=2)
    last = None
    for t in range(3):
        start = [w.clone() for w in weights]
        opt.step(lambda: loss_of(weights))
        moved, bases = [torch.zeros_like(w, dtype=torch.float64) for w in weights], []
        for q in range(queries):
            z = []
            for e in opt.view:
                keep = noise.kept(noise.Drawn.share(noise.Address(2, e.id, t, 0, noise.MASK), 0.6), e.tensor.numel())
                sample = noise.sample(noise.Address(2, e.id, t, q, noise.PROBE), "rademacher", e.tensor.numel())
                z.append((keep * sample).view(e.tensor.shape))
            up, down = (float(loss_of([s + h * d for s, d in zip(start, z, strict=True)])) for h in (1e-2, -1e-2))
            middle = float(loss_of(start))
            bases.append(up)
            c = {2: (up - down) / 2e-2, 1: (up - middle) / 1e-2, "residual": 0.0 if last is None else (up - last) / 1e-2}
            for m, d in zip(moved, z, strict=True):
                m -= 0.01 / queries * c[sides] * d.double()
        last = sum(bases) / len(bases)
        for w, s, m in zip(weights, start, moved, strict=True):
            assert torch.allclose((w - s).double(), m, atol=2e-4 if sides == "residual" else 2e-5)


def test_a_mask_is_redrawn_every_resample_steps_and_all_queries_share_it():
    _, seen = run(tensors(), steps=9, resample=4, queries=2)
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(seen)]
    assert same == [True, True, True, False, True, True, True, False]
    _, every = run(tensors(), steps=3)
    assert not torch.equal(every[0]["0"], every[1]["0"]) and not torch.equal(every[1]["0"], every[2]["0"])
    assert torch.equal(every[0]["0"], seen[0]["0"])


@pytest.mark.parametrize(
    "options",
    [
        {"resample": 4},
        {"resample": 3, "group": "global"},
        {"mask": "small"},
        {"mask": "large", "group": "global"},
        {"compat_normal_threshold": True, "group": "global"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_in_the_middle_of_an_interval_and_replay(options, dtype, tmp_path):
    straight = tensors(dtype)
    opt, transcript = ZOSparse(straight, lr=0.01, **options), []
    for _ in range(9):
        recorded = Recorded(ClosureObjective(lambda: loss_of(straight), opt.view))
        opt.step(recorded)
        transcript.append(recorded.values)
    first = tensors(dtype)
    one = ZOSparse(first, lr=0.01, **options)
    for _ in range(5):
        one.step(lambda: loss_of(first))
    torch.save({"weights": first, "optimizer": one.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    two = ZOSparse(saved["weights"], lr=0.01, **options)
    two.load_state_dict(saved["optimizer"])
    for _ in range(4):
        two.step(lambda: loss_of(saved["weights"]))
    assert all(torch.equal(a, b) for a, b in zip(straight, saved["weights"], strict=True))
    again = tensors(dtype)
    other = ZOSparse(again, lr=0.01, **options)
    for values in transcript:
        other.step(Replayed(values))
    assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))


@pytest.mark.parametrize("kind", ["small", "large"])
def test_state_is_one_bit_a_weight_and_keeps_its_type(kind):
    weights = tensors(torch.bfloat16)
    opt, _ = run(weights, mask=kind)
    held = sum(v.numel() * v.element_size() for s in opt.state.values() for v in s.values())
    assert held == ZOSparse.state_bytes(shapes(opt.view), opt.config) == sum(-(-w.numel() // 8) for w in weights)
    assert ZOSparse.state_bytes(shapes(opt.view), Config()) == 0
    assert ZOSparse.state_bytes(shapes(opt.view), Config(mask=kind, sparsity=0.0)) == 0
    other = ZOSparse(tensors(torch.bfloat16), mask=kind)
    other.load_state_dict(opt.state_dict())
    assert all(s["mask"].dtype == torch.uint8 for s in other.state.values())


def test_global_random_masks_follow_the_share_of_small_weights():
    """Two tensors, one of small and one of large weights: at s = 0.5 the small one stays, the large one moves."""
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(6))
    small, large = normal(400) * 0.01 + 1, normal(400) * 0.01 + 5
    _, (mask,) = run([small, large], sparsity=0.5, group="global")
    assert not mask["0"].any() and mask["1"].all()
    _, (mask,) = run([normal(100_000), normal(100_000) * 3], sparsity=0.5, group="global")
    zeros = [float((~mask[n]).double().mean()) for n in ("0", "1")]
    assert zeros[0] > 0.7 > 0.4 > zeros[1] and abs(sum(zeros) / 2 - 0.5) < 4 * 0.5 / math.sqrt(200_000)


@pytest.mark.parametrize("nominal,share", [(0.0, 0.5), (0.1, 0.5398), (0.5, 0.6915), (0.9, 0.8159)])
def test_the_compatibility_switch_leaves_out_what_a_normal_sample_would(nominal, share):
    """Shares as measured on the public code."""
    n = 1 << 20
    _, (mask,) = run([torch.ones(n)], sparsity=nominal, compat_normal_threshold=True)
    assert abs(float((~mask["0"]).double().mean()) - share) < 4 * math.sqrt(share * (1 - share) / n) + 5e-5


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan])
def test_sparsity_outside_its_range_is_refused(value):
    with pytest.raises(ValueError, match="sparsity"):
        Config(sparsity=value)


def test_options_of_random_masks_are_refused_elsewhere():
    for options in ({"resample": 5}, {"compat_normal_threshold": True}):
        with pytest.raises(ValueError, match="mask: random"):
            Config(mask="small", **options)
    with pytest.raises(ValueError, match="resample"):
        Config(resample=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_run(preset):
    config = Config(**PRESETS[preset])
    assert config.distribution == "gaussian" and config.lr == 1e-6 and config.eps == 1e-3
    weights = tensors()
    assert math.isfinite(ZOSparse(weights, config).step(lambda: loss_of(weights)))


def test_wanda_needs_a_model():
    weights = tensors()
    with pytest.raises(ValueError, match="Objective of a model"):
        ZOSparse(weights, mask="wanda").step(lambda: loss_of(weights))


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_on_every_family_and_its_replay(family):
    kind, model = make(family)
    view, twin = ParamView.of_model(model), ParamView.of_model(make(family)[1])
    engine = Engine(model, view, kind)
    modes, buffers = [m.training for m in model.modules()], [b.clone() for b in model.buffers()]
    before = view.snapshot()
    opt, transcript, spies = ZOSparse(view, mask="wanda", lr=1e-3, sparsity=0.75, seed=1), [], []
    for _ in range(2):
        spies.append(Spy(ModelObjective(engine, [batch(kind), batch(kind, seed=2)])))
        recorded = Recorded(spies[-1])
        assert math.isfinite(opt.step(recorded))
        transcript.append(recorded.values)
    assert [spy.asked for spy in spies] == [1, 0]
    assert engine.forwards == 2 * (1 + 2 * 2)  # two micro-batches: once for the inputs, twice two probes
    masks = probed(opt, spies[1])
    for entry in view:
        keep, moved = masks[entry.name], entry.storage != before[entry.name]
        assert not (moved & ~keep).any()
        assert int(keep.sum()) == pytest.approx(0.25 * keep.numel(), abs=0.5 * max(keep.shape or (1,)))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    other = ZOSparse(twin, mask="wanda", lr=1e-3, sparsity=0.75, seed=1)
    for values in transcript:
        replayed = Replayed(values)
        other.step(replayed)
        assert replayed.done()
    assert all(torch.equal(a.storage, b.storage) for a, b in zip(view, twin, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "small", "wanda"])
def test_a_model_keeps_tied_frozen_and_other_tensors_and_the_global_generator(kind, dtype):
    which, model = make("opt-tied", dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" not in name)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    view = ParamView.of_model(model)
    engine, before, state = Engine(model, view, which), view.snapshot(), torch.random.get_rng_state()
    opt = ZOSparse(view, mask=kind, lr=0.05, sparsity=0.5, normalise="rms")
    spy = Spy(ModelObjective(engine, [batch(which)]))
    opt.step(spy)
    masks = probed(opt, spy)
    tied = "model.decoder.embed_tokens.weight"
    assert list(masks).count(tied) == 1 and "lm_head.weight" not in masks
    outside = ~masks[tied]
    assert torch.equal(view[tied].storage[outside], before[tied][outside])
    assert (view[tied].storage != before[tied])[masks[tied]].double().mean() > 0.9
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_first_step_without_finite_inputs_writes_nothing_and_the_next_one_ranks():
    kind, model = make("llama-untied")
    view = ParamView.of_model(model)
    engine, before = Engine(model, view, kind), view.snapshot()
    opt = ZOSparse(view, mask="wanda", lr=1e-3)

    class Broken(Spy):
        def input_squares(self, names, onto=None):
            return {n: s * math.nan for n, s in self.inner.input_squares(names).items()}

    objective = ModelObjective(engine, [batch(kind)])
    assert math.isnan(opt.step(Broken(objective))) and not opt.outcome.written and opt.bad_steps == 1
    assert all(torch.equal(e.storage, before[e.name]) for e in view)
    assert math.isfinite(opt.step(objective)) and opt.bad_steps == 0
