"""How far a measure may lie off: the interval that the rows of a split leave to a share."""

from __future__ import annotations

import math

SHARES = ("accuracy", "macro_f1", "f1", "exact_match")  # measures that are means of values in [0, 1]
_Z = 1.959964  # of a 95 % interval


def interval(metric: str, value: float, rows: int | None) -> list[float] | None:
    """95 % interval of a share over so many rows (Wilson's score interval; wider than needed for a mean F1); None for a loss,
    whose spread one run does not tell.

    >>> [round(x, 3) for x in interval("accuracy", 0.5, 100)]
    [0.404, 0.596]
    """
    if metric not in SHARES or not rows:
        return None
    z = _Z * _Z / rows
    middle, half = (value + z / 2) / (1 + z), _Z / (1 + z) * math.sqrt(value * (1 - value) / rows + z / (4 * rows))
    return [max(0.0, min(value, middle - half)), min(1.0, max(value, middle + half))]
