"""Cheap operations whose intermediate values are computed again in the backward instead of being saved.

- `again`: any function of tensors without randomness: only its inputs are saved, and the backward differentiates the same
  operations; where an input is used several times, its gradient is the same sum in another order. Used for RMS norms
  (written in torch operators, which save several tensors of the input's size) and for `act(gate) * up` of a gated MLP
  (saves four, two of them its inputs), or for the whole of act(gate(x)) * up(x), whose two products are then made again,
  and for activations written in several torch operators (GELU by tanh saves eight).
- `relu`: saves one byte an element instead of the output, which only a compressed layer reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _Again(Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.count = run, count
        ctx.save_for_backward(*tensors)
        return run(*tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(tensors[: ctx.count], needs, strict=False)]
        sources = [*inputs, *tensors[ctx.count :]]
        with torch.enable_grad():
            y = ctx.run(*inputs)
        wanted = [t for t, need in zip(sources, needs, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, g, allow_unused=True))  # compressed weights have none of their own
        return None, None, *(next(found) if need else None for need in needs)


def again(run: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()) -> Tensor:
    """run(*inputs), which may read `parameters` by itself; saves the inputs (and parameters by reference) only."""
    return _Again.apply(run, len(inputs), *inputs, *parameters)  # type: ignore[no-any-return]


class _ReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return x.relu()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (positive,) = ctx.saved_tensors
        return torch.where(positive, g, 0.0)


def relu(x: Tensor) -> Tensor:
    """max(x, 0); saves where it is positive."""
    return _ReLU.apply(x)  # type: ignore[no-any-return]


def activation_again(module: nn.Module, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
    """forward(module, x) of an activation; saves x."""
    return again(functools.partial(forward, module), (x,))


def saves_copies(module: nn.Module) -> bool:
    """Whether a module is one of transformers' activations that saves more than its input, as a trial tells."""
    if type(module).__module__ != "transformers.activations" or next(module.parameters(), None) is not None:
        return False
    held: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        held.add(tensor.untyped_storage().data_ptr())
        return tensor

    x = torch.linspace(-1, 1, 8).requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x).sum()
    return bool(held - {x.untyped_storage().data_ptr()})


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is an RMS norm, by the names that torch and Hugging Face models give them."""
    return type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))


def is_gated(module: nn.Module) -> bool:
    """Whether a module computes down(act(gate(x)) * up(x)): it has the parts, and a trial gives the same bits."""
    parts = module._modules
    if any(not isinstance(parts.get(name), nn.Module) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    width, like = getattr(parts["gate_proj"], "in_features", None), next(module.parameters())
    if width is None or not like.is_floating_point():
        return False
    trial = torch.linspace(-1, 1, 2 * width, device=like.device).view(1, 2, width).to(like.dtype)
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            return torch.equal(module(trial), gated(module, trial))
    finally:
        for part, mode in modes:
            part.training = mode


def gated(module: Any, x: Tensor) -> Tensor:
    """down(act(gate(x)) * up(x)), as the module computes it."""
    return module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))  # type: ignore[no-any-return]


def gated_again(module: Any, x: Tensor) -> Tensor:
    """The same; of the product only gate(x) and up(x) are saved."""

    def product(gate: Tensor, up: Tensor) -> Tensor:
        return module.act_fn(gate) * up  # type: ignore[no-any-return]

    return module.down_proj(again(product, (module.gate_proj(x), module.up_proj(x))))  # type: ignore[no-any-return]


def norm_again(module: nn.Module, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
    """forward(module, x) of an RMS norm; saves x. The output tells where it comes from, see `gated_anew`."""
    run = functools.partial(forward, module)
    y = again(run, (x,), list(module.parameters(recurse=False)))
    y.origin = (run, x)  # type: ignore[attr-defined]
    return y


def gated_anew(module: Any, x: Tensor) -> Tensor:
    """The gated MLP; gate(x) and up(x) are multiplied again in the backward, from x or, where x is the output of a norm
    that saves its own input, from that: then nothing more is saved."""
    norm, source = getattr(x, "origin", (_itself, x))

    def product(source: Tensor) -> Tensor:
        x = norm(source)
        return module.act_fn(module.gate_proj(x)) * module.up_proj(x)  # type: ignore[no-any-return]

    read = [*norm.args[0].parameters(recurse=False)] if isinstance(norm, functools.partial) else []
    weights = [*read, *module.gate_proj.parameters(), *module.up_proj.parameters()]
    return module.down_proj(again(product, (source,), [w for w in weights if w.requires_grad]))  # type: ignore[no-any-return]


def _itself(x: Tensor) -> Tensor:
    return x
