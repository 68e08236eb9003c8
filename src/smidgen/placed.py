"""Models that accelerate spreads over devices, memory and disk: where each weight lives, and our hooks inside its forward.

Accelerate wraps a module's forward: the wrapper brings inputs, and weights that live elsewhere, to the module's device, calls
the forward, and takes them away again. Ours therefore go around the inner forward. A weight that lives elsewhere is, in the
model, a tensor without storage; its home is the tensor that accelerate takes it from. Weights that accelerate would read from
a checkpoint's files anew each time move to files that can be written (`shelves`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from smidgen.shelves import Shelf


def homes(module: nn.Module) -> Any:
    """What accelerate takes this module's own weights from, by name; None where they are in the module."""
    hook: Any = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        if getattr(part, "offload", False) and getattr(part, "weights_map", None) is not None:
            return part.weights_map
    return None


def home(module: nn.Module, attribute: str, parameter: Tensor) -> Tensor:
    """Where a parameter lives: it itself, or what accelerate takes it from."""
    source = homes(module) if parameter.is_meta else None
    return parameter if source is None else source[attribute]


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and home; tied ones once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            tensor = home(module, attribute, parameter)
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{prefix}.{attribute}" if prefix else attribute, tensor


def around(module: nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> Callable[[], None]:
    """Call `enter` and `leave` around a module's own forward, inside accelerate's wrapper. Returns what undoes it."""
    inner = module._old_forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        enter(module, args)
        output = None
        try:
            output = inner(*args, **kwargs)  # type: ignore[operator]
            return output
        finally:
            leave(module, args, output)

    module._old_forward = forward  # type: ignore[assignment]
    return lambda: setattr(module, "_old_forward", inner)


def wrapped(module: nn.Module | None) -> bool:
    """Whether accelerate wraps this module's forward."""
    return module is not None and hasattr(module, "_old_forward")


def settle(model: nn.Module, folder: Path) -> None:
    """Give weights that live in a checkpoint's files a home that can be written, under `folder`. Tied weights share one. The
    model stays where it is from then on, whatever a trainer asks.

    Cost: a copy of these weights on disk; one tensor at a time in memory.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found: dict[str, tuple[nn.Module, str, Any]] = {}
    for prefix, module in model.named_modules():
        source = homes(module)
        if source is None or isinstance(source, _Homes):
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                found[f"{prefix}.{attribute}" if prefix else attribute] = (module, attribute, source)
    if any(p.is_meta for p in model.parameters()):
        model.to = lambda *_, **__: model  # type: ignore[assignment] # a trainer asks, and accelerate's own would raise
    if not found:
        return
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, Tensor] = {}
    kept: dict[int, _Homes] = {}
    for name, (module, attribute, source) in sorted(found.items(), key=lambda item: item[0] in tied):
        value = source[attribute]
        first = tied.get(name, name)
        if first not in made:
            shelf = Shelf.create(folder / f"{name}.safetensors", {name: (value.dtype, tuple(value.shape))})
            made[name] = shelf.tensors[name]
            made[name].copy_(value)
            shelf.release()
        kept.setdefault(id(module), _Homes(source))[attribute] = made.get(first, made.get(name))
    for module, _, _ in found.values():
        hook: Any = module._hf_hook
        for part in getattr(hook, "hooks", (hook,)):
            if getattr(part, "offload", False):
                part.weights_map = kept[id(module)]


class _Homes(dict[str, Any]):
    """A module's weights by name; what it does not hold (buffers) comes from where it came from."""

    def __init__(self, before: Any):
        super().__init__()
        self.before = before

    def __missing__(self, name: str) -> Any:
        return self.before[name]
