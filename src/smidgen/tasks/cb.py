"""CB: does a text entail, contradict or leave open a sentence (CommitmentBank, in SuperGLUE), with the prompt of MeZO.

The published lists have no prompt of CB for a masked model: that of the other inference tasks is used.
"""

from __future__ import annotations

from pydantic import Field

from smidgen.tasks._labelled import LabelConfig, LabelledTask, forms
from smidgen.tasks._pairs import CAUSAL, MASKED

status = "reproduction"

SIZES = (150, 100, 56)  # training, dev and test rows of the benchmark


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(
        ("Yes", "No", "Maybe"), description="label words: label 0 entailment, 1 contradiction, 2 neutral"
    )
    source: str = Field("aps/super_glue:cb", description="hub id with its configuration, or a folder")


def build(config: Config) -> LabelledTask:
    causal, masked = forms(config.template, CAUSAL, MASKED)
    return LabelledTask("cb", config.source, causal, masked, config.words)
