"""Copies of a model's layers on the device that computes, two at a time, of weights that stay in host memory or on disk.

While a layer runs its modules hold the copies; the next layer's are on their way on a stream of their own. Nothing is written
to a copy: updates go to the master where it lives, along the same addressed noise, and the next pass copies anew.

Memory on the device: twice the largest layer. On a CPU, where copies serve to test this, everything happens in turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_ALIGN = 256  # bytes; what CUDA's allocator aligns to


class Near:
    """Two buffers on `device` for the layers of `stack`, in turn."""

    def __init__(self, stack: list[nn.Module], device: torch.device):
        self.places: list[list[tuple[nn.Module, str, Tensor]]] = [
            [(m, name, p) for m in layer.modules() for name, p in m._parameters.items() if p is not None] for layer in stack
        ]
        size = max(sum(_room(p) for _, _, p in places) for places in self.places)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        cuda = device.type == "cuda"
        self.stream: Any = torch.cuda.Stream(device) if cuda else None
        self._copied: list[Any] = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._done: list[Any] = [torch.cuda.Event() if cuda else None for _ in range(2)]

    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(buffer.numel() for buffer in self.buffers)

    def _views(self, i: int) -> list[Tensor]:
        at, found = 0, []
        for _, _, master in self.places[i]:
            raw = self.buffers[i % 2][at : at + master.numel() * master.element_size()]
            found.append(raw.view(master.dtype).view(master.shape))
            at += _room(master)
        return found

    def load(self, i: int) -> None:
        """Begin to copy layer i; it takes the buffer of the layer two before, once that has run."""
        if self.stream is None:
            for (_, _, master), view in zip(self.places[i], self._views(i), strict=True):
                view.copy_(master.detach())
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self._done[i % 2])
            for (_, _, master), view in zip(self.places[i], self._views(i), strict=True):
                view.copy_(master.detach(), non_blocking=True)
            self._copied[i % 2].record(self.stream)

    def show(self, i: int) -> None:
        """Let the layer's modules hold the copies."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_event(self._copied[i % 2])
        for (module, name, _), view in zip(self.places[i], self._views(i), strict=True):
            module._parameters[name] = view  # type: ignore[assignment]

    def hide(self, i: int) -> None:
        """Let them hold the masters again; the copies may be written over once what was started has run."""
        for module, name, master in self.places[i]:
            module._parameters[name] = master  # type: ignore[assignment]
        if self.stream is not None:
            self._done[i % 2].record(torch.cuda.current_stream())


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
