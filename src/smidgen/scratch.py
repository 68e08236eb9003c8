"""Scratch memory for displaced copies of weights: one buffer a slot and device, as large as was ever asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from smidgen.readers import ALIGN, Reader, aligned


class Scratch:
    """Buffers by slot; what is in one is lost when the slot is used again."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device], Tensor] = {}
        self._kept: dict[int, tuple[Reader, Tensor, list[Tensor]]] = {}  # of a group of tensors: the buffer, its parts

    def like(self, slot: str, like: Tensor, offset: int = 0, total: int = 0) -> Tensor:
        """A contiguous tensor shaped as `like` in the buffer `slot`, `offset` bytes in."""
        size = like.numel() * like.element_size()
        need = max(total, offset + size)
        key = (slot, like.device)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < need:
            self.buffers.pop(key, None)
            buffer = self.buffers[key] = torch.empty(need + ALIGN, dtype=torch.uint8, device=like.device)
        shift = -buffer.data_ptr() % ALIGN + offset
        if shift + size > buffer.numel():  # alignment took the spare bytes
            shift = offset
        return buffer[shift : shift + size].view(like.dtype).view(like.shape)

    def of(self, reader: Reader, slot: str, like: list[Tensor]) -> list[Tensor]:
        """Tensors shaped as some of a reader's, side by side. All of a reader's, where they are many, are made once."""
        whole = len(like) == len(reader.tensors) > 2
        if whole and id(reader) in self._kept:
            _, buffer, outs = self._kept[id(reader)]
            if self.buffers.get((slot, buffer.device)) is buffer:
                return outs
        outs, offset, total = [], 0, reader.nbytes()
        for weight in like:
            outs.append(self.like(slot, weight, offset, total))
            offset += aligned(weight.numel() * weight.element_size())
        if whole:
            self._kept[id(reader)] = reader, self.buffers[slot, like[0].device], outs
        return outs

    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(buffer.numel() for buffer in self.buffers.values())
