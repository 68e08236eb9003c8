"""ZO-SGD, also known as MeZO: descent along random directions whose slopes are measured with forward passes.

Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023 (arXiv 2305.17333), algorithm 1;
q > 1 is its n-SPSA, the one-sided form the forward difference of the same family. With z_i a random direction:

    two-sided   c_i = [L(theta + eps z_i) - L(theta - eps z_i)] / (2 eps)
    one-sided   c_i = [L(theta + eps z_i) - L(theta)] / eps
    residual    c_i = [L(theta + eps z_i) - mean_j L'(theta' + eps z'_j)] / eps     ' is the step before, with its data
    theta <- theta - lr * (1/q) sum_i c_i z_i,  weights with two axes or more first decayed by 1 - lr * weight_decay

Cost: 2q forwards (q + 1 one-sided, q residual) and one pass over the weights a step. State: none (one float with
normalise: rms, one with residual). Residual feedback takes half the forwards and, at equal steps, learns much less
(paper, table 11); its first step has no step before and moves nothing along z.
Deviation from the paper: Rademacher noise by default (same theory, less variance, far cheaper); preset `mezo` is
Gaussian. It does not: momentum, variance reduction, schedules of q.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from smidgen.objective import Objective
from smidgen.optim._optimizer import Outcome
from smidgen.optim._values import ScaledConfig, ValueOptimizer, suggested
from smidgen.params import ParamView

status = "experimental"

PRESETS: dict[str, dict[str, Any]] = {
    "mezo": {"distribution": "gaussian", "normalise": "none", "lr": 1e-6, "eps": 1e-3, "sides": 2, "queries": 1},
}

SUGGESTED = suggested(normalise="rms")


class Config(ScaledConfig):
    """Options of ZO-SGD. Defaults are MeZO's for full fine-tuning, except the noise."""


class ZOSGD(ValueOptimizer):
    """ZO-SGD over any tensors. See the module for the update.

    >>> w = torch.ones(8, requires_grad=True)
    >>> opt = ZOSGD([w], lr=0.05)
    >>> loss = [opt.step(lambda: (w**2).sum()) for _ in range(100)]
    >>> loss[-1] < 0.1 * loss[0]
    True
    """

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))

    def _step(self, objective: Objective) -> Outcome:
        g = self.estimate(objective)
        if not g.dead:
            self.move_(g.along)
        return g.outcome()

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """No tensor is held."""
        return 0


build = ZOSGD
