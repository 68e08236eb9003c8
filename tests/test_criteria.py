"""Hinge and negative accuracy over label words: by hand, batched and one at a time, in every kind of model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from families import batch, make
from smidgen.adapt import dfo_lora
from smidgen.batched import BatchedEngine
from smidgen.config import ConfigError, DataError
from smidgen.goal import prepare
from smidgen.loss import criterion_loss
from smidgen.objective import ModelObjective
from smidgen.probing import Engine
from smidgen.space import Space
from smidgen.tasks import Example
from texts import byte_tokenizer

LOGITS = torch.tensor([[1.0, 2.5, 0.0], [4.0, 1.0, 3.0], [0.0, math.nan, 1.0]])
RIGHT = torch.tensor([1, 0, 0])


def test_criteria_by_hand():
    hinge = criterion_loss(LOGITS, RIGHT, {"criterion": "hinge"})
    assert hinge[:2].tolist() == pytest.approx([0.5 + 0.0, 0.0 + 1.0]) and bool(hinge[2].isnan())
    accuracy = criterion_loss(LOGITS, torch.tensor([1, 2, 0]), {"criterion": "accuracy"})
    assert accuracy[:2].tolist() == [-1.0, 0.0] and bool(accuracy[2].isnan())
    assert torch.equal(
        criterion_loss(LOGITS[:2], RIGHT[:2], {}), torch.nn.functional.cross_entropy(LOGITS[:2], RIGHT[:2], reduction="none")
    )


@pytest.mark.parametrize("criterion", [None, "hinge", "accuracy"])
@pytest.mark.parametrize("family", ["roberta-masked", "gpt2", "gpt-neo", "llama-tied", "gemma2", "roberta-classification"])
def test_a_population_is_scored_as_one_candidate_is(family, criterion):
    kind, model = make(family)
    adapted = dfo_lora.build(model, dfo_lora.Config())
    view, model = adapted.view, adapted.model
    data = batch(kind, rows=6, seed=10)
    if kind != "classification":
        words = torch.tensor([5, 9, 11])
        spots = torch.zeros_like(data["labels"], dtype=torch.bool)
        spots[:, 3 if kind == "masked" else -1] = True
        data["labels"] = torch.full_like(data["labels"], -100)
        data["labels"][spots] = words[torch.arange(6) % 3]
        data["choices"] = words
    if criterion is not None:
        data["criterion"] = criterion
    slow, fast = Engine(model, view, kind), BatchedEngine(model, view, kind)
    space = Space(view, [n for n in view.entries if ".1." in n], seed=0, dimension=40)
    probes = [((z, 3.0),) for z in space.displacements(np.random.default_rng(0).standard_normal((5, 40)))]
    found = ModelObjective(fast, [data]).losses(probes)
    assert torch.allclose(found, ModelObjective(slow, [data]).losses(probes), atol=1e-4)
    logits = [fast.choice_scores(data, probe) for probe in probes]
    golds = torch.arange(6) % 3
    expected = [criterion_loss(scores, golds, data).double().mean() for scores in logits]
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)
    if criterion == "accuracy":
        assert all(-1.0 <= float(x) <= 0.0 and float(x) * 6 == pytest.approx(round(float(x) * 6)) for x in found)


def examples(words):
    return [Example(f"row {i} It was", words[i % 2], "", tuple(words), i % 2, (f"row {i}",)) for i in range(4)]


def test_label_words_of_several_tokens():
    arguments = {"name": "mine", "max_length": 32, "context": None, "position_ids": False, "scoring": "mean"}
    words = [" zyxwvut qq", " great"]
    with pytest.raises(DataError, match=r"objective hinge compares label words of one token.*'mine' has other options"):
        prepare("hinge", examples(words), byte_tokenizer(), "causal", **arguments)
    with pytest.raises((ConfigError, DataError), match=r"word|token"):
        prepare("choice", examples(words), byte_tokenizer(), "masked", **arguments)
