"""The embedded default: sizes, offline loading, regeneration of the labelled sets, and that the model is really trained."""

from __future__ import annotations

import json
import random
import re
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smidgen import embedded
from smidgen.embedded import make_data, pretrain

LABEL_WORDS = {"reviews": (" terrible", " great"), "topics": (" world", " sports", " business", " science")}


def rows(name: str, split: str) -> list[dict]:
    lines = (embedded.data_folder(name) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.model_folder(), local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded.model_folder(), local_files_only=True).eval()


def test_sizes(model) -> None:
    files = [path for path in embedded.HERE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 9e6
    assert (embedded.model_folder() / "model.safetensors").stat().st_size <= 8e6
    assert 1e6 <= model.num_parameters() <= 4e6
    assert model.dtype == torch.float32  # stored as float16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_unknown_data_set_names_the_choices() -> None:
    with pytest.raises(ValueError, match="reviews, topics"):
        embedded.data_folder("films")


def test_tokenizer(tokenizer) -> None:
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    text = "Café in Köln: “naïve” – 12.5 % \n\tend"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text  # byte level: no unknowns
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id
    for words in LABEL_WORDS.values():
        for word in words:
            assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word


def test_chat_template_masks_the_user(tokenizer) -> None:
    chat = [{"role": "user", "content": "Where is the ball?"}, {"role": "assistant", "content": "In the box."}]
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    told = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(told).strip() == "In the box.</s>"
    opened = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    assert opened == "<s>User: Where is the ball?\nAssistant:"


def test_labelled_sets_regenerate_byte_for_byte(tmp_path) -> None:
    make_data.write_sets(tmp_path)
    for name in embedded.DATA:
        for split in make_data.SIZES:
            made, shipped = tmp_path / name / f"{split}.jsonl", embedded.data_folder(name) / f"{split}.jsonl"
            assert made.read_bytes() == shipped.read_bytes(), (name, split)


@pytest.mark.parametrize("name", embedded.DATA)
def test_splits(name: str) -> None:
    splits = {split: rows(name, split) for split in make_data.SIZES}
    classes = len(LABEL_WORDS[name])
    for split, size in make_data.SIZES.items():
        labels = [row["label"] for row in splits[split]]
        assert [labels.count(label) for label in range(classes)] == [size // classes] * classes
        assert all(row["text"] and set(row) == {"text", "label"} for row in splits[split])
    texts = [row["text"] for split in splits.values() for row in split]
    assert len(set(texts)) == len(texts) == 2000


def test_grammar_uses_every_slot_it_names() -> None:
    """A slot must be a rule, in some domain or tone, or one of the names that document() provides."""
    rules = make_data.grammar().rules
    known = {re.sub(r"[+-]$", "", name) for name in rules} | {name.rpartition(".")[0] for name in rules}
    for name, alternatives in rules.items():
        for at, slot, _, key in (part for parts in alternatives for part in parts if not isinstance(part, str)):
            targets = [f"{domain}.{slot}" for domain in make_data.DOMAINS] if at else [slot]
            assert slot == "he" or key in ("h", "f") or all(target in known for target in targets), (name, slot)


def test_deciding_pairs_of_validation_and_test_are_not_in_train() -> None:
    """Splits draw their deciding pair (what is judged, the word that judges it) from two sides of a hash."""
    rules, rng = make_data.grammar(), random.Random(3)
    for make, label in ((make_data.review, 1), (make_data.topic, 3)):
        pairs = [make(rules, rng, label)[1] for _ in range(200)]
        kept_out = sum(make_data.kept_out(pair) for pair in pairs)
        assert all("|" in pair or make is make_data.topic for pair in pairs) and 20 < kept_out < 80


def test_pretraining_text_holds_no_labelled_sentence() -> None:
    labelled = {
        sentence
        for name in embedded.DATA
        for split in make_data.SIZES
        for row in rows(name, split)
        for sentence in make_data.sentences(row["text"])
    }
    documents = list(make_data.corpus(500_000))
    assert labelled.isdisjoint(sentence for text in documents for sentence in make_data.sentences(text))
    assert documents[:50] == list(islice(make_data.corpus(10**9), 50))


def test_model_is_trained(model, tokenizer) -> None:
    """Held-out sentences (a labelled set is no part of the pre-training text) cost far less than under random weights."""
    texts = [row["text"] for name in embedded.DATA for row in rows(name, "test")[:8]]
    trained = pretrain.held_out(model, tokenizer, texts)["nats_per_token"]
    untrained = pretrain.held_out(pretrain.new_model(tokenizer), tokenizer, texts)["nats_per_token"]
    assert trained < 0.5 * untrained, (trained, untrained)  # untrained: about ln 2048 = 7.6


def test_global_generator_is_untouched_by_the_scripts(tokenizer) -> None:
    before = torch.get_rng_state()
    make_data.labelled_sets()
    pretrain.new_model(tokenizer)
    assert torch.equal(torch.get_rng_state(), before)
