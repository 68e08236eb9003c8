"""SWAN: descent along standardised and whitened gradients; no state.

Source: Ma et al., "SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training", 2024 (arXiv 2412.13148). For
the gradient G [m, n] of a matrix, with mean and root mean square of each row over its n entries:

    G <- G - mean (if centre);   G <- G / rms;   D = (G G^T)^(-1/2) G;   W <- W - lr (||G|| / ||D||) D

The inverse root is a coupled Newton-Schulz iteration, from Y = G G^T / ||G G^T|| and Z = I:

    Y <- Y (3 I - Z Y) / 2;   Z <- (3 I - Z Y) Z / 2;   Z -> Y_0^(-1/2)

The step size of 1/2 is the one that converges to the inverse root; the smaller of G G^T and G^T G is iterated, which gives
the same D. With the rescaling, entries have a root mean square of 1 and `lr` is comparable to Adam's. The paper gives linear
layers this update and the rest to Adam; here all matrices get it, and tensors with fewer than two axes their gradient over
its root mean square, so that there is no state at all.

Cost: one forward and one backward a step, then about 6 k s^3 + 4 s m n multiplications a matrix with s = min(m, n), and
temporaries of 3 s^2 and 2 m n for one tensor at a time. It does not: hold state, clip.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from smidgen.optim._stateless import TINY, StatelessConfig, StatelessOptimizer
from smidgen.params import ParamView

status = "experimental"


class Config(StatelessConfig):
    """Options of SWAN."""

    iterations: int = Field(10, ge=1, description="k: Newton-Schulz iterations; the paper's 10")
    # Not the paper's default: what every row loses is then never descended, and the contract's quadratic stays at 0.36.
    centre: bool = Field(False, description="take each row's mean off first, as the paper does")


class SWAN(StatelessOptimizer):
    """SWAN over any tensors."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))

    def _direction(self, g: Tensor) -> Tensor:
        g = standardised(g, centre=self.config.centre)
        d = whitened(g, self.config.iterations)
        return d.mul_(torch.linalg.vector_norm(g) / torch.linalg.vector_norm(d).clamp_min(TINY))


def standardised(g: Tensor, *, centre: bool) -> Tensor:
    """Rows of root mean square 1, of mean 0 where centred; rows of zeros stay zero."""
    if centre:
        g = g - g.mean(1, keepdim=True)
    return g / g.square().mean(1, keepdim=True).sqrt().clamp_min(TINY)


def whitened(g: Tensor, iterations: int) -> Tensor:
    """(g g^T)^(-1/2) g, up to a factor, as far as so many iterations go."""
    if g.shape[0] > g.shape[1]:
        return whitened(g.mT, iterations).mT.contiguous()
    y = g @ g.mT
    y = y / torch.linalg.vector_norm(y).clamp_min(TINY)
    eye = torch.eye(len(y), dtype=y.dtype, device=y.device)
    z = eye
    for _ in range(iterations):
        t = (3.0 * eye - z @ y) / 2.0
        y, z = y @ t, t @ z
    return z @ g


build = SWAN
