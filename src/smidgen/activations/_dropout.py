"""Dropout whose mask is drawn again in the backward instead of being saved.

    y = x * keep / (1 - p);   dx = g * keep / (1 - p)

torch saves the mask, four bytes an element on a CPU and one elsewhere. Here `keep` is addressed noise, so a seed says it
all. The seed is one number from torch's generator, which dropout draws from in any case: checkpointed forwards and resumed
runs, which put that generator back, see the same masks. They are other masks than torch's own of the same generator state.

Cost: one pass of the noise generator over the tensor in the forward and one in the backward; nothing is saved.
It does not: reach dropout inside attention kernels, or dropout in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from smidgen import noise
from smidgen.activations._projection import without_storage


class _Replayed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return masked(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return masked(g, ctx.p, ctx.seed), None, None


def masked(x: Tensor, p: float, seed: int) -> Tensor:
    """x / (1 - p) where the mask of a seed keeps, zero elsewhere."""
    if p == 1:
        return torch.zeros_like(x)
    y = (x / (1 - p)).contiguous()
    if without_storage(x):
        return y
    at = noise.Address(seed, 0, 0, 0, noise.MASK)
    dropped = noise.Drawn.share(at, p)
    noise.update_(y, (), "rademacher", decay=0.0, rounding="nearest", at=at, keep=dropped)  # what the mask keeps is erased
    return y


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout of x in training, whose mask comes from one number of torch's generator."""
    if p == 0:
        return x
    seed = 0 if without_storage(x) else int(torch.randint(2**63 - 1, ()))
    return _Replayed.apply(x, p, seed)  # type: ignore[no-any-return]


def forward(module: nn.Dropout, x: Tensor) -> Tensor:
    """The forward of a dropout module; without gradient too, since a checkpointed forward is made without and again with."""
    return dropout(x, module.p) if module.training else x


class Replaying(TorchFunctionMode):
    """Inside this context `torch.nn.functional.dropout` saves nothing."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            given = inspect.signature(F.dropout).bind(*args, **kwargs)
            given.apply_defaults()
            x, p, training, inplace = given.args
            if training and not inplace:
                return dropout(x, p)
        return func(*args, **kwargs)


def by_function(module: nn.Module) -> bool:
    """Whether a module's own forward calls `nn.functional.dropout`, as OPT's layers do, going by the names in its code."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and {"functional", "dropout"} <= set(code.co_names)


def replaying(module: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """run(module, ...), the forward of a module for which `by_function` holds. One that checkpoints itself saves no mask
    anyway, and would run again outside of this function."""
    if not module.training or getattr(module, "gradient_checkpointing", False):
        return run(module, *args, **kwargs)
    with Replaying():
        return run(module, *args, **kwargs)
