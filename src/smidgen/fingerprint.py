"""Fingerprint: one SHA-256 of named tensors, equal exactly where every bit is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch

__all__ = ["state_sha256"]

_CHUNK = 64 * 2**20  # bytes hashed or copied at a time; chosen


def state_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over name, dtype, shape and raw bytes of tensors in name order; copies at most 64 MiB at a time."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor, give_back = tensors[name].detach(), getattr(tensors[name], "release", None)  # of a tensor on disk
        digest.update(f"{name}\n{str(tensor.dtype).removeprefix('torch.')}\n{list(tensor.shape)}\n".encode())
        for part in _contiguous_parts(tensor):
            raw = part.reshape(-1).view(torch.uint8)
            for chunk in raw.split(_CHUNK):
                digest.update(chunk.cpu().numpy())
                if give_back is not None:
                    give_back()
    return digest.hexdigest()


def _contiguous_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor in row-major order as contiguous pieces; only pieces that are not yet so are copied."""
    if tensor.is_contiguous():
        yield tensor
    elif tensor.dim() < 2 or tensor.numel() * tensor.element_size() <= _CHUNK:
        yield tensor.contiguous()
    else:
        for row in tensor:
            yield from _contiguous_parts(row)
