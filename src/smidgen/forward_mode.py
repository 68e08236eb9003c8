"""Forward-mode derivatives: the loss and its slope along a direction z from one evaluation, without a graph.

Every tuned tensor carries z[name] as its tangent, but only for the innermost module forward that reads it (the readers
that probing found): an embedding gets the tangents of the rows it looks up, the head those of a block of the vocabulary.

Cost: one evaluation on pairs (value, tangent), about two to three forwards in time, since y = x W^T becomes y and
dx W^T + x dW^T. Memory: a forward's, with the activations of the layer at work held twice, and the scratch of probing
(the largest group of tensors that one module reads) for the tangents; z is never held as a whole.

torch's convention for padding is kept: the row `padding_idx` of an embedding has no gradient, so no tangent where it is
looked up. 16-bit weights have 16-bit tangents and activations: a slope differs from that of the back-propagated gradient
by at most 2e-2 (bfloat16) and 5e-3 (float16) of |grad|, the usual size of a slope; 6e-7 in float32 (measured over the tiny
models of all families in the tests). Fused attention kernels and grouped products of experts have no forward mode: while a
slope is computed the model uses plain ones, which one line says; the user's choice is put back.

It does not: second derivatives, gradients, models under torch.compile or in inference mode.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from smidgen.addend import refusal
from smidgen.config import ConfigError
from smidgen.directions import Direction, width
from smidgen.params import Entry, ParamView

log = logging.getLogger("smidgen")

_KERNELS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)  # what torch.ops.library.name is
_BLOCK = 1 << 20  # elements of float32 workspace while a 16-bit tangent is made (4 MB); chosen


def fill(direction: Direction, name: str, out: Tensor, *, first: int = 0) -> None:
    """out <- z[name], the rows from `first` on, rounded to out's dtype. `out` is contiguous."""
    matrix = out.view(out.shape[0] if out.ndim else 1, -1)
    step = len(matrix) if out.dtype == torch.float32 else max(1, _BLOCK // width(out))
    for lo in range(0, len(matrix), step):
        part = matrix[lo : lo + step]
        z32 = part.zero_() if out.dtype == torch.float32 else torch.zeros_like(part, dtype=torch.float32)
        direction.accumulate(name, slice(first + lo, first + lo + len(part)), z32, 1.0)
        if z32 is not part:
            part.copy_(z32)


def fill_rows(direction: Direction, name: str, ids: Tensor, out: Tensor) -> None:
    """out[i] <- z[name][ids[i]]; ids int64 [n], out [n, D]. Rows that follow each other are made together."""
    unique, place = torch.unique(ids, return_inverse=True)
    z = torch.empty(len(unique), out.shape[1], dtype=out.dtype, device=out.device)
    wanted, start = unique.tolist(), 0
    for stop in range(1, len(wanted) + 1):
        if stop == len(wanted) or wanted[stop] != wanted[stop - 1] + 1:
            fill(direction, name, z[start:stop], first=wanted[start])
            start = stop
    torch.index_select(z, 0, place, out=out)


class Tangent:
    """A lens that shows theta with the tangent z."""

    def __init__(self, direction: Direction):
        self.direction = direction

    def touches(self, name: str) -> bool:
        return self.direction.support is None or name in self.direction.support

    def block(self, entry: Entry, weight: Tensor, out: Tensor, *, first: int = 0) -> Tensor:
        fill(self.direction, entry.name, out, first=first)
        return forward_ad.make_dual(weight, out)

    def blocks(self, entries: Sequence[Entry], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> list[Tensor]:
        return [self.block(entry, weight, out) for entry, weight, out in zip(entries, weights, outs, strict=True)]

    def rows(self, entry: Entry, ids: Tensor, padding: int | None = None) -> Tensor:
        picked = entry.storage[ids]
        tangent = torch.empty_like(picked)
        fill_rows(self.direction, entry.name, ids, tangent.view(len(ids), -1))
        if padding is not None:
            tangent[ids == padding] = 0.0
        return forward_ad.make_dual(picked, tangent)

    def beside(self, tensors: dict[str, Entry]) -> Callable[..., Tensor]:
        raise refusal(", ".join(e.name for e in tensors.values()))


def slope_in_place(view: ParamView, direction: Direction, closure: Any) -> tuple[float, float]:
    """(loss, <grad, z>) of any function of the tuned tensors, which carry their tangents themselves while it runs.

    A tensor is given its tangent by copying it onto itself, so its bits stay. Memory: one copy of the tuned tensors.
    """
    lens = Tangent(direction)
    with torch.no_grad(), differentiated():
        for entry in view:
            if lens.touches(entry.name):
                out = torch.empty(entry.tensor.shape, dtype=entry.tensor.dtype, device=entry.tensor.device)
                entry.tensor.copy_(lens.block(entry, entry.storage, out))
        loss = closure()
        if not isinstance(loss, Tensor):
            raise ValueError(f"the closure must return its loss as a tensor for this method, not {type(loss).__name__}")
        return loss.item(), slopes(loss)[1].item()


def _real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def slopes(dual: Tensor) -> tuple[Tensor, Tensor]:
    """Value and tangent of a result; a result that no tangent reaches does not depend on z."""
    value, tangent = forward_ad.unpack_dual(dual)
    return value, torch.zeros_like(value) if tangent is None else tangent


@contextlib.contextmanager
def differentiated(model: nn.Module | None = None) -> Iterator[None]:
    """Inside this context tensors carry tangents, and attention and experts run through kernels that know them.

    Raises ConfigError when the model uses an operation without forward mode.
    """
    try:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _plain_kernels(model), _Watched():
            yield
    except NotImplementedError as error:
        found = re.search(r"forward AD with (\S+)", str(error))
        if found is None:
            raise
        raise ConfigError(
            f"{found[1]} has no forward-mode derivative, which this method needs: use a method that asks for losses only, "
            "such as zo_sgd"
        ) from error


def plain_kernels_notice(model: nn.Module) -> str | None:
    """What a slope replaces for its duration in this model, in one line; None when nothing."""
    config = getattr(model, "config", None)
    used = {name: getattr(config, f"_{name}_implementation", None) for name in ("attn", "experts")}
    replaced = [f"{name} {kind!r}" for name, kind in used.items() if kind not in (None, "eager")]
    if not replaced:
        return None
    return f"forward mode: {' and '.join(replaced)} run through plain kernels, slower, since the fused ones have no derivative"


class _Watched(TorchFunctionMode):
    """Two things that torch does not do for tangents: a layer norm of 16-bit numbers in float32 (its derivative holds the
    third power of 1 / std, which overflows float16 from a std of 0.025 down), and an error where a foreign kernel drops a
    tangent in silence."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is F.layer_norm and args[0].dtype in (torch.float16, torch.bfloat16):
            wide = tree_map_only(Tensor, Tensor.float, (args, kwargs))
            return func(*wide[0], **wide[1]).to(args[0].dtype)
        out = func(*args, **kwargs)
        if isinstance(func, _KERNELS) and not str(func).startswith("aten"):
            taken = any(forward_ad.unpack_dual(t).tangent is not None for t in tree_leaves((args, kwargs)) if _real(t))
            if taken and not any(forward_ad.unpack_dual(t).tangent is not None for t in tree_leaves(out) if _real(t)):
                raise NotImplementedError(f"forward AD with {func}")
        return out


@contextlib.contextmanager
def _plain_kernels(model: nn.Module | None) -> Iterator[None]:
    """Attention kernels that are not torch's own, and experts, run eagerly; the choice is put back.

    torch's own attention stays: `sdpa_kernel` makes it choose its plain kernel.
    """
    config = getattr(model, "config", None)
    attention, experts = getattr(config, "_attn_implementation", None), getattr(config, "_experts_implementation", None)
    with contextlib.ExitStack() as undo:
        if attention not in (None, "eager", "sdpa"):
            model.set_attn_implementation("eager")  # type: ignore[union-attr,operator]
            undo.callback(model.set_attn_implementation, attention)  # type: ignore[union-attr,arg-type]
        if experts not in (None, "eager"):
            before = model.get_experts_implementation()  # type: ignore[union-attr,operator]
            model.set_experts_implementation("eager")  # type: ignore[union-attr,operator]
            undo.callback(model.set_experts_implementation, before)  # type: ignore[union-attr,arg-type]
        yield
