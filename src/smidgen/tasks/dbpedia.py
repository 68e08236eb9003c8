"""DBPedia: what a Wikipedia abstract is about, in 14 classes (Zhang et al. 2015), with the prompts of DFO-LoRA.

Causal `{content} The text above is about`, masked `[ Category: [MASK] ] {content}`; the title is not shown. Sizes: 512 rows a
class to train and to select on, and at most 1000 to test, after MeZO's protocol for RoBERTa; none is published.
"""

from __future__ import annotations

from pydantic import Field

from smidgen.tasks._dfo import Prompts, Variant, shown
from smidgen.tasks._labelled import Form, LabelConfig, LabelledTask

status = "reproduction"

SIZES = (7168, 7168, 1000)  # training, dev and test rows of the benchmark

CAUSAL = Form("{content} The text above is about {answer}", passage="content")
MASKED = Form("[ Category: {answer} ] {content}", passage="content")
WORDS = (
    "Company", "Education", "Artist", "Athlete", "Office", "Transportation", "Building", "Natural", "Village", "Animal",
    "Plant", "Album", "Film", "Written",
)  # fmt: skip
DFO = Variant(CAUSAL, MASKED, WORDS, WORDS)


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(WORDS, description="label words: label 0 company to 13 written work")
    source: str = Field("fancyzhx/dbpedia_14", description="hub id with its configuration, or a folder")
    prompts: Prompts = Field("published", description="the same whatever it is: DFO-LoRA's")


def build(config: Config) -> LabelledTask:
    causal, masked, words = shown(config, CAUSAL, MASKED, DFO)
    return LabelledTask("dbpedia", config.source, causal, masked, words)
