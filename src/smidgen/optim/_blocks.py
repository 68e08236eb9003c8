"""Updates that a sum of scaled directions cannot say: theta changed in float32, one block of elements at a time.

A block is worked on while it is in cache, so an update with tensor state costs one sweep over the weights and one over
the state, whatever the number of arithmetic passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from smidgen import noise
from smidgen.directions import width
from smidgen.params import Entry, ParamView, Rounding

ALIGN = 256  # a block starts at a multiple of this: the grain of 8-bit state

# Elements of a block. CPU: measured with 1 MB of second-level and 32 MB of third-level cache, within 10 % of the best of
# 1 << 16 .. 1 << 20 for momentum and Adam, on one thread and on two. Others: chosen to make launches few.
SIZES = {"cpu": 1 << 19}
SIZE = 1 << 24

Update = Callable[[slice, Tensor, Tensor], None]


def rewrite_(view: ParamView, name: str, update: Update, *, at: noise.Address, rounding: Rounding = "stochastic") -> None:
    """Call `update(span, w, work)` for blocks that cover theta[name]; it changes `w` in place.

    `span`: which elements, in the order of memory of a contiguous tensor; `w`: float32 [n], their values; `work`:
    float32 [n], scratch. 16-bit weights are rounded once, when a block is written back. Memory: one or two blocks; one
    float32 copy of the tensor where it is not contiguous.
    """
    entry = view[name]
    size = SIZES.get(entry.tensor.device.type, SIZE)
    if entry.tensor.dtype != torch.float32 and entry.tensor.is_contiguous() and entry.tensor.numel() > size:
        _by_rows(view, entry, update, size, at, rounding)
        return

    def whole(value32: Tensor) -> None:
        flat = value32.contiguous().view(-1)
        work = torch.empty_like(flat[:size])
        for first in range(0, flat.numel(), size):
            span = slice(first, min(first + size, flat.numel()))
            update(span, flat[span], work[: span.stop - first])
        if flat.data_ptr() != value32.data_ptr():
            value32.copy_(flat.view(value32.shape))

    view.edit_(name, whole, at=at, rounding=rounding)


def _by_rows(view: ParamView, entry: Entry, update: Update, size: int, at: noise.Address, rounding: Rounding) -> None:
    """The same for 16-bit weights, without a float32 copy of more than a block."""
    row = width(entry.tensor)
    work = None
    for rows in _row_blocks(entry.tensor.shape[0], row, size):
        value32 = entry.storage[rows].float()
        work = torch.empty_like(value32).view(-1) if work is None else work
        flat = value32.view(-1)
        update(slice(rows.start * row, rows.stop * row), flat, work[: flat.numel()])
        view.write_(entry.name, value32, at=at, rows=rows, rounding=rounding)


def _row_blocks(count: int, row: int, size: int) -> Iterator[slice]:
    """Blocks of rows of about `size` elements whose first elements are multiples of ALIGN."""
    grain = ALIGN // math.gcd(ALIGN, row)
    step = max(grain, size // row // grain * grain)
    return (slice(first, min(first + step, count)) for first in range(0, count, step))
