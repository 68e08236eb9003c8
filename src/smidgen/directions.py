"""Directions: displacement fields z that are regenerated from an address whenever they are needed.

A `Probe` is a sum of scaled directions; `()` is theta itself. Dense directions are the general case and the definition
that all structured ones are tested against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from smidgen import noise

Distribution = Literal["rademacher", "gaussian"]


class Direction(Protocol):
    """A displacement field z over the tuned tensors, a pure function of its address."""

    @property
    def support(self) -> frozenset[str] | None:
        """Names of the tensors where z is not zero; None means all."""

    def displaced(self, name: str, weight: Tensor, scale: float, out: Tensor, *, first: int = 0) -> None:
        """out <- weight + scale * z[name], rounded to nearest in out's dtype; both are the rows from `first` on."""

    def displaced_rows(self, name: str, weight: Tensor, rows: Tensor, scale: float, out: Tensor) -> None:
        """out[i] <- weight[rows[i]] + scale * z[name][rows[i]]; weight [V, D], rows int64 [n], out [n, D]."""

    def accumulate(self, name: str, rows: slice, out32: Tensor, scale: float) -> None:
        """out32 += scale * z[name][rows], float32 [rows, D]; 1-D tensors are columns of width 1."""

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(A, B) with z[name] = A @ B.T, or None when z[name] is dense."""


Probe = Sequence[tuple[Direction, float]]


@dataclass(frozen=True)
class Dense:
    """Independent entries for every weight: element i of tensor `name` is noise at (seed, step, query, id, i).

    Cost: no state; regenerating z costs one pass of the generator over the tensor.
    """

    seed: int
    step: int
    query: int
    ids: Mapping[str, int]  # noise id of each tensor
    distribution: Distribution = "rademacher"
    support: frozenset[str] | None = None
    purpose: int = noise.PROBE

    def address(self, name: str) -> noise.Address:
        """Where the noise of one tensor lives."""
        return noise.Address(self.seed, self.ids[name], self.step, self.query, self.purpose)

    def displaced(self, name: str, weight: Tensor, scale: float, out: Tensor, *, first: int = 0) -> None:
        noise.displace_(out, weight, [(self.address(name), scale)], self.distribution, start=first * width(weight))

    def displaced_rows(self, name: str, weight: Tensor, rows: Tensor, scale: float, out: Tensor) -> None:
        noise.displace_rows_(out, weight, rows, [(self.address(name), scale)], self.distribution)

    def accumulate(self, name: str, rows: slice, out32: Tensor, scale: float) -> None:
        noise.accumulate_(out32, [(self.address(name), scale)], self.distribution, start=rows.start * width(out32))

    def factors(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class Masked:
    """M o z: the entries of a dense direction that a binary mask keeps, zero elsewhere; the norm is not made up for.

    A kept weight gets the bits that it gets along `dense`; any other stays as it is, bit for bit, in displacements and in
    updates, also under weight decay. A tensor without a mask is kept whole. Cost: masks hold nothing when they are drawn,
    else 1 bit a weight; a pass along z takes 0.8 to 1.3 times one along `dense` (measured, docs/decisions.md).
    """

    dense: Dense
    masks: Mapping[str, noise.Keep]

    @property
    def support(self) -> frozenset[str] | None:
        return self.dense.support

    def displaced(self, name: str, weight: Tensor, scale: float, out: Tensor, *, first: int = 0) -> None:
        terms, distribution, start = [(self.dense.address(name), scale)], self.dense.distribution, first * width(weight)
        noise.displace_(out, weight, terms, distribution, start=start, keep=self.masks.get(name))

    def displaced_rows(self, name: str, weight: Tensor, rows: Tensor, scale: float, out: Tensor) -> None:
        terms = [(self.dense.address(name), scale)]
        noise.displace_rows_(out, weight, rows, terms, self.dense.distribution, keep=self.masks.get(name))

    def accumulate(self, name: str, rows: slice, out32: Tensor, scale: float) -> None:
        terms, start = [(self.dense.address(name), scale)], rows.start * width(out32)
        noise.accumulate_(out32, terms, self.dense.distribution, start=start, keep=self.masks.get(name))

    def factors(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class InMemory:
    """A scaled dense direction whose address and scale stand in the device's memory: what a captured graph sees. It is the only
    term of a probe, to be displaced along; the scale that comes with it is not used."""

    ids: Mapping[str, int]
    distribution: Distribution
    support: frozenset[str] | None
    held: noise.Held

    def put(self, z: Dense, scale: float) -> None:
        """Become scale * z."""
        self.held.put(noise.Address(z.seed, 0, z.step, z.query, z.purpose), scale)

    def _term(self, name: str) -> noise.Held:
        return replace(self.held, tensor=self.ids[name])

    def displaced(self, name: str, weight: Tensor, scale: float, out: Tensor, *, first: int = 0) -> None:
        noise.displace_(out, weight, self._term(name), self.distribution, start=first * width(weight))

    def displaced_rows(self, name: str, weight: Tensor, rows: Tensor, scale: float, out: Tensor) -> None:
        noise.displace_rows_(out, weight, rows, self._term(name), self.distribution)

    def accumulate(self, name: str, rows: slice, out32: Tensor, scale: float) -> None:
        raise NotImplementedError("a direction in memory is the only term of a probe")

    def factors(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class OnePass:
    """A sum of directions over one tensor that one pass of the noise generator adds to it."""

    terms: list[noise.Term]
    distribution: Distribution
    keep: noise.Keep | None

    @classmethod
    def of(cls, probe: Probe, name: str) -> OnePass | None:
        """None when the terms are not all entries of one distribution under one mask. The sum of no terms is one, too."""
        parts: list[tuple[Dense, noise.Keep | None, float]] = []
        for z, s in probe:
            if type(z) is Dense:
                parts.append((z, None, s))
            elif type(z) is Masked:
                parts.append((z.dense, z.masks.get(name), s))
            else:
                return None
        if not parts:
            return cls([], "rademacher", None)
        first, keep, _ = parts[0]
        if any(z.distribution != first.distribution or not _same(k, keep) for z, k, _ in parts):
            return None
        return cls([(z.address(name), s) for z, _, s in parts], first.distribution, keep)


def _same(one: noise.Keep | None, other: noise.Keep | None) -> bool:
    """Whether two masks are one: the same draw, or the same tensor of bits."""
    if isinstance(one, noise.Drawn) and isinstance(other, noise.Drawn):
        return one == other
    return one is other


def width(tensor: Tensor) -> int:
    """Elements in one row (index of the first axis) of a tensor; 1 for vectors and scalars."""
    return tensor.numel() // tensor.shape[0] if tensor.ndim else 1


def restrict(probe: Probe, name: str) -> list[tuple[Direction, float]]:
    """The terms of a probe that displace one tensor."""
    return [(z, s) for z, s in probe if z.support is None or name in z.support]


def displace(probe: Probe, name: str, weight: Tensor, out: Tensor, *, first: int = 0) -> None:
    """out <- weight + sum(scale * z[name]), one rounding to nearest in out's dtype.

    `weight` and `out` are equal-shaped blocks of rows that start at row `first` of the tensor. A sum of directions that
    `OnePass` does not take goes through a float32 workspace of the block's size.
    """
    terms = restrict(probe, name)
    if len(terms) == 1:
        z, s = terms[0]
        z.displaced(name, weight, s, out, first=first)
        return
    whole = OnePass.of(terms, name)
    if whole is not None:
        noise.displace_(out, weight, whole.terms, whole.distribution, start=first * width(weight), keep=whole.keep)
        return
    value32 = weight.to(torch.float32, copy=True)
    rows = slice(first, first + (weight.shape[0] if weight.ndim else 1))
    for z, s in terms:
        z.accumulate(name, rows, value32, s)
    out.copy_(value32)


def displace_all(probe: Probe, names: Sequence[str], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """`displace` for several whole tensors; along one dense direction that is one launch on CUDA."""
    z, scale = probe[0]
    if len(probe) == 1 and isinstance(z, Dense | InMemory) and (z.support is None or z.support.issuperset(names)):
        term = z.held if isinstance(z, InMemory) else (z.address(names[0]), scale)
        noise.all_(outs, weights, [z.ids[name] for name in names], term, z.distribution)
        return
    for name, weight, out in zip(names, weights, outs, strict=True):
        displace(probe, name, weight, out)


def displace_rows(probe: Probe, name: str, weight: Tensor, rows: Tensor, out: Tensor) -> None:
    """out[i] <- weight[rows[i]] + sum(scale * z[name][rows[i]]); weight [V, D], rows int64 [n], out [n, D].

    Of a sum of directions that `OnePass` does not take, those without factors are added row by row, some 20 us each.
    """
    terms = restrict(probe, name)
    if len(terms) == 1:
        z, s = terms[0]
        z.displaced_rows(name, weight, rows, s, out)
        return
    whole = OnePass.of(terms, name)
    if whole is not None:
        noise.displace_rows_(out, weight, rows, whole.terms, whole.distribution, keep=whole.keep)
        return
    value32 = weight[rows].float()
    for z, s in terms:
        pair = z.factors(name)
        if pair is not None:
            A, B = (factor.to(out.device) for factor in pair)
            value32.addmm_(A[rows], B.T, alpha=s)
            continue
        for i, row in enumerate(rows.tolist()):
            z.accumulate(name, slice(row, row + 1), value32[i : i + 1], s)
    out.copy_(value32)
