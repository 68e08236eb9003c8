"""Collator: padding sides, positions, and logits that do not see the padding."""

from __future__ import annotations

import pytest
import torch

import families
from smidgen.collate import Collator
from smidgen.encode import encode
from smidgen.models import wants_position_ids
from smidgen.tasks import Example
from texts import byte_tokenizer, labelled, sentence_tokenizer, word_tokenizer


def test_padding_sides():
    examples = [labelled("the film was fine", 1), labelled("It", 0)]
    tokenizer = byte_tokenizer()
    encoded = encode(examples, tokenizer, "causal", 32)
    batch = Collator(tokenizer.pad_token_id, "causal", encoded.choices, position_ids=True)(encoded[:])
    assert batch["input_ids"].dtype == torch.int64 and batch["choices"].tolist() == list(encoded.choices)
    assert batch["attention_mask"][1].tolist() == [0, 0, 0, 1, 1] and batch["labels"][1].tolist()[:4] == [-100] * 4
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    bert = word_tokenizer()
    encoded = encode(examples, bert, "classification", 32)
    batch = Collator(bert.pad_token_id, "classification", position_ids=True)(encoded[:])
    assert batch["labels"].tolist() == [1, 0] and batch["attention_mask"][1].tolist() == [1, 1, 1, 0, 0, 0]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "token_type_ids"}
    t5 = sentence_tokenizer()
    encoded = encode([Example("the film", " a story of one day"), Example("It", " was")], t5, "seq2seq", 32)
    batch = Collator(t5.pad_token_id, "seq2seq")(encoded[:])
    assert batch["labels"].shape[1] > batch["input_ids"].shape[1] and batch["labels"][1, -1] == -100


@pytest.mark.parametrize("family", ["opt-tied", "gpt2", "gpt-neo", "llama-tied", "mistral", "qwen3"])
def test_left_padding_leaves_logits_as_they_are(family):
    """Within float32 rounding: the attention of a padded row sums the same terms and exact zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = families.FAMILIES[family][1]().eval()
    assert wants_position_ids(model)
    long, short = list(range(5, 19)), [20, 21, 22, 23]
    collate = Collator(0, "causal", position_ids=True)
    with torch.no_grad():
        padded = collate([{"input_ids": long}, {"input_ids": short}])
        alone = collate([{"input_ids": short}])
        difference = model(**padded).logits[1, -4:] - model(**alone).logits[0]
    assert difference.abs().max() < 1e-5
