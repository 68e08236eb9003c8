"""GaLore: AdamW in a low-rank subspace of each matrix's gradient, found anew every so many steps.

The projector is that of galore-torch, the authors' package. Source: Zhao et al., "GaLore: Memory-Efficient LLM
Training by Gradient Low-Rank Projection", 2024 (arXiv 2403.03507), algorithm 2. For a gradient G [m, n] with m >= n (else
the same from the left), every `interval` steps P [r, n] = the first r right singular vectors of G; then

    R = G P^T;  N = Adam's direction of R;  W <- (1 - lr wd) W - lr scale N P

The moments keep their values when P changes, as in the paper's code. Tensors that are no matrices, embeddings and the output
head are updated by AdamW at the same lr, as there. The gradient itself stays dense.

Cost: one forward and one backward a step; an SVD of each matrix every `interval` steps; state 8 r max(m, n) + 4 r min(m, n)
bytes a matrix, 8 bytes a weight elsewhere. Needs `pip install 'smidgen[galore]'`. It does not: quantise the projections, rotate
moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from smidgen.config import ConfigError
from smidgen.optim._gradients import GradientConfig, GradientOptimizer, adamw_, adamw_bytes
from smidgen.params import ParamView, Rounding

status = "experimental"

_P = "projection"  # key of a projected tensor's state

SUGGESTED: dict[str, dict[str, Any]] = {"full": {"lr": 4e-4}}  # adamw's over `scale`


class Config(GradientConfig):
    """Options of GaLore; defaults are the paper's for pre-training, except the learning rate."""

    lr: float = Field(4e-4, gt=0, description="learning rate, multiplied by scale for projected matrices")
    rank: int = Field(128, ge=1, description="rank r of the subspace; 128 for 60M weights, 256 for 130M")
    interval: int = Field(200, ge=1, description="steps between two SVDs")
    scale: float = Field(0.25, gt=0, description="the paper's alpha: factor of projected updates")
    beta1: float = Field(0.9, ge=0, lt=1, description="memory of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="memory of the second moment")
    eps: float = Field(1e-6, gt=0, description="added to the root of the second moment; as in its code")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of weights with two axes or more")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global gradient norm; 0 turns clipping off")
    rounding: Rounding = Field("stochastic", description="rounding of updates to 16-bit weights")
    seed: int = Field(0, ge=0, description="run seed: addresses the rounding")


def _projector(config: Config) -> Any:
    """A projector of galore-torch without a subspace. Raises ConfigError where the package is not installed."""
    try:
        from galore_torch.galore_projector import GaLoreProjector
    except ImportError:
        raise ConfigError("method galore needs galore-torch, which is not installed: pip install 'smidgen[galore]'") from None
    return GaLoreProjector(config.rank, update_proj_gap=config.interval, scale=config.scale)


def _projected(name: str, shape: Any, rank: int) -> bool:
    """Whether a tensor is projected: a matrix of more than `rank` rows and columns inside the model's layers."""
    outside = ("embed", "wte", "wpe", "lm_head", "classifier", "score")
    return len(shape) == 2 and min(shape) > rank and not any(word in name for word in outside)


class GaLore(GradientOptimizer):
    """GaLore over any tensors."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))
        _projector(self.config)
        for entry in self.view:
            if _projected(entry.name, entry.tensor.shape, self.config.rank):
                self.state[entry.tensor][_P] = torch.empty(0)  # found at the first step

    def _update(self, group: dict[str, Any], gradient: Tensor, state: dict[str, Any], weight: Tensor) -> None:
        cfg = self.config
        adam: dict[str, Any] = {"lr": group["lr"], "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps}
        if _P not in state:
            adamw_(weight, gradient, state, decay=cfg.weight_decay, **adam)
            return
        if cfg.weight_decay:
            weight.mul_(1.0 - group["lr"] * cfg.weight_decay)
        projector = _projector(cfg)
        projector.ortho_matrix = state[_P] if state[_P].numel() else None
        R = projector.project(gradient, int(state.get("step", 0)))
        state[_P] = projector.ortho_matrix.contiguous()
        moments = {key: value for key, value in state.items() if key != _P}
        step = torch.zeros_like(R)
        adamw_(step, R.contiguous(), moments, decay=0.0, **adam)  # minus lr times Adam's direction
        state.update(moments)
        weight.add_(projector.project_back(step))

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """Moments in the subspace and its basis, float32, of projected matrices; AdamW's of others; a counter each."""
        total = 0
        for name, (shape, _) in shapes.items():
            if _projected(name, shape, config.rank):
                total += adamw_bytes((config.rank, max(shape))) + 4 * config.rank * min(shape)
            else:
                total += adamw_bytes(shape)
        return total


build = GaLore
