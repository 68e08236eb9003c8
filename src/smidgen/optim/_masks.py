"""Masks made from weights: which entries of theta_0 a sparse method moves, as packed bits (1 bit a weight).

They are made once, from the weights of the first step, and kept: |w| moves across any threshold. Equal scores are told
apart by position, the earlier entry first, so the number of kept entries is exact whatever the ties (all zeros of a bias,
all ones of a norm).

Cost: `by_magnitude` three passes over the weights in blocks of 4 MB, no copy of them; `by_wanda` one pass with a selection
in each row, and one byte for each weight of one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from smidgen import noise
from smidgen.params import Entry

_BLOCK = 1 << 20  # entries looked at together; a multiple of 8
_LOW = 15  # bits of the second of two digits: 16 + 15 bits are |w| in float32 without its sign


def kept(count: int, share: float) -> int:
    """How many of `count` entries a mask of exact size keeps."""
    return round(count * share)


def by_magnitude(group: Sequence[Entry], share: float, *, largest: bool) -> dict[str, Tensor]:
    """Masks of the `share` of all entries of the group with the smallest (or largest) |w|, by name."""
    last, ties = _select(group, kept(sum(e.tensor.numel() for e in group), share), largest)
    masks = {}
    for entry in group:
        parts = []
        for keys in _keys(entry, largest):
            equal = keys == last
            found = int(equal.count_nonzero())
            if found > ties:
                equal &= equal.cumsum(0) <= ties
            ties -= min(found, ties)
            parts.append(noise.pack((keys < last) | equal))
        masks[entry.name] = torch.cat(parts)
    return masks


def shares_below(group: Sequence[Entry], share: float) -> dict[str, float]:
    """Share of each tensor's entries with |w| at most the `share`-quantile of all |w| of the group."""
    last, _ = _select(group, kept(sum(e.tensor.numel() for e in group), share), False)
    return {e.name: sum(int((k <= last).count_nonzero()) for k in _keys(e, False)) / e.tensor.numel() for e in group}


def by_wanda(entry: Entry, share: float, squares: Tensor) -> Tensor:
    """Mask of the `share` of entries with the largest |W_ij| ||x_j||_2 in each output row of a linear weight.

    `squares`: ||x_j||^2, [1, in] for W [out, in] and [in, 1] for W [in, out]. Source: Wanda (Sun et al., 2023, arXiv
    2306.11695), whose score and comparison group these are.
    """
    transposed = squares.shape == (entry.tensor.shape[0], 1)
    W = entry.storage.T if transposed else entry.storage
    norms = squares.flatten().sqrt().to(W.device, torch.float32)
    count = kept(W.shape[1], share)
    mask = torch.zeros(W.shape, dtype=torch.bool, device=W.device)
    for first in range(0, W.shape[0] if count else 0, step := max(1, _BLOCK // W.shape[1])):
        rows = slice(first, first + step)
        score = W[rows].float().abs() * norms
        last = score.kthvalue(W.shape[1] - count + 1, dim=1, keepdim=True).values
        above, equal = score > last, score == last
        mask[rows] = above | equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True))
    return noise.pack(mask.T if transposed else mask)


def _keys(entry: Entry, largest: bool) -> Iterator[Tensor]:
    """|w| as integers of the same order (reversed for the largest), int32 in [0, 2^31), in blocks."""
    flat = entry.storage.reshape(-1)
    for first in range(0, flat.numel(), _BLOCK):
        keys = flat[first : first + _BLOCK].float().abs().view(torch.int32)
        yield 0x7FFFFFFF - keys if largest else keys


def _select(group: Sequence[Entry], count: int, largest: bool) -> tuple[int, int]:
    """(the key of the count-th smallest entry, how many entries with this key are among the `count`): a radix selection."""
    if count == 0:
        return -1, 0
    high, low = (torch.zeros(1 << bits, dtype=torch.int64) for bits in (31 - _LOW, _LOW))
    for entry in group:
        for keys in _keys(entry, largest):
            high += torch.bincount(keys >> _LOW, minlength=len(high)).cpu()
    digit, rest = _find(high, count)
    for entry in group:
        for keys in _keys(entry, largest):
            inside = keys[keys >> _LOW == digit] & (1 << _LOW) - 1
            low += torch.bincount(inside, minlength=len(low)).cpu()
    last, ties = _find(low, rest)
    return digit << _LOW | last, ties


def _find(histogram: Tensor, count: int) -> tuple[int, int]:
    """(the bin that holds the count-th entry, its rank there)."""
    total = histogram.cumsum(0)
    at = int(torch.searchsorted(total, count))
    return at, count - int(total[at] - histogram[at])
