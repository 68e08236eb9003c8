"""SpIEL: gradients without a dense dW, what drops and grows, seeds, files, resume, refusals."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import smidgen
from families import batch, make
from smidgen import adapt, noise, optim
from smidgen import export as exporting
from smidgen.adapt import _sparse_file, _sparse_gradient
from smidgen.adapt._growth import Phase, Seeds, exchange, merged
from smidgen.adapt._published import PublishedPhase
from smidgen.adapt._reselection import Schedule
from smidgen.adapt._sparse import Site, install
from smidgen.adapt._support import largest_products, members, random_support, top
from smidgen.config import ConfigError
from smidgen.config_file import load
from smidgen.directions import Dense, displace
from smidgen.export import export
from smidgen.fingerprint import state_sha256
from smidgen.objective import ModelObjective
from smidgen.optim.sm3 import SM3
from smidgen.optim.sparse_adamw import SparseAdamW
from smidgen.params import ParamView, Support, shapes
from smidgen.probing import Engine
from smidgen.settings import scheme_config

spiel = adapt.get("spiel")


def built(family="llama-untied", dtype=torch.float32, seed=3, **options):
    kind, model = make(family, dtype)
    return kind, spiel.build(model, spiel.Config(**{"density": 0.05, **options}), seed=seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def moved(found, scale=0.3):
    for i, entry in enumerate(found.view):
        entry.storage.add_(scale * randn(*entry.tensor.shape, seed=i))


def logits(model, kind="causal"):
    inputs = {k: v for k, v in batch(kind).items() if k != "labels"}
    with torch.no_grad():
        return model(**inputs).logits


# -- supports -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size,count", [(1, 1), (100, 100), (101, 99), (1000, 10), (997, 500), (50_000, 4_000)])
def test_random_supports_are_sorted_distinct_and_addressed(size, count):
    address = noise.Address(1, 2, 0, 0, noise.INIT)
    found = random_support(address, size, count)
    assert found.shape == (count,) and bool((found[1:] > found[:-1]).all())
    assert int(found[0]) >= 0 and int(found[-1]) < size
    assert torch.equal(found, random_support(address, size, count))
    if count < size:
        assert not torch.equal(found, random_support(noise.Address(2, 2, 0, 0, noise.INIT), size, count))


def test_random_supports_are_uniform():
    """Counts in ten bins: chi-square below its 99.9 % point for 9 degrees of freedom, 27.9."""
    found = random_support(noise.Address(5, 2, 0, 0, noise.INIT), 100_000, 20_000)
    counts = torch.bincount(found // 10_000, minlength=10).double()
    assert float(((counts - 2000) ** 2 / (2000 * 0.8)).sum()) < 27.9


def test_of_equal_scores_the_first_win():
    score = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert top(score, 3).tolist() == [1, 2, 3] and top(score, 4).tolist() == [1, 2, 3, 4]
    assert top(score, 0).tolist() == [] and top(score, 9).tolist() == list(range(6))


@pytest.mark.parametrize("seed", range(6))
def test_largest_products_are_those_of_the_outer_product(seed):
    """Many ties and zeros; against the whole product, sorted."""
    rows = (randn(11, seed=seed).abs() * 2).round() / 2 if seed % 2 else randn(11, seed=seed).abs()
    columns = (randn(7, seed=seed + 50).abs() * 2).round() / 2 if seed % 2 else randn(7, seed=seed + 50).abs()
    taken = random_support(noise.Address(seed, 0, 0, 0, 0), 77, 9)
    dense = (rows.double()[:, None] * columns.double()).flatten()
    dense[taken] = 0
    for count in (1, 5, 20, 68):
        wanted = min(count, int((dense > 0).sum()))
        found = largest_products(rows, columns, count, taken)
        assert torch.equal(found, top(dense, wanted))
    assert largest_products(torch.zeros(3), torch.ones(2), 2, taken[:0]).numel() == 0


# -- gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens,rows,columns", [(1, 3, 5), (13, 17, 9), (64, 33, 40)])
@pytest.mark.parametrize("block", [4, 100, 1 << 20])
def test_entries_of_a_gradient_are_those_of_the_dense_one(monkeypatch, tokens, rows, columns, block):
    monkeypatch.setattr(_sparse_gradient, "BLOCK", block)
    left, right = randn(tokens, rows, dtype=torch.float64), randn(tokens, columns, seed=1, dtype=torch.float64)
    for count in (1, rows * columns // 3, rows * columns):
        index = random_support(noise.Address(0, 0, 0, 0, 0), rows * columns, count).int()
        dense = (left.t() @ right).flatten()[index]
        found = _sparse_gradient.gathered(left, right, index)
        assert found.dtype == torch.float64 and torch.allclose(found, dense, rtol=1e-12, atol=1e-12)
        for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
            a, b = left.to(dtype), right.to(dtype)
            for way in (_sparse_gradient.gathered, _sparse_gradient.sampled):
                exact = (a.double().t() @ b.double()).flatten()[index]
                assert way(a, b, index).dtype == torch.float32
                assert torch.allclose(way(a, b, index).double(), exact, rtol=close, atol=close * tokens**0.5)


def test_entries_by_one_thread_and_by_several_have_the_same_bits(monkeypatch):
    left, right = randn(300, 33), randn(300, 40, seed=1)
    index = random_support(noise.Address(0, 0, 0, 0, 0), 33 * 40, 500).int()
    one = _sparse_gradient.sampled(left, right, index)
    monkeypatch.setattr(_sparse_gradient, "_ALONE", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(_sparse_gradient.sampled(left, right, index), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("family", ["llama-untied", "gpt2", "opt-tied", "roberta-classification", "t5-tied"])
@pytest.mark.parametrize("density,dtype", [(0.01, torch.float32), (0.3, torch.float32), (0.05, torch.float64)])
def test_gradients_of_deltas_are_autograds(family, density, dtype):
    """By dot products, by blocks, and in float64, where what is left is the rounding of the float32 delta's gradient."""
    kind, found = built(family, dtype, density=density)
    _, twin = make(family, dtype)
    Engine(found.model, found.view, kind).differentiable(batch(kind)).nll.mean().backward()
    names = {n.removesuffix(".delta") + ".weight": s for n, s in found.sites.items()}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in names)
    Engine(twin, ParamView.of_model(twin), kind).differentiable(batch(kind)).nll.mean().backward()
    for name, site in names.items():
        dense = twin.get_parameter(name).grad.flatten()[site.index]
        close = {"rtol": 1e-6, "atol": 1e-12} if dtype == torch.float64 else {"atol": 1e-6}
        assert torch.allclose(site.delta.grad.to(dtype), dense, **close), name


