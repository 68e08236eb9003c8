"""Layers with sparse deltas in their weight that save projections of their inputs: the deltas' gradient is read off U (x) v.

dW = U (x) v is the product of two factors of G rows, U^T [G, O] and the vectors in their places, S [G, D]. What gathers some
entries of g^T X from (g, X), and collects candidates for growth, does the same from (U^T, S): with G rows in place of one a
token, and no tensor of the size of the weight, which is built nowhere.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from smidgen.activations._linear import product
from smidgen.linear import linear


@runtime_checkable
class Site(Protocol):
    """A matrix with deltas, as layers of sparse schemes hold it under `site`."""

    delta: nn.Parameter
    quantised: bool

    def swap_in(self) -> None:
        """Bring the weight up to date with the deltas."""

    def gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """Entries of left^T right at the deltas' positions; left [T, O], right [T, D]."""


def site_of(module: nn.Module) -> Site | None:
    """The deltas of a linear layer whose weight holds them; None for any other module."""
    site = getattr(module, "site", None)
    plain = isinstance(module, nn.Linear) and isinstance(site, Site) and not site.quantised
    return site if plain else None  # type: ignore[return-value]


class ProjectedDeltas(Function):
    """x [..., D], delta [k], weight [O, D] which holds the deltas, bias [O] or None, z [T, G], v, site -> [..., O]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, v: Tensor, site: Site
    ) -> Tensor:
        ctx.save_for_backward(z, weight)
        ctx.v, ctx.site, ctx.kind = v, site, x.dtype
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, weight = ctx.saved_tensors
        flat, dx, delta, bias = g.flatten(0, -2), None, None, None
        if ctx.needs_input_grad[0]:
            dx = linear(flat, weight.to(flat.dtype).t(), None).view(*g.shape[:-1], weight.shape[1]).to(ctx.kind)
        if ctx.needs_input_grad[1]:
            u = product(flat, z)
            delta = ctx.site.gradient(u.t(), placed(ctx.v, u.shape[1], weight.shape[1]).to(u.dtype))
        if ctx.needs_input_grad[3]:
            bias = flat.sum(0)
        return dx, delta, None, bias, None, None, None


def placed(v: Tensor, groups: int, width: int) -> Tensor:
    """S [G, D]: vectors [1 or G, M] in the places of their sub-tokens, zeros elsewhere."""
    return torch.block_diag(*v.expand(groups, -1).unbind())[:, :width].contiguous()
