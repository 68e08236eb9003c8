"""Shared by methods with back-propagation: gradients from the objective, clipping, float32 work on 16-bit weights."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from smidgen.objective import Objective
from smidgen.optim._optimizer import Optimizer, Outcome


class GradientOptimizer(Optimizer):
    """One back-propagation a step, then `_update` for each tensor that has a gradient.

    The update works in float32: on the weight itself where it is float32, else on a temporary copy of one tensor that
    is rounded once when it is written back. A non-finite loss or gradient makes a bad step: nothing is written.
    """

    uses = frozenset({"backward"})

    def _update(self, group: dict[str, Any], gradient: Tensor, state: dict[str, Any], weight: Tensor) -> None:
        """weight <- one update, in place; both float32."""
        raise NotImplementedError

    def _step(self, objective: Objective) -> Outcome:
        with torch.enable_grad():
            loss = objective.backward()
        held = [(g, e) for g in self.param_groups for e in map(self.view.entries.get, self.names_of(g)) if e]
        gradients = [e.tensor.grad for _, e in held if e.tensor.grad is not None]
        norm = math.inf
        if gradients and math.isfinite(loss):
            norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients])))
        if not math.isfinite(norm):
            self.zero_grad(set_to_none=True)
            return Outcome(loss=torch.nan, written=False, voided=1)
        limit = self.config.max_grad_norm
        scale = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0  # torch.nn.utils.clip_grad_norm_'s rule
        for group, entry in held:
            if entry.tensor.grad is None:
                continue
            gradient = entry.tensor.grad.float()
            if scale != 1.0:
                gradient = gradient * scale
            state = self.state[entry.tensor]
            self.view.edit_(
                entry.name,
                functools.partial(self._update, group, gradient, state),
                at=self.rounding_address(self.config.seed),
                rounding=self.config.rounding,
            )
            entry.tensor.grad = None
        return Outcome(loss=loss, written=True, measures={"grad_norm": norm})
