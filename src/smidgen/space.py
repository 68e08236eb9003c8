"""Small search spaces: theta = theta_0 + P z with z in R^d, where the random map P comes from the run's seed.

Source: "Derivative-Free Optimization for Low-Rank Adaptation" (DFO-LoRA; its public code), after Sun et al., "Black-Box Tuning
for Language-Model-as-a-Service", 2022 (arXiv 2201.03514). The coordinates of z are split evenly among the tensors of a block;
a tensor of n weights with q of them moves by P z, P [n, q] with independent N(0, s^2) entries:

    lora_A and prompts   s = alpha * std / (sqrt(q) * sigma)    so that P z looks like a hidden state when z ~ N(0, sigma^2)
    all others           s = 1 / sqrt(3 q)                      the variance of torch's linear layers, U(-1/sqrt(q), 1/sqrt(q))

std is the deviation of the hidden states that enter the layer, where it is known (`smidgen.hidden`); s is as for all others
where it is not. `whole` replaces q by the block's d in the first line, as the public code does: P z is then sqrt(n) times
smaller than a hidden state with n tensors. A tensor with as many coordinates as weights has no map: it moves by z.

Cost: P is generated, a chunk of it at a time, whenever a step asks for displacements, and multiplies all candidates at once;
it is never held. A candidate holds P z, 4 bytes a weight. It does not: orthogonal maps, learning the map.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smidgen import noise
from smidgen.config import ConfigError
from smidgen.directions import width
from smidgen.lowrank import Factored, is_matrix
from smidgen.params import Entry, ParamView

Area = tuple[slice, slice]  # rows and columns of a tensor

USUAL = 500  # coordinates of a block, where none are asked for: the paper's
LARGEST = 1 << 22  # weights of a block; each candidate holds 4 bytes a weight; chosen
_CHUNK = 1 << 20  # entries of P generated at once, 4 MB; chosen
_THIN = 64  # the longest smaller side of a matrix that is probed as a thin product; chosen


@dataclass(frozen=True)
class Explicit(Factored):
    """Displacements that are held, float32, shaped as their tensors."""

    values: Mapping[str, Tensor]

    @property
    def support(self) -> frozenset[str]:  # type: ignore[override]
        """The tensors that move."""
        return frozenset(self.values)

    def has_factors(self, name: str) -> bool:
        value = self.values[name]
        return is_matrix(value.shape) and min(self._matrix(name).shape) <= _THIN

    def _matrix(self, name: str) -> Tensor:
        return self.values[name].flatten(1)

    def left(self, name: str) -> Tensor:
        """The matrix itself or, of a flat one, the unit matrix."""
        z = self._matrix(name)
        return torch.eye(len(z), device=z.device) if z.shape[0] < z.shape[1] else z

    def right(self, name: str) -> Tensor:
        """The unit matrix or, of a flat one, the transposed matrix itself."""
        z = self._matrix(name)
        return z.T if z.shape[0] < z.shape[1] else torch.eye(z.shape[1], device=z.device)

    def right_key(self, name: str) -> Hashable:
        z = self._matrix(name)
        return id(self) if z.shape[0] < z.shape[1] else "unit"

    def displaced(self, name: str, weight: Tensor, scale: float, out: Tensor, *, first: int = 0) -> None:
        z = self._rows(name, slice(first, first + (weight.shape[0] if weight.ndim else 1))).view(weight.shape)
        out.copy_(weight.float().add_(z, alpha=scale) if weight.dtype != torch.float32 else weight.add(z, alpha=scale))

    def displaced_rows(self, name: str, weight: Tensor, rows: Tensor, scale: float, out: Tensor) -> None:
        out.copy_(weight[rows].float() + self.values[name][rows] * scale)

    def accumulate(self, name: str, rows: slice, out32: Tensor, scale: float) -> None:
        out32.add_(self._rows(name, rows).view(out32.shape), alpha=scale)

    def _rows(self, name: str, rows: slice) -> Tensor:
        value = self.values[name]
        return value.view(-1, width(value))[rows]


@dataclass(frozen=True)
class Part:
    """A tensor, or a rectangle of one, with its share of the coordinates."""

    entry: Entry
    area: Area | None  # None: the whole tensor
    number: int  # of the rectangle, which addresses its map
    first: int  # its first coordinate
    q: int
    s: float  # deviation of the entries of P; 1 where there is no map

    @property
    def shape(self) -> torch.Size:
        """Of what moves."""
        return self.entry.tensor.shape if self.area is None else self.entry.storage[self.area].shape

    def moved(self, Z: Tensor, seed: int) -> Tensor:
        """P z of each row of Z [k, d] -> [k, *shape], float32."""
        z = Z[:, self.first : self.first + self.q]
        n = math.prod(self.shape)
        if self.q == n:
            return z.reshape(len(z), *self.shape)
        out = z.new_empty(n, len(z))
        at = noise.Address(seed, self.entry.id, 0, self.number, noise.SUBSPACE)
        step = max(1, _CHUNK // self.q)
        for lo in range(0, n, step):
            P = z.new_zeros(min(step, n - lo), self.q)
            noise.accumulate_(P, [(at, self.s)], "gaussian", start=lo * self.q)
            out[lo : lo + step] = P @ z.T
        return out.T.reshape(len(z), *self.shape)


class Space:
    """The coordinates of one block of tensors.

    dimension: d, None for as many as there are weights, at most 500. stds: deviation of the hidden states that enter each
    tensor's layer, for maps that use it; sigma, alpha: of its formula. Raises ConfigError for a dimension that does not fit the
    block, and for a block too large to be held once a candidate.
    """

    def __init__(
        self,
        view: ParamView,
        names: Sequence[str],
        *,
        seed: int,
        dimension: int | None = None,
        stds: Mapping[str, float] | None = None,
        sigma: float = 1.0,
        alpha: float = 1.0,
        whole: bool = False,
    ):
        self.seed, self.names = seed, list(names)
        areas: list[tuple[Entry, int, Area | None]] = []
        for name in names:
            areas += [(view[name], k, area) for k, area in enumerate(view[name].areas)] or [(view[name], 0, None)]
        sizes = [math.prod((e.storage if area is None else e.storage[area]).shape) for e, _, area in areas]
        q = shares(sizes, dimension, self.names[0])
        self.d = sum(q)
        firsts = np.cumsum([0, *q]).tolist()
        self.parts = []
        for (entry, k, area), n, first, mine in zip(areas, sizes, firsts, q, strict=False):
            s = 1.0 if mine == n else 1.0 / math.sqrt(3 * mine)
            if mine < n and stds is not None and like_hidden_states(entry.name):
                s = alpha * stds[entry.name] / (math.sqrt(self.d if whole else mine) * sigma)
            self.parts.append(Part(entry, area, k, first, mine, s))

    def displacements(self, Z: np.ndarray) -> list[Explicit]:
        """P z of each row of Z [k, d]. Cost: one pass over P, and 4 k bytes a weight."""
        found: list[dict[str, Tensor]] = [{} for _ in Z]
        for part in self.parts:
            entry = part.entry
            moved = part.moved(torch.from_numpy(Z).to(entry.tensor.device, torch.float32), self.seed)
            for values, value in zip(found, moved, strict=True):
                if part.area is None:
                    values[entry.name] = value
                else:
                    values.setdefault(entry.name, torch.zeros(entry.tensor.shape, device=value.device))[part.area] = value
        return [Explicit(values) for values in found]


def like_hidden_states(name: str) -> bool:
    """Whether a tensor meets hidden states or stands among them: a LoRA's A, virtual tokens."""
    return any(part in name for part in (".lora_A.", "prompt_encoder.", ".deep_prompt."))


