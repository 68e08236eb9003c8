"""The evaluation harness over local files: formats, scores, shots, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smidgen.config import ConfigError, DataError
from smidgen.formats import FORMATS, local_tasks, number, passes
from smidgen.harness import harness
from test_models import bert_masked, llama

LINES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "mmlu": {
        name: [
            {"question": f"{k}?", "subject": f"s{k % 2}", "choices": ["a", "b", "c", "d"], "answer": k % 4} for k in range(n)
        ]
        for name, n in (("dev.jsonl", 4), ("test.jsonl", 6))
    },
    "gsm8k": {
        name: [{"question": f"{k}+{k}?", "answer": f"It is {k}+{k}.\n#### {2 * k}"} for k in range(3)]
        for name in ("train.jsonl", "test.jsonl")
    },
    "bbh": {name: [{"input": f"not {k}", "target": "True"} for k in range(5)] for name in ("boolean.jsonl", "navigate.jsonl")},
    "humaneval": {
        "test.jsonl": [
            {
                "prompt": "def twice(x):\n",
                "canonical_solution": "    return 2 * x\n",
                "test": "def check(f):\n    assert f(2) == 4\n",
                "entry_point": "twice",
            }
        ]
        * 2
    },
    "tydiqa": {
        "validation.de.jsonl": [{"context": "Es ist rot.", "question": "Was?", "answers": {"text": ["rot"]}} for _ in range(3)]
    },
}


def folder(path: Any, name: str) -> str:
    (path / name).mkdir()
    for file, rows in LINES[name].items():
        (path / name / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path / name)


@pytest.mark.parametrize(
    ("text", "found"),
    [("a 3 b\n#### 1,200", "1200"), ("so 4 and 5.50.", "5.5"), ("#### -7 apples, not 8", "-7"), ("none", None), ("10", "10")],
)
def test_numbers(text, found):
    assert number(text) == found


def test_a_program_passes_by_its_tests():
    row = LINES["humaneval"]["test.jsonl"][0]
    assert passes(row, row["canonical_solution"]) and not passes(row, "    return x\n")


@pytest.mark.slow  # lm_eval's own import takes seconds
def test_every_format_runs_on_a_tiny_model(tmp_path):
    pytest.importorskip("lm_eval")
    model = str(llama(tmp_path / "model"))
    measures = {"mmlu": "acc", "gsm8k": "exact_match", "bbh": "exact_match", "humaneval": "pass_at_1", "tydiqa": "f1"}
    assert measures.keys() == FORMATS.keys()
    for name, measure in measures.items():
        data = folder(tmp_path, name)
        found = harness(model, [name], data=data, shots=0 if name in ("gsm8k", "humaneval") else 1, limit=2, run_code=True)
        assert all(0 <= values[measure] <= 1 for values in found["tasks"].values())
        assert all(count == 2 for count in found["rows"].values())
    assert found["tasks"].keys() == {"tydiqa_de"}


def test_shots_come_before_the_question_and_are_not_asked(tmp_path):
    first, second = local_tasks("bbh", folder(tmp_path, "bbh"), 2)
    rows = first["custom_dataset"]()
    assert (first["task"], second["task"]) == ("bbh_boolean", "bbh_navigate")
    assert rows["shots"]["input"][:] == ["not 0", "not 1"] and len(rows["test"]) == 3


def test_what_is_refused(tmp_path, monkeypatch):
    model = "embedded"
    with pytest.raises(ConfigError, match="executes programs that the model writes: allow it with --run-code"):
        harness(model, ["humaneval"], data=folder(tmp_path, "humaneval"))
    with pytest.raises(ConfigError, match="did you mean 'mmlu'"):
        harness(model, ["mmlo"], data=str(tmp_path))
    with pytest.raises(ConfigError, match="9 shots and 2 rows"):
        local_tasks("mmlu", folder(tmp_path, "mmlu"), 9)
    with pytest.raises(ConfigError, match="there is no file or folder"):
        local_tasks("gsm8k", str(tmp_path / "absent"), None)
    (tmp_path / "mmlu" / "test.jsonl").write_text('{"question": "q", "subject": "s", "choices": ["a"], "answer": 0}\n')
    with pytest.raises(DataError, match=r"test\.jsonl:1: four choices"):
        local_tasks("mmlu", str(tmp_path / "mmlu"), 1)
    with pytest.raises(ConfigError, match="harness compares and generates answers"):
        harness(str(bert_masked(tmp_path / "encoder")), ["gsm8k"], data=folder(tmp_path, "gsm8k"), shots=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'smidgen\\[eval\\]'"):
        harness(model, ["mmlu"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmlu", "gsm8k", "bbh", "humaneval"])
def test_shared_sets_are_read(name):
    data = Path(__file__).parents[2] / "shared" / "data" / name
    if not data.exists():
        pytest.skip(f"{data} is absent")
    found = local_tasks(name, str(data), None)
    assert len(found) == {"mmlu": 12, "gsm8k": 1, "bbh": 18, "humaneval": 1}[name]
    assert all(len(task["custom_dataset"]()["test"]) for task in found)
    if name == "humaneval":
        rows = found[0]["custom_dataset"]()["test"]
        assert all(passes(row, row["canonical_solution"]) for row in rows)
