"""Row, Example, Chat, Pair and Task: what a data file holds, what a model is asked, and the seam between the two.

A Row is a dict that knows where it was read, for error messages. JSON Lines, the format of the packaged sets, is read
here with the standard library alone; `smidgen.rows` reads every other format and replaces the reader of a Task.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from smidgen.config import DataError


class Row(dict[str, Any]):
    """One record of a data source; `place` is ``file:line``, or the number of the record."""

    __slots__ = ("place",)

    def __init__(self, values: Mapping[str, Any], place: str):
        super().__init__(values)
        self.place = place


Reader = Callable[[str, str], Sequence[Row]]  # (source, split) -> rows


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    prompt: text before the answer, without trailing space. answer: text of the answer, with its leading space.
    suffix: text after the answer, seen by masked models only. options: the answers to choose from; None where the
    answer is free text. gold: index of `answer` in `options`. text: the raw fields, for sequence classification.
    golds: accepted answers of a question that is answered by generation. right: indices of every accepted option;
    empty where `gold` is the only one. passage: (start, end) in prompt + answer + suffix, the characters that a row may
    lose where it is too long; None: any at the left of the prompt. image: of a picture's class, what its row holds, and where
    that row stands (`place`).
    """

    prompt: str
    answer: str
    suffix: str = ""
    options: tuple[str, ...] | None = None
    gold: int | None = None
    text: tuple[str, ...] = ()
    golds: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    passage: tuple[int, int] | None = None
    image: Any = None
    place: str = ""


@dataclass(frozen=True)
class Chat:
    """A conversation, rendered by the tokenizer's chat template.

    turns: the assistant's turns that carry loss, 'all' of them or the 'last' one. cut: the end at which a row that is too
    long loses tokens, 'left' (before the last answer) or 'right' (of the conversation; a row without loss is left out).
    """

    messages: tuple[dict[str, Any], ...]
    place: str
    turns: Literal["all", "last"] = "all"
    cut: Literal["left", "right"] = "left"


@dataclass(frozen=True)
class Pair:
    """Two ends of one conversation, of which the first is preferred; the last assistant turn of each is what counts."""

    chosen: Chat
    rejected: Chat


class Task(Protocol):
    """Data only: where rows come from, how they become examples, and what counts as success.

    source: a hub id (``owner/name:config``) or a folder with ``train.jsonl``, ``validation.jsonl``, ``test.jsonl``.
    read: how a split of `source` is read; `smidgen.rows` replaces it to serve the user's own data and every format.
    words: the label words in class order, known once the training rows were read; None where rows have options of
    their own, or none. choice: whether training compares the options of a row (softmax over their scores), rather than
    raise the likelihood of the right answer. free: whether answers are generated; then examples have golds, no options.
    judged: whether there is a metric besides the loss; conversations and pairs have none here.
    """

    name: str
    source: str
    read: Reader
    choice: bool
    free: bool
    judged: bool

    @property
    def words(self) -> tuple[str, ...] | None: ...

    def examples(self, split: str, kind: str = "causal") -> Sequence[Example | Chat | Pair]:
        """Every row of a split; kind: of the model (`smidgen.kinds`), which chooses the prompt."""
        ...

    def metric(self, predictions: Sequence[Any], golds: Sequence[Any]) -> dict[str, float]:
        """Measures of chosen options against right ones (indices); of a free task: of texts against accepted texts."""
        ...


_KINDS = {str: "text", list: "a list", dict: "a mapping of lists", (int, str): "a whole number"}


def column(row: Row, name: str, kind: Any = str) -> Any:
    """A column's value of the kind that a task needs. Raises DataError: the row, the column, and what was found."""
    value = row.get(name)
    if value is None:
        raise DataError(f"{row.place}: no column '{name}' (found: {', '.join(row)}): rename the column that holds it")
    if not isinstance(value, kind):
        raise DataError(f"{row.place}: '{name}' is {str(value)[:40]!r}: {_KINDS[kind]} is needed")
    return value


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a JSON Lines file, blank lines skipped. Raises DataError with file and line for anything else."""
    rows = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{number}: not a line of JSON ({error}): one object a line") from None
                if not isinstance(values, dict):
                    shown = line.strip()[:40]
                    raise DataError(f"{path}:{number}: '{shown}' is not an object: write {{\"column\": value}}")
                rows.append(Row(values, f"{path}:{number}"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}): save the file as UTF-8") from None
    return rows


def read_folder(source: str, split: str) -> list[Row]:
    """Rows of ``source/split.jsonl``."""
    path = Path(source) / f"{split}.jsonl"
    if not path.is_file():
        raise DataError(f"there is no '{path}': a task's folder holds train.jsonl and validation.jsonl")
    return read_jsonl(path)
