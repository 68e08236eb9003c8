"""COPA: which of two sentences is the cause or the effect of a premise (in SuperGLUE), with the prompt of MeZO.

The premise loses its full stop and is joined by "so" or "because" to a choice, whose first word is lower-cased unless it
is "I". Both are scored. Nothing of the premise is cut. `prompt: false` joins the two by a space. Sizes: all of the 400.
"""

from __future__ import annotations

import functools

from pydantic import BaseModel, ConfigDict, Field

from smidgen.config import DataError
from smidgen.tasks._asked import AskedTask
from smidgen.tasks._example import Example, Row, column

status = "reproduction"

SIZES = (300, 100, 100)  # training, dev and test rows of the benchmark

CONJUNCTION = {"effect": "so", "cause": "because"}


class Config(BaseModel):
    """Options of the task."""

    model_config = ConfigDict(extra="forbid")

    source: str = Field("aps/super_glue:copa", description="hub id with its configuration, or a folder")
    prompt: bool = Field(True, description="whether the task is put in words; false: the text and the label word alone")


def build(config: Config) -> AskedTask:
    return AskedTask("copa", config.source, functools.partial(ask, joined=config.prompt), free=False)


def ask(row: Row, *, joined: bool = True) -> Example:
    """A row as a question with two options of its own. Raises DataError."""
    premise = column(row, "premise").rstrip().removesuffix(".").lstrip()
    relation, label = column(row, "question"), str(column(row, "label", (int, str)))
    if relation not in CONJUNCTION or label not in ("0", "1"):
        raise DataError(f"{row.place}: question {relation!r}, label {label!r}: it needs cause or effect, and 0 or 1")
    options = tuple(" " + _uncapitalised(column(row, name)) for name in ("choice1", "choice2"))
    prompt = f"{premise} {CONJUNCTION[relation]}" if joined else premise.rstrip(" ")
    gold = int(label)
    return Example(prompt, options[gold], options=options, gold=gold, passage=(0, 0))


def _uncapitalised(choice: str) -> str:
    first, space, rest = choice.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest
