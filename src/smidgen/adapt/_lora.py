"""A model under PEFT's adapters of the LoRA family: what the schemes that use them share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smidgen import quantised
from smidgen.adapt._peft import load_adapter, new_modules, wrapped
from smidgen.params import ParamView


class Adapters:
    """A model with adapters; a new classification head is tuned whole beside them."""

    def __init__(
        self,
        model: nn.Module,
        options: dict[str, Any],
        seed: int,
        fresh: Sequence[str],
        targets: Callable[[Callable[..., nn.Module]], nn.Module] | None = None,
        family: str = "LoraConfig",
    ):
        """`options`: PEFT's, of its class `family`; `targets` may try several of them, with what wraps the model."""
        import peft

        heads = new_modules(model, set(fresh))
        if heads:
            options = {**options, "modules_to_save": heads}

        def wrap(**more: Any) -> nn.Module:
            return wrapped(model, getattr(peft, family)(**options, **more))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: nn.Module = wrap() if targets is None else targets(wrap)
        self.refresh()

    def refresh(self) -> None:
        """List the tuned tensors anew."""
        self.view = ParamView.of_model(self.model)
        self.fresh = list(self.view.entries)

    def save(self, folder: Path) -> None:
        """PEFT's adapter files."""
        self.model.save_pretrained(str(folder))  # type: ignore[operator]

    def load(self, folder: Path) -> None:
        """Read adapter files into the tuned tensors."""
        load_adapter(self.model, folder)

    def merged(self) -> nn.Module:
        """A copy of the base model with the product merged in; costs one copy of the model.

        Raises ConfigError where the base is quantised.
        """
        if quantised.layers(self.model):
            raise quantised.unmerged()
        return copy.deepcopy(self.model).merge_and_unload()  # type: ignore[operator]
