"""TREC: what a question asks for, in six coarse classes (Li and Roth 2002), with the prompt of LM-BFF.

Classes in the order of the original set: ABBR, ENTY, DESC, HUM, LOC, NUM; a label may be that number, or that name. The
causal form is ours. Sizes: 512 rows a class to train and to select on as MeZO with RoBERTa, or as many as there are, and
the 500 test rows; drawn without balancing the classes, which is ours.
"""

from __future__ import annotations

from pydantic import Field

from smidgen.tasks._labelled import Form, LabelConfig, LabelledTask, forms

status = "reproduction"

SIZES = (3072, 3072, 500)  # training, dev and test rows of the benchmark

CAUSAL = Form("{text}\nType: {answer}", passage="text")
MASKED = Form("{answer} : {text}", passage="text")
CLASSES = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
COLUMNS = ("coarse_label", "label_coarse_original", "label")  # of the original set, of the hub's copy, of any file


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(
        ("Expression", "Entity", "Description", "Human", "Location", "Number"), description="label words: of the six classes"
    )
    source: str = Field("SetFit/TREC-QC", description="hub id with its configuration, or a folder")


def build(config: Config) -> LabelledTask:
    named = {name: index for index, name in enumerate(CLASSES)}
    causal, masked = forms(config.template, CAUSAL, MASKED)
    return LabelledTask("trec", config.source, causal, masked, config.words, label=COLUMNS, aliases=named)
