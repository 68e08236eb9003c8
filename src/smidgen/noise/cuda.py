"""Noise for CUDA (and ROCm) tensors: one Triton kernel that gives the bits of `philox`, in one pass over the weights.

The kernel computes out <- round(decay * weight + sum(scale * z)) as `philox.apply_` defines it. A program covers BLOCK
elements whose first number is a multiple of 128, so no Philox block is computed twice within a tensor; words are spread
over elements by joins and reshapes. 16-bit tensors go through integer views: conversion and rounding are integer code,
the same on every device and in Triton's interpreter. Multiplications and additions are not fused (`enable_fp_fusion`
off) and the square root is the IEEE one, so normals have the bits of the definition too.

The first term's address is passed by value; further terms are read from a small table that is copied to the device, a held
one (`noise.Held`) from its record.
Element numbers are 64-bit. With TRITON_INTERPRET=1 the kernel runs on CPU tensors, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from smidgen.noise import address, philox
from smidgen.noise.address import Address, Held, Term
from smidgen.noise.philox import Drawn, Keep

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
ALL, DRAWN, PACKED = 0, 1, 2
NONE, ONE, MORE, HELD = 0, 1, 2, 3  # terms; only with more, or a held one, is there a table
BLOCK = 2048  # elements of a program: 16 Rademacher blocks

# Triton reads module constants of this type only.
_FLOAT32, _BFLOAT16, _FLOAT16 = tl.constexpr(FLOAT32), tl.constexpr(BFLOAT16), tl.constexpr(FLOAT16)
_ALL, _DRAWN = tl.constexpr(ALL), tl.constexpr(DRAWN)
_NONE, _MORE, _HELD = tl.constexpr(NONE), tl.constexpr(MORE), tl.constexpr(HELD)
_DIGITS = tl.constexpr(philox.DIGITS)
_M0, _M1 = (tl.constexpr(m) for m in philox.MULTIPLIERS)
_STEP0, _STEP1 = (tl.constexpr(i) for i in philox.INCREMENTS)
_ROUNDS = tl.constexpr(philox.ROUNDS)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (tl.constexpr(c) for c in philox.LOG)
_S0, _S1, _S2, _S3 = (tl.constexpr(c) for c in philox.SIN)
_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in philox.COS)
_TWO_LN2, _SQRT_HALF_BITS = tl.constexpr(philox.TWO_LN2), tl.constexpr(philox.SQRT_HALF_BITS)


@triton.jit
def _word(x):
    """A 32-bit pattern as uint32."""
    return x.to(tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def _words(block, k0, k1, tensor, step, use):
    """Philox words of blocks [n] in order: uint32 [4 n]."""
    a = _word(block)
    b, c, d = a * 0 + _word(tensor), a * 0 + _word(step), a * 0 + _word(use)
    k0, k1 = _word(k0), _word(k1)
    for _ in tl.static_range(_ROUNDS):
        high0, low0 = tl.umulhi(a, a * 0 + _M0), a * _M0
        high1, low1 = tl.umulhi(c, a * 0 + _M1), c * _M1
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = k0 + _STEP0, k1 + _STEP1
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * block.shape[0],))


@triton.jit
def noise(first, k0, k1, tensor, step, use, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr):
    """z of elements first .. first + BLOCK, float32; first is a multiple of 128."""
    if GAUSSIAN:
        pairs = tl.reshape(_words((first // 4) + tl.arange(0, BLOCK // 4), k0, k1, tensor, step, use), (BLOCK // 2, 2))
        a, b = tl.split(pairs)
        x = (a >> 1).to(tl.int32, bitcast=True).to(tl.float32) + 0.5
        bits = x.to(tl.int32, bitcast=True)
        above = bits - _SQRT_HALF_BITS
        f = (bits - ((above >> 23) << 23)).to(tl.float32, bitcast=True) - 1.0
        halvings = (31 - (above >> 23)).to(tl.float32)
        log = (((((((f * _L7 + _L6) * f + _L5) * f + _L4) * f + _L3) * f + _L2) * f + _L1) * f) + _L0
        r = tl.sqrt_rn(halvings * _TWO_LN2 + (f * f * log - f * 2.0))
        y = ((b << 2) | 2).to(tl.int32, bitcast=True).to(tl.float32) * (2.0**-31)
        v = y * y
        s = y * (((v * _S3 + _S2) * v + _S1) * v + _S0)
        c = v * (((v * _C3 + _C2) * v + _C1) * v + _C0) + 1.0
        c = tl.where(((b >> 30) & 1) == 1, -c, c)
        swap = (b >> 31) == 1
        return tl.reshape(tl.join(r * tl.where(swap, s, c), r * tl.where(swap, c, s)), (BLOCK,))
    else:
        w = _words((first // 128) + tl.arange(0, BLOCK // 128), k0, k1, tensor, step, use)
        bits = (w[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
        return 1.0 - 2.0 * tl.reshape(bits, (BLOCK,)).to(tl.int32).to(tl.float32)


@triton.jit
def _drawn(first, threshold, digits, k0, k1, tensor, step, use, BLOCK: tl.constexpr):
    """Whether elements first .. first + BLOCK are kept: their uniform numbers against the threshold, digit by digit."""
    block = ((first // 128) + tl.arange(0, BLOCK // 128)) * _DIGITS
    below = tl.zeros((BLOCK // 32,), tl.uint32)
    equal = below - 1
    digit = 0
    undecided = 1
    while (digit < digits) & (undecided != 0):
        w = _words(block + digit, k0, k1, tensor, step, use)
        ones = below * 0 - ((_word(threshold) >> (_DIGITS - 1 - digit)) & 1)
        below = below | (equal & ones & ~w)
        equal = equal & ~(w ^ ones)
        undecided = tl.max((equal != 0).to(tl.int32), axis=0)
        digit += 1
    bits = (below[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
    return tl.reshape(bits, (BLOCK,)) != 0


@triton.jit
def widen(h, KIND: tl.constexpr):
    """16-bit patterns (int16), or float32, as float32."""
    if KIND == _BFLOAT16:
        return ((h.to(tl.uint32) & 0xFFFF) << 16).to(tl.float32, bitcast=True)
    elif KIND == _FLOAT16:
        sign, magnitude = (h.to(tl.uint32) & 0x8000) << 16, h.to(tl.uint32) & 0x7FFF
        normal = (magnitude << 13) + 0x38000000
        subnormal = (magnitude.to(tl.int32, bitcast=True).to(tl.float32) * (2.0**-24)).to(tl.uint32, bitcast=True)
        finite = tl.where(magnitude < 0x0400, subnormal, normal)
        return (tl.where(magnitude > 0x7BFF, normal + 0x38000000, finite) | sign).to(tl.float32, bitcast=True)
    else:
        return h


@triton.jit
def _shift(magnitude, noise, BY: tl.constexpr, STOCHASTIC: tl.constexpr):
    if STOCHASTIC:
        return (magnitude + noise) >> BY
    else:
        return (magnitude + (((magnitude >> BY) & 1) + ((1 << (BY - 1)) - 1))) >> BY


@triton.jit
def _narrow(x, noise, KIND: tl.constexpr, STOCHASTIC: tl.constexpr):
    """float32 -> 16-bit patterns (int16), rounded by `noise` or to nearest even; see philox.narrow."""
    pattern = x.to(tl.uint32, bitcast=True)
    magnitude = pattern & 0x7FFFFFFF
    if KIND == _BFLOAT16:
        half = tl.where(magnitude > 0x7F800000, 0x7FC0, _shift(magnitude, noise, 16, STOCHASTIC))
    else:
        small = tl.where(magnitude < 0x38800000, magnitude, 0).to(tl.float32, bitcast=True)
        if STOCHASTIC:
            subnormal = ((small * (2.0**40)).to(tl.int32).to(tl.uint32, bitcast=True) + noise) >> 16
        else:
            subnormal = (small * (2.0**24) + (2.0**23)).to(tl.uint32, bitcast=True) - 0x4B000000
        half = tl.where(magnitude < 0x38800000, subnormal, _shift(magnitude, noise >> 3, 13, STOCHASTIC) - 0x1C000)
        half = tl.where(half > 0x7C00, 0x7C00, half)
        half = tl.where(magnitude > 0x7F800000, 0x7E00, half)
    return (half | ((pattern >> 16) & 0x8000)).to(tl.int32, bitcast=True).to(tl.int16)


@triton.jit
def put(
    target,
    value,
    inside,
    first,
    r0,
    r1,
    r_tensor,
    r_step,
    r_use,
    OUT_KIND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store float32 values of elements first .. first + BLOCK, rounded where the tensor is narrower."""
    if OUT_KIND != _FLOAT32:
        noise = value.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            w = _words((first // 8) + tl.arange(0, BLOCK // 8), r0, r1, r_tensor, r_step, r_use)
            noise = tl.reshape(tl.join(w & 0xFFFF, w >> 16), (BLOCK,))
        tl.store(target, _narrow(value, noise, OUT_KIND, STOCHASTIC), mask=inside)
    else:
        tl.store(target, value, mask=inside)


@triton.jit
def held(record):
    """Key, step, use and scale of a held term; see noise.Held."""
    scale = tl.load(record + 5).to(tl.float32, bitcast=True)
    return tl.load(record), tl.load(record + 1), tl.load(record + 3), tl.load(record + 4), scale


_NUMBERS = ["pieces", "count", "width", "start", "decay", "scale", "more", "threshold", "digits"]
_ADDRESSES = ["k0", "k1", "tensor", "step", "use", "r0", "r1", "r_tensor", "r_step", "r_use"]
_ADDRESSES += ["m0", "m1", "m_tensor", "m_step", "m_use"]


@triton.jit(do_not_specialize=_NUMBERS + _ADDRESSES)  # or each divisibility of each word is compiled for itself
def _kernel(
    out,
    weight,
    rows,
    table,
    pieces,
    count,
    width,
    start,
    decay,
    scale,
    k0,
    k1,
    tensor,
    step,
    use,
    r0,
    r1,
    r_tensor,
    r_step,
    r_use,
    more,
    bits,
    threshold,
    digits,
    m0,
    m1,
    m_tensor,
    m_step,
    m_use,
    OUT_KIND: tl.constexpr,
    WEIGHT_KIND: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    TERMS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    source, target = weight, out
    number = start.to(tl.int64)
    n = count.to(tl.int64)
    piece = (tl.program_id(0) % pieces).to(tl.int64)
    if ROWS:
        n = width.to(tl.int64)
        row = (tl.program_id(0) // pieces).to(tl.int64)
        target += row * n
        number = tl.load(rows + row) * n
        source += number
    first = (number // 128) * 128 + piece * BLOCK
    index = first - number + tl.arange(0, BLOCK)
    inside = (index >= 0) & (index < n)
    whole = widen(tl.load(source + index, mask=inside, other=0), WEIGHT_KIND)
    value = whole * decay
    if TERMS == _HELD:
        k0, k1, step, use, scale = held(table)
    if TERMS != _NONE:
        value = value + noise(first, k0, k1, tensor, step, use, GAUSSIAN, BLOCK) * scale
    if TERMS == _MORE:  # else the table is a stand-in, of any type
        for k in range(more):
            record = table + 6 * k
            z = noise(
                first,
                tl.load(record),
                tl.load(record + 1),
                tl.load(record + 2),
                tl.load(record + 3),
                tl.load(record + 4),
                GAUSSIAN,
                BLOCK,
            )
            value = value + z * tl.load(record + 5).to(tl.float32, bitcast=True)
    if KEEP == _DRAWN:
        value = tl.where(_drawn(first, threshold, digits, m0, m1, m_tensor, m_step, m_use, BLOCK), value, whole)
    elif KEEP != _ALL:
        element = first + tl.arange(0, BLOCK)
        octet = tl.load(bits + (element >> 3), mask=inside, other=0).to(tl.int32)
        value = tl.where(((octet >> (element & 7).to(tl.int32)) & 1) != 0, value, whole)
    put(target + index, value, inside, first, r0, r1, r_tensor, r_step, r_use, OUT_KIND, STOCHASTIC, BLOCK)


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
    held: Held | None = None,
) -> None:
    """out <- round(decay * weight + sum(scale * z)) as philox.apply_ defines it; `held` is the one term where it is given.

    Rows outside the weight are not noticed: they would cost a synchronisation.
    """
    if out.dtype not in KINDS or weight.dtype not in KINDS:
        terms = terms if held is None else [held.term()]
        philox.apply_(out, weight, rows, terms, distribution, decay, at, start, keep)
        return
    if out.numel() == 0:
        return
    count, width, lines = weight.numel(), weight.shape[-1] if weight.ndim else 1, 1
    if rows is not None:
        count, lines, rows = width, len(rows), rows.contiguous()
    drawn = keep if isinstance(keep, Drawn) else None
    first, scale = terms[0] if terms else (None, 0.0)
    if held is not None:
        first = Address(0, held.tensor, 0, 0, 0)  # the rest of it is read
    table = out if held is None else held.record
    if len(terms) > 1:
        records = [address.record(*term) for term in terms[1:]]
        table = torch.tensor(records, dtype=torch.int32).to(out.device, non_blocking=True)
    pieces = triton.cdiv(count + 127, BLOCK)
    with torch.cuda.device_of(out):
        _kernel[(pieces * lines,)](
            out if out.dtype == torch.float32 else out.view(torch.int16),
            weight if weight.dtype == torch.float32 else weight.view(torch.int16),
            out if rows is None else rows,
            table,
            pieces,
            count,
            width,
            start,
            float(decay),
            float(scale),
            *address.signed(first.words if first else (0,) * 5),
            *address.signed(at.words if at else (0,) * 5),
            max(0, len(terms) - 1),
            keep if isinstance(keep, Tensor) else out,
            *address.signed([drawn.threshold if drawn else 0]),
            drawn.digits if drawn else 0,
            *address.signed(drawn.address.words if drawn else (0,) * 5),
            OUT_KIND=KINDS[out.dtype],
            WEIGHT_KIND=KINDS[weight.dtype],
            GAUSSIAN=distribution == "gaussian",
            TERMS=min(len(terms), MORE) if held is None else HELD,
            STOCHASTIC=at is not None,
            ROWS=rows is not None,
            KEEP=ALL if keep is None else DRAWN if drawn else PACKED,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
