"""MNLI: does a sentence entail, contradict or leave open another (Williams et al. 2018), with LM-BFF's prompt.

The published lists have no prompt of MNLI for a causal model: that of CB is used. Sizes: 512 rows a class to train and to
select on, and at most 1000 to test, as MeZO with RoBERTa; drawn without balancing the classes, which is ours.
"""

from __future__ import annotations

from pydantic import Field

from smidgen.tasks._labelled import LabelConfig, LabelledTask, forms
from smidgen.tasks._pairs import CAUSAL, MASKED

status = "reproduction"

SIZES = (1536, 1536, 1000)  # training, dev and test rows of the benchmark


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(
        ("Yes", "Maybe", "No"), description="label words: label 0 entailment, 1 neutral, 2 contradiction"
    )
    source: str = Field("nyu-mll/glue:mnli", description="hub id with its configuration, or a folder")


def build(config: Config) -> LabelledTask:
    causal, masked = forms(config.template, CAUSAL, MASKED)
    return LabelledTask("mnli", config.source, causal, masked, config.words)
