"""An embedding matrix at theta + probe, displaced row by row as it is looked up."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from smidgen.directions import Probe, displace, displace_rows
from smidgen.params import Entry


class LookedUp(Tensor):
    """An embedding matrix that displaces only the rows it is asked for; any other use displaces all of it."""

    probe: Probe
    entry: Entry

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.embedding:
                ids, table = args[0], args[1] if len(args) > 1 else kwargs["weight"]
                if isinstance(table, cls) and not isinstance(ids, cls):
                    return table.lookup(ids)
            if getattr(func, "__name__", "") == "__get__":
                return func(*args, **kwargs)
            unwrap = [a.full() if isinstance(a, cls) else a for a in args]
            return func(*unwrap, **{k: v.full() if isinstance(v, cls) else v for k, v in kwargs.items()})

    def lookup(self, ids: Tensor) -> Tensor:
        """Displaced rows, [*ids.shape, D]."""
        table = self.entry.storage
        out = torch.empty(ids.numel(), table.shape[1], dtype=table.dtype, device=table.device)
        displace_rows(self.probe, self.entry.name, table, ids.reshape(-1), out)
        return out.view(*ids.shape, table.shape[1])

    def full(self) -> Tensor:
        """The whole displaced matrix, in fresh memory."""
        table = self.entry.storage.contiguous()
        out = torch.empty_like(table)
        displace(self.probe, self.entry.name, table, out)
        return out
