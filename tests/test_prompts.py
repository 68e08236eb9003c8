"""Prompts of the benchmark's tasks against tests/golden/prompts.json, written by hand from the published templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smidgen import tasks
from smidgen.config import ConfigError, DataError
from smidgen.config_file import load
from smidgen.data import open_corpus
from smidgen.encode import encode
from smidgen.listing import describe_task, list_tasks
from smidgen.tasks import Example, Row
from smidgen.tasks._answers import exact_match, f1
from texts import SHARED, shared, write

GOLDEN = json.loads((Path(__file__).parent / "golden" / "prompts.json").read_text(encoding="utf-8"))
BENCHMARK = sorted(set(tasks.names()) - {"labelled", "images", "reviews", "topics", "instruct", "preference"})
ROWS = {entry["task"]: entry["row"] for entry in reversed(GOLDEN)}  # the first row of each task
FREE, OWN_OPTIONS = ("drop", "squad"), ("copa", "record", "winogrande")


def example_of(name: str, row: dict[str, Any], kind: str = "causal", **options: Any) -> Example:
    module = tasks.get(name)
    task = module.build(module.Config(**options))
    task.read = lambda source, split: [Row(row, "mem:1")]
    (example,) = task.examples("train", kind)
    return example


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda e: "-".join([e["task"], e["kind"], *map(str, e["args"].values())]))
def test_prompt_is_byte_equal(entry):
    found = example_of(entry["task"], entry["row"], entry["kind"], **entry["args"])
    options = None if entry["options"] is None else tuple(entry["options"])
    assert (found.prompt, found.answer, found.suffix) == (entry["prompt"], entry["answer"], entry["suffix"])
    assert (found.options, found.gold) == (options, entry["gold"])
    assert (found.right, found.golds) == (tuple(entry.get("right", ())), tuple(entry.get("golds", ())))


def test_every_task_has_a_golden_prompt_of_each_kind():
    shown = {(entry["task"], entry["kind"]) for entry in GOLDEN}
    assert {name for name, _ in shown} == set(BENCHMARK) and len(BENCHMARK) == 20
    for name in BENCHMARK:
        assert ((name, "masked") in shown) == (name not in FREE + OWN_OPTIONS)


@pytest.mark.parametrize("name", BENCHMARK)
def test_what_a_task_says_of_itself(name):
    module = tasks.get(name)
    task = module.build(module.Config())
    assert task.name == name and len(module.SIZES) == 3 and all(size > 0 for size in module.SIZES)
    assert task.free == (name in FREE) and task.choice == (name not in FREE + OWN_OPTIONS)
    assert (task.words is None) == (name in FREE + OWN_OPTIONS)
    if task.words is None:
        for kind, reason in (("masked", "no prompt for a masked model"), ("classification", "no classes")):
            with pytest.raises(ConfigError, match=f"task '{name}' has {reason}.*use a causal or seq2seq model"):
                task.examples("train", kind)
    else:
        text = example_of(name, ROWS[name], "classification").text
        assert text and all(isinstance(part, str) for part in text)
        assert text == example_of(name, ROWS[name], "masked").text or name in ("trec", "ag_news")


@pytest.mark.parametrize("name", BENCHMARK)
def test_a_missing_field_names_row_and_field(name):
    shown = set(example_columns(name))
    assert shown
    for gone in sorted(shown):
        row = {key: value for key, value in ROWS[name].items() if key != gone}
        with pytest.raises(DataError, match=rf"mem:1: .*'{gone}'.*\(found: ") as caught:
            example_of(name, row)
        assert all(key in str(caught.value) for key in row) and caught.value.exit_code == 5


def example_columns(name: str) -> list[str]:
    """Columns that a task's rows must have."""
    optional = {"idx", "title", "id", "query_id", "label_text", "label_coarse", "fine_label", "span1_index", "span2_index"}
    optional |= {"start1", "start2", "end1", "end2"}
    return [key for key in ROWS[name] if key not in optional]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("copa", {"question": "reason"}, "it needs cause or effect"),
        ("copa", {"label": -1}, "it needs cause or effect, and 0 or 1"),
        ("winogrande", {"answer": ""}, "an answer 1 or 2"),
        ("winogrande", {"sentence": "no blank here"}, "one blank '_'"),
        ("record", {"answers": ["nobody"]}, "answers among the column entities"),
        ("record", {"answers": []}, "answers among"),
        ("record", {"entities": "Chelsea"}, "a list is needed"),
        ("record", {"query": "no blank"}, "it needs a blank '@placeholder'"),
        ("squad", {"answers": {"text": [], "answer_start": []}}, "every row needs an accepted answer"),
        ("squad", {"answers": ["a"]}, "a mapping of lists is needed"),
        ("squad", {"context": ["a"]}, "text is needed"),
        ("drop", {"answers_spans": {"types": []}}, "no spans"),
        ("rte", {"label": 2}, "label 2 is not among the label words: Yes, No or 0 to 1"),
        ("trec", {"coarse_label": "WHAT"}, "label 'WHAT' is not among the label words"),
    ],
)
def test_bad_rows(name, change, message):
    with pytest.raises(DataError) as caught:
        example_of(name, ROWS[name] | change)
    assert str(caught.value).startswith("mem:1: ") and message in str(caught.value)


