"""Generated answers: batches equal one by one on every family, an answer ends with its line, theta + probe is what answers."""

from __future__ import annotations

import pytest
import torch

import families
import texts
from smidgen.directions import Dense, displace
from smidgen.encode import encode_prompts
from smidgen.generation import Answerer, answer_all, generate
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.tasks import Example
from test_scoring import CAUSAL, small_tokenizer

WORDS = texts.WORDS.replace(":", "").split()
PROMPTS = [Example(" ".join(WORDS[i : i + n]), "") for i, n in enumerate((3, 9, 5, 12, 1, 7))]


def engine_of(family):
    kind, model = families.make(family)
    return Engine(model, ParamView.of_model(model), kind)


def probe_of(engine, scale=0.3):
    return ((Dense(7, 0, 0, engine.view.ids, "gaussian"), scale),)


@pytest.mark.parametrize("family", [*CAUSAL, "t5-tied"])
def test_batches_answer_as_one_by_one_at_theta_and_at_a_probe(family):
    engine, tokenizer = engine_of(family), small_tokenizer()
    answerer = Answerer(tokenizer, engine.kind, max_new_tokens=8)
    rows = encode_prompts(PROMPTS, tokenizer, engine.kind)
    found = []
    for probe in ((), probe_of(engine)):
        found.append(answer_all(engine, answerer, rows, 1, probe))
        assert answer_all(engine, answerer, rows, 4, probe) == found[-1]
    assert found[0] != found[1] and any(found[0] + found[1])


@pytest.mark.parametrize("family", ["opt-tied", "llama-untied", "gpt2"])
def test_answers_at_a_probe_are_those_of_displaced_weights(family):
    engine, tokenizer = engine_of(family), small_tokenizer()
    engine.model.train()
    before = engine.view.snapshot()
    probed = generate(engine, tokenizer, PROMPTS, max_new_tokens=8, probe=probe_of(engine))
    assert engine.model.training and all(torch.equal(e.storage, before[e.name]) for e in engine.view)
    for e in engine.view:
        displace(probe_of(engine), e.name, before[e.name], e.storage)
    assert generate(engine, tokenizer, PROMPTS, max_new_tokens=8) == probed


def test_an_answer_ends_with_its_line(monkeypatch):
    engine, tokenizer = engine_of("llama-tied"), texts.byte_tokenizer(bos=True)
    answerer = Answerer(tokenizer, "causal")
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ends = answerer._line_ends
    assert set(newline) <= set(ends) and all("\n" in tokenizer.decode([i]) for i in ends)
    said = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" a story\nLabel:", "\n good", "  fine  ")]
    width = max(map(len, said))
    asked = {}

    def generated(input_ids, **options):
        asked.update(options)
        tail = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in said])
        return torch.cat([input_ids, tail], dim=1)

    monkeypatch.setattr(engine.model, "generate", generated, raising=False)
    monkeypatch.setattr(engine, "prepare", lambda batch: None)
    batch = {"input_ids": torch.ones(3, 2, dtype=torch.int64), "attention_mask": torch.ones(3, 2, dtype=torch.int64)}
    assert answerer(engine, batch) == ["a story", "", "fine"]
    assert asked["max_new_tokens"] == 50 and not asked["do_sample"]
    assert asked["eos_token_id"] == sorted({tokenizer.eos_token_id, engine.model.generation_config.eos_token_id or 2, *ends})
    whole = Answerer(tokenizer, "causal", max_new_tokens=5, whole_text=True)
    assert whole(engine, batch) == [" a story\nLabel:", "\n good", "  fine  "] and not set(ends) & set(asked["eos_token_id"])
