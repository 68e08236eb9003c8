"""Noise for CPU tensors: one numba kernel that gives the bits of `philox`, in one pass over the weights.

The kernel computes out <- round(decay * weight + sum(scale * z)) for any mixture of float32, bfloat16 and float16, over
any range of elements. It works on tiles of up to 2048 elements that stay in the first-level cache: widen, add the terms,
narrow; float32 weights go from memory to memory. Its stages are written in explicit vectors (see `lanes`).

Threads are those of torch: see `_team`.

Cost: 10 KB of stack a thread; memory bandwidth for Rademacher (figures: benchmarks/noise.py).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import logging
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from numba import cfunc, float32, int64, njit, types
from torch import Tensor

from smidgen.noise import lanes, philox
from smidgen.noise.address import Address, Term
from smidgen.noise.lanes import (
    F32,
    F64,
    I32,
    I64,
    Float,
    U,
    Value,
    as_f,
    as_u,
    copy,
    halves,
    int64_at,
    interleave,
    lane_numbers,
    load,
    load_f,
    load_mask,
    load_u16,
    loop,
    multiply,
    number_at,
    scratch,
    signed_shift,
    signed_to_f,
    splat,
    sqrt,
    stack,
    stage,
    store,
    store_u16,
    take,
    truncate_to_u,
    union,
    where,
)
from smidgen.noise.philox import (
    COS,
    DIGITS,
    INCREMENTS,
    LOG,
    MULTIPLIERS,
    ROUNDS,
    SIN,
    SQRT_HALF_BITS,
    TWO_LN2,
    Drawn,
    Keep,
)

log = logging.getLogger("smidgen")

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLOAT32, BFLOAT16, FLOAT16 = range(3)
DISTRIBUTIONS = {"rademacher": 0, "gaussian": 1}
RADEMACHER = 0

GROUP = 128  # elements of a Rademacher block: the grain of all loops
TILE = 16 * GROUP  # what one vector of 16 Rademacher blocks covers


def blocks16(first: Value, address: Sequence[Value], stride: int = 1) -> tuple[Value, ...]:
    """Philox words of sixteen blocks from `first` on. `address`: seed low, seed high, tensor, step, query << 8 | purpose."""
    k0, k1, b, c, d = address
    a = lane_numbers(first.builder) * stride + first
    for _ in range(ROUNDS):
        high0, low0 = multiply(a, MULTIPLIERS[0])
        high1, low1 = multiply(c, MULTIPLIERS[1])
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = k0 + INCREMENTS[0], k1 + INCREMENTS[1]
    return a, b, c, d


def address_at(record: Value) -> list[Value]:
    """The five words of an address, from float64 numbers in memory."""
    return [splat(load(record + 8 * i, F64, 8).to("fptoui", I64)) for i in range(5)]


def scale_at(record: Value) -> Value:
    """The scale of a term, which stands after its address, as float32."""
    return splat(load(record + 40, F64, 8).to("fptrunc", F32))


def horner(coefficients: Sequence[float], x: Value) -> Value:
    *rest, last = coefficients
    p = x * last + rest.pop()
    while rest:
        p = p * x + rest.pop()
    return p


def normals(a: Value, b: Value) -> tuple[Value, Value]:
    """Box-Muller on two vectors of words: the operations of philox.normals, in its order."""
    x = signed_to_f(a >> 1) + 0.5
    bits = as_u(x)
    above = bits - SQRT_HALF_BITS
    f = as_f(bits - (above & 0xFF800000)) - 1.0
    halvings = signed_to_f(31 - signed_shift(above, 23))
    r = sqrt(halvings * TWO_LN2 + (f * f * horner(LOG, f) - f * 2.0))

    y = signed_to_f(b << 2 | 2) * 2.0**-31
    v = y * y
    s = y * horner(SIN, v)
    c = v * horner(COS, v) + 1.0
    c = as_f(as_u(c) ^ (b << 1 & 0x80000000))
    swap = b > 0x7FFFFFFF
    return r * where(swap, s, c), r * where(swap, c, s)


@stage
def add_rademacher(out: Value, weight: Value, groups: Value, number: Value, decay: Float, term: Value) -> None:
    """float32 out <- decay * weight + scale * z. `number`: of the first element, a multiple of 128; at most 16 groups."""
    builder, factor = out.builder, splat(decay)
    words = scratch(builder, 256)
    for part, some in enumerate(interleave(*blocks16(splat(number >> 7), address_at(term)))):
        store(words + 64 * part, some)
    plus = as_u(scale_at(term))
    shifts = 31 - lane_numbers(builder), 15 - lane_numbers(builder)  # bring the bit of each element to the sign
    with loop(groups << 2) as i:
        w = splat(load(words + (i << 2), I32))
        for half, to_sign in enumerate(shifts):
            at = (i << 7) + 64 * half
            z = as_f((w << to_sign & 0x80000000) ^ plus)
            store(out + at, load_f(weight + at) * factor + z)


@stage
def add_gaussian(out: Value, weight: Value, groups: Value, number: Value, decay: Float, term: Value) -> None:
    """The same with normal values, 16 blocks of 4 at a time."""
    address, first = address_at(term), splat(number >> 2)
    factor, scale = splat(decay), scale_at(term)
    with loop(groups << 1) as i:
        a, b, c, d = blocks16(first + (i << 4), address)
        for part, z in enumerate(interleave(*normals(a, b), *normals(c, d))):
            at = (i << 8) + 64 * part
            store(out + at, load_f(weight + at) * factor + z * scale)


def from_bfloat16(h: Value) -> Value:
    return as_f(h << 16)


def from_float16(h: Value) -> Value:
    magnitude = h & 0x7FFF
    normal = (magnitude << 13) + (112 << 23)  # exponent bias 15 -> 127
    subnormal = as_u(signed_to_f(magnitude) * 2.0**-24)
    finite = where(magnitude < 0x0400, subnormal, normal)
    return as_f(where(magnitude > 0x7BFF, normal + (112 << 23), finite) | (h & 0x8000) << 16)


def to_bfloat16(x: Value, noise: Value | None) -> Value:
    """float32 in 16 bits: by random bits, or to nearest even. See philox.narrow."""
    pattern = as_u(x)
    magnitude = pattern & 0x7FFFFFFF
    half = where(magnitude > 0x7F800000, 0x7FC0, shift(magnitude, 16, noise))
    return pattern >> 16 & 0x8000 | half


def to_float16(x: Value, noise: Value | None) -> Value:
    """The same for float16."""
    pattern = as_u(x)
    magnitude = pattern & 0x7FFFFFFF
    small = as_f(where(magnitude > 0x387FFFFF, 0, magnitude))  # below 2^-14
    if noise is None:
        subnormal = as_u(small * 2.0**24 + 2.0**23) - 0x4B000000
    else:
        subnormal = truncate_to_u(small * 2.0**40) + noise >> 16
        noise = noise >> 3
    normal = shift(magnitude, 13, noise) - (112 << 10)
    half = where(magnitude < 0x38800000, subnormal, normal)
    half = where(half > 0x7C00, 0x7C00, half)
    return pattern >> 16 & 0x8000 | where(magnitude > 0x7F800000, 0x7E00, half)


def shift(magnitude: Value, by: int, noise: Value | None) -> Value:
    """magnitude / 2^by, rounded by the random bits or to nearest even."""
    if noise is None:
        noise = (magnitude >> by & 1) + ((1 << by - 1) - 1)
    return magnitude + noise >> by


def widener(name: str, read: Callable[[Value], Value], size: int) -> Any:
    def widen(out: Value, weight: Value, groups: Value, decay: Float) -> None:
        """float32 out <- decay * weight."""
        factor = splat(decay)
        with loop(groups << 3) as i:
            store(out + (i << 6), read(weight + i * size) * factor)

    return stage(widen, f"widen_{name}")


widen_float32 = widener("float32", load_f, 64)
widen_bfloat16 = widener("bfloat16", lambda at: from_bfloat16(load_u16(at)), 32)
widen_float16 = widener("float16", lambda at: from_float16(load_u16(at)), 32)


def narrower(name: str, convert: Callable[[Value, Value | None], Value]) -> tuple[Any, Any]:
    def nearest(out: Value, value: Value, groups: Value) -> None:
        """16-bit out <- float32 value."""
        with loop(groups << 3) as i:
            store_u16(out + (i << 5), convert(load_f(value + (i << 6)), None))

    def stochastic(out: Value, value: Value, groups: Value, number: Value, at: Value) -> None:
        """The same by the rounding bits of 16 blocks of 8 elements at a time."""
        address, first = address_at(at), splat(number >> 3)
        with loop(groups) as i:
            words = interleave(*blocks16(first + (i << 4), address))
            for part, noise in enumerate(half for w in words for half in halves(w)):
                store_u16(out + (i << 8) + 32 * part, convert(load_f(value + (i << 9) + 64 * part), noise))

    return stage(nearest, f"nearest_{name}"), stage(stochastic, f"stochastic_{name}")


nearest_bfloat16, stochastic_bfloat16 = narrower("bfloat16", to_bfloat16)
nearest_float16, stochastic_float16 = narrower("float16", to_float16)


@stage
def begin_mask(state: Value, groups: Value) -> None:
    """Elements of a tile whose uniform number equals the threshold so far: all; below it: none. Bits in vectors of words."""
    every = lane_numbers(state.builder)
    every = where(every < groups, 0xFFFFFFFF, every ^ every)
    for part in range(4):
        store(state + 64 * part, every)
        store(state + 256 + 64 * part, every ^ every)


@stage
def draw_digit(state: Value, number: Value, digit: Value, one: Value, at: Value) -> None:
    """Compare a digit of the uniform numbers with the threshold's, `one`. Bytes 512 .. 520: zero when none is equal now."""
    ones, still = splat(0 - one), []
    for part, w in enumerate(blocks16(splat((number >> 7 << 5) + digit), address_at(at), stride=DIGITS)):
        equal, below = load(state + 64 * part, U), load(state + 256 + 64 * part, U)
        store(state + 256 + 64 * part, below | equal & ones & (w ^ 0xFFFFFFFF))
        equal = equal & (w ^ ones ^ 0xFFFFFFFF)
        store(state + 64 * part, equal)
        still.append(equal)
    a, b, c, d = still
    store(state + 512, union(a | b | c | d), 8)