def test_checkpointing_and_two_micro_batches_give_the_same_gradients():
    kind, found = built("llama-untied")
    engine, data = Engine(found.model, found.view, kind), batch(kind, rows=4, labels="all")
    grads = []
    for checkpointed, parts in ((False, 1), (True, 1), (False, 2)):
        if checkpointed:
            found.model.gradient_checkpointing_enable()
        micro = [{k: v[i::parts] for k, v in data.items()} for i in range(parts)]
        ModelObjective(engine, micro).backward()
        grads.append([e.tensor.grad for e in found.view])
        for entry in found.view:
            entry.tensor.grad = None
        found.model.activation_checkpointing_disable()
    for other in grads[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads[0], other, strict=True))


def test_only_the_input_is_kept_for_the_backward_pass():
    with torch.random.fork_rng():
        layer = nn.Linear(24, 40).requires_grad_(False)
    site = install(layer, torch.arange(0, 960, 7))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(randn(3, 5, 24))
    assert sorted(t.data_ptr() == site.weight.data_ptr() or t.shape == (3, 5, 24) for t in kept) == [True, True]
    y = layer(randn(3, 5, 24))
    site.delta.detach().add_(1.0)
    layer(randn(3, 5, 24))  # writes the weight between forward and backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# -- deltas in the weight -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama-untied", "gpt2"])
