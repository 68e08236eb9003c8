"""Yelp: sentiment of restaurant reviews, in two classes (Zhang et al. 2015, Yelp polarity), with the prompts of DFO-LoRA.

Causal `{text} . It is`, masked `{text} . It was [MASK] .`; both with the masked form's label words unless `prompts` says
dfo_causal. Sizes: 512 rows a class to train and to select on, and at most 1000 to test, after MeZO's protocol for RoBERTa; none
is published.
"""

from __future__ import annotations

from pydantic import Field

from smidgen.tasks._dfo import Prompts, Variant, shown
from smidgen.tasks._labelled import Form, LabelConfig, LabelledTask

status = "reproduction"

SIZES = (1024, 1024, 1000)  # training, dev and test rows of the benchmark

CAUSAL = Form("{text} . It is {answer}", passage="text")
MASKED = Form("{text} . It was {answer} .", passage="text")
DFO = Variant(CAUSAL, MASKED, ("bad", "great"), ("negative", "positive"))


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(DFO.words, description="label words: label 0 negative, 1 positive")
    source: str = Field("fancyzhx/yelp_polarity", description="hub id with its configuration, or a folder")
    prompts: Prompts = Field("published", description="dfo_causal: the label words for causal models; others: for masked ones")


def build(config: Config) -> LabelledTask:
    causal, masked, words = shown(config, CAUSAL, MASKED, DFO)
    return LabelledTask("yelp", config.source, causal, masked, words)
