"""SST-2: sentiment of film-review sentences (Socher et al. 2013), with template and label words of LM-BFF and MeZO."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from smidgen.tasks._labelled import LabelledTask

status = "reproduction"


class Config(BaseModel):
    """Options of the task."""

    model_config = ConfigDict(extra="forbid")

    template: str = Field("{sentence} It was {answer}.", description="prompt: column slots and one {answer} slot")
    words: tuple[str, ...] = Field(("terrible", "great"), description="label words of label 0, 1")
    source: str = Field("nyu-mll/glue:sst2", description="hub id with its configuration, or a folder")


def build(config: Config) -> LabelledTask:
    return LabelledTask("sst2", config.source, config.template, config.words)
