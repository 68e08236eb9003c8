"""Every model family runs every method: three steps of a tiny model of each, over all tuned tensors.

Methods are listed at run time. What a step computes is the contract suite's matter; here the families' own modules
(rotary and learned positions, shared heads, grouped keys, encoders with decoders) meet each method's objective.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math

import pytest
import torch
import transformers

import families
from families import batch, make
from smidgen import models, optim
from smidgen.chat import as_turn
from smidgen.collate import Collator
from smidgen.directions import Dense
from smidgen.encode import encode
from smidgen.objective import ModelObjective
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.tasks import Example

FAMILIES = {  # those of the studies, and others that users have; by their name in tests/families.py
    "roberta": "roberta-masked",
    "opt": "opt-tied",
    "llama": "llama-untied",
    "mistral": "mistral",
    "qwen3": "qwen3",
    "gpt2": "gpt2",
    "gpt-neo": "gpt-neo",
    "t5": "t5-tied",
}


def steps(method, kind, model, data, count=3):
    """Run some steps; the method's optimizer, the engine and what the weights were before."""
    module = optim.get(method)
    view = ParamView.of_model(model)
    engine = Engine(model, view, kind)
    opt = module.build(view, module.Config(lr=1e-2))
    before = view.snapshot()
    dropout = torch.random.fork_rng(devices=[]) if "backward" in module.build.uses else contextlib.nullcontext()
    with dropout:  # which back-propagation draws from torch's generator
        for _ in range(count):
            loss = opt.step(ModelObjective(engine, [data]))
            assert math.isfinite(loss) and opt.outcome.written
    return opt, engine, before


def check(method, kind, model, data):
    opt, engine, before = steps(method, kind, model, data)
    view = opt.view
    assert any(not torch.equal(entry.storage, before[entry.name]) for entry in view), "no weight moved"
    assert all(torch.isfinite(entry.storage).all() for entry in view)
    after = view.snapshot()
    probe = [(Dense(1, 2, 3, view.ids), 1e-2)]
    losses = ModelObjective(engine, [data]).losses([(), probe, opt.offset()])
    assert torch.isfinite(losses).all() and losses[0] != losses[1]
    assert all(torch.equal(entry.storage, after[entry.name]) for entry in view), "evaluation wrote into the weights"
    assert set(view.entries) == set(before) and not model.training


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def vicuna():
    """A tiny LLaMA with rows in Vicuna's form of a conversation: (model, batch)."""
    tokenizer = models.load_tokenizer("embedded")
    asked = [Example("Is it good?", " Yes", options=(" Yes", " No"), gold=0), Example("Is it?", " No")]
    rows = encode(as_turn(asked, "vicuna"), tokenizer, "causal", 256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = families._LLAMA | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    return model, Collator(tokenizer.pad_token_id, "causal")([rows[i] for i in range(len(rows))])


@pytest.mark.parametrize("method", optim.names())
def test_vicuna_runs_every_method(method):
    model, data = vicuna()
    assert (data["labels"] != -100).any(1).all() and data["input_ids"].shape[1] > 30  # the system's sentence is there
    check(method, "causal", copy.deepcopy(model), data)


@pytest.mark.parametrize("method", optim.names())
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_every_method(family, method):
    kind, model = make(FAMILIES[family])
    check(method, kind, model, batch(kind))
