"""WSC: whom a pronoun refers to (Winograd schemas, in SuperGLUE), with the prompt of MeZO.

The masked form is ours: the same question, with the mask at its end. Sizes as MeZO: 500 of the 554 rows select.
"""

from __future__ import annotations

from pydantic import Field

from smidgen.tasks._labelled import Form, LabelConfig, LabelledTask, forms

status = "reproduction"

SIZES = (54, 500, 104)  # training, dev and test rows of the benchmark

_ASKED = '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?'
CAUSAL = Form(_ASKED + "\n{answer}", passage="text", shapes={"span2_text": str.lower})
MASKED = Form(_ASKED + " {answer} .", passage="text", shapes={"span2_text": str.lower})


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(("No", "Yes"), description="label words: label 0 another, 1 the span")
    source: str = Field("aps/super_glue:wsc.fixed", description="hub id with its configuration, or a folder")


def build(config: Config) -> LabelledTask:
    causal, masked = forms(config.template, CAUSAL, MASKED)
    return LabelledTask("wsc", config.source, causal, masked, config.words)
