"""MRPC: do two sentences say the same (Dolan and Brockett 2005, in GLUE), with the prompt of LM-BFF.

The published lists have no prompt of MRPC for a causal model: that of RTE is used. Sizes: 512 rows a class to train and
to select on, the published dev rows to test; drawn without balancing the classes, which is ours.
"""

from __future__ import annotations

from pydantic import Field

from smidgen.tasks._dfo import Prompts, Variant, shown
from smidgen.tasks._labelled import Form, LabelConfig, LabelledTask

status = "reproduction"

SIZES = (1024, 1024, 408)  # training, dev and test rows of the benchmark

CAUSAL = Form('{sentence1}\nDoes this mean that "{sentence2}" is true? Yes or No?\n{answer}', passage="sentence1")
MASKED = Form("{sentence1} {answer} , {sentence2}", passage="sentence1")
DFO = Variant(
    Form("{sentence1} the {sentence2} ? Answer: {answer}", passage="sentence1"),
    Form("{sentence1} ? {answer} , {sentence2}", passage="sentence1"),
    ("No", "Yes"),
    ("No", "Yes"),
)


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(("No", "Yes"), description="label words: label 0 other meaning, 1 same meaning")
    source: str = Field("nyu-mll/glue:mrpc", description="hub id with its configuration, or a folder")
    prompts: Prompts = Field(
        "published",
        description="published: as above; dfo, dfo_causal: DFO-LoRA's, with label words for masked or causal models",
    )


def build(config: Config) -> LabelledTask:
    causal, masked, words = shown(config, CAUSAL, MASKED, DFO)
    return LabelledTask("mrpc", config.source, causal, masked, words)
