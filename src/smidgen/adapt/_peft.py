"""Shared by schemes that PEFT implements: new heads tuned beside an adapter, and reading adapter files."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smidgen.config import ConfigError
from smidgen.untrusted import check_folder, read_json


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PEFT asks for a property that transformers has renamed; its user cannot change that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def wrapped(model: nn.Module, config: Any) -> Any:
    """PEFT's model around `model`."""
    import peft

    with _quiet():
        return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def with_adapter(model: nn.Module, folder: Path) -> Any:
    """PEFT's model around `model` with the adapter files of a folder. Raises ConfigError for files that cannot be read, and
    PEFT's errors where they do not fit."""
    import peft

    check_adapter(folder)

    with _quiet(), torch.random.fork_rng(devices=[]):  # PEFT draws factors that are written over
        return peft.PeftModel.from_pretrained(model, str(folder))  # type: ignore[arg-type]


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
    """Copy adapter files into the tuned tensors of a PEFT model. Raises ConfigError for files that cannot be read."""
    from peft import load_peft_weights, set_peft_model_state_dict

    check_adapter(folder)
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


def check_adapter(folder: Path) -> None:
    """Raise ConfigError for a folder without an adapter in safetensors, or with files that are damaged: PEFT would go on to
    read a pickle."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(f"{folder} has no adapter_model.safetensors: only safetensors are read, never pickles")
    check_folder(folder)
    read_json(folder / "adapter_config.json")
