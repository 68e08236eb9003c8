"""SQuAD 1.1: questions answered by a span of a paragraph (Rajpurkar et al. 2016), generated, with the prompt of MeZO.

Training takes the first answer and the line break after it; F1 and exact match take the best of all. The question loses
its outer white space. Too long a row loses the left of title and context.
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

    source: str = Field("rajpurkar/squad", description="hub id with its configuration, or a folder")


def build(config: Config) -> AskedTask:
    return AskedTask("squad", config.source, ask, free=True)


def ask(row: Row) -> Example:
    """A row as a question with its accepted answers. Raises DataError."""
    title, context, question = (column(row, name) for name in ("title", "context", "question"))
    golds = tuple(dict.fromkeys(column(row, "answers", dict).get("text") or ()))
    if not golds:
        raise DataError(f"{row.place}: no text among its answers: every row needs an accepted answer (SQuAD 1.1 has them)")
    told = f"Title: {title}\nContext: {context}"
    prompt = f"{told}\nQuestion: {question.strip()}\nAnswer:"
    return Example(prompt, f" {golds[0]}\n", golds=golds, passage=(0, len(told)))
