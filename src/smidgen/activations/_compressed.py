"""Gradients in compressed form, dW = U (x) v, held beside `.grad` on the weight that they belong to.

A weight W [O, D] whose inputs are split into G sub-tokens of size M has, on fixed unit vectors v_g [M], the gradient

    dW[o, gM + m] = U[o, g] v_g[m],   U [O, G]

which is never built: its norm is that of U, and an optimizer may work on U itself. Where the last sub-token is ragged
(G M > D), its vector is zero in the padding and of length 1 all the same, so everything here holds exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_PLACE = "compressed"  # the attribute of a weight that holds its compressed gradient


@dataclass
class Compressed:
    """U (x) v of one weight; gradients of further micro-batches are added to U."""

    u: Tensor  # [O, G] float32, or float64 for a float64 model
    v: Tensor  # [1, M] where all groups share a vector, or [G, M]; rows of length 1
    width: int  # D

    def norm(self) -> Tensor:
        """The Frobenius norm of dW, which is that of U."""
        return torch.linalg.vector_norm(self.u)

    def dense(self) -> Tensor:
        """dW itself, [O, D]: for optimizers that need it, one weight at a time."""
        return (self.u[:, :, None] * self.v).flatten(1)[:, : self.width].contiguous()


def add_outer_(weight: Tensor, a: Tensor, rows: Tensor, scale: float) -> None:
    """weight [O, D] += scale * (a (x) rows), without a temporary of its size. a [O, G], rows [1 or G, M]."""
    groups, size = a.shape[1], rows.shape[1]
    whole = weight.shape[1] // size
    body = weight[:, : whole * size].unflatten(1, (whole, size))
    body.addcmul_(a[:, :whole, None], rows[:whole], value=scale)
    if whole < groups:  # rows are then one a group
        tail = weight[:, whole * size :]
        tail.addcmul_(a[:, whole:], rows[whole:, : tail.shape[1]], value=scale)


def accumulate(weight: Tensor, u: Tensor, v: Tensor) -> None:
    """Add U to what a weight holds."""
    found = held(weight)
    if found is None:
        setattr(weight, _PLACE, Compressed(u, v, weight.shape[1]))
        return
    assert found.v is v, "the vectors of a layer are fixed"
    found.u += u


def held(weight: Tensor) -> Compressed | None:
    """The compressed gradient of a weight, or None."""
    return getattr(weight, _PLACE, None)


def drop(weights: Iterable[Tensor]) -> None:
    """Let compressed gradients go."""
    for weight in weights:
        if held(weight) is not None:
            delattr(weight, _PLACE)
