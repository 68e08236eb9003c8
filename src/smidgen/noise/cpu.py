"""Noise for CPU tensors: numba kernels that give the bits of `philox`, in one pass over the weights.

One kernel does it all: out <- round(decay * weight + sum(scale * z)) for any mixture of float32, bfloat16 and float16,
over any range of elements. It works on tiles of 2048 elements that stay in the first-level cache: widen, add the terms,
narrow; float32 weights with one term, the common case, go from memory to memory directly. Vectors are explicit (see
`lanes`), so the speed does not hang on LLVM's loop vectoriser. Two consecutive blocks are never computed twice, except
where a range starts or ends inside a tile.

Cost: no memory besides 9 KB of stack a thread; bound by memory bandwidth for Rademacher (figures: benchmarks/noise.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numba
import numpy as np
import torch
from numba import float32, float64, int64, njit, prange, types, uint32
from torch import Tensor

from smidgen.noise import lanes, philox
from smidgen.noise.lanes import (
    as_f,
    as_u,
    copy,
    halves,
    interleave,
    lane_numbers,
    load_f,
    load_i64,
    load_u16,
    load_word,
    multiply,
    scratch,
    sign_shift_23,
    signed_to_f,
    splat_f,
    splat_u,
    sqrt,
    store_f,
    store_u,
    store_u16,
    truncate_to_u,
    where,
)
from smidgen.noise.philox import COS, INCREMENTS, LOG, MULTIPLIERS, ROUNDS, SIN, SQRT_HALF_BITS, TWO_LN2, Address, Term

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLOAT32, BFLOAT16 = 0, 1
DISTRIBUTIONS = {"rademacher": 0, "gaussian": 1}
RADEMACHER = 0
NO_TERMS = np.empty((0, 6))
NEAREST = np.empty(0)

GROUP = 128  # elements of a Rademacher block: the grain of all loops
TILE = 16 * GROUP  # what one vector of 16 Rademacher blocks covers

M0, M1 = MULTIPLIERS
STEP0, STEP1 = INCREMENTS


@njit
def blocks16(first, counter, key):
    """Philox words of blocks first .. first + 15: four vectors."""
    c1, c2, c3 = counter
    k0, k1 = key
    a, b, c, d = lane_numbers() + first, splat_u(c1), splat_u(c2), splat_u(c3)
    for _ in range(ROUNDS):
        high0, low0 = multiply(a, M0)
        high1, low1 = multiply(c, M1)
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = uint32(k0 + STEP0), uint32(k1 + STEP1)
    return a, b, c, d


@njit
def normals(a, b):
    """Box-Muller on two vectors of words: the operations of philox.normals, in its order."""
    x = signed_to_f(a >> 1) + 0.5
    bits = as_u(x)
    above = bits - SQRT_HALF_BITS
    f = as_f(bits - (above & 0xFF800000)) - 1.0
    log = f * LOG[7] + LOG[6]
    log = log * f + LOG[5]
    log = log * f + LOG[4]
    log = log * f + LOG[3]
    log = log * f + LOG[2]
    log = log * f + LOG[1]
    log = log * f + LOG[0]
    halvings = signed_to_f(splat_u(31) - sign_shift_23(above))
    r = sqrt(halvings * TWO_LN2 + (f * f * log - f * 2.0))

    y = signed_to_f(b << 2 | 2) * 2.0**-31
    v = y * y
    s = v * SIN[3] + SIN[2]
    s = s * v + SIN[1]
    s = s * v + SIN[0]
    s = y * s
    c = v * COS[3] + COS[2]
    c = c * v + COS[1]
    c = c * v + COS[0]
    c = v * c + 1.0
    c = as_f(as_u(c) ^ (b << 1 & 0x80000000))
    swap = b > 0x7FFFFFFF
    return r * where(swap, s, c), r * where(swap, c, s)


@njit
def add_rademacher(out, weight, groups, first, decay, scale, counter, key, words):
    """out <- decay * weight + scale * z over whole blocks of float32 values; `words`: scratch for 64 words."""
    a, b, c, d = interleave(*blocks16(first, counter, key))
    store_u(words, a)
    store_u(words + 64, b)
    store_u(words + 128, c)
    store_u(words + 192, d)
    plus = as_u(splat_f(scale))
    low, high = splat_u(31) - lane_numbers(), splat_u(15) - lane_numbers()  # shifts that bring a bit to the sign
    for i in range(4 * groups):
        w = load_word(words + 4 * i)
        at = 128 * i  # bytes of 32 elements
        store_f(out + at, load_f(weight + at) * decay + as_f((w << low & 0x80000000) ^ plus))
        at += 64
        store_f(out + at, load_f(weight + at) * decay + as_f((w << high & 0x80000000) ^ plus))


@njit
def add_gaussian(out, weight, groups, first, decay, scale, counter, key):
    """The same with normal values, 16 blocks of 4 at a time; `first`: block of the first element."""
    for i in range(2 * groups):
        a, b, c, d = blocks16(uint32(first + 16 * i), counter, key)
        z0, z1 = normals(a, b)
        z2, z3 = normals(c, d)
        z0, z1, z2, z3 = interleave(z0, z1, z2, z3)
        at = 256 * i  # bytes of 64 elements
        store_f(out + at, load_f(weight + at) * decay + z0 * scale)
        store_f(out + at + 64, load_f(weight + at + 64) * decay + z1 * scale)
        store_f(out + at + 128, load_f(weight + at + 128) * decay + z2 * scale)
        store_f(out + at + 192, load_f(weight + at + 192) * decay + z3 * scale)


@njit
def from_bfloat16(h):
    return as_f(h << 16)


@njit
def from_float16(h):
    sign, magnitude = (h & 0x8000) << 16, h & 0x7FFF
    normal = (magnitude << 13) + 0x38000000  # exponent bias 15 -> 127
    subnormal = as_u(signed_to_f(magnitude) * 2.0**-24)
    finite = where(magnitude < 0x0400, subnormal, normal)
    return as_f(where(magnitude > 0x7BFF, normal + 0x38000000, finite) | sign)


@njit
def shift(magnitude, by, noise, stochastic):
    """magnitude / 2^by, rounded by random bits or to nearest even."""
    if stochastic:
        return (magnitude + noise) >> by
    return (magnitude + ((magnitude >> by & 1) + ((1 << (by - 1)) - 1))) >> by


@njit
def to_bfloat16(x, noise, stochastic):
    pattern = as_u(x)
    magnitude = pattern & 0x7FFFFFFF
    half = where(magnitude > 0x7F800000, 0x7FC0, shift(magnitude, 16, noise, stochastic))
    return pattern >> 16 & 0x8000 | half


@njit
def to_float16(x, noise, stochastic):
    pattern = as_u(x)
    magnitude = pattern & 0x7FFFFFFF
    small = as_f(where(magnitude < 0x38800000, magnitude, 0))  # below 2^-14
    if stochastic:
        subnormal = (truncate_to_u(small * 2.0**40) + noise) >> 16
        noise = noise >> 3
    else:
        subnormal = as_u(small * 2.0**24 + 2.0**23) - 0x4B000000
    normal = shift(magnitude, 13, noise, stochastic) - 0x1C000
    half = where(magnitude < 0x38800000, subnormal, normal)
    half = where(magnitude > 0x477FFFFF, 0x7C00, where(half > 0x7C00, 0x7C00, half))
    return pattern >> 16 & 0x8000 | where(magnitude > 0x7F800000, 0x7E00, half)


@njit
def widen(out, weight, kind, groups, decay):
    """float32 out <- decay * weight."""
    if kind == FLOAT32:
        for i in range(8 * groups):
            store_f(out + 64 * i, load_f(weight + 64 * i) * decay)
    elif kind == BFLOAT16:
        for i in range(8 * groups):
            store_f(out + 64 * i, from_bfloat16(load_u16(weight + 32 * i)) * decay)
    else:
        for i in range(8 * groups):
            store_f(out + 64 * i, from_float16(load_u16(weight + 32 * i)) * decay)


@njit
def narrow_nearest(out, kind, value, groups):
    """out <- float32 value in 16 bits, to nearest even."""
    none = splat_u(0)
    if kind == BFLOAT16:
        for i in range(8 * groups):
            store_u16(out + 32 * i, to_bfloat16(load_f(value + 64 * i), none, False))
    else:
        for i in range(8 * groups):
            store_u16(out + 32 * i, to_float16(load_f(value + 64 * i), none, False))


@njit
def narrow_stochastic(out, kind, value, groups, first, counter, key):
    """The same by the rounding bits of 16 blocks of 8 elements at a time; `first`: block of the first element."""
    for i in range(groups):
        words = interleave(*blocks16(uint32(first + 16 * i), counter, key))
        for j in range(4):
            low, high = halves(words[j])
            at = 8 * i + 2 * j
            x, y = load_f(value + 64 * at), load_f(value + 64 * at + 64)
            if kind == BFLOAT16:
                store_u16(out + 32 * at, to_bfloat16(x, low, True))
                store_u16(out + 32 * at + 32, to_bfloat16(y, high, True))
            else:
                store_u16(out + 32 * at, to_float16(x, low, True))
                store_u16(out + 32 * at + 32, to_float16(y, high, True))


@njit
def words_of(row):
    """Counter and key from (seed low, seed high, tensor, step, query | purpose)."""
    return (uint32(row[2]), uint32(row[3]), uint32(row[4])), (uint32(row[0]), uint32(row[1]))


@njit
def whole_groups(out, out_kind, weight, weight_kind, groups, number, decay, distribution, terms, at, value, words):
    """Elements number .. number + 128 * groups, number a multiple of 128, groups <= 16; `value`: scratch for a tile."""
    if out_kind == FLOAT32:
        value = out
    source, factor = weight, decay
    if weight_kind != FLOAT32 or len(terms) == 0:
        widen(value, weight, weight_kind, groups, decay)
        source, factor = value, float32(1)
    for k in range(len(terms)):
        counter, key = words_of(terms[k])
        scale = float32(terms[k, 5])
        if distribution == RADEMACHER:
            add_rademacher(value, source, groups, uint32(number >> 7), factor, scale, counter, key, words)
        else:
            add_gaussian(value, source, groups, uint32(number >> 2), factor, scale, counter, key)
        source, factor = value, float32(1)
    if out_kind != FLOAT32:
        if len(at) == 0:
            narrow_nearest(out, out_kind, value, groups)
        else:
            counter, key = words_of(at)
            narrow_stochastic(out, out_kind, value, groups, uint32(number >> 3), counter, key)


@njit
def any_range(out, out_kind, weight, weight_kind, count, number, decay, distribution, terms, at):
    """Elements number .. number + count, wherever they start and end: a part of a group goes through a copy of it."""
    value, words, target, source = scratch(8192), scratch(256), scratch(512), scratch(512)
    out_size = 4 if out_kind == FLOAT32 else 2
    weight_size = 4 if weight_kind == FLOAT32 else 2
    i = 0
    while i < count:
        to, frm = out + i * out_size, weight + i * weight_size
        skip = (number + i) & 127
        if skip == 0 and count - i >= GROUP:
            groups = min(16, (count - i) >> 7)
            whole_groups(
                to, out_kind, frm, weight_kind, groups, number + i, decay, distribution, terms, at, value, words
            )
            i += groups * GROUP
        else:
            n = min(GROUP - skip, count - i)
            copy(source + skip * weight_size, frm, n * weight_size)
            base = number + i - skip
            whole_groups(target, out_kind, source, weight_kind, 1, base, decay, distribution, terms, at, value, words)
            copy(to, target + skip * out_size, n * out_size)
            i += n
