"""Low-rank directions: z[W] = A B^T for matrices, independent entries for everything else.

A matrix is a tensor with two axes or more, viewed as [rows of its first axis, all the rest]. What the factors are is the
method's business (`Factored`); displacing dense storage with them, which the sequential engine and updates need, is
shared. The batched engine never forms A B^T: it multiplies activations with B and A.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smidgen import noise
from smidgen.directions import Dense, Distribution
from smidgen.params import ParamView

Pair = tuple[Tensor, Tensor]  # A [m, r] and B [n, r], float32

_BLOCK = 1 << 20  # elements of A B^T formed at once (4 MB); chosen


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape is displaced by a product of factors: both of its sides are longer than one."""
    return len(shape) >= 2 and min(shape[0], math.prod(shape[1:])) > 1


def sides(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a matrix."""
    return shape[0], math.prod(shape[1:])


def matrices(view: ParamView) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every tuned tensor that is a matrix."""
    return {e.name: sides(e.tensor.shape) for e in view if is_matrix(e.tensor.shape)}


def side_by_side(shapes: Mapping[str, tuple[int, ...]], device: torch.device | None) -> tuple[Tensor, dict[str, Tensor]]:
    """(one row of float32 numbers, not set; tensors in it, by name), each at a multiple of 16 bytes as shared launches need."""
    places, end = {}, 0
    for name, shape in shapes.items():
        places[name] = end, math.prod(shape)
        end += -(-math.prod(shape) // 4) * 4
    row = torch.empty(end, device=device)
    return row, {name: row[first : first + size].view(shapes[name]) for name, (first, size) in places.items()}


def rank_of(shape: Sequence[int], rank: int) -> int:
    """The rank of a direction in a matrix: what was asked for, or the smaller side."""
    return min(rank, shape[0], math.prod(shape[1:]))


class Factored:
    """Base of directions with factors: z[name] = left @ right.T for the tensors in `matrices`, `dense` for all others."""

    support: frozenset[str] | None = None
    dense: Dense

    def has_factors(self, name: str) -> bool:
        """Whether z[name] is a product."""
        raise NotImplementedError

    def left(self, name: str) -> Tensor:
        """A [m, r], float32."""
        raise NotImplementedError

    def right(self, name: str) -> Tensor:
        """B [n, r], float32."""
        raise NotImplementedError

    def right_key(self, name: str) -> Hashable:
        """Equal for directions whose B is equal: they share a product with the activations."""
        raise NotImplementedError

    def factors(self, name: str) -> Pair | None:
        """(A, B) with z[name] = A @ B.T, or None where z[name] is dense noise."""
        return (self.left(name), self.right(name)) if self.has_factors(name) else None

    def _factors_on(self, device: torch.device, name: str) -> Pair | None:
        """`factors` where they are needed: a master may lie in host memory, a layer on another device."""
        pair = self.factors(name)
        return None if pair is None else (pair[0].to(device), pair[1].to(device))

    def displaced(self, name: str, weight: Tensor, scale: float, out: Tensor, *, first: int = 0) -> None:
        pair = self._factors_on(out.device, name)
        if pair is None:
            self.dense.displaced(name, weight, scale, out, first=first)
            return
        A, B = pair
        rows = weight.reshape(-1, B.shape[0])
        target = out.view(-1, B.shape[0])
        step = max(1, _BLOCK // B.shape[0])
        for lo in range(0, rows.shape[0], step):
            part = rows[lo : lo + step]
            a = A[first + lo : first + lo + part.shape[0]]
            target[lo : lo + step] = torch.addmm(part.float(), a, B.T, alpha=scale)

    def displaced_rows(self, name: str, weight: Tensor, rows: Tensor, scale: float, out: Tensor) -> None:
        pair = self._factors_on(out.device, name)
        if pair is None:
            self.dense.displaced_rows(name, weight, rows, scale, out)
            return
        A, B = pair
        out.copy_(torch.addmm(weight[rows].float(), A[rows], B.T, alpha=scale))

    def accumulate(self, name: str, rows: slice, out32: Tensor, scale: float) -> None:
        pair = self._factors_on(out32.device, name)
        if pair is None:
            self.dense.accumulate(name, rows, out32, scale)
            return
        A, B = pair
        out32.view(-1, B.shape[0]).addmm_(A[rows], B.T, alpha=scale)


@dataclass(frozen=True)
class LowRank(Factored):
    """A fresh left factor at every (step, query), a right factor that stays for a subspace.

    Source: LOZO (Chen et al. 2025, "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures"), scaled:
    D = U V^T / sqrt(r) with U [m, r] and V [n, r], whose entries have unit variance as those of dense noise have, so that
    E[D <G, D>] = G and steps and lengths of dense noise carry over. `subspace` is the step at which V was drawn; U and V have
    addresses of their own, so a refresh changes nothing about U. State: none; a matrix costs r (m + n) numbers a use.
    """

    seed: int
    step: int
    query: int
    ids: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]  # of the matrices, see `matrices`
    rank: int
    subspace: int
    device: torch.device | None = None
    distribution: Distribution = "gaussian"
    support: frozenset[str] | None = None

    @property
    def dense(self) -> Dense:  # type: ignore[override]
        """The direction of tensors that have no factors."""
        return Dense(self.seed, self.step, self.query, self.ids, self.distribution, self.support)

    def left(self, name: str) -> Tensor:
        """U / sqrt(r), [m, r]."""
        at = noise.Address(self.seed, self.ids[name], self.step, self.query, noise.PROBE)
        rank = rank_of(self.shapes[name], self.rank)
        return self._draw(at, self.shapes[name][0], rank, rank**-0.5)

    def right(self, name: str) -> Tensor:
        """V [n, r]."""
        at = noise.Address(self.seed, self.ids[name], self.subspace, 0, noise.SUBSPACE)
        return self._draw(at, self.shapes[name][1], rank_of(self.shapes[name], self.rank), 1.0)

    def lefts(self, names: Sequence[str]) -> list[Tensor]:
        """`left` of several matrices, with the same bits."""
        row, found = side_by_side({n: (self.shapes[n][0], rank_of(self.shapes[n], self.rank)) for n in names}, self.device)
        row.zero_()
        self.add_lefts_(found)
        return list(found.values())

    def add_lefts_(self, onto: Mapping[str, Tensor]) -> None:
        """onto[name] += U / sqrt(r), float32 [m, r] and contiguous, for several matrices: on CUDA a launch for each rank."""
        at = noise.Address(self.seed, 0, self.step, self.query, noise.PROBE)
        for rank in sorted({out.shape[1] for out in onto.values()}):
            self._add(at, rank**-0.5, {name: out for name, out in onto.items() if out.shape[1] == rank})

    def add_rights_(self, onto: Mapping[str, Tensor]) -> None:
        """onto[name] += V, [n, r], in the same way."""
        self._add(noise.Address(self.seed, 0, self.subspace, 0, noise.SUBSPACE), 1.0, onto)

    def _add(self, at: noise.Address, scale: float, onto: Mapping[str, Tensor]) -> None:
        outs = list(onto.values())
        noise.all_(outs, outs, [self.ids[name] for name in onto], (at, scale), self.distribution)

    def _draw(self, at: noise.Address, rows: int, rank: int, scale: float) -> Tensor:
        out = torch.zeros(rows, rank, device=self.device)
        noise.accumulate_(out, [(at, scale)], self.distribution)
        return out

    def has_factors(self, name: str) -> bool:
        return name in self.shapes

    def right_key(self, name: str) -> Hashable:
        return self.seed, self.ids[name], self.subspace, self.rank, self.distribution


@dataclass(frozen=True)
class Accumulated(Factored):
    """Left factors that are held, on the right factors of a subspace. Every tensor in it has factors."""

    lefts: Mapping[str, Tensor]
    subspace: LowRank  # any direction of the subspace

    @property
    def support(self) -> frozenset[str]:  # type: ignore[override]
        """The tensors that have moved."""
        return frozenset(self.lefts)

    def has_factors(self, name: str) -> bool:
        return name in self.lefts

    def left(self, name: str) -> Tensor:
        return self.lefts[name]

    def right(self, name: str) -> Tensor:
        return self.subspace.right(name)

    def right_key(self, name: str) -> Hashable:
        return self.subspace.right_key(name)