def shares(sizes: Sequence[int], dimension: int | None, name: str) -> list[int]:
    """Coordinates of each of the tensors of a block, of these sizes; `name` is one of them, for errors.

    >>> shares([100, 100, 2], None, "w"), shares([100, 100, 40], 100, "w")
    ([100, 100, 2], [34, 33, 33])
    """
    if sum(sizes) > LARGEST:
        raise ConfigError(
            f"the block of {name!r} has {sum(sizes):,} weights, and a search in a small space holds each candidate's: tune "
            f"fewer than {LARGEST:,} at once, with scheme dfo_lora, prompt or lorta"
        )
    if dimension is None:
        return [min(n, max(1, USUAL // len(sizes))) for n in sizes]
    if dimension > sum(sizes):
        raise ConfigError(
            f"dimension = {dimension}, but the block of {name!r} has {sum(sizes)} weights: give at most as many coordinates"
        )
    if dimension < len(sizes):
        raise ConfigError(
            f"dimension = {dimension}, but the block of {name!r} has {len(sizes)} tensors, which share it: give one each"
        )
    each, more = divmod(dimension, len(sizes))
    q = [each + (i < more) for i in range(len(sizes))]
    for n, mine in zip(sizes, q, strict=True):
        if mine > n:
            raise ConfigError(
                f"dimension = {dimension} gives {mine} coordinates to each tensor of the block of {name!r}, one of which has "
                f"{n} weights: give at most {n * len(sizes)}"
            )
    return q
