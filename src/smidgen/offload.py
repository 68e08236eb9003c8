"""A model whose weights stay on disk: loaded without ever being in memory whole, onto shelves (`smidgen.shelves`).

transformers and accelerate find where each weight stands in the checkpoint, with all their renaming; from there it is copied,
one tensor at a time, into files of the run's folder, which are the model's parameters from then on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from smidgen import placed
from smidgen.config import ConfigError
from smidgen.reuse import stacks
from smidgen.shelves import Shelves


def stack_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, in order. Raises ConfigError where it has no list of equal ones."""
    found = max(stacks(model), key=len, default=[])
    if not found:
        raise ConfigError("offload reads a model layer by layer, and this one has no list of equal layers: leave it out")
    return found


def to_shelves(model: nn.Module, folder: Path) -> Shelves:
    """Move a model that accelerate left on disk onto shelves in `folder`. Raises ConfigError for one without a stack."""
    from accelerate.hooks import remove_hook_from_module

    sources: dict[str, tuple[Any, str]] = {}
    for prefix, module in model.named_modules():
        found = placed.homes(module)
        if found is not None:
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    sources[f"{prefix}.{attribute}" if prefix else attribute] = (found, attribute)
    remove_hook_from_module(model, recurse=True)
    del model.hf_device_map  # it is on one device from now on
    model.tie_weights()  # type: ignore[operator]
    shelves = Shelves(folder, model, stack_of(model))
    shelves.fill(lambda name: sources[name][0][sources[name][1]])
    model.smidgen_shelves = shelves  # type: ignore[assignment]
    return shelves
