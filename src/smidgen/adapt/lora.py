"""LoRA: a frozen weight W plus a tuned product B A of two thin matrices. The implementation is PEFT's.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685): W + (alpha / r) B A with
B = 0 at the start. Defaults r = 8, alpha = 16 on the query and value projections are those of the zeroth-order papers.
Bytes: r (m + n) weights for an m x n matrix, in float32. Saved in PEFT's own format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import Field
from torch import nn

from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._lora import Adapters
from smidgen.config import ConfigError, notice

status = "experimental"

EXPORTS = {
    "adapter": "PEFT's adapter_model.safetensors and adapter_config.json",
    "peft-lora": "the same as adapter",
    "merged": "the whole model with the product added in, for stock transformers",
}
REFUSED: dict[str, str] = {}


class Config(SchemeConfig):
    """Options of LoRA."""

    rank: int = Field(8, ge=1, description="rank r of the product")
    alpha: float = Field(16.0, gt=0, description="scale: the product is multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters; off in forward-only methods")
    target_modules: list[str] | str | None = Field(
        None, description="modules that get an adapter; PEFT's choice for the model type, else all linear layers"
    )


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> Adapters:
    """Freeze `model` and add adapters; A is drawn from `seed` without touching the global RNG."""

    def targets(wrap: Callable[..., nn.Module]) -> nn.Module:
        try:
            return wrap(target_modules=config.target_modules)
        except ValueError as error:
            if config.target_modules is not None:
                raise ConfigError(f"scheme_args.target_modules: {error}") from None
            notice("PEFT names no LoRA targets for this model type: adapting all linear layers")
            return wrap(target_modules="all-linear")

    options = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    return Adapters(model, options, seed, fresh, targets)
