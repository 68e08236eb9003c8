"""ZO-SGD-Cons (conservative): a step is taken only where the same data say that it helps.

Source: the ZO-Bench study's ZO-SGD-Cons (Zhang et al., "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM
Fine-Tuning", 2024, arXiv 2402.11592). With the estimate g_hat of zo_sgd and one minibatch B:

    theta <- argmin of L(.; B) over {theta, theta - lr * g_hat, theta + lr * g_hat}

The candidates are evaluated as probes: theta is written once, when a move is accepted, and is the same, bit for bit, when
both are rejected. Ties go to theta, then to theta - lr * g_hat. A candidate with a non-finite loss is voided: it comes last.
The candidates are ranked without weight decay, which is part of an accepted move only, and (16-bit weights) as rounded to
nearest.

Cost: 5 forwards with two sides and q = 1 (2q + 3); 4 with `base: mean`, and with `sides: 1`, whose base is L(theta)
already; at most one pass over the weights. State: none (one float with normalise: rms); AdamW's with `compat_adamw`, which
also writes theta for every trial. It does not: line searches, other data for the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from smidgen.directions import Probe
from smidgen.objective import Objective
from smidgen.optim._adam import Adam, AdamOptimizer
from smidgen.optim._optimizer import Outcome
from smidgen.optim._values import Estimate, ScaledConfig, suggested
from smidgen.params import ParamView

status = "experimental"

PRESETS: dict[str, dict[str, Any]] = {  # lr: of the study's grid, 1e-5 .. 1e-8
    "zo_bench": {"distribution": "gaussian", "normalise": "none", "lr": 1e-6, "eps": 1e-3, "compat_adamw": True},
}

SUGGESTED = suggested(normalise="rms")


class Config(ScaledConfig):
    """Options of ZO-SGD-Cons; the study's, except the noise."""

    base: Literal["measured", "mean"] = Field(
        "measured", description="L(theta): measured, or the mean of the probes' losses, one forward less and O(eps^2) too high"
    )
    compat_adamw: bool = Field(
        False,
        description="make and undo the trial moves with AdamW steps (betas 0.9, 0.999, eps 1e-8) along g, -2 g, then g or 2 g: "
        "reproduces the public ZO-Bench runs, whose trainer fell back to AdamW, so that no move undoes another; the published "
        "ZO-SGD-Cons numbers depend on it",
    )

    @field_validator("base")
    @classmethod
    def _mean_of_two_sides(cls, base: str, info: ValidationInfo) -> str:
        if base == "mean" and info.data.get("sides") == "residual":
            raise ValueError("one-point probes have no other side to average with: use base: measured, or sides: 2")
        return base


class ZOConservative(AdamOptimizer):
    """ZO-SGD-Cons over any tensors."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options), Adam())

    def _step(self, objective: Objective) -> Outcome:
        cfg = self.config
        g = self.estimate(objective)
        if g.dead:
            return g.outcome()
        if cfg.compat_adamw:
            return self._trial_steps(objective, g)
        down, up = self._candidate(g, -1.0), self._candidate(g, 1.0)
        if cfg.sides == 1 or cfg.base == "mean":
            L = [g.loss, *objective.losses([down, up]).tolist()]
        else:
            L = objective.losses([(), down, up]).tolist()
        dead = sum(not math.isfinite(x) for x in L)
        g = replace(g, voided=g.voided + dead)
        if dead == len(L):
            return replace(g, Z=()).outcome()
        best = min(range(3), key=lambda i: L[i] if math.isfinite(L[i]) else math.inf)
        if best == 1:
            self.move_(g.along)
        elif best == 2:
            self.move_(lambda minus_lr: g.along(-minus_lr))
        return g.outcome(**{"zo/move": (0.0, -1.0, 1.0)[best]})

    def _candidate(self, g: Estimate, sign: float) -> Probe:
        """sign * lr * g_hat, with each group's lr."""
        if len(self.param_groups) == 1:
            return g.along(sign * self.param_groups[0]["lr"])
        parts = ((g.along(sign * group["lr"]), frozenset(self.names_of(group))) for group in self.param_groups)
        return [(replace(z, support=names), s) for probe, names in parts for z, s in probe]  # type: ignore[type-var]

    def _trial_steps(self, objective: Objective, g: Estimate) -> Outcome:
        """The public code's moves: AdamW along g, back past theta along -2 g, then where its comparisons lead."""

        def loss() -> float:
            return objective.losses([()]).item()

        def step(times: float, write: int) -> None:
            self.adam.begin()
            self.rewrite_(partial(self._adam_, replace(g, c=tuple(times * c for c in g.c))), write)

        l0 = loss()
        if not math.isfinite(l0):
            return replace(g, Z=(), voided=g.voided + 1).outcome()
        step(1.0, write=0)
        l1 = loss()
        step(-2.0, write=1)
        l2 = loss()
        if l1 > l0:
            if l0 < l2:
                step(1.0, write=2)
        elif l1 < l2:
            step(2.0, write=2)
        return g.outcome()

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """No tensor is held, but for AdamW's two."""
        return Adam().state_bytes(shapes) if config.compat_adamw else 0


build = ZOConservative
