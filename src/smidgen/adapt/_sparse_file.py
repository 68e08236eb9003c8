"""The file of sparse deltas: sorted positions as gaps in 7-bit groups, float32 values, and the base that they belong to.

`sparse.safetensors` holds, for each matrix with deltas, NAME.gaps (uint8) and NAME.values (float32), and tensors that are
tuned whole under their own names; `sparse.json` the version, the scheme, the matrices' shapes and the SHA-256 of the base.
A gap is the distance to the position before (the first: from -1) less one, lowest 7 bits first, the high bit set on all bytes
but its last: 1.3 bytes a position at a density of 1 %, instead of the 8 of two int32 coordinates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from smidgen.config import ConfigError
from smidgen.untrusted import read_json, read_tensors

TENSORS, ABOUT = "sparse.safetensors", "sparse.json"
VERSION = 1  # of these two files

_GROUPS = 9  # of 7 bits: positions below 2^63


def encode(index: Tensor) -> Tensor:
    """Sorted distinct positions [k] -> uint8 [n]."""
    positions = index.long().cpu()
    gaps = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
    lengths = torch.ones_like(gaps)
    for group in range(1, _GROUPS):
        lengths += gaps >= 1 << 7 * group
    ends = lengths.cumsum(0)
    out = torch.zeros(int(ends[-1]) if len(ends) else 0, dtype=torch.uint8)
    for group in range(int(lengths.max()) if len(gaps) else 0):
        has = lengths > group
        byte = gaps[has] >> 7 * group & 127 | (lengths[has] > group + 1).long() << 7
        out[(ends - lengths)[has] + group] = byte.to(torch.uint8)
    return out


def decode(code: Tensor) -> Tensor:
    """What `encode` was given, int64. Raises ValueError for bytes that it does not write."""
    last = code < 128
    if code.numel() and not bool(last[-1]):
        raise ValueError("the code of positions ends within a number")
    number = last.long().cumsum(0) - last.long()  # which gap a byte belongs to
    starts = torch.cat([number.new_zeros(1), last.nonzero()[:-1, 0] + 1]) if code.numel() else number
    group = torch.arange(code.numel()) - starts[number]
    if code.numel() and int(group.max()) >= _GROUPS:
        raise ValueError("the code of positions holds a number beyond 2^63")
    gaps = torch.zeros(int(last.sum()), dtype=torch.int64).index_add(0, number, (code.long() & 127) << 7 * group)
    return (gaps + 1).cumsum(0) - 1


def save(
    folder: Path,
    scheme: str,
    base_sha256: str,
    deltas: Mapping[str, tuple[Tensor, Tensor]],
    shapes: Mapping[str, tuple[int, int]],
    whole: Mapping[str, Tensor],
) -> None:
    """Write (positions, values) by matrix, and tensors that are tuned whole."""
    from safetensors.torch import save_file

    tensors = {f"{name}.gaps": encode(index) for name, (index, _) in deltas.items()}
    tensors |= {f"{name}.values": values.detach().float().cpu().contiguous() for name, (_, values) in deltas.items()}
    tensors |= {name: tensor.detach().cpu().contiguous() for name, tensor in whole.items()}
    about = {
        "version": VERSION,
        "scheme": scheme,
        "base_sha256": base_sha256,
        "shapes": {n: list(s) for n, s in shapes.items()},
    }
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load(
    folder: Path, scheme: str, base_sha256: str, shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """(positions, values) by matrix, and tensors tuned whole. Raises ConfigError where they belong to another base, scheme
    or choice of matrices."""
    path = folder / TENSORS
    if not path.exists():
        raise ConfigError(f"{folder} holds no {TENSORS}: give the folder of a run with scheme {scheme}")
    about = read_json(folder / ABOUT)
    if about.get("version") != VERSION:
        raise ConfigError(f"{folder / ABOUT} has version {about.get('version')}, not {VERSION}: use the smidgen that wrote it")
    if about.get("scheme") != scheme or about.get("shapes") != {n: list(s) for n, s in shapes.items()}:
        count = len(about["shapes"]) if isinstance(about.get("shapes"), dict) else 0
        raise ConfigError(
            f"{path} was written by scheme {about.get('scheme')} for {count} matrices and does not fit this model's "
            f"{len(shapes)} under {scheme}: load it with the model and scheme_args of its run"
        )
    if about.get("base_sha256") != base_sha256:
        raise ConfigError(f"{path} belongs to another base model: give the one that its run started from")
    tensors = read_tensors(path)
    try:
        deltas = {name: _delta(tensors, name, shape) for name, shape in shapes.items()}
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ConfigError(f"{path} holds no deltas of these matrices ({error}): get it again from where it came") from None
    return deltas, tensors


def _delta(tensors: dict[str, Tensor], name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Positions and values of a matrix. Raises KeyError and ValueError for such as it cannot have."""
    gaps, values = tensors.pop(f"{name}.gaps"), tensors.pop(f"{name}.values")
    if gaps.dtype != torch.uint8 or gaps.ndim != 1 or values.ndim != 1:
        raise ValueError(f"{name} in another form")
    index = decode(gaps)
    if len(index) != len(values) or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < shape[0] * shape[1]):
        raise ValueError(f"{name} with positions outside it")
    return index, values
