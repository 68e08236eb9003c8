"""FZOO: a batch of one-sided probes around one base, the step divided by the spread of their losses.

Source: "FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards Adam-Scale Speed", 2025 (arXiv
2506.09034). With N = `queries` directions z_i, L_0 = L(theta), L_i = L(theta + eps z_i) on the same data:

    sigma^2 = 1/(N - 1) sum_i (L_i - mean L)^2;  theta <- theta - lr * 1/N sum_i (L_i - L_0) / sigma * z_i

Dividing by sigma makes the length of a step independent of the scale of the loss and of eps: lr is about the change of a weight
in one step, times 1/sqrt(N). Directions are low-rank and summed in a subspace by default, so that all probes share one
forward and one product with the frozen weights (`_lazy`, `smidgen.batched`); the paper's are dense Rademacher.

Cost: N + 1 forwards; no pass over the matrices but at a refresh. State: the left factor, 4 r bytes a row of each matrix.
Queries without a finite loss are left out; fewer than two, or losses that are all equal, make a bad step, or move nothing.
It does not: momentum, reuse of the losses of earlier steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from smidgen.objective import Objective
from smidgen.optim._lazy import LazyConfig, LazyOptimizer
from smidgen.optim._optimizer import Outcome
from smidgen.optim._values import suggested
from smidgen.params import ParamView

status = "experimental"

SUGGESTED = suggested(rank=1, queries=8)


class Config(LazyConfig):
    """Options of FZOO."""

    lr: float = Field(1e-4, gt=0, description="learning rate, about sqrt(queries) times the change of a weight in one step")
    sides: Literal[1] = Field(1, description="one-sided: all probes share the loss at theta")  # type: ignore[assignment]
    normalise: Literal["none"] = Field("none", description="the step is divided by the losses' standard deviation")  # type: ignore[assignment]
    queries: int = Field(8, ge=2, description="directions per step, N")


class FZOO(LazyOptimizer):
    """FZOO over any tensors. See the module for the update. Raises ConfigError where no tuned tensor is a matrix."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))

    def _step(self, objective: Objective) -> Outcome:
        cfg = self.config
        g = self.shaped_estimate(objective)
        if len(g.c) < 2:
            return Outcome(loss=torch.nan, written=False, voided=cfg.queries)
        sigma = spread([c * cfg.eps for c in g.c])
        step = replace(g, c=tuple(c * cfg.eps / sigma if sigma > 0.0 else 0.0 for c in g.c))
        self.descend_(step)
        return g.outcome(**{"zo/spread": sigma})


def spread(values: Sequence[float]) -> float:
    """Standard deviation with N - 1 in the denominator.

    >>> spread([1.0, 3.0])
    1.4142135623730951
    """
    mean = sum(values) / len(values)
    return (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5


build = FZOO
