"""SST-2: sentiment of film-review sentences (Socher et al. 2013), with the prompts of MeZO.

Causal `{sentence} It was` (MeZO's templates), masked `{sentence} It was [MASK] .` (LM-BFF); the sentence loses its outer
white space. `prompt: false` shows a causal model the sentence alone. Sizes: all 872 published dev rows are the test.
"""

from __future__ import annotations

from pydantic import Field

from smidgen.tasks._dfo import Prompts, Variant, shown
from smidgen.tasks._labelled import Form, LabelConfig, LabelledTask

status = "reproduction"

SIZES = (1000, 500, 872)  # training, dev and test rows of the benchmark

CAUSAL = Form("{sentence} It was {answer}", passage="sentence", shapes={"sentence": str.strip})
MASKED = Form("{sentence} It was {answer} .", passage="sentence", shapes={"sentence": str.strip})
EMPTY = Form("{sentence} {answer}", passage="sentence", shapes={"sentence": str.strip})
DFO = Variant(
    Form("{sentence} . It was {answer}", passage="sentence", shapes={"sentence": str.strip}),
    Form("{sentence} . It was {answer} .", passage="sentence", shapes={"sentence": str.strip}),
    ("bad", "great"),
    ("negative", "positive"),
)


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(("terrible", "great"), description="label words: label 0 negative, 1 positive")
    source: str = Field("nyu-mll/glue:sst2", description="hub id with its configuration, or a folder")
    prompts: Prompts = Field(
        "published",
        description="published: as above; dfo, dfo_causal: DFO-LoRA's, with label words for masked or causal models",
    )
    prompt: bool = Field(True, description="whether the task is put in words; false: the text and the label word alone")


def build(config: Config) -> LabelledTask:
    causal, masked, words = shown(config, CAUSAL if config.prompt else EMPTY, MASKED if config.prompt else None, DFO)
    return LabelledTask("sst2", config.source, causal, masked, words)
