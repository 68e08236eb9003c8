"""What back-propagation keeps of the forward: one public module a policy, found by listing this folder.

Each has `Config`, `status` and `build(model, config, *, view, seed)`, which changes how the model's modules save for the
backward and returns an object with `remove()`, `save(folder)` and `load(folder)`. Forwards without gradient are unchanged.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from smidgen.config import ConfigError, nearest


def names() -> list[str]:
    """All policies, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> ModuleType:
    """The module of a policy. Raises ConfigError with the nearest name for an unknown one."""
    if name not in names():
        raise ConfigError(
            f"unknown activations {name!r}; did you mean {nearest(name, names())!r}? It is one of {', '.join(names())}"
        )
    return importlib.import_module(f"{__name__}.{name}")
