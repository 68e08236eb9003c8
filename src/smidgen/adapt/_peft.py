"""Shared by schemes that PEFT implements: new heads tuned beside an adapter, and reading adapter files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn


def wrapped(model: nn.Module, config: Any) -> Any:
    """PEFT's model around `model`. PEFT asks for a property that transformers has renamed; its user cannot change that."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def new_modules(model: nn.Module, fresh: set[str]) -> list[str]:
    """The outermost modules all of whose tensors are fresh: a new head, a new pooler."""
    found: list[str] = []
    for prefix, module in model.named_modules():
        names = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
        inside = any(prefix.startswith(outer + ".") for outer in found)
        if prefix and names and not inside and fresh.issuperset(names):
            found.append(prefix)
    return found


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Copy adapter files into the tuned tensors of a PEFT model."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
