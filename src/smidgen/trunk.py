"""A forward of a model up to its output head, or through it at label positions only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.kinds import Kind, seen_as
from smidgen.loss import NOT_INPUTS, Targets
from smidgen.placed import homes
from smidgen.readers import output_head, unwrapped

Batch = dict[str, Any]


class Trunk:
    """One model, and how many forwards it was asked for."""

    def __init__(self, model: nn.Module, kind: Kind):
        self.model, self.kind = model, seen_as(kind)
        self.forwards = 0  # model evaluations so far
        self.tokens = 0  # input tokens of those evaluations
        self.wrapped: nn.Module | None = None  # what back-propagation runs instead of the model: it averages over ranks
        self._accepted = set(inspect.signature(unwrapped(model).forward).parameters)
        # The output head over the vocabulary, None where there is none; own_head: the model has to run it by itself.
        self.head = output_head(model) if kind != "classification" else None
        self.own_head = self.head is not None and (not isinstance(self.head, nn.Linear) or homes(self.head) is not None)

    def _applies_head_itself(self) -> bool:
        return self.head is not None and not self.own_head

    def _hidden(
        self, batch: Batch, where: Targets, given: Tensor | None = None, *, factor: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Run the trunk; (hidden states at label positions [n, H], None), or (-, the model's own logits [n, V]).

        given: what the output head was given in a forward that was run before."""

        def picked(x: Tensor) -> Tensor:
            return _of_row(x, where)[where.keep.to(x.device)]

        if given is not None:
            return picked(given), None
        inputs = self._inputs(batch)
        self._count(inputs)
        shown = (lambda x: picked(x)[None] * factor) if self.own_head else no_positions
        given, logits = self._to_head(inputs, shown)
        if given is None:  # the model computes logits without calling its head
            return logits, _of_row(logits, where)[where.keep]
        return picked(given), logits[0] if self.own_head else None

    def _to_head(self, inputs: Batch, shown: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, Tensor]:
        """One forward, not counted, whose head is shown something else: (what it was given, its logits)."""
        caught: list[Tensor] = []
        handle = None
        if self.head is not None:

            def tap(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                caught.append(args[0])
                return (shown(args[0]), *args[1:])

            handle = self.head.register_forward_pre_hook(tap)
        try:
            logits = self._run(inputs).logits
        finally:
            if handle is not None:
                handle.remove()
        return (caught[0] if caught else None), logits

    def _forward(self, batch: Batch) -> Any:
        inputs = self._inputs(batch)
        self._count(inputs)
        return self._run(inputs)

    def _inputs(self, batch: Batch) -> Batch:
        """What the model is called with."""
        inputs = {k: v for k, v in batch.items() if k not in NOT_INPUTS}
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        if self.kind == "seq2seq" and "decoder_input_ids" not in inputs:
            labels = batch["labels"]
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator]
        return inputs

    def _count(self, inputs: Batch) -> None:
        self.forwards += 1
        self.tokens += inputs["input_ids"].numel() if "input_ids" in inputs else 0

    def _run(self, inputs: Batch) -> Any:
        return (self.wrapped if self.wrapped is not None and torch.is_grad_enabled() else self.model)(**inputs)


def no_positions(x: Tensor) -> Tensor:
    return x[:, :0]


def _of_row(x: Tensor, where: Targets) -> Tensor:
    """x [B, m + T, ...] without the positions of m virtual tokens that a scheme puts before the row -> [B, T, ...]."""
    return x[:, x.shape[1] - where.keep.shape[1] :]
