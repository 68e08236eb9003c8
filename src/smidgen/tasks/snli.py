"""SNLI: does a sentence entail, contradict or leave open another (Bowman et al. 2015), with LM-BFF's prompt.

The published lists have no prompt of SNLI for a causal model: that of CB is used. Sizes: 512 rows a class to train and to
select on, and at most 1000 to test, as MeZO with RoBERTa; drawn without balancing the classes, which is ours.
Rows without a label (-1, where annotators differ) are left out.
"""

from __future__ import annotations

from pydantic import Field

from smidgen.tasks._dfo import Prompts, Variant, shown
from smidgen.tasks._labelled import Form, LabelConfig, LabelledTask
from smidgen.tasks._pairs import CAUSAL, MASKED

status = "reproduction"

SIZES = (1536, 1536, 1000)  # training, dev and test rows of the benchmark
DFO = Variant(
    Form("{premise} the {hypothesis} ? Answer: {answer}", passage="premise"),
    Form("{premise} ? {answer} , {hypothesis}", passage="premise"),
    ("Yes", "Maybe", "No"),
    ("Yes", "Maybe", "No"),
)


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(
        ("Yes", "Maybe", "No"), description="label words: label 0 entailment, 1 neutral, 2 contradiction"
    )
    source: str = Field("stanfordnlp/snli", description="hub id with its configuration, or a folder")
    prompts: Prompts = Field(
        "published",
        description="published: as above; dfo, dfo_causal: DFO-LoRA's, with label words for masked or causal models",
    )


def build(config: Config) -> LabelledTask:
    causal, masked, words = shown(config, CAUSAL, MASKED, DFO)
    return LabelledTask("snli", config.source, causal, masked, words, left_out=-1)
