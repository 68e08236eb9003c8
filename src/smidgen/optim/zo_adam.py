"""ZO-Adam (ZO-AdaMM): Adam fed with forward-only gradient estimates.

Source: Chen et al., "ZO-AdaMM", 2019 (arXiv 1910.06513), in the form of the ZO-Bench study: torch.optim.Adam with bias
correction fed with the estimate g_hat of zo_sgd,

    m <- b1 m + (1 - b1) g_hat;  v <- b2 v + (1 - b2) g_hat^2
    theta <- (1 - lr * weight_decay) theta - lr * m_hat / (sqrt(v_hat) + adam_eps)

`v_max` divides by the largest v so far, as ZO-AdaMM (and torch's amsgrad) does. With one Rademacher direction every entry
of g_hat^2 is c^2: v is then one number, kept as such, and the method is momentum on normalised estimates.

Cost: forwards of zo_sgd; one pass over the weights and their state. State: m and v, float32 or in 8 bits (`state`): 8 or 2
bytes a weight, half of it with one Rademacher direction, half more with v_max. The study's runs keep both in the dtype
of the weights and estimate along Gaussian noise (preset `zo_bench`). A step without a finite loss leaves the state as it
is. It does not: store the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from smidgen.objective import Objective
from smidgen.optim import _eight_bit
from smidgen.optim._adam import Adam, AdamOptimizer
from smidgen.optim._optimizer import Outcome
from smidgen.optim._values import Estimate, ValueConfig, suggested
from smidgen.params import ParamView

status = "experimental"

PRESETS: dict[str, dict[str, Any]] = {  # lr: of the study's grid, 1e-4 .. 1e-8
    "zo_bench": {"distribution": "gaussian", "lr": 1e-6, "eps": 1e-3, "beta1": 0.9, "beta2": 0.999},
}

SUGGESTED = suggested()


class Config(ValueConfig):
    """Options of ZO-Adam; the study's, except the noise."""

    lr: float = Field(1e-6, gt=0, description="learning rate; middle of the study's grid")
    beta1: float = Field(0.9, ge=0, lt=1, description="memory of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="memory of the second moment")
    adam_eps: float = Field(1e-8, gt=0, description="added to the root of the second moment; not the size of a probe")
    v_max: bool = Field(False, description="divide by the largest second moment so far: the original ZO-AdaMM")
    state: Literal["float32", "8bit"] = Field(
        "float32",
        description="how m and v are kept; 8bit: block-wise codes of bitsandbytes, tensors under 4,096 entries float32",
    )


def _rule(config: Config) -> Adam:
    uniform = config.distribution == "rademacher" and config.queries == 1
    return Adam(config.beta1, config.beta2, config.adam_eps, config.v_max, config.state == "8bit", uniform)


class ZOAdam(AdamOptimizer):
    """ZO-Adam over any tensors."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        config = config or Config(**options)
        super().__init__(params, config, _rule(config))
        if config.state == "8bit":
            _eight_bit.require()

    def _step(self, objective: Objective) -> Outcome:
        g = self.estimate(objective)
        if g.dead:
            return g.outcome()
        self.adam.begin(g.c[0] ** 2)
        self.rewrite_(partial(self._update, g))
        return g.outcome()

    def _update(self, g: Estimate, name: str, lr: float, span: slice, w: Tensor, work: Tensor) -> None:
        """One block: the moments, then the step."""
        if self.adam.uniform:
            state = self.adam.moments(self.state, self.view[name].tensor)
            self.adam.move_along(state, span, g.terms(name, 1.0 - self.adam.beta1), g.Z[0].distribution, w, lr)
        else:
            self._adam_(g, name, lr, span, w, work)

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """m and v of every weight; v is one number with one Rademacher direction."""
        return _rule(config).state_bytes(shapes)


build = ZOAdam