@stage
def end_mask(bits: Value, state: Value) -> None:
    """The bit mask of the tile: elements below the threshold."""
    for part, some in enumerate(interleave(*(load(state + 256 + 64 * part, U) for part in range(4)))):
        store(bits + 64 * part, some)


def blender(name: str, read: Callable[[Value], Value], size: int) -> Any:
    def blend(out: Value, value: Value, weight: Value, bits: Value, groups: Value) -> None:
        """float32 out <- value where the bit is set, else weight."""
        with loop(groups << 3) as i:
            kept = load_mask(bits + (i << 1))
            store(out + (i << 6), where(kept, load_f(value + (i << 6)), read(weight + i * size)))

    return stage(blend, f"blend_{name}")


blend_float32 = blender("float32", load_f, 64)
blend_bfloat16 = blender("bfloat16", lambda at: from_bfloat16(load_u16(at)), 32)
blend_float16 = blender("float16", lambda at: from_float16(load_u16(at)), 32)


# What a call hands to the kernel: float64 numbers, which hold addresses, counts and 32-bit words exactly, except NEXT: an
# int64, the first element (or row) that no thread has taken yet. The rounding address stands at AT, a mask's at KEEP_AT; the
# terms follow, each an address and a scale.
NEXT, CHUNK, COUNT, START, OUT, OUT_KIND, WEIGHT, WEIGHT_KIND = range(8)
ROWS, WIDTH, DECAY, DISTRIBUTION, STOCHASTIC, TERMS = range(8, 14)
KEEP, BITS, BITS_SIZE, THRESHOLD, SIGNIFICANT = range(14, 19)
AT, KEEP_AT = 19, 24
FIRST_TERM, TERM_SIZE = KEEP_AT + 5, 6
ALL, DRAWN, PACKED = range(3)
NO_ADDRESS = (0,) * 5


