"""The last layer at labels only: the same losses, fewer products, all of them where labels are dense or modules tuned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from families import FAMILIES, batch, make
from smidgen.adapt import dfo_lora, lora, prompt
from smidgen.batched import BatchedEngine
from smidgen.last_layer import SHARE
from smidgen.objective import ModelObjective
from smidgen.optim.es import ES
from smidgen.probing import Engine
from smidgen.space import Space

MASKED = [f for f, (kind, _) in FAMILIES.items() if kind in ("causal", "masked")]


def few_labels(kind, rows=4, length=12):
    data = batch(kind, rows=rows, length=length, seed=10)
    at = 3 if kind == "masked" else length - 1
    gold = data["labels"][:, at].clamp(min=5)
    data["labels"] = torch.full_like(data["labels"], -100)
    data["labels"][:, at] = gold
    return data


def probes(view, count=3):
    import numpy as np

    space = Space(view, list(view.entries), seed=0, dimension=40)
    return [((z, 1.0),) for z in space.displacements(np.random.default_rng(0).standard_normal((count, space.d)))]


@pytest.mark.parametrize("scheme", [dfo_lora, prompt])
@pytest.mark.parametrize("family", MASKED)
def test_losses_are_those_of_the_whole_layer(family, scheme):
    kind, model = make(family)
    adapted = scheme.build(model, scheme.Config(), seed=1)
    fast, slow = (e(adapted.model, adapted.view, kind) for e in (BatchedEngine, Engine))
    for data in (few_labels(kind), batch(kind, seed=10)):
        found = ModelObjective(fast, [data]).losses(probes(adapted.view))
        assert torch.allclose(found, ModelObjective(slow, [data]).losses(probes(adapted.view)), atol=1e-5)
    if fast._reason is None and family not in ("mixtral",):
        assert fast._narrow


def test_products_are_left_out_where_labels_are_few(monkeypatch):
    kind, model = make("roberta-masked")
    adapted = dfo_lora.build(model, dfo_lora.Config())
    engine = BatchedEngine(adapted.model, adapted.view, kind)
    engine.together(few_labels(kind), probes(adapted.view))
    names = {id(m): n for n, m in adapted.model.named_modules()}
    found = sorted(names[id(m)].partition("layer.1.")[2] for m in engine._narrow)
    assert found == ["attention.output", "intermediate", "output"]
    sizes = []
    for module in engine._narrow:
        assert "forward" not in module.__dict__
    original = nn.Linear.forward

    def counting(self, x):
        if any(self is inner for module in engine._narrow for inner in module.modules()):
            sizes.append(x.numel() // x.shape[-1])
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    monkeypatch.setattr("smidgen.linear._forward", counting)
    engine.together(few_labels(kind), probes(adapted.view))
    assert sizes == [3 * 4] * 3
    sizes.clear()
    dense = batch(kind, rows=4, length=12, labels="all")
    assert SHARE * int((dense["labels"] >= 0).sum()) > dense["labels"].numel()
    engine.together(dense, probes(adapted.view))
    assert sizes == [3 * 4 * 12] * 3


def test_tuned_modules_run_in_full():
    kind, model = make("llama-tied")
    adapted = lora.build(model, lora.Config(target_modules=["q_proj", "down_proj"]), seed=0)
    engine = BatchedEngine(adapted.model, adapted.view, kind)
    opt = ES(adapted.view, lr=1e-2)
    opt.step(ModelObjective(engine, [few_labels(kind)]))
    owners = {id(owner) for reader in engine.readers for _, owner, _ in reader.tensors}
    assert engine._narrow and not owners & {id(m) for module in engine._narrow for m in module.modules()}
