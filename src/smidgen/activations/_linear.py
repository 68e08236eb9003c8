"""A linear layer that saves the projections of its input in place of the input.

    forward:  Y = X W^T + b            exact; saved: Z_p [T, G] and W by reference
    backward: dX = g W                 exact, the same product as autograd's
              db = sum g               exact
              U  = g^T Z_p  [O, G]     M times fewer multiplications than g^T X; dW = U (x) v is never built

U goes beside `.grad` on the weight (see `_compressed`); `.grad` stays None. So `torch.autograd.grad` with respect to W has
no answer, and only the optimizers of this package know the gradient. Large float32 products on a CPU may go through oneDNN
(`smidgen.linear`), as evaluations do: the same sums in another order than torch's. All others have autograd's bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from smidgen.activations import _compressed
from smidgen.linear import linear

_BLOCK = 1 << 20  # elements of float32 workspace where 16-bit gradients are converted (4 MB); chosen
_WIDE = 1 << 24  # the same on CUDA, where every block costs launches; chosen


class ProjectedLinear(Function):
    """x [..., D], weight [O, D], bias [O] or None, z [T, G], v [1 or G, M] -> [..., O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight)
        ctx.weight, ctx.v, ctx.kind = weight, v, x.dtype
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, weight = ctx.saved_tensors
        flat = g.flatten(0, -2)
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = linear(flat, weight.to(flat.dtype).t(), None).view(*g.shape[:-1], weight.shape[1]).to(ctx.kind)
        if ctx.needs_input_grad[1]:
            _compressed.accumulate(ctx.weight, product(flat, z), ctx.v)
        if ctx.needs_input_grad[2]:
            db = flat.sum(0)
        return dx, None, db, None, None


def product(g: Tensor, z: Tensor) -> Tensor:
    """g^T Z_p [O, G]; of 16-bit values in float32, since a sum over tokens easily leaves float16's range."""
    if g.element_size() >= 4 and g.dtype == z.dtype:
        return g.t() @ z
    step, z32 = max(1, (_WIDE if g.device.type == "cuda" else _BLOCK) // max(1, len(g))), z.float()
    return torch.cat([g[:, i : i + step].float().t() @ z32 for i in range(0, g.shape[1], step)])
