"""All backends give the bits of the definition, whatever the dtype, the range, the number of terms and of threads."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_definition import KNOWN

from smidgen import noise
from smidgen.noise import Address

BACKENDS = ["torch", "numba"]
if sys.platform == "linux":
    BACKENDS.append("triton")
COMPILED = BACKENDS[1:]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DISTRIBUTIONS = ["rademacher", "gaussian"]
ON = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton works; in its interpreter otherwise
AT = Address(seed=2**63 + 1, tensor=2**32 - 1, step=3, query=4, purpose=noise.ROUND)


def terms(k: int) -> list[noise.Term]:
    """k terms with words on both sides of 2^31."""
    return [(Address(2**64 - 1 - i, 2**31 + i, i, i, noise.PROBE), 0.003 * (i + 1) / 7) for i in range(k)]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)


def run(backend: str, operation, *tensors: torch.Tensor, **options) -> torch.Tensor:
    """The first tensor after the operation, which works on copies."""
    copies = [t.to(ON, copy=True) if backend == "triton" else t.clone() for t in tensors]
    with noise.use(backend):
        operation(*copies, **options)
    return copies[0].cpu()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_integer_stream_is_random123s(backend, counter, key, words):
    block, tensor, step, use = counter
    address = Address(key[0] | key[1] << 32, tensor, step, use >> 8, use & 0xFF)
    signs = run(
        backend,
        noise.displace_,
        torch.empty(128),
        torch.zeros(128),
        terms=[(address, 1.0)],
        distribution="rademacher",
        start=block * 128,
    )
    assert tuple(sum(int(s < 0) << i for i, s in enumerate(signs[32 * w : 32 * w + 32])) for w in range(4)) == words


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_values_are_the_samples(backend, distribution):
    (term,) = terms(1)
    out = run(backend, noise.accumulate_, torch.zeros(517), terms=[(term[0], 1.0)], distribution=distribution, start=1234567)
    assert same_bits(out, noise.sample(term[0], distribution, 517, start=1234567))


# Sizes and starts around the grain of 128, the tile of 2048 and a torch chunk; Triton's interpreter gets small ones.
RANGES = [(1, 0), (7, 3), (127, 1), (128, 128), (129, 0), (300, 127), (2048, 0), (2500, 77), (5001, 4095), (70001, 2**33 + 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("decay", [1.0, 0.97])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_update(dtype, distribution, k, decay, rounding):
    options = {"terms": terms(k), "distribution": distribution, "decay": decay, "rounding": rounding, "at": AT}
    for count, start in RANGES if k == 1 else RANGES[::4]:
        weight = values(count, dtype=dtype)
        expected = run("torch", noise.update_, weight, start=start, **options)
        assert same_bits(run("numba", noise.update_, weight, start=start, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("k", "decay", "rounding"), [(0, 0.97, "stochastic"), (1, 1.0, "nearest"), (3, 0.97, "stochastic")])
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is for Linux")
def test_update_by_triton(dtype, distribution, k, decay, rounding):
    options = {"terms": terms(k), "distribution": distribution, "decay": decay, "rounding": rounding, "at": AT}
    for count, start in [(1, 0), (2500, 77), (130, 2**33 + 1)]:
        weight = values(count, dtype=dtype)
        expected = run("torch", noise.update_, weight, start=start, **options)
        assert same_bits(run("triton", noise.update_, weight, start=start, **options), expected)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_displace(backend, dtype, distribution):
    weight = values(37, 61, dtype=dtype)
    for k in (0, 1, 3):
        for out_dtype in {dtype, torch.float32}:
            out = torch.full((37, 61), 7.0, dtype=out_dtype)
            options = {"terms": terms(k), "distribution": distribution, "start": 5}
            expected = run("torch", noise.displace_, out, weight, **options)
            assert same_bits(run(backend, noise.displace_, out, weight, **options), expected)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("width", [1, 61, 128, 2100])
def test_displace_rows(backend, dtype, distribution, width):
    weight, rows = values(19, width, dtype=dtype), torch.tensor([18, 0, 7, 7, 1])
    for k in (1, 3):
        options = {"terms": terms(k), "distribution": distribution}
        expected = run("torch", noise.displace_rows_, torch.empty(5, width, dtype=dtype), weight, rows, **options)
        assert same_bits(
            run(backend, noise.displace_rows_, torch.empty(5, width, dtype=dtype), weight, rows, **options), expected
        )
    whole = run("torch", noise.displace_, torch.empty_like(weight), weight, **options)
    assert same_bits(expected, whole[rows])


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_accumulate(backend, distribution):
    out = values(331)
    for k in (1, 3):
        options = {"terms": terms(k), "distribution": distribution, "start": 9}
        assert same_bits(run(backend, noise.accumulate_, out, **options), run("torch", noise.accumulate_, out, **options))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_write(backend, dtype, rounding):
    scales = 2.0 ** torch.arange(-160, 140, dtype=torch.float64)  # subnormal, normal and infinite in every type
    value = (values(9, 300).double() * 50 * scales).float()
    options = {"rounding": rounding, "at": AT, "start": 3}
    expected = run("torch", noise.write_, torch.empty(9, 300, dtype=dtype), value, **options)
    assert same_bits(run(backend, noise.write_, torch.empty(9, 300, dtype=dtype), value, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_bit_pattern_of_a_weight(dtype, distribution):
    """Widening is right for all numbers, subnormal ones and infinities too."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    weight = patterns.to(torch.int16).view(dtype) if dtype != torch.float32 else (patterns * 65537).view(dtype)
    weight = weight[~weight.isnan()].clone()
    for scale in (0.0, 1e-7, 3e38):
        options = {"terms": [(terms(1)[0][0], scale)], "distribution": distribution, "at": AT}
        got, expected = run("numba", noise.update_, weight, **options), run("torch", noise.update_, weight, **options)
        assert torch.equal(got.nan_to_num(17.0, 18.0, 19.0), expected.nan_to_num(17.0, 18.0, 19.0))
        assert torch.equal(got.isnan(), expected.isnan())


