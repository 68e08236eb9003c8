"""What the Triton kernel becomes for a GPU, looked at without one: it compiles, and nothing in it is fused or approximate."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from smidgen.noise import cuda, cuda_many

def compiled(kernel, constants, kinds):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm

def code(out, weight, rows, gaussian, stochastic, keep, terms):
    constants = dict(OUT_KIND=out, WEIGHT_KIND=weight, ROWS=rows, GAUSSIAN=gaussian, STOCHASTIC=stochastic, KEEP=keep)
    constants |= dict(TERMS=terms, BLOCK=cuda.BLOCK)
    values = ["*fp32", "*i16"]
    kinds = {"out": values[out > 0], "weight": values[weight > 0], "rows": "*i64", "bits": "*u8"}
    kinds["table"] = "*i32" if terms >= cuda.MORE else kinds["out"]  # a stand-in where nothing is read from it
    kinds |= {"decay": "fp32", "scale": "fp32"}
    return compiled(cuda._kernel, constants, kinds)

def many(out, weight, gaussian, stochastic, even, held):
    constants = dict(OUT_KIND=out, WEIGHT_KIND=weight, GAUSSIAN=gaussian, STOCHASTIC=stochastic, EVEN=even)
    constants |= dict(HELD=held, WORDS=cuda_many.RECORD, BLOCK=cuda.BLOCK)
    record = "*i32" if held else "*i64"  # a stand-in where nothing is read from it
    return compiled(cuda_many._many, constants, {"records": "*i64", "record": record, "scale": "fp32"})

one, more, held = cuda.ONE, cuda.MORE, cuda.HELD
variants = [(0, 0, False, True, False, cuda.DRAWN, more), (2, 2, True, False, True, cuda.PACKED, one)]
variants += [(1, 1, True, False, False, cuda.ALL, held), (0, 0, False, True, False, cuda.ALL, held)]
for variant in variants:
    asm = code(*variant)
    assert len(asm["cubin"]) > 1000
    assert not re.search(r"fma\\.|\\.approx|\\.ftz", asm["ptx"]), variant
    assert "sqrt.rn.f32" in asm["ptx"] or not variant[3]
variants = [(0, 0, True, False, True, False), (1, 1, False, True, True, False), (2, 2, True, True, False, False)]
variants += [(1, 1, False, False, True, True), (2, 0, True, False, False, True)]
for variant in variants:
    asm = many(*variant)
    assert not re.search(r"fma\\.|\\.approx|\\.ftz", asm["ptx"]), variant
    assert ("ld.global.v4.b32" in asm["ptx"]) == variant[4], "whole vectors are read where tensors allow it"
print("fine")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernel_compiles_for_a_gpu_without_contraction(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "fine", done.stderr
