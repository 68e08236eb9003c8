"""Stored weights: what a folder's safetensors files hold, read from their headers alone."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smidgen.config import ConfigError

__all__ = ["stored_bytes"]


def stored_bytes(files: Sequence[Path], wanted: Any) -> int:
    """Bytes of all tensors of some files, floating-point ones in the dtype `wanted` ('auto': as they are)."""
    return sum(_bytes(shape, stored, wanted) for file in files for shape, stored in _header(file))


def _header(file: Path) -> list[tuple[list[int], str]]:
    """(shape, dtype) of every tensor of a safetensors file: 8 bytes of length, then JSON."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            entries = json.loads(stream.read(length))
        return [(entry["shape"], entry["dtype"]) for key, entry in entries.items() if key != "__metadata__"]
    except (OSError, ValueError, struct.error, KeyError, OverflowError, MemoryError) as error:
        raise ConfigError(f"'{file}' is no safetensors file ({type(error).__name__}: {error}): copy it again") from None


def _bytes(shape: list[int], stored: str, wanted: Any) -> int:
    bits = int(re.sub(r"^\D+|_.*$", "", stored) or 8)  # F32, BF16, I64, U8, F8_E4M3, BOOL
    floating = stored.startswith(("F", "BF"))
    size = wanted.itemsize if floating and wanted != "auto" else bits // 8
    return math.prod(shape) * size
