"""A population whose factors and vectors are drawn at once, into memory that stays.

Where a launch takes longer than the noise of a small tensor, drawing each factor when its module asks for it is most of a step:
some hundreds of launches for numbers that a few could make. Here all that a direction adds to any tensor is one row of memory,
which a launch or two fill; what the probes see are sums of such rows. Its addresses stay the same from step to step, so a CUDA
graph of the forward that reads them serves all steps (`smidgen.graphs`).

Holds for probes along `LowRank` directions of one subspace, and along what has accumulated in it: lozo, lozo_m, fzoo and es.
Memory: float32, for each probe and one direction the left factors and the tensors without factors; the right factors once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from smidgen import noise
from smidgen.directions import Direction, Probe
from smidgen.lowrank import Accumulated, LowRank, rank_of, side_by_side
from smidgen.params import Entry
from smidgen.population import Population


def subspace_of(probes: Iterable[Probe]) -> LowRank | None:
    """A direction of the one subspace in which all probes move all tensors; None where they do not."""
    found: LowRank | None = None
    whole = False
    for z in {id(z): z for probe in probes for z, _ in probe}.values():
        if type(z) is LowRank and z.support is None:
            mine, whole = z, True
        elif type(z) is Accumulated:
            mine = z.subspace
        else:
            return None
        if found is not None and not _alike(mine, found):
            return None
        found = mine
    return found if whole else None


def _alike(a: LowRank, b: LowRank) -> bool:
    """Whether two directions are of one subspace."""
    keys = [(z.seed, z.subspace, z.rank, z.distribution, z.device) for z in (a, b)]
    return keys[0] == keys[1] and all(x is y or x == y for x, y in ((a.shapes, b.shapes), (a.ids, b.ids)))


def left_shapes(z: LowRank, entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """Of what a direction has for each tensor: its left factor, or an entry of its own for each of the tensor's."""
    return {
        e.name: (z.shapes[e.name][0], rank_of(z.shapes[e.name], z.rank)) if e.name in z.shapes else tuple(e.tensor.shape)
        for e in entries
    }


def gathered_bytes(z: LowRank, entries: Iterable[Entry]) -> int:
    """What a probe takes in a population of these."""
    return 4 * sum(map(math.prod, left_shapes(z, entries).values()))


class Gathered(Population):
    """So many probes along directions with the shapes of `z`; `put` says which."""

    def __init__(self, count: int, z: LowRank, entries: Sequence[Entry]):
        super().__init__([()] * count)
        lefts = left_shapes(z, entries)
        rights = {name: (z.shapes[name][1], lefts[name][1]) for name in lefts if name in z.shapes}
        self._row, self._parts = side_by_side(lefts, z.device)  # of one direction
        self._rows = self._row.new_empty(count, len(self._row))
        self._lefts = {name: part for name, part in self._parts.items() if name in z.shapes}
        self._vectors = {name: part for name, part in self._parts.items() if name not in z.shapes}
        self._drawn, self._rights = side_by_side(rights, z.device)
        self._subspace: Hashable = None  # whose they are

    def put(self, probes: Sequence[Probe]) -> None:
        """Become these probes, as many as before and of the same form."""
        z = subspace_of(probes)
        assert z is not None and len(probes) == len(self.probes)
        self.probes = probes
        if self._subspace != (key := z.right_key(next(iter(self._rights)))):
            self._drawn.zero_()
            z.add_rights_(self._rights)
            self._subspace = key
        uses: dict[int, tuple[Direction, list[tuple[int, float]]]] = {}  # a mirrored pair has one direction
        for p, probe in enumerate(probes):
            for direction, scale in probe:
                uses.setdefault(id(direction), (direction, []))[1].append((p, scale))
        self._rows.zero_()
        for direction, places in uses.values():
            self._draw(direction)
            for p, scale in places:
                self._rows[p].add_(self._row * scale)  # two roundings, as where factors are drawn one by one

    def _draw(self, z: Direction) -> None:
        self._row.zero_()
        if isinstance(z, LowRank):
            z.add_lefts_(self._lefts)
            dense, outs = z.dense, list(self._vectors.values())
            ids = [z.ids[name] for name in self._vectors]
            noise.all_(outs, outs, ids, (dense.address(next(iter(z.ids))), 1.0), dense.distribution)
        else:
            assert isinstance(z, Accumulated)
            torch._foreach_copy_([self._lefts[name] for name in z.lefts], list(z.lefts.values()))

    def touches(self, name: str) -> bool:
        return name in self._parts

    def has_factors(self, name: str) -> bool:
        return name in self._lefts

    def factors(self, entry: Entry) -> tuple[Tensor, Tensor]:
        return self._of(entry), self._rights[entry.name]

    def deltas(self, entry: Entry) -> Tensor:
        return self._of(entry)

    def _of(self, entry: Entry) -> Tensor:
        """[P, ...], a view of the rows."""
        part = self._parts[entry.name]
        first = part.storage_offset()
        return self._rows[:, first : first + part.numel()].view(len(self), *part.shape)
