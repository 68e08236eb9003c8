"""ParamView: names, ids, ties, and its writers."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

from families import make
from smidgen import noise
from smidgen.directions import Dense
from smidgen.params import ParamView, canonical, tensor_id

GOLDEN_IDS = [310482890, 2890126588]  # of these two names, for ever: journals depend on them
AT = noise.Address(1, 0, 0, 0, noise.ROUND)


@pytest.mark.parametrize(
    "wrapped,plain",
    [
        ("module.model.q.weight", "model.q.weight"),
        ("_orig_mod.module.w", "w"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.classifier.modules_to_save.default.bias", "classifier.bias"),
        ("base_model.model.q_proj.lora_A.default.weight", "q_proj.lora_A.default.weight"),
    ],
)
def test_canonical_names(wrapped, plain):
    assert canonical(wrapped) == plain


def test_ids_survive_peft_and_subsets():
    import peft

    _, model = make("llama-tied")
    ids = ParamView.of_model(model).ids
    some = ParamView.of_model(model, tuned=lambda n: "q_proj" in n).ids
    assert some and all(ids[n] == i for n, i in some.items())
    with torch.random.fork_rng():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    for _, p in wrapped.named_parameters():
        p.requires_grad_(True)
    again = ParamView.of_model(wrapped).ids
    assert {n: i for n, i in again.items() if "lora" not in n} == ids


def test_ids_are_a_stable_hash():
    assert tensor_id("a") == int.from_bytes(hashlib.sha256(b"a").digest()[:4], "little")
    assert [tensor_id(n) for n in ("a", "model.embed_tokens.weight")] == GOLDEN_IDS


def test_tied_tensors_are_one_entry_with_two_sites():
    _, model = make("opt-tied")
    view = ParamView.of_model(model)
    assert [a for _, a in view["model.decoder.embed_tokens.weight"].sites] == ["weight", "weight"]
    assert "lm_head.weight" not in view.entries
    _, untied = make("opt-untied")
    assert "lm_head.weight" in ParamView.of_model(untied).entries


def test_refusals():
    _, model = make("opt-tied")
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to tune"):
        ParamView.of_model(model)
    with pytest.raises(ValueError, match="no elements"):
        ParamView.of_tensors([torch.empty(0)])

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.ParameterDict({"w": nn.Parameter(torch.ones(1))})
            self.w = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match="both called 'w'"):
        ParamView.of_model(Twice())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (7,), (5, 9), (3, 2, 11)])
def test_general_update_path_equals_the_fused_one(dtype, shape, monkeypatch):
    """A direction that only knows `accumulate` moves the weights exactly as a fused dense one."""
    from smidgen import params

    monkeypatch.setattr(params, "_BLOCK", 10)
    start = torch.sin(torch.arange(max(1, torch.Size(shape).numel()), dtype=torch.float32)).view(shape).to(dtype)
    ends = []
    for general in (False, True):
        weight = start.clone()
        view = ParamView.of_tensors([weight])
        z = [Dense(3, 1, q, view.ids) for q in range(2)]
        directions = [Plain(d) for d in z] if general else z
        view.apply_([(directions[0], 1e-2), (directions[1], -3e-3)], decay=0.9, at=AT)
        assert view["0"].version == 1
        ends.append(weight)
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], start)


class Plain:
    """A direction without a fused path."""

    support = None

    def __init__(self, dense):
        self.dense = dense

    def accumulate(self, name, rows, out32, scale):
        self.dense.accumulate(name, rows, out32, scale)


def test_writers_round_alike_and_rows_are_independent():
    weight = torch.linspace(-1, 1, 60).view(6, 10).bfloat16()
    value = torch.linspace(-1, 1, 60).view(6, 10) + 1e-3
    whole, parts = weight.clone(), weight.clone()
    ParamView.of_tensors([whole]).write_("0", value, at=AT)
    view = ParamView.of_tensors([parts])
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        view.write_("0", value[rows], rows=rows, at=AT)
    assert torch.equal(whole, parts)
    edited = weight.clone()
    ParamView.of_tensors([edited]).edit_("0", lambda w: w.copy_(value), at=AT)
    assert torch.equal(whole, edited)


def test_updates_below_half_an_ulp_are_not_lost_on_average():
    weight = torch.ones(4096, dtype=torch.bfloat16)
    view = ParamView.of_tensors([weight])
    for step in range(200):
        view.edit_("0", lambda w: w.add_(1e-4), at=noise.Address(1, 0, step, 0, noise.ROUND))
    assert abs(float(weight.float().mean()) - 1.02) < 1.5e-3
    nearest = torch.ones(4096, dtype=torch.bfloat16)
    view = ParamView.of_tensors([nearest])
    for step in range(200):
        view.edit_("0", lambda w: w.add_(1e-4), at=noise.Address(1, 0, step, 0, noise.ROUND), rounding="nearest")
    assert torch.equal(nearest, torch.ones(4096, dtype=torch.bfloat16))


def test_non_contiguous_storage_is_served():
    base = torch.linspace(-1, 1, 24).view(4, 6)
    strided = base.clone().t().contiguous().t()
    assert not strided.is_contiguous()
    plain = base.clone()
    for tensor in (strided, plain):
        view = ParamView.of_tensors([tensor])
        view.apply_([(Dense(3, 1, 0, view.ids), 1e-2)], at=AT)
    assert torch.equal(strided, plain)
