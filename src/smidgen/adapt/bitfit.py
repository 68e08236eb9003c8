"""BitFit: only the biases are tuned, those of normalisations too; every matrix is frozen.

Source: Ben Zaken, Ravfogel and Goldberg, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", 2022 (arXiv 2106.10199): y = W x + b with b tuned and W frozen. A new head is tuned whole beside them.

Models without biases (LLaMA, Mistral, Qwen3, T5) have only weights of normalisations of this size: `norms` tunes those.
Bytes: the tuned tensors', about 0.1 % of the model (OPT-125M: 0.08 %). Saved as these tensors alone; exported merged.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import nn

from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._chosen import Chosen
from smidgen.config import ConfigError
from smidgen.params import canonical

status = "experimental"

EXPORTS = {"merged": "the whole model with its tuned biases, for stock transformers"}
REFUSED = {"adapter": "PEFT has no adapter of biases"}


class Config(SchemeConfig):
    """Options of BitFit."""

    norms: bool = Field(False, description="tune the weights of normalisations too")


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> Chosen:
    """Tune the biases of `model`, with `norms` also the weights of its normalisations, and what is `fresh`.

    Raises ConfigError where it has none.
    """
    named = {id(p): canonical(n) for n, p in model.named_parameters()}
    held = [(m, a, p) for m in model.modules() for a, p in m._parameters.items() if p is not None]
    old = [(m, a, p) for m, a, p in held if named[id(p)] not in set(fresh)]
    biases = {id(p) for _, a, p in old if a == "bias"}
    norms = {id(p) for m, _, p in old if "norm" in type(m).__name__.lower()}
    chosen = biases | norms if config.norms else biases
    if not chosen:
        way_out = f"tune its {len(norms)} weights of normalisations with scheme_args.norms=true, or " if norms else ""
        raise ConfigError(f"{type(model).__name__} has no biases to tune: {way_out}use scheme lora")
    return Chosen(model, "bitfit", lambda _, parameter: id(parameter) in chosen, fresh)
