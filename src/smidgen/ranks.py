"""Several ranks answer one step's questions: each has its own rows, its own probes, or both; only floats travel.

Of N ranks, `probe_ranks` = k in a row see the same rows: rank r evaluates the (r mod k)-th part of the probes on the rows of
group r div k. k = 1 is data-parallel, k = N probe-parallel. Loss sums and weights go to rank 0, are added over groups by
size in float64, so in no order of ranks, and come back divided: the same bits on all ranks. Probes that are evaluated one at
a time have the same bits as in one process; several in one forward have, where `Engine.group` divides a rank's share.

Cost beside the rank's own evaluations: 16 bytes a probe to rank 0 and 8 bytes back; with `each`, 16 bytes a probe and
example. Questions that are not about probes (what enters the layers, a slope) every rank answers for its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from smidgen import world
from smidgen.config import ConfigError
from smidgen.directions import Direction, Probe
from smidgen.hidden import stds
from smidgen.objective import ModelObjective
from smidgen.outputs import sizes
from smidgen.per_example import Span, examples_of, varies
from smidgen.perturbed import Draw


class Reduced:
    """One step's objective over all ranks; `inner` is this rank's: its micro-batches, as many as on every rank."""

    def __init__(self, inner: Any, probe_ranks: int = 1):
        self.inner, self.key = inner, inner.key
        self.width = probe_ranks  # ranks that share rows
        self.groups = world.count() // probe_ranks
        self._sizes: Tensor | None = None  # examples of each group's micro-batches, [groups, micro-batches]

    def losses(self, probes: Sequence[Probe], *, each: bool = False) -> Tensor:
        share = -(-len(probes) // self.width)
        first = world.index() % self.width * share
        mine = list(probes[first : first + share])
        rows = int(self._counts().sum(1).max()) if each else 1
        sent = torch.zeros(2, share, rows, dtype=torch.float64)
        place = self._place(probes)
        if mine:
            total, weight = self.inner.sums(mine, each=each, **place)
            own = total.shape[-1] if each else 1
            sent[0, : len(mine), :own], sent[1, : len(mine), :own] = total.view(-1, own), weight.view(-1, own)
        if not each:
            return world.exchange(sent, lambda table: self._divided(table, share)[: len(probes)], len(probes))
        examples = int(self._counts().sum())
        found = world.exchange(sent, lambda table: self._beside(table, share, rows)[: len(probes)], len(probes) * examples)
        return found.view(len(probes), examples)

    def _divided(self, table: Tensor, share: int) -> Tensor:
        """Mean losses of all probes, of what the ranks sent."""
        parts = world.add(table.view(self.groups, self.width, 2, share))
        return (parts[:, 0] / parts[:, 1]).flatten()

    def _beside(self, table: Tensor, share: int, rows: int) -> Tensor:
        """Losses of all examples in global row order: micro-batch by micro-batch, in each group by group."""
        parts = table.view(self.groups, self.width, 2, share, rows)
        values = (parts[:, :, 0] / parts[:, :, 1]).flatten(1, 2)  # [groups, probes, rows]
        counts = self._counts().int()
        starts = counts.cumsum(1) - counts
        pieces = [
            values[g, :, starts[g, m] : starts[g, m] + counts[g, m]] for m in range(counts.shape[1]) for g in range(self.groups)
        ]
        return torch.cat(pieces, 1)

    def _counts(self) -> Tensor:
        """Examples of each micro-batch of each group, on every rank."""
        if self._sizes is None:
            mine = torch.tensor([_examples(batch) for batch in self.inner.batches], dtype=torch.float64)
            size = self.groups * mine.numel()
            self._sizes = world.exchange(mine, lambda table: table[:: self.width], size).view(self.groups, -1)
        return self._sizes

    def _place(self, probes: Sequence[Probe]) -> dict[str, list[Span]]:
        """Which examples of the step this rank's micro-batches hold, where that matters."""
        return {"spans": self._spans()} if isinstance(self.inner, ModelObjective) and varies(probes) else {}

    def _spans(self) -> list[Span]:
        order = self._counts().int().T.flatten()  # micro-batch by micro-batch, in each group by group
        starts = (order.cumsum(0) - order).view(-1, self.groups)[:, world.index() // self.width]
        return [Span(int(start), int(order.sum())) for start in starts]

    def _all(self, mine: Tensor) -> Tensor:
        """[examples of this rank, width] -> those of all, in global row order, on every rank."""
        counts, width = self._counts().int(), mine.shape[1]
        rows, starts = int(counts.sum(1).max()), counts.cumsum(1) - counts
        sent = torch.zeros(rows, width, dtype=torch.float64)
        sent[: len(mine)] = mine

        def ordered(table: Tensor) -> Tensor:
            parts = table[:: self.width].view(self.groups, rows, width)
            places = [(g, starts[g, m], counts[g, m]) for m in range(counts.shape[1]) for g in range(self.groups)]
            return torch.cat([parts[g, first : first + count] for g, first, count in places])

        found = world.exchange(sent, ordered, int(counts.sum()) * width).view(-1, width)
        return found.to(device=mine.device, dtype=mine.dtype)

    def _added(self, mine: Tensor) -> Tensor:
        """The sum over groups, on every rank; ranks that share rows count once."""
        total = world.exchange(mine, lambda table: world.add(table[:: self.width]), mine.numel())
        return total.view(mine.shape).to(mine.device)

    def slope(self, direction: Direction) -> tuple[float, float]:
        loss, tangent, weight = self._added(self.inner.slope_sums(direction)).tolist()
        return loss / weight, tangent / weight

    def backward(self, names: Iterable[str] | None = None, *, dropout: bool = True) -> float:
        """As in one process. Under a wrapper that averages gradients over ranks (`Engine.wrapped`) that one does the work;
        else the gradients are summed here, one tensor at a time."""
        if self.width > 1:
            raise ConfigError("probe_ranks: methods with back-propagation have no probes to share out, leave it out")
        inner, chosen = self.inner, None if names is None else set(names)
        if not hasattr(inner, "shares"):  # it says why it has no gradient
            return float(inner.backward(names, dropout=dropout))
        weight = float(self._added(torch.tensor([inner.weight()], dtype=torch.float64)))
        wrapped = inner.engine.wrapped is not None
        with world.together():
            total = inner.shares(chosen, dropout=dropout, divisor=weight / (world.count() if wrapped else 1))
            if not wrapped:
                for entry in inner.engine.view:
                    if chosen is None or entry.name in chosen:
                        _sum_gradient_(entry.tensor)
        return float(self._added(torch.tensor([total], dtype=torch.float64))) / weight

    def input_squares(self, names: Sequence[str], onto: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {name: self._added(squares) for name, squares in self.inner.input_squares(names, onto).items()}

    def hidden_stds(self, names: Sequence[str]) -> dict[str, float]:
        return stds(self._added(self.inner.hidden_squares(names)), names)

    def output_sizes(self, names: Sequence[str]) -> dict[str, float]:
        return sizes(self._added(self.inner.output_squares(names)), names)

    def perturbed(self, names: Sequence[str], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Every rank gets the inputs of all examples: N x D floats a layer travel."""
        if not isinstance(self.inner, ModelObjective):
            return self.inner.perturbed(names, draw)  # type: ignore[no-any-return]
        (total, weight), inputs = self.inner.perturbed_sums(names, draw, self._spans())
        return self._all((total / weight).T).T, {name: self._all(X) for name, X in inputs.items()}


def _examples(batch: dict[str, Any]) -> int:
    """Number of examples of a micro-batch, labelled or not."""
    return examples_of(batch) if "groups" in batch or "labels" in batch else int(batch["input_ids"].shape[0])


def _sum_gradient_(tensor: Tensor) -> None:
    """tensor.grad <- its sum over ranks; a rank whose part of the model had no use for the tensor adds nothing."""
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    distributed.all_reduce(tensor.grad)
