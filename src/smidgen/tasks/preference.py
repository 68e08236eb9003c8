"""Preference: pairs of answers to one prompt, trained by direct preference optimisation (DPO).

Source: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", 2023 (arXiv
2305.18290), equation 7, per pair (x, y_w, y_l):

    L = -log sigmoid(beta (log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)))

Rows: prompt, chosen and rejected, each text or turns; the prompt may stand in both as turns instead. The reference is the
model before tuning, whose log-likelihoods of all pairs are computed once, at the start: no second model. Cost of a step: two
forwards' worth of rows. Prompts carry no loss; both answers are in the model's chat template. It does not: IPO, KTO,
label smoothing, length normalisation.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from smidgen.config import DataError
from smidgen.tasks._conversation import ConversationTask, Turns, answer_of, continued, turns_of
from smidgen.tasks._example import Chat, Pair, Row

status = "experimental"


class Config(BaseModel):
    """Options of the task."""

    model_config = ConfigDict(extra="forbid")

    source: str = Field("", description="file, folder or hub id; usually given as `data`")
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference model; the paper's default")
    empty: Literal["refuse", "skip"] = Field("refuse", description="what is done with a pair that has an empty answer")


def build(config: Config) -> ConversationTask:
    return ConversationTask("preference", config.source, read_pair, config.empty == "skip", beta=config.beta)


def read_pair(row: Row) -> Pair | None:
    """A row as a pair; None where an answer is empty. Raises DataError."""
    ends = [_end(row, column) for column in ("chosen", "rejected")]
    (first, a), (second, b) = [(turns[: answer_of(turns, row.place)], turns) for turns in ends]
    if first != second:
        raise DataError(f"{row.place}: 'chosen' and 'rejected' answer different prompts: give the shared one as 'prompt'")
    answers = [turns[len(first)]["content"] for turns in (a, b)]
    if not all(answer.strip() for answer in answers):
        return None
    if answers[0] == answers[1]:
        raise DataError(f"{row.place}: 'chosen' and 'rejected' are the same answer: remove the row")
    whole = (a[: len(first) + 1], b[: len(first) + 1])
    return Pair(*(Chat(turns, row.place, "last", cut="right") for turns in whole))


def _end(row: Row, column: str) -> Turns:
    """The conversation that ends in one of the two answers."""
    if row.get(column) is None:
        raise DataError(f"{row.place}: no '{column}' (found: {', '.join(row)}): a pair needs prompt, chosen and rejected")
    if row.get("prompt") is not None:
        return continued(row, "prompt", column)
    if isinstance(row[column], list):
        return turns_of(row[column], row.place)
    raise DataError(f"{row.place}: '{column}' is text and there is no 'prompt': a pair needs prompt, chosen and rejected")
