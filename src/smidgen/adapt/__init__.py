"""Tuning schemes: one public module a scheme, found by listing this folder.

Each has `Config`, `status`, `build(model, config, *, seed, fresh) -> Adapted`, `EXPORTS`, the formats it can write, and
`REFUSED`, those that it cannot with the reason.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from smidgen.config import ConfigError, nearest


def names() -> list[str]:
    """All schemes, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> ModuleType:
    """The module of a scheme. Raises ConfigError with the nearest name for an unknown one."""
    if name not in names():
        raise ConfigError(
            f"unknown scheme {name!r}; did you mean {nearest(name, names())!r}? It is one of {', '.join(names())}"
        )
    return importlib.import_module(f"{__name__}.{name}")
