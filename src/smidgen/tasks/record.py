"""ReCoRD: which entity of a news text fills a blank (Zhang et al. 2018, in SuperGLUE), with the prompt of MeZO.

The passage's highlights become a list, whose next item is the query with an entity in its place: all of that sentence
is scored. Training takes the first answer; any of the answers counts as right.
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

    source: str = Field("aps/super_glue:record", description="hub id with its configuration, or a folder")


def build(config: Config) -> AskedTask:
    return AskedTask("record", config.source, ask, free=False)


def ask(row: Row) -> Example:
    """A row as a question with its entities as options. Raises DataError."""
    passage, query = column(row, "passage").replace("@highlight\n", "- ").lstrip(), column(row, "query")
    entities = list(dict.fromkeys(column(row, "entities", list)))
    answers = column(row, "answers", list)
    if not answers or not set(answers) <= set(entities) or "@placeholder" not in query:
        raise DataError(
            f"{row.place}: answers {answers!r} to {query[:60]!r}: it needs a blank '@placeholder', and answers among the "
            "column entities"
        )
    options = tuple(" " + query.replace("@placeholder", entity) for entity in entities)
    right = tuple(entities.index(answer) for answer in dict.fromkeys(answers))
    return Example(
        f"{passage}\n-",
        options[right[0]],
        options=options,
        gold=right[0],
        right=right,
        passage=(0, len(passage)),
    )
