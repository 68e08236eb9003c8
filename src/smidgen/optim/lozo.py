"""LOZO: forward-only descent along directions of low rank, in a subspace that is kept for some steps.

Source: Chen, Zhang, Cao, Yuan, Wen, "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures",
ICLR 2025 (arXiv 2410.07698). For a matrix W [m, n], with V [n, r] drawn every `interval` steps and U [m, r] every step:

    D = U V^T / sqrt(r);  c = [L(W + eps D) - L(W - eps D)] / (2 eps);  W <- W - lr * c * D

Tensors that are no matrices move as in zo_sgd. The steps of an interval are summed in a left factor, see `_lazy`.

Cost: 2q forwards; no pass over the matrices but at a refresh. State: the left factor, 4 r bytes a row of each matrix.
The paper probes along U V^T and divides the step by r: the same method with eps = sqrt(r) times its eps, lr unchanged. In this
form the entries of D have unit variance. Deviation: U and V have addresses of their own, so a refresh step moves along the
direction that it probed (the public code draws another U there). It does not: momentum, see lozo_m.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from smidgen.objective import Objective
from smidgen.optim._lazy import LazyConfig, LazyOptimizer
from smidgen.optim._optimizer import Outcome
from smidgen.optim._values import suggested
from smidgen.params import ParamView

status = "experimental"

PRESETS: dict[str, dict[str, Any]] = {
    "lozo": {"distribution": "gaussian", "normalise": "none", "lr": 1e-6, "eps": 1.4e-3, "rank": 2, "interval": 50},
}  # the paper's eps 1e-3, times sqrt(2)

SUGGESTED = suggested(normalise="rms")


class Config(LazyConfig):
    """Options of LOZO. Defaults are the paper's."""


class LOZO(LazyOptimizer):
    """LOZO over any tensors. See the module for the update. Raises ConfigError where no tuned tensor is a matrix."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))

    def _step(self, objective: Objective) -> Outcome:
        g = self.shaped_estimate(objective)
        if not g.dead:
            self.descend_(g)
        return g.outcome()


build = LOZO
