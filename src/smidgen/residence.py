"""Where a run's weights live: all on one device, on disk, in host memory, or spread by accelerate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smidgen import placed
from smidgen.config import RunConfig
from smidgen.layerwise import from_disk, from_host

WEIGHTS = "weights"  # where they lie in a run's folder while it goes


def loading(config: RunConfig, folder: Path | None, device: str) -> dict[str, Any]:
    """Further options of `models.load_model`: the device, and what accelerate is asked for."""
    if folder is None or (config.offload is None and config.device_map is None):
        return {"device": device}
    if config.offload == "host":
        return {"device": "cpu"}
    where = {"": "disk"} if config.offload else config.device_map
    return {"device": device, "device_map": where, "offload_folder": folder / WEIGHTS / "loading"}


def settle(config: RunConfig, model: nn.Module, folder: Path | None, device: str) -> None:
    """After a load with these options: put what lies on disk where it can be written."""
    if folder is None:
        return
    if config.offload == "disk":
        from_disk(model, folder / WEIGHTS, None if device == "cpu" else torch.device(device))
    elif config.offload == "host":
        from_host(model, torch.device(device))
    elif config.device_map:
        placed.settle(model, folder / WEIGHTS)
    shutil.rmtree(folder / WEIGHTS / "loading", ignore_errors=True)
