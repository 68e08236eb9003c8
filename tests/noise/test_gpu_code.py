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
from smidgen.noise import cuda

def code(out, weight, rows, gaussian, stochastic, keep):
    names = cuda._kernel.arg_names
    constants = dict(OUT_KIND=out, WEIGHT_KIND=weight, ROWS=rows, GAUSSIAN=gaussian, STOCHASTIC=stochastic, KEEP=keep)
    constants |= dict(TERMS=True, BLOCK=cuda.BLOCK)
    values = ["*fp32", "*i16"]
    kinds = {"out": values[out > 0], "weight": values[weight > 0], "rows": "*i64", "table": "*i32", "bits": "*u8"}
    kinds |= {"decay": "fp32", "scale": "fp32"}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    source = ASTSource(fn=cuda._kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm

for variant in [(0, 0, False, True, False, cuda.DRAWN), (2, 2, True, False, True, cuda.PACKED)]:
    asm = code(*variant)
    assert len(asm["cubin"]) > 1000
    assert not re.search(r"fma\\.|\\.approx|\\.ftz", asm["ptx"]), variant
    assert "sqrt.rn.f32" in asm["ptx"] or not variant[3]
print("fine")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernel_compiles_for_a_gpu_without_contraction(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "fine", done.stderr
