"""What a growth phase learns of a matrix: candidate entries and the gradients that they would have had.

In its first update the largest entries of |dW| are found, block by block as dW is made, so that no dense dW is ever held;
in the others the gradients of these candidates alone. Sums run over updates, not over micro-batches: over the gradient
that the optimizer sees, clipping included. An update of one micro-batch, of which dW is known, counts in the sums itself;
of several, their largest entries are merged (a sum where both list an entry) and the sums start with the next update,
equally for all candidates. A bad update is left out. Ranks are like micro-batches: their lists are merged in the order of
ranks, their gradients of the candidates added, so that all ranks hold the same. Where entries are weighed by |w|
(SNIP's connection sensitivity), |w g| stands for |g| in every comparison.

Memory: 12 bytes a candidate and its position; one block of dW while it is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from smidgen.adapt import _ranks
from smidgen.adapt._sparse_gradient import products, row_blocks, spans
from smidgen.adapt._support import members, top


class Seeds(NamedTuple):
    """What Adam would hold of new entries, had they been tuned during the phase."""

    mean: Tensor  # of the gradient over the phase's updates [n] float32
    square: Tensor  # mean of its square [n]
    covers: float  # updates
    lag: int = 0  # 1: the public code's age, one update short


class Found(NamedTuple):
    """A phase's candidates."""

    index: Tensor  # type: ignore[assignment]  # flat positions, sorted
    score: Tensor  # the larger, the sooner it grows
    seeds: Seeds  # in the order of `index`


class Phase:
    """Collects one phase of one matrix; `size` candidates at most. `weights`: the matrix, where entries are weighed by |w|."""

    def __init__(self, size: int, weights: Callable[[], Tensor] | None = None):
        self.size, self.weights = size, weights
        self.counted = 0  # updates in the sums
        self.micro = 0  # backward passes of the update under way
        self.index: Tensor | None = None  # candidates, once chosen
        self.picked: Tensor | None = None  # until then: the largest entries so far, sorted ...
        self.value: Tensor | None = None  # ... and their gradients
        self.fresh: Tensor | None = None  # gradients of the candidates in the update under way
        self.total: Tensor | None = None  # sums over updates
        self.square: Tensor | None = None

    TENSORS: tuple[str, ...] = ("index", "picked", "value", "fresh", "total", "square")

    def see(self, left: Tensor, right: Tensor, index: Tensor) -> Tensor:
        """The gradient at `index` [k], of one backward pass; keeps what the phase needs of it."""
        self.micro += 1
        if self.index is None:
            return self._pick(left, right, index)
        assert self.fresh is not None
        self.fresh += products(left, right, self.index)
        return products(left, right, index)

    def _pick(self, left: Tensor, right: Tensor, index: Tensor) -> Tensor:
        out = torch.empty(index.numel(), dtype=torch.promote_types(left.dtype, torch.float32), device=left.device)
        where = torch.empty(0, dtype=index.dtype, device=left.device)
        value = held = torch.empty(0, dtype=torch.float32, device=left.device)
        weigh = self._weigh()
        for (start, block), span in zip(row_blocks(left, right), spans(left, right, index), strict=True):
            out[span] = block[index[span] - start].to(out.dtype)
            size = block.abs() if weigh is None else block.float().mul_(weigh[start : start + len(block)]).abs_()
            last = held.min() if len(value) == self.size else -1.0
            large = (size > last).nonzero()[:, 0]
            large = large[top(size[large], self.size)]
            where, value = torch.cat([where, (large + start).to(index.dtype)]), torch.cat([value, block[large].float()])
            held = torch.cat([held, size[large].float()])
            kept = top(held, self.size)
            where, value, held = where[kept], value[kept], held[kept]
        if self.picked is not None and self.value is not None:
            where, value = merged((self.picked, self.value), (where, value), self.size, weigh)
        self.picked, self.value = where, value
        return out

    def commit(self, scale: float) -> None:
        """The update was written, its gradient scaled (clipped) by `scale`."""
        if self.index is not None and self.fresh is not None and self.total is not None and self.square is not None:
            _ranks.add_(self.fresh)
            self.fresh *= scale
            self.total += self.fresh
            self.square.addcmul_(self.fresh, self.fresh)
            self.fresh.zero_()
            self.counted += 1
        elif self.picked is not None and self.value is not None:
            lists = _ranks.gathered((self.picked, self.value))
            known = len(lists) == 1 and self.micro == 1
            weigh = self._weigh() if len(lists) > 1 else None
            self.index, value = functools.reduce(lambda one, other: merged(one, other, self.size, weigh), lists)
            exact = value * scale if known else torch.zeros_like(value)
            self.total, self.square, self.counted = exact, exact * exact, int(known)
            self.fresh, self.picked, self.value = torch.zeros_like(exact), None, None
        self.micro = 0

    def discard(self) -> None:
        """The update was bad: forget its gradient."""
        self.picked = self.value = None
        self.micro = 0
        if self.fresh is not None:
            self.fresh.zero_()

    def found(self) -> Found | None:
        """The candidates; None where no update has counted."""
        if self.index is None or self.total is None or self.square is None or not self.counted:
            return None
        seeds = Seeds(self.total / self.counted, self.square / self.counted, self.counted)
        return Found(self.index, _masses(self.index, self.total, self._weigh()), seeds)

    def _weigh(self) -> Tensor | None:
        """What entries are weighed by, flat, or None."""
        return None if self.weights is None else self.weights().detach().reshape(-1)


def _masses(index: Tensor, value: Tensor, weigh: Tensor | None) -> Tensor:
    """|g|, or |w g|, of entries with values g."""
    return value.abs() if weigh is None else (value * weigh[index.long()]).abs()


def merged(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], size: int, weigh: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `size` largest of two lists of (positions, values), values added where both list a position; sorted. `weigh`: a
    factor of each entry of the matrix, flat, for the comparison."""
    index = torch.cat([one[0], other[0]]).unique(sorted=True)
    value = torch.zeros(len(index), dtype=torch.float32, device=index.device)
    for where, part in (one, other):
        value[torch.searchsorted(index, where)] += part
    kept = top(_masses(index, value, weigh), size)
    return index[kept], value[kept]


class Exchange(NamedTuple):
    """A support after drop and growth."""

    index: Tensor  # type: ignore[assignment]  # sorted int64 [k]
    origin: Tensor  # where each entry was in the old support, -1 for a new one [k]


def exchange(index: Tensor, delta: Tensor, grown: Tensor, count: int) -> Exchange:
    """Drop the `count` deltas that moved least and take the entries `grown` (at most `count`, distinct) in their place.

    An entry that is dropped and grown stays as it is. Where fewer have grown, the largest of the dropped stay too.
    """
    dropped = top(-delta.abs(), count)
    stays = torch.ones_like(index, dtype=torch.bool)
    stays[dropped] = False
    old = index.long()
    grown = grown.long().sort().values
    stays |= members(old, grown)
    new = grown[~members(grown, old)]
    left = (~stays).nonzero()[:, 0]
    stays[left[top(delta.abs()[left], len(left) - len(new))]] = True
    kept = stays.nonzero()[:, 0]
    both = torch.cat([old[kept], new])
    order = both.argsort()
    return Exchange(both[order], torch.cat([kept, torch.full_like(new, -1)])[order])
