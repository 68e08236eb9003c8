"""A growth phase as the public code of SpIEL has it, for reproductions; `_growth` is ours.

Source: AlanAnsell/peft at 73b455b, src/peft/tuners/sft/trainer.py. Candidates are the k largest entries of |dW| in the first
micro-batch alone; sums of gradients and squares, and their counter n, run over micro-batches in the gradient's dtype (in
bfloat16 the counter stops at 256); the gradient of a micro-batch is that of its share of the loss, so with G micro-batches an
update the mean is G times too small. The seeds cover n / G updates, and their age is one short.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smidgen.adapt._growth import Found, Phase, Seeds
from smidgen.adapt._sparse_gradient import products


class PublishedPhase(Phase):
    """Collects one phase of one matrix with k deltas; `size` is k."""

    def __init__(self, size: int):
        super().__init__(size)
        self.seen: Tensor | None = None  # micro-batches, n, in the gradient's dtype
        self.last = 1  # micro-batches of the last update, G

    TENSORS = (*Phase.TENSORS, "seen")

    def see(self, left: Tensor, right: Tensor, index: Tensor) -> Tensor:
        if self.index is None:
            out = self._pick(left, right, index)
            assert self.value is not None
            self.index, self.total = self.picked, self.value.to(left.dtype)
            self.square, self.seen = self.total**2, torch.ones((), dtype=left.dtype)
            self.picked = self.value = None
        else:
            assert self.total is not None and self.square is not None and self.seen is not None
            out = products(left, right, index)
            g = products(left, right, self.index).to(self.total.dtype)
            self.total += g
            self.square += g**2
            self.seen += 1
        self.micro += 1
        return out

    def commit(self, scale: float) -> None:
        """Sums do not know of updates, nor of clipping."""
        if self.micro:
            self.last, self.micro = self.micro, 0
            self.counted += 1

    def discard(self) -> None:
        self.micro = 0

    def found(self) -> Found | None:
        if self.index is None or self.total is None or self.square is None or self.seen is None:
            return None
        seen, total, square = float(self.seen), self.total.float(), self.square.float()
        return Found(self.index, total.abs(), Seeds(total / seen, square / seen, seen / self.last, lag=1))
