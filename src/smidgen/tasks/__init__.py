"""Tasks: one public file a task, found by listing this folder."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from smidgen.config import ConfigError, nearest
from smidgen.tasks._example import Chat, Example, Pair, Reader, Row, Task

__all__ = ["Chat", "Example", "Pair", "Reader", "Row", "Task", "get", "names"]


def names() -> list[str]:
    """Names of all tasks, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def get(name: str) -> ModuleType:
    """The module of a task: `status`, `Config`, `build(config) -> Task`. Raises ConfigError for an unknown name."""
    if name not in names():
        close = nearest(name, names())
        hint = f"did you mean '{close}'?" if close else f"there are {', '.join(names())}; for your own file: --data FILE"
        raise ConfigError(f"unknown task '{name}': {hint}")
    return importlib.import_module(f"{__name__}.{name}")
