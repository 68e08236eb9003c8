"""Data: what a configuration reads, rows recognised by their columns, and the errors of bad ones."""

from __future__ import annotations

from typing import Any

import pytest

from smidgen.config import ConfigError, DataError, Source
from smidgen.config_file import load
from smidgen.data import Corpus, open_corpus, to_examples
from smidgen.encode import encode
from smidgen.rows import read_rows
from smidgen.tasks import Example
from texts import CHATML, rows, shared, write


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
    overrides = ["task=sst2"] if name == "sst2" else []
    corpus = corpus_of(f"data={shared('data', name)}", *overrides)
    assert (len(corpus.words) if corpus.words else None) == words
    encoded = encode(corpus.examples("train")[:200], tokenizer, "causal")
    assert len(encoded) >= 180 and (words is None) == (encoded.choices is None)
    for row in encoded:
        assert any(label != -100 for label in row["labels"]) and len(row["input_ids"]) <= encoded.max_length
