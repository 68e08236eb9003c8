"""BoolQ: yes-or-no questions on a passage (Clark et al. 2019), with the prompt of MeZO.

The question's first letter is upper-cased and a question mark appended where it has none. The label is the column
`label` (0 or 1) or `answer` (false or true). The masked form is ours: the mask follows passage and question.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from smidgen.tasks._labelled import Form, LabelConfig, LabelledTask, forms
from smidgen.tasks._shapes import asked

status = "reproduction"

SIZES = (1000, 500, 1000)  # training, dev and test rows of the benchmark

CAUSAL = (
    Form("{passage} {question} {answer}", passage="passage", shapes={"question": asked}),
    Form("{passage} {question}\\n\\n{answer}", passage="passage", shapes={"question": asked}),
    Form("{passage} {question}\n{answer}", passage="passage", shapes={"question": asked}),
)
MASKED = Form("{passage} {question} {answer} .", passage="passage", shapes={"question": asked})


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(("No", "Yes"), description="label words: of false, true")
    source: str = Field("google/boolq", description="hub id with its configuration, or a folder")
    compat_version: Literal[0, 1, 2] = Field(
        2,
        description="prompt: 2 is MeZO's; 0 reproduces that of ZO-LLM and SubZero, on which their published BoolQ numbers "
        "depend (a space before the answer); 1 reproduces their other form (a literal backslash-n, twice)",
    )


def build(config: Config) -> LabelledTask:
    causal, masked = forms(config.template, CAUSAL[config.compat_version], MASKED)
    return LabelledTask("boolq", config.source, causal, masked, config.words, label=("label", "answer"))
