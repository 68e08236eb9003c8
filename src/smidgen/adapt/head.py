"""Head tuning: only what stands after the model's trunk is tuned: the output head, a masked-LM head or a classifier.

Source: linear probing and head tuning of the zeroth-order benchmarks (train `lm_head` and nothing else): with h(x) the last
hidden states of a frozen trunk, y = W h(x) + b with W, b tuned; heads of several layers (RoBERTa's) are tuned whole.

A head that is tied to the embedding would change the model's input too. It gets its own tensor, a copy of the embedding at
the start, and `tie_word_embeddings` is off in what is exported (but for BERT and T5). Bytes: V h weights for a vocabulary of
V (a tied one: as many more than the model had), C h for C classes. Saved as the tuned tensors alone; exported merged.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._chosen import Chosen
from smidgen.adapt._untied import untied_head
from smidgen.config import ConfigError

status = "experimental"

EXPORTS = {"merged": "the whole model with its tuned head, for stock transformers"}
REFUSED = {"adapter": "PEFT has no adapter of a head alone"}


class Config(SchemeConfig):
    """Head tuning has no options."""


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> Chosen:
    """Tune the head of `model` and what is `fresh`, untied from the embedding. Raises ConfigError where it has none."""
    modules = untied_head(model)
    tuned = {id(p) for m in modules for p in m._parameters.values() if p is not None}
    if not tuned:
        raise ConfigError(f"{type(model).__name__} has no head to tune: use scheme full, lora or bitfit")
    return Chosen(model, "head", lambda _, parameter: id(parameter) in tuned, fresh)
