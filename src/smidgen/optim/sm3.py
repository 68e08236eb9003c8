"""SM3: adaptive steps with one accumulator for each row and column instead of each weight.

Source: Anil, Gupta, Koren and Singer, "Memory-Efficient Adaptive Optimization", 2019 (arXiv 1901.11150), SM3-II. For a
tensor with axes 1 ... d and one accumulator A_j along each,

    u <- min_j A_j + g^2;  A_j <- max of u over all other axes;  w <- (1 - lr wd) (w - lr g / sqrt(u + eps))

which for one axis is AdaGrad. Deltas on some entries of a matrix share the accumulators of its rows and columns (SpIEL-MA,
arXiv 2401.16405), which do not decay and are raised only by what is tuned; `scores` gives them to the choice of new entries.
With momentum, the step is an average m <- mu m + (1 - mu) g / sqrt(u + eps); an entry that moves in starts with zero.

Cost: one forward and one backward a step; 4 bytes for each row, column, ... of a tensor, of a matrix's rows and columns for
deltas, and 4 bytes a weight with momentum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from smidgen.objective import Objective
from smidgen.optim._gradients import GradientOptimizer
from smidgen.optim._optimizer import MethodConfig, Outcome
from smidgen.params import ParamView, Rounding, SparseShape, Support

status = "experimental"

# Without an lr of the user's: within the published grid (4e-4 to 2e-3), which is for models of 7B to 13B.
SUGGESTED: dict[str, dict[str, Any]] = {scheme: {"lr": 1e-3} for scheme in ("spiel", "sparse")}


class Config(MethodConfig):
    """Options of SM3."""

    lr: float = Field(1e-3, gt=0, description="learning rate; within the published grid of SpIEL-MA")
    eps: float = Field(1e-8, gt=0, description="added to u under the root; as in the public code of SpIEL")
    momentum: float = Field(0.0, ge=0, lt=1, description="mu; 0 keeps no state for it")
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled decay of all tensors; of deltas the published runs take 1 to 30"
    )
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global gradient norm; 0 turns clipping off")
    rounding: Rounding = Field("stochastic", description="rounding of updates to 16-bit weights")
    seed: int = Field(0, ge=0, description="run seed: addresses the rounding")


class SM3(GradientOptimizer):
    """SM3 over any tensors; those with a support are covered by the rows and columns of their matrix."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))
        self._supports: dict[int, Support] = {}  # of states, by the state's own identity

    def _step(self, objective: Objective) -> Outcome:
        self._supports = {}
        for entry in self.view:
            state = self.state[entry.tensor]
            axes = tuple(entry.tensor.shape) if entry.support is None else entry.support.shape
            if not state:
                for j, length in enumerate(axes or (1,)):
                    state[f"accumulator_{j}"] = torch.zeros(length, dtype=torch.float32, device=entry.tensor.device)
                if self.config.momentum:
                    state["momentum"] = torch.zeros_like(entry.tensor, dtype=torch.float32)
            if entry.support is not None:
                self._supports[id(state)] = entry.support
        return super()._step(objective)

    def _update(self, group: dict[str, Any], gradient: Tensor, state: dict[str, Any], weight: Tensor) -> None:
        cfg, lr = self.config, group["lr"]
        support = self._supports.get(id(state))
        u = _grow(state, gradient) if support is None else _grow_rows_and_columns(state, gradient, support)
        step = gradient / (u + cfg.eps).sqrt_()
        if cfg.momentum:
            step = state["momentum"].lerp_(step, 1.0 - cfg.momentum)
        weight.sub_(step, alpha=lr)
        if cfg.weight_decay:
            weight.mul_(1.0 - lr * cfg.weight_decay)

    def scores(self, name: str) -> tuple[Tensor, Tensor]:
        """Row and column accumulators of a tensor with a support."""
        state = self.state[self.view[name].tensor]
        return state["accumulator_0"], state["accumulator_1"]

    @torch.no_grad()
    def reselect(self, name: str, origin: Tensor, seeds: Any) -> None:
        """Element j of a tensor with a support is now what element origin[j] was, or new where origin[j] = -1; it may have
        fewer elements than before."""
        if "momentum" in (state := self.state[self.view[name].tensor]):
            state["momentum"] = torch.where(origin >= 0, state["momentum"][origin], 0.0)

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """One float32 accumulator a row, column, ..., and one momentum a weight, if any."""
        axes = [shape.matrix if isinstance(shape, SparseShape) else tuple(shape) for shape, _ in shapes.values()]
        momentum = sum(prod(shape) for shape, _ in shapes.values()) if config.momentum else 0
        return 4 * (sum(sum(a) if a else 1 for a in axes) + momentum)


def _grow(state: dict[str, Any], gradient: Tensor) -> Tensor:
    """u of a tensor, shaped as it is; the accumulators are raised to it."""
    g = gradient if gradient.ndim else gradient.view(1)
    views = [state[f"accumulator_{j}"].view([-1 if j == axis else 1 for axis in range(g.ndim)]) for j in range(g.ndim)]
    u = views[0].expand_as(g)
    for view in views[1:]:
        u = torch.minimum(u, view)
    u = u + g * g
    for j in range(g.ndim):
        others = [axis for axis in range(g.ndim) if axis != j]
        state[f"accumulator_{j}"].copy_(u.amax(others) if others else u)
    return u.view(gradient.shape)


def _grow_rows_and_columns(state: dict[str, Any], gradient: Tensor, support: Support) -> Tensor:
    """The same of some entries of a matrix."""
    r, c = state["accumulator_0"], state["accumulator_1"]
    row, column = support.rows.long(), support.columns.long()
    u = torch.minimum(r[row], c[column]) + gradient * gradient
    r.scatter_reduce_(0, row, u, "amax")
    c.scatter_reduce_(0, column, u, "amax")
    return u


build = SM3
