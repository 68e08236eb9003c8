"""WiC: has a word the same meaning in two sentences (Pilehvar and Camacho-Collados 2019, in SuperGLUE), as MeZO asks.

All of the prompt is the question, so nothing of it is cut. The masked form is ours: the mask at its end.
"""

from __future__ import annotations

from pydantic import Field

from smidgen.tasks._labelled import NOTHING, Form, LabelConfig, LabelledTask, forms

status = "reproduction"

SIZES = (1000, 500, 638)  # training, dev and test rows of the benchmark

_ASKED = 'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}'
CAUSAL = Form(_ASKED + "\n{answer}", passage=NOTHING)
MASKED = Form(_ASKED + " {answer} .", passage=NOTHING)


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(("No", "Yes"), description="label words: label 0 another meaning, 1 the same")
    source: str = Field("aps/super_glue:wic", description="hub id with its configuration, or a folder")


def build(config: Config) -> LabelledTask:
    causal, masked = forms(config.template, CAUSAL, MASKED)
    return LabelledTask("wic", config.source, causal, masked, config.words)
