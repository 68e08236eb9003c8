"""Optimizers: one public module a method, found by listing this folder.

Each public module has `Config` (its documented options), `build(params, config)`, `status` and optionally `PRESETS`.
Classes are exported here under their own names: `smidgen.optim.ZOSGD(model.parameters(), lr=1e-6)`.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from smidgen.config import ConfigError, nearest


def names() -> list[str]:
    """All methods, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> ModuleType:
    """The module of a method. Raises ConfigError with the nearest name for an unknown one."""
    if name not in names():
        raise ConfigError(f"unknown method {name!r}; did you mean {nearest(name, names())!r}? `smidgen methods` lists all")
    return importlib.import_module(f"{__name__}.{name}")


def __getattr__(name: str) -> Any:
    for method in names():
        if method.replace("_", "") == name.lower():
            return getattr(get(method), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
