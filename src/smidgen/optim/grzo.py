"""GRZO: every example has a low-rank direction of its own; a step weighs them by their losses relative to the group's.

Source: "GRZO", 2026 (arXiv 2606.02857): pseudo-independent directions for the examples of a batch, the differences of their
losses divided by the spread over the batch. With V [n, r] kept for `interval` steps as in lozo, and U_n [m, r] drawn for each
of N examples:

    D_n = U_n V^T / sqrt(r);  c_n = [l_n(W + eps D_n) - l_n(W - eps D_n)] / (2 eps);  W <- W - lr * 1/N sum_n c_n / s * D_n

with s the root mean square of the c_n (`_examples`). Tensors that are no matrices get dense noise of each example's own. lr is
about sqrt(N) times the change of a weight in one step, whatever the scale of the loss.

Deviation: the paper multiplies one shared direction by random signs r_n s_n^T; here the left factors are independent, which
keeps all directions of an interval in one subspace, so that steps are summed in a left factor (`_lazy`). Cost: 2q forwards, in
one batch of 2q N rows, and N left factors drawn for each matrix, twice. State: the left factor, 4 r bytes a row of each matrix.
The journal holds 2q N numbers a step. It does not: weigh examples by their number of labels; take a reward or a metric, which
has no loss for each row at its own probe.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from smidgen.directions import Dense
from smidgen.objective import Objective
from smidgen.optim._examples import estimate, relative
from smidgen.optim._lazy import LazyConfig, LazyOptimizer
from smidgen.optim._optimizer import Outcome
from smidgen.optim._values import suggested, warn_if_stuck
from smidgen.params import ParamView

status = "experimental"

SUGGESTED = suggested(4.0, rank=1)  # of 16 examples: the weights then change as much as with one direction


class Config(LazyConfig):
    """Options of GRZO."""

    lr: float = Field(1e-4, gt=0, description="learning rate, about sqrt(examples) times the change of a weight in one step")
    sides: Literal[2] = Field(2, description="antithetic: every direction has its mirror image")  # type: ignore[assignment]
    normalise: Literal["none"] = Field("none", description="the step is divided by the spread of the group")  # type: ignore[assignment]
    queries: int = Field(1, ge=1, description="directions of each example, q")
    rank: int = Field(1, ge=1, description="rank r of a direction; in a smaller matrix its smaller side")


class GRZO(LazyOptimizer):
    """GRZO over any tensors. See the module for the update. Raises ConfigError where no tuned tensor is a matrix."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))

    def _step(self, objective: Objective) -> Outcome:
        cfg = self.config
        if self.t == 0:
            warn_if_stuck(self.view, cfg.eps)
        Z = [Dense(cfg.seed, self.t, i, self.view.ids, cfg.distribution) for i in range(cfg.queries)]
        g = estimate(objective, Z, [self.shaped(z) for z in Z], self.offset(), cfg.eps)
        if g.dead:
            return g.outcome()
        step, spread = relative(g)
        self.descend_(step)
        return g.outcome(**{"zo/spread": spread})


build = GRZO
