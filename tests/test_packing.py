"""Packing: rows of a pack do not see each other; where a model cannot keep them apart, it is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from families import VOCAB, make
from smidgen.collate import Collator
from smidgen.config import ConfigError
from smidgen.encode import Encoded
from smidgen.objective import ModelObjective
from smidgen.packing import Packs, kept_apart, pack
from smidgen.params import ParamView
from smidgen.probing import Engine

LENGTHS = (13, 5, 9, 2, 7, 16, 3)


def rows(lengths=LENGTHS, limit: int = 16) -> Encoded:
    found = Encoded("causal", limit)
    generator = torch.Generator().manual_seed(0)
    for index, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        found._add(index, 0, input_ids=ids, labels=[-100, *ids[1:]])
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_every_row_is_in_one_pack_that_has_room(lengths):
    packs = pack(lengths, 20)
    assert sorted(row for members in packs for row in members) == list(range(len(lengths)))
    sizes = [sum(lengths[row] for row in members) for members in packs]
    assert max(sizes) <= 20 and packs == pack(lengths, 20)
    assert len(packs) == 1 or min(a + b for i, a in enumerate(sizes) for b in sizes[:i]) > 20  # no two would fit in one


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "opt-untied", "gpt-neo", "gemma2", "mistral"])
def test_the_packed_loss_and_its_gradient_are_those_of_the_rows(family):
    _, model = make(family)
    encoded, plain = rows(), Collator(0, "causal", position_ids=True)
    packs = Packs(encoded)
    assert len(packs) == 4  # 55 tokens in packs of 16
    view = ParamView.of_model(model)
    apart = kept_apart(packs, plain, model, view)
    assert apart.apart == ("positions" if family == "mistral" else "mask")  # a mask of ours would undo its sliding window
    engine = Engine(model, view, "causal")
    alone = [plain([row]) for row in encoded]
    both = [ModelObjective(engine, alone), ModelObjective(engine, [apart(packs[0:2]), apart(packs[2:4])])]
    losses = [objective.losses([()]).item() for objective in both]
    assert abs(losses[0] - losses[1]) < 2e-6  # float32 sums of 55 labels in another order
    found = []
    for objective in both:
        model.zero_grad()
        objective.backward(dropout=False)
        found.append(torch.cat([e.tensor.grad.flatten() for e in view]))
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[0].abs().max()


def test_rows_that_see_each_other_change_the_loss():
    """The comparison can fail: with the mask of an ordinary row the loss is another one."""
    _, model = make("llama-tied")
    engine = Engine(model, ParamView.of_model(model), "causal")
    packs = Packs(rows())
    batch = kept_apart(packs, Collator(0, "causal"), model, engine.view)([packs[0]])
    leaking = {**batch, "attention_mask": batch["real"], "position_ids": torch.arange(batch["real"].shape[1])[None]}
    assert (engine.losses(batch).nll - engine.losses(leaking).nll).abs().max() > 1e-3


@pytest.mark.parametrize("which", ["bloom", "mamba"])
def test_models_that_cannot_keep_rows_apart_are_refused(which):
    sizes = {"vocab_size": VOCAB, "hidden_size": 24}
    with torch.random.fork_rng():
        if which == "bloom":  # its distances come from a mask of rows
            model = tf.BloomForCausalLM(tf.BloomConfig(**sizes, n_layer=2, n_head=4, initializer_range=0.2))
        else:  # its state runs on
            model = tf.MambaForCausalLM(tf.MambaConfig(**sizes, num_hidden_layers=2, state_size=4))
    packs = Packs(rows())
    with pytest.raises(ConfigError, match=r"rows of a pack see each other in this model .*: leave packing out"):
        kept_apart(packs, Collator(0, "causal"), model.eval(), ParamView.of_model(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_get_a_mask_of_their_dtype(dtype):
    _, model = make("llama-untied", dtype)
    packs = Packs(rows())
    apart = kept_apart(packs, Collator(0, "causal"), model, ParamView.of_model(model))
    assert apart(packs[:2])["attention_mask"].dtype == dtype
    assert dataclasses.replace(apart, apart="positions")(packs[:2]).keys() == {"input_ids", "labels", "real", "position_ids"}
