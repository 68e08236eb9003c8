"""Some entries of a weight gradient dW = left^T right, without dW.

left [T, o] and right [T, i] are the two factors of a linear layer's weight gradient over T tokens: for y = x W^T they are
(dL/dy, x), for transformers' Conv1D, y = x W, they are (x, dL/dy). Three ways, equal but for the order of sums:

- `gathered`: row blocks of dW by matrix products, of which the wanted entries are kept. As many multiplications as dW;
  memory one block (4 MB in float32). Any device and dtype.
- `sampled`: one dot product an entry, T multiplications each; a numba kernel, CPU only, float32 arithmetic on transposed
  float32 copies of both factors, made for some tokens at a time (1 KB a row and a column).
- `entries` of `_sparse_gradient_cuda`: tiles of dW in registers, of which the wanted entries are written. Triton, CUDA only,
  float32 sums; not float64.

`products` takes the faster one, by shapes and dtypes alone, so that a run always takes the same.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from smidgen.linear import linear

BLOCK = 1 << 20  # entries of a block of rows; chosen: 4 MB in float32

TOKENS = 256  # of which `sampled` makes copies at a time: rows of them stay in a core's cache; measured

_ALONE = 1 << 20  # multiplications up to which one thread makes them, some 100 us; chosen

# Entries a thousand up to which dot products win on a CPU, as benchmarks/sparse_gradient.py measures: at 100 they cost 0.3 to
# 0.95 of the dense product for 128 to 4096 tokens (one Zen 5 core), at 20 0.1 to 0.3. Part of the code, so that runs agree.
_SAMPLED_PER_MILLE = 100


def row_blocks(left: Tensor, right: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(flat position of the first entry, entries) of dW in blocks of whole rows, flat."""
    rows, columns = left.shape[1], right.shape[1]
    step = max(1, BLOCK // columns)
    for first in range(0, rows, step):
        yield first * columns, linear(left[:, first : first + step].t(), right.t(), None).view(-1)


def gathered(left: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """dW[index] for sorted flat positions [k] -> float32 [k] (float64 of float64), by blocks."""
    out = torch.empty(index.numel(), dtype=torch.promote_types(left.dtype, torch.float32), device=left.device)
    for (start, block), span in zip(row_blocks(left, right), spans(left, right, index), strict=True):
        out[span] = block[index[span] - start].to(out.dtype)
    return out


def spans(left: Tensor, right: Tensor, index: Tensor) -> list[slice]:
    """Which part of the sorted `index` lies in each of `row_blocks`."""
    rows, columns = left.shape[1], right.shape[1]
    step = max(1, BLOCK // columns)
    edges = torch.tensor([min(r, rows) * columns for r in range(0, rows + step, step)], device=index.device, dtype=index.dtype)
    cuts = torch.searchsorted(index, edges).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def sampled(left: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """dW[index] for flat positions [k] -> float32 [k], entry by entry. CPU tensors."""
    import numba

    from smidgen.adapt import _dots

    out = torch.zeros(index.numel(), dtype=torch.float32)
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    dots = _dots.alone if threads == 1 or index.numel() * min(TOKENS, len(left)) < _ALONE else _dots.together
    numba.set_num_threads(threads)
    for first in range(0, left.shape[0], TOKENS):
        a, b = (m[first : first + TOKENS].t().float().contiguous() for m in (left, right))
        dots(a.numpy(), b.numpy(), index.numpy(), out.numpy())
    return out


@functools.cache
def _numba() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def products(left: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """dW[index] for sorted flat positions [k] -> float32 [k]; the faster way."""
    if left.device.type == "cuda" and left.dtype != torch.float64 and _triton():
        from smidgen.adapt._sparse_gradient_cuda import entries

        return entries(left, right, index)
    few = index.numel() * 1000 <= _SAMPLED_PER_MILLE * left.shape[1] * right.shape[1]
    if few and left.device.type == "cpu" and left.dtype != torch.float64 and _numba():
        return sampled(left, right, index)
    return gathered(left, right, index)