@njit
def make_mask(call, kind, number, groups, bits, state):
    """The mask of a tile as bits, for elements from `number` on. `state`: scratch of 520 bytes."""
    if kind == PACKED:
        offset = number >> 3
        size = min(groups * (GROUP // 8), int64(number_at(call, BITS_SIZE)) - offset)
        copy(bits, int64(number_at(call, BITS)) + offset, size)
        return
    threshold, digits = int64(number_at(call, THRESHOLD)), int64(number_at(call, SIGNIFICANT))
    begin_mask(state, groups)
    digit = 0
    while digit < digits and (digit == 0 or int64_at(state + 512) != 0):
        draw_digit(state, number, digit, threshold >> (DIGITS - 1 - digit) & 1, call + 8 * KEEP_AT)
        digit += 1
    end_mask(bits, state)


@njit
def any_range(call, out, weight, count, number, value, target, source, bits, state):
    """Elements number .. number + count, wherever they start and end: a part of a group goes through a copy of it.

    `value`, `bits`, `state`: scratch for a tile and its mask; `target`, `source`: for a group.
    """
    out_kind, weight_kind = int64(number_at(call, OUT_KIND)), int64(number_at(call, WEIGHT_KIND))
    out_size, weight_size = 2 + 2 * (out_kind == FLOAT32), 2 + 2 * (weight_kind == FLOAT32)
    terms, distribution = int64(number_at(call, TERMS)), number_at(call, DISTRIBUTION)
    stochastic, rounding = number_at(call, STOCHASTIC) != 0, call + 8 * AT
    keep = int64(number_at(call, KEEP))
    i = 0
    while i < count:
        skip = (number + i) & (GROUP - 1)
        groups = min(count - i, TILE) // GROUP
        part = skip > 0 or groups == 0
        n = groups * GROUP
        to, from_, first = out + i * out_size, weight + i * weight_size, number + i - skip
        if part:
            n = min(GROUP - skip, count - i)
            copy(source + skip * weight_size, from_, n * weight_size)
            groups, to, from_ = 1, target, source

        whole = from_
        sums = to if out_kind == FLOAT32 and keep == ALL else value
        factor = float32(number_at(call, DECAY))
        if weight_kind != FLOAT32 or terms == 0:
            if weight_kind == FLOAT32:
                widen_float32(sums, from_, groups, factor)
            elif weight_kind == BFLOAT16:
                widen_bfloat16(sums, from_, groups, factor)
            else:
                widen_float16(sums, from_, groups, factor)
            from_, factor = sums, float32(1)
        for term in range(terms):
            record = call + 8 * (FIRST_TERM + TERM_SIZE * term)
            if distribution == RADEMACHER:
                add_rademacher(sums, from_, groups, first, factor, record)
            else:
                add_gaussian(sums, from_, groups, first, factor, record)
            from_, factor = sums, float32(1)
        if keep != ALL:
            make_mask(call, keep, first, groups, bits, state)
            blended = to if out_kind == FLOAT32 else value
            if weight_kind == FLOAT32:
                blend_float32(blended, value, whole, bits, groups)
            elif weight_kind == BFLOAT16:
                blend_bfloat16(blended, value, whole, bits, groups)
            else:
                blend_float16(blended, value, whole, bits, groups)
        if out_kind == BFLOAT16:
            if stochastic:
                stochastic_bfloat16(to, sums, groups, first, rounding)
            else:
                nearest_bfloat16(to, sums, groups)
        elif out_kind == FLOAT16:
            if stochastic:
                stochastic_float16(to, sums, groups, first, rounding)
            else:
                nearest_float16(to, sums, groups)

        if part:
            copy(out + i * out_size, target + skip * out_size, n * out_size)
        i += n


def compile_kernel(sources: int) -> Any:
    """The kernel, from numba's cache where it is there. `sources`: digest of all that its machine code depends on.

    numba looks at the kernel's own file and closure only; without the digest a change of `lanes` or of a constant in
    `philox` would run old code.
    """

    def run(call):
        _ = sources
        chunk, count, start = int64(number_at(call, CHUNK)), int64(number_at(call, COUNT)), int64(number_at(call, START))
        out, weight = int64(number_at(call, OUT)), int64(number_at(call, WEIGHT))
        rows, width = int64(number_at(call, ROWS)), int64(number_at(call, WIDTH))
        out_size = 2 + 2 * (number_at(call, OUT_KIND) == FLOAT32)
        weight_size = 2 + 2 * (number_at(call, WEIGHT_KIND) == FLOAT32)
        value, target, source, bits, state = stack(8192), stack(512), stack(512), stack(256), stack(520)
        first = take(call + 8 * NEXT, chunk)
        while first < count:
            last = min(first + chunk, count)
            # A range of the tensor is one piece, rows are one each.
            for i in range(first, last if rows else first + 1):
                to, from_, n, number = out + i * out_size, weight + i * weight_size, last - first, start + i
                if rows:
                    number = int64_at(rows + 8 * i) * width
                    to, from_, n = out + i * width * out_size, weight + number * weight_size, width
                any_range(call, to, from_, n, number, value, target, source, bits, state)
            first = take(call + 8 * NEXT, chunk)

    signature = types.void(types.int64)
    try:
        return cfunc(signature, cache=True)(run)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written
        return cfunc(signature)(run)


@functools.cache
def _kernel() -> tuple[Callable[[int], None], int, Any]:
    """The compiled kernel as a function of the address of a call, its own address, and what keeps it in memory."""
    sources = b"".join(Path(inspect.getfile(module)).read_bytes() for module in (philox, lanes))
    compiled = compile_kernel(int.from_bytes(hashlib.sha256(sources).digest()[:8]) >> 2)
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(compiled.address), compiled.address, compiled


@functools.cache
def _team() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel(function, argument, threads, 0) of the OpenMP runtime that torch itself runs on, or None.

    Torch's workers go on spinning for milliseconds after a matrix product, so any other threads fight with them for the
    cores; entering through torch's runtime, they are the workers. Measured on two cores, medians: normal noise for 768 x 768
    weights right after a product takes 255 us here, 470 us on one thread, 520 us on Python threads; numba's workqueue was
    no faster than one thread, and numba's omp layer as fast as this, because the loader happens to give it torch's runtime.
    """
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            # Looking a name up in a library searches those that it is linked to.
            enter = getattr(ctypes.CDLL(os.fspath(path)), "GOMP_parallel", None)
            if enter is not None:
                enter.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
                enter.restype = None
                return enter
    log.warning("noise runs on one thread: this build of torch has no OpenMP runtime to share")
    return None


# Up to so many elements times terms (some 50 us of work) one thread does it: entering the team costs 2 us when its workers
# are awake, 50 us when not.
SERIAL = {"rademacher": 1 << 19, "gaussian": 1 << 16}


def apply_(
    out: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    terms: Sequence[Term],
    distribution: philox.Distribution,
    decay: float,
    at: Address | None,
    start: int,
    keep: Keep | None = None,
) -> None:
    """out <- round(decay * weight + sum(scale * z)) as philox.apply_ defines it, in one pass. Never allocates a tensor."""
    if out.dtype not in KINDS or weight.dtype not in KINDS:
        philox.apply_(out, weight, rows, terms, distribution, decay, at, start, keep)
        return
    count, width, row_numbers = weight.numel(), 1, 0
    if rows is not None:
        count, width, rows = rows.numel(), weight.shape[1], rows.contiguous()
        if count:
            least, most = map(int, torch.aminmax(rows))
            if least < 0 or most >= len(weight):
                raise IndexError(f"rows {least} .. {most} are not all among the {len(weight)} of the weight")
        row_numbers = rows.data_ptr()
    threads = torch.get_num_threads()
    if count * width * max(1, len(terms)) < SERIAL[distribution]:
        threads = 1
    chunk = count if threads == 1 else -(-count // (4 * threads))
    if rows is None:
        chunk = -(-chunk // TILE) * TILE
    call = array("d", (0, chunk, count, start, out.data_ptr(), KINDS[out.dtype], weight.data_ptr(), KINDS[weight.dtype]))
    call.extend((row_numbers, width, decay, DISTRIBUTIONS[distribution], at is not None, len(terms)))
    if keep is None:
        call.extend((ALL, 0, 0, 0, 0))
    elif isinstance(keep, Drawn):
        call.extend((DRAWN, 0, 0, keep.threshold, keep.digits))
    else:
        call.extend((PACKED, keep.data_ptr(), len(keep), 0, 0))
    call.extend(NO_ADDRESS if at is None else at.words)
    call.extend(keep.address.words if isinstance(keep, Drawn) else NO_ADDRESS)
    for address, scale in terms:
        call.extend(address.words)
        call.append(scale)
    place, _ = call.buffer_info()
    run, function, _ = _kernel()
    if threads > 1 and (enter := _team()) is not None:
        enter(function, place, threads, 0)
    else:
        run(place)
