"""Cheap operations whose intermediate values are computed again in the backward instead of being saved.

- `again`: any function of tensors without randomness: only its inputs are saved, and the backward differentiates the same
  operations; where an input is used several times, its gradient is the same sum in another order. Used for RMS norms
  (written in torch operators, which save several tensors of the input's size) and for `act(gate) * up` of a gated MLP
  (saves four, two of them its inputs), or for the whole of act(gate(x)) * up(x), whose two products are then made again, some
  tokens at a time, and for activations written in several torch operators (GELU by tanh saves eight).
- `relu`: saves one byte an element instead of the output, which only a compressed layer reads.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_BLOCK = 1 << 20  # elements of a block of gate(x) in the backward (4 MB in float32): some seven such live at once; chosen
_WIDE = 1 << 24  # the same on CUDA, where every block costs launches; chosen


class _Again(Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], count: int, rows: int | None, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.count, ctx.rows = run, count, rows
        ctx.save_for_backward(*tensors)
        return run(*tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        inputs, parameters = tensors[: ctx.count], tensors[ctx.count :]
        if ctx.rows is None:
            return None, None, None, *_gradients(ctx.run, inputs, parameters, g, needs)
        tokens, flat = g.flatten(0, -2), [t.flatten(0, -2) for t in inputs]
        totals: list[Tensor | None] = [torch.empty_like(t) if n else None for t, n in zip(flat, needs, strict=False)]
        totals += [None] * len(parameters)
        for first in range(0, len(tokens), ctx.rows):
            part = slice(first, first + ctx.rows)
            found = _gradients(ctx.run, [t[part] for t in flat], parameters, tokens[part], needs)
            for k, gradient in enumerate(found):
                total = totals[k]
                if gradient is None:
                    continue
                if total is None:
                    totals[k] = gradient
                elif k < ctx.count:
                    total[part] = gradient
                else:
                    total += gradient
        shaped = [t if t is None else t.view_as(x) for t, x in zip(totals, inputs, strict=False)]
        return None, None, None, *shaped, *totals[ctx.count :]


def _gradients(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor], g: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Of run(*inputs) by inputs and parameters, from its output's gradient."""
    fresh = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=False)]
    with torch.enable_grad():
        y = run(*fresh)
    wanted = [t for t, need in zip([*fresh, *parameters], needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, g, allow_unused=True))  # compressed weights have none of their own
    return [next(found) if need else None for need in needs]


def again(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor] = (), rows: int | None = None
) -> Tensor:
    """run(*inputs), which may read `parameters` by itself; saves the inputs (and parameters by reference) only. rows: how many
    tokens the backward works on at a time, where run treats each token [..., D] alone."""
    return _Again.apply(run, len(inputs), rows, *inputs, *parameters)  # type: ignore[no-any-return]


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
    """Whether a module computes down(act(gate(x)) * up(x)): it has the parts, and a trial of its own forward with small linear
    layers in their places gives the same bits."""
    parts = module._modules
    if any(not isinstance(parts.get(name), nn.Module) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    trial = copy.copy(module)
    small = {"gate_proj": _small(4, 6, 1.0), "up_proj": _small(4, 6, -0.5), "down_proj": _small(6, 4, 0.3)}
    trial.__dict__["_modules"] = {**parts, **small}
    x = torch.linspace(-1, 1, 8).view(1, 2, 4)
    try:
        with torch.no_grad():
            return torch.equal(type(module).forward(trial, x), gated(trial, x))
    except (RuntimeError, AttributeError, TypeError, ValueError):  # it needs more than its parts
        return False


def _small(inputs: int, outputs: int, scale: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")  # draws from no generator
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(-scale, 2 * scale, parameter.numel()).view_as(parameter))
    return layer


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


def gated_anew(module: Any, x: Tensor, *, gate: bool = True) -> Tensor:
    """The gated MLP; up(x), and with `gate` gate(x), are multiplied again in the backward, from x or, where x is the output of
    a norm that saves its own input, from that: then nothing more is saved, or gate(x) alone."""
    norm, source = getattr(x, "origin", (_itself, x))

    def product(source: Tensor, *gates: Tensor) -> Tensor:
        x = norm(source)
        return module.act_fn(gates[0] if gates else module.gate_proj(x)) * module.up_proj(x)  # type: ignore[no-any-return]

    kept = () if gate else (module.gate_proj(x),)
    parts = (module.gate_proj, module.up_proj) if gate else (module.up_proj,)
    read = [*norm.args[0].parameters(recurse=False)] if isinstance(norm, functools.partial) else []
    weights = [w for w in (*read, *(w for part in parts for w in part.parameters())) if w.requires_grad]
    rows = max(1, (_WIDE if x.device.type == "cuda" else _BLOCK) // int(module.gate_proj.out_features))
    return module.down_proj(again(product, (source, *kept), weights, rows))  # type: ignore[no-any-return]


def repeatable(part: nn.Module) -> bool:
    """Whether a layer computes the same twice: a linear layer, also quantised, alone or with peft's LoRA without dropout or an
    adapter of sub-tokens."""
    known = (nn.Linear, nn.Identity, nn.ModuleDict, nn.ParameterDict)  # quantised layers are linear layers too
    lora = type(part).__module__.startswith("peft.tuners.lora") and hasattr(part, "base_layer")

    def steady(m: nn.Module) -> bool:
        return isinstance(m, known) or (isinstance(m, nn.Dropout) and m.p == 0) or hasattr(m, "awaits_vectors")

    return (isinstance(part, nn.Linear) or lora) and all(steady(m) for m in part.modules() if m is not part)


def _itself(x: Tensor) -> Tensor:
    return x
