"""Noise on many CUDA tensors in one launch, which costs more than the noise of a small tensor: a kernel with the bits of
`cuda`'s, one term and no mask, whole tensors.

A program finds its tensor in a table on the device, 48 bytes a tensor, by bisection. Tables are kept: the tensors of a layer
are worked on again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from smidgen.noise import cuda, philox
from smidgen.noise.address import Address, Held, float_bits, signed
from smidgen.noise.cuda import held, noise, put, widen

RECORD = 6  # numbers of a tensor in the table
PLANS = 1024  # tables kept

_FLOAT32 = tl.constexpr(cuda.FLOAT32)  # Triton reads module constants of this type only


@triton.jit
def _at(address, KIND: tl.constexpr):
    """A pointer to values of a kind from a number, a multiple of 16."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32 if KIND == _FLOAT32 else tl.int16)), 16)


_SHARED = ["tensors", "scale", "k0", "k1", "step", "use", "r0", "r1", "r_step", "r_use"]


@triton.jit(do_not_specialize=_SHARED)
def _many(
    records,
    record,
    tensors,
    scale,
    k0,
    k1,
    step,
    use,
    r0,
    r1,
    r_step,
    r_use,
    OUT_KIND: tl.constexpr,
    WEIGHT_KIND: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    EVEN: tl.constexpr,
    HELD: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    low, high = 0, tensors
    while high - low > 1:  # the last tensor whose first program is not above ours
        middle = (low + high) // 2
        before = tl.load(records + middle * WORDS) <= program
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    r = records + low * WORDS
    first = (program - tl.load(r)) * BLOCK
    n, tensor = tl.load(r + 3), tl.load(r + 5)
    if EVEN:
        n = tl.multiple_of(n, 16)
    index = first + tl.arange(0, BLOCK)
    inside = index < n
    value = widen(tl.load(_at(tl.load(r + 2), WEIGHT_KIND) + index, mask=inside, other=0), WEIGHT_KIND)
    value = value * tl.load(r + 4).to(tl.int32).to(tl.float32, bitcast=True)
    if HELD:  # else the record is a stand-in
        k0, k1, step, use, scale = held(record)
    value = value + noise(first, k0, k1, tensor, step, use, GAUSSIAN, BLOCK) * scale
    target = _at(tl.load(r + 1), OUT_KIND) + index
    put(target, value, inside, first, r0, r1, tensor, r_step, r_use, OUT_KIND, STOCHASTIC, BLOCK)


class _Plan(NamedTuple):
    """Tensors that share a launch."""

    table: Tensor  # int64 [tensors, RECORD]: first program, address of out and weight, elements, decay, id
    programs: int
    out_kind: int
    weight_kind: int
    even: bool


_plans: dict[Any, tuple[list[_Plan], list[int]]] = {}


def tables() -> list[Tensor]:
    """All tables that are kept now: who captures launches has to hold them."""
    return [plan.table for plans, _ in _plans.values() for plan in plans]


def all_(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    ids: Sequence[int],
    z: Address,
    scale: float,
    distribution: philox.Distribution,
    decays: Sequence[float] | None,
    at: Address | None,
    check: Callable[..., None],
    term: Held | None = None,
) -> None:
    """out <- round(decay * weight + scale * z) for each tensor: one launch for all of one dtype.

    Tensors that do not begin at a multiple of 16 bytes take a launch of their own. `check(out, weight, ...)` refuses tensors
    that do not fit. `term`: z and scale are read from it.
    """
    key = (
        tuple([(out.data_ptr(), weight.data_ptr()) for out, weight in zip(outs, weights, strict=True)]),
        tuple([(out.dtype, out.shape, weight.dtype, weight.shape) for out, weight in zip(outs, weights, strict=True)]),
        tuple(ids),
        decays if decays is None else tuple(decays),
        outs[0].device,
    )
    if key not in _plans or not all(tensor.is_contiguous() for tensor in (*outs, *weights)):
        for out, weight in zip(outs, weights, strict=True):
            check(out, weight, None, distribution, 0, at is not None, None)
        if len(_plans) >= PLANS:
            _plans.clear()
        _plans[key] = _plan(outs, weights, ids, decays)
    shared, alone = _plans[key]
    for i in alone:
        here = None if at is None else replace(at, tensor=ids[i])
        decay = 1.0 if decays is None else decays[i]
        mine = None if term is None else replace(term, tensor=ids[i])
        cuda.apply_(outs[i], weights[i], None, [(replace(z, tensor=ids[i]), scale)], distribution, decay, here, 0, None, mine)
    k0, k1, _, step, use = signed(z.words)
    r0, r1, _, r_step, r_use = signed(at.words if at else (0,) * 5)
    with torch.cuda.device_of(outs[0]):
        for plan in shared:
            _many[(plan.programs,)](
                plan.table,
                plan.table if term is None else term.record,
                len(plan.table),
                float(scale),
                k0,
                k1,
                step,
                use,
                r0,
                r1,
                r_step,
                r_use,
                OUT_KIND=plan.out_kind,
                WEIGHT_KIND=plan.weight_kind,
                GAUSSIAN=distribution == "gaussian",
                STOCHASTIC=at is not None,
                EVEN=plan.even,
                HELD=term is not None,
                WORDS=RECORD,
                BLOCK=cuda.BLOCK,
                enable_fp_fusion=False,
            )


def _plan(
    outs: Sequence[Tensor], weights: Sequence[Tensor], ids: Sequence[int], decays: Sequence[float] | None
) -> tuple[list[_Plan], list[int]]:
    """The launches of `all_`, and the tensors that take one of their own."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    alone = []
    for i, (out, weight) in enumerate(zip(outs, weights, strict=True)):
        if out.dtype not in cuda.KINDS or weight.dtype not in cuda.KINDS or (out.data_ptr() | weight.data_ptr()) % 16:
            alone.append(i)
        elif out.numel():
            groups.setdefault((out.dtype, weight.dtype), []).append(i)
    plans = []
    for (out_kind, weight_kind), members in groups.items():
        records, programs = [], 0
        for i in members:
            decay, count = float_bits(1.0 if decays is None else decays[i]), outs[i].numel()
            records.append((programs, outs[i].data_ptr(), weights[i].data_ptr(), count, decay, ids[i]))
            programs += triton.cdiv(count, cuda.BLOCK)
        table = torch.tensor(records, dtype=torch.int64).to(outs[0].device)
        even = all(outs[i].numel() % 16 == 0 for i in members)
        plans.append(_Plan(table, programs, cuda.KINDS[out_kind], cuda.KINDS[weight_kind], even))
    return plans, alone
