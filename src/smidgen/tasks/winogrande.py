"""WinoGrande: which of two names fills a blank (Sakaguchi et al. 2020), scored as ZO-Bench scores it.

The prompt is the text before "_"; an option is a name with the text after it, so the text after the blank is scored as
well ("partial evaluation"). Nothing is cut. Default rows: the medium training set.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from smidgen.config import DataError
from smidgen.tasks._asked import AskedTask
from smidgen.tasks._example import Example, Row, column

status = "reproduction"

SIZES = (1000, 100, 1000)  # training, dev and test rows of the benchmark


class Config(BaseModel):
    """Options of the task."""

    model_config = ConfigDict(extra="forbid")

    source: str = Field("allenai/winogrande:winogrande_m", description="hub id with its configuration, or a folder")


def build(config: Config) -> AskedTask:
    return AskedTask("winogrande", config.source, ask, free=False)


def ask(row: Row) -> Example:
    """A row as a question with two options of its own. Raises DataError."""
    sentence, answer = column(row, "sentence"), str(column(row, "answer", (str, int)))
    before, blank, after = sentence.lstrip().partition("_")
    if not blank or "_" in after or answer not in ("1", "2"):
        raise DataError(f"{row.place}: answer {answer!r} to {sentence[:60]!r}: it needs one blank '_', and an answer 1 or 2")
    prompt = before.rstrip(" ")
    options = tuple(before[len(prompt) :] + column(row, name) + after for name in ("option1", "option2"))
    gold = int(answer) - 1
    return Example(prompt, options[gold], options=options, gold=gold, passage=(0, 0))