def test_a_template_of_ones_own_is_for_both_kinds():
    row = {"premise": " It rains. ", "hypothesis": "Wet", "label": 0}
    causal = example_of("rte", row, template="{premise} So {hypothesis}? {answer}")
    assert causal.prompt == "It rains. So Wet?" and causal.options == (" Yes", " No")
    assert example_of("rte", row, "masked", template="{premise} So {hypothesis}? {answer}").prompt == causal.prompt


def test_a_line_break_or_nothing_before_the_answer_is_kept():
    row = {"sentence": "fine", "label": 1}
    assert example_of("sst2", row, template="{sentence}\n{answer}").prompt == "fine\n"
    assert example_of("sst2", row, template="{sentence}\n{answer}").answer == "great"
    assert example_of("sst2", row, template="{sentence}={answer}").answer == "great"
    assert example_of("sst2", row, template="{answer}: {sentence}").answer == " great"


def test_without_task_alignment_a_masked_model_is_refused():
    with pytest.raises(ConfigError, match="no prompt for a masked model here: use --kind classification"):
        example_of("sst2", ROWS["sst2"], "masked", prompt=False)


def test_snli_leaves_out_rows_without_a_label():
    task = tasks.get("snli").build(tasks.get("snli").Config())
    task.read = lambda source, split: [Row(ROWS["snli"] | {"label": label}, "mem:1") for label in (0, -1, 2)]
    assert [example.gold for example in task.examples("train")] == [0, 2]
    task.read = lambda source, split: [Row(ROWS["snli"] | {"label": -1}, "mem:1")]
    with pytest.raises(DataError, match="no rows with a label"):
        task.examples("train")


# -- free-text answers


@pytest.mark.parametrize(
    ("text", "golds", "expected"),
    [
        ("The Mamluks of Egypt.", ["the mamluks of egypt"], (1.0, 1.0)),
        ("Mamluks", ["the Mamluks of Egypt"], (2 * 1 / (1 + 3), 0.0)),
        ("Mamluks", ["the Mamluks of Egypt", "mamluks!"], (1.0, 1.0)),
        ("one one two", ["one two two"], (2 * 2 / (3 + 3), 0.0)),  # repeated words count as often as on both sides
        ("3", ["3.0"], (0.0, 0.0)),  # "30": numbers get no treatment of their own
        ("", ["a"], (1.0, 1.0)),  # both empty after normalisation
        ("", ["x"], (0.0, 0.0)),
        ("an apple", ["Apple"], (1.0, 1.0)),
    ],
)
def test_f1_and_exact_match(text, golds, expected):
    assert (f1(text, golds), exact_match(text, golds)) == expected


