"""The Triton kernel of projections: a program covers a block of tokens and a sub-token; x is read once, nothing is copied.

With TRITON_INTERPRET=1 it runs on CPU tensors, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOKENS = 16  # of a program; chosen
CHUNK = 128  # most elements of a sub-token read at a time; chosen


@triton.jit
def _kernel(
    x,
    v,
    z,
    count,
    width,
    size,
    groups,
    v_rows,
    DOUBLE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    g = tl.program_id(1)
    row = tl.where(v_rows > 1, g, 0)
    total = tl.zeros((TOKENS,), tl.float64 if DOUBLE else tl.float32)
    for start in range(0, size, CHUNK):
        m = start + tl.arange(0, CHUNK)
        d = g * size + m
        inside = (m < size) & (d < width)
        a = tl.load(x + t[:, None] * width + d[None, :], mask=(t < count)[:, None] & inside[None, :], other=0.0)
        b = tl.load(v + row * size + m, mask=inside, other=0.0)
        total += tl.sum(a.to(total.dtype) * b.to(total.dtype)[None, :], axis=1)
    tl.store(z + t * groups + g, total.to(z.dtype.element_ty), mask=t < count)


def project(tokens: Tensor, v: Tensor, groups: int) -> Tensor:
    """z [T, G] in tokens' dtype, sums in float32 (float64 of float64). tokens [T, D] of one of KINDS, contiguous."""
    z = tokens.new_empty(len(tokens), groups)
    if z.numel():
        size = v.shape[1]
        chunk = min(CHUNK, triton.next_power_of_2(size))
        with torch.cuda.device_of(tokens):
            _kernel[(triton.cdiv(len(tokens), TOKENS), groups)](
                tokens,
                v.contiguous(),
                z,
                len(tokens),
                tokens.shape[1],
                size,
                groups,
                len(v),
                DOUBLE=tokens.dtype == torch.float64,
                TOKENS=TOKENS,
                CHUNK=chunk,
            )
    return z
