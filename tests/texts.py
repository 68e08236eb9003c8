"""Small texts to test with: tokenizers of each family trained on one corpus, rows, and labelled examples."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from transformers import PreTrainedTokenizerFast

from smidgen.tasks import Example, Row

SHARED = Path(__file__).parents[2] / "shared"
WORDS = "the film was fine . a story of one day and It great terrible good bad Label : Topic sports user assistant What is"
CORPUS = [" ".join(random.Random(seed).choices(WORDS.split(), k=12)) for seed in range(200)] + [WORDS]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, framed: bool = False, bos: bool = False, chat: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE as of GPT-2; framed: <s> and </s> and a mask that eats the space before it, as of RoBERTa."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<mask>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if framed or bos:
        single = "<s> $A </s>" if framed else "<s> $A"
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        pair = "<s> $A </s> </s> $B </s>" if framed else "<s> $A $B"
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )
    made.chat_template = chat
    return made


def word_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece as of BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = token_decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names
    )


def sentence_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram pieces with a word-start mark, </s> at the end, as of T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = token_decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def rows(*records: dict[str, Any]) -> list[Row]:
    return [Row(record, f"mem:{number}") for number, record in enumerate(records, 1)]


def labelled(prompt: str, gold: int, words: tuple[str, ...] = ("terrible", "great"), suffix: str = ".") -> Example:
    options = tuple(" " + word for word in words)
    return Example(prompt, options[gold], suffix, options, gold, (prompt,))


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def shared(*parts: str) -> Path:
    """A file of the real data and models beside the repository; skips where there is none."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {path}")
    return path
