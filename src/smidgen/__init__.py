"""smidgen: fine-tune any Hugging Face language model in little more memory than it takes to run it.

Heavy modules load on first use: `import smidgen` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = ["RunConfig", "Trainer", "UserError", "adapt", "finetune", "forward_only", "optim", "replay"]

_HOMES = {
    "RunConfig": "config",
    "UserError": "config",
    "Trainer": "trainer",
    "forward_only": "trainer",
    "finetune": "run",
    "replay": "rebuild",
}


def __getattr__(name: str) -> Any:
    if name in ("optim", "adapt"):
        return importlib.import_module(f"smidgen.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"smidgen.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'smidgen' has no attribute {name!r}")
