"""Deep prompts: where they start, what each layer sees, layer-wise search with the layers below at rest, save and load."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES, batch, make
from smidgen.adapt import deep_prompt, prompt
from smidgen.batched import BatchedEngine
from smidgen.config import ConfigError
from smidgen.objective import ModelObjective
from smidgen.optim.cma_es import CMAES
from smidgen.probing import Engine

CARRIERS = [f for f, (kind, _) in FAMILIES.items() if kind != "seq2seq" and f != "gpt2-classification"]


def built(family, **options):
    kind, model = make(family)
    return kind, model, deep_prompt.build(model, deep_prompt.Config(**{"tokens": 3, **options}), seed=2)


def moved(adapted, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    for entry in adapted.view:
        entry.storage.add_(scale * torch.randn(entry.tensor.shape, generator=generator))


@pytest.mark.parametrize("family", CARRIERS)
def test_it_starts_as_a_prompt_and_moves_what_enters_a_layer(family):
    kind, model, adapted = built(family)
    data = batch(kind, seed=10)
    _, other = make(family)
    plain = prompt.build(other, prompt.Config(tokens=3), seed=2)
    losses = [Engine(a.model, a.view, kind).losses(data).nll for a in (adapted, plain)]
    assert torch.equal(*losses) and len(adapted.view) == 2
    moved(adapted)
    seen, (layer,) = [], [m for m in model.modules() if hasattr(m, "deep_prompt")]
    layer.register_forward_pre_hook(lambda _, a, g: seen.append((a or (g["hidden_states"],))[0].clone()), with_kwargs=True)
    values = layer.deep_prompt.weight.detach().clone()
    layer.deep_prompt.weight.data.zero_()
    engine = Engine(adapted.model, adapted.view, kind)
    engine.prepare(data)
    seen.clear()
    engine.losses(data)
    layer.deep_prompt.weight.data.copy_(values)
    changed = engine.losses(data).nll
    before, after = seen
    assert torch.equal(after[:, :3], before[:, :3] + values) and torch.equal(after[:, 3:], before[:, 3:])
    assert bool(changed.isfinite().all()) and not torch.equal(changed, losses[0])


@pytest.mark.parametrize("family", ["roberta-masked", "llama-tied"])
def test_layers_are_searched_in_turn_above_layers_at_rest(family, caplog):
    """Fitness in one forward with the prefix cache equals one candidate at a time."""
    ends = []
    for engine in (BatchedEngine, Engine):
        kind, _, adapted = built(family)
        made = engine(adapted.model, adapted.view, kind)
        opt = CMAES(adapted.view, dimension=20, population=6, init="hidden", lr=0.3)
        assert ["deep_prompt" in block[0] for block in opt.blocks] == [False, True]
        objective = [ModelObjective(made, [batch(kind, seed=10)]) for _ in range(4)]
        first = float(objective[0].losses([()])[0])
        for each in objective:
            opt.step(each)
        ends.append(torch.tensor([told[2][0] for told in opt.told]))
        assert float(objective[0].losses([()])[0]) < first
        if engine is BatchedEngine:
            assert made.reuse.skipped > 0
    assert torch.allclose(*ends, atol=1e-5) and not [r for r in caplog.records if "one at a time" in r.getMessage()]


def test_generation_sees_the_prompts_once_with_a_cache_and_without():
    _, _, adapted = built("llama-tied")
    moved(adapted)
    ids = torch.tensor([[5, 17, 33, 20, 9]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        cached = adapted.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, -4:]
        for _ in range(4):
            logits = adapted.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, ids[0, -4:])


def test_saved_tensors_come_back_and_encoder_decoders_are_refused(tmp_path):
    _, _, adapted = built("roberta-masked")
    moved(adapted)
    adapted.save(tmp_path)
    _, _, other = built("roberta-masked")
    other.load(tmp_path)
    assert all(torch.equal(e.storage, other.view[e.name].storage) for e in adapted.view)
    with pytest.raises(ConfigError, match="two stacks of layers, deep_prompt is for models with one"):
        built("t5-tied")
    with pytest.raises(ConfigError, match="cannot be merged"):
        adapted.merged()
