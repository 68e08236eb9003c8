"""Tensor state in float32 or in 8 bits, read and written in blocks of elements.

8 bits: bitsandbytes' block-wise dynamic codes (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022,
arXiv 2110.02861), 256 elements a block with one float32 scale: the largest magnitude. As in its optimizers, tensors with
fewer than 4,096 elements stay float32. Under a key of the state stand the values or the codes (uint8), both in the
tensor's shape; the scales stand under key + "_absmax". Cost of 8 bits on a CPU: about 10 ns an element on one core,
nearly all of it for encoding.
"""

from __future__ import annotations

import functools
from math import prod
from typing import Any

import torch
from torch import Tensor

from smidgen.config import ConfigError

BLOCK = 256  # bitsandbytes' block of 8-bit optimizers
SMALLEST = 4096  # elements of a tensor that is worth it; bitsandbytes' min_8bit_size

State = dict[str, Any]


@functools.cache
def _codec() -> Any:
    try:
        import bitsandbytes.functional as codec
    except ImportError as error:
        raise ConfigError(
            "state: 8bit needs bitsandbytes, which is not installed: pip install bitsandbytes, or state: float32"
        ) from error
    return codec


def require() -> None:
    """Raise ConfigError when there is no codec."""
    _codec()


@functools.cache
def _code(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of a code in [-1, 1] or [0, 1]."""
    return _codec().create_dynamic_map(signed=signed).to(device)


def nbytes(shape: tuple[int, ...], eight_bit: bool) -> int:
    """Bytes of one such tensor."""
    count = prod(shape)
    return count + 4 * -(-count // BLOCK) if eight_bit and count >= SMALLEST else 4 * count


def allocate(state: State, key: str, like: Tensor, eight_bit: bool) -> None:
    """Zeros in the shape of `like`."""
    small = like.numel() < SMALLEST
    kind = torch.uint8 if eight_bit and not small else torch.float32
    state[key] = torch.zeros(like.shape, dtype=kind, device=like.device)
    if kind == torch.uint8:  # a scale of zero makes every code zero
        state[f"{key}_absmax"] = torch.zeros(-(-like.numel() // BLOCK), dtype=torch.float32, device=like.device)


def read(state: State, key: str, span: slice, *, signed: bool) -> Tensor:
    """Elements `span` as float32: the memory itself, or decoded into a new tensor. 8 bits: span starts at a block."""
    part = state[key].view(-1)[span]
    if part.dtype == torch.float32:
        return part
    scales, code = state[f"{key}_absmax"][_blocks(span)], _code(signed, part.device)
    return _codec().dequantize_blockwise(part, absmax=scales, code=code, blocksize=BLOCK)


def write(state: State, key: str, span: slice, value: Tensor, *, signed: bool) -> None:
    """Put back what `read` gave after a change; nothing to do for float32."""
    part = state[key].view(-1)[span]
    if part.dtype == torch.float32:
        return
    codes, how = _codec().quantize_blockwise(value, code=_code(signed, part.device), blocksize=BLOCK)
    part.copy_(codes)
    state[f"{key}_absmax"][_blocks(span)].copy_(how.absmax)


def _blocks(span: slice) -> slice:
    assert span.start % BLOCK == 0
    return slice(span.start // BLOCK, -(-span.stop // BLOCK))
