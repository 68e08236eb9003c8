"""SST-5: sentiment of film-review sentences in five grades (Socher et al. 2013), with the prompt of LM-BFF.

The published lists have no prompt of SST-5 for a causal model: that of SST-2 is used. Sizes: 512 rows a class to train
and to select on, and at most 1000 to test, as MeZO with RoBERTa; drawn without balancing the classes, which is ours.
"""

from __future__ import annotations

from pydantic import Field

from smidgen.tasks._labelled import Form, LabelConfig, LabelledTask, forms

status = "reproduction"

SIZES = (2560, 2560, 1000)  # training, dev and test rows of the benchmark

CAUSAL = Form("{text} It was {answer}", passage="text", shapes={"text": str.strip})
MASKED = Form("{text} It was {answer} .", passage="text", shapes={"text": str.strip})


class Config(LabelConfig):
    """Options of the task."""

    words: tuple[str, ...] = Field(
        ("terrible", "bad", "okay", "good", "great"), description="label words: label 0 very negative to 4 very positive"
    )
    source: str = Field("SetFit/sst5", description="hub id with its configuration, or a folder")


def build(config: Config) -> LabelledTask:
    causal, masked = forms(config.template, CAUSAL, MASKED)
    return LabelledTask("sst5", config.source, causal, masked, config.words)
