"""Directions inside a subspace between orthonormal bases: z[W] = sqrt(a b) / r * U Z V^T, and the bases themselves.

Source: Yu, Zhou, Wang, Pan, Tian, Hu, "Zeroth-Order Fine-Tuning of LLMs in Random Subspaces" (SubZero), 2024 (arXiv
2410.08989). W is viewed as [a, b]; U [a, r] and V [b, r] have orthonormal columns, Z [r, r] independent entries of unit
variance. Then E |z|^2 = a b, as for dense noise, and over random bases E[z <G, z>] = G.

The reshaping rule: a matrix [m, n] is viewed as it is, unless it is so narrow that the square of its smaller side is less
than the larger one: then [a, b] is the factorisation of m n that is closest to a square. A folded tensor is not of rank r in
its own shape; as one side is then at most the root of the other, the product with the identity serves as its factors.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from smidgen import noise
from smidgen.directions import Dense, Distribution
from smidgen.lowrank import Factored

Shape = tuple[int, int]

LEFT, RIGHT = 1, 0  # queries at which the bases of a subspace are drawn


def squarest(shape: Shape) -> Shape:
    """(a, b), a <= b, with a b = m n and a the largest divisor up to the root.

    >>> squarest((10, 2048))
    (128, 160)
    """
    count = math.prod(shape)
    a = next(a for a in range(math.isqrt(count), 0, -1) if count % a == 0)
    return a, count // a


def folded(shape: Shape) -> Shape:
    """The shape as which a matrix is viewed: its own, or the squarest one where it is narrow.

    >>> folded((768, 3072)), folded((8, 768))
    ((768, 3072), (64, 96))
    """
    return squarest(shape) if min(shape) ** 2 < max(shape) else shape


def orthonormal(at: noise.Address, rows: int, rank: int, device: torch.device | None = None) -> Tensor:
    """[rows, rank] float32 with orthonormal columns, uniform among all such matrices: Q of a Gaussian matrix.

    The signs of R's diagonal are moved into Q, without which Q is not uniform. Noise and QR are computed on the CPU, QR in
    float64 and rounded once, so that a basis hardly depends on thread count, library or device.
    """
    G = torch.zeros(rows, rank)
    noise.accumulate_(G, [(at, 1.0)], "gaussian")
    Q, R = torch.linalg.qr(G.double())
    return (Q * R.diagonal().sign()).float().to(device)


@dataclass(frozen=True)
class Bases:
    """U and V of every matrix, at the step at which they were drawn."""

    shapes: Mapping[str, Shape]  # of the tensors
    views: Mapping[str, Shape]  # as what they are seen, see `folded`
    U: Mapping[str, Tensor]
    V: Mapping[str, Tensor]
    key: tuple[int, int]  # (seed, step)


class _Between(Factored):
    """Base: z[W] = U C V^T with a core C [r, r]."""

    bases: Bases

    def core(self, name: str) -> Tensor:
        """C [r, r], float32."""
        raise NotImplementedError

    def whole_key(self) -> Hashable:
        """Equal for directions whose cores are equal."""
        raise NotImplementedError

    def has_factors(self, name: str) -> bool:
        return name in self.bases.U

    def left(self, name: str) -> Tensor:
        if not self._folded(name):
            return self.bases.U[name] @ self.core(name)
        m, n = self.bases.shapes[name]
        return self._whole(name) if n <= m else torch.eye(m, device=self.bases.U[name].device)

    def right(self, name: str) -> Tensor:
        if not self._folded(name):
            return self.bases.V[name]
        m, n = self.bases.shapes[name]
        return torch.eye(n, device=self.bases.U[name].device) if n <= m else self._whole(name).T

    def right_key(self, name: str) -> Hashable:
        if not self._folded(name):
            return name, self.bases.key
        m, n = self.bases.shapes[name]
        return (name, "identity") if n <= m else (name, self.whole_key())

    def _folded(self, name: str) -> bool:
        return self.bases.views[name] != self.bases.shapes[name]

    def _whole(self, name: str) -> Tensor:
        """z[W], [m, n]."""
        return (self.bases.U[name] @ self.core(name) @ self.bases.V[name].T).view(self.bases.shapes[name])


@dataclass(frozen=True)
class Between(_Between):
    """A fresh core at every (step, query); tensors without bases have dense noise."""

    seed: int
    step: int
    query: int
    ids: Mapping[str, int]
    bases: Bases
    distribution: Distribution = "gaussian"
    support: frozenset[str] | None = None

    @property
    def dense(self) -> Dense:  # type: ignore[override]
        """The direction of tensors that have no bases."""
        return Dense(self.seed, self.step, self.query, self.ids, self.distribution, self.support)

    def core(self, name: str) -> Tensor:
        """sqrt(a b) / r * Z."""
        U = self.bases.U[name]
        rank = U.shape[1]
        scale = math.sqrt(math.prod(self.bases.shapes[name])) / rank
        out = torch.zeros(rank, rank, device=U.device)
        at = noise.Address(self.seed, self.ids[name], self.step, self.query, noise.PROBE)
        noise.accumulate_(out, [(at, scale)], self.distribution)
        return out

    def whole_key(self) -> Hashable:
        return self.seed, self.step, self.query, self.distribution


@dataclass(frozen=True)
class Cores(_Between):
    """Cores that are held. Every tensor in it has bases."""

    cores: Mapping[str, Tensor]
    bases: Bases

    @property
    def support(self) -> frozenset[str]:  # type: ignore[override]
        """The tensors that have moved."""
        return frozenset(self.cores)

    def has_factors(self, name: str) -> bool:
        return name in self.cores

    def core(self, name: str) -> Tensor:
        return self.cores[name]

    def whole_key(self) -> Hashable:
        return "held"
