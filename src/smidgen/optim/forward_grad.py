"""Forward gradient: descent along random directions whose slopes are exact, by forward-mode differentiation.

Source: Baydin et al., "Gradients without Backpropagation", 2022 (arXiv 2202.08587), as in ZO-Bench (arXiv 2402.11592).
With z_i random, E[z_i z_i^T] = 1:

    c_i = <grad L(theta), z_i>
    theta <- theta - lr * (1/q) sum_i c_i z_i,  weights with two axes or more first decayed by 1 - lr * weight_decay

Unbiased, without the error of a finite difference and without eps. Cost: q evaluations in forward mode, each counted as
one forward and one jvp and about two to three forwards in time, and one pass over the weights. Memory: no graph; the
activations of one layer twice, and the tangent of the tensors that one module reads; see `smidgen.forward_mode`. State:
none (one float with normalise: rms). Works where attention has no forward mode: it runs through plain kernels meanwhile.
Deviation from the paper: Rademacher noise by default; preset `paper` is Gaussian. It does not: momentum, losses that are
not differentiable, a trainer's own loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from smidgen.directions import Dense, Distribution
from smidgen.objective import Objective
from smidgen.optim._optimizer import MethodConfig, Outcome
from smidgen.optim._values import Estimate, Normalise, ValueOptimizer, suggested
from smidgen.params import ParamView, Rounding

status = "experimental"

PRESETS: dict[str, dict[str, Any]] = {"paper": {"distribution": "gaussian", "normalise": "none", "queries": 1}}

SUGGESTED = {scheme: {"lr": rates["lr"], "normalise": "rms"} for scheme, rates in suggested().items()}


class Config(MethodConfig):
    """Options of the forward gradient."""

    lr: float = Field(1e-6, gt=0, description="learning rate; with normalise: rms, the RMS change of a weight per step")
    queries: int = Field(1, ge=1, description="directions per step, q")
    distribution: Distribution = Field("rademacher", description="entries of z: rademacher (+-1) or gaussian")
    normalise: Normalise = Field("none", description="rms: divide the slope by its running RMS")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of weights with two axes or more")
    rounding: Rounding = Field("stochastic", description="rounding of updates to 16-bit weights")
    seed: int = Field(0, ge=0, description="run seed: addresses all noise")


class ForwardGrad(ValueOptimizer):
    """Forward gradient over any tensors."""

    uses: ClassVar[frozenset[str]] = frozenset({"slope"})

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))

    def _step(self, objective: Objective) -> Outcome:
        cfg = self.config
        Z = [Dense(cfg.seed, self.t, i, self.view.ids, cfg.distribution) for i in range(cfg.queries)]
        answers = torch.tensor([objective.slope(z) for z in Z], dtype=torch.float64)
        loss, c = answers[:, 0], answers[:, 1]
        g = Estimate.of(Z, c.where(loss.isfinite(), torch.nan), loss, self.rms if cfg.normalise == "rms" else None)
        if not g.dead:
            self.move_(g.along)
        return g.outcome()

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """No tensor is held."""
        return 0


build = ForwardGrad
