"""Training on candidates: the loss of choosing the right option is what a hand computes, for values and gradients."""

from __future__ import annotations

import pytest
import torch

import families
import texts
from smidgen.collate import Collator
from smidgen.config import DataError
from smidgen.directions import Dense, displace
from smidgen.encode import encode
from smidgen.loss import group_nll
from smidgen.objective import ModelObjective
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.questions import Candidates, Prompts
from smidgen.tasks import Example
from test_scoring import CAUSAL, EXAMPLES, setting, small_tokenizer, story


def by_hand(model, candidates, scoring, kind="causal"):
    """Cross-entropy over option scores of each example, from full logits, one row at a time."""
    found = []
    for rows, gold in zip(candidates.rows, candidates.golds, strict=True):
        scores = []
        for k in rows:
            row = {key: torch.tensor([value]) for key, value in candidates.options[k].items()}
            logits = model(**row).logits[0].log_softmax(-1)
            labels = row["labels"][0]
            if kind == "causal":
                logits, labels = logits[:-1], labels[1:]
            kept = labels != -100
            each = logits[kept].gather(1, labels[kept][:, None])[:, 0]
            scores.append(each.mean() if scoring == "mean" else each.sum())
        found.append(-torch.stack(scores).log_softmax(0)[gold])
    return torch.stack(found)


@pytest.mark.parametrize("scoring", ["mean", "sum"])
@pytest.mark.parametrize("family", [*CAUSAL, "t5-tied"])
def test_the_loss_of_choosing_is_the_softmax_over_scores(family, scoring):
    engine, tokenizer, collator = setting(family, scoring)
    candidates = Candidates(EXAMPLES, tokenizer, engine.kind, 64)
    want = by_hand(engine.model, candidates, scoring, engine.kind).detach().double()
    objective = ModelObjective(engine, [collator(candidates[:1]), collator(candidates[1:])])
    each = objective.losses([()], each=True)
    assert each.shape == (1, 4) and (each[0] - want).abs().max() < 1e-5
    assert float(objective.losses([()])) == pytest.approx(float(want.mean()), abs=1e-5)  # weight: examples, not tokens


@pytest.mark.parametrize("family", ["opt-tied", "llama-untied", "gemma2", "t5-tied"])
def test_its_gradient_is_autograds_and_raises_the_right_score(family):
    engine, tokenizer, collator = setting(family)
    model = engine.model
    candidates = Candidates(EXAMPLES, tokenizer, engine.kind, 64)
    objective = ModelObjective(engine, [collator(candidates[:1]), collator(candidates[1:])])
    loss = objective.backward(dropout=False)
    found = {e.name: e.tensor.grad.clone() for e in engine.view}
    model.zero_grad()
    want = by_hand(model, candidates, "mean", engine.kind).mean()
    want.backward()
    assert loss == pytest.approx(want.item(), abs=1e-5)
    for e in engine.view:
        assert (found[e.name] - e.tensor.grad).abs().max() < 1e-5, e.name
    with torch.no_grad():
        for e in engine.view:
            e.tensor.sub_(1e-3 * found[e.name])
    assert float(objective.losses([()])) < loss


def test_its_slope_is_the_gradients_projection():
    """Forward mode against back-propagation, float32: 1e-4 of a sum over 10,000 weights."""
    engine, tokenizer, collator = setting("llama-tied")
    objective = ModelObjective(engine, [collator(Candidates(EXAMPLES, tokenizer, "causal", 64)[:])])
    z = Dense(3, 0, 0, engine.view.ids, "gaussian")
    loss, slope = objective.slope(z)
    assert objective.backward(dropout=False) == pytest.approx(loss, abs=1e-5)
    want = 0.0
    for e in engine.view:
        direction = torch.empty_like(e.tensor)
        displace(((z, 1.0),), e.name, torch.zeros_like(e.tensor), direction)
        want += float((direction * e.tensor.grad).sum())
    assert slope == pytest.approx(want, abs=1e-4)


def test_options_of_one_token_are_the_same_loss_in_one_forward():
    """Restricted to the words, a softmax over logits is one over log-likelihoods."""
    kind, model = families.make("llama-tied")
    tokenizer, words = small_tokenizer(), (" terrible", " great")
    examples = [story(n, words, n % 2) for n in (5, 9, 3)]
    rows, candidates = encode(examples, tokenizer, kind, 64), Candidates(examples, tokenizer, kind, 64)
    engine = Engine(model, ParamView.of_model(model), kind)
    once = ModelObjective(engine, [Collator(0, kind, rows.choices)(rows[:])]).losses([()], each=True)
    stacked = ModelObjective(engine, [Collator(0, kind)(candidates[:])]).losses([()], each=True)
    assert (once - stacked).abs().max() < 1e-5


def test_a_large_score_does_not_overflow():
    nll = group_nll(torch.tensor([200.0, -300.0, 0.0]), torch.tensor([0, 0, 1]), torch.tensor([1, 2]))
    assert nll.tolist() == [500.0, 0.0]


def test_the_stacked_batch_says_which_rows_belong_together():
    _, tokenizer, collator = setting("llama-tied")
    batch = collator(Candidates(EXAMPLES[:2], tokenizer, "causal", 64)[:])
    assert batch["groups"].tolist() == [0, 0, 1, 1, 1] and batch["golds"].tolist() == [1, 4]
    assert batch["accepted"].tolist() == [False, True, True, False, True]
    assert batch["divisors"].tolist() == [5, 2, 2, 4, 3]
    summed = Collator(0, "causal", scoring="sum")(Candidates(EXAMPLES[:1], tokenizer, "causal", 64)[:])
    assert summed["divisors"].tolist() == [1, 1]


def test_rows_without_options_or_answers_are_refused():
    tokenizer = small_tokenizer()
    with pytest.raises(DataError, match="free-text answers"):
        Candidates([Example("a story", " of")], tokenizer, "causal")
    with pytest.raises(DataError, match="example 1 has 1 option"):
        Candidates([story(3, (" fine",))], tokenizer, "causal")
    with pytest.raises(DataError, match="example 1 has no answer"):
        Prompts([Example("a story", "")], tokenizer, "causal")


def test_prompts_leave_room_for_their_answers():
    tokenizer = texts.byte_tokenizer(bos=True)
    examples = [Example("the film was " + "great " * n, " fine", golds=(" fine", "good")) for n in (2, 30)]
    prompts = Prompts(examples, tokenizer, "causal", context=64)
    assert max(prompts.lengths) == 14 and "1 of 2 prompts" in prompts.notices[-1]
    assert prompts[1]["input_ids"][0] == tokenizer.bos_token_id and prompts[0]["answers"] == (" fine", "good")
    batch = Collator(tokenizer.pad_token_id, "causal")(prompts[:])
    assert batch["answers"] == [(" fine", "good")] * 2 and "labels" not in batch


def test_a_chosen_length_of_prompts_holds_the_longest_question():
    tokenizer = texts.byte_tokenizer(bos=True)
    asked = "What is the story of the film , and who is it"
    examples = [Example("the film", " fine")] * 39 + [Example(f"great {asked}", " fine", passage=(0, 5))]
    prompts = Prompts(examples, tokenizer, "causal")
    kept = tokenizer.decode(prompts[39]["input_ids"], skip_special_tokens=True)
    assert asked in kept and prompts.max_length > prompts.lengths[0]
