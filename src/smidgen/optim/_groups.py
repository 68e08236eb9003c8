"""Shared by methods that treat parts of a model apart: groups of tensors, read off their names, and which part is above.

An optimizer sees no model. In the names that Hugging Face models use, the first number in a path is the index of a layer
(`model.layers.3.mlp.up_proj.weight`); what has none lies below the stack when it is an embedding, else above it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from smidgen.config import ConfigError

Level = Literal["layer", "module", "tensor"]

_EMBEDDING = re.compile(r"embed|wte|wpe|(^|\.)shared(\.|$)|prompt")  # as Hugging Face models and PEFT call them
_ADAPTER = re.compile(r"\.lora_\w+.*$")


def layer_of(name: str) -> str | None:
    """The path of the layer that a tensor belongs to, or None.

    >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight")
    ('model.layers.3', None)
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else ".".join(parts[: at + 1])


def group_of(name: str, level: Level) -> str:
    """The path of the group that a tensor belongs to. Outside layers every module that owns tensors is a group, but `layer`
    keeps all embeddings together: each of their groups would cost full forwards.

    >>> [group_of("model.layers.3.mlp.up_proj.weight", level) for level in ("layer", "module", "tensor")]
    ['model.layers.3', 'model.layers.3.mlp', 'model.layers.3.mlp.up_proj']
    """
    layer = layer_of(name)
    owner = _ADAPTER.sub("", name) if _ADAPTER.search(name) else name.rpartition(".")[0] or name
    if layer is None and level == "layer" and _EMBEDDING.search(name):
        return "embeddings"
    if layer is None or level == "tensor":
        return owner
    if level == "layer":
        return layer
    inside = name[len(layer) + 1 :].split(".")
    deep = next((i for i, part in enumerate(inside[1:], 1) if not part.isdigit()), 1)  # T5: layer.0, layer.1
    return ".".join([layer, *inside[:deep]]) if len(inside) > 1 else owner


def groups(names: Sequence[str], level: Level, pattern: str | None = None) -> list[list[str]]:
    """The names in groups, from the top of the model down. Tensors in whose names `pattern` finds the same text are a
    group, the others are grouped by `level`. Raises ConfigError for a pattern that matches nothing."""
    found = matches(names, pattern)
    gathered: dict[tuple[bool, str], list[str]] = {}
    for name in names:
        key = (True, found[name]) if name in found else (False, group_of(name, level))
        gathered.setdefault(key, []).append(name)
    place = {name: i for i, name in enumerate(names)}
    return sorted(gathered.values(), key=lambda g: (min(map(_storey, g)), place[g[-1]]), reverse=True)


def matches(names: Sequence[str], pattern: str | None) -> dict[str, str]:
    """The text that a regular expression finds in each name, where it does. Raises ConfigError where it never does."""
    if pattern is None:
        return {}
    try:
        found = {name: match[0] for name in names if (match := re.search(pattern, name))}
    except re.error as error:
        raise ConfigError(f"pattern {pattern!r} is not a regular expression ({error}): correct it") from None
    if not found:
        raise ConfigError(
            f"pattern {pattern!r} matches none of the {len(names)} tuned tensors: take one that is found in names like "
            f"{names[0]!r}"
        )
    return found


def upper(names: Sequence[str], top: int) -> list[str]:
    """Tensors of the `top` last layers and of what follows the stack. Raises ConfigError where there are not so many."""
    layers = list(dict.fromkeys(layer for name in names if (layer := layer_of(name)) is not None))
    if not layers:
        raise ConfigError(
            f"none of the tuned tensors, such as {names[0]!r}, belongs to a layer, so there is no upper part: take another "
            "scheme, such as lora, or another method"
        )
    if top > len(layers):
        raise ConfigError(f"top = {top}, but the tuned tensors belong to {len(layers)} layers: take a smaller top or a pattern")
    last = set(layers[len(layers) - top :])
    return [n for n in names if (layer_of(n) in last if layer_of(n) is not None else _storey(n) == 2)]


def without(names: Iterable[str], some: Iterable[str]) -> list[str]:
    """The names that are not among some, in order."""
    left_out = set(some)
    return [n for n in names if n not in left_out]


def _storey(name: str) -> int:
    """0: below the stack, 1: in it, 2: above."""
    if layer_of(name) is not None:
        return 1
    return 0 if _EMBEDDING.search(name) else 2
