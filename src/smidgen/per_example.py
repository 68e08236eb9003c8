"""A direction of its own for every example of a batch: one pair of forwards then carries as many directions as examples.

Examples count in global row order, over micro-batches and ranks: of N of them, example n has the direction whose query is
`query * N + n`. N is known where the losses are made; a method reads it off the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smidgen.config import ConfigError
from smidgen.directions import Direction, Probe
from smidgen.loss import Losses


@dataclass(frozen=True)
class Each:
    """A family of directions, one an example. By itself, to whoever knows of no examples (a closure), it is the direction of
    an only one. `one` is any frozen direction with a field `query`."""

    one: Any

    def of(self, row: int, rows: int) -> Direction:
        """The direction of example `row` of `rows`."""
        return replace(self.one, query=self.one.query * rows + row)

    @property
    def support(self) -> frozenset[str] | None:
        """As of its directions."""
        return self.one.support

    def displaced(self, name: str, weight: Tensor, scale: float, out: Tensor, *, first: int = 0) -> None:
        self.one.displaced(name, weight, scale, out, first=first)

    def displaced_rows(self, name: str, weight: Tensor, rows: Tensor, scale: float, out: Tensor) -> None:
        self.one.displaced_rows(name, weight, rows, scale, out)

    def accumulate(self, name: str, rows: slice, out32: Tensor, scale: float) -> None:
        self.one.accumulate(name, rows, out32, scale)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        return self.one.factors(name)


@dataclass(frozen=True)
class Span:
    """The place of some examples among all of a step: the number of the first, and of all."""

    first: int
    total: int


def known(span: Span | None) -> Span:
    """The span. Raises ConfigError where there is none: who asks evaluates all examples at one probe."""
    if span is None:
        raise ConfigError(
            "this objective evaluates all examples at one probe, and the method gives each its own: use the loss of the rows, "
            "or a method with directions that examples share, such as lozo or es"
        )
    return span


def varies(probes: Sequence[Probe]) -> bool:
    """Whether a probe displaces examples differently."""
    return any(isinstance(z, Each) for probe in probes for z, _ in probe)


def of_examples(probe: Probe, span: Span, count: int) -> list[Probe]:
    """The probe of each of `count` examples; shared directions are the same objects."""
    kinds = [[z.of(span.first + n, span.total) for n in range(count)] if isinstance(z, Each) else None for z, _ in probe]
    scales = [s for _, s in probe]
    return [
        [(own[n] if own is not None else z, s) for own, (z, _), s in zip(kinds, probe, scales, strict=True)]
        for n in range(count)
    ]


def examples_of(batch: dict[str, Any]) -> int:
    """Number of examples of a micro-batch: its rows, or the groups of rows that are options of one example."""
    return int(batch["golds"].shape[0] if "groups" in batch else batch["labels"].shape[0])


def owners(batch: dict[str, Any]) -> Tensor:
    """The example of each row, int64 [rows]."""
    return batch["groups"] if "groups" in batch else torch.arange(batch["labels"].shape[0])


def only(batch: dict[str, Any], n: int) -> dict[str, Any]:
    """The micro-batch of one example: its rows of every tensor that has a row for each."""
    rows = (owners(batch) == n).nonzero()[:, 0]
    count = batch["labels"].shape[0]
    found = {
        k: v[rows] if k != "choices" and isinstance(v, Tensor) and v.ndim and v.shape[0] == count else v
        for k, v in batch.items()
    }
    if "groups" in batch:
        found["groups"] = torch.zeros_like(rows)
        found["golds"] = (rows == batch["golds"][n]).nonzero()[:, 0]
    return found


def one_by_one(losses: Callable[[dict[str, Any], Probe], Losses], batch: dict[str, Any], probe: Probe, span: Span) -> Losses:
    """The losses of a micro-batch, each example evaluated alone at its own probe: the definition."""
    own = of_examples(probe, span, examples_of(batch))
    alone = [losses(only(batch, n), each) for n, each in enumerate(own)]
    rows = torch.cat([torch.full_like(found.rows, n) for n, found in enumerate(alone)])
    return Losses(torch.cat([found.nll for found in alone]), rows, len(own))