def test_float64_goes_through_the_twin():
    weight = values(257, dtype=torch.float64)
    out = run("numba", noise.update_, weight, terms=terms(2), distribution="gaussian", decay=0.5, at=AT, start=5)
    expected = 0.5 * weight
    for address, scale in terms(2):
        expected += noise.sample(address, "gaussian", 257, start=5) * torch.tensor(scale).double()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_does_not_matter(distribution, dtype):
    """Large enough for the team; the end, the start and the chunks are ragged."""
    weight, before = values(1_100_003, dtype=dtype), torch.get_num_threads()
    matrix, rows = values(3000, 501, dtype=dtype), torch.arange(0, 6000, 2) % 3000
    options = {"terms": terms(1), "distribution": distribution}
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            flat = run("numba", noise.update_, weight, start=77, at=AT, **options)
            results.append((flat, run("numba", noise.displace_rows_, torch.empty_like(matrix), matrix, rows, **options)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    expected = run("torch", noise.update_, weight[-999:], start=77 + len(weight) - 999, at=AT, **options)
    assert torch.equal(results[0][0][-999:], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_around_the_range_stay(backend):
    whole = values(5000)
    for first, last in [(1, 4999), (129, 700), (2000, 2003)]:
        copy = whole.to(ON, copy=True) if backend == "triton" else whole.clone()
        with noise.use(backend):
            noise.update_(copy[first:last], terms(1), "rademacher", at=AT, start=first)
        copy = copy.cpu()
        assert torch.equal(copy[:first], whole[:first])
        assert torch.equal(copy[last:], whole[last:])
        assert not torch.equal(copy[first:last], whole[first:last])


def test_global_generators_are_untouched():
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    weight = values(300, dtype=torch.bfloat16)
    for backend in BACKENDS:
        for distribution in DISTRIBUTIONS:
            run(backend, noise.update_, weight, terms=terms(2), distribution=distribution, at=AT)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_parameters_are_written_in_place_and_their_version_counts(backend):
    parameter = torch.nn.Parameter(values(300))
    place, version = parameter.data_ptr(), parameter._version
    with noise.use(backend):
        noise.update_(parameter, terms(1), "rademacher", at=AT)
    assert parameter.data_ptr() == place and parameter._version > version and parameter.requires_grad
    with torch.inference_mode(), noise.use(backend):
        noise.update_(values(300), terms(1), "rademacher", at=AT)


def test_scales_are_rounded_to_float32_first():
    (address, _), scale = terms(1)[0], 1 / 3
    out = run("numba", noise.displace_, torch.empty(64), torch.zeros(64), terms=[(address, scale)], distribution="rademacher")
    assert set(out.abs().tolist()) == {torch.tensor(scale).item()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: noise.update_(w.T, terms(1), "rademacher", at=AT), "contiguous"),
        (lambda w: noise.displace_(torch.empty(6, 4).T, w, terms(1), "rademacher"), "contiguous"),
        (lambda w: noise.displace_(torch.empty(24), w, terms(1), "rademacher"), "shape"),
        (lambda w: noise.update_(w.long(), terms(1), "rademacher", at=AT), "int64"),
        (lambda w: noise.update_(w, terms(1), "cauchy", at=AT), "cauchy"),
        (lambda w: noise.update_(w, terms(1), "rademacher", at=AT, rounding="up"), "up"),
        (lambda w: noise.update_(w, terms(1), "gaussian", at=AT, start=4 << 32), r"2\^32"),
        (lambda w: noise.update_(w, terms(1), "gaussian", at=AT, start=-1), r"2\^32"),
        (lambda w: noise.update_(w, terms(1), "rademacher", at=AT, start=8 << 32), r"2\^32"),
        (lambda w: noise.accumulate_(w.half(), terms(1), "rademacher"), "float32"),
        (lambda w: noise.write_(w, w.half(), rounding="nearest", at=AT), "float32"),
        (lambda w: noise.displace_rows_(w, w, torch.tensor([0]), terms(1), "rademacher"), "fit"),
        (lambda w: noise.use("numpy").__enter__(), "numpy"),
    ],
)
def test_what_is_not_supported_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(values(4, 6))


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("row", [-1, 4])
def test_rows_that_do_not_exist_are_refused(backend, row):
    if backend == "torch" and row == -1:
        pytest.skip("torch counts rows from the end")
    with noise.use(backend), pytest.raises(IndexError):
        noise.displace_rows_(torch.empty(1, 6), values(4, 6), torch.tensor([row]), terms(1), "rademacher")


def test_nothing_to_do():
    for backend in BACKENDS:
        assert run(backend, noise.update_, torch.empty(0), terms=terms(1), distribution="gaussian", at=AT).shape == (0,)
        no_rows = torch.empty(0, dtype=torch.int64)
        assert run(
            backend, noise.displace_rows_, torch.empty(0, 6), values(4, 6), no_rows, terms=[], distribution="gaussian"
        ).shape == (0, 6)


def python(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compilers_load_on_use_and_a_missing_one_is_said_once():
    out = python(
        """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
import torch
before = set(sys.modules)
from smidgen import noise
assert not {"numba", "llvmlite"} & set(sys.modules)
assert not {m for m in set(sys.modules) - before if m.split(".")[0] == "triton"}
sys.modules["numba"] = None
w = torch.zeros(5)
at = noise.Address(1, 2, 3, 4, noise.ROUND)
for _ in range(2):
    noise.update_(w, [(noise.Address(1, 2, 3, 4, noise.PROBE), 1.0)], "rademacher", at=at)
assert set(w.tolist()) <= {-2.0, 0.0, 2.0}
print(noise.backend("cpu"))
"""
    )
    line, name = out.splitlines()
    assert "times slower" in line and "numba" in line and name == "torch"


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is for Linux")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("updates", "held"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("sizes", [(2048, 16, 4112), (1, 5001, 37, 300, 0)])
def test_many_tensors_in_one_launch_have_the_bits_of_each_alone(distribution, updates, held, sizes, monkeypatch):
    """Tensors of three dtypes, on and off the grain, one of them beside a multiple of 16 bytes."""
    from smidgen.noise import cuda, cuda_many

    launches = []
    apply_ = cuda.apply_
    monkeypatch.setattr(cuda, "apply_", lambda *args: (launches.append(args[0].numel()), apply_(*args)))
    (z, scale), at = terms(1)[0], AT if updates else None
    for shift in (0, 1):  # the same memory once more, at another address of noise
        weights = [values(size + 1, dtype=DTYPES[i % 3]).to(ON)[:-1] for i, size in enumerate([*sizes, *sizes, *sizes])]
        weights.append(values(641).to(ON)[1:])
        outs = weights if updates else [torch.empty_like(weight) for weight in weights]
        outs[-1] = weights[-1]
        ids, decays = [2**32 - 1 - i for i in range(len(outs))], [0.97 + 0.01 * (i % 4) for i in range(len(outs))]
        z = replace(z, step=z.step + shift)
        expected = []
        for weight, tensor, decay in zip(weights, ids, decays, strict=True):
            twin, term = weight.cpu().clone(), (replace(z, tensor=tensor), scale)
            here = None if at is None else replace(at, tensor=tensor)
            with noise.use("torch"):
                if here is None:
                    noise.displace_(twin, twin, [term], distribution)
                else:
                    noise.update_(twin, [term], distribution, decay=decay, at=here)
            expected.append(twin)
        term = None
        if held:
            term = noise.Held(torch.zeros(6, dtype=torch.int32, device=ON))
            term.put(z, scale)
        given = (noise._NOWHERE, 0.0) if held else (z, scale)
        cuda_many.all_(outs, weights, ids, *given, distribution, decays if updates else None, at, noise._check, term)
        assert all(same_bits(out.cpu(), twin) for out, twin in zip(outs, expected, strict=True))
        assert launches == [640] * (shift + 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_held_term_is_the_term_that_it_was_given(backend, distribution, dtype):
    """In displacements of tensors, of rows and of many tensors; the record may change between calls."""
    record, weight = noise.Held(torch.zeros(6, dtype=torch.int32, device=ON), tensor=7), values(37, 65, dtype=dtype).to(ON)
    rows = torch.tensor([36, 0, 7, 7])
    for address, scale in [(replace(terms(1)[0][0], tensor=7), 0.3), (Address(5, 7, 2**32 - 1, 3, noise.PROBE), -2e-3)]:
        record.put(address, scale)
        assert record.term() == (address, float(torch.tensor(scale)))
        with noise.use(backend):
            outs = [torch.empty_like(weight) for _ in range(3)]
            noise.displace_(outs[0], weight, record, distribution, start=130)
            noise.displace_rows_(outs[1][: len(rows)], weight, rows.to(ON), record, distribution)
            noise.all_([outs[2]], [weight], [9], record, distribution)
        with noise.use("torch"):
            for out, operation in zip(outs, ("displace", "rows", "all"), strict=True):
                twin, here = torch.empty_like(out, device="cpu"), weight.cpu()
                if operation == "displace":
                    noise.displace_(twin, here, [(address, scale)], distribution, start=130)
                elif operation == "rows":
                    twin, out = twin[: len(rows)], out[: len(rows)]
                    noise.displace_rows_(twin, here, rows, [(address, scale)], distribution)
                else:
                    noise.displace_(twin, here, [(replace(address, tensor=9), scale)], distribution)
                assert same_bits(out.cpu(), twin), operation


@pytest.mark.parametrize("updates", [False, True])
def test_many_tensors_take_turns_where_no_launch_is_shared(updates):
    (z, scale), weights = terms(1)[0], [values(300), values(37, dtype=torch.bfloat16)]
    at, outs = AT if updates else None, [torch.empty_like(weight) for weight in weights]
    noise.all_(outs, weights, [5, 6], (z, scale), "rademacher", decays=[0.5, 1.0], at=at)
    for out, weight, tensor, decay in zip(outs, weights, [5, 6], [0.5, 1.0], strict=True):
        here = AT if at is None else replace(at, tensor=tensor)
        rounding = "nearest" if at is None else "stochastic"
        noise.update_(weight, [(replace(z, tensor=tensor), scale)], "rademacher", decay=decay, at=here, rounding=rounding)
        assert same_bits(out, weight)


@pytest.mark.parametrize("on", sorted({"cpu", ON}))
def test_many_tensors_that_do_not_fit_are_refused(on):
    ((z, scale),) = terms(1)
    square, other = torch.zeros(4, 4, device=on), torch.zeros(5, device=on)
    with pytest.raises(ValueError, match="contiguous"):
        noise.all_([square.T], [square.T], [1], (z, scale), "rademacher")
    with pytest.raises(ValueError, match="equal"):
        noise.all_([square], [other], [1], (z, scale), "rademacher")
