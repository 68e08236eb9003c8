"""ZO-SGD, also known as MeZO: descent along random directions whose slopes are measured with forward passes.

Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023 (arXiv 2305.17333), algorithm 1;
q > 1 is its n-SPSA, the one-sided form the forward difference of the same family. With z_i a random direction:

    two-sided   c_i = [L(theta + eps z_i) - L(theta - eps z_i)] / (2 eps)
    one-sided   c_i = [L(theta + eps z_i) - L(theta)] / eps
    theta <- theta - lr * (1/q) sum_i c_i z_i,  weights with two axes or more first decayed by 1 - lr * weight_decay

Cost: 2q forwards (q + 1 one-sided) and one pass over the weights a step. State: none (one float with normalise: rms).
Deviation from the paper: Rademacher noise by default (same theory, less variance, far cheaper); preset `mezo` is
Gaussian. It does not: momentum, variance reduction, schedules of q.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from smidgen.directions import Dense, Distribution
from smidgen.objective import Objective
from smidgen.optim._optimizer import MethodConfig, Optimizer, Outcome
from smidgen.optim._values import Normalise, RunningRMS, warn_if_stuck
from smidgen.params import ParamView, Rounding

status = "experimental"

PRESETS: dict[str, dict[str, Any]] = {
    "mezo": {"distribution": "gaussian", "normalise": "none", "lr": 1e-6, "eps": 1e-3, "sides": 2, "queries": 1},
}

# Without an lr of the user's: from results/real_input and the embedded model's README; one rate serves several tasks.
SUGGESTED: dict[str, dict[str, Any]] = {
    "full": {"lr": 3e-4, "eps": 1e-3, "normalise": "rms"},
    "lora": {"lr": 1e-3, "eps": 1e-2, "normalise": "rms"},
}


class Config(MethodConfig):
    """Options of ZO-SGD. Defaults are MeZO's for full fine-tuning, except the noise."""

    lr: float = Field(1e-6, gt=0, description="learning rate; with normalise: rms, the RMS change of a weight per step")
    eps: float = Field(1e-3, gt=0, description="size of a probe, in units of the weights")
    queries: int = Field(1, ge=1, description="directions per step, q")
    sides: Literal[1, 2] = Field(2, description="2: central difference; 1: forward difference with one shared base")
    distribution: Distribution = Field("rademacher", description="entries of z: rademacher (+-1) or gaussian")
    normalise: Normalise = Field("none", description="rms: divide the projected gradient by its running RMS")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of weights with two axes or more")
    rounding: Rounding = Field("stochastic", description="rounding of updates to 16-bit weights")
    seed: int = Field(0, ge=0, description="run seed: addresses all noise")


class ZOSGD(Optimizer):
    """ZO-SGD over any tensors. See the module for the update.

    >>> w = torch.ones(8, requires_grad=True)
    >>> opt = ZOSGD([w], lr=0.05)
    >>> loss = [opt.step(lambda: (w**2).sum()) for _ in range(100)]
    >>> loss[-1] < 0.1 * loss[0]
    True
    """

    uses: ClassVar[frozenset[str]] = frozenset({"losses"})

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))
        self.rms = RunningRMS()

    def _step(self, objective: Objective) -> Outcome:
        cfg = self.config
        if self.t == 0:
            warn_if_stuck(self.view, cfg.eps)
        ids, eps, q = self.view.ids, cfg.eps, cfg.queries
        Z = [Dense(cfg.seed, self.t, i, ids, cfg.distribution) for i in range(q)]
        if cfg.sides == 2:
            L = objective.losses([((z, s * eps),) for z in Z for s in (1, -1)]).view(q, 2)
            c = (L[:, 0] - L[:, 1]) / (2 * eps)
            base = L.mean(1)
        else:
            L = objective.losses([(), *(((z, eps),) for z in Z)])
            c = (L[1:] - L[0]) / eps
            base = L[:1].expand(q)
        live = torch.isfinite(c).nonzero()[:, 0].tolist()
        if not live:
            return Outcome(loss=torch.nan, written=False, voided=q)
        slopes = [float(c[i]) for i in live]
        steps = self.rms(slopes) if cfg.normalise == "rms" else slopes
        for group in self.param_groups:
            probe = [(Z[i], -group["lr"] * c_i / len(live)) for i, c_i in zip(live, steps, strict=True)]
            decay = self.decay(group, cfg.weight_decay)
            at = self.rounding_address(cfg.seed)
            self.view.apply_(probe, decay=decay, names=self.names_of(group), at=at, rounding=cfg.rounding)
        measures = {"zo/projected_grad": sum(slopes) / len(slopes)}
        return Outcome(float(base[live].mean()), written=True, voided=q - len(live), measures=measures)

    def _scalars(self) -> dict[str, Any]:
        return {"mean_square": self.rms.mean_square, "count": self.rms.count}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        self.rms.mean_square, self.rms.count = scalars["mean_square"], scalars["count"]

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """No tensor is held."""
        return 0


build = ZOSGD
