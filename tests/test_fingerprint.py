"""Fingerprint: equal to its definition at every chunk size and layout, and different for every difference."""

from __future__ import annotations

import hashlib

import pytest
import torch

from smidgen import fingerprint
from smidgen.fingerprint import state_sha256


def naive(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}\n{str(tensor.dtype)[6:]}\n{list(tensor.shape)}\n".encode())
        digest.update(bytes(tensor.flatten().view(torch.uint8).tolist()))
    return digest.hexdigest()


@pytest.mark.parametrize("chunk", [1, 7, 64 * 2**20])
def test_hash_equals_its_definition(chunk, monkeypatch):
    monkeypatch.setattr(fingerprint, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(5, 6, 3, generator=generator)
    tensors = {
        "b": base,
        "a": base.to(torch.bfloat16),
        "strided": base[:, ::2],
        "transposed": base.transpose(0, 2),
        "column": base[:, 0, 0],
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "mask": torch.tensor([True, False]),
    }
    assert state_sha256(tensors) == naive(tensors)
    assert state_sha256(dict(reversed(tensors.items()))) == naive(tensors)


def test_hash_sees_every_difference():
    base = {"a": torch.zeros(4, 2)}
    others = [{"b": base["a"]}, {"a": torch.zeros(2, 4)}, {"a": base["a"].half()}, {"a": -base["a"]}, {}]
    assert len({state_sha256(tensors) for tensors in [base, *others]}) == 6  # -0.0 too: bits, not values
