"""RTE: does a text entail a sentence (Dagan et al. 2006, in SuperGLUE), with the prompts of MeZO and LM-BFF.

`prompt: false` shows a causal model premise and hypothesis without the question.
"""

from __future__ import annotations

from pydantic import Field

from smidgen.tasks._dfo import Prompts, Variant, shown
from smidgen.tasks._labelled import Form, LabelConfig, LabelledTask
from smidgen.tasks._pairs import MASKED

status = "reproduction"

SIZES = (1000, 500, 277)  # training, dev and test rows of the benchmark

CAUSAL = Form('{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n{answer}', passage="premise")
EMPTY = Form('{premise}\n"{hypothesis}"\n{answer}', passage="premise")
DFO = Variant(
    Form("{premise} {hypothesis} Answer: {answer}", passage="premise"),
    Form("{premise} ? {answer} , {hypothesis}", passage="premise"),
    ("Yes", "No"),
    ("Yes", "No"),
)


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(("Yes", "No"), description="label words: label 0 entailment, 1 not entailment")
    source: str = Field("aps/super_glue:rte", description="hub id with its configuration, or a folder")
    prompts: Prompts = Field(
        "published",
        description="published: as above; dfo, dfo_causal: DFO-LoRA's, with label words for masked or causal models",
    )
    prompt: bool = Field(True, description="whether the task is put in words; false: the text and the label word alone")


def build(config: Config) -> LabelledTask:
    causal, masked, words = shown(config, CAUSAL if config.prompt else EMPTY, MASKED if config.prompt else None, DFO)
    return LabelledTask("rte", config.source, causal, masked, words)
