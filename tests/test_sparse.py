"""Sparse deltas at fixed positions, SaRA, deltas on quantised bases, and several ranks."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import sparse_ranks
from families import batch, make
from smidgen import adapt, noise, optim, quantised
from smidgen.adapt import _ranks, _sparse_gradient
from smidgen.adapt._sparse import sums
from smidgen.adapt._support import below, by_magnitude, in_lines, members, random_support, top
from smidgen.adapt.sara import nuclear_gradient, theta
from smidgen.config import ConfigError
from smidgen.directions import Dense
from smidgen.objective import ModelObjective, Recorded
from smidgen.optim.sm3 import SM3
from smidgen.optim.sparse_adamw import SparseAdamW
from smidgen.params import ParamView, Support
from smidgen.probing import Engine

SEED = 3


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built(scheme="sparse", family="llama-untied", dtype=torch.float32, convert=None, **options):
    kind, model = make(family, dtype)
    if convert is not None:
        convert(model)
    module = adapt.get(scheme)
    options = options if scheme == "sara" else {"density": 0.05, **options}
    return kind, module.build(model, module.Config(**options), seed=SEED)


def moved(found, scale=0.3):
    for i, entry in enumerate(found.view):
        entry.storage.add_(scale * randn(*entry.tensor.shape, seed=i))
        entry.version += 1


def logits(model, kind="causal"):
    with torch.no_grad():
        return model(**{k: v for k, v in batch(kind).items() if k != "labels"}).logits


def steps(found, opt, first, last, kind="causal", total=100):
    engine = Engine(found.model, found.view, kind)
    if opt.t == 0:
        found.begin(opt)
    for t in range(first, last):
        opt.step(ModelObjective(engine, [batch(kind, seed=t)]))
        found.after_step(opt, total)


# -- supports -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (5, 300), (3, 70_000)])
def test_a_support_gives_back_its_positions_in_few_bytes(shape):
    size = shape[0] * shape[1]
    index = random_support(noise.Address(0, 0, 0, 0, 0), size, -(-size // 3))
    support = Support(shape, index)
    assert torch.equal(support.index, index.int()) and len(support) == len(index)
    assert torch.equal(support.rows.long() * shape[1] + support.columns, index)
    assert support.nbytes() == (2 if shape[1] <= 1 << 16 else 4) * len(index) + 4 * (shape[0] + 1)


@pytest.mark.parametrize("rows,columns", [(1, 1), (7, 5), (5, 9), (8, 8), (1, 6), (6, 1)])
def test_lines_are_the_diagonal_and_whole_rows(rows, columns):
    for count in range(1, rows * columns + 1):
        found = in_lines((rows, columns), count)
        assert len(found) == count and bool((found[1:] > found[:-1]).all()) and int(found[-1]) < rows * columns
        diagonal = torch.arange(min(rows, columns, count)) * (columns + 1)
        assert bool(members(diagonal, found).all())
        full = torch.zeros(rows * columns).index_fill_(0, found, 1).view(rows, columns).sum(1)
        off = full - torch.tensor([float(i < len(diagonal)) for i in range(rows)])
        assert int(((off > 0) & (full < columns)).sum()) <= 1  # one row in part


def test_magnitudes_choose_the_largest_the_smallest_and_those_below():
    weight = torch.tensor([[0.5, -3.0, 0.0], [3.0, -0.1, 0.2]], dtype=torch.bfloat16)
    assert by_magnitude(weight, 1, largest=True).tolist() == [1]  # of equal ones the first
    assert by_magnitude(weight, 3, largest=True).tolist() == [0, 1, 3]
    assert by_magnitude(weight, 2, largest=False).tolist() == [2, 4] and below(weight, 0.2).tolist() == [2, 4]


def test_large_weights_are_those_of_pefts_supertuning():
    peft = pytest.importorskip("peft")
    _, found = built(support="large")
    names = [n.removesuffix(".delta") for n in found.sites]
    twin = peft.get_peft_model(make("llama-untied")[1], peft.SupertuningConfig(sparsity=0.95, target_modules=names))
    for name, site in found.sites.items():
        theirs = twin.get_submodule("base_model.model." + name.removesuffix(".delta")).supertuning_indices["default"]
        assert abs(len(theirs) - len(site.index)) <= 1
        assert len(set(theirs.tolist()) ^ set(site.index.tolist())) <= 1


@pytest.mark.parametrize("support", ["random", "large", "small", "structured"])
def test_fixed_positions_stay_under_any_method(support):
    for method, options in (("sparse_adamw", {}), ("adamw", {}), ("zo_sgd", {"eps": 1e-2})):
        _, found = built(support=support)
        before = {n: s.index for n, s in found.sites.items()}
        base = found.base_sha256()
        steps(found, optim.get(method).build(found.view, optim.get(method).Config(lr=1e-2, **options)), 0, 3)
        assert all(torch.equal(before[n], s.index) and s.delta.any() for n, s in found.sites.items())
        found._base = None
        assert found.base_sha256() == base


@pytest.mark.parametrize("support", ["gradient", "snip"])
@pytest.mark.parametrize("block", [100, 1 << 20])
def test_gradients_choose_once(monkeypatch, support, block):
    monkeypatch.setattr(_sparse_gradient, "BLOCK", block)
    kind, found = built(support=support, collect=1)
    twin = make("llama-untied")[1].requires_grad_(True)
    Engine(twin, ParamView.of_model(twin), kind).differentiable(batch(kind, seed=0)).nll.mean().backward()
    opt = SparseAdamW(found.view, lr=1e-3)
    steps(found, opt, 0, 1)
    for name, site in found.sites.items():
        weight = twin.get_parameter(name.removesuffix("delta") + "weight")
        dense = (weight.grad if support == "gradient" else weight.grad * weight.detach()).abs().flatten()
        assert torch.equal(site.index.long(), top(dense, len(site.index)))
    chosen = {n: s.index for n, s in found.sites.items()}
    steps(found, opt, 1, 8)
    assert all(torch.equal(chosen[n], s.index) and s.phase is None for n, s in found.sites.items())
    with pytest.raises(ConfigError, match=r"sparse_adamw, or another scheme_args.support"):
        found.begin(optim.get("zo_sgd").build(found.view))


def test_a_zeroth_order_step_probes_and_moves_the_support_alone():
    """Against a plain model whose weights are displaced at the positions by hand."""
    kind, found = built(support="large")
    opt = optim.get("zo_sgd").build(found.view, optim.get("zo_sgd").Config(lr=1e-2, eps=1e-2, normalise="none"))
    recorded = Recorded(ModelObjective(Engine(found.model, found.view, kind), [batch(kind)]))
    opt.step(recorded)
    up, down = recorded.values
    _, twin = make("llama-untied")
    for scale in (1.0, -1.0):  # theta = -lr c z after the step, so z = -theta / (lr c)
        plain = copy.deepcopy(twin)
        for name, site in found.sites.items():
            z = -site.delta.detach() / (1e-2 * (up - down) / 2e-2)
            assert torch.allclose(z.abs(), torch.ones_like(z), atol=1e-4)
            plain.get_parameter(name.removesuffix("delta") + "weight").data.view(-1)[site.index] += scale * 1e-2 * z
        engine = Engine(plain, ParamView.of_model(plain), kind)
        assert abs(float(engine.losses(batch(kind)).nll.double().mean()) - (up if scale > 0 else down)) < 1e-5


@pytest.mark.parametrize("options,form", [({"support": "large"}, "peft-supertuning"), ({"rank": 1}, "peft-shira")])
def test_exports_of_other_supports_load_in_peft(tmp_path, options, form):
    peft = pytest.importorskip("peft")
    _, found = built(**options)
    moved(found)
    found.export(tmp_path, form)
    again = peft.PeftModel.from_pretrained(make("llama-untied")[1], str(tmp_path)).eval()
    assert torch.allclose(logits(again), logits(found.model), atol=1e-5)


# -- SaRA -----------------------------------------------------------------------------------------------------------------


def test_sara_tunes_what_is_below_its_threshold_and_lets_the_grown_settle(tmp_path):
    _, found = built("sara", threshold=0.01, reselect=3, nuclear=0.0)
    base = found.base_sha256()
    for site in found.sites.values():
        assert torch.equal(site.index.long(), below(site.weight, 0.01))
    opt = SparseAdamW(found.view, lr=2e-3)
    steps(found, opt, 0, 2)
    before = {n: (s.index, s.delta.detach().clone(), theta(s)) for n, s in found.sites.items()}
    steps(found, opt, 2, 3)
    settled = {n: s.settled for n, s in found.sites.items() if s.settled is not None}
    assert settled
    for name, site in found.sites.items():
        index = before[name][0]
        assert bool((theta(site).abs() < 0.01).all()) or len(site.index) == 1
        assert len(site.everything()[0]) == len(index) and torch.equal(site.everything()[0], index)
        held = opt.state[site.delta]
        assert all(held[key].numel() == len(site.index) for key in ("exp_avg", "exp_avg_sq", "generation"))
        if name in settled:
            assert bool(((settled[name].base + settled[name].delta).abs() >= 0.01).all())
    seen = logits(found.model)
    for name, held in settled.items():  # in the weight
        assert torch.equal(found.sites[name].weight.view(-1)[held.index], sums(held.base, held.delta))
    found.save_state(tmp_path)
    state = copy.deepcopy(opt.state_dict())
    steps(found, opt, 3, 5)
    for name, held in settled.items():
        assert all(torch.equal(a, b) for a, b in zip(held, found.sites[name].settled, strict=True))
    _, again = built("sara", threshold=0.01, reselect=3, nuclear=0.0)
    twin = SparseAdamW(again.view, lr=2e-3)
    again.begin(twin)
    again.load_state(tmp_path)
    assert torch.equal(logits(again.model), seen)
    twin.load_state_dict(state)
    steps(again, twin, 3, 5)
    assert all(torch.equal(a.storage, b.storage) for a, b in zip(found.view, again.view, strict=True))
    assert torch.equal(logits(found.merged()), logits(found.model))
    found._base = None
    assert found.base_sha256() == base


def test_the_penaltys_gradient_is_autograds():
    _, found = built("sara", threshold=0.02)
    moved(found, 0.01)
    for site in found.sites.values():
        matrix = torch.zeros(site.support.shape, dtype=torch.float64)
        matrix.view(-1)[site.index] = theta(site).double()
        matrix.requires_grad_()
        torch.linalg.matrix_norm(matrix, "nuc").backward()
        wanted = 0.5 * matrix.grad.view(-1)[site.index]
        assert torch.allclose(nuclear_gradient(site, 0.5).double(), wanted, atol=1e-4)


def test_the_penalty_acts_once_an_update_and_lowers_the_norm():
    def norms(found):
        total = 0.0
        for site in found.sites.values():
            matrix = torch.zeros(site.support.shape)
            matrix.view(-1)[site.index] = theta(site)
            total += float(torch.linalg.matrix_norm(matrix, "nuc"))
        return total

    ends = {}
    for weight in (0.0, 1.0):
        kind, found = built("sara", threshold=0.02, nuclear=weight, reselect=0)
        start = norms(found)
        steps(found, optim.get("sgd").build(found.view, optim.get("sgd").Config(lr=2e-2, max_grad_norm=0)), 0, 24)
        ends[weight] = norms(found)
    assert ends[1.0] < 0.8 * start < ends[0.0]
    engine, halves = Engine(found.model, found.view, kind), [batch(kind, seed=s) for s in (1, 2)]
    for site in found.sites.values():
        site.owed = None
    owing = next(iter(found.sites.values()))
    grads = []
    for owed in (None, lambda: torch.ones_like(owing.delta)):
        owing.owed = owed
        ModelObjective(engine, halves).backward()
        grads.append(owing.delta.grad)
        for entry in found.view:
            entry.tensor.grad = None
    assert torch.allclose(grads[1] - grads[0], torch.ones_like(owing.delta), atol=1e-6)


def test_sara_refuses_what_it_cannot():
    with pytest.raises(ConfigError, match=r"threshold = 1e-12 is below every weight .* smallest is"):
        built("sara", threshold=1e-12)
    _, found = built("sara", threshold=0.02)
    with pytest.raises(ConfigError, match=r"cannot follow them: use method sparse_adamw or sm3, or scheme_args.reselect=0"):
        found.begin(optim.get("adamw").build(found.view))
    _, found = built("sara", threshold=0.02, reselect=0)
    with pytest.raises(ConfigError, match="the penalty is a gradient, which ZOSGD does not ask for"):
        found.begin(optim.get("zo_sgd").build(found.view))


# -- state ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method,options,dtype,limit",
    [
        ("sparse_adamw", {"state": "8bit"}, torch.float32, 14),
        ("sparse_adamw", {"state": "8bit"}, torch.bfloat16, 12),
        ("sparse_adamw", {"state": "bfloat16"}, torch.bfloat16, 14),
        ("sparse_adamw", {}, torch.float32, 19.5),  # the default
        ("sm3", {}, torch.bfloat16, 10),
    ],
)
def test_bytes_a_tuned_entry(method, options, dtype, limit):
    """Everything that is held between steps for the deltas of a matrix of 512 x 640 at the size of a LoRA of rank 8."""
    if options.get("state") == "8bit":
        pytest.importorskip("bitsandbytes")
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(640, 512, dtype=dtype))
    scheme = adapt.get("spiel")
    found = scheme.build(model, scheme.Config(rank=8, growth="none"))
    opt = optim.get(method).build(found.view, optim.get(method).Config(lr=1e-3, **options))
    opt.step(lambda: model(randn(4, 640).to(dtype)).float().square().mean())
    (site,) = found.sites.values()
    state = [v for v in opt.state[site.delta].values() if torch.is_tensor(v)]
    held = site.delta.nbytes + site.support.nbytes() + site.base.nbytes + sum(v.nbytes for v in state)
    assert site.delta.grad is None and held <= limit * len(site.support)


# -- quantised bases ------------------------------------------------------------------------------------------------------


def convert(code):
    """A function that quantises the linear layers of a model, its head left out."""
    bnb = pytest.importorskip("bitsandbytes")

    def change(model):
        for name, plain in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]:
            options = {"bias": plain.bias is not None}
            with torch.random.fork_rng():
                if code == "int8":
                    made = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, has_fp16_weights=False, **options)
                    made.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
                else:
                    options |= {"quant_type": "nf4", "compute_dtype": plain.weight.dtype}
                    made = bnb.nn.Linear4bit(plain.in_features, plain.out_features, **options)
                    made.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
            made.bias = plain.bias
            model.set_submodule(name, made.to("cpu").eval())
        quantised.steady(model)

    return change


def twin_of(found):
    """The model with the values of its codes as plain weights, deltas added."""
    _, twin = make("llama-untied", next(found.model.parameters()).dtype)
    for name, site in found.sites.items():
        weight = quantised.dequantise(site.module)
        weight.view(-1)[site.index] = sums(weight.view(-1)[site.index], site.delta.detach())
        twin.get_submodule(name.removesuffix(".delta")).weight.data = weight
    return twin


@pytest.mark.parametrize("code", ["nf4", "int8"])
@pytest.mark.parametrize("density", [0.03, 0.5])  # by dot products and by blocks
def test_deltas_on_codes_are_those_on_their_values(code, density):
    kind, found = built("spiel", convert=convert(code), density=density)
    codes = {n: s.weight.detach().clone() for n, s in found.sites.items()}
    assert len(codes) == 14 and all(s.quantised and s.base is None for s in found.sites.values())
    _, plain = make("llama-untied")
    convert(code)(plain)
    assert torch.equal(logits(found.model), logits(plain))  # deltas of zero
    moved(found)
    assert torch.allclose(logits(found.model), logits(twin_of(found)), atol=1e-5)
    twin = twin_of(found)
    Engine(found.model, found.view, kind).differentiable(batch(kind)).nll.mean().backward()
    twin.requires_grad_(True)
    Engine(twin, ParamView.of_model(twin), kind).differentiable(batch(kind)).nll.mean().backward()
    for name, site in found.sites.items():
        dense = twin.get_parameter(name.removesuffix("delta") + "weight").grad.flatten()[site.index]
        assert torch.allclose(site.delta.grad, dense, atol=1e-6), name
    assert all(torch.equal(codes[n], s.weight) for n, s in found.sites.items())


@pytest.mark.parametrize("growth", ["ag", "ma"])
def test_a_quantised_base_is_tuned_saved_and_probed_and_its_codes_stay(tmp_path, growth):
    _, found = built("spiel", convert=convert("nf4"), growth=growth, every=4, collect=2)
    codes = {n: s.weight.detach().clone() for n, s in found.sites.items()}
    before = {n: s.index for n, s in found.sites.items()}
    start, base = logits(found.model), found.base_sha256()
    steps(found, (SparseAdamW if growth == "ag" else SM3)(found.view, lr=1e-2), 0, 7)
    assert any(not torch.equal(before[n], s.index) for n, s in found.sites.items())
    assert all(torch.equal(codes[n], s.weight) for n, s in found.sites.items())
    found.save(tmp_path)
    _, again = built("spiel", convert=convert("nf4"))
    again.load(tmp_path)
    assert torch.equal(logits(again.model), logits(found.model)) and not torch.equal(start, logits(found.model))
    for form in (found.merged, lambda: found.export(tmp_path, "peft-supertuning")):
        with pytest.raises(ConfigError, match="are quantised, and would be rounded to other codes"):
            form()
    next(iter(again.sites.values())).module.weight.quant_state.state2.absmax.mul_(1.5)  # other scales are another base
    again._base = None
    assert again.base_sha256() != base
    with pytest.raises(ConfigError, match="another base model"):
        again.load(tmp_path)


def test_layers_that_cannot_be_read_are_refused():
    bnb = pytest.importorskip("bitsandbytes")
    _, model = make("llama-untied")
    with torch.random.fork_rng():
        model.model.layers[0].mlp.up_proj = bnb.nn.Linear8bitLt(24, 40, bias=False)  # weights kept in 16 bits
    for scheme in ("spiel", "sparse", "sara"):
        with pytest.raises(ConfigError, match=r"up_proj is a Linear8bitLt.*load the model with quantise: nf4 or int8"):
            adapt.get(scheme).build(model, adapt.get(scheme).Config())


# -- ranks ----------------------------------------------------------------------------------------------------------------


def agree(found):
    """Two ranks hold the same, what one process with both halves holds, and raised what they should."""
    for name, (index, delta) in sparse_ranks.run().items():
        assert all(torch.equal(index, f["ends"][name][0]) for f in found)
        assert torch.equal(found[0]["ends"][name][1], found[1]["ends"][name][1])
        assert torch.allclose(delta, found[0]["ends"][name][1], atol=1e-5)
    wanted = (
        "ranks 0 and 1 tune other entries of b: ",
        "start all ranks from the same base and seed",
        "compat_collect on 2 ranks",
    )
    assert all(match in error for f in found for match, error in zip(wanted, f["errors"], strict=True))


def test_two_ranks_tune_the_same_entries_as_one_with_twice_the_accumulation(monkeypatch):
    """Ranks as threads that exchange what they hold; over gloo in the slow tier."""
    held, barrier, local = [None, None], threading.Barrier(2), threading.local()

    def gathered(mine):
        held[local.rank] = mine
        barrier.wait(60)
        found = list(held)
        barrier.wait(60)
        return found

    def count():
        return 2 if hasattr(local, "rank") else 1

    monkeypatch.setattr(_ranks, "count", count)
    monkeypatch.setattr(_ranks, "gathered", lambda mine: gathered(mine) if count() > 1 else [mine])
    monkeypatch.setattr(_ranks, "add_", lambda t: t.copy_(sum(gathered(t.clone()))) if count() > 1 else None)

    def rank(number):
        local.rank = number
        return sparse_ranks.one(number)

    with ThreadPoolExecutor(2) as pool:
        agree(list(pool.map(rank, (0, 1))))


@pytest.mark.slow
def test_two_processes_over_gloo_tune_the_same_entries(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(sparse_ranks.__file__)), str(tmp_path)]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [subprocess.Popen(command, env={**shared, "RANK": str(r)}, stderr=subprocess.PIPE) for r in (0, 1)]
    for process in ranks:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()[-2000:]
    agree([torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)])


def test_the_first_slope_sees_deltas_of_zero():
    kind, found = built()
    engine, data = Engine(found.model, found.view, kind), [batch(kind)]
    z, eps = Dense(1, 0, 0, found.view.ids), 1e-2
    up, down = ModelObjective(engine, data).losses([((z, eps),), ((z, -eps),)]).tolist()
    _, slope = ModelObjective(engine, data).slope(z)
    assert slope != 0 and abs(slope - (up - down) / (2 * eps)) < 1e-3 * max(1.0, abs(slope))
