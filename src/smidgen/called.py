"""A trainer's own loss as an objective: called unchanged, with what it can answer and what it cannot."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from smidgen.directions import Direction, Probe
from smidgen.objective import Measured, Sums, labels_of
from smidgen.perturbed import Draw
from smidgen.probing import Batch, Engine


class CalledObjective(Measured):
    """A trainer's own loss function over micro-batches, each called unchanged; promises no memory beyond its own.

    `loss(batch)` returns a scalar. `scaled` says that it has divided by the weight of all micro-batches already (as
    transformers does when it knows the number of items); otherwise the mean of each micro-batch is weighted by its
    label tokens (or rows).
    """

    def __init__(
        self, engine: Engine, batches: Sequence[Batch], loss: Callable[[Batch], Tensor], *, scaled: bool, key: Hashable = None
    ):
        self.engine, self.batches, self.loss, self.scaled, self.key = engine, batches, loss, scaled, key

    def sums(self, probes: Sequence[Probe], *, each: bool = False) -> Sums:
        """Loss sums and weights before division."""
        if each:
            raise ValueError("a trainer's own loss has no per-example values; use smidgen's loss for this method")
        totals = torch.zeros(len(probes), dtype=torch.float64)
        weights = torch.zeros(len(probes), dtype=torch.float64)
        for p, probe in enumerate(probes):
            for batch in self.batches:
                value = self.engine.call(functools.partial(self.loss, batch), probe).double().cpu().item()
                weight = float(labels_of(batch, self.engine)) if not self.scaled else 1.0 / len(self.batches)
                totals[p] += value * weight if not self.scaled else value
                weights[p] += weight
        return totals, weights

    def losses(self, probes: Sequence[Probe], *, each: bool = False) -> Tensor:
        total, weight = self.sums(probes, each=each)
        return total / weight

    def slope(self, direction: Direction) -> tuple[float, float]:
        raise ValueError("a trainer's own loss has no slope by forward mode; use smidgen's loss for this method")

    slope_sums = slope  # what ranks would exchange

    def backward(self, names: Iterable[str] | None = None, *, dropout: bool = True) -> float:
        raise ValueError("use the trainer itself for methods with back-propagation")

    def input_squares(self, names: Sequence[str], onto: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        raise ValueError("a trainer's own loss does not say what reaches the layers; use smidgen's loss for this method")

    def perturbed(self, names: Sequence[str], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        raise ValueError("a trainer's own loss has no per-example values; use smidgen's loss for this method")
