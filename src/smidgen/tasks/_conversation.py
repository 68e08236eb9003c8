"""Conversations out of rows: the turns of a list, the columns of instruction data, and the task that is made of them.

Accepted for one conversation: messages | conversations (from/value) | prompt and completion, as text or as turns |
instruction (with input or context) and output or response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from smidgen.config import ConfigError, DataError, notice
from smidgen.tasks._example import Chat, Pair, Reader, Row, read_folder

__all__ = ["ConversationTask", "answer_of", "text_of", "turns_of", "turns_of_row"]

Turns = tuple[dict[str, Any], ...]

ACCEPTED = "messages | conversations | prompt+completion | instruction(+input)+output | instruction(+context)+response"

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def text_of(row: Row, column: str) -> str:
    """A column as text; a number as its digits. Raises DataError."""
    value = row[column]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{row.place}: '{column}' is {str(value)[:40]!r}: text is needed")


def turns_of(turns: Any, place: str, role_key: str = "role", text_key: str = "content") -> Turns:
    """The turns of a conversation under the names that chat templates read. Raises DataError."""
    messages = []
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: {str(turns)[:40]!r} is no conversation: a list of turns is needed")
    for turn in turns:
        if not isinstance(turn, dict) or role_key not in turn or not isinstance(turn.get(text_key), str):
            raise DataError(f"{place}: turn {str(turn)[:60]!r}: it needs '{role_key}' and '{text_key}', both text")
        role = turn[role_key]
        rest = {key: value for key, value in turn.items() if key not in (role_key, text_key)}
        messages.append({"role": _ROLES.get(role, role), "content": turn[text_key]} | rest)
    return tuple(messages)


def continued(row: Row, first: str, second: str) -> Turns:
    """The turns of column `first` and then those of `second`; text is a turn of the user, or of the assistant.

    Turns of `second` that repeat those of `first` are not doubled.
    """
    before, after = (
        turns_of(row[column], row.place)
        if isinstance(row[column], list)
        else ({"role": role, "content": text_of(row, column)},)
        for column, role in ((first, "user"), (second, "assistant"))
    )
    return after if after[: len(before)] == before else before + after


def turns_of_row(row: Row) -> Turns:
    """The conversation of a row. Raises DataError where it has none of the accepted column sets."""
    columns = {column for column, value in row.items() if value is not None}
    if "messages" in columns:
        return turns_of(row["messages"], row.place)
    if "conversations" in columns:
        return turns_of(row["conversations"], row.place, "from", "value")
    if {"prompt", "completion"} <= columns:
        return continued(row, "prompt", "completion")
    answers = [column for column in ("output", "response") if column in columns]
    if "instruction" in columns and answers:
        given = next((column for column in ("input", "context") if row.get(column)), None)
        asked = text_of(row, "instruction") + ("" if given is None else f"\n\n{text_of(row, given)}")
        return ({"role": "user", "content": asked}, {"role": "assistant", "content": text_of(row, answers[0])})
    pairs = ": preference pairs are --task preference" if "chosen" in columns else ": rename or fill in the columns"
    raise DataError(f"{row.place}: columns {', '.join(row)}: a conversation needs {ACCEPTED}{pairs}")


def answer_of(turns: Turns, place: str) -> int:
    """Place of the last assistant turn. Raises DataError where there is none, or nothing before it."""
    spoken = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not spoken:
        raise DataError(
            f"{place}: no turn of the assistant to learn from (roles: {', '.join(t['role'] for t in turns)}): add one"
        )
    if not any(turn["role"] == "user" for turn in turns[: spoken[-1]]):
        raise DataError(f"{place}: nobody asks before the assistant answers: begin with a turn of the user")
    return spoken[-1]


@dataclass
class ConversationTask:
    """A Task whose rows are conversations, measured by the loss of their answers.

    read_row: a row as a Chat or a Pair, None where its answer is empty. skip_empty: whether such rows are left out.
    beta: of direct preference optimisation, where the rows are pairs; else None.
    """

    name: str
    source: str
    read_row: Callable[[Row], Chat | Pair | None]
    skip_empty: bool = False
    read: Reader = read_folder
    choice: bool = False
    free: bool = False
    judged: bool = False
    beta: float | None = None

    @property
    def words(self) -> None:
        """None: answers are free text."""
        return None

    def examples(self, split: str, kind: str = "causal") -> list[Chat | Pair]:
        """Every row of a split. Raises ConfigError: a kind that does not answer; DataError: a bad row, an empty answer."""
        if kind in ("masked", "classification"):
            raise ConfigError(
                f"task '{self.name}' trains answers, which a model of kind {kind} (an encoder) does not write: use a causal "
                "or seq2seq model"
            )
        rows = self.read(self.source, split)
        found = [(row, self.read_row(row)) for row in rows]
        empty = [row.place for row, made in found if made is None]
        if empty and (not self.skip_empty or len(empty) == len(found)):
            more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
            raise DataError(
                f"{empty[0]}: an answer is empty{more}: remove the row, or leave such rows out with task_args.empty=skip"
            )
        if empty:
            told = f"{len(empty)} of {len(found)} rows with an empty answer are left out, the first is {empty[0]}"
            notice(f"{self.name}, {split}: {told}")
        return [made for _, made in found if made is not None]

    def metric(self, predictions: Sequence[Any], golds: Sequence[Any]) -> dict[str, float]:
        """Nothing: such rows are measured by their loss, or by which answer is preferred."""
        return {}
