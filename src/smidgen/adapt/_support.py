"""Which entries of a matrix a sparse scheme tunes: at random, by score, by magnitude, in lines, by products of scores.

Positions are flat, row-major, int64 and sorted. Whatever is picked is a pure function of its arguments: among equal scores
the smaller positions win, on every device and with any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smidgen import noise
from smidgen.noise import philox

_MARGIN = 64  # draws beyond the number wanted, so that few repeats need no second round; chosen


def random_support(address: noise.Address, size: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """A uniformly random subset of 0 .. size - 1 with `count` members, a pure function of the address, sorted [count].

    Drawn with repeats that are left out, or as the complement of such a subset: O(count) words and memory, O(size) only
    where more than half is taken.
    """
    assert 0 < count <= size
    if 2 * count > size:
        keep = torch.ones(size, dtype=torch.bool)
        if count < size:
            keep[random_support(address, size, size - count)] = False
        return keep.nonzero()[:, 0].to(device)
    drawn = 0
    first = torch.empty(0, dtype=torch.int64)  # distinct positions in the order in which they were drawn
    while len(first) < count:
        blocks = torch.arange(drawn, drawn + (count - len(first) + _MARGIN + 1) // 2)
        drawn += len(blocks)
        w = philox.words(address, blocks).view(-1, 2)
        positions = torch.cat([first, (w[:, 0] << 31 | w[:, 1] >> 1) % size])  # off uniform by less than size / 2^63
        order = torch.argsort(positions, stable=True)
        ordered = positions[order]
        new = torch.ones_like(ordered, dtype=torch.bool)
        new[1:] = ordered[1:] != ordered[:-1]
        first = positions[order[new].sort().values]
    return first[:count].sort().values.to(device)


def top(score: Tensor, count: int) -> Tensor:
    """Places of the `count` largest of score [n], sorted; of equal ones those that come first. O(n) memory."""
    if count >= score.numel():
        return torch.arange(score.numel(), device=score.device)
    if count <= 0:
        return torch.empty(0, dtype=torch.int64, device=score.device)
    last = torch.topk(score, count, sorted=True).values[-1]
    above = score > last
    ties = (score == last).nonzero()[:, 0][: count - int(above.sum())]
    return torch.cat([above.nonzero()[:, 0], ties]).sort().values


def by_magnitude(weight: Tensor, count: int, *, largest: bool) -> Tensor:
    """The `count` entries of the largest, or smallest, |w|; of equal ones those that come first. O(size) memory."""
    size = weight.detach().reshape(-1).float().abs()
    return top(size if largest else -size, count)


def below(weight: Tensor, threshold: float) -> Tensor:
    """The entries with |w| < threshold."""
    return (weight.detach().reshape(-1).abs() < threshold).nonzero()[:, 0]


def in_lines(shape: tuple[int, int], count: int, device: torch.device | str = "cpu") -> Tensor:
    """The main diagonal, then whole rows spread evenly over the matrix, the last of them in part."""
    rows, columns = shape
    diagonal = torch.arange(min(rows, columns), device=device)[:count] * (columns + 1)
    missing = count - len(diagonal)
    lines = min(rows, -(-missing // (columns - 1))) if columns > 1 else rows
    chosen = torch.arange(lines, device=device) * rows // max(1, lines)
    inside = (chosen[:, None] * columns + torch.arange(columns, device=device)).flatten()
    return torch.cat([diagonal, inside[~members(inside, diagonal)][:missing]]).sort().values


def members(some: Tensor, all_of: Tensor) -> Tensor:
    """Which of `some` are in the sorted `all_of`; bool, in the shape of `some`."""
    if all_of.numel() == 0:
        return torch.zeros_like(some, dtype=torch.bool)
    place = torch.searchsorted(all_of, some).clamp_(max=all_of.numel() - 1)
    return all_of[place] == some


def largest_products(rows: Tensor, columns: Tensor, count: int, taken: Tensor) -> Tensor:
    """Positions of the `count` largest rows[r] * columns[c] > 0 outside the sorted `taken`, sorted; fewer where there are
    no more. rows [o], columns [i], not negative.

    The threshold is found by bisection over the float64 numbers, in which products of two float32 numbers are exact; how
    many entries of a row reach it, by bisection over the sorted columns. Memory O(o + i + count + taken), never o x i.
    """
    r = rows.double()
    ordered, order = columns.double().sort(descending=True, stable=True)
    width = columns.numel()
    used = (r[taken // width] * columns.double()[taken % width]).sort().values

    def reached(threshold: float, strict: bool) -> Tensor:
        """Entries of each row that are above the threshold, or at it where not strict [o]."""
        low, high = torch.zeros_like(rows, dtype=torch.int64), torch.full_like(rows, width, dtype=torch.int64)
        while bool((low < high).any()):
            middle = (low + high) // 2
            value = r * ordered[middle.clamp(max=width - 1)]
            inside = (value > threshold if strict else value >= threshold) & (low < high)
            low, high = torch.where(inside, middle + 1, low), torch.where(inside, high, torch.minimum(high, middle))
        return low

    def free(threshold: float) -> int:
        """Entries outside `taken` at the threshold or above it."""
        return int(reached(threshold, False).sum()) - int((used >= threshold).sum())

    low, high = 1, _bits(float(r.max() * ordered[0])) if r.numel() else 0  # of positive numbers, whose order their bits keep
    if count <= 0 or high < low:
        return torch.empty(0, dtype=torch.int64, device=rows.device)
    while low < high:  # the largest threshold that enough entries reach
        middle = (low + high + 1) // 2
        low, high = (middle, high) if free(_number(middle)) >= count else (low, middle - 1)
    threshold = _number(low)
    above, at = reached(threshold, True), reached(threshold, False)
    strict = _emit(above * 0, above, order, width)
    strict = strict[~members(strict, taken)]
    missing = count - len(strict)
    wanted = missing + int((used == threshold).sum())  # ties come row by row, in the order of positions
    stop = int(torch.searchsorted((at - above).cumsum(0), wanted)) + 1
    ties = _emit(above[:stop], at[:stop], order, width)[:wanted] if wanted else strict[:0]
    return torch.cat([strict, ties[~members(ties, taken)][:missing]]).sort().values


def _emit(first: Tensor, stop: Tensor, order: Tensor, width: int) -> Tensor:
    """Positions of the entries first[r] .. stop[r] - 1 of each row, counted in the order of columns; sorted."""
    lengths = stop - first
    row = torch.repeat_interleave(torch.arange(len(first), device=first.device), lengths)
    inside = torch.arange(len(row), device=first.device) - (lengths.cumsum(0) - lengths)[row]
    return (row * width + order[first[row] + inside]).sort().values


def _bits(number: float) -> int:
    return int(torch.tensor(number, dtype=torch.float64).view(torch.int64))


def _number(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))
