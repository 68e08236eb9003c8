"""Shared by stateless first-order methods: options, tensors as matrices, the step along a normalised gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from smidgen.optim._gradients import GradientConfig, GradientOptimizer
from smidgen.params import Rounding

TINY = 1e-12  # norms below this are taken for zero; chosen


class StatelessConfig(GradientConfig):
    """Options that stateless methods share."""

    lr: float = Field(
        1e-4, gt=0, description="learning rate: the root mean square by which weights move in a step; chosen as AdamW's"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of weights with two axes or more")
    max_grad_norm: float = Field(0.0, ge=0, description="no effect: a step has one length; kept for a common interface")
    rounding: Rounding = Field("stochastic", description="rounding of updates to 16-bit weights")
    seed: int = Field(0, ge=0, description="run seed: addresses the rounding")


class StatelessOptimizer(GradientOptimizer):
    """W <- (1 - lr wd) W - lr * direction(dW); no state. Subclasses write `_direction`."""

    def _limit(self) -> float:
        return 0.0  # a step's length is lr, whatever the gradient's

    def _direction(self, g: Tensor) -> Tensor:
        """Of a gradient as a matrix [m, n], float32: a new tensor of root mean square 1."""
        raise NotImplementedError

    def _update(self, group: dict[str, Any], gradient: Tensor, state: dict[str, Any], weight: Tensor) -> None:
        if self.config.weight_decay and weight.ndim >= 2:
            weight.mul_(1.0 - group["lr"] * self.config.weight_decay)
        if weight.ndim < 2:
            direction = gradient / gradient.square().mean().sqrt().clamp_min(TINY)
        else:
            direction = self._direction(gradient.flatten(1))
        weight.add_(direction.view_as(weight), alpha=-group["lr"])

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Any) -> int:
        """Nothing is held between steps."""
        return 0
