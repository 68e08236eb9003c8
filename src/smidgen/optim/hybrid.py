"""Hybrid: back-propagation on the top of the model and zeroth-order estimates for the rest, in the same step.

Source: the hybrid of ZO-Bench (Zhang et al., 2024, arXiv 2402.11592), which has no public code; the details are ours. With
H the last `top` transformer layers and what follows them (final norm, head, classifier), or what `pattern` finds:

    g_H = grad_H L(theta) by back-propagation, which stops below H
    c_i = [L(theta + eps z_i) - L(theta - eps z_i)] / (2 eps),  z_i zero in H   one-sided: [L(theta + eps z_i) - L(theta)] / eps
    theta_H    <- one step of AdamW or SGD at rate top_lr along g_H, clipped to max_grad_norm
    theta_rest <- theta_rest - lr * (1/q) sum_i c_i z_i;  weights with two axes or more decay by lr * weight_decay

Both estimates are of the same function at the same theta: dropout is off, also while gradients are made. Both updates
follow them. A head tied to the embedding counts as embedding, and belongs to the rest.

Cost: 2q forwards (one-sided: q, its base being the loss that back-propagation computed anyway) and one forward with a
backward through H; activations are held for H only. State: 8 bytes a weight of H with AdamW, none with SGD. The
one-sided base comes from another kernel path than the probe's loss: some 1e-6 of the loss apart in float32, more in 16 bits,
and divided by eps; two-sided is the default. It does not: journals and replay (it resumes from checkpoints), several ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from smidgen.config import ConfigError
from smidgen.directions import Dense
from smidgen.objective import Objective
from smidgen.optim._gradients import adamw_, adamw_bytes, descend
from smidgen.optim._groups import matches, upper, without
from smidgen.optim._optimizer import Optimizer, Outcome
from smidgen.optim._values import Estimate, RunningRMS, ScaledConfig, differences, suggested, warn_if_stuck
from smidgen.params import ParamView

status = "experimental"

SUGGESTED = suggested(normalise="rms")

_BETAS, _ADAM_EPS = (0.9, 0.999), 1e-8  # torch's


class Config(ScaledConfig):
    """Options of the hybrid: those of zo_sgd for the lower part, and the upper part's."""

    sides: Literal[1, 2] = Field(  # type: ignore[assignment]
        2, description="2: central difference; 1: forward difference to the loss that back-propagation computes"
    )
    top: int = Field(1, ge=1, description="last transformer layers that back-propagate, with all that follows them")
    pattern: str | None = Field(None, description="instead of top: regular expression of the names that back-propagate")
    first_order: Literal["adamw", "sgd"] = Field("adamw", description="update of the upper part")
    top_lr: float = Field(5e-5, gt=0, description="learning rate of the upper part; a schedule scales both rates alike")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the upper part's gradient norm; 0 turns clipping off")


class Hybrid(Optimizer):
    """Back-propagation above, zeroth-order below. Raises ConfigError when one of the two parts would be empty."""

    uses: ClassVar[frozenset[str]] = frozenset({"losses", "backward"})

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))
        self.upper, self.lower = parts(list(self.view.entries), self.config)
        self.rms = RunningRMS()

    def _step(self, objective: Objective) -> Outcome:
        cfg = self.config
        if self.t == 0:
            warn_if_stuck(self.view, cfg.eps)
        with torch.enable_grad():
            loss = objective.backward(self.upper, dropout=False)
        try:
            g = self._estimate(objective, loss)
        except BaseException:
            self.zero_grad(set_to_none=True)
            raise
        norm = descend(self, loss, self._update)
        if not g.dead:
            for group in self.param_groups:
                names, decay = without(self.names_of(group), self.upper), self.decay(group, cfg.weight_decay)
                at = self.rounding_address(cfg.seed)
                self.view.apply_(g.along(-group["lr"]), decay=decay, names=names, at=at, rounding=cfg.rounding)
        first = math.isfinite(norm)
        if not first and g.dead:
            return Outcome(loss=torch.nan, written=False, voided=1 + g.voided)
        measures = {"grad_norm": norm, "zo/projected_grad": g.slope}
        return Outcome(loss if first else g.loss, written=True, voided=g.voided + (not first), measures=measures)

    def _estimate(self, objective: Objective, loss: float) -> Estimate:
        cfg, lower = self.config, frozenset(self.lower)
        Z = [Dense(cfg.seed, self.t, i, self.view.ids, cfg.distribution, lower) for i in range(cfg.queries)]
        c, base = differences(objective, Z, cfg.eps, cfg.sides, torch.tensor([loss], dtype=torch.float64))
        return Estimate.of(Z, c, base, self.rms if cfg.normalise == "rms" else None)

    def _update(self, group: dict[str, Any], gradient: Tensor, state: dict[str, Any], weight: Tensor) -> None:
        cfg = self.config
        lr = cfg.top_lr * group["lr"] / cfg.lr
        if cfg.first_order == "adamw":
            adamw_(weight, gradient, state, lr=lr, betas=_BETAS, eps=_ADAM_EPS, decay=cfg.weight_decay)
            return
        if cfg.weight_decay and weight.ndim >= 2:
            weight.mul_(1.0 - lr * cfg.weight_decay)
        weight.add_(gradient, alpha=-lr)

    def _scalars(self) -> dict[str, Any]:
        return {"mean_square": self.rms.mean_square, "count": self.rms.count}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        self.rms.mean_square, self.rms.count = scalars["mean_square"], scalars["count"]

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """AdamW's two float32 moments a weight and one float32 counter a tensor, of the upper part."""
        if config.first_order == "sgd":
            return 0
        return sum(adamw_bytes(shapes[n][0]) for n in parts(list(shapes), config)[0])


def parts(names: Sequence[str], config: Config) -> tuple[list[str], list[str]]:
    """Names that back-propagate, and the rest."""
    above = upper(names, config.top) if config.pattern is None else list(matches(names, config.pattern))
    below = without(names, above)
    if not below:
        raise ConfigError(
            f"all {len(names)} tuned tensors would back-propagate and none be left for the zeroth-order part: lower top or "
            "narrow pattern, or use adamw"
        )
    return above, below


build = Hybrid
