"""The prompts of DFO-LoRA, which the tasks that it was measured on offer beside their own.

Source: "Derivative-Free Optimization for Low-Rank Adaptation", its public code. It words a task differently for masked and
for causal models: `dfo` has the label words of the former, `dfo_causal` those of the latter; either shows each kind of model
its own template. Where only a template is known for causal models, the label words are the masked ones. Ours: an answer is
what follows the prompt after a space, so that words are the tokens of running text, and the 50 meaningless tokens that stand
before the causal prompt of DBPedia are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from smidgen.tasks._labelled import Form, forms

__all__ = ["Prompts", "Variant", "shown"]

Prompts = Literal["published", "dfo", "dfo_causal"]


@dataclass(frozen=True)
class Variant:
    """The two templates and the two lists of label words of a task."""

    causal: Form
    masked: Form
    words: tuple[str, ...]
    causal_words: tuple[str, ...]


def shown(config: Any, causal: Form, masked: Form | None, dfo: Variant) -> tuple[Form, Form | None, tuple[str, ...]]:
    """The causal and the masked form and the label words that a task's options ask for: its own, or those of the variant.

    A template or label words of the user's win.
    """
    if config.prompts == "published":
        return *forms(config.template, causal, masked), config.words
    words = dfo.words if config.prompts == "dfo" else dfo.causal_words
    return *forms(config.template, dfo.causal, dfo.masked), config.words if "words" in config.model_fields_set else words
