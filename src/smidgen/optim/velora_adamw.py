"""AdamW on compressed gradients: state of O x G numbers for a weight of O x D, with the update of dense AdamW.

For gradients dW = U (x) v with fixed vectors v (activations: velora) the moments of dense Adam are m (x) v and s (x) v^2,
so its step on the reconstructed gradient is

    m <- b1 m + (1 - b1) U;  s <- b2 s + (1 - b2) U^2;  W <- (1 - lr wd) W - lr [m_hat / (sqrt(s_hat) + eps)] (x) sign(v)

exactly, with an eps of eps |v| in the dense one. Weights whose v is zero only decay. Source: the update is AdamW's (Loshchilov
and Hutter, 2019, arXiv 1711.05101), the gradient VeLoRA's (Miles et al., 2024, arXiv 2405.17991); the identity is ours.
The global norm of compressed gradients is that of the U's, so clipping is exact too. Tensors whose gradient is dense
(norms, biases, embeddings, everything without `activations: velora`) are updated by AdamW.

Cost: one forward and one backward a step; 8 G / D bytes of float32 state a compressed weight, 8 for the others.
It does not: refresh v (the identity needs it fixed), change what is saved in the forward (that is `activations`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from smidgen.activations._compressed import Compressed, add_outer_
from smidgen.optim._gradients import CompressedUpdate, GradientConfig, GradientOptimizer, adamw_, adamw_bytes
from smidgen.params import ParamView, Rounding

status = "experimental"

SUGGESTED: dict[str, dict[str, Any]] = {"full": {"lr": 1e-4}, "lora": {"lr": 1e-3}}  # adamw's


class Config(GradientConfig):
    """Options of compressed AdamW; defaults are torch's AdamW's, except the learning rate."""

    lr: float = Field(5e-5, gt=0, description="learning rate; as in adamw")
    beta1: float = Field(0.9, ge=0, lt=1, description="memory of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="memory of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment, of U where it is compressed")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of weights with two axes or more")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global gradient norm; 0 turns clipping off")
    rounding: Rounding = Field("stochastic", description="rounding of updates to 16-bit weights")
    seed: int = Field(0, ge=0, description="run seed: addresses the rounding")


class VeLoRAAdamW(GradientOptimizer):
    """AdamW over any tensors, on the compressed gradients of those that have one."""

    compressed: ClassVar[bool] = True

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        cfg = self.config
        return {"lr": group["lr"], "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps, "decay": cfg.weight_decay}

    def _update(self, group: dict[str, Any], gradient: Tensor, state: dict[str, Any], weight: Tensor) -> None:
        adamw_(weight, gradient, state, **self._options(group))

    def _compressed_update(self) -> CompressedUpdate:
        return self._update_compressed

    def _update_compressed(self, group: dict[str, Any], gradient: Compressed, state: dict[str, Any], weight: Tensor) -> None:
        compressed_adamw_(weight, gradient, state, **self._options(group))

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """Two float32 moments and a counter of each gradient; `VeLoRA.gradient_shapes` gives the compressed shapes."""
        return sum(adamw_bytes(shape) for shape, _ in shapes.values())


def compressed_adamw_(
    weight: Tensor,
    gradient: Compressed,
    state: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> None:
    """One step on weight [O, D]; the moments have the shape of U [O, G]. Needs one temporary of that shape."""
    if decay:
        weight.mul_(1.0 - lr * decay)
    step = gradient.u.new_zeros(gradient.u.shape)
    adamw_(step, gradient.u, state, lr=lr, betas=betas, eps=eps, decay=0.0)  # minus lr times Adam's direction
    add_outer_(weight, step.to(weight.dtype), gradient.v.sign().to(weight.dtype), 1.0)


build = VeLoRAAdamW
