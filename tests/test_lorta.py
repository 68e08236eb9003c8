"""LoRTA: one tensor beside all attention matrices, its weights, its gradients, merged, and searched without any."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES, batch, make
from smidgen.adapt import lorta
from smidgen.config import ConfigError
from smidgen.objective import ModelObjective
from smidgen.optim.adamw import AdamW
from smidgen.optim.cma_es import CMAES
from smidgen.probing import Engine

ROLES = {"query", "key", "value"}


def built(family, **options):
    kind, model = make(family)
    if family == "qwen3":  # its heads are wider than the hidden state
        options.setdefault("matrices", ("query", "key", "value"))
    if family == "gemma2":
        options.setdefault("matrices", ("query", "key", "value"))
    return kind, lorta.build(model, lorta.Config(**options), seed=1)


def logits(model, kind):
    data = batch(kind, seed=10)
    inputs = {k: v for k, v in data.items() if k != "labels"} | (
        {"decoder_input_ids": data["labels"].clamp(min=0)} if kind == "seq2seq" else {}
    )
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensor_by_its_definition_and_merged(family):
    """dW[i, o, h, q, l] summed by hand equals what each module adds; merged gives the same logits."""
    kind, adapted = built(family, rank=3, alpha=6.0)
    plain = logits(make(family)[1], kind)
    assert torch.allclose(logits(adapted.model, kind), plain, atol=1e-5)  # B = 0
    generator = torch.Generator().manual_seed(0)
    for entry in adapted.view:
        entry.storage.add_(0.3 * torch.randn(entry.tensor.shape, generator=generator))
    A, B, H, M, L = (
        next(e.storage for e in adapted.view if e.name.endswith(f".lorta.{n}"))
        for n in ("input", "output", "head", "matrix", "layer")
    )
    whole = 2.0 * torch.einsum("ik,ok,hk,qk,lk->lqhoi", A, B, H, M, L)
    assert len(adapted.view) == 5 and adapted.view.numel() == 3 * (len(A) + len(B) + len(H) + len(M) + len(L))
    for path in adapted._paths:
        delta = adapted.model.get_submodule(path).lorta
        parts = [torch.zeros(c * len(B), len(A)) if q is None else whole[delta.at, q, :c].flatten(0, 1) for q, c in delta.spans]
        assert torch.allclose(delta.weight(), torch.cat(parts), atol=1e-5)
    mine = logits(adapted.model, kind)
    assert float((mine - plain).abs().max()) > 1e-3
    merged = adapted.merged()
    assert torch.allclose(logits(merged, kind), mine, atol=2e-4)
    assert not any("lorta" in name for name, _ in merged.named_parameters())


def test_first_order_and_search(tmp_path):
    for method in (lambda v: AdamW(v, lr=3e-2), lambda v: CMAES(v, lr=0.3, order="all", population=10, init="random")):
        kind, adapted = built("llama-tied")
        view, opt = adapted.view, method(adapted.view)
        objective = ModelObjective(Engine(adapted.model, view, kind), [batch(kind, seed=10)])
        before = float(objective.losses([()])[0])
        for _ in range(12):
            opt.step(objective)
            opt.zero_grad()
        assert float(objective.losses([()])[0]) < before - 0.01
        adapted.save(tmp_path)
        _, other = built("llama-tied")
        other.load(tmp_path)
        assert all(torch.equal(view[name].storage, other.view[name].storage) for name in view.entries)


def test_what_does_not_fit():
    with pytest.raises(ConfigError, match=r"takes 32 inputs and has heads of 8.*leave some out with scheme_args.matrices"):
        lorta.build(make("qwen3")[1], lorta.Config())
    with pytest.raises(ConfigError, match=r"'mlp' has no attention projections.*called like 'model.layers.0.self_attn'"):
        lorta.build(make("llama-tied")[1], lorta.Config(pattern="mlp"))
    with pytest.raises(ConfigError, match="names a matrix twice"):
        lorta.build(make("llama-tied")[1], lorta.Config(matrices=("query", "query")))