def test_the_start_is_the_base_and_taking_deltas_out_gives_its_bits(family, dtype):
    _, plain = make(family, dtype)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.view(-1)[::3] *= -0.0  # zeros with a sign
    base = state_sha256(dict(plain.named_parameters()))
    found = spiel.build(copy.deepcopy(plain), spiel.Config(density=0.4), seed=1)
    assert torch.equal(logits(found.model), logits(plain))
    assert found.base_sha256() == base
    moved(found)
    assert not torch.equal(logits(found.model), logits(plain))
    whole = found.merged()
    assert type(whole.get_submodule(next(iter(found.sites)).removesuffix(".delta"))) in (nn.Linear, Conv1D)
    assert torch.equal(logits(whole), logits(found.model))
    with found.bare():
        named = {n: p for n, p in found.model.named_parameters() if not n.endswith(".delta")}
        assert state_sha256(named) == base
    assert torch.equal(logits(found.model), logits(whole))


def test_the_weight_is_rounded_once_from_float32_deltas():
    with torch.random.fork_rng():
        layer = nn.Linear(8, 4, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    weight = layer.weight.fill_(1.0)
    site = Site(layer, torch.tensor([3, 9]))
    for _ in range(16):  # each a sixteenth of half an ulp of 1 below 2
        site.delta.detach().add_(2.0**-12)
    site.swap_in()
    assert float(weight.view(-1)[3]) == 1.0
    site.delta.detach().add_(2.0**-8)
    site.swap_in()
    assert float(weight.view(-1)[9]) == 1.0 + 2.0**-7


@pytest.mark.parametrize("family", ["llama-untied", "gpt2"])
def test_a_probe_of_deltas_sees_a_displaced_copy_of_the_weight(family):
    kind, found = built(family)
    moved(found)
    engine, data = Engine(found.model, found.view, kind), batch(kind)
    z = Dense(1, 0, 0, found.view.ids)
    probed = engine.losses(data, ((z, 0.1),)).nll
    saved = found.view.snapshot()
    for entry in found.view:
        displace(((z, 0.1),), entry.name, saved[entry.name], entry.storage)
        entry.version += 1
    assert torch.equal(engine.losses(data).nll, probed)
    found.view.restore(saved)


# -- drop and grow --------------------------------------------------------------------------------------------------------


def test_what_moved_least_is_replaced_and_the_rest_stays():
    index = torch.tensor([2, 5, 11, 17, 23, 31])
    delta = torch.tensor([0.5, -0.1, 0.3, 0.0, -2.0, 0.2])
    change = exchange(index, delta, torch.tensor([1, 17, 40]), 3)  # drops 17, 5 and 31; 17 grows again
    assert change.index.tolist() == [1, 2, 11, 17, 23, 40] and change.origin.tolist() == [-1, 0, 2, 3, 4, -1]
    few = exchange(index, delta, torch.tensor([40]), 3)  # one grows: the larger of the dropped stay
    assert few.index.tolist() == [2, 5, 11, 23, 31, 40]
    assert exchange(index, delta, torch.tensor([3, 4, 6, 7, 8, 9]), 6).index.tolist() == [3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize("block", [16, 1 << 20])
def test_a_phase_finds_the_largest_entries_and_sums_over_updates(monkeypatch, block):
    monkeypatch.setattr(_sparse_gradient, "BLOCK", block)
    index = torch.arange(0, 99, 4, dtype=torch.int32)
    pairs = [(randn(6, 9, seed=i), randn(6, 11, seed=i + 20)) for i in range(3)]
    dense = [(a.t() @ b).flatten() for a, b in pairs]
    phase = Phase(20)
    for i, (pair, scale) in enumerate(zip(pairs, (1.0, 0.5, 1.0), strict=True)):
        assert torch.allclose(phase.see(*pair, index), dense[i][index], atol=1e-5)
        phase.commit(scale)
    found = phase.found()
    cand = top(dense[0].abs(), 20)
    assert torch.equal(found.index.long(), cand) and found.seeds.covers == 3
    g = torch.stack([dense[0][cand], 0.5 * dense[1][cand], dense[2][cand]])
    assert torch.allclose(found.score, g.sum(0).abs(), atol=1e-5)
    assert torch.allclose(found.seeds.mean, g.mean(0), atol=1e-5)
    assert torch.allclose(found.seeds.square, (g**2).mean(0), rtol=1e-4)


def test_a_phase_counts_updates_not_micro_batches_and_forgets_bad_ones():
    index = torch.arange(5, dtype=torch.int32)
    pairs = [(randn(4, 6, seed=i), randn(4, 7, seed=i + 20)) for i in range(8)]
    dense = [(a.t() @ b).flatten() for a, b in pairs]
    phase = Phase(42)
    phase.see(*pairs[0], index)
    phase.discard()
    for i in range(1, 3):  # the first update of two micro-batches chooses only
        phase.see(*pairs[i], index)
    phase.commit(1.0)
    assert phase.counted == 0 and phase.found() is None
    for i in range(3, 5):
        phase.see(*pairs[i], index)
    phase.commit(1.0)
    phase.see(*pairs[5], index)
    phase.discard()
    for i in range(6, 8):
        phase.see(*pairs[i], index)
    phase.commit(1.0)
    seeds = phase.found().seeds
    one, two = dense[3] + dense[4], dense[6] + dense[7]
    assert seeds.covers == 2 and torch.allclose(seeds.mean, (one + two) / 2, atol=1e-5)
    assert torch.allclose(seeds.square, (one**2 + two**2) / 2, rtol=1e-4)


def test_lists_of_two_micro_batches_are_merged_by_their_sums():
    one = torch.tensor([1, 4, 9]), torch.tensor([3.0, -1.0, 1.0])
    other = torch.tensor([2, 4]), torch.tensor([2.5, -2.0])
    index, value = merged(one, other, 3)
    assert index.tolist() == [1, 2, 4] and value.tolist() == [3.0, 2.5, -3.0]
    assert [x.tolist() for x in merged(other, one, 3)] == [index.tolist(), value.tolist()]


def steps(found, opt, count, total=100, kind="causal", seed=0):
    engine = Engine(found.model, found.view, kind)
    found.begin(opt)
    for t in range(count):
        opt.step(ModelObjective(engine, [batch(kind, seed=seed + t)]))
        found.after_step(opt, total)


def test_the_first_selection_takes_the_largest_mean_gradient_and_counts_stay():
    """A phase of one update of one micro-batch: the support becomes the dense top k of |dW|."""
    kind, found = built(every=2, collect=1)
    _, twin = make("llama-untied")
    names = {n.removesuffix(".delta") + ".weight": s for n, s in found.sites.items()}
    counts = {n: len(s.index) for n, s in names.items()}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in names)
    Engine(twin, ParamView.of_model(twin), kind).differentiable(batch(kind, seed=0)).nll.mean().backward()
    steps(found, SparseAdamW(found.view, lr=1e-3), 1)
    for name, site in names.items():
        assert len(site.index) == counts[name]
        assert torch.equal(site.index.long(), top(twin.get_parameter(name).grad.abs().flatten(), counts[name]))
        assert torch.equal(site.base, twin.get_parameter(name).detach().flatten()[site.index])


@pytest.mark.parametrize("state", ["float32", "8bit"])
def test_kept_entries_keep_deltas_moments_and_age(state):
    _, found = built(every=4, collect=2, density=0.3)
    opt = SparseAdamW(found.view, lr=1e-2, state=state)
    steps(found, opt, 5)  # a selection at 2, the next at 6
    before = {
        n: (s.index.long(), s.delta.detach().clone(), copy.deepcopy(dict(opt.state[s.delta]))) for n, s in found.sites.items()
    }
    changed = 0
    found.growing.t, opt.t = 5, 6  # the selection at 6 with what is held now
    found.growing.after(opt, 100)
    for name, site in found.sites.items():
        index, delta, held = before[name]
        k, replaced = len(index), int(found.growing.schedule.fraction(6, 100) * len(index))
        same = members(site.index.long(), index)
        changed += int((~same).sum())
        assert len(site.index) == k and k - int(same.sum()) <= replaced
        place = torch.searchsorted(index, site.index.long()[same])
        assert torch.equal(site.delta.detach()[same], delta[place]) and not site.delta.detach()[~same].any()
        now = opt.state[site.delta]
        assert torch.equal(now["generation"][same], held["generation"][place])
        if state == "float32" or k < 4096:
            assert all(torch.equal(now[key][same], held[key][place]) for key in ("exp_avg", "exp_avg_sq"))
    assert changed > 0


@pytest.mark.parametrize("seen", [1, 3])
def test_a_seeded_entry_steps_as_if_it_had_always_been_tuned(seen):
    """Constant gradients: the seeds after n updates, then one step, against an entry tuned all along."""
    g = torch.tensor([0.3, -2.0, 0.05])
    view = ParamView.of_tensors([torch.zeros(3, requires_grad=True)])
    view["0"].support = Support((2, 4), torch.tensor([1, 3, 6]))
    opt = SparseAdamW(view, lr=0.1, max_grad_norm=0.0)
    for _ in range(seen + 2):
        opt.step(lambda: (view["0"].tensor * g).sum())
    held = copy.deepcopy(dict(opt.state[view["0"].tensor]))
    before = view["0"].storage.clone()
    opt.reselect("0", torch.tensor([0, -1, 2]), Seeds(g[1:2], g[1:2] ** 2, seen))
    assert opt.births == [0, 2]
    opt.step(lambda: (view["0"].tensor * g).sum())
    always = 0.1 * g[1] / (g[1].abs() + 1e-6)
    assert torch.allclose(before[1] - view["0"].storage[1], always, rtol=1e-5)
    m, v = opt.state[view["0"].tensor]["exp_avg"][1], opt.state[view["0"].tensor]["exp_avg_sq"][1]
    assert torch.allclose(m, g[1] * (1 - 0.9 ** (seen + 1)), rtol=1e-5)
    assert torch.allclose(v, g[1] ** 2 * (1 - 0.999 ** (seen + 1)), rtol=1e-4)
    assert torch.equal(held["generation"][[0, 2]], opt.state[view["0"].tensor]["generation"][[0, 2]])


def test_ma_grows_the_largest_products_of_accumulators():
    _, found = built(growth="ma", every=4, collect=2, rate=0.5)
    opt = SM3(found.view, lr=1e-2, momentum=0.5)
    steps(found, opt, 5)
    name, site = next(iter(found.sites.items()))
    r, c = opt.scores(name)
    dense = (r.double()[:, None] * c.double()).flatten()
    index, delta = site.index.long(), site.delta.detach().clone()
    dense[index] = 0
    count = int(found.growing.schedule.fraction(6, 100) * len(index))
    opt.t = 6
    found.growing.after(opt, 100)
    new = site.index.long()[~members(site.index.long(), index)]
    assert 0 < count == len(new) and torch.equal(new, top(dense, count))
    gone = index[~members(index, site.index.long())]
    assert torch.equal(gone, index[top(-delta.abs(), count)])
    assert not opt.state[site.delta]["momentum"][~members(site.index.long(), index)].any()


def test_the_schedule_is_the_published_one():
    plain, cosine = (Schedule(20, 5, 0.2, kind, first, False) for kind, first in (("linear", "all"), ("cosine", "rate")))
    assert [t for t in range(1, 70) if plain.closes(t)] == [5, 25, 45, 65]
    assert [u for u in range(1, 30) if plain.collects(u)] == [1, 2, 3, 4, 5, 21, 22, 23, 24, 25]
    early = Schedule(20, 5, 0.2, "linear", "all", True)
    assert [u for u in range(1, 30) if early.collects(u)] == [1, 2, 3, 4, 5, 20, 21, 22, 23, 24, 25]
    assert plain.fraction(5, 100) == 1.0 and plain.fraction(25, 100) == 0.2 * 0.75 and plain.fraction(105, 100) == 0.0
    assert cosine.fraction(5, 100) == 0.2 * (1 + math.cos(math.pi * 0.05)) / 2


def test_the_published_phase_has_its_faults():
    """A counter in bfloat16 stops at 256, means are G times too small where losses are divided by G, ages are one short."""
    one = torch.ones(2, 3, dtype=torch.bfloat16)
    phase, index = PublishedPhase(4), torch.arange(4, dtype=torch.int32)
    for _ in range(3):
        for _ in range(128):
            phase.see(one / 16, one / 16, index)
        phase.commit(1.0)
    assert float(phase.seen) == 256
    seeds = phase.found().seeds
    assert seeds.covers == 2.0 and seeds.lag == 1
    plain = Phase(4)
    for _ in range(3):
        plain.see(one.float(), one.float(), index)
        plain.commit(1.0)
    assert plain.found().seeds.covers == 3 and plain.found().seeds.lag == 0


def test_a_reference_run_selects_too():
    _, found = built(every=4, collect=2, compat_collect=True, compat_phases=True, compat_density=True, density=0.01)
    total = sum(p.numel() for p in make("llama-untied")[1].parameters())
    assert abs(sum(len(s.index) for s in found.sites.values()) - int(0.01 * total)) <= len(found.sites)
    opt = SparseAdamW(found.view, lr=1e-2, compat_eps=True)
    before = {n: s.index.clone() for n, s in found.sites.items()}
    steps(found, opt, 7)
    assert any(not torch.equal(before[n], s.index) for n, s in found.sites.items()) and len(opt.births) > 1


def test_the_same_seed_gives_the_same_run_and_state_is_small():
    ends = []
    for _ in range(2):
        _, found = built(every=4, collect=2, density=0.1)
        opt = SparseAdamW(found.view, lr=1e-2)
        steps(found, opt, 7)
        ends.append({n: (s.index, s.delta.detach()) for n, s in found.sites.items()})
    assert all(torch.equal(a, b) for n in ends[0] for a, b in zip(ends[0][n], ends[1][n], strict=True))
    held = sum(v.numel() * v.element_size() for s in opt.state.values() for v in s.values() if torch.is_tensor(v))
    assert held == SparseAdamW.state_bytes(shapes(found.view), opt.config) == 9 * found.view.numel()


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [[0], [0, 1, 2], [127, 128, 300, 16_600, 2_100_000, 2**40], [5, 6, 133, 262, 16_646]])
def test_positions_come_back_from_their_code(index):
    code = _sparse_file.encode(torch.tensor(index))
    assert code.dtype == torch.uint8 and _sparse_file.decode(code).tolist() == index
    with pytest.raises(ValueError, match="within a number"):
        _sparse_file.decode(torch.tensor([129], dtype=torch.uint8))


