"""SGD with back-propagation, with optional heavy-ball momentum: the first-order baseline.

    v <- mu v + g;  w <- (1 - lr wd) w - lr v

Cost: one forward and one backward a step; no state, or 4 bytes a weight with momentum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from smidgen.optim._gradients import GradientConfig, GradientOptimizer
from smidgen.params import ParamView, Rounding

status = "experimental"


class Config(GradientConfig):
    """Options of SGD."""

    lr: float = Field(1e-3, gt=0, description="learning rate")
    momentum: float = Field(0.0, ge=0, lt=1, description="mu; 0 keeps no state")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of weights with two axes or more")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global gradient norm; 0 turns clipping off")
    rounding: Rounding = Field("stochastic", description="rounding of updates to 16-bit weights")
    seed: int = Field(0, ge=0, description="run seed: addresses the rounding")


class SGD(GradientOptimizer):
    """SGD over any tensors."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))

    def _update(self, group: dict[str, Any], gradient: Tensor, state: dict[str, Any], weight: Tensor) -> None:
        cfg = self.config
        if cfg.momentum:
            v = state.setdefault("momentum", torch.zeros_like(weight))
            gradient = v.mul_(cfg.momentum).add_(gradient)
        if cfg.weight_decay and weight.ndim >= 2:
            weight.mul_(1.0 - group["lr"] * cfg.weight_decay)
        weight.add_(gradient, alpha=-group["lr"])

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """One float32 momentum a weight, if any."""
        return sum(4 * prod(shape) for shape, _ in shapes.values()) if config.momentum else 0


build = SGD
