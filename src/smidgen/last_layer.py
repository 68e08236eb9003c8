"""The last layer where labels are read: its products at other positions are left out, since nothing reads them.

After the attention of the last layer every position is on its own. Where labels stand at few positions of the rows, as label
words do, its linear layers but those of query, key and value multiply these positions alone, and zeros take the place of the
rest: for one label in 50 tokens, 9 of the 12 products of the layer nearly vanish. Attention, norms and activations run in full.

The batched engine uses it where its comparison with the sequential one, which runs in full, holds (`smidgen.batched`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapt._attention import attentions
from smidgen.population import linear_like

SHARE = 4  # at least so many positions for each label; chosen


def narrow(model: nn.Module, layer: nn.Module, tuned: Collection[int]) -> list[nn.Module]:
    """The linear modules of `layer`, the last of the stack, that may leave positions out; none where its attention is unknown.

    tuned: ids of modules that own tuned tensors, whose probes look at every position.
    """
    names = {id(module): name for name, module in model.named_modules()}
    inner = [a for a in attentions(model) if a.path.startswith(names[id(layer)] + ".")]
    if len(inner) != 1:
        return []
    mixed = [path for role, path in inner[0].projections.items() if role != "output"] + [inner[0].fused or ""]
    return [
        module
        for module in layer.modules()
        if linear_like(module)
        and not hasattr(module, "base_layer")  # a wrapper of PEFT's
        and id(module) not in tuned
        and not any(path and (names[id(module)] + ".").startswith(path + ".") for path in mixed)
    ]


@contextlib.contextmanager
def at_labels(modules: Sequence[nn.Module], keep: Tensor | None) -> Iterator[None]:
    """Inside this context the modules multiply the positions in keep [B, T], at most one in `SHARE`; else all."""
    saved: list[tuple[nn.Module, Any]] = []
    try:
        if modules and keep is not None and SHARE * int(keep.sum()) <= keep.numel():
            places = keep.nonzero(as_tuple=True)
            for module in modules:
                saved.append((module, module.__dict__.get("forward")))
                module.forward = functools.partial(_forward, module.forward, keep.shape, places)  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in saved:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward


def _forward(forward: Callable[[Tensor], Tensor], shape: torch.Size, places: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    if x.ndim != 3 or x.shape[0] != shape[0] or x.shape[1] < shape[1]:
        return forward(x)
    rows, at = places[0], places[1] + x.shape[1] - shape[1]  # virtual tokens stand before the row
    found = forward(x[rows, at])
    out = found.new_zeros(*x.shape[:2], found.shape[-1])
    out[rows, at] = found
    return out
