"""The numba kernels of single entries of a matrix product: one dot product each, compiled at first use and kept on disk.

`alone` is for one thread or little work: entering threads that another program keeps off the cores costs 8 ms, as much as a
million entries.
"""

from __future__ import annotations

from typing import Any

from numba import float32, njit, prange


@njit(fastmath=True, nogil=True, cache=True)
def _dot(left: Any, right: Any, index: Any, out: Any, e: int) -> None:
    row = index[e] // right.shape[0]
    a, b = left[row], right[index[e] - row * right.shape[0]]
    total = float32(0.0)
    for t in range(right.shape[1]):
        total += a[t] * b[t]
    out[e] += total


@njit(fastmath=True, nogil=True, cache=True)
def alone(left: Any, right: Any, index: Any, out: Any) -> None:
    """out[e] += <left[r], right[c]> for index[e] = r * len(right) + c; left [o, T], right [i, T], float32."""
    for e in range(index.shape[0]):
        _dot(left, right, index, out, e)


@njit(parallel=True, fastmath=True, nogil=True, cache=True)
def together(left: Any, right: Any, index: Any, out: Any) -> None:
    """The same on numba's threads."""
    for e in prange(index.shape[0]):
        _dot(left, right, index, out, e)
