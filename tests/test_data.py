"""Data: what a configuration reads, rows recognised by their columns, and the errors of bad ones."""

from __future__ import annotations

from typing import Any

import pytest

from smidgen import tasks
from smidgen.config import ConfigError, DataError, Source
from smidgen.config_file import load
from smidgen.data import Corpus, open_corpus, to_examples
from smidgen.encode import encode
from smidgen.rows import read_rows
from smidgen.splits import draw
from smidgen.tasks import Example
from texts import CHATML, byte_tokenizer, rows, shared, write


def corpus_of(*overrides: str, notify: Any = lambda line: None) -> Corpus:
    return open_corpus(load(None, list(overrides)), notify=notify)


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


# -- a benchmark's rows


def test_benchmark_split_has_the_published_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.get("sst2"), "SIZES", (20, 10, 5))
    write(tmp_path / "train.jsonl", *({"sentence": f"t{i}", "label": i % 2} for i in range(60)))
    write(tmp_path / "validation.jsonl", *({"sentence": f"v{i}", "label": i % 2} for i in range(8)))
    write(tmp_path / "test.jsonl", {"sentence": "u", "label": -1})
    lines: list[str] = []

    def drawn(*overrides: str) -> list[list[str]]:
        corpus = corpus_of("task=sst2", f"data={tmp_path}", "benchmark_split=true", *overrides, notify=lines.append)
        assert corpus.has("test")
        return [[example.prompt for example in corpus.examples(split)] for split in ("train", "dev", "test")]

    train, dev, test = drawn()
    assert (len(train), len(dev), len(test)) == (20, 10, 5)
    assert not set(train) & set(dev) and all(p.startswith("t") for p in train + dev) and all(p.startswith("v") for p in test)
    assert "20 rows to train on and 10 dev rows, drawn from 60 training rows" in lines
    assert "the test rows are 5 of the 8 validation rows" in lines
    assert drawn() == [train, dev, test]
    other = drawn("seed=1")
    assert other[0] != train and other[1] != dev and other[2] == test  # every seed is tested on the same rows
    assert [len(part) for part in drawn("train_rows=4", "dev_rows=3", "test_rows=2")] == [4, 3, 2]
    monkeypatch.setattr(tasks.get("sst2"), "SIZES", (54, 500, 5))
    lines.clear()
    assert [len(part) for part in drawn()] == [6, 54, 5]
    assert "6 rows to train on and 54 dev rows, drawn from 60 training rows, fewer than the published 54 and 500" in lines


def test_equal_rows_are_in_one_part_only():
    records = rows(*({"text": f"t{i % 7}"} for i in range(70)))
    for seed in range(5):
        train, dev = draw(records, 25, 25, seed)
        assert len(train) == 25 and not {row["text"] for row in train} & {row["text"] for row in dev}


def test_k_rows_of_every_class_for_training_and_for_dev(tmp_path):
    write(tmp_path / "train.jsonl", *({"sentence": f"t{i}", "label": int(i % 4 == 0)} for i in range(60)))
    write(tmp_path / "validation.jsonl", *({"sentence": f"v{i}", "label": i % 2} for i in range(8)))

    def drawn(*more):
        corpus = corpus_of("task=sst2", f"data={tmp_path}", "k_shot=5", *more)
        return [corpus.examples(split) for split in ("train", "validation", "test")]

    train, dev, test = drawn()
    for part in (train, dev):
        assert sorted(e.gold for e in part) == [0] * 5 + [1] * 5
    assert not {e.prompt for e in train} & {e.prompt for e in dev} and len(test) == 8
    assert drawn() == [train, dev, test]
    assert drawn("seed=1")[0] != train and drawn("seed=1")[2] == test
    with pytest.raises(DataError, match=r"k_shot = 8 needs 16 rows of every class.*label 1 has 15: take at most 7"):
        corpus_of("task=sst2", f"data={tmp_path}", "k_shot=8").examples("train")
    with pytest.raises(ConfigError, match="k_shot and benchmark_split both say"):
        drawn("benchmark_split=true")
    with pytest.raises(ConfigError, match="the task 'copa' has no classes"):
        corpus_of("task=copa", f"data={tmp_path}", "k_shot=2")
    own = write(tmp_path / "own.jsonl", *({"text": f"t{i}", "label": "ab"[i % 2]} for i in range(12)))
    assert [len(corpus_of(f"data={own}", "k_shot=2").examples(split)) for split in ("train", "validation")] == [4, 4]


def test_benchmark_split_errors(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a", "label": 0}, {"text": "b", "label": 1})
    with pytest.raises(ConfigError, match="no numbers of rows are published for 'labelled': ag_news, boolq"):
        corpus_of(f"data={path}", "benchmark_split=true")
    with pytest.raises(ConfigError, match="both say what the dev rows are"):
        corpus_of("task=sst2", f"data={path}", f"eval_data={path}", "benchmark_split=true")
    free = write(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(ConfigError, match="benchmark_split is for tasks"):
        corpus_of(f"data={free}", "benchmark_split=true")


def test_test_rows_without_answers_are_no_test_split(tmp_path):
    write(tmp_path / "train.jsonl", {"sentence": "a", "label": 0})
    write(tmp_path / "validation.jsonl", {"sentence": "a", "label": 0})
    hidden = write(tmp_path / "test.jsonl", {"sentence": "u", "label": -1}, {"sentence": "w", "label": -1})
    lines: list[str] = []
    assert not corpus_of("task=sst2", f"data={tmp_path}", notify=lines.append).has("test")
    assert lines == ["sst2: the test rows have no answers and are left out"]
    write(hidden, {"sentence": "u", "label": 1})
    assert corpus_of("task=sst2", f"data={tmp_path}").has("test")


# -- conversations around prompts


def test_chat_wraps_a_tasks_prompts(tmp_path):
    path = write(tmp_path / "a.jsonl", {"sentence": "fine", "label": 1}, {"sentence": "bad", "label": 0})
    corpus = corpus_of("task=sst2", f"data={path}", f"eval_data={path}", "chat=vicuna")
    (first, _) = corpus.examples("train")
    assert first.prompt.endswith("answers to the user's questions. USER: fine It was ASSISTANT:") and first.answer == " great"
    model = corpus_of("task=sst2", f"data={path}", f"eval_data={path}", "chat=model")
    turned = model.examples("train", "causal", byte_tokenizer(chat=CHATML))[0]
    assert turned.prompt == "<|im_start|>user\nfine It was<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ConfigError, match="no chat template"):
        model.examples("train", "causal", byte_tokenizer())
    with pytest.raises(ConfigError, match="a masked model has no conversations"):
        model.examples("train", "masked", byte_tokenizer())
    turns = write(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]})
    with pytest.raises(ConfigError, match="are conversations already"):
        corpus_of(f"data={turns}", f"eval_data={turns}", "chat=vicuna").examples("train")


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


# -- real data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [("sst2", 2), ("emotion", 6), ("ag_news", 4), ("alpaca", None), ("tinystories", None), ("dpo_demo", None)],
)
def test_shared_sets(name, words):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared("models", "gpt2-tokenizer"))
    tokenizer.chat_template = CHATML
    overrides = [f"task={name}"] if name in tasks.names() else []
    corpus = corpus_of(f"data={shared('data', name)}", *overrides)
    assert (len(corpus.words) if corpus.words else None) == words
    encoded = encode(corpus.examples("train")[:200], tokenizer, "causal")
    assert len(encoded) >= 180 and (words is None) == (encoded.choices is None)
    for row in encoded:
        assert any(label != -100 for label in row["labels"]) and len(row["input_ids"]) <= encoded.max_length
