"""The compiled projections against their twin, at odd shapes, in all dtypes; Triton's in its interpreter where no GPU is."""

from __future__ import annotations

import sys

import pytest
import torch

from smidgen.activations import _projection
from smidgen.activations._projection import Projection, address

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (7, 12, 4, 3), (37, 13, 5, 3), (33, 301, 2, 151), (0, 12, 4, 3)]  # tokens, width, groups, size


def made(shape, dtype, per_group, device="cpu"):
    tokens, width, groups, size = shape
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    found = Projection("layer", width, groups, size)
    found.choose(x, None, "random", per_group, address(3, 5))
    return x, found


def agree(kernel, x, found):
    z, twin = kernel.project(x, found.v, found.groups), found._twin(x)
    assert z.dtype == x.dtype == twin.dtype and z.shape == twin.shape
    near = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[x.dtype]
    return torch.allclose(z.double(), twin.double(), atol=near, rtol=near)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numba_agrees_with_the_twin(shape, per_group, dtype):
    from smidgen.activations import _projection_cpu as kernel

    if dtype in kernel.KINDS:
        assert agree(kernel, *made(shape, dtype, per_group))


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_agrees_with_the_twin(shape, per_group, dtype):
    from smidgen.activations import _projection_cuda as kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert agree(kernel, *made(shape, dtype, per_group, device))


def test_large_inputs_with_several_vectors_take_the_kernel(monkeypatch):
    taken = []
    monkeypatch.setattr(_projection, "_kernel", lambda *kind: taken.append(kind))
    for per_group in (True, False):
        x, found = made((8, 16, 4, 4), torch.float32, per_group)
        found.project(x)
        found.project(x.expand(1 << 13, -1, -1).contiguous())
    assert taken == [("cpu", torch.float32)]
