"""The last line of every benchmark: one JSON object with figures, goals, and whether each goal is met."""

from __future__ import annotations

import json
import operator
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_COMPARE = {">=": operator.ge, "<=": operator.le}


def emit(
    name: str, figures: Mapping[str, float], goals: Mapping[str, tuple[str, float]], setting: Mapping[str, Any]
) -> dict[str, Any]:
    """Print the record and return it; whole numbers stay exact, others have four digits.

    goals: figure -> (">=" or "<=", number); a goal missed is a figure, not an error.
    """
    rounded = {key: value if isinstance(value, int) else float(f"{value:.4g}") for key, value in figures.items()}
    record = {
        "name": name,
        "figures": rounded,
        "goals": {key: list(goal) for key, goal in goals.items()},
        "met": {key: bool(_COMPARE[sign](figures[key], number)) for key, (sign, number) in goals.items()},
        "setting": {**setting, **machine()},
    }
    print(json.dumps(record))
    return record


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    from smidgen import noise

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # the same name stands on machines with and without AVX512
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "backend": noise.backend(device),
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
