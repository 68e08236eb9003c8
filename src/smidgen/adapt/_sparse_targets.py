"""Which layers of a model get sparse deltas, and how many each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from smidgen import quantised
from smidgen.adapt._sparse import KINDS
from smidgen.config import ConfigError
from smidgen.params import canonical


def find(model: nn.Module, wanted: list[str] | str | None, heads: Sequence[str]) -> dict[str, nn.Module]:
    """The layers to adapt by name: those whose names end as one of a list (as PEFT matches) or match a regular expression as
    a whole; None: all linear ones outside the output head, new heads and tied weights.

    Raises ConfigError where nothing matches, and where a layer that was asked for cannot have deltas.
    """
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    named: dict[str, Any] = {name: module for name, module in model.named_modules() if name}
    if wanted is None:
        linear: dict[str, Any] = {n: m for n, m in named.items() if _linear(m)}
        left_out = {n for n, m in linear.items() if m is head or any(n == h or n.startswith(h + ".") for h in heads)}
        found: dict[str, Any] = {n: m for n, m in linear.items() if n not in left_out and holders[id(m.weight)] == 1}
        if not found:
            raise ConfigError(
                f"{type(model).__name__} has no linear layers to adapt: name its layers in scheme_args.target_modules"
            )
    else:
        found = {n: m for n, m in named.items() if _matches(canonical(n), wanted)}
        if not found:
            example = next((n for n, m in named.items() if _linear(m)), "none")
            raise ConfigError(
                f"scheme_args.target_modules = {wanted!r} matches no layer of {type(model).__name__}: take ends of names like "
                f"{example!r}, or a regular expression that matches them as a whole"
            )
    for name, module in found.items():
        _check(name, module, holders[id(getattr(module, "weight", None))])
    return found


def _linear(module: nn.Module) -> bool:
    return isinstance(module, tuple(KINDS)) or quantised.kind(module) is not None


def shape(module: Any) -> tuple[int, int]:
    """Rows and columns of a layer's weight, also where it is stored in codes."""
    return quantised.shape(module) if quantised.kind(module) is not None else tuple(module.weight.shape)  # type: ignore[return-value]


def values(module: Any) -> Tensor:
    """The weights of a layer; of a quantised one, those that it multiplies with."""
    return module.weight if quantised.kind(module) is None else quantised.dequantise(module)


def _matches(name: str, wanted: list[str] | str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith("." + end) for end in wanted)


def _check(name: str, module: nn.Module, holders: int) -> None:
    """Raise ConfigError where a layer cannot have deltas."""
    if quantised.kind(module) is None and type(module) not in KINDS:
        kinds = " or ".join(kind.__name__ for kind in KINDS)
        way_out = (
            "load the model with quantise: nf4 or int8, or unquantised, or use scheme lora"
            if isinstance(module, nn.Linear)
            else "leave it out"
        )
        raise ConfigError(
            f"{name} is a {type(module).__name__}, and sparse deltas need a layer of kind {kinds}, or one quantised by "
            f"bitsandbytes: {way_out}"
        )
    if holders > 1:
        raise ConfigError(f"the weight of {name} is tied to another layer's, which deltas would change too: leave it out")


def budget(
    model: nn.Module, modules: Mapping[str, nn.Module], density: float, rank: int | None, of_model: bool
) -> dict[str, int]:
    """Deltas of each layer: the same share of all, at least one, or as many as a LoRA of `rank` has weights.

    of_model: the density counts all parameters of the model, as the public code does. Raises ConfigError for more deltas
    than entries.
    """
    shapes = {name: shape(module) for name, module in modules.items()}
    entries = {name: rows * columns for name, (rows, columns) in shapes.items()}
    if rank is not None:
        counts = {name: rank * sum(axes) for name, axes in shapes.items()}
    else:
        held = sum(module.weight.numel() for module in modules.values())  # type: ignore[union-attr,operator,misc]
        others = sum(p.numel() for p in model.parameters()) - held if of_model else 0
        whole = sum(entries.values()) + others
        total = int(density * whole)
        counts = {name: max(1, total * n // sum(entries.values())) for name, n in entries.items()}
    for name, count in counts.items():
        if count > entries[name]:
            asked = f"rank = {rank}" if rank is not None else f"density = {density:g} of all parameters"
            raise ConfigError(f"{asked} means {count} deltas in {name}, which has {entries[name]} entries: ask for fewer")
    return counts
