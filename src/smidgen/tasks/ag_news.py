"""AG News: topic of a news item, in four classes (Zhang et al. 2015), with the prompts of DFO-LoRA.

Causal `{text} News:`, masked `[MASK] News: {text}`; both with the masked form's label words. Sizes: 512 rows a class to
train and to select on, and at most 1000 to test, after MeZO's protocol for RoBERTa; none is published.
"""

from __future__ import annotations

from pydantic import Field

from smidgen.tasks._dfo import Prompts, Variant, shown
from smidgen.tasks._labelled import Form, LabelConfig, LabelledTask

status = "reproduction"

SIZES = (2048, 2048, 1000)  # training, dev and test rows of the benchmark

CAUSAL = Form("{text} News: {answer}", passage="text")
MASKED = Form("{answer} News: {text}", passage="text")
DFO = Variant(CAUSAL, MASKED, ("World", "Sports", "Business", "Tech"), ("world", "sports", "business", "tech"))


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(("World", "Sports", "Business", "Tech"), description="label words: label 0 to 3")
    source: str = Field("fancyzhx/ag_news", description="hub id with its configuration, or a folder")
    prompts: Prompts = Field(
        "published",
        description="published: as above; dfo, dfo_causal: DFO-LoRA's, with label words for masked or causal models",
    )


def build(config: Config) -> LabelledTask:
    causal, masked, words = shown(config, CAUSAL, MASKED, DFO)
    return LabelledTask("ag_news", config.source, causal, masked, words)
