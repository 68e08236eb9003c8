"""Head tuning: only what stands after the model's trunk is tuned: the output head, a masked-LM head or a classifier.

Source: linear probing and head tuning of the zeroth-order benchmarks (train `lm_head` and nothing else): with h(x) the last
hidden states of a frozen trunk, y = W h(x) + b with W, b tuned; heads of several layers (RoBERTa's) are tuned whole.

A head that is tied to the embedding would change the model's input too. It gets its own tensor, a copy of the embedding at
the start, and `tie_word_embeddings` is off in what is exported (but for BERT and T5). Bytes: V h weights for a vocabulary of
V (a tied one: as many more than the model had), C h for C classes. Saved as the tuned tensors alone; exported merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._chosen import Chosen
from smidgen.config import ConfigError

status = "experimental"

EXPORTS = {"merged": "the whole model with its tuned head, for stock transformers"}
REFUSED = {"adapter": "PEFT has no adapter of a head alone"}


class Config(SchemeConfig):
    """Head tuning has no options."""


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> Chosen:
    """Tune the head of `model` and what is `fresh`, untied from the embedding. Raises ConfigError where it has none."""
    modules = _head(model)
    head = {id(m) for m in modules}
    trunk = {id(p) for m in model.modules() if id(m) not in head for p in m._parameters.values()}
    untied: dict[int, nn.Parameter] = {}
    for module in modules:
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in trunk:
                own = untied.setdefault(id(parameter), nn.Parameter(parameter.detach().clone()))
                module._parameters[attribute] = own
    held = [id(p) for m in modules for p in m._parameters.values() if p is not None]
    tuned = set(held)
    if untied and len(held) == len(tuned):
        _say_untied(model.config)
    if not tuned:
        raise ConfigError(f"{type(model).__name__} has no head to tune: use scheme full, lora or bitfit")
    return Chosen(model, "head", lambda _, parameter: id(parameter) in tuned, fresh)


def _head(model: nn.Module) -> list[nn.Module]:
    """The modules outside the trunk; where the model is its own trunk, the output embedding."""
    trunk = model.base_model
    if trunk is model:
        output = model.get_output_embeddings()  # type: ignore[operator]
        return [] if output is None else list(output.modules())
    inside = {id(m) for m in trunk.modules()}  # type: ignore[union-attr,operator]
    return [m for m in model.modules() if id(m) not in inside]


def _say_untied(config: Any) -> None:
    """Note in the configuration that the head has its own tensor, for everything that reads a saved model.

    The flag stays where it says more: that BERT's head has one bias in two places, or how T5 scales its decoder's output.
    transformers ties no tensors that differ in the file, whatever the flag says.
    """
    for part in (config, config.get_text_config()):
        if part.model_type not in ("t5", "mt5", "umt5", "longt5", "switch_transformers"):
            part.tie_word_embeddings = False
