"""The Triton kernel of single entries of dW against its twin, at odd shapes, in all dtypes; in Triton's interpreter where no
GPU is. The other ways: test_spiel.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from smidgen import noise
from smidgen.adapt import _sparse_gradient
from smidgen.adapt._support import random_support

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

ON = "cuda" if torch.cuda.is_available() else "cpu"
NEAR = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}  # of the size of a sum; both sum in float32


def factors(tokens, rows, columns, dtype):
    draw = torch.Generator().manual_seed(1)
    return tuple(torch.randn(tokens, n, generator=draw).to(ON, dtype) for n in (rows, columns))


@pytest.mark.parametrize("tokens,rows,columns", [(1, 1, 1), (5, 3, 200), (33, 70, 65), (64, 130, 9)])
@pytest.mark.parametrize("dtype", NEAR)
def test_tiles_give_the_entries_of_the_dense_product(tokens, rows, columns, dtype):
    from smidgen.adapt._sparse_gradient_cuda import entries

    left, right = factors(tokens, rows, columns, dtype)
    dense = (left.double().t() @ right.double()).flatten()
    size = rows * columns
    for count in sorted({1, -(-size // 50), size}):
        index = random_support(noise.Address(0, 0, 0, 0, 0), size, count, ON)
        for positions in (index, index.int()):
            found = entries(left, right, positions)
            assert found.dtype == torch.float32 and found.shape == (count,)
            assert torch.allclose(found.double(), dense[index], rtol=NEAR[dtype], atol=NEAR[dtype] * tokens**0.5)


def test_factors_may_have_any_strides():
    from smidgen.adapt._sparse_gradient_cuda import entries

    left, right = factors(24, 40, 33, torch.float32)
    index = torch.arange(0, 40 * 33, 7, device=ON)
    straight = entries(left, right, index)
    assert torch.equal(straight, entries(left.t().contiguous().t(), right[:, :33], index))
    padded = torch.cat([right, right], 1)[:, :33]
    assert not padded.is_contiguous() and torch.equal(straight, entries(left, padded, index))


def test_it_is_taken_on_cuda_alone(monkeypatch):
    """float64 keeps the twin, and so does a machine without Triton."""
    from smidgen.adapt import _sparse_gradient_cuda as kernel

    class Elsewhere:
        """A factor on a CUDA device, as far as the choice is concerned."""

        device = torch.device("cuda")
        shape = (2, 4)

        def __init__(self, dtype):
            self.dtype = dtype

    taken = []
    monkeypatch.setattr(kernel, "entries", lambda *_: taken.append("tiles"))
    monkeypatch.setattr(_sparse_gradient, "gathered", lambda *_: taken.append("blocks"))
    index = torch.arange(3)
    for dtype in (torch.bfloat16, torch.float64):
        _sparse_gradient.products(Elsewhere(dtype), Elsewhere(dtype), index)
    monkeypatch.setattr(_sparse_gradient, "_triton", lambda: False)
    _sparse_gradient.products(Elsewhere(torch.bfloat16), Elsewhere(torch.bfloat16), index)
    assert taken == ["tiles", "blocks", "blocks"]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from smidgen.adapt import _sparse_gradient_cuda as ours

def code(kind, precision):
    names = ours._kernel.arg_names
    constants = {name: getattr(ours, name) for name in ("ROWS", "COLUMNS", "TOKENS", "ENTRIES")}
    constants |= dict(PRECISION=precision, WIDEN=False)
    kinds = {"left": "*" + kind, "right": "*" + kind, "index": "*i32", "cuts": "*i64", "out": "*fp32"}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    source = ASTSource(fn=ours._kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm

assert len(code("fp32", "ieee")["cubin"]) > 1000
ptx = code("bf16", "ieee")["ptx"]
assert "mma" in ptx and "atom" not in ptx
print("fine")
"""


def test_the_kernel_compiles_for_a_gpu_and_multiplies_on_tensor_cores(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "fine", done.stderr
