"""Objectives: what an optimizer may ask about one step's data, and the wrappers that record and replay the answers.

An objective reduces (float64 loss sum, weight) pairs over micro-batches, and over ranks, in a fixed order and divides
once, so that a ragged accumulated batch equals the whole batch. Weight = label tokens, or rows for classification.

- `ModelObjective`: a model and its micro-batches, through a probing engine;
- `ClosureObjective`: any zero-argument function, evaluated in place with a saved copy of the tuned tensors;
- `Recorded`: passes questions on and keeps the numbers; `Replayed`: answers from recorded numbers, without a model.

Data-parallel ranks: `smidgen.ranks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from smidgen.config import ConfigError
from smidgen.directions import Direction, Probe, displace, restrict
from smidgen.forward_mode import slope_in_place
from smidgen.hidden import hidden_squares, stds
from smidgen.inputs import input_squares
from smidgen.loss import Losses, targets
from smidgen.outputs import output_squares, sizes
from smidgen.params import ParamView
from smidgen.per_example import Span, examples_of
from smidgen.perturbed import Draw, perturbed
from smidgen.probing import Batch, Engine
from smidgen.reuse import Held


class Objective(Protocol):
    """One optimisation step's data."""

    key: Hashable  # identifies its rows

    def losses(self, probes: Sequence[Probe], *, each: bool = False) -> Tensor:
        """float64 [P], or [P, N] per example in global row order; theta unchanged, bit for bit."""

    def slope(self, direction: Direction) -> tuple[float, float]:
        """(loss, <grad L(theta), z>) by forward mode; theta unchanged, bit for bit."""

    def backward(self, names: Iterable[str] | None = None, *, dropout: bool = True) -> float:
        """Loss; gradients into `.grad`, only for these names (all tuned tensors when None). Without `dropout` it is the
        gradient of the function that `losses` evaluates."""

    def input_squares(self, names: Sequence[str], onto: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """For each of the names that is a linear weight: sums over tokens of the squares of its inputs at theta, float64,
        shaped to broadcast against the weight, or those of their products through `onto`; see `smidgen.inputs`."""

    def hidden_stds(self, names: Sequence[str]) -> dict[str, float]:
        """For each of the names the deviation of the hidden states at theta that enter its layer; see `smidgen.hidden`."""

    def output_sizes(self, names: Sequence[str]) -> dict[str, float]:
        """For each of the names the root mean square at theta of the output of its module, 0 where there is none; see
        `smidgen.outputs`."""

    def perturbed(self, names: Sequence[str], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses with noise on the outputs of linear layers, float64 [2, N] per example, and for each of the names that is
        a linear weight what entered it, float32 [N, D]; see `smidgen.perturbed`. No transcript holds this answer."""


Sums = tuple[Tensor, Tensor]  # float64 loss sums and weights, [P] or [P, N]


class Measured:
    """What is measured in a model's layers over micro-batches, whatever their loss is."""

    engine: Engine
    batches: Sequence[Batch]

    def hidden_squares(self, names: Sequence[str]) -> Tensor:
        """Sums of squared deviations and their weight: what ranks exchange."""
        return hidden_squares(self.engine, self.batches, names)

    def hidden_stds(self, names: Sequence[str]) -> dict[str, float]:
        return stds(self.hidden_squares(names), names)

    def output_squares(self, names: Sequence[str]) -> Tensor:
        """Sums of squares of outputs and their counts: what ranks exchange."""
        return output_squares(self.engine, self.batches, names)

    def output_sizes(self, names: Sequence[str]) -> dict[str, float]:
        return sizes(self.output_squares(names), names)


class ModelObjective(Measured):
    """Mean loss of a model over micro-batches. Cost of P probes: P forwards a micro-batch, or the part of them that
    `smidgen.reuse` leaves; the hidden states that are reused live as long as this object."""

    def __init__(self, engine: Engine, batches: Sequence[Batch], key: Hashable = None):
        self.engine, self.batches, self.key = engine, batches, key
        self.held = [Held() for _ in batches]

    def sums(self, probes: Sequence[Probe], *, each: bool = False, spans: Sequence[Span] | None = None) -> Sums:
        """Loss sums and weights before division: what ranks exchange. `spans`: which examples of the step each micro-batch
        holds, where it is not all of them in order."""
        found = self.engine.every(self.batches, probes, self.held, spans or self._spans())
        totals, weights = [], []
        for micro in zip(*found, strict=True):  # the micro-batches of one probe
            sums, counts = zip(*(_sums(losses, each) for losses in micro), strict=True)
            totals.append(torch.cat(sums) if each else torch.stack(sums).sum(0))
            weights.append(torch.cat(counts) if each else torch.stack(counts).sum(0))
        return torch.stack(totals), torch.stack(weights)

    def _spans(self) -> list[Span]:
        lengths = [examples_of(batch) for batch in self.batches]
        return [Span(sum(lengths[:at]), sum(lengths)) for at in range(len(lengths))]

    def losses(self, probes: Sequence[Probe], *, each: bool = False) -> Tensor:
        total, weight = self.sums(probes, each=each)
        return total / weight

    def slope_sums(self, direction: Direction) -> Tensor:
        """Loss sum, sum of its derivatives and weight, float64 [3]: what ranks exchange."""
        total = torch.zeros(3, dtype=torch.float64)
        for batch in self.batches:
            found, tangent = self.engine.slope(batch, direction)
            nll, tangent = found.nll.double().cpu(), tangent.double().cpu()
            total += torch.stack([nll.sum(), tangent.sum(), torch.tensor(float(nll.numel()), dtype=torch.float64)])
        return total

    def slope(self, direction: Direction) -> tuple[float, float]:
        loss, tangent, weight = self.slope_sums(direction).tolist()
        return loss / weight, tangent / weight

    def input_squares(self, names: Sequence[str], onto: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return input_squares(self.engine, self.batches, names, onto)

    def perturbed_sums(
        self, names: Sequence[str], draw: Draw, spans: Sequence[Span] | None = None
    ) -> tuple[Sums, dict[str, Tensor]]:
        """Loss sums and weights of both signs, and the inputs, for the examples of this rank; `spans`: as of `sums`."""
        pairs, inputs = [], []
        for batch, span in zip(self.batches, spans or self._spans(), strict=True):
            found, entered = perturbed(self.engine, batch, names, draw, span)
            pairs.append(torch.stack([torch.stack(_sums(losses, each=True)) for losses in found]))
            inputs.append(entered)
        total, weight = torch.cat(pairs, 2).unbind(1)
        return (total, weight), {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}

    def perturbed(self, names: Sequence[str], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        (total, weight), inputs = self.perturbed_sums(names, draw)
        return total / weight, inputs

    def weight(self) -> int:
        """Number of losses that the mean is over."""
        return sum(labels_of(batch, self.engine) for batch in self.batches)

    def backward(self, names: Iterable[str] | None = None, *, dropout: bool = True) -> float:
        weight = self.weight()
        return self.shares(names, dropout=dropout, divisor=weight) / weight

    def shares(self, names: Iterable[str] | None, *, dropout: bool, divisor: float) -> float:
        """The sum of the losses; into `.grad` go the gradients of that sum over `divisor`. What a rank has of the whole."""
        view, model = self.engine.view, self.engine.model
        chosen = None if names is None else set(names)
        for entry in view:
            if (chosen is None or entry.name in chosen) and (entry.addend or not entry.tensor.is_floating_point()):
                raise ConfigError(
                    f"{entry.name} is {'quantised' if entry.addend else entry.tensor.dtype} and has no gradient: tune an "
                    "adapter (scheme lora) on a quantised base, or take a method without back-propagation"
                )
        frozen = [e.tensor for e in view if chosen is not None and e.name not in chosen and e.tensor.requires_grad]
        for tensor in frozen:
            tensor.requires_grad_(False)
        mode = model.training
        model.train(dropout)
        try:
            total = 0.0
            pause = getattr(self.engine.wrapped, "no_sync", contextlib.nullcontext)
            for at, batch in enumerate(self.batches):
                with pause() if at + 1 < len(self.batches) else contextlib.nullcontext():  # averages in the last one
                    loss = self.engine.differentiable(batch).nll.sum()
                    (loss / divisor).backward()
                self.engine.backwards += 1
                total += loss.detach().double().item()
        finally:
            model.train(mode)
            for tensor in frozen:
                tensor.requires_grad_(True)
        return total


def _sums(found: Losses, each: bool) -> Sums:
    """Loss sum and weight of one micro-batch, or of each of its rows."""
    nll, rows, size = found
    nll = nll.double().cpu()
    if not each:
        return nll.sum(), torch.tensor(float(nll.numel()), dtype=torch.float64)
    zero = torch.zeros(size, dtype=torch.float64)
    return zero.index_add(0, rows.cpu(), nll), zero.index_add(0, rows.cpu(), torch.ones_like(nll))


def labels_of(batch: Batch, engine: Engine) -> int:
    """Number of losses in a batch: label tokens, rows where a row has one label, or examples."""
    if "groups" in batch:  # all options of each example: one loss an example
        return batch["golds"].shape[0]
    if "labels" not in batch:  # a trainer's own, such as trl's pairs: its loss is a mean over rows
        return batch["input_ids"].shape[0]
    labels = batch["labels"]
    rows = engine.kind == "classification" or labels.ndim == 1
    return labels.shape[0] if rows else targets(labels, engine.kind).tokens.numel()


class ClosureObjective:
    """Any zero-argument loss function of the tuned tensors. Probes are written in place and undone from a saved copy.

    It counts as one example. Memory: one copy of the tuned tensors while it evaluates. `backward` calls the closure under
    autograd.
    """

    key: Hashable = None

    def __init__(self, closure: Callable[[], Tensor | float], view: ParamView):
        self.closure, self.view = closure, view

    def losses(self, probes: Sequence[Probe], *, each: bool = False) -> Tensor:
        values = torch.empty(len(probes), dtype=torch.float64)
        saved = self.view.snapshot()
        try:
            for p, probe in enumerate(probes):
                for entry in self.view:
                    if restrict(probe, entry.name):
                        displace(probe, entry.name, saved[entry.name].contiguous(), entry.storage)
                        entry.version += 1
                with torch.no_grad():
                    values[p] = float(self.closure())
                for entry in self.view:
                    if restrict(probe, entry.name):
                        entry.storage.copy_(saved[entry.name])
        finally:
            for entry in self.view:
                entry.storage.copy_(saved[entry.name])
        return values[:, None] if each else values

    def slope(self, direction: Direction) -> tuple[float, float]:
        return slope_in_place(self.view, direction, self.closure)

    def backward(self, names: Iterable[str] | None = None, *, dropout: bool = True) -> float:
        loss = self.closure()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError("the closure must return a loss with an autograd graph for this method")
        wanted = [self.view[n].tensor for n in (self.view.entries if names is None else names)]
        loss.backward(inputs=wanted)
        return loss.item()

    def input_squares(self, names: Sequence[str], onto: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        if onto is not None:
            return {}
        raise ValueError("a closure does not say what reaches the layers; give the optimizer an Objective of a model")

    def hidden_stds(self, names: Sequence[str]) -> dict[str, float]:
        raise ConfigError("init = hidden looks at a model, and a closure has none: init=random, or step with an Objective")

    def output_sizes(self, names: Sequence[str]) -> dict[str, float]:
        return dict.fromkeys(names, 0.0)

    def perturbed(self, names: Sequence[str], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        raise ConfigError("credit = weights looks at layers, and a closure has none: take vectors, or step with an Objective")


class Recorded:
    """Passes every question on and keeps the floats of the answers, in order: one step's part of the transcript."""

    def __init__(self, inner: Objective):
        self.inner, self.key = inner, inner.key
        self.values: list[float] = []

    def losses(self, probes: Sequence[Probe], *, each: bool = False) -> Tensor:
        answer = self.inner.losses(probes, each=each)
        self.values.extend(answer.flatten().tolist())
        return answer

    def slope(self, direction: Direction) -> tuple[float, float]:
        answer = self.inner.slope(direction)
        self.values.extend(answer)
        return answer

    def backward(self, names: Iterable[str] | None = None, *, dropout: bool = True) -> float:
        loss = self.inner.backward(names, dropout=dropout)
        self.values.append(loss)
        return loss

    def input_squares(self, names: Sequence[str], onto: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        found = self.inner.input_squares(names, onto)
        for name in names:  # two sizes, then the values; sizes 0 for a name that is no linear weight
            squares = found.get(name, torch.empty(0, 0))
            self.values.extend([*map(float, squares.shape), *squares.flatten().tolist()])
        return found

    def hidden_stds(self, names: Sequence[str]) -> dict[str, float]:
        found = self.inner.hidden_stds(names)
        self.values.extend(found[name] for name in names)
        return found

    def output_sizes(self, names: Sequence[str]) -> dict[str, float]:
        found = self.inner.output_sizes(names)
        self.values.extend(found[name] for name in names)
        return found

    def perturbed(self, names: Sequence[str], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        raise ValueError("inputs of layers are too many numbers for a record: make this step without one")


class Replayed:
    """Answers from a transcript. No model, no forward pass. Raises ValueError when the questions do not fit it.

    `forwards` and `jvps` count what the questions cost when they were answered live, for each micro-batch: a probe is one
    forward, a slope is one forward and one jvp.
    """

    key: Hashable = None

    def __init__(self, values: Sequence[float]):
        self.values, self._next = values, 0
        self.forwards = self.jvps = 0

    def _take(self, count: int) -> Sequence[float]:
        taken = self.values[self._next : self._next + count]
        if len(taken) < count:
            raise ValueError(
                f"the record holds {len(self.values)} numbers and the method asks for more: "
                "the journal was written with other settings"
            )
        self._next += count
        return taken

    def losses(self, probes: Sequence[Probe], *, each: bool = False) -> Tensor:
        self.forwards += len(probes)
        if each:
            count = (len(self.values) - self._next) // max(1, len(probes)) * len(probes)
            return torch.tensor(self._take(count), dtype=torch.float64).view(len(probes), -1)
        return torch.tensor(self._take(len(probes)), dtype=torch.float64)

    def slope(self, direction: Direction) -> tuple[float, float]:
        self.forwards, self.jvps = self.forwards + 1, self.jvps + 1
        loss, slope = self._take(2)
        return loss, slope

    def backward(self, names: Iterable[str] | None = None, *, dropout: bool = True) -> float:
        raise ValueError("a method that uses back-propagation cannot be replayed; resume it from a checkpoint")

    def input_squares(self, names: Sequence[str], onto: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        self.forwards += 1
        found = {}
        for name in names:
            rows, columns = map(int, self._take(2))
            if rows and columns:
                found[name] = torch.tensor(self._take(rows * columns), dtype=torch.float64).view(rows, columns)
        return found

    def hidden_stds(self, names: Sequence[str]) -> dict[str, float]:
        self.forwards += 1
        return dict(zip(names, self._take(len(names)), strict=True))

    def output_sizes(self, names: Sequence[str]) -> dict[str, float]:
        self.forwards += 1
        return dict(zip(names, self._take(len(names)), strict=True))

    def perturbed(self, names: Sequence[str], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        raise ValueError("inputs of layers are in no record; resume the run from a checkpoint")

    def done(self) -> bool:
        """Whether every recorded number was used."""
        return self._next == len(self.values)


def as_objective(question: Objective | Callable[[], Tensor | float], view: ParamView) -> Objective:
    """An objective as it is, or a zero-argument closure wrapped as one."""
    if hasattr(question, "losses"):
        return question  # type: ignore[return-value]
    if not callable(question) or isinstance(question, nn.Module):
        raise ValueError(f"step() wants an Objective or a function without arguments, not {type(question).__name__}")
    return ClosureObjective(question, view)
