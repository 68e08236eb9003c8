"""SinkGD: descent along gradients whose rows and columns are normalised in turn; no state.

Source: Scetbon et al., "Gradient Multi-Normalization for Stateless and Scalable LLM Training", 2025 (arXiv 2502.06742),
algorithms 3 and 4. For the gradient X [m, n] of a matrix, L times

    X <- sqrt(n) diag(1 / ||rows of X||) X;  X <- sqrt(m) X diag(1 / ||columns of X||);    then W <- W - lr X

so that every entry has a root mean square of 1 and `lr` is comparable to Adam's. The paper gives linear layers this update
and leaves embeddings, norms and the head to Adam; here all matrices get it, and tensors with fewer than two axes their
gradient over its root mean square, so that there is no state at all.

Cost: one forward and one backward a step, then 2 L passes over the gradient of one tensor at a time, O(L m n), and one
temporary of its size. It does not: hold state, clip (a step has one length), average gradients over steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from smidgen.optim._stateless import TINY, StatelessConfig, StatelessOptimizer
from smidgen.params import ParamView

status = "experimental"


class Config(StatelessConfig):
    """Options of SinkGD."""

    iterations: int = Field(5, ge=1, description="L: how often rows and columns are normalised; the paper's 5")


class SinkGD(StatelessOptimizer):
    """SinkGD over any tensors."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))

    def _direction(self, g: Tensor) -> Tensor:
        return multi_normalised(g, self.config.iterations)


def multi_normalised(g: Tensor, iterations: int) -> Tensor:
    """Rows, then columns, of length sqrt(their number of entries), so many times. g [m, n]; rows of zeros stay zero."""
    m, n = g.shape
    x = g.clone()
    for _ in range(iterations):
        for axis, length in ((1, math.sqrt(n)), (0, math.sqrt(m))):
            x.mul_(length / torch.linalg.vector_norm(x, dim=axis, keepdim=True).clamp_min(TINY))
    return x


build = SinkGD
