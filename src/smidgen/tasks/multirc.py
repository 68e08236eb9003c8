"""MultiRC: is an answer to a question about a paragraph right (Khashabi et al. 2018, in SuperGLUE), as MeZO asks.

One row an answer; the metric is accuracy over answers, as in MeZO, not SuperGLUE's F1a. The masked form is ours: the
mask at the end of the question. The benchmark's sample draws rows, so a paragraph may be in training and dev.
"""

from __future__ import annotations

from pydantic import Field

from smidgen.tasks._labelled import Form, LabelConfig, LabelledTask, forms

status = "reproduction"

SIZES = (1000, 500, 1000)  # training, dev and test rows of the benchmark

_ASKED = '{paragraph}\nQuestion: {question}\nI found this answer "{answer_text}". Is that correct? Yes or No?'
CAUSAL = Form(_ASKED + "\n{answer}", passage="paragraph", named={"answer_text": "answer"})
MASKED = Form(_ASKED + " {answer} .", passage="paragraph", named={"answer_text": "answer"})


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(("No", "Yes"), description="label words: label 0 wrong, 1 right")
    source: str = Field("aps/super_glue:multirc", description="hub id with its configuration, or a folder")


def build(config: Config) -> LabelledTask:
    causal, masked = forms(config.template, CAUSAL, MASKED)
    return LabelledTask("multirc", config.source, causal, masked, config.words)
