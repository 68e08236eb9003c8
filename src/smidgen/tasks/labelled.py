"""Labelled: any classification file with a text and a label column.

String labels are their own label words. Integer labels take `words`, or become their digits (class indices for a
sequence classifier). Classes are inferred from the training rows, sorted, and then fixed.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from smidgen.config import ConfigError
from smidgen.tasks._labelled import LabelledTask, own

status = "experimental"


class Config(BaseModel):
    """Options of the task."""

    model_config = ConfigDict(extra="forbid")

    template: str = Field("{text}\nLabel: {answer}", description="prompt: column slots and one {answer} slot")
    words: tuple[str, ...] | None = Field(None, description="label words; word i stands for integer label i")
    label: str = Field("label", description="column of the label")
    source: str | None = Field(None, description="file, folder or hub id; usually given as `data`")


def build(config: Config) -> LabelledTask:
    if config.source is None:
        raise ConfigError("the task 'labelled' has no rows of its own: give --data FILE with columns text and label")
    form = own(config.template)
    return LabelledTask("labelled", config.source, form, form, config.words, (config.label,))
