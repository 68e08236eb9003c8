"""Sparse supports on several ranks of torch.distributed: statistics are shared, and all ranks must tune the same entries.

What a rank sees of a gradient is its share: the gradient of the whole is the sum over ranks, as the optimizer sees it when
its own gradients have been summed. On one process nothing is done.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from smidgen.config import UserError


def count() -> int:
    """Number of ranks."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def add_(tensor: Tensor) -> None:
    """tensor <- its sum over ranks, in place, with the same bits on all. Cost: one all-reduce."""
    if count() > 1:
        distributed.all_reduce(tensor)


def gathered(mine: Any) -> list[Any]:
    """An object of every rank, in the order of ranks, on every rank."""
    found: list[Any] = [mine] * count()
    if count() > 1:
        distributed.all_gather_object(found, mine)
    return found


def checked(supports: Mapping[str, Iterable[Tensor]]) -> None:
    """Raise UserError, on every rank, unless all ranks hold the same positions under the same names. Cost: a checksum of
    each matrix's positions, and 8 bytes a matrix between ranks."""
    if count() == 1:
        return
    mine = {name: _checksum(tensors) for name, tensors in supports.items()}
    for rank, other in enumerate(all_of := gathered(mine)):
        if other != all_of[0]:
            name = next(n for n in [*all_of[0], *other] if all_of[0].get(n) != other.get(n))
            raise UserError(
                f"ranks 0 and {rank} tune other entries of {name}: their gradients or their data differ in a way that they "
                "should not; start all ranks from the same base and seed, and sum gradients over ranks before each step"
            )


def _checksum(tensors: Iterable[Tensor]) -> int:
    found = 0
    for tensor in tensors:
        found = zlib.crc32(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes(), found)
    return found