def test_positions_take_little_room():
    index = random_support(noise.Address(0, 0, 0, 0, 0), 10**6, 10**4)
    assert len(_sparse_file.encode(index)) < 1.35 * len(index)
    assert torch.equal(_sparse_file.decode(_sparse_file.encode(index)), index)


def test_deltas_come_back_from_their_file(tmp_path):
    kind, found = built("roberta-classification")
    moved(found)
    found.save(tmp_path)
    _, again = built("roberta-classification", seed=9)
    again.load(tmp_path)
    assert torch.equal(logits(found.model, kind), logits(again.model, kind))
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 5.5 * found.view.numel() + 8000


def test_a_file_is_refused_by_another_base_density_or_choice_of_layers(tmp_path):
    _, found = built()
    found.save(tmp_path)
    other = make("llama-untied", seed=1)[1]
    with pytest.raises(ConfigError, match="belongs to another base model"):
        spiel.build(other, spiel.Config(density=0.05)).load(tmp_path)
    with pytest.raises(ConfigError, match=r"holds \d+ deltas of .*: load it with the scheme_args"):
        built(density=0.1)[1].load(tmp_path)
    with pytest.raises(ConfigError, match="does not fit this model's"):
        built(target_modules=["q_proj"])[1].load(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no sparse.safetensors"):
        found.load(tmp_path / "nothing")


def test_what_cannot_be_is_refused():
    for bad, rule in (
        ({"density": 0}, r"scheme_args.density = 0: it should be greater than 0 \(share of .* by default 0.01\)$"),
        ({"density": 1.5}, "scheme_args.density = 1.5: it should be less than or equal to 1"),
        ({"density": "much"}, "scheme_args.density = 'much': it should be a valid number"),
        ({"rank": 0}, "scheme_args.rank = 0: it should be greater than or equal to 1"),
        ({"growth": "some"}, "scheme_args.growth = 'some': it should be 'ag', 'ma' or 'none'"),
    ):
        with pytest.raises(ConfigError, match=rule):
            scheme_config(load(None, [], {"scheme": "spiel", **{f"scheme_args.{k}": v for k, v in bad.items()}}))
    with pytest.raises(ConfigError, match=r"collect = 20 must be less than every = 20"):
        built(collect=20)
    with pytest.raises(ConfigError, match=r"rank = 30 means \d+ deltas in .* which has \d+ entries"):
        built(rank=30)
    for pattern in (["no_such"], "q_proj"):  # a text is a regular expression for the whole name
        with pytest.raises(ConfigError, match=r"matches no layer of LlamaForCausalLM: take ends of names like 'model"):
            built(target_modules=pattern)
    with pytest.raises(ConfigError, match=r"model.embed_tokens is a Embedding.*of kind Linear or Conv1D"):
        built(target_modules=["embed_tokens"])
    with pytest.raises(ConfigError, match="tied to another layer's"):
        built("llama-tied", target_modules=["lm_head"])
    _, found = built()
    for method, match in (("adamw", "cannot follow them: use method sparse_adamw"), ("zo_sgd", "growth=none")):
        with pytest.raises(ConfigError, match=match):
            found.begin(optim.get(method).build(found.view))
    with pytest.raises(ConfigError, match="which SparseAdamW has not: use method sm3"):
        ma = built(growth="ma")[1]
        ma.begin(SparseAdamW(ma.view))


# -- runs -----------------------------------------------------------------------------------------------------------------


def tune(folder, **options):
    path = folder / "rows.jsonl"
    rows = [{"text": f"row {i} is {'fine' if i % 2 else 'poor'}", "label": "great" if i % 2 else "terrible"} for i in range(24)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    values = {"model": "embedded", "data": str(path), "method": "sparse_adamw", "scheme": "spiel", "threads": 1}
    values |= {"scheme_args.every": 4, "scheme_args.collect": 2, "scheme_args.density": 0.02, "train.max_steps": 8}
    values |= {"train.per_device_train_batch_size": 4, "train.save_steps": 5, "train.eval_steps": 100}
    return smidgen.finetune(load(None, [], values | options), say=lambda line: None)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def interrupted(folder, cls, at, monkeypatch, **options):
    real, made = cls._step, []

    def dies(self, objective):
        made.append(1)
        if len(made) == at:
            raise KeyboardInterrupt
        return real(self, objective)

    monkeypatch.setattr(cls, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        tune(folder, output=str(folder / "run"), **options)
    monkeypatch.undo()
    return smidgen.finetune(load(None, [], {"output": str(folder / "run"), "resume": True}), say=lambda line: None)


@pytest.mark.trainer
@pytest.mark.parametrize("growth", ["ag", "ma"])
def test_resuming_within_a_phase_is_the_straight_run_bit_for_bit(tmp_path, one_thread, monkeypatch, growth):
    """The checkpoint is made after update 5, in the phase of updates 5 and 6, with two micro-batches an update."""
    cls = SparseAdamW if growth == "ag" else SM3
    options = {"scheme_args.growth": growth, "method": "sparse_adamw" if growth == "ag" else "sm3"}
    options |= {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 2}
    straight = tune(tmp_path, output=str(tmp_path / "straight"), **options)
    resumed = interrupted(tmp_path, cls, 8, monkeypatch, **options)
    assert resumed["weights_sha256"] == straight["weights_sha256"] and resumed["dev"] == straight["dev"]
    files = [(tmp_path / run / "sparse.safetensors").read_bytes() for run in ("straight", "run")]
    assert files[0] == files[1]
    held = json.loads((tmp_path / "straight" / "checkpoint-5" / "growth.json").read_text())
    assert held["t"] == 5 and bool(held["phases"]) == (growth == "ag")
    assert not (tmp_path / "straight" / "checkpoint-5" / "model.safetensors").exists()


@pytest.mark.trainer
@pytest.mark.parametrize("form,rank", [("merged", None), ("peft-supertuning", None), ("peft-shira", 1)])
def test_exports_give_the_same_logits_in_stock_libraries(tmp_path, one_thread, monkeypatch, form, rank):
    found = tune(tmp_path, output=str(tmp_path / "run"), **({} if rank is None else {"scheme_args.rank": rank}))
    assert found["status"] == "done"

    def here(command, **_):
        monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
        exec(command[2], {})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(exporting, "subprocess", types.SimpleNamespace(run=here))
    assert export(tmp_path / "run", tmp_path / "out", form)["max_difference"] < 1e-5
    if form == "peft-supertuning":
        with pytest.raises(ConfigError, match=r"wants r \(rows \+ columns\) deltas in every matrix"):
            export(tmp_path / "run", tmp_path / "no", "peft-shira")
        with pytest.raises(ConfigError, match="read by smidgen alone"):
            export(tmp_path / "run", tmp_path / "nor this", "adapter")
