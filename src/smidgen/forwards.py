"""Another forward for a module, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def replaced(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside this context each module has the forward beside it; afterwards its own again, or its class's."""
    saved: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in forwards:
            saved.append((module, module.__dict__.get("forward")))
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module, own in reversed(saved):
            if own is None:
                del module.__dict__["forward"]
            else:
                module.forward = own
