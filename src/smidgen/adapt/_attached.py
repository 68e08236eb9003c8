"""Adapters that stand behind a model's own layers: a small module sees what enters a frozen layer and what leaves it.

    y' = adapter(x, layer(x))

The layer itself stays as it is, so it may be quantised. Adapters are submodules of their layers, found under the scheme's
name. Checkpoints of a run hold them alone, as what is saved at its end does; merging folds them into the weights of a copy.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smidgen import quantised
from smidgen.adapt._chosen import Chosen
from smidgen.adapt._sparse_targets import shape
from smidgen.config import ConfigError


class Adapter(nn.Module):
    """What stands behind one layer."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the layer's input [..., D], y: its output [..., O]."""
        raise NotImplementedError

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight [O, D] (of a norm [D]) and bias of a layer that computes the same alone; float32 or float64."""
        raise NotImplementedError


def sides(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer of any kind."""
    rows, columns = shape(layer)
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def _behind(scheme: str, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    return layer._modules[scheme](args[0], y)  # type: ignore[misc,no-any-return]


class Attached(Chosen):
    """A model with adapters behind some layers, by name of the layer; new heads are tuned whole beside them."""

    def __init__(self, model: nn.Module, scheme: str, adapters: Mapping[str, Adapter], fresh: Sequence[str]):
        self.adapters = dict(adapters)
        self._hooks: dict[str, int] = {}
        for name, adapter in self.adapters.items():
            layer = model.get_submodule(name)
            layer.add_module(scheme, adapter.to(next(layer.parameters()).device))
            self._hooks[name] = layer.register_forward_hook(functools.partial(_behind, scheme)).id
        super().__init__(model, scheme, lambda name, _: f".{scheme}." in name, fresh)

    # -- while it trains (`Moving`): checkpoints hold what `save` writes ------------------------------------------------

    def begin(self, optimizer: Any) -> None:
        pass

    def after_step(self, optimizer: Any, steps: int) -> None:
        pass

    def save_state(self, folder: Path) -> None:
        self.save(folder)

    def load_state(self, folder: Path) -> None:
        self.load(folder)

    # -- merging ------------------------------------------------------------------------------------------------------

    def merged(self) -> nn.Module:
        """A plain copy of the model with the adapters in its weights, one rounding each. Raises ConfigError where the base is
        quantised: a small change would vanish among its codes."""
        if any(quantised.kind(self.model.get_submodule(name)) for name in self.adapters):
            raise ConfigError(
                f"the base of this run is quantised, and scheme {self.scheme} cannot be merged into its codes: export another "
                "format, or train over the unquantised model"
            )
        plain = copy.deepcopy(self.model)
        for name, hook in self._hooks.items():
            layer: Any = plain.get_submodule(name)
            adapter = layer._modules.pop(self.scheme)
            layer._forward_hooks.pop(hook)
            turned = isinstance(layer, Conv1D)
            weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
            wide = weight.double().t() if turned else weight.double()
            folded, shifted = adapter.fold(wide, None if bias is None else bias.double())
            weight.copy_(folded.t() if turned else folded)
            if bias is not None:
                bias.copy_(shifted)
        return plain
