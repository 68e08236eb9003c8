"""LOZO-M: LOZO with momentum, kept in the left factors.

Source: Chen et al., "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures", ICLR 2025 (arXiv
2410.07698). With D_t = A_t V^T, A_t = U_t / sqrt(r), as in lozo, and b = momentum:

    M <- b M + (1 - b) c A_t  (the first step: M = c A_t);  W <- W - lr * M V^T
    when V_old is replaced by V:  M <- M V_old^T V / n

The last line carries M over into the new subspace. Tensors that are no matrices have a momentum buffer of their own.

Cost: 2q forwards; no pass over the matrices but at a refresh. State: L and M, 8 r bytes a row of each matrix; 4 bytes an
element of all other tensors. A step without a finite loss leaves M as it is. It does not: bias correction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from smidgen import noise
from smidgen.lowrank import is_matrix
from smidgen.objective import Objective
from smidgen.optim._lazy import LazyConfig, LazyOptimizer
from smidgen.optim._optimizer import Outcome
from smidgen.optim._values import Estimate, suggested
from smidgen.params import ParamView

status = "experimental"

SUGGESTED = suggested(normalise="rms")


class Config(LazyConfig):
    """Options of LOZO-M. Defaults are the paper's."""

    momentum: float = Field(0.9, ge=0, lt=1, description="b, the share of M that is kept in a step")


class LOZOM(LazyOptimizer):
    """LOZO-M over any tensors. See the module for the update. Raises ConfigError where no tuned tensor is a matrix."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))
        self.begun = False  # whether M holds a step

    def _step(self, objective: Objective) -> Outcome:
        g = self.shaped_estimate(objective)
        if g.dead:
            return g.outcome()
        self.decay_()
        kept = self.config.momentum if self.begun else 0.0
        for lr, held, rest in self.groups_of():
            momenta = [self.left(name, "momentum").mul_(kept) for name in held]
            self.pull_(held, g, 1.0 - kept, momenta)
            for name, M in zip(held, momenta, strict=True):
                self.left(name).add_(M, alpha=-lr)
            for name in rest:
                self._move(name, g, lr, kept)
        self.begun = True
        old = self.subspace
        if self.refresh_():
            self._carry_over(old)
        return g.outcome()

    def _move(self, name: str, g: Estimate, lr: float, kept: float) -> None:
        """v <- b v + (1 - b) g_hat;  w <- w - lr v, for a tensor that is no matrix."""
        entry = self.view[name]
        state = self.state[entry.tensor]
        if not state:
            state["momentum_buffer"] = torch.zeros(entry.tensor.shape, dtype=torch.float32, device=entry.tensor.device)
        v, at = state["momentum_buffer"], self.rounding_address(self.config.seed)
        noise.update_(v, g.terms(name, 1.0 - kept), g.Z[0].distribution, decay=kept, at=at)

        def descend(w: Tensor) -> None:
            w.add_(v, alpha=-lr)

        self.view.edit_(name, descend, at=at, rounding=self.config.rounding)

    def _carry_over(self, old: int) -> None:
        """M <- M V_old^T V / n."""
        before, now = self.subspace_of(old), self.subspace_of(self.subspace)
        for name, (_, n) in self.shapes.items():
            M = self.left(name, "momentum")
            M.copy_(M @ (before.right(name).T @ now.right(name)) / n)

    def _scalars(self) -> dict[str, Any]:
        return {**super()._scalars(), "begun": self.begun}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        self.begun = scalars.pop("begun")
        super()._load_scalars(scalars)

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: LazyConfig) -> int:
        """L and M of the matrices, a momentum buffer of the rest; float32."""
        rest = sum(4 * prod(shape) for shape, _ in shapes.values() if not is_matrix(shape))
        return 2 * LazyOptimizer.state_bytes(shapes, config) + rest


build = LOZOM
