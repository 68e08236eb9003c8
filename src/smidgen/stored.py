"""Stored weights: what a folder's safetensors files hold, read from their headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smidgen.untrusted import header_of

__all__ = ["stored_bytes"]


def stored_bytes(files: Sequence[Path], wanted: Any) -> int:
    """Bytes of all tensors of some files, floating-point ones in the dtype `wanted` ('auto': as they are)."""
    return sum(_bytes(shape, stored, wanted) for file in files for stored, shape, _ in header_of(file).values())


def _bytes(shape: list[int], stored: str, wanted: Any) -> int:
    bits = int(re.sub(r"^\D+|_.*$", "", stored) or 8)  # F32, BF16, I64, U8, F8_E4M3, BOOL
    floating = stored.startswith(("F", "BF"))
    size = wanted.itemsize if floating and wanted != "auto" else bits // 8
    return math.prod(shape) * size
