"""The Triton kernel of single entries of dW = left^T right: tiles of dW are made in registers, and of each only the wanted
entries are written. As many multiplications as dW, no matrix of its size, no atomics.

A program makes one tile. The wanted positions are sorted, so those of a block of rows lie side by side; each tile of the
block reads them all and takes its own. At a density of 2 % that is a few hundredths of what a tile reads of the factors.
With TRITON_INTERPRET=1 it runs on CPU tensors, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = (torch.float32, torch.bfloat16, torch.float16)
ROWS = COLUMNS = 64  # of a tile: 16 KB in float32, which pass through shared memory; chosen
TOKENS = 32  # of both factors read at a time; chosen
ENTRIES = 256  # positions looked at together; chosen


@triton.jit
def _kernel(
    left,
    right,
    index,
    cuts,
    out,
    tokens,
    rows,
    columns,
    left_token,
    left_row,
    right_token,
    right_column,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row0, column0 = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    r, c = row0 + tl.arange(0, ROWS), column0 + tl.arange(0, COLUMNS)
    tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, tokens, TOKENS):
        t = (first + tl.arange(0, TOKENS)).to(tl.int64)
        a = tl.load(
            left + t[None, :] * left_token + r[:, None] * left_row,
            mask=(t < tokens)[None, :] & (r < rows)[:, None],
            other=0.0,
        )
        b = tl.load(
            right + t[:, None] * right_token + c[None, :] * right_column,
            mask=(t < tokens)[:, None] & (c < columns)[None, :],
            other=0.0,
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        tile = tl.dot(a, b, tile, input_precision=PRECISION)
    flat = tl.reshape(tile, (ROWS * COLUMNS,))
    stop = tl.load(cuts + tl.program_id(0) + 1)
    for first in range(tl.load(cuts + tl.program_id(0)), stop, ENTRIES):
        e = first + tl.arange(0, ENTRIES)
        position = tl.load(index + e, mask=e < stop, other=0).to(tl.int64)
        row = position // columns
        column = position - row * columns - column0
        mine = (e < stop) & (column >= 0) & (column < COLUMNS)
        place = tl.where(mine, (row - row0) * COLUMNS + column, 0).to(tl.int32)
        tl.store(out + e, tl.gather(flat, place, 0), mask=mine)


def entries(left: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """dW[index] for sorted flat positions [k] -> float32 [k]. left [T, o] and right [T, i] of one of KINDS, with any strides.

    float32 factors are multiplied as torch's own products are: in full, unless its setting allows less.
    """
    rows, columns = left.shape[1], right.shape[1]
    out = torch.empty(index.numel(), dtype=torch.float32, device=left.device)
    edges = torch.arange(0, rows + ROWS, ROWS, device=index.device).clamp_(max=rows) * columns
    cuts = torch.searchsorted(index, edges.to(index.dtype))
    full = left.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    with torch.cuda.device_of(left):
        _kernel[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
            left,
            right,
            index,
            cuts,
            out,
            left.shape[0],
            rows,
            columns,
            *left.stride(),
            *right.stride(),
            PRECISION="ieee" if full else "tf32",
            WIDEN=left.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,  # which would multiply their bits
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            TOKENS=TOKENS,
            ENTRIES=ENTRIES,
        )
    return out
