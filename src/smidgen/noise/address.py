"""Where noise lives: a term's address and scale, as numbers and as words in memory."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Address:
    """Where noise lives. Together with an element number it determines one value; nothing else does.

    Raises ValueError when a field does not fit its bits.
    """

    seed: int  # 64 bits: the run
    tensor: int  # 32 bits: stable hash of the tensor's name
    step: int  # 32 bits
    query: int  # 24 bits
    purpose: int  # 8 bits: PROBE, ROUND, ...

    def __post_init__(self) -> None:
        if not (
            0 <= self.seed < 1 << 64
            and 0 <= self.tensor < 1 << 32
            and 0 <= self.step < 1 << 32
            and 0 <= self.query < 1 << 24
            and 0 <= self.purpose < 1 << 8
        ):
            raise ValueError(f"{self} is out of range: seed has 64 bits, tensor and step 32, query 24, purpose 8")

    @property
    def words(self) -> tuple[int, int, int, int, int]:
        """Key and last three counter words: seed low, seed high, tensor, step, query << 8 | purpose."""
        return self.seed & _32, self.seed >> 32, self.tensor, self.step, self.query << 8 | self.purpose


Term = tuple[Address, float]


def signed(words: Sequence[int]) -> list[int]:
    """32-bit words as int32, the type that Triton gives to small numbers."""
    return [word - (word >> 31 << 32) for word in words]


def float_bits(scale: float) -> int:
    """The pattern of a float32 as int32."""
    return struct.unpack("<i", struct.pack("<f", scale))[0]  # type: ignore[no-any-return]


def record(address: Address, scale: float) -> list[int]:
    """A term as six int32: the words of its address, the pattern of its scale."""
    return [*signed(address.words), float_bits(scale)]


@dataclass(frozen=True, slots=True)
class Held:
    """One term whose address, but for the tensor, and whose scale stand in memory, where a captured CUDA graph reads them.

    record: int32 [6] on the device of the weights; see `record`.
    """

    record: Tensor
    tensor: int = 0

    def put(self, address: Address, scale: float) -> None:
        """Change what the record says, in the order of the device's work."""
        self.record.copy_(torch.tensor(record(address, scale), dtype=torch.int32), non_blocking=True)

    def term(self) -> Term:
        """The term as numbers: waits for the device."""
        seed_low, seed_high, _, step, use = (word & _32 for word in self.record[:5].tolist())
        address = Address(seed_high << 32 | seed_low, self.tensor, step, use >> 8, use & 0xFF)
        return address, float(self.record[5:].view(torch.float32))
