"""The last layer where labels are read: what it does to other positions after its attention is left out, nothing reads it.

After the attention of the last layer every position is on its own. Where labels stand at few positions of the rows, as label
words do, the layer's modules behind query, key and value (the output projection, the MLP with its activation) see these
positions alone, and zeros take the place of the rest: for one label in 50 tokens, 9 of the 12 products of the layer nearly
vanish. The attention itself runs in full.

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
from smidgen.forwards import replaced
from smidgen.population import linear_like

SHARE = 4  # at least so many positions for each label; chosen


def narrow(model: nn.Module, layer: nn.Module, tuned: Collection[int]) -> list[nn.Module]:
    """The modules of `layer`, the last of the stack, that may leave positions out; none where its attention is unknown.

    tuned: ids of modules that own tuned tensors, whose probes look at every position.
    """
    names = {id(module): name for name, module in model.named_modules()}
    inner = [a for a in attentions(model) if a.path.startswith(names[id(layer)] + ".")]
    if len(inner) != 1:
        return []
    mixed = {path for role, path in inner[0].projections.items() if role != "output"} | {inner[0].fused}
    modules = dict(model.named_modules())
    return list(_outermost(layer, {id(modules[path]) for path in mixed if path} | set(tuned)))


def _outermost(module: nn.Module, whole: set[int]) -> Iterator[nn.Module]:
    """Outermost modules below one that multiply and hold none of those that need every position."""
    for child in module.children():
        inside = list(child.modules())
        if id(child) in whole or not any(map(linear_like, inside)):
            continue
        if any(id(m) in whole for m in inside) or isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _outermost(child, whole)
        else:
            yield child


@contextlib.contextmanager
def at_labels(modules: Sequence[nn.Module], keep: Tensor | None) -> Iterator[None]:
    """Inside this context the modules see the positions in keep [B, T], where these are at most one in `SHARE`; else all."""
    if not modules or keep is None or SHARE * int(keep.sum()) > keep.numel():
        yield
        return
    places = keep.nonzero(as_tuple=True)
    with replaced((module, functools.partial(_forward, module.forward, keep.shape, places)) for module in modules):
        yield


def _forward(forward: Callable[..., Any], shape: torch.Size, places: tuple[Tensor, ...], *args: Any, **given: Any) -> Any:
    rows = [x for x in args if isinstance(x, Tensor) and x.ndim == 3 and x.shape[0] == shape[0] and x.shape[1] >= shape[1]]
    if given or not rows or len(rows) < len(args):
        return forward(*args, **given)
    of, at = places[0], places[1] + rows[0].shape[1] - shape[1]  # virtual tokens stand before the row
    found = forward(*(x[of, at][None] for x in rows))
    if not isinstance(found, Tensor) or found.shape[:2] != (1, len(of)):
        return forward(*args)
    out = found.new_zeros(*rows[0].shape[:2], found.shape[-1])
    out[of, at] = found[0]
    return out
