"""Tasks: templates, label words, classes inferred from training rows, metrics, and the errors of bad rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from smidgen import tasks
from smidgen.config import ConfigError, DataError
from smidgen.tasks import Row, labelled, sst2
from smidgen.tasks._example import read_jsonl
from smidgen.tasks._labelled import LabelledTask, accuracy, macro_f1, parse_template

SHARED = Path(__file__).parents[2] / "shared"


def rows(*records: dict[str, Any]) -> list[Row]:
    return [Row(record, f"mem.jsonl:{number}") for number, record in enumerate(records, 1)]


def task_of(records: Sequence[Row], words: tuple[str, ...] | None = None, template: str | None = None) -> LabelledTask:
    options = {"template": template} if template else {}
    task = labelled.build(labelled.Config(source="mem.jsonl", words=words, **options))
    task.read = lambda source, split: records
    return task


# -- the listing


def test_names_are_the_files_of_the_folder():
    assert tasks.names() == sorted(tasks.names()) and {"labelled", "reviews", "sst2", "topics"} <= set(tasks.names())
    for name in tasks.names():
        module = tasks.get(name)
        assert module.__doc__ and module.status in ("recommended", "reproduction", "experimental")
        assert module.Config.model_config["extra"] == "forbid"
        assert all(field.description for field in module.Config.model_fields.values())


def test_unknown_name_offers_the_nearest():
    with pytest.raises(ConfigError, match="unknown task 'revews': did you mean 'reviews'"):
        tasks.get("revews")
    with pytest.raises(ConfigError, match="--data FILE"):
        tasks.get("zzzz")
    with pytest.raises(ConfigError):
        tasks.get("_labelled")


def test_a_new_file_is_a_new_task(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("status = 'experimental'\n")
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    assert "mine" in tasks.names()
    assert tasks.get("mine").status == "experimental"
    del sys.modules["smidgen.tasks.mine"]


def test_tasks_import_neither_torch_nor_numpy():
    code = (
        "import sys; from smidgen import tasks; [tasks.get(n) for n in tasks.names()]; "
        "print(sorted({'torch', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# -- templates


def test_sst2_example():
    task = sst2.build(sst2.Config())
    task.read = lambda source, split: rows({"sentence": "a fine film . ", "label": 1, "idx": 0})
    (example,) = task.examples("train")
    assert example.prompt == "a fine film . It was" and example.answer == " great" and example.suffix == ""
    assert example.options == (" terrible", " great") and example.gold == 1 and example.text == ("a fine film .",)
    assert example.passage == (0, len("a fine film ."))
    assert task.examples("train", "masked")[0].suffix == " ."


def test_template_with_text_on_both_sides():
    records = rows({"a": "one", "b": "two", "label": "x"}, {"a": "1", "b": "{answer}", "label": "y"})
    examples = task_of(records, template="{a}? {answer}, {b} {{so}}").examples("train")
    assert examples[0].prompt == "one?" and examples[0].suffix == ", two {so}" and examples[0].text == ("one", "two")
    assert examples[1].suffix == ", {answer} {so}"
    (first, _) = task_of(records, template="{a}\nIs it\n{answer}").examples("train")
    assert first.prompt == "one\nIs it\n" and first.answer == "x" and first.suffix == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text} is", "no {answer} slot"),
        ("{text} {answer} {answer}", "slot '{answer}'"),
        ("It is {answer}", "no column"),
        ("{text:>3} {answer}", "slot '{text}'"),
        ("{} {answer}", "slot '{}'"),
        ("{text {answer}", "write {{ for a brace"),
    ],
)
def test_bad_templates(template, message):
    with pytest.raises(ConfigError) as caught:
        parse_template(template)
    assert message in str(caught.value)


# -- labels


def test_string_labels_become_words_in_sorted_order():
    task = task_of(rows({"text": "a", "label": "sport"}, {"text": "b", "label": " art "}, {"text": "c", "label": "sport"}))
    assert task.words == ("art", "sport")
    assert [example.gold for example in task.examples("train")] == [1, 0, 1]
    assert task.examples("train")[1].answer == " art"
    assert task.examples("train")[0].prompt == "a\nLabel:"


def test_classes_come_from_training_rows_and_stay():
    splits = {
        "train": rows({"text": "a", "label": 10}, {"text": "b", "label": 2}),
        "validation": rows({"text": "c", "label": 10}),
        "test": rows({"text": "c", "label": 3}),
    }
    task = task_of([])
    task.read = lambda source, split: splits[split]
    assert task.examples("validation")[0].gold == 1 and task.words == ("2", "10")  # numbers in the order of numbers
    with pytest.raises(DataError, match=r"mem.jsonl:1: label 3 is not among the label words: 2, 10"):
        task.examples("test")


def test_integer_labels_index_the_words():
    records = rows(
        {"text": "a", "label": 1}, {"text": "b", "label": "0"}, {"text": "c", "label": 1.0}, {"text": "d", "label": "no"}
    )
    task = task_of(records, words=("no", "yes"))
    assert [example.answer for example in task.examples("train")] == [" yes", " no", " yes", " no"]


def test_true_and_false_are_labels():
    records = rows({"text": "a", "label": True}, {"text": "b", "label": False})
    assert [example.answer for example in task_of(records, words=("no", "yes")).examples("train")] == [" yes", " no"]
    assert task_of(records).words == ("false", "true")


def test_numbers_as_words_stand_for_themselves():
    task = task_of(rows({"text": "a", "label": 5}, {"text": "b", "label": "1"}), words=("1", "3", "5"))
    assert [example.gold for example in task.examples("train")] == [2, 0]


def test_foreign_label_names_row_value_and_words():
    task = task_of(rows({"text": "a", "label": 0}, {"text": "b", "label": 2}), words=("bad", "good"))
    with pytest.raises(DataError) as caught:
        task.examples("train")
    assert str(caught.value).startswith("mem.jsonl:2: label 2 is not among the label words: bad, good or 0 to 1")
    assert caught.value.exit_code == 5
    with pytest.raises(DataError, match="label -1 is not among"):  # how test sets without labels are published
        task_of(rows({"text": "a", "label": -1}), words=("bad", "good")).examples("train")


@pytest.mark.parametrize("record", [{"text": "b"}, {"text": "b", "label": None}, {"text": "b", "label": ""}])
def test_row_without_label(record):
    for words in (None, ("bad", "good")):
        with pytest.raises(DataError, match=r"mem.jsonl:2: row without 'label' \(found: text"):
            task_of(rows({"text": "a", "label": 1}, record), words=words).examples("train")


def test_other_bad_rows():
    with pytest.raises(DataError, match="regression"):
        task_of(rows({"text": "a", "label": 0.5}), words=("a", "b")).examples("train")
    with pytest.raises(DataError, match=r"no column 'text' \(found: body, label\)"):
        task_of(rows({"body": "a", "label": 0}), words=("a", "b")).examples("train")
    with pytest.raises(DataError, match="two or more"):
        task_of(rows({"text": "a", "label": "x"})).examples("train")
    with pytest.raises(DataError, match="no rows"):
        task_of([], words=("a", "b")).examples("train")
    for words in (("a",), ("a", "a"), ("a", " ")):
        with pytest.raises(ConfigError, match="at least two"):
            task_of([], words=words)
    with pytest.raises(ConfigError, match="--data FILE"):
        labelled.build(labelled.Config())


# -- files


def test_packaged_folder_layout(tmp_path):
    for split in ("train", "validation"):
        records = [{"sentence": f"{split} {label}", "label": label} for label in (0, 1)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    task = sst2.build(sst2.Config(source=str(tmp_path)))
    assert [example.prompt for example in task.examples("validation")] == ["validation 0 It was", "validation 1 It was"]
    with pytest.raises(DataError, match=r"test\.jsonl"):
        task.examples("test")


def test_jsonl_errors_name_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(DataError, match=r"rows.jsonl:3: not a line of JSON"):
        read_jsonl(path)
    path.write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: '\[1\]' is not an object"):
        read_jsonl(path)
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="UTF-8"):
        read_jsonl(path)
    path.write_text('\ufeff{"text": "\u2028a"}\n', encoding="utf-8")
    assert read_jsonl(path)[0]["text"] == "\u2028a" and read_jsonl(path)[0].place == f"{path}:1"


@pytest.mark.parametrize("name", ["reviews", "topics"])
def test_embedded_sets(name):
    module = tasks.get(name)
    task = module.build(module.Config())
    if not Path(task.source).is_dir():
        pytest.skip("the embedded sets are not made yet")
    train = task.examples("train")
    assert {example.gold for example in train} == set(range(len(task.words)))
    for split in ("validation", "test"):
        held_out = {example.text for example in task.examples(split)}
        assert held_out and not held_out & {example.text for example in train}


@pytest.mark.slow
def test_real_sst2():
    if not (SHARED / "data" / "sst2").is_dir():
        pytest.skip(f"no {SHARED / 'data' / 'sst2'}")
    task = sst2.build(sst2.Config(source=str(SHARED / "data" / "sst2")))
    assert len(task.examples("train")) == 3000 and len(task.examples("validation")) == 872


# -- metrics


def test_accuracy_and_macro_f1_by_hand():
    golds, predictions = [0, 0, 0, 1, 2], [0, 0, 1, 1, 0]
    assert accuracy(predictions, golds) == 3 / 5
    f1 = [2 * 2 / (3 + 3), 2 * 1 / (2 + 1), 0.0]
    assert macro_f1(predictions, golds) == pytest.approx(sum(f1) / 3, abs=1e-15)
    assert task_of([], words=("a", "b")).metric([1], [1]) == {"accuracy": 1.0, "macro_f1": 1.0}
    with pytest.raises(ValueError, match="as many"):
        accuracy([], [])
    with pytest.raises(ValueError, match="as many"):
        accuracy([1], [1, 2])
