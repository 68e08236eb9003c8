"""Sums of squared inputs of linear layers: against a plain forward, padding left out, however the data is cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from families import batch, make
from smidgen.inputs import input_squares
from smidgen.objective import ClosureObjective, ModelObjective, Recorded, Replayed
from smidgen.params import ParamView
from smidgen.probing import Engine


def prepared(family):
    kind, model = make(family)
    view = ParamView.of_model(model)
    return kind, model, view, Engine(model, view, kind)


def by_hand(model, name, data):
    """The same from a plain forward of each row without its padding."""
    module = model.get_submodule(name.removesuffix(".weight"))
    total = 0

    def hook(_, inputs):
        nonlocal total
        total = total + inputs[0].double().flatten(0, -2).square().sum(0)

    handle = module.register_forward_pre_hook(hook)
    with torch.no_grad():
        for ids, mask in zip(data["input_ids"], data["attention_mask"].bool(), strict=True):
            places = {"position_ids": mask.nonzero().T} if model.config.model_type == "gpt2" else {}  # it counts padding
            model(input_ids=ids[mask][None], **places)
    handle.remove()
    return total


@pytest.mark.parametrize("family", ["opt-untied", "llama-untied", "gpt2", "qwen3", "bert-classification", "roberta-masked"])
def test_sums_are_those_of_a_plain_forward_without_padding(family):
    kind, model, view, engine = prepared(family)
    data = batch(kind)
    found = input_squares(engine, [data], [e.name for e in view if e.tensor.ndim == 2])
    head = None if kind == "classification" else model.get_output_embeddings()
    linear = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    assert set(found) == {f"{n}.weight" for n in linear}
    for name, squares in found.items():
        conv = isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)
        assert squares.shape == ((view[name].tensor.shape[0], 1) if conv else (1, view[name].tensor.shape[1]))
        assert squares.dtype == torch.float64
        if "classifier" not in name and "pooler" not in name and "score" not in name:
            assert torch.allclose(squares.flatten(), by_hand(model, name, data), rtol=1e-4), name


@pytest.mark.parametrize("family", ["opt-tied", "t5-tied", "t5-untied", "mixtral", "gemma2"])
def test_micro_batches_add_up_and_theta_stays(family):
    kind, _, view, engine = prepared(family)
    names, before = [e.name for e in view if e.tensor.ndim == 2], view.snapshot()
    one, two = batch(kind, seed=1), batch(kind, seed=2)
    both = input_squares(engine, [one, two], names)
    parts = [input_squares(engine, [data], names) for data in (one, two)]
    assert both and engine.forwards == 4
    for name, squares in both.items():
        assert torch.equal(squares, parts[0][name] + parts[1][name])
    assert all(torch.equal(e.storage, before[e.name]) for e in view)
    assert not any("embed_tokens" in name or name in ("shared.weight", "lm_head.weight") for name in both)


def test_hooks_are_gone_also_when_the_forward_raises():
    kind, model, view, engine = prepared("opt-tied")
    engine.prepare(batch(kind))
    broken = {**batch(kind), "input_ids": torch.full((3, 9), 10**6)}
    with pytest.raises(IndexError):
        input_squares(engine, [broken], [e.name for e in view])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_transcript_tells_what_was_found_and_what_was_not():
    kind, _, view, engine = prepared("opt-tied")
    names = [e.name for e in view if e.tensor.ndim == 2]
    recorded = Recorded(ModelObjective(engine, [batch(kind)]))
    live = recorded.input_squares(names)
    recorded.losses([()])
    replayed = Replayed(recorded.values)
    again = replayed.input_squares(names)
    replayed.losses([()])
    assert replayed.done() and replayed.forwards == 2
    assert set(live) == set(again) < set(names)
    assert all(torch.equal(live[n], again[n]) for n in live)


def test_what_has_no_layers_says_so():
    view = ParamView.of_tensors([torch.ones(2)])
    with pytest.raises(ValueError, match="closure"):
        ClosureObjective(lambda: 0.0, view).input_squares(["0"])
