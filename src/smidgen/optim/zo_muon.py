"""ZO-Muon: the estimate in a subspace is orthogonalised before the step, so that all its directions move equally far.

Source: ZO-Muon, 2026 (arXiv 2602.17155). For a matrix W [m, n] with a basis P [n, r] drawn by QR every `interval` steps and
N = `queries` Gaussian U_i [m, r] every step, all on the same data:

    D_i = sqrt(n / r) U_i P^T;  c_i = [L(W + eps D_i) - L(W)] / eps;  G = 1/N sum_i c_i U_i
    W <- W - lr * s * msign(G) P^T,  msign(G) = G (G^T G)^(-1/2): the singular values of G become one

Tensors that are no matrices are matrices of one column: w <- w - lr * s * g / |g|. Neither the scale of the loss nor that of
c matters. s = 1 with `length: spectral` (the paper's), sqrt(m n / r) with `rms`: then lr is the RMS change of a weight.

Cost: N + 1 forwards; 4 m r^2 operations a matrix for msign, from the eigenvalues of G^T G in float64: exact, where the paper
takes five Newton-Schulz iterations. State, float32: P and the left factor, 4 r (m + n) bytes a matrix (`_lazy`). Deviations: P
is at the right, where all probes share one product (the paper's is at the left: this method on the transposed matrices);
D_i has unit variance, so its eps is sqrt(r / n) times ours; the public code moves other tensors by 1e-7 of their estimate.
It does not: momentum, msign of the largest directions only (ZO-MOPI). Raises ConfigError where no tuned tensor is a matrix,
or where a rank is asked for that none has. Equal losses in a step move nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from smidgen import noise
from smidgen.directions import Dense
from smidgen.lowrank import LowRank, is_matrix, rank_of, sides
from smidgen.objective import Objective
from smidgen.optim._lazy import LazyConfig, LazyOptimizer, rank_in
from smidgen.optim._optimizer import Outcome
from smidgen.optim._values import Estimate, suggested
from smidgen.params import ParamView
from smidgen.subspace import orthonormal

status = "experimental"

PRESETS: dict[str, dict[str, Any]] = {
    "zo-muon": {"lr": 1e-2, "eps": 1.1e-4, "rank": 64, "interval": 100, "queries": 4, "length": "spectral"},
}  # OPT-13B, RTE, 8,000 steps; the paper's eps 1e-3, times sqrt(64 / 5120)

SUGGESTED = suggested(length="rms")

_SMALLEST = 1e-10  # share of the largest eigenvalue of G^T G below which one is rounding; chosen


class Config(LazyConfig):
    """Options of ZO-Muon. Defaults are the paper's, but eps, which is MeZO's."""

    usual_rank: ClassVar[int] = 64
    lr: float = Field(1e-2, gt=0, description="learning rate: how far W moves along each singular direction; see `length`")
    sides: Literal[1, 2] = Field(1, description="1: forward difference with one shared base; 2: central difference")  # type: ignore[assignment]
    normalise: Literal["none"] = Field("none", description="a step has the same length whatever the losses")  # type: ignore[assignment]
    queries: int = Field(4, ge=1, description="directions per step, N")
    rank: int | None = Field(  # type: ignore[assignment]
        None, ge=1, description="rank r of the subspace; none: 64; in a smaller matrix its smaller side"
    )
    interval: int = Field(100, ge=1, description="steps for which the basis is kept, nu")
    length: Literal["spectral", "rms"] = Field(
        "spectral", description="what lr measures: the singular values of a matrix's step, or the RMS change of a weight"
    )


@dataclass(frozen=True)
class Onto(LowRank):
    """A low-rank direction whose right factors are held, sqrt(n) P."""

    rights: Mapping[str, Tensor] = field(default_factory=dict)

    def right(self, name: str) -> Tensor:
        return self.rights[name]


class ZOMuon(LazyOptimizer):
    """ZO-Muon over any tensors. See the module for the update."""

    linear: ClassVar[bool] = False

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))
        self._rights: dict[str, Tensor] | None = None  # those in the state

    def _step(self, objective: Objective) -> Outcome:
        g = self.shaped_estimate(objective)
        if g.dead:
            return g.outcome()
        self.decay_()
        for lr, held, rest in self.groups_of():
            gradients = [torch.zeros_like(self.left(name)) for name in held]
            self.pull_(held, g, 1.0, gradients)
            for name, G in zip(held, gradients, strict=True):
                self.left(name).add_(msign(G), alpha=-lr * self._length(self.shapes[name]))
            for name in rest:
                self._move(name, g, lr)
        self.refresh_()
        return g.outcome()

    def _length(self, shape: tuple[int, int]) -> float:
        """s, over the sqrt(n) that is in the right factor."""
        m, n = shape
        spectral = self.config.length == "spectral"
        return n**-0.5 if spectral else math.sqrt(m / rank_of(shape, self.rank))

    def _move(self, name: str, g: Estimate, lr: float) -> None:
        """w <- w - lr s g / |g|."""
        cfg, entry = self.config, self.view[name]
        G = torch.zeros(entry.tensor.shape, device=entry.tensor.device)
        g.add_(name, 0, G)
        norm = float(G.norm())
        if norm == 0.0:
            return
        s = 1.0 if cfg.length == "spectral" else math.sqrt(G.numel())

        def descend(w: Tensor) -> None:
            w.add_(G, alpha=-lr * s / norm)

        self.view.edit_(name, descend, at=self.rounding_address(cfg.seed), rounding=cfg.rounding)

    def shaped(self, z: Dense) -> Onto:
        return self._onto(z.step, z.query, self.subspace)

    def subspace_of(self, step: int) -> Onto:
        return self._onto(0, 0, step)

    def _onto(self, step: int, query: int, subspace: int) -> Onto:
        cfg = self.config
        if self._rights is None:
            for name in self.shapes:
                state = self.state[self.view[name].tensor]
                if "right" not in state:
                    state["right"] = self._drawn(name)
            self._rights = self.held("right")
        address = cfg.seed, step, query, self.view.ids
        return Onto(*address, self.shapes, self.rank, subspace, self.device, cfg.distribution, rights=self._rights)

    def _drawn(self, name: str) -> Tensor:
        """sqrt(n) P [n, r] of this subspace."""
        entry, (m, n) = self.view[name], self.shapes[name]
        at = noise.Address(self.config.seed, entry.id, self.subspace, 0, noise.SUBSPACE)
        return orthonormal(at, n, rank_of((m, n), self.rank), entry.tensor.device).mul_(math.sqrt(n))

    def refresh_(self) -> bool:
        """As `_lazy`'s; the next step has a new basis."""
        fresh = super().refresh_()
        if fresh:
            for name in self.shapes:
                self.state[self.view[name].tensor]["right"] = self._drawn(name)
            self._rights = None
        return fresh

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        super()._load_scalars(scalars)
        self._rights = None

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: LazyConfig) -> int:
        """P and the left factors of the matrices, float32."""
        known = [sides(shape) for shape, _ in shapes.values() if is_matrix(shape)]
        return sum(4 * rank_of(shape, rank_in(config)) * sum(shape) for shape in known)


def msign(G: Tensor) -> Tensor:
    """G (G^T G)^(-1/2) of G [m, r], m >= r: its polar factor, to float32 rounding; zero along what G does not reach."""
    exact = G.double()
    values, Q = torch.linalg.eigh(exact.T @ exact)
    alive = values > _SMALLEST * values[-1]
    inverse = torch.where(alive, values.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    return (exact @ (Q * inverse) @ Q.T).to(G.dtype)


build = ZOMuon
