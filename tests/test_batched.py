"""Batched probing equals the sequential engine, on every model family."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from families import FAMILIES, batch, make
from smidgen.batched import BatchedEngine, unsupported
from smidgen.directions import Dense
from smidgen.lowrank import Accumulated, LowRank, matrices
from smidgen.objective import ModelObjective
from smidgen.params import ParamView
from smidgen.probing import Engine

SEQUENTIAL = {"mixtral", "t5-tied", "t5-untied"}  # experts in one tensor; one position table for all rows


def engines(family, dtype=torch.float32):
    kind, model = make(family)
    model = model.to(dtype)
    view = ParamView.of_model(model)
    return Engine(model, view, kind), BatchedEngine(model, view, kind), view, kind


def probes_of(view, count, *, same=True, scale=0.05, rank=2):
    z = [LowRank(3, 1, i, view.ids, matrices(view), rank, 0 if same else i) for i in range(count)]
    return [((d, s * scale),) for d in z for s in (1, -1)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("same", [True, False])
def test_equals_one_probe_at_a_time(family, same, caplog):
    slow, fast, view, kind = engines(family)
    before = view.snapshot()
    rows = batch(kind, seed=10, labels="all")
    probes = [*probes_of(view, 2, same=same), ()]
    expected = [slow.losses(rows, probe) for probe in probes]
    with caplog.at_level(logging.WARNING, "smidgen"):
        found = fast.together(rows, probes)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.rows, b.rows) and a.size == b.size
        assert torch.allclose(a.nll, b.nll, atol=2e-4, rtol=1e-4)
    assert float((expected[0].nll - expected[-1].nll).abs().max()) > 1e-3  # the probes matter
    assert all(torch.equal(before[e.name], e.storage) for e in view)
    assert fast.forwards == slow.forwards and fast.tokens == slow.tokens
    fell_back = any("one at a time" in record.getMessage() for record in caplog.records)
    assert fell_back == (family in SEQUENTIAL)
    if not fell_back:
        assert unsupported(fast) is None


@pytest.mark.parametrize("family", ["opt-tied", "llama-untied", "gpt2", "roberta-classification"])
def test_several_micro_batches_each_row_and_chunks(family, monkeypatch):
    monkeypatch.setattr(
        "smidgen.population.PIECE", 6 * 9 * (24 + 24) * 4
    )  # of a square layer two probes a piece, of wide ones one
    slow, fast, view, kind = engines(family)
    rows = [batch(kind, seed=s, labels="some" if s else "all") for s in (0, 1)]
    probes = probes_of(view, 4)
    fast.memory = 3 * fast.bytes_of(rows[0], probes)  # three probes at a time
    for each in (False, True):
        a = ModelObjective(slow, rows).losses(probes, each=each)
        b = ModelObjective(fast, rows).losses(probes, each=each)
        assert torch.allclose(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["opt-tied", "gpt2", "bert-classification"])
def test_dense_noise_in_narrow_matrices(family, caplog):
    """The factors of LoRA and a new head may be displaced by anything: their noise is as small as they are."""
    kind, model = make(family)
    linears = {"opt-tied": ["q_proj", "fc2"], "gpt2": ["c_attn"], "bert-classification": ["query"]}[family]
    head = ["classifier"] if kind == "classification" else None
    settings = LoraConfig(r=3, target_modules=linears, modules_to_save=head, init_lora_weights=False)
    settings.fan_in_fan_out = family == "gpt2"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(model, settings).eval()
    view = ParamView.of_model(model)
    slow, fast, rows = Engine(model, view, kind), BatchedEngine(model, view, kind), batch(kind, seed=10, labels="all")
    low = LowRank(3, 1, 5, view.ids, matrices(view), 2, 0)
    probes = [((Dense(3, 1, i, view.ids), s * 0.05),) for i in (0, 1) for s in (1, -1)] + [((low, 0.1),), ()]
    assert [min(e.tensor.shape) for e in view if e.tensor.ndim == 2] == [3] * (len(view) - (1 if head else 0))
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = fast.together(rows, probes)
    assert "one at a time" not in caplog.text and len(calls) < 2 * len(probes) + 4
    for probe, losses in zip(probes, found, strict=True):
        assert torch.allclose(slow.losses(rows, probe).nll, losses.nll, atol=2e-4, rtol=1e-4)


def test_layers_below_all_probes_run_once_for_one_copy_of_the_rows():
    kind, model = make("llama-untied")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name or "lm_head" in name)
    view = ParamView.of_model(model)
    slow, fast, rows = Engine(model, view, kind), BatchedEngine(model, view, kind), batch(kind, seed=10, labels="all")
    seen = []
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    probes = probes_of(view, 2)
    expected = ModelObjective(slow, [rows]).losses(probes)
    for _ in range(2):
        seen.clear()
        assert torch.allclose(ModelObjective(fast, [rows]).losses(probes), expected, atol=1e-5)
    assert seen == [3]  # the rows once, for four probes
    fast.reuse.every = 0
    ModelObjective(fast, [rows]).losses(probes)
    assert seen == [3, 12]


def test_memory_bounds_the_rows_of_a_forward():
    _, fast, view, kind = engines("opt-tied")
    rows, probes, seen = batch(kind, seed=10, labels="all"), probes_of(view, 4), []
    fast.together(rows, probes)
    fast.model.register_forward_pre_hook(lambda _, __, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    fast.memory = 3 * fast.bytes_of(rows, probes)
    fast.together(rows, probes)
    fast.memory = 1  # one probe at least
    fast.together(rows, probes)
    assert seen == [9, 9, 6] + [3] * 8


def test_sixteen_bits_agree_as_far_as_their_rounding_goes():
    slow, fast, view, kind = engines("llama-tied", torch.bfloat16)
    rows = batch(kind, seed=10, labels="all")
    probes = probes_of(view, 2, scale=0.02)
    for probe, found in zip(probes, fast.together(rows, probes), strict=True):
        assert float((slow.losses(rows, probe).nll - found.nll).abs().max()) < 0.1


def test_an_offset_on_the_same_subspace_and_one_on_another():
    slow, fast, view, kind = engines("opt-tied")
    z = LowRank(3, 1, 0, view.ids, matrices(view), 2, 0)
    same = Accumulated({n: torch.randn(m, 2, generator=_rng()) for n, (m, _) in z.shapes.items()}, z)
    third = LowRank(3, 1, 0, view.ids, z.shapes, 3, 7)
    other = Accumulated({n: torch.randn(m, 3, generator=_rng()) for n, (m, _) in z.shapes.items()}, third)
    rows = batch(kind, seed=10, labels="all")
    probes = [((same, 0.03), (z, s)) for s in (0.05, -0.05)] + [((other, 0.02), (z, 0.05)), ((same, 0.03),)]
    for probe, found in zip(probes, fast.together(rows, probes), strict=True):
        assert torch.allclose(slow.losses(rows, probe).nll, found.nll, atol=2e-4, rtol=1e-4)


def test_a_displaced_layer_that_is_forgotten_is_noticed(monkeypatch, caplog):
    _, fast, view, kind = engines("opt-tied")
    plain = torch.nn.functional.linear
    monkeypatch.setattr("smidgen.batched.piecewise", lambda module, people, tensors, x: plain(x, module.weight, module.bias))
    with caplog.at_level(logging.WARNING, "smidgen"):
        fast.together(batch(kind, seed=10, labels="all"), probes_of(view, 1, scale=1e-4))
    assert "losses differ" in caplog.text


def _rng():
    return torch.Generator().manual_seed(0)
