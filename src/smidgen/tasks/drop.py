"""DROP: questions that count, compare or add up what a passage says (Dua et al. 2019), generated, as MeZO asks.

Accepted are all of `answers_spans.spans`, training takes the first; an answer of several spans thus counts by the best
of them, as in MeZO, because the hub's rows do not tell such an answer from several annotators' answers. Numbers get no
treatment of their own in F1 and exact match. The question loses its outer white space.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from smidgen.config import DataError
from smidgen.tasks._asked import AskedTask
from smidgen.tasks._example import Example, Row, column

status = "reproduction"

SIZES = (1000, 500, 1000)  # training, dev and test rows of the benchmark


class Config(BaseModel):
    """Options of the task."""

    model_config = ConfigDict(extra="forbid")

    source: str = Field("ucinlp/drop", description="hub id with its configuration, or a folder")


def build(config: Config) -> AskedTask:
    return AskedTask("drop", config.source, ask, free=True)


def ask(row: Row) -> Example:
    """A row as a question with its accepted answers. Raises DataError."""
    passage, question = column(row, "passage"), column(row, "question")
    golds = tuple(dict.fromkeys(str(span) for span in column(row, "answers_spans", dict).get("spans") or ()))
    if not golds:
        raise DataError(f"{row.place}: no spans among its answers_spans: every row needs an accepted answer")
    told = f"Passage: {passage}"
    prompt = f"{told}\nQuestion: {question.strip()}\nAnswer:"
    return Example(prompt, f" {golds[0]}\n", golds=golds, passage=(0, len(told)))