def test_metrics_of_the_forms():
    def metric(name: str) -> Any:
        return tasks.get(name).build(tasks.get(name).Config()).metric

    assert metric("copa")([0, 1], [0, 0]) == {"accuracy": 0.5}
    assert metric("squad")(["a cat", "dog"], [("cat",), ("cat", "big dog")]) == {"f1": (1 + 2 / 3) / 2, "exact_match": 0.5}
    assert metric("multirc")([1, 0], [1, 1])["accuracy"] == 0.5
    with pytest.raises(ValueError, match="as many"):
        metric("drop")([], [])


# -- options of a run


def corpus_of(*overrides: str) -> Any:
    return open_corpus(load(None, list(overrides)), notify=lambda line: None)


def test_task_args(tmp_path):
    write(tmp_path / "train.jsonl", ROWS["boolq"])
    plain = corpus_of("task=boolq", f"data={tmp_path}").examples("train")[0]
    old = corpus_of("task=boolq", f"data={tmp_path}", "task_args.compat_version=0").examples("train")[0]
    assert plain.prompt == old.prompt + "\n" and old.answer == " Yes"
    with pytest.raises(ConfigError, match="compat_version = 3"):
        corpus_of("task=boolq", f"data={tmp_path}", "task_args.compat_version=3")
    with pytest.raises(ConfigError, match=r"'boolq' has no option 'prompt'.*'prompt' is an option of copa, rte, sst2"):
        corpus_of("task=boolq", f"data={tmp_path}", "task_args.prompt=false")
    with pytest.raises(ConfigError, match=r"task_args.source = 'x': give it as `data`, once"):
        corpus_of("task=boolq", "task_args.source=x")
    with pytest.raises(ConfigError, match="give it as `template`, once"):
        corpus_of("task=boolq", f"data={tmp_path}", "template={passage} {answer}", "task_args.template={answer}")


def test_the_listing_describes_a_task():
    found = describe_task("boolq")
    assert found["sizes"] == (1000, 500, 1000) and "with the prompt of MeZO" in found["text"]
    assert [option["name"] for option in found["options"]] == ["template", "words", "source", "compat_version"]
    assert describe_task("sst2")["prompts"] == {
        "causal": "{sentence} It was {answer}",
        "masked": "{sentence} It was {answer} .",
    }
    assert describe_task("reviews")["sizes"] is None and describe_task("copa")["prompts"] == {}
    assert {task["name"] for task in list_tasks()} == set(tasks.names())


# -- real data


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "kind"), [("bert-uncased-tokenizer", "masked"), ("gpt2-tokenizer", "causal")])
def test_label_words_are_single_tokens_of_real_vocabularies(folder, kind):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared("models", folder))
    for entry in GOLDEN:
        if entry["kind"] == kind and entry["task"] not in FREE + OWN_OPTIONS:
            encoded = encode([example_of(entry["task"], entry["row"], kind, **entry["args"])], tokenizer, kind, 512)
            assert encoded.choices is not None and len(encoded.choices) == len(entry["options"])


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARK)
def test_real_rows(name):
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    kinds = ["causal"] if name in FREE + OWN_OPTIONS else ["causal", "masked", "classification"]
    for file in sorted(folder.glob("*.jsonl")):
        split = file.stem
        if split not in ("train", "validation", "test"):
            continue
        for kind in kinds:
            corpus = corpus_of(f"task={name}", f"data={folder}")
            examples = corpus.task.examples(split, kind)
            lines = file.read_text(encoding="utf-8").count("\n")
            assert len(examples) == lines
            for example in examples:
                assert example.options is None or example.answer == example.options[example.gold]
                assert example.golds or (example.options and len(set(example.options)) == len(example.options))
                assert example.prompt == example.prompt.rstrip(" ").lstrip() and (example.prompt or kind == "masked")
