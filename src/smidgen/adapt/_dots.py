"""The numba kernel of single entries of a matrix product: one dot product each, compiled at its first use and kept on disk."""

from __future__ import annotations

from typing import Any

from numba import float32, njit, prange


@njit(parallel=True, fastmath=True, nogil=True, cache=True)
def dots(left: Any, right: Any, index: Any, out: Any) -> None:
    """out[e] += <left[r], right[c]> for index[e] = r * len(right) + c; left [o, T], right [i, T], float32."""
    columns, tokens = right.shape
    for e in prange(index.shape[0]):
        row = index[e] // columns
        a, b = left[row], right[index[e] - row * columns]
        total = float32(0.0)
        for t in range(tokens):
            total += a[t] * b[t]
        out[e] += total
