"""Weights on disk: safetensors files that are mapped into memory, read ahead, written where they lie, and let go.

A shelf is one file; a model has one for each layer of its stack and one for the rest. Its parameters are views of the maps, so
whatever reads or writes a weight does so in the file. What is in memory is what was touched since `release`: the pages stay the
system's, which keeps as many as there is room for. Each parameter has an attribute `release`.

A map counts as this process's memory while its pages are touched (RssFile); `release` gives it back (MADV_DONTNEED), and
what was written stays. Linux; elsewhere the system decides what stays in memory.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.untrusted import INDEX, read_header

_PAGE = 4096
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_NAMES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class Shelf:
    """The tensors of one safetensors file, mapped and writable. Raises ConfigError for a file whose header does not fit it."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.tensors = {name: self._view(*place) for name, place in read_header(self._map, path).items()}

    @classmethod
    def create(cls, path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Shelf:
        """A new file of zeros; its data begin on a page."""
        at, header = 0, {"__metadata__": {"format": "pt"}}
        for name, (dtype, shape) in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}  # type: ignore[dict-item]
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % _PAGE)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + max(1, at))
        return cls(path)

    def _view(self, stored: str, shape: list[int], first: int) -> Tensor:
        count, dtype = math.prod(shape), _DTYPES[stored]
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=first).view(shape)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self._map)

    def fetch(self) -> None:
        """Read all of it into memory, before it is needed."""
        if hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED)
        torch.frombuffer(self._map, dtype=torch.uint8)[::_PAGE].sum()

    def release(self) -> None:
        """Let go of its memory; what was written is in the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """What was written is on the disk when this returns."""
        self._map.flush()


class Shelves:
    """The master copy of a model's weights: `layers`, the files of the stack's layers in order, and `rest`."""

    def __init__(self, folder: Path, model: nn.Module, stack: list[nn.Module]):
        """New files for all parameters of `model`, which may be on no device; its parameters are the files' from now on."""
        self.folder, self.stack = folder, stack
        folder.mkdir(parents=True, exist_ok=True)
        inside = {id(p): i for i, layer in enumerate(stack) for p in layer.parameters()}
        groups: list[dict[str, nn.Parameter]] = [{} for _ in range(len(stack) + 1)]
        for name, parameter in model.named_parameters():
            groups[inside.get(id(parameter), len(stack))][name] = parameter
        made: dict[int, nn.Parameter] = {}
        shelves = []
        for i, group in enumerate(groups):
            shapes = {name: (p.dtype, tuple(p.shape)) for name, p in group.items()}
            shelf = Shelf.create(folder / f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors", shapes)
            for name, parameter in group.items():
                made[id(parameter)] = _parameter(shelf, shelf.tensors[name], parameter.requires_grad)
            shelves.append(shelf)
        for module in model.modules():
            for attribute, held in module._parameters.items():
                if held is not None:
                    module._parameters[attribute] = made[id(held)]
        self.layers, self.rest = shelves[:-1], shelves[-1]

    def __iter__(self) -> Any:
        return iter([*self.layers, self.rest])

    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Copy every tensor from `read(name)`, one at a time."""
        for shelf in self:
            for name, tensor in shelf.tensors.items():
                tensor.copy_(read(name))
                shelf.release()

    def index(self) -> dict[str, Any]:
        """What model.safetensors.index.json says of the files."""
        names = {name: shelf.path.name for shelf in self for name in shelf.tensors}
        return {"metadata": {"total_size": sum(t.nbytes for s in self for t in s.tensors.values())}, "weight_map": names}


def publish(model: Any, folder: Path) -> None:
    """Move a model's shelves into `folder` under the names that `from_pretrained` reads; it goes on using them there."""
    shelves: Shelves = model.smidgen_shelves
    for shelf in shelves:
        shelf.flush()
        shelf.path = shelf.path.rename(folder / shelf.path.name)
    shelves.folder.rmdir()
    (folder / INDEX).write_text(json.dumps(shelves.index(), indent=2), encoding="utf-8")
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _parameter(shelf: Shelf, tensor: Tensor, trainable: bool) -> nn.Parameter:
    parameter = nn.Parameter(tensor, requires_grad=trainable and tensor.is_floating_point())
    parameter.release = shelf.release  # type: ignore[attr-defined]
    return parameter
