"""TinyLoRA: its change by definition, merged, PEFT's files, a covariance over 13 numbers, and what does not fit."""

from __future__ import annotations

import pytest
import torch

from families import batch, make
from smidgen.adapt import tinylora
from smidgen.config import ConfigError
from smidgen.objective import ModelObjective
from smidgen.optim.cma_es import CMAES
from smidgen.probing import Engine


def built(family, seed=3, **options):
    kind, model = make(family)
    return kind, tinylora.build(model, tinylora.Config(**{"numbers": 13, **options}), seed=seed)


def logits(model, kind):
    data = batch(kind, seed=10)
    with torch.no_grad():
        return model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits


@pytest.mark.parametrize("family", ["llama-untied", "gpt2", "roberta-masked"])
def test_the_change_by_its_definition_and_merged(family):
    kind, adapted = built(family)
    plain = make(family)[1]
    assert adapted.view.numel() == 13 and torch.allclose(logits(adapted.model, kind), logits(plain, kind), atol=1e-6)
    (entry,) = adapted.view
    entry.storage.copy_(torch.linspace(-2, 2, 13))
    mine, merged = logits(adapted.model, kind), adapted.merged()
    assert torch.allclose(mine, logits(merged, kind), atol=1e-4) and not torch.allclose(mine, logits(plain, kind), atol=1e-2)
    layers = [m for m in adapted.model.modules() if hasattr(m, "tinylora_P")]
    assert len(layers) == sum(isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D" for m in layers) > 4
    layer, stored = layers[0], merged.state_dict()
    P, A, B = (getattr(layer, f"tinylora_{part}")["default"] for part in "PAB")
    assert P.shape == (13, 2, 2)
    weight = layer.get_base_layer().weight.T if family == "gpt2" else layer.get_base_layer().weight
    U, S, V = torch.linalg.svd(weight.detach())
    assert torch.allclose(B @ A, (U[:, :2] * S[:2]) @ V[:2], atol=1e-5)
    expected = weight + B @ torch.einsum("i,ijk->jk", entry.storage, P) @ A
    assert any(w.shape == expected.T.shape and torch.allclose(w, expected.T, atol=1e-5) for w in stored.values()) or any(
        w.shape == expected.shape and torch.allclose(w, expected, atol=1e-5) for w in stored.values()
    )


def test_a_covariance_over_thirteen_numbers_lowers_the_loss_and_the_file_is_pefts(tmp_path):
    import peft

    kind, adapted = built("llama-tied")
    opt = CMAES(adapted.view, lr=2.0, order="all", covariance="full", population=8)
    objective = ModelObjective(Engine(adapted.model, adapted.view, kind), [batch(kind, seed=10)])
    assert opt.dims == [13]
    before = float(objective.losses([()])[0])
    for _ in range(20):
        opt.step(objective)
    assert float(objective.losses([()])[0]) < before - 0.02
    adapted.save(tmp_path)
    again = peft.PeftModel.from_pretrained(make("llama-tied")[1], str(tmp_path))
    assert torch.allclose(logits(again, kind), logits(adapted.model, kind), atol=1e-5)


def test_groups_share_and_what_does_not_fit():
    _, adapted = built("llama-tied", numbers=12, groups=2)
    assert [e.tensor.numel() for e in adapted.view] == [6, 6] and CMAES(adapted.view, population=4).dims == [12]
    for options, message in [
        ({"groups": 2}, "groups = 2 does not divide 13 numbers"),
        ({"pattern": "convolution"}, "is found in none of the 14 linear modules"),
        ({"pattern": "("}, "not a regular expression"),
    ]:
        with pytest.raises(ConfigError, match=message):
            built("llama-tied", **options)
    states = [built("llama-tied", seed=s)[1].model.state_dict() for s in (1, 1, 2)]
    name = next(n for n in states[0] if "tinylora_P" in n)
    assert torch.equal(states[0][name], states[1][name]) and not torch.equal(states[0][name], states[2][name])
