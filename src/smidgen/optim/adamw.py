"""AdamW with back-propagation: the first-order baseline. The update is torch's own.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019 (arXiv 1711.05101).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- (1 - lr wd) w - lr m_hat / (sqrt(v_hat) + eps)

Cost: one forward and one backward a step; 8 bytes of float32 state a weight, also for 16-bit weights, whose update is
made in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from smidgen.optim._gradients import GradientConfig, GradientOptimizer, adamw_, adamw_bytes
from smidgen.params import ParamView, Rounding

status = "experimental"

# Without an lr of the user's: from results/real_input, for models of 3M to 22M weights; larger ones want smaller rates.
# Prefix, prompt and head: the best of few rates on the embedded model's reviews, 60 steps; bitfit: chosen.
SUGGESTED: dict[str, dict[str, Any]] = {
    "full": {"lr": 1e-4},
    "lora": {"lr": 1e-3},
    "prefix": {"lr": 1e-1},
    "prompt": {"lr": 1e-3},
    "bitfit": {"lr": 1e-3},
    "head": {"lr": 1e-2},
}


class Config(GradientConfig):
    """Options of AdamW; defaults are torch's, except the learning rate."""

    lr: float = Field(5e-5, gt=0, description="learning rate; 5e-5 is transformers' default")
    beta1: float = Field(0.9, ge=0, lt=1, description="memory of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="memory of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of weights with two axes or more")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global gradient norm; 0 turns clipping off")
    rounding: Rounding = Field("stochastic", description="rounding of updates to 16-bit weights")
    seed: int = Field(0, ge=0, description="run seed: addresses the rounding")


class AdamW(GradientOptimizer):
    """AdamW over any tensors."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))

    def _update(self, group: dict[str, Any], gradient: Tensor, state: dict[str, Any], weight: Tensor) -> None:
        cfg = self.config
        adamw_(
            weight,
            gradient,
            state,
            lr=group["lr"],
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.eps,
            decay=cfg.weight_decay,
        )

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """Two float32 moments a weight and one float32 counter a tensor."""
        return sum(adamw_bytes(shape) for shape, _ in shapes.values())


build = AdamW
