"""The rest of the conformance checks of derivative-free LoRA: fitness three ways, scores at each row's last token, budgets.

Merged equals unmerged, targets of the strategies and the same seed: tests/optim/test_cma_es.py, test_fireworks.py and the
contract suite; deviations of the maps: test_space.py; label words of one token: test_encode.py.
"""

from __future__ import annotations

import pytest
import torch

from families import batch, make
from smidgen.adapt import dfo_lora
from smidgen.batched import BatchedEngine
from smidgen.collate import Collator
from smidgen.objective import ModelObjective, Recorded
from smidgen.optim.cma_es import CMAES
from smidgen.probing import Engine

WORDS = torch.tensor([5, 9])


def few_shot(kind):
    """Six rows of lengths 4 to 9 with one label word each: the last token of a causal row, the fourth of a masked one."""
    rows = []
    for i in range(6):
        ids = batch(kind, rows=1, length=4 + i, seed=20 + i)["input_ids"][0].clamp(min=3).tolist()
        at = 3 if kind == "masked" else len(ids) - 1
        labels = [-100] * len(ids)
        labels[at] = int(WORDS[i % 2])
        rows.append({"input_ids": ids, "labels": labels})
    return rows, {**Collator(0, kind, position_ids=True)(rows), "choices": WORDS}


@pytest.mark.parametrize("family", ["roberta-masked", "gpt2", "llama-tied"])
def test_fitness_of_a_population_and_behind_the_prefix_cache_is_that_of_one_candidate(family):
    fitness = []
    for engine, every in ((BatchedEngine, 1), (BatchedEngine, 0), (Engine, 0)):
        kind, model = make(family)
        adapted = dfo_lora.build(model, dfo_lora.Config())
        made = engine(adapted.model, adapted.view, kind)
        made.reuse.every = every
        opt = CMAES(adapted.view, dimension=40, population=5, init="hidden", incumbent="mean")
        told = []
        for _ in range(4):
            recorded = Recorded(ModelObjective(made, [few_shot(kind)[1]]))
            opt.step(recorded)
            told += recorded.values[-5:]
        assert (made.reuse.skipped > 0) == bool(every)
        fitness.append(torch.tensor(told))
    assert torch.allclose(fitness[0], fitness[1], rtol=0, atol=1e-5)
    assert torch.allclose(fitness[0], fitness[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt-neo", "llama-tied", "roberta-masked"])
def test_rows_of_any_length_are_scored_at_their_own_place(family):
    """Fitness of a padded batch against stock forwards of the merged model, row by row, without padding."""
    kind, model = make(family)
    adapted = dfo_lora.build(model, dfo_lora.Config())
    rows, data = few_shot(kind)
    for entry in adapted.view:
        entry.storage.normal_(0, 0.3, generator=torch.Generator().manual_seed(entry.id % 1000))
    found = float(BatchedEngine(adapted.model, adapted.view, kind).losses(data).nll.double().mean())
    plain, losses = adapted.merged(), []
    for row in rows:
        at = next(i for i, label in enumerate(row["labels"]) if label >= 0)
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([row["input_ids"]])).logits[0, at - (kind == "causal")]
        gold = WORDS.tolist().index(row["labels"][at])
        losses.append(torch.nn.functional.cross_entropy(logits[WORDS], torch.tensor(gold)))
    assert found == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


@pytest.mark.parametrize("init", ["random", "hidden"])
def test_a_budget_is_what_the_engine_counts(init):
    kind, model = make("roberta-masked")
    adapted = dfo_lora.build(model, dfo_lora.Config())
    engine = BatchedEngine(adapted.model, adapted.view, kind)
    opt = CMAES(adapted.view, dimension=40, population=6, budget=24, init=init)
    for _ in range(opt.config.steps):
        opt.step(ModelObjective(engine, [few_shot(kind)[1]]))
    assert engine.forwards == 24 + (init == "hidden")  # the maps' statistics are a forward of their own
