"""What full fine-tuning with compressed Adam adds to a layer, as a product of its own: A s(x), with A [O, G].

Such training moves a weight W [O, D] along A (x) sign(v) alone (see `optim.velora_adamw`), so its layer computes

    y = W x + A s(x),   s(x)_g = sum_m sign(v_m) x_{gM + m}

    backward: dx = W^T g + (A^T g) (x) sign(v)  exact;  dA = g^T z = U with z_g = sum_m v_m x_{gM + m}

dA is not the derivative by A but the gradient that compressed Adam feeds on: Adam's step along it is the same. Saved:
z [T, G]. With v in the place of sign(v) it is an ordinary adapter, its gradients are exact, and SGD is what it equals.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from smidgen.activations._linear import product


class SubTokenProduct(Function):
    """x [..., D], A [O, G], s [T, G], z [T, G], rows [1 or G, M] (sign(v) or v) -> A s [..., O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, s: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(z, A)
        ctx.rows, ctx.shape = rows, x.shape
        return multiplied(s, A).view(*x.shape[:-1], len(A))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, A = ctx.saved_tensors
        flat, dx, dA = g.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            parts = (flat.to(A.dtype) @ A)[:, :, None] * ctx.rows.to(A.dtype)
            dx = parts.flatten(1)[:, : ctx.shape[-1]].reshape(ctx.shape).to(g.dtype)
        if ctx.needs_input_grad[1]:
            dA = product(flat, z).to(A.dtype)
        return dx, dA, None, None, None


def multiplied(s: Tensor, A: Tensor) -> Tensor:
    """A s of each token [T, O], in A's dtype, rounded to s's."""
    return (s.to(A.dtype) @ A.t()).to(s.dtype)
