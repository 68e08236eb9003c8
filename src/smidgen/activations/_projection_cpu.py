"""The numba kernel of projections: one pass over the tokens as they lie in memory, compiled at first use, kept on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import config, njit, prange, set_num_threads
from torch import Tensor

KINDS = (torch.float32, torch.float64, torch.bfloat16)


@njit(parallel=True, fastmath=True, nogil=True, cache=True)
def _wide(x: Any, v: Any, z: Any) -> None:
    """z[t, g] <- x[t, gM : gM + M] . v[g or 0]; x [T, D], v [1 or G, M], z [T, G], all of one type. The last may be cut."""
    width, size, groups = x.shape[1], v.shape[1], z.shape[1]
    for t in prange(x.shape[0]):
        token = x[t]
        for g in range(groups):
            first, row = g * size, v[g if v.shape[0] > 1 else 0]
            total = token.dtype.type(0)
            for m in range(min(size, width - first)):
                total += token[first + m] * row[m]
            z[t, g] = total


@njit(parallel=True, fastmath=True, nogil=True, cache=True)
def _patterns(x: Any, v: Any, z: Any) -> None:
    """The same of bfloat16 patterns x (uint16), a token at a time widened to float32."""
    width, size, groups = x.shape[1], v.shape[1], z.shape[1]
    for t in prange(x.shape[0]):
        bits = np.empty(width, np.uint32)
        for d in range(width):
            bits[d] = np.uint32(x[t, d]) << np.uint32(16)
        wide = bits.view(np.float32)
        for g in range(groups):
            first, row, total = g * size, g if v.shape[0] > 1 else 0, np.float32(0)
            for m in range(min(size, width - first)):
                total += wide[first + m] * v[row, m]
            z[t, g] = total


def project(tokens: Tensor, v: Tensor, groups: int) -> Tensor:
    """z [T, G] in tokens' dtype, sums in float32 (float64 of float64). tokens [T, D] of one of KINDS, contiguous."""
    kind = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    z = torch.empty(len(tokens), groups, dtype=kind)
    set_num_threads(min(torch.get_num_threads(), config.NUMBA_NUM_THREADS))
    rows = v.to(kind).contiguous().numpy()
    if tokens.dtype == torch.bfloat16:
        _patterns(tokens.view(torch.uint16).numpy(), rows, z.numpy())
    else:
        _wide(tokens.numpy(), rows, z.numpy())
    return z.to(tokens.dtype)
