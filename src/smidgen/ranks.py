"""Data-parallel ranks: each holds its own rows, and only the sums of losses and weights travel, as float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from smidgen.called import CalledObjective
from smidgen.directions import Direction, Probe
from smidgen.hidden import stds
from smidgen.objective import ModelObjective
from smidgen.outputs import sizes
from smidgen.per_example import Span, varies
from smidgen.perturbed import Draw


class Reduced:
    """Data-parallel ranks: each holds its own rows; only loss sums and weights travel, as float64.

    Sums are gathered and added in rank order on every rank, so all ranks get the same bits.
    """

    def __init__(self, inner: ModelObjective | CalledObjective):
        self.inner, self.key = inner, inner.key

    def losses(self, probes: Sequence[Probe], *, each: bool = False) -> Tensor:
        total, weight = self.inner.sums(probes, each=each, **self._place(probes))
        pair = torch.stack([total, weight])
        if each:
            parts = _gather_ragged(pair)
            pair = torch.cat(parts, dim=-1)
        else:
            parts = [torch.empty_like(pair) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, pair)
            pair = _add_in_order(parts)
        return pair[0] / pair[1]

    def _place(self, probes: Sequence[Probe]) -> dict[str, Span]:
        """Which examples of the step this rank's are, where that matters."""
        return {"span": self._span()} if isinstance(self.inner, ModelObjective) and varies(probes) else {}

    def _span(self) -> Span:
        assert isinstance(self.inner, ModelObjective)
        mine = torch.tensor(self.inner.examples())
        parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, mine)
        counts = [int(part) for part in parts]
        return Span(sum(counts[: torch.distributed.get_rank()]), sum(counts))

    def slope(self, direction: Direction) -> tuple[float, float]:
        if isinstance(self.inner, CalledObjective):
            return self.inner.slope(direction)
        mine = self.inner.slope_sums(direction)
        parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, mine)
        loss, tangent, weight = _add_in_order(parts).tolist()
        return loss / weight, tangent / weight

    def backward(self, names: Iterable[str] | None = None, *, dropout: bool = True) -> float:
        raise ValueError("methods with back-propagation run under accelerate's DDP or FSDP, as Trainer does")

    def input_squares(self, names: Sequence[str], onto: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        found = self.inner.input_squares(names, onto)
        for squares in found.values():
            parts = [torch.empty_like(squares) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, squares)
            squares.copy_(_add_in_order(parts))
        return found

    def hidden_stds(self, names: Sequence[str]) -> dict[str, float]:
        if isinstance(self.inner, CalledObjective):
            return self.inner.hidden_stds(names)
        mine = self.inner.hidden_squares(names)
        parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, mine)
        return stds(_add_in_order(parts), names)

    def output_sizes(self, names: Sequence[str]) -> dict[str, float]:
        if isinstance(self.inner, CalledObjective):
            return self.inner.output_sizes(names)
        mine = self.inner.output_squares(names)
        parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, mine)
        return sizes(_add_in_order(parts), names)

    def perturbed(self, names: Sequence[str], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Every rank gets the inputs of all examples: N x D floats a layer travel."""
        if isinstance(self.inner, CalledObjective):
            return self.inner.perturbed(names, draw)
        (total, weight), inputs = self.inner.perturbed_sums(names, draw, self._span())
        total, weight = torch.cat(_gather_ragged(torch.stack([total, weight])), dim=-1)
        return total / weight, {name: torch.cat(_gather_ragged(X)) for name, X in inputs.items()}


def _add_in_order(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _gather_ragged(pair: Tensor) -> list[Tensor]:
    parts: list[Tensor | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, pair)
    return [p for p in parts if p is not None]
