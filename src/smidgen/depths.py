"""A deep model from two shallow ones: bytes grow by so much a layer, and layers repeat."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from smidgen.simulate import Trace

FEW = (4, 6)  # layers of the two models that a deep one is extrapolated from


def depth(config: Any) -> int | None:
    """Number of layers of a configuration, where one number says it."""
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    return layers if isinstance(layers, int) and not config.is_encoder_decoder else None


def shallower(config: Any, layers: int) -> Any:
    """The configuration with fewer layers: lists with one item a layer are cut too."""
    found = copy.deepcopy(config)
    text = found.get_text_config()
    whole = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == whole:
            setattr(text, key, value[:layers])
    if text.model_type == "gpt_neo":
        text.attention_types = [[[kind], 1] for kind in text.attention_layers]
    text.num_hidden_layers = layers
    return found


def few(config: Any) -> tuple[int, int, int] | None:
    """Depth of a model, and of the two shallow ones that stand for it; None where they would hardly be shallower."""
    whole = depth(config)
    if whole is None or whole <= FEW[1] + 1:
        return None
    parity = whole % 2  # a period of two layers: both shallow models end as the deep one does
    return whole, FEW[0] + parity, FEW[1] + parity


def of_depth(config: Any, simulate: Callable[[Any], Trace]) -> Trace:
    """`simulate(config)`, for deep models by way of two shallow ones."""
    depths = few(config)
    if depths is None:
        return simulate(config)
    whole, *two = depths
    first, second = (simulate(shallower(config, layers)) for layers in two)
    return first.extrapolated(second, (two[0], two[1]), whole)


Sizes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def deepened(first: Sizes, second: Sizes, depths: tuple[int, int, int]) -> Sizes:
    """Shapes of a deep model's tensors by name, from those of two shallow ones. Layers are those whose numbers count up to the
    depth; the outermost stay what they are, and those between repeat with a period of two. Any other tensor keeps its shape,
    or grows with the depth (a prefix holds every layer's)."""
    whole, low, high = depths
    numbers: list[dict[str, set[int]]] = [{}, {}]
    for found, names in zip(numbers, (first, second), strict=True):
        for name in names:
            for prefix, number, _ in _numbered(name):
                found.setdefault(prefix, set()).add(number)
    stacks = {p for p, of in numbers[1].items() if of == set(range(high)) and numbers[0].get(p) == set(range(low))}
    sources: Sizes = {}
    for name, (shape, dtype) in second.items():
        place = next(((p, n, rest) for p, n, rest in _numbered(name) if p in stacks), None)
        if place is None:
            other = first[name][0]
            grown = tuple(a + (b - a) // (high - low) * (whole - low) for a, b in zip(other, shape, strict=True))
            sources[name] = grown, dtype
            continue
        prefix, number, rest = place
        if number == 0 or number == high - 1:
            copies = [0 if number == 0 else whole - 1]
        else:
            copies = list(range(number, whole - 1, 2)) if number <= 2 else []
        for copy_of in copies:
            sources[f"{prefix}{copy_of}{rest}"] = shape, dtype
    return sources


def _numbered(name: str) -> Iterator[tuple[str, int, str]]:
    """(before, number, after) for each number between dots in a name."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            before, after = ".".join(parts[:i]), ".".join(parts[i + 1 :])
            yield before + "." if before else "", int(part), "." + after if after else ""
