"""Option scoring: shared prompts, batches and one by one agree on every causal family; what is not shared says so."""

from __future__ import annotations

import logging

import pytest
import torch

import families
import texts
from smidgen.collate import Collator
from smidgen.directions import Dense
from smidgen.models import wants_position_ids
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.questions import Candidates
from smidgen.scoring import OptionScorer, _cut, best_of_groups, row_sums
from smidgen.tasks import Example

CAUSAL = [name for name, (kind, _) in families.FAMILIES.items() if kind == "causal"]


def story(words, options, gold=0, right=()):
    """An example whose prompt has `words` words."""
    prompt = " ".join(texts.WORDS.split()[i % 9] for i in range(words))
    return Example(prompt, options[gold], "", tuple(options), gold, (prompt,), right=tuple(right))


EXAMPLES = [
    story(12, (" a story of one day", " bad film"), 1),
    story(7, (" great great", " a terrible day and", " good sports Label"), 2, right=(0, 2)),
    story(20, (" It was fine", " It was good , and bad"), 0),  # options that begin alike
    story(9, (" a", " terrible day one"), 1),
]


def setting(family, scoring="mean"):
    """(engine, tokenizer with a vocabulary of the family's size, collator)"""
    kind, model = families.make(family)
    tokenizer = small_tokenizer()
    engine = Engine(model, ParamView.of_model(model), kind)
    return engine, tokenizer, Collator(0, kind, position_ids=wants_position_ids(model), scoring=scoring)


def small_tokenizer():
    """One token a word, fewer than the families' vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *texts.WORDS.replace(":", "").split(), ","])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("family", CAUSAL)
def test_shared_prompts_and_batches_score_as_one_by_one(family, caplog):
    """float32, 1e-5 nats a label: attention adds the same terms in another order."""
    engine, tokenizer, collator = setting(family)
    candidates = Candidates(EXAMPLES, tokenizer, "causal", 64)
    alone = [row_sums(engine, collator([candidates.options[k]])) for k in range(len(candidates.options))]
    want = torch.cat([sums.nll for sums in alone])
    probe = ((Dense(5, 0, 0, engine.view.ids, "rademacher"), 0.03),)
    probed = torch.cat([row_sums(engine, collator([candidates.options[k]]), probe).nll for k in range(len(want))])
    assert (want - probed).abs().max() > 1e-3
    for shared in (True, False):
        for size in (1, 3, 100):
            scorer = OptionScorer(candidates, collator, size)
            assert scorer.shared
            scorer.shared = shared
            with caplog.at_level(logging.WARNING, "smidgen"):
                found = scorer(engine)
            assert scorer.shared == shared and "key-value" not in caplog.text
            assert found.tokens.tolist() == [int(sums.tokens[0]) for sums in alone]
            assert ((found.nll - want).abs() / found.tokens).max() < 1e-5
            assert ((scorer(engine, probe).nll - probed).abs() / found.tokens).max() < 2e-5


def test_mean_and_sum_compare_differently():
    engine, tokenizer, collator = setting("llama-tied")
    sums = OptionScorer(Candidates(EXAMPLES, tokenizer, "causal", 64), collator, 8)(engine)
    assert torch.equal(sums.scores("sum"), -sums.nll)
    assert torch.equal(sums.scores("mean"), -sums.nll / sums.tokens)
    assert best_of_groups(torch.tensor([1.0, 3.0, 3.0, 0.0, -1.0]), torch.tensor([0, 0, 0, 1, 1])) == [1, 3]


def test_rows_are_cut_before_the_first_label_and_where_they_part():
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, 4, 5]},
        {"input_ids": [1, 2, 3, 4, 9, 9], "labels": [-100, -100, -100, 4, 9, 9]},
    ]
    assert _cut(rows) == 2  # token 3 predicts the first label
    assert _cut([rows[0], {**rows[1], "input_ids": [1, 7, 3, 4, 9, 9]}]) == 1
    assert _cut([{"input_ids": [1, 2], "labels": [-100, 2]}] * 2) == 0


def test_short_prompts_run_whole():
    _, tokenizer, collator = setting("llama-tied")
    short = [story(2, (" a story of one day", " bad film and good sports Label"), 1)]
    assert not OptionScorer(Candidates(short, tokenizer, "causal", 64), collator, 8).shared


@pytest.mark.parametrize("harm", ["raises", "differs"])
def test_a_model_without_an_ordinary_cache_scores_plainly_and_says_so(harm, monkeypatch, caplog):
    engine, tokenizer, collator = setting("llama-tied")
    candidates = Candidates(EXAMPLES, tokenizer, "causal", 64)
    want = OptionScorer(candidates, collator, 4)(engine)
    run = engine._run

    def harmed(batch):
        if "past_key_values" in batch and harm == "raises":
            raise TypeError("unexpected keyword past_key_values")
        return run({k: v for k, v in batch.items() if k != "past_key_values"} if batch["input_ids"].shape[1] > 7 else batch)

    monkeypatch.setattr(engine, "_run", harmed)
    scorer = OptionScorer(candidates, collator, 4)
    with caplog.at_level(logging.WARNING, "smidgen"):
        found = scorer(engine)
        scorer(engine)
    assert not scorer.shared and caplog.text.count("no key-value cache can be shared") == 1
    assert ((found.nll - want.nll).abs() / want.tokens).max() < 1e-5


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_virtual_tokens_are_not_put_before_the_options_again(family, caplog):
    import peft

    kind, model = families.make(family)
    with torch.random.fork_rng():
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=families.WIDTH)
        model = peft.get_peft_model(model, config)
    engine = Engine(model.eval(), ParamView.of_model(model), kind)
    scorer = OptionScorer(Candidates(EXAMPLES, small_tokenizer(), kind, 48), Collator(0, kind), 4)
    assert scorer.shared
    with caplog.at_level(logging.WARNING, "smidgen"):
        scorer(engine)
    assert not scorer.shared and "virtual tokens" in caplog.text
