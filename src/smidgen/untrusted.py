"""Safetensors files from anywhere: their headers are checked before anything is read, and nothing outside a folder is opened.

A header is at most 100 MB and must describe the file that it stands in; tensors are then views of the file's bytes, so a file
cannot make a reader allocate more than its own size.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smidgen.config import ConfigError

_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "C64": 64}
_BITS |= {f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)} | {"F16": 16, "BF16": 16, "F32": 32, "F64": 64}
_HEADER = 100_000_000  # bytes of a header, at most: safetensors' own bound
INDEX = "model.safetensors.index.json"


def read_header(data: Any, path: Path) -> dict[str, tuple[str, list[int], int]]:
    """(dtype, shape, first byte) of each tensor of a safetensors file. Raises ConfigError for one that does not fit itself."""

    def bad(reason: str) -> ConfigError:
        return ConfigError(f"{path} cannot be read, it is no safetensors file ({reason}): get it again from where it came")

    if len(data) < 8:
        raise bad(f"{len(data)} bytes")
    (length,) = struct.unpack("<Q", data[:8])
    if not 2 <= length <= min(_HEADER, len(data) - 8):
        raise bad(f"its header would be {length} bytes long")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            dtype, shape, (first, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, first, end)):
                raise bad(f"{name[:60]!r} has sizes that are no numbers")
            if 8 * (end - first) != math.prod(shape) * _BITS[dtype] or end > len(data) - 8 - length:
                raise bad(f"{name[:60]!r} would lie outside the file")
            found[name] = (dtype, shape, 8 + length + first)
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise bad(f"{type(error).__name__} in its header") from None


def header_of(path: Path) -> dict[str, tuple[str, list[int], int]]:
    """`read_header` of a file. Raises ConfigError unless the header describes the file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read_header(data, path)
    except (OSError, ValueError) as error:  # mmap refuses an empty file with a ValueError
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read ({error}): get it again from where it came") from None


def check_folder(folder: Path) -> None:
    """Raise ConfigError for a model's or an adapter's folder with a damaged weights file, or an index that leads out of it."""
    for path in sorted(folder.glob("*.safetensors")):
        header_of(path)
    for index in folder.glob("*.index.json"):
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise ConfigError(f"{index} has no weight_map: get it again from where it came")
        for name in places.values():
            if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
                raise ConfigError(f"{index} names {str(name)[:80]!r}: the files of a model lie beside its index")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ConfigError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON that can be read ({str(error)[:120]}): get it again from where it came") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object: get it again from where it came")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises ConfigError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header_of(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConfigError(f"{path} cannot be read ({str(error)[:160]}): get it again from where it came") from None
