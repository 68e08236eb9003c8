"""Formats: local files of public benchmarks as tasks of the evaluation harness (lm_eval), so that nothing is downloaded.

mmlu: folder with dev.jsonl (shots) and test.jsonl; question, subject, choices, answer; one task a subject, 5 shots, accuracy.
gsm8k: train.jsonl (shots) and test.jsonl; question, answer that ends in "#### N"; 8 shots, exact match of the number.
bbh: one file a task; input, target; its first 3 rows are shots, without chains of thought; exact match.
humaneval: test.jsonl; prompt, test, entry_point; no shots; pass@1 of one greedy program, which is executed (`smidgen.sandbox`).
tydiqa: one file a language; context, question, answers; its first row is the shot, the passage is given; F1, exact match.

Shots as in the published evaluations of sparse fine-tuning, except that BBH's are answers alone; the first of their file are
taken. Figures from cut-down files are no official figures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smidgen.config import ConfigError, DataError
from smidgen.sandbox import run_program
from smidgen.tasks import Row
from smidgen.tasks._answers import exact_match, f1
from smidgen.tasks._example import column, read_jsonl

__all__ = ["FORMATS", "local_tasks"]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def local_tasks(name: str, data: str, shots: int | None) -> list[dict[str, Any]]:
    """The harness's tasks of a format, from a folder or file. shots: None: the published number.

    Raises ConfigError for a missing file, DataError for a row without the format's columns.
    """
    path = Path(data).expanduser()
    if not path.exists():
        raise ConfigError(f"there is no file or folder '{data}' for {name}: give --data FOLDER")
    return FORMATS[name](path, shots)


def _task(
    name: str, shown: Sequence[Row], asked: Sequence[Row], shots: int, metrics: Sequence[str], **options: Any
) -> dict[str, Any]:
    """A task: `shown` are the rows that shots may come from."""
    if not asked:
        raise DataError(f"{name}: no rows are left to ask after {len(shown)} shots")
    if shots > len(shown):
        raise ConfigError(f"{name}: {shots} shots and {len(shown)} rows to take them from: give --shots {len(shown)} or fewer")

    def rows(**_: Any) -> dict[str, Any]:
        import datasets

        return {"shots": datasets.Dataset.from_list([dict(row) for row in shown or asked[:1]]),
                "test": datasets.Dataset.from_list([dict(row) for row in asked])}  # fmt: skip

    return {
        "task": name,
        "custom_dataset": rows,
        "test_split": "test",
        "fewshot_split": "shots",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        **options,
    }


def _generated(stop: Sequence[str], tokens: int) -> dict[str, Any]:
    kwargs = {"until": list(stop), "max_gen_toks": tokens, "do_sample": False}
    return {"output_type": "generate_until", "generation_kwargs": kwargs}


def _file(path: Path, name: str) -> list[Row]:
    file = path / name if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"there is no '{file}': the folder needs {name}")
    return read_jsonl(file)


def _files(path: Path) -> list[Path]:
    found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not found:
        raise ConfigError(f"'{path}' holds no .jsonl file: give the folder of the benchmark")
    return found


def _mmlu(path: Path, shots: int | None) -> list[dict[str, Any]]:
    asked = _file(path, "test.jsonl")
    for row in asked:
        if len(column(row, "choices", list)) != 4 or column(row, "answer", int) not in range(4):
            raise DataError(f"{row.place}: four choices and an answer from 0 to 3 are needed")
    shown = _file(path, "dev.jsonl") if path.is_dir() else []
    found = []
    for subject in sorted({column(row, "subject") for row in asked}):
        title = subject.replace("_", " ")
        found.append(
            _task(
                f"mmlu_{subject}",
                [row for row in shown if row["subject"] == subject],
                [row for row in asked if row["subject"] == subject],
                5 if shots is None else shots,
                ["acc"],
                output_type="multiple_choice",
                description=f"The following are multiple choice questions (with answers) about {title}.\n\n",
                doc_to_text=_mmlu_question,
                doc_to_choice=["A", "B", "C", "D"],
                doc_to_target="answer",
            )
        )
    return found


def _mmlu_question(row: Mapping[str, Any]) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
    return "\n".join([row["question"].strip(), *lines, "Answer:"])


def _gsm8k(path: Path, shots: int | None) -> list[dict[str, Any]]:
    asked = _file(path, "test.jsonl")
    for row in asked:
        if number(column(row, "answer")) is None:
            raise DataError(f"{row.place}: the answer ends in no number: '#### N' is needed")
    count = 8 if shots is None else shots
    shown = _file(path, "train.jsonl")[:count] if path.is_dir() and count else []
    return [
        _task(
            "gsm8k", shown, asked, count, ["exact_match"], **_generated(["Question:", "\n\n"], 256),
            doc_to_text=lambda row: f"Question: {row['question']}\nAnswer:", doc_to_target=lambda row: row["answer"],
            process_results=lambda row, texts: {"exact_match": float(number(texts[0]) == number(row["answer"]))},
        )
    ]  # fmt: skip


def number(text: str) -> str | None:
    """The number after '####', else the last one of a text, without commas and trailing zeros; None where there is none."""
    _, marked, after = text.rpartition("####")
    found = _NUMBER.findall(after if marked else text)
    if not found:
        return None
    digits = (found[0] if marked else found[-1]).replace(",", "")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _bbh(path: Path, shots: int | None) -> list[dict[str, Any]]:
    count = 3 if shots is None else shots
    found = []
    for file in _files(path):
        rows = read_jsonl(file)
        for row in rows:
            column(row, "input"), column(row, "target")
        found.append(
            _task(
                f"bbh_{file.stem}", rows[:count], rows[count:], count, ["exact_match"], **_generated(["\nQ:", "\n\n"], 32),
                doc_to_text=lambda row: f"Q: {row['input']}\nA:", doc_to_target=lambda row: row["target"],
                process_results=lambda row, texts: {"exact_match": float(texts[0].strip() == row["target"].strip())},
            )
        )  # fmt: skip
    return found


def _humaneval(path: Path, shots: int | None) -> list[dict[str, Any]]:
    if shots:
        raise ConfigError(f"humaneval: {shots} shots, and its prompts are functions to complete: leave --shots out")
    asked = _file(path, "test.jsonl")
    for row in asked:
        column(row, "prompt"), column(row, "test"), column(row, "entry_point")
    stops = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@"]
    return [
        _task(
            "humaneval", [], asked, 0, ["pass_at_1"], **_generated(stops, 256), unsafe_code=True, target_delimiter="",
            doc_to_text=lambda row: row["prompt"], doc_to_target=lambda row: row["canonical_solution"],
            process_results=lambda row, texts: {"pass_at_1": float(passes(row, texts[0]))},
        )
    ]  # fmt: skip


def passes(row: Mapping[str, Any], completion: str) -> bool:
    """Whether a function's tests pass with this body. Executes it, in the sandbox."""
    return run_program(f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})\n").passed


def _tydiqa(path: Path, shots: int | None) -> list[dict[str, Any]]:
    count = 1 if shots is None else shots
    found = []
    for file in _files(path):
        rows = read_jsonl(file)
        for row in rows:
            column(row, "context"), column(row, "question")
            if not column(row, "answers", dict).get("text"):
                raise DataError(f"{row.place}: no text among its answers")
        found.append(
            _task(
                f"tydiqa_{file.stem.rpartition('.')[2]}", rows[:count], rows[count:], count, ["f1", "exact_match"],
                **_generated(["\n"], 32), doc_to_target=lambda row: row["answers"]["text"][0],
                doc_to_text=lambda row: f"Passage: {row['context']}\nQuestion: {row['question']}\nAnswer:",
                process_results=lambda row, texts: {
                    name: measure(texts[0].strip(), row["answers"]["text"])
                    for name, measure in (("f1", f1), ("exact_match", exact_match))
                },
            )
        )  # fmt: skip
    return found


FORMATS: dict[str, Callable[[Path, int | None], list[dict[str, Any]]]] = {
    "mmlu": _mmlu,
    "gsm8k": _gsm8k,
    "bbh": _bbh,
    "humaneval": _humaneval,
    "tydiqa": _tydiqa,
}
