"""When a sparse scheme drops and grows, and how: the loop of SpIEL over the sites of a model.

An update is numbered from 1; S = `every`, gamma = `collect`, T updates in all. A phase collects in updates nS + 1 ... nS +
gamma and closes after the last of them, at t = nS + gamma: of each matrix a fraction p of its k deltas is replaced,

    p = 1 at the very first selection, else r0 (1 - t / T)  (linear)  or  r0 (1 + cos(pi t / T)) / 2  (cosine).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from smidgen.adapt import _ranks, _sparse_targets
from smidgen.adapt._growth import Exchange, Found, Phase, Seeds, exchange
from smidgen.adapt._published import PublishedPhase
from smidgen.adapt._sparse import Site
from smidgen.adapt._support import largest_products, members, top
from smidgen.params import ParamView


@runtime_checkable
class Follows(Protocol):
    """An optimizer whose state can follow a tensor's elements to other positions."""

    t: int
    outcome: Any
    config: Any

    def reselect(self, name: str, origin: Tensor, seeds: Seeds | None) -> None:
        """State of element j <- that of element origin[j], or, for origin -1, a new one's, from seeds in their order."""


@runtime_checkable
class Scores(Protocol):
    """An optimizer that knows how much gradient rows and columns of a matrix have seen."""

    def scores(self, name: str) -> tuple[Tensor, Tensor]:
        """Row [o] and column [i] accumulators of a tensor with a support."""


class Schedule:
    """Updates of a phase, and fractions."""

    def __init__(self, every: int, collect: int, rate: float, kind: str, first: str, early: bool):
        """`first`: all or rate; `early`: a phase after the first also takes the update before it."""
        self.every, self.collect, self.rate, self.kind, self.first, self.early = every, collect, rate, kind, first, early

    def collects(self, update: int) -> bool:
        """Whether a phase takes this update."""
        place = update % self.every
        return 1 <= place <= self.collect or (self.early and update >= self.every and place == 0)

    def closes(self, t: int) -> bool:
        """Whether a selection follows update t."""
        return t % self.every == self.collect

    def fraction(self, t: int, steps: int) -> float:
        """Share of the deltas replaced after update t."""
        if t > steps:
            return 0.0
        if t == self.collect and self.first == "all":
            return 1.0
        done = t / steps
        return self.rate * (1 - done if self.kind == "linear" else (1 + math.cos(math.pi * done)) / 2)

    def largest(self, update: int) -> float:
        """Bound of the fraction of the phase that takes this update."""
        return 1.0 if update <= self.collect and self.first == "all" else self.rate


class Reselection:
    """The sites of a model, by name of their deltas in the view."""

    def __init__(
        self, sites: Mapping[str, Site], view: ParamView, schedule: Schedule, growth: str, candidates: float, old: bool
    ):
        """growth: ag, ma, or snip (ag with entries weighed by |w|); candidates: times the entries to be replaced, at most k;
        old: collect as the public code."""
        self.sites, self.view, self.schedule, self.growth = sites, view, schedule, growth
        self.candidates, self.old = candidates, old
        self.t = 0  # updates made, bad ones included

    def open(self) -> None:
        """Open a phase for the coming update, where one begins."""
        update = self.t + 1
        if self.growth == "ma" or not self.schedule.collects(update):
            return
        for site in self.sites.values():
            k = len(site.support)
            wanted = int(self.schedule.largest(update) * k)
            if site.phase is None and wanted:
                site.phase = self.phase(site, k if self.old else min(k, math.ceil(self.candidates * wanted)))

    def check(self) -> None:
        """Raise UserError where ranks tune other entries."""
        _ranks.checked({name: (site.index,) for name, site in self.sites.items()})

    def phase(self, site: Site, size: int) -> Phase:
        """A new phase of a site with so many candidates."""
        if self.old:
            return PublishedPhase(size)
        return Phase(size, functools.partial(_sparse_targets.values, site.module) if self.growth == "snip" else None)

    def after(self, optimizer: Follows, steps: int) -> None:
        """After an update: count it, and drop and grow where a phase ends."""
        self.t = optimizer.t
        for site in self.sites.values():
            if site.phase is not None and optimizer.outcome.written:
                site.phase.commit(_clipped(optimizer))
            elif site.phase is not None:
                site.phase.discard()
        if self.schedule.closes(self.t):
            p = self.schedule.fraction(self.t, steps)
            for name, site in self.sites.items():
                self._select(optimizer, name, site, int(p * len(site.support)))
                site.phase = None
            self.check()
        self.open()

    @torch.no_grad()
    def _select(self, optimizer: Follows, name: str, site: Site, count: int) -> None:
        index, delta, found = site.index, site.delta.detach(), None
        if self.growth == "ma":
            assert isinstance(optimizer, Scores)
            grown = largest_products(*optimizer.scores(name), count, index.long())
        else:
            found = None if site.phase is None else site.phase.found()
            if found is None:
                return
            kept = torch.ones_like(index, dtype=torch.bool)
            kept[top(-delta.abs(), count)] = False
            open_to = (~members(found.index, index[kept])).nonzero()[:, 0]
            grown = found.index[open_to[top(found.score[open_to], count)]]
        if not len(grown):
            return
        change = exchange(index, delta, grown, count)
        site.move(change.index)
        self.view.restore({name: torch.where(change.origin >= 0, delta[change.origin], 0.0)})
        optimizer.reselect(name, change.origin, None if found is None else _of_new(found, change))


def _of_new(found: Found, change: Exchange) -> Seeds:
    """The seeds of the entries that have just grown."""
    place = torch.searchsorted(found.index.long(), change.index[change.origin < 0])
    return found.seeds._replace(mean=found.seeds.mean[place], square=found.seeds.square[place])


def _clipped(optimizer: Follows) -> float:
    """What the optimizer multiplied the last gradient by, as `optim._gradients` clips."""
    limit, norm = getattr(optimizer.config, "max_grad_norm", 0.0), optimizer.outcome.measures["grad_norm"]
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
