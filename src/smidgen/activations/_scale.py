"""A scale and a shift of features, y = gamma x + beta, that may save projections of its input in place of the input.

    backward: dx = g gamma  exact;  dbeta = sum g  exact;  dgamma[gM + m] = v[m] sum_t g[t, gM + m] z[t, g]

which is the gradient for the input z (x) v. dgamma has D numbers and is an ordinary `.grad`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Scale(nn.Module):
    """gamma x + beta in x's dtype; gamma, beta [D] float32, at 1 and 0 at first. Without `shift` there is no beta."""

    def __init__(self, width: int, shift: bool):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale.to(x.dtype)
        return y if self.shift is None else y + self.shift.to(x.dtype)


class ProjectedScale(Function):
    """x [..., D], scale [D], shift [D] or None, z [T, G], v [1 or G, M] -> [..., D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor | None, z: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(z, scale)
        ctx.v = v
        y = x * scale.to(x.dtype)
        return y if shift is None else y + shift.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, scale = ctx.saved_tensors
        flat, dx, dscale, dshift = g.flatten(0, -2), None, None, None
        if ctx.needs_input_grad[0]:
            dx = g * scale.to(g.dtype)
        if ctx.needs_input_grad[1]:
            groups, size = z.shape[1], ctx.v.shape[1]
            parts = F.pad(flat, (0, groups * size - len(scale))).unflatten(1, (groups, size))
            sums = torch.einsum("tgm,tg->gm", parts.to(ctx.v.dtype), z.to(ctx.v.dtype))
            dscale = (sums * ctx.v).flatten()[: len(scale)].to(scale.dtype)
        if ctx.needs_input_grad[2]:
            dshift = flat.sum(0, dtype=torch.promote_types(flat.dtype, torch.float32)).to(scale.dtype)
        return dx, dscale, dshift, None, None
