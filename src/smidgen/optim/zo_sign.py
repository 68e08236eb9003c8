"""ZO-SGD-Sign (ZO-signSGD): every weight moves by the learning rate against the sign of its estimated gradient.

Source: Liu et al., "signSGD via Zeroth-Order Oracle", ICLR 2019, with the estimate of zo_sgd in place of theirs:

    sign: element   theta <- theta - lr * sign((1/q) sum_i c_i z_i)       for each weight; a zero does not move
    sign: scalar    theta <- theta - lr * (1/q) sum_i sign(c_i) z_i       what the ZO-Bench study's public code forms

With Rademacher noise and q = 1 the two are the same. sign(0) = 0: a query whose two losses are equal moves nothing.
The sum is taken in float32, from the first query to the last.

Cost: forwards of zo_sgd and one pass over the weights. State: none; two float32 moments with `compat_adamw`. It does not:
scale with the loss (eps and the scale of L matter through signs only), majority votes over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from smidgen.objective import Objective
from smidgen.optim._adam import Adam, AdamOptimizer
from smidgen.optim._optimizer import Outcome
from smidgen.optim._values import Estimate, ValueConfig, suggested
from smidgen.params import ParamView

status = "experimental"

PRESETS: dict[str, dict[str, Any]] = {  # lr: of the study's grid, 1e-4 .. 1e-8
    "zo_bench": {"distribution": "gaussian", "sign": "scalar", "lr": 1e-6, "eps": 1e-3, "compat_adamw": True},
}

SUGGESTED = suggested()


class Config(ValueConfig):
    """Options of ZO-SGD-Sign."""

    lr: float = Field(1e-6, gt=0, description="learning rate: how far a weight moves in one step; middle of the study's grid")
    sign: Literal["element", "scalar"] = Field(
        "element", description="element: sign of each entry of the estimate; scalar: sign of c, times z"
    )
    compat_adamw: bool = Field(
        False,
        description="feed the signs to AdamW (betas 0.9, 0.999, eps 1e-8): reproduces, with sign: scalar, the public ZO-Bench "
        "runs, whose trainer fell back to AdamW, on which the published ZO-SGD-Sign numbers depend",
    )


class ZOSign(AdamOptimizer):
    """ZO-SGD-Sign over any tensors."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options), Adam())

    def _step(self, objective: Objective) -> Outcome:
        cfg = self.config
        g = self.estimate(objective)
        if g.dead:
            return g.outcome()
        along = cfg.sign == "scalar" or (cfg.distribution == "rademacher" and len(g.Z) == 1)  # sign(c z) = sign(c) z
        if along:
            g = replace(g, c=tuple(float((c > 0) - (c < 0)) for c in g.c))
        self.adam.begin()
        if along and not cfg.compat_adamw:
            self.move_(g.along)
        else:
            self.rewrite_(partial(self._update, g, along))
        return g.outcome()

    def _update(self, g: Estimate, along: bool, name: str, lr: float, span: slice, w: Tensor, work: Tensor) -> None:
        """One block: a step along the signs of g_hat, or AdamW's step for them."""
        g.add_(name, span.start, work.zero_())
        if not along:
            work.sign_()
        if self.config.compat_adamw:
            self._feed_(work, name, lr, span, w)
        else:
            w.add_(work, alpha=-lr)

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """No tensor is held, but for AdamW's two."""
        return Adam().state_bytes(shapes) if config.compat_adamw else 0


build = ZOSign
