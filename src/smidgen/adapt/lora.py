"""LoRA: a frozen weight W plus a tuned product B A of two thin matrices. The implementation is PEFT's.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685): W + (alpha / r) B A with
B = 0 at the start. Defaults r = 8, alpha = 16 on the query and value projections are those of the zeroth-order papers.
Bytes: r (m + n) weights for an m x n matrix, in float32. Saved in PEFT's own format.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._peft import load_adapter, new_modules, wrapped
from smidgen.config import ConfigError, notice
from smidgen.params import ParamView

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


class LoRA:
    """A model with LoRA adapters; a new classification head is tuned whole beside them."""

    def __init__(self, model: nn.Module, config: Config, seed: int, fresh: Sequence[str]):
        import peft

        heads = new_modules(model, set(fresh))
        options: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
        if heads:
            options["modules_to_save"] = heads
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.model = wrapped(model, peft.LoraConfig(target_modules=config.target_modules, **options))
            except ValueError as error:
                if config.target_modules is not None:
                    raise ConfigError(f"scheme_args.target_modules: {error}") from None
                notice("PEFT names no LoRA targets for this model type: adapting all linear layers")
                self.model = wrapped(model, peft.LoraConfig(target_modules="all-linear", **options))
        self.view = ParamView.of_model(self.model)
        self.fresh = list(self.view.entries)

    def save(self, folder: Path) -> None:
        """PEFT's adapter files."""
        self.model.save_pretrained(str(folder))  # type: ignore[operator]

    def load(self, folder: Path) -> None:
        """Read adapter files into the tuned tensors."""
        load_adapter(self.model, folder)

    def merged(self) -> nn.Module:
        """A copy of the base model with the product merged in; costs one copy of the model."""
        return copy.deepcopy(self.model).merge_and_unload()  # type: ignore[operator]


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> LoRA:
    """Freeze `model` and add adapters; A is drawn from `seed` without touching the global RNG."""
    return LoRA(model, config, seed, fresh)
