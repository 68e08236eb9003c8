"""Evaluation: batched equals one by one, at any batch size; metrics; generation."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES, make
from smidgen.collate import Collator
from smidgen.encode import Encoded
from smidgen.evaluate import Evaluation
from smidgen.models import wants_position_ids
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.tasks._labelled import accuracy


def metric(predictions, golds):
    return {"accuracy": accuracy(predictions, golds)}


CAUSAL = ["opt-tied", "llama-untied", "gpt2", "gpt-neo", "qwen3", "gemma2"]


def rows_of(lengths, kind, choices=None):
    """Rows of random tokens whose last token is the label (the fourth for masked models)."""
    generator = torch.Generator().manual_seed(4)
    rows = Encoded(kind, 64)
    rows.choices = choices
    for i, n in enumerate(lengths):
        ids = torch.randint(3, 97, (n,), generator=generator).tolist()
        labels = [-100] * n
        place = -1 if kind == "causal" else 3
        labels[place] = choices[i % len(choices)] if choices else ids[place]
        rows._add(i, 0, input_ids=ids, labels=labels)
    return rows


def engine_of(family):
    kind, model = make(family)
    engine = Engine(model, ParamView.of_model(model), kind)
    return engine, Collator(0, kind, position_ids=wants_position_ids(model))


@pytest.mark.parametrize("family", [*CAUSAL, "bert-masked", "roberta-masked"])
def test_choices_batched_equal_one_by_one(family):
    engine, plain = engine_of(family)
    choices = (7, 11, 30)
    lengths = [9, 4, 16, 5, 12, 7, 20]
    rows = rows_of(lengths, FAMILIES[family][0], choices)
    collator = Collator(plain.pad_id, plain.kind, choices, plain.position_ids)
    golds = [i % 3 for i in range(len(lengths))]
    engine.check_batch(collator(rows[:2]))
    found = []
    for size in (1, 3, 100):
        measured = Evaluation(rows, collator, size, golds, [frozenset({g}) for g in golds], metric)
        found.append((measured.predictions(engine), measured(engine)))
    assert found[0][0] == found[1][0] == found[2][0]
    assert len({round(f["loss"], 5) for _, f in found}) == 1
    want = sum(p == g for p, g in zip(found[0][0], golds, strict=True)) / len(golds)
    assert found[0][1]["accuracy"] == want


def test_loss_is_weighted_by_label_tokens():
    engine, collator = engine_of("llama-tied")
    rows = Encoded("causal", 64)
    ids = list(range(3, 23))
    rows._add(0, 0, input_ids=ids, labels=[-100] * 18 + ids[18:])
    rows._add(1, 0, input_ids=ids[::-1], labels=ids[::-1])
    engine.check_batch(collator(rows[:2]))
    every = torch.cat([engine.losses(collator([rows[i]])).nll for i in range(2)])
    for size in (1, 2):
        measured = Evaluation(rows, collator, size)(engine)
        assert measured == {"loss": pytest.approx(float(every.mean()), abs=1e-5)}
