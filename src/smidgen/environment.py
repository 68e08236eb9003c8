"""Environment: the versions and the machine that a run was made with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from typing import Any

import torch

from smidgen import __version__, world


def environment() -> dict[str, Any]:
    """Versions and machine: env.json, and what a bug report needs."""
    names = ("torch", "transformers", "peft", "accelerate", "trl", "datasets", "numba", "numpy", "safetensors", "bitsandbytes")
    versions = {"smidgen": __version__, "python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "versions": versions,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "ranks": world.count(),
    }
