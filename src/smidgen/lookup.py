"""Lenses: what a module sees, for one evaluation, in place of the tuned tensors that it reads.

`Displaced` shows theta + probe; `smidgen.forward_mode` has one that shows theta with a tangent. `LookedUp` shows an
embedding matrix through a lens row by row, as it is looked up, `LensedHead` the output head block by block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smidgen.directions import Probe, displace, displace_all, displace_rows, restrict
from smidgen.params import Entry
from smidgen.population import Population, after_linear


class Lens(Protocol):
    """How tuned tensors look during one evaluation. Theta is only read."""

    def touches(self, name: str) -> bool:
        """Whether a tensor looks other than it is."""

    def block(self, entry: Entry, weight: Tensor, out: Tensor, *, first: int = 0) -> Tensor:
        """What stands for `weight`, the rows of a tensor from `first` on; `out` is scratch of its shape."""

    def blocks(self, entries: Sequence[Entry], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> Sequence[Tensor]:
        """`block` of several whole tensors."""

    def rows(self, entry: Entry, ids: Tensor, padding: int | None = None) -> Tensor:
        """What stands for some rows of a tensor, [n, ...], in fresh memory; `padding` is the row without gradient."""

    def beside(self, tensors: dict[str, Entry]) -> Callable[..., Tensor]:
        """A forward hook that makes the output of a linear layer what it looks like; its weight cannot be displaced itself."""


class Displaced:
    """theta + probe."""

    def __init__(self, probe: Probe):
        self.probe = probe

    def touches(self, name: str) -> bool:
        return bool(restrict(self.probe, name))

    def block(self, entry: Entry, weight: Tensor, out: Tensor, *, first: int = 0) -> Tensor:
        displace(self.probe, entry.name, weight.contiguous(), out, first=first)
        return out

    def blocks(self, entries: Sequence[Entry], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> Sequence[Tensor]:
        if entries:
            displace_all(self.probe, [e.name for e in entries], [w.contiguous() for w in weights], outs)
        return outs

    def rows(self, entry: Entry, ids: Tensor, padding: int | None = None) -> Tensor:
        table = entry.storage
        matrix = table.view(table.shape[0], -1)
        out = torch.empty(ids.numel(), matrix.shape[1], dtype=table.dtype, device=table.device)
        displace_rows(self.probe, entry.name, matrix, ids, out)
        return out.view(ids.numel(), *table.shape[1:])

    def beside(self, tensors: dict[str, Entry]) -> Callable[..., Tensor]:
        return functools.partial(after_linear, Population([self.probe]), tensors)


class LookedUp(Tensor):
    """An embedding matrix that shows only the rows it is asked for; any other use shows all of it, in fresh memory."""

    lens: Lens
    entry: Entry

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.embedding:
                ids, table = args[0], args[1] if len(args) > 1 else kwargs["weight"]
                if isinstance(table, cls) and not isinstance(ids, cls):
                    padding = args[2] if len(args) > 2 else kwargs.get("padding_idx")
                    home = table.entry.tensor.device  # where accelerate spreads a model, not always that of the ids
                    found = table.lens.rows(table.entry, ids.reshape(-1).to(home), padding).to(ids.device)
                    return found.view(*ids.shape, found.shape[-1])
            if getattr(func, "__name__", "") == "__get__":
                return func(*args, **kwargs)
            unwrap = [a.full() if isinstance(a, cls) else a for a in args]
            return func(*unwrap, **{k: v.full() if isinstance(v, cls) else v for k, v in kwargs.items()})

    def full(self) -> Tensor:
        """The whole matrix as the lens shows it."""
        table = self.entry.storage.contiguous()
        return self.lens.block(self.entry, table, torch.empty_like(table))


class LensedHead:
    """The output head (a `loss.Head`) through a lens; what stands for a tuned weight is made in scratch, block by block.

    `scratch(slot, like)` gives a buffer shaped as `like`.
    """

    def __init__(
        self,
        module: nn.Linear,
        lens: Lens,
        entry_of: Callable[[Tensor], Entry | None],
        scratch: Callable[[str, Tensor], Tensor],
    ):
        self._lens, self._entry_of, self._scratch = lens, entry_of, scratch
        self._weight, self._bias = module.weight, module.bias
        self.rows, self.width = module.weight.shape
        self._give_back = getattr(module.weight, "release", None)  # of a head on disk

    def _changed(self, parameter: Tensor) -> Entry | None:
        entry = self._entry_of(parameter)
        return entry if entry is not None and self._lens.touches(entry.name) else None

    def _block(self, parameter: Tensor, first: int, stop: int, slot: str) -> Tensor:
        block, entry = parameter.detach()[first:stop], self._changed(parameter)
        return block if entry is None else self._lens.block(entry, block, self._scratch(slot, block), first=first)

    def block(self, first: int, stop: int) -> tuple[Tensor, Tensor | None]:
        if self._give_back is not None:
            self._give_back()  # the block before
        bias = None if self._bias is None else self._block(self._bias, first, stop, "head bias")
        return self._block(self._weight, first, stop, "head"), bias

    def _rows(self, parameter: Tensor, ids: Tensor) -> Tensor:
        entry = self._changed(parameter)
        return parameter.detach()[ids] if entry is None else self._lens.rows(entry, ids)

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._rows(self._weight, ids), None if self._bias is None else self._rows(self._bias, ids)
