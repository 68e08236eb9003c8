"""Data: readers, splits, column recognition, encoding for every kind, padding, and the errors of bad data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from transformers import PreTrainedTokenizerFast

import families
from smidgen import config as configuration
from smidgen import data
from smidgen.config import ConfigError, DataError, Source
from smidgen.data import Chat, Collator, Corpus, encode, encode_options, encode_prompts, read_rows, to_examples
from smidgen.models import wants_position_ids
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


def answer_of(row: dict[str, Any], tokenizer: Any) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def corpus_of(*overrides: str, notify: Any = lambda line: None) -> Corpus:
    return data.open_corpus(configuration.load(None, list(overrides)), notify=notify)


# -- reading


def test_formats_give_the_same_rows(tmp_path):
    records = [{"text": "a, b", "label": "x"}, {"text": 'say "c"\nd', "label": "y"}]
    write(tmp_path / "a.jsonl", *records)
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": records}))
    (tmp_path / "lines.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "a.csv").write_text('\ufefftext,label\n"a, b",x\n"say ""c""\nd",y\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text('text\tlabel\na, b\tx\n"say ""c""\nd"\ty\n')
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "wrapped.json", "lines.json", "a.csv", "a.tsv", "a.parquet"):
        assert read_rows(tmp_path / name) == records, name
    assert [row.place for row in read_rows(tmp_path / "a.csv")] == [f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:4"]


def test_text_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\nthree\n")
    assert [row["text"] for row in read_rows(path)] == ["one", "two", "three"]
    path.write_text("\none\ntwo\n\n\nthree\n")
    assert [(row["text"], row.place) for row in read_rows(path)] == [("one\ntwo", f"{path}:2"), ("three", f"{path}:6")]


def test_long_csv_field_and_its_global_limit(tmp_path):
    import csv

    limit = csv.field_size_limit(131_072)
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_rows(tmp_path / "a.csv")[0]["text"]) == 200_000
    assert csv.field_size_limit(limit) == 131_072


def test_folders_and_splits(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", {"text": "a"})
    write(tmp_path / "train-00001-of-00002.jsonl", {"text": "b"})
    write(tmp_path / "train_short.jsonl", {"text": "not this"})
    write(tmp_path / "dev.jsonl", {"text": "c"})
    (tmp_path / "README.md").write_text("x")
    assert [row["text"] for row in read_rows(tmp_path)] == ["a", "b"]
    assert (
        [row["text"] for row in read_rows(tmp_path, "validation")]
        == ["c"]
        == [row["text"] for row in read_rows(tmp_path, "val")]
    )
    with pytest.raises(DataError, match="has no test split: it has train, validation"):
        read_rows(tmp_path, "test")
    with pytest.raises(ConfigError, match="unknown split 'tets'"):
        read_rows(tmp_path, "tets")
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "x.jsonl", {"text": "x"})
    write(tmp_path / "parts" / "y.jsonl", {"text": "y"})
    assert [row["text"] for row in read_rows(tmp_path / "parts")] == ["x", "y"]


def test_bad_files(tmp_path):
    def refuse(name: str, content: str | bytes | None, message: str) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError) as caught:
            read_rows(str(tmp_path / name))
        assert message in str(caught.value) and caught.value.exit_code == 5

    refuse("empty.jsonl", "", "is empty")
    refuse("empty.txt", "\n \n", "is empty")
    refuse("empty.csv", "text,label\n", "is empty")
    refuse("bad.jsonl", '{"a": 1}\n{"a": \n', "bad.jsonl:2: not a line of JSON")
    refuse("bad.json", "{", "not JSON")
    refuse("list.json", "[1]", "entry 1 is not an object")
    refuse("number.json", "3", "holds one int")
    refuse("bad.csv", "a,b\n1,2,3\n", "bad.csv:2: 1 field(s) more than the header's 2")
    refuse("latin.csv", b"text\ncaf\xe9\n", "UTF-8")
    refuse("bad.parquet", "x", "not a parquet file")
    refuse("data.xlsx", "x", "is no data file")
    refuse("bda.jsonl", None, f"did you mean '{tmp_path}/bad.jsonl'")
    refuse("nofolder/x.jsonl", None, "check the path")
    (tmp_path / "none").mkdir()
    refuse("none", None, "holds no data file")
    for missing in ("", "no_such_thing", "tests/no_such_file", "./a/b", "~/nothing-here"):
        with pytest.raises(DataError, match="there is no file, folder or task"):
            read_rows(missing)
    with pytest.raises(DataError, match="did you mean 'reviews'"):
        read_rows("review")


def test_hub_errors_are_one_sentence(monkeypatch):
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"data set 'owner/name:part' cannot be read \(ConnectionError: no network at all\)"):
        read_rows("owner/name:part")


def test_hub_rows_and_splits(monkeypatch):
    import datasets

    def load(hub_id: str, configuration: str | None) -> dict[str, Any]:
        names = ["train_sft"] if configuration is None else ["train", "dev", "extra"]
        return {name: [{"text": f"{hub_id} {configuration} {name}", "label": 0}] for name in names}

    monkeypatch.setattr(datasets, "load_dataset", load)
    (row,) = read_rows("nyu-mll/glue:sst2", "validation")
    assert row["text"] == "nyu-mll/glue sst2 dev" and row.place == "nyu-mll/glue:sst2 validation row 1"
    assert data.has_split("nyu-mll/glue:sst2", "dev") and not data.has_split("nyu-mll/glue:sst2", "test")
    with pytest.raises(DataError, match="has no test split: it has train, validation"):
        read_rows("nyu-mll/glue:sst2", "test")
    with pytest.raises(DataError, match="has the splits train_sft"):
        read_rows("owner/name")


# -- splits


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=60))
def test_held_out_rows_never_train(texts):
    found = rows(*({"text": text} for text in texts))
    train, held = data.split_rows(found)
    assert len(train) + len(held) == len(found) and train
    assert not {row["text"] for row in train} & {row["text"] for row in held}
    assert bool(held) == (len(set(texts)) > 1) or held == []


def test_share_and_cap_of_held_out_rows():
    assert [len(part) for part in data.split_rows(rows(*({"text": str(i)} for i in range(200))))] == [180, 20]
    assert len(data.split_rows(rows(*({"text": str(i)} for i in range(6000))))[1]) == 500
    assert len(data.split_rows(rows({"text": "a"}, {"text": "b"}))[1]) == 1


def test_held_out_rows_do_not_depend_on_order():
    found = rows(*({"text": str(i)} for i in range(100)))
    shuffled = random.Random(0).sample(found, 100)
    assert sorted(row["text"] for row in data.split_rows(found)[1]) == sorted(
        row["text"] for row in data.split_rows(shuffled)[1]
    )


def test_take_is_nested_and_keeps_order():
    items = [{"text": str(i)} for i in range(50)]
    ten, twenty = data.take(items, 10), data.take(items, 20)
    assert all(item in twenty for item in ten) and ten == [item for item in items if item in ten] and ten != items[:10]
    assert data.take(items, 50) == data.take(items, None) == items


def test_mix_shows_rows_by_weight_and_interleaves():
    a, b = rows(*({"text": f"a{i}"} for i in range(40))), rows(*({"text": f"b{i}"} for i in range(20)))
    mixed = data.mix([a, b], [1, 2.5], seed=0)
    counts = {row["text"]: sum(other["text"] == row["text"] for other in mixed) for row in mixed}
    assert all(counts[f"a{i}"] == 1 for i in range(40))
    assert sorted(counts[f"b{i}"] for i in range(20)) == [2] * 10 + [3] * 10
    firsts = [row["text"][0] for row in mixed[:45]]
    assert 15 <= firsts.count("a") <= 25
    assert data.mix([a, b], [1, 2.5], seed=0) == mixed != data.mix([a, b], [1, 2.5], seed=1)
    assert data.mix([a], [1], seed=3) == a
    assert len(data.mix([a, b], [1, 0.001], seed=0)) == 41  # never none of a source


def test_corpus_of_a_file_holds_out(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": f"t{i}", "label": i % 2} for i in range(40)))
    lines: list[str] = []
    corpus = corpus_of(f"data={path}", "words=[bad, good]", notify=lines.append)
    train, dev = corpus.examples("train"), corpus.examples("dev")
    assert (len(train), len(dev), corpus.words) == (36, 4, ("bad", "good"))
    assert corpus.has("dev") and not corpus.has("test")
    assert lines == [f"{path}: 4 of 40 rows held out for evaluation, by row hash"]
    with pytest.raises(DataError, match="no test split"):
        corpus.examples("test")
    few = corpus_of(f"data={path}", "words=[bad, good]", "train_rows=5", "dev_rows=2", "seed=3")
    assert [len(few.examples(split)) for split in ("train", "validation")] == [5, 2]
    assert all(example in train for example in few.examples("train"))


def test_corpus_with_eval_data(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": f"t{i}", "completion": " x"} for i in range(10)))
    other = write(tmp_path / "b.jsonl", {"prompt": "u", "completion": " y"})
    corpus = corpus_of(f"data={path}", f"eval_data={other}")
    assert len(corpus.examples("train")) == 10 and corpus.task is None and corpus.words is None
    assert corpus.examples("validation") == [Example("u", " y")]


def test_classes_are_inferred_from_all_training_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": f"t{i}", "label": "rare" if i == 7 else f"c{i % 3}"} for i in range(60)))
    corpus = corpus_of(f"data={path}", f"eval_data={path}", "train_rows=3")
    assert corpus.words == ("c0", "c1", "c2", "rare") and len(corpus.examples("train")) == 3


def test_corpus_of_a_task_with_local_rows(tmp_path):
    write(tmp_path / "train.jsonl", {"sentence": "a", "label": 0}, {"sentence": "b", "label": 1})
    write(tmp_path / "validation.jsonl", {"sentence": "c", "label": 1})
    corpus = corpus_of("task=sst2", f"data={tmp_path}", "words=[bad, good]", "template={sentence} is {answer}")
    assert corpus.name == "sst2" and corpus.examples("dev")[0] == Example("c is", " good", "", (" bad", " good"), 1, ("c",))
    by_template = corpus_of(f"data={tmp_path}", "template={sentence} is {answer}")
    assert by_template.words == ("0", "1")


def test_validation_alone_needs_no_training_rows(tmp_path):
    write(tmp_path / "validation.jsonl", {"sentence": "c", "label": 1})
    assert len(corpus_of("task=sst2", f"data={tmp_path}").examples("dev")) == 1


def test_a_task_name_is_data_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert corpus_of("data=topics").words == ("world", "sports", "business", "science")


def test_weighted_list(tmp_path):
    a = write(tmp_path / "a.jsonl", *({"prompt": f"a{i}", "completion": " x"} for i in range(20)))
    b = write(tmp_path / "b.jsonl", *({"prompt": f"b{i}", "completion": " x"} for i in range(20)))
    corpus = corpus_of(f"data=[{a}, {{path: {b}, weight: 2}}]")
    assert len(corpus.examples("train")) == 18 + 36 and len(corpus.examples("dev")) == 4
    assert read_rows([str(a), Source(path=str(b))])[20]["prompt"] == "b0"


def test_corpus_errors(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"})
    with pytest.raises(ConfigError, match="nothing to read"):
        corpus_of()
    with pytest.raises(ConfigError, match="`words` is for labelled rows"):
        corpus_of(f"data={path}", "words=[a, b]")
    with pytest.raises(ConfigError, match="did you mean 'reviews'"):
        corpus_of("task=reviws")


# -- columns


def test_columns_are_recognised():
    found, remarks = to_examples(
        rows(
            {"prompt": "Q: ", "completion": "A", "label": None},
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {"instruction": "Sing.", "input": "", "output": "La"},
            {"text": "whole"},
            {"prompt": "p", "chosen": " good", "rejected": " bad"},
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            {"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant", "content": "a"}]},
            {"prompt": "2+2?", "completion": "4"},
            {"prompt": "n =", "completion": 4},
        )
    )
    assert found[0] == Example("Q:", " A")
    assert found[1].prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:") and found[1].answer == "\n3"
    assert "Input" not in found[2].prompt and "further context" not in found[2].prompt
    assert found[3] == Example("", "whole") and found[4] == Example("p", " good")
    turns = ({"role": "user", "content": "u"}, {"role": "assistant", "content": "a"})
    assert [chat.messages for chat in found[5:8]] == [turns] * 3
    assert found[8] == Example("2+2?", "4") and found[9] == Example("n =", "4")
    assert remarks == [
        "1 of 10 rows: preference data: trained on 'chosen', 'rejected' is not used",
        "2 of 10 rows: 'prompt' and 'completion' meet without a space and are joined as they are",
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a", "answer": "b"}, "rename 'answer' to 'completion', 'question' to 'prompt'"),
        ({"promt": "a", "completion": "b"}, "rename 'promt' to 'prompt'"),
        ({"x": 1}, "columns x: accepted are messages | conversations | prompt+completion"),
        ({"sentence": "a", "label": 1}, "give a `template`"),
        ({"text": None, "label2": 1}, "accepted are"),
        ({"text": ["a"]}, "text is needed"),
        ({"messages": []}, "a list of turns"),
        ({"messages": "hello"}, "a list of turns"),
        ({"messages": [{"role": "user"}]}, "it needs 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "both text"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "it needs 'from' and 'value'"),
    ],
)
def test_rows_that_are_not_recognised(record, message):
    with pytest.raises(DataError) as caught:
        to_examples(rows(record))
    assert str(caught.value).startswith("mem:1: ") and message in str(caught.value)


# -- causal


@pytest.mark.parametrize("bos", [False, True])
def test_only_the_answer_carries_loss(bos):
    tokenizer = byte_tokenizer(bos=bos)
    examples = [Example("What is the film", " a story of one day"), Example("", "the film was"), labelled("the film", 1)]
    encoded = encode(examples, tokenizer, "causal", 64)
    for example, row in zip(examples, encoded, strict=True):
        text = example.prompt + example.answer
        expected = tokenizer(text)["input_ids"] + ([] if example.options else [tokenizer.eos_token_id])
        assert row["input_ids"] == expected and len(row["labels"]) == len(expected)
        assert all(label in (-100, token) for label, token in zip(row["labels"], expected, strict=True))
    assert answer_of(encoded[0], tokenizer) == " a story of one day</s>"
    assert answer_of(encoded[2], tokenizer) == " great"
    whole = tokenizer.decode(encoded[1]["input_ids"], skip_special_tokens=True)
    assert whole == "the film was"
    assert encoded[1]["labels"].count(-100) == 1  # the first token, or <s>: nothing comes before it
    assert encoded[1]["labels"][0] == -100


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.sampled_from("ab é\n.漢"), max_size=12).map(str.rstrip),
    st.text(st.sampled_from("ab é\n.漢"), min_size=1, max_size=12),
)
def test_labels_are_the_tokens_that_end_in_the_answer(prompt, answer):
    tokenizer = byte_tokenizer()
    if not answer.strip():
        return
    row = encode([Example(prompt, answer)], tokenizer, "causal", 256)[0]
    end, boundary, expected = 0, len(prompt.encode()), []
    for token in row["input_ids"][:-1]:  # twin: a byte-level token has one letter for every byte it covers
        end += len(tokenizer.convert_ids_to_tokens(token))
        expected.append(token if end > boundary else -100)
    assert end == len((prompt + answer).encode())
    assert row["labels"] == [-100, *expected[1:], tokenizer.eos_token_id]


def test_choices_of_single_token_words():
    tokenizer = byte_tokenizer()
    encoded = encode([labelled("the film was", 0), labelled("a story of It", 1)], tokenizer, "causal", 32)
    ids = tuple(tokenizer(" " + word)["input_ids"][0] for word in ("terrible", "great"))
    assert encoded.choices == ids
    assert [row["labels"][-1] for row in encoded] == [ids[0], ids[1]]


def test_words_of_several_tokens_have_no_choices():
    tokenizer = byte_tokenizer()
    encoded = encode([labelled("the film was", 1, ("xyzzy", "plugh"))], tokenizer, "causal", 32)
    assert encoded.choices is None and answer_of(encoded[0], tokenizer) == " plugh"
    half = encode([labelled("the film was", 1, ("xyzzy", "great"))], tokenizer, "causal", 32)
    assert half.choices is None and not half.notices
    mixed = encode([labelled("a", 1), labelled("a", 0, ("good", "bad"))], tokenizer, "causal", 32)
    assert mixed.choices is None


def test_truncation_keeps_start_token_and_answer():
    tokenizer = byte_tokenizer(bos=True)
    example = labelled("the film was fine . a story of one day and", 1)
    full = encode([example], tokenizer, "causal", 64)[0]["input_ids"]
    encoded = encode([example], tokenizer, "causal", 6)
    assert encoded[0]["input_ids"] == [full[0], *full[-5:]] and answer_of(encoded[0], tokenizer) == " great"
    assert encoded.notices == ["1 of 1 rows: longer than 6 tokens, the left of the prompt is cut"]
    long = encode([Example("What is", " the film was fine . a story of one day")], tokenizer, "causal", 5)
    assert answer_of(long[0], tokenizer) == " the film was fine"
    assert long.notices[1] == "1 of 1 rows: an answer is longer than 5 tokens, its right is cut"
    bare = encode([Example("What is", " the film was fine .")], byte_tokenizer(), "causal", 4)
    assert answer_of(bare[0], tokenizer) == " the film was" and bare[0]["labels"][0] == -100


@pytest.mark.parametrize("bos", [False, True])
def test_long_texts_are_cut_into_blocks(bos):
    tokenizer = byte_tokenizer(bos=bos)
    text = " ".join(CORPUS[:5])
    encoded = encode([Example("", text)], tokenizer, "causal", 16)
    assert len(encoded) > 1 and encoded.index == [0] * len(encoded) and max(encoded.lengths) == 16
    labels = [label for row in encoded for label in row["labels"] if label != -100]
    whole = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert labels == (whole if bos else whole[1:])  # every token once
    assert "cut into blocks" in encoded.notices[0]


def test_length_is_chosen_and_capped():
    assert data.choose_max_length(range(1, 101), None) == 95
    assert data.choose_max_length(range(1, 101), 64) == 64
    assert data.choose_max_length([5000] * 3, None) == data.choose_max_length([5000] * 3, 4096) == 1024
    assert data.choose_max_length([7], 512) == 7
    tokenizer = byte_tokenizer()
    assert encode([labelled("the film was", 1)] * 3, tokenizer, "causal").max_length == 4
    assert encode([labelled("the film was", 1)], tokenizer, "causal", None, context=3).max_length == 3
    with pytest.raises(ConfigError, match="max_length 99 is above the model's 64 positions"):
        encode([labelled("the film was", 1)], tokenizer, "causal", 99, context=64)


def test_rows_without_answer_are_left_out_and_counted():
    tokenizer = byte_tokenizer()
    encoded = encode([Example("a", " "), Example("a", " b")], tokenizer, "causal", 16)
    assert len(encoded) == 1 and encoded.index == [1]
    assert encoded.notices == ["1 of 2 rows: no answer to learn from, left out"]
    with pytest.raises(DataError, match="none of the 1 rows has a token to learn from"):
        encode([Example("a", "")], tokenizer, "causal", 16)
    with pytest.raises(DataError, match="empty"):
        encode([], tokenizer, "causal", 16)
    with pytest.raises(ConfigError, match="nothing before its"):
        encode([labelled("", 1)], tokenizer, "causal", 16)
    with pytest.raises(ConfigError, match="unknown kind"):
        encode([Example("a", " b")], tokenizer, "causl", 16)


# -- masked, seq2seq, classification


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(framed=True), word_tokenizer()], ids=["roberta", "bert"])
def test_masked_rows(tokenizer):
    encoded = encode([labelled("the film was", 1), labelled("a story . It was", 0)], tokenizer, "masked", 32)
    for row, text in zip(encoded, ["the film was great.", "a story . It was terrible."], strict=True):
        whole = tokenizer(text)["input_ids"]
        (where,) = [i for i, label in enumerate(row["labels"]) if label != -100]
        assert row["input_ids"][where] == tokenizer.mask_token_id and row["input_ids"].count(tokenizer.mask_token_id) == 1
        assert row["labels"][where] == whole[where]
        assert [*row["input_ids"][:where], whole[where], *row["input_ids"][where + 1 :]] == whole
        assert row["labels"][where] in encoded.choices


def test_masked_truncation_keeps_mask_and_frame():
    tokenizer = word_tokenizer()
    encoded = encode([labelled("the film was fine a story of one day", 1)], tokenizer, "masked", 6)
    assert tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] one day [MASK]. [SEP]"
    wide = labelled("one day", 1, suffix=" the film was fine a story")
    assert tokenizer.decode(encode([wide], tokenizer, "masked", 5)[0]["input_ids"]) == "[CLS] [MASK] the film [SEP]"


def test_masked_words_must_be_one_token():
    tokenizer = word_tokenizer()
    with pytest.raises(DataError, match=r"label word 'xyzzy' is 1 tokens here \(\[UNK\]\)"):
        encode([labelled("the film was", 0, ("xyzzy", "great"))], tokenizer, "masked", 32)
    with pytest.raises(DataError, match=r"label word 'goodbad' is \d+ tokens here \(good ##.*--kind classification"):
        encode([labelled("the film was", 0, ("goodbad", "great"))], tokenizer, "masked", 32)
    with pytest.raises(DataError, match="needs labelled rows"):
        encode([Example("a", " b")], tokenizer, "masked", 32)
    with pytest.raises(DataError, match="same token"):
        encode([labelled("the film was", 0, ("great", "Great"))], tokenizer, "masked", 32)
    with pytest.raises(ConfigError, match="no mask token"):
        encode([labelled("the film was", 0)], sentence_tokenizer(), "masked", 32)


def test_seq2seq_rows():
    tokenizer = sentence_tokenizer()
    encoded = encode([labelled("the film was", 1), Example("What is", " a story")], tokenizer, "seq2seq", 32)
    assert encoded[0]["input_ids"] == tokenizer("the film was")["input_ids"]
    assert encoded[0]["labels"] == tokenizer("great")["input_ids"] and encoded[0]["labels"][-1] == tokenizer.eos_token_id
    cut = encode([Example("the film was fine", " a story of one day")], tokenizer, "seq2seq", 3)
    assert cut[0]["input_ids"] == tokenizer("the film was fine")["input_ids"][-3:] and len(cut[0]["labels"]) == 3
    assert len(cut.notices) == 2
    with pytest.raises(DataError, match="a seq2seq model needs one"):
        encode([Example("", "a text")], tokenizer, "seq2seq", 16)


def test_classification_rows():
    tokenizer = word_tokenizer()
    single = encode([labelled("the film was fine", 1)], tokenizer, "classification", 5)
    assert single[0] == {"input_ids": tokenizer("the film was")["input_ids"], "labels": 1, "token_type_ids": [0] * 5}
    assert single.notices == ["1 of 1 rows: longer than 5 tokens, cut at the end"]
    pair = Example("p", " a", options=(" a", " b"), gold=0, text=("the film", "was fine"))
    row = encode([pair], tokenizer, "classification", 32)[0]
    assert row["input_ids"] == tokenizer("the film", "was fine")["input_ids"] and row["token_type_ids"][-1] == 1
    with pytest.raises(DataError, match="needs labelled rows"):
        encode([Example("a", " b")], tokenizer, "classification", 32)


# -- options and prompts


def test_options_share_their_prompt():
    tokenizer = byte_tokenizer(bos=True)
    words = ("great", "terrible story of xyzzy", "bad")
    examples = [labelled("the film was fine . a story of one day and", 1, words), labelled("It was", 0, words)]
    encoded = encode_options(examples, tokenizer, "causal", 12)
    assert encoded.index == [0, 0, 0, 1, 1, 1] and encoded.option == [0, 1, 2, 0, 1, 2]
    for position, row in enumerate(encoded):
        assert answer_of(row, tokenizer) == " " + words[encoded.option[position]]
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        first = encoded[position - encoded.option[position]]
        assert row["input_ids"][:start] == first["input_ids"][:start] and len(row["input_ids"]) <= 12
    seq2seq = encode_options(examples, sentence_tokenizer(), "seq2seq", 32)
    assert seq2seq[0]["input_ids"] == seq2seq[1]["input_ids"] and seq2seq[0]["labels"] != seq2seq[1]["labels"]
    with pytest.raises(ValueError, match="scores all options at once"):
        encode_options(examples, tokenizer, "masked", 12)
    with pytest.raises(DataError, match="no options"):
        encode_options([Example("a", " b")], tokenizer, "causal", 12)


def test_prompts_for_generation():
    tokenizer = byte_tokenizer(bos=True, chat=CHATML)
    chat = Chat(({"role": "user", "content": "What is"}, {"role": "assistant", "content": "a film"}), "mem:1")
    encoded = encode_prompts([Example("the film", " was"), chat], tokenizer, "causal")
    assert tokenizer.decode(encoded[0]["input_ids"]) == "<s>the film"
    assert tokenizer.decode(encoded[1]["input_ids"]) == "<|im_start|>user\nWhat is<|im_end|>\n<|im_start|>assistant\n"
    cut = encode_prompts([Example("the film was", " fine")], tokenizer, "causal", 3)
    assert tokenizer.decode(cut[0]["input_ids"]) == "<s> film was"
    assert encode_prompts([Example("the film", " was")], sentence_tokenizer(), "seq2seq")[0]["input_ids"][-1] == 1
    with pytest.raises(DataError, match="no prompt to continue"):
        encode_prompts([Example("", "x")], byte_tokenizer(), "causal")


# -- chat


TURNS = (
    {"role": "user", "content": "What is"},
    {"role": "assistant", "content": "a film"},
    {"role": "user", "content": "one day"},
    {"role": "assistant", "content": "a story"},
)


def test_every_assistant_turn_carries_loss():
    tokenizer = byte_tokenizer(chat=CHATML)
    encoded = encode([Chat(TURNS, "mem:1")], tokenizer, "causal", 128)
    (row,) = encoded
    assert answer_of(row, tokenizer) == "a film<|im_end|>a story<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(list(TURNS), tokenize=False).rstrip()
    assert not encoded.notices


def test_a_template_without_end_token_gets_one():
    plain = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = byte_tokenizer(chat=plain)
    (row,) = encode([Chat(TURNS, "mem:1")], tokenizer, "causal", 128)
    assert answer_of(row, tokenizer) == " a film\n a story\n</s>"
    (open_end,) = encode([Chat(TURNS[:3], "mem:1")], tokenizer, "causal", 128)
    assert answer_of(open_end, tokenizer) == " a film\n"


def test_a_template_that_rewrites_earlier_turns_gives_rows_of_their_own():
    thinking = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}fine {% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_tokenizer(chat=thinking)
    encoded = encode([Chat(TURNS, "mem:1")], tokenizer, "causal", 128)
    assert [answer_of(row, tokenizer) for row in encoded] == ["fine a film<|im_end|>", "fine a story<|im_end|>"]
    assert encoded.index == [0, 0] and "row of its own" in encoded.notices[0]


def test_a_tokenizer_without_end_token_is_named():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    encoded = encode([Example("the film", " was")], tokenizer, "causal", 16)
    assert answer_of(encoded[0], tokenizer) == " was" and "no end token" in encoded.notices[0]


def test_chat_truncation_keeps_the_last_answer():
    tokenizer = byte_tokenizer(chat=CHATML)
    (row,) = encode([Chat(TURNS, "mem:1")], tokenizer, "causal", 8)
    assert len(row["input_ids"]) == 8 and answer_of(row, tokenizer) == "a story<|im_end|>"


def test_chat_errors():
    with pytest.raises(DataError, match=r"mem:1: .*no chat template: use an instruction-tuned model"):
        encode([Chat(TURNS, "mem:1")], byte_tokenizer(), "causal", 64)
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refuses this conversation: roles must alternate"):
        encode([Chat(TURNS, "mem:1")], byte_tokenizer(chat=refusing), "causal", 64)
    no_opening = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
    )
    with pytest.raises(DataError, match="does not open the assistant's turn"):
        encode([Chat(TURNS, "mem:1")], byte_tokenizer(chat=no_opening), "causal", 64)
    with pytest.raises(DataError, match="none of the 1 rows"):
        encode([Chat(TURNS[:1], "mem:1")], byte_tokenizer(chat=CHATML), "causal", 64)
    with pytest.raises(DataError, match="needs labelled rows"):
        encode([Chat(TURNS, "mem:1")], byte_tokenizer(chat=CHATML, framed=True), "masked", 64)


# -- batches


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


def test_rows_are_plain_and_picklable():
    import pickle

    encoded = encode([labelled("the film was", 1)] * 2, byte_tokenizer(), "causal", 32)
    assert type(encoded[0]["input_ids"]) is list and encoded[-1] == encoded[0] and len(encoded[0:2]) == 2
    assert pickle.loads(pickle.dumps(encoded))[1] == encoded[1]
    with pytest.raises(IndexError):
        encoded[2]


# -- description


def test_description_shows_what_carries_loss():
    tokenizer = byte_tokenizer(bos=True)
    found = data.describe(encode([labelled("the film was", 1), labelled("It", 0)], tokenizer, "causal", 32), tokenizer)
    assert found["example"] == [("<s>the film was", False), (" great", True)]
    assert found["rows"] == 2 and found["label_tokens"] == 2 and found["length"]["max"] == 5
    assert found["histogram"] == [(1, 1, 0), (2, 2, 0), (3, 3, 1), (4, 4, 0), (5, 5, 1)]
    t5 = sentence_tokenizer()
    shown = data.describe(encode([labelled("the film", 1)], t5, "seq2seq", 32), t5)["example"]
    assert shown == [("the film</s>", False), ("great</s>", True)]
    bert = word_tokenizer()
    shown = data.describe(encode([labelled("the film", 1)], bert, "masked", 32), bert)["example"]
    assert shown == [("[CLS] the film", False), (" great", True), (". [SEP]", False)]
    shown = data.describe(encode([labelled("the film", 1)], bert, "classification", 32), bert)["example"]
    assert shown == [("[CLS] the film [SEP]", False), ("class 1", True)]


# -- real data


def shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [("sst2", 2), ("emotion", 6), ("ag_news", 4), ("alpaca", None), ("tinystories", None), ("dpo_demo", None)],
)
def test_shared_sets(name, words):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared("models", "gpt2-tokenizer"))
    tokenizer.chat_template = CHATML
    overrides = ["task=sst2"] if name == "sst2" else []
    corpus = corpus_of(f"data={shared('data', name)}", *overrides)
    assert (len(corpus.words) if corpus.words else None) == words
    encoded = encode(corpus.examples("train")[:200], tokenizer, "causal")
    assert len(encoded) >= 180 and (words is None) == (encoded.choices is None)
    for row in encoded:
        assert any(label != -100 for label in row["labels"]) and len(row["input_ids"]) <= encoded.max_length


@pytest.mark.slow
def test_real_bert_words():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared("models", "bert-uncased-tokenizer"))
    encoded = encode([labelled("a fine film . It was", 1)], tokenizer, "masked", 32)
    assert tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] a fine film. it was [MASK]. [SEP]"
    assert tokenizer.convert_ids_to_tokens(list(encoded.choices)) == ["terrible", "great"]
