"""AGZO: low-rank directions in the principal subspace of the activations, found by forwards alone.

Source: "AGZO", 2026 (arXiv 2601.17261): the gradient of a linear layer, sum_t d_t x_t^T, lies in the span of the layer's inputs
x_t, so noise outside of it is wasted. Every `interval` steps, with X [tokens, n] the inputs of W [m, n] in the step's data:

    A [n, r] = the r leading left singular vectors of (X^T X) Omega,  Omega [n, r + 4] Gaussian        1 forward
    D = U A^T;  c = [L(W + eps D) - L(W - eps D)] / (2 eps);  W <- W - lr * c * D                       as in lozo

A has orthonormal columns and U independent entries, so that D x is as large as dense noise would make it, for inputs x in the
subspace, while the entries of D are smaller: eps and lr carry over in what they do to outputs. E[D <G, D>] = G A A^T.

What is no plain linear layer (embeddings, the output head, GPT-2's Conv1D, any closure) keeps lozo's random right factors.
Cost: 2q forwards, one more at a refresh. State: the left factor and the basis, 4 r (m + n) bytes a matrix. The journal holds
n (r + 4) numbers a matrix at every refresh (rank 2, OPT-125M: about 0.5 million, 4 MB). It does not: iterate further, weigh by
label positions. The paper's probes are one-sided: sides=1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smidgen import noise
from smidgen.directions import Dense
from smidgen.lowrank import LowRank, is_matrix, rank_of, sides
from smidgen.objective import Objective
from smidgen.optim._lazy import LazyConfig, LazyOptimizer, rank_in
from smidgen.optim._optimizer import Outcome
from smidgen.optim._values import suggested
from smidgen.params import ParamView

status = "experimental"

SUGGESTED = suggested(normalise="rms")

_MORE = 4  # columns of the sketch beyond the rank; chosen


class Config(LazyConfig):
    """Options of AGZO."""


@dataclass(frozen=True)
class Along(LowRank):
    """A low-rank direction whose right factors are held: sqrt(r) A, or random ones."""

    bases: Mapping[str, Tensor] = field(default_factory=dict)

    def right(self, name: str) -> Tensor:
        return self.bases[name]

    def right_key(self, name: str) -> tuple[str, int]:
        return name, self.subspace


class AGZO(LazyOptimizer):
    """AGZO over any tensors. See the module for the update. Raises ConfigError where no tuned tensor is a matrix."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))
        self.seen = -1  # the subspace whose bases are held

    def _step(self, objective: Objective) -> Outcome:
        if self.seen != self.subspace and not self._look(objective):
            return Outcome(loss=math.nan, written=False, voided=self.config.queries)
        g = self.shaped_estimate(objective)
        if not g.dead:
            self.descend_(g)
        return g.outcome()

    def _look(self, objective: Objective) -> bool:
        """Take the bases of a new subspace; False where activations are not finite."""
        draws = {name: self._omega(name) for name in self.shapes}
        sketches = objective.input_squares(list(self.shapes), draws)
        if not all(bool(Y.isfinite().all()) for Y in sketches.values()):
            return False
        random = super().subspace_of(self.subspace)
        for name, shape in self.shapes.items():
            rank = rank_of(shape, self.rank)
            basis = principal(sketches[name], rank) * rank**0.5 if name in sketches else random.right(name)
            self.state[self.view[name].tensor]["basis"] = basis.float().to(self.device)
        self.seen = self.subspace
        return True

    def _omega(self, name: str) -> Tensor:
        n = self.shapes[name][1]
        out = torch.zeros(n, min(n, rank_of(self.shapes[name], self.rank) + _MORE), device=self.device)
        at = noise.Address(self.config.seed, self.view.ids[name], self.subspace, 1, noise.SUBSPACE)
        noise.accumulate_(out, [(at, 1.0)], "gaussian")
        return out

    def shaped(self, z: Dense) -> Along:
        bases = self.held("basis")
        at = z.seed, z.step, z.query, z.ids
        return Along(*at, self.shapes, self.rank, self.subspace, self.device, z.distribution, bases=bases)

    def subspace_of(self, step: int) -> LowRank:
        cfg, bases = self.config, self.held("basis")
        at = cfg.seed, 0, 0, self.view.ids
        return Along(*at, self.shapes, self.rank, step, self.device, cfg.distribution, bases=bases)

    def _scalars(self) -> dict[str, Any]:
        return {**super()._scalars(), "seen": self.seen}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        self.seen = scalars.pop("seen")
        super()._load_scalars(scalars)

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: LazyConfig) -> int:
        """The left factors and the bases, float32."""
        found = [sides(shape) for shape, _ in shapes.values() if is_matrix(shape)]
        return sum(4 * rank_of(shape, rank_in(config)) * (shape[0] + shape[1]) for shape in found)


def principal(Y: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of Y, [n, rank] float64; the largest entry of each is positive."""
    A = torch.linalg.svd(Y.double().cpu(), full_matrices=False)[0][:, :rank]
    at = A.abs().argmax(0)
    return A * A[at, torch.arange(A.shape[1])].sign()


build = AGZO
