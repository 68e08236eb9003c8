"""Vectors of sixteen 32-bit lanes for numba: what LLVM offers as vector types, as values that numba code can compute with.

numba reaches the vector units only through LLVM's loop vectoriser, which gives up on the loops of `cpu`: bits of a word
spread over 32 elements, a carried generator state, in-place updates (measured: 2 to 9 times slower, and slower again
when an index may be negative). Here an expression on `U` (uint32) or `F` (float32) vectors becomes the LLVM vector
operation of that name, which LLVM maps to whatever the processor has: one AVX-512 register, two of AVX2, four of NEON.
Operations round as scalar ones do and are never fused.

Memory is read and written at plain addresses (int64), unaligned, without bounds checks: the callers own the ranges.
Numbers mix with vectors as in numpy: they are converted to the lane's type and repeated. Shifts are logical,
comparisons unsigned. Lanes 0..15 are memory order (little endian, as all hosts of torch are).
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16

_I1, _I8, _I16, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


class Lanes(types.Type):
    """Type of a vector: kind U, F or M (mask, from comparisons)."""

    def __init__(self, kind: str, lane: ir.Type, scalar: types.Type) -> None:
        self.vector, self.scalar = ir.VectorType(lane, LANES), scalar
        super().__init__(name=f"{kind}x{LANES}")


U = Lanes("U", _I32, types.uint32)
F = Lanes("F", _F32, types.float32)
M = Lanes("M", _I1, types.boolean)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        super().__init__(dmm, fe_type, fe_type.vector)


def _constant(values: list[int], lane: ir.Type = _I32) -> ir.Constant:
    return ir.Constant(ir.VectorType(lane, len(values)), values)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, _constant(lanes))


def _lift(context: Any, builder: Any, ty: types.Type, value: Any, want: Lanes) -> Any:
    """The value as a vector: numbers are converted and repeated in all lanes."""
    if ty == want:
        return value
    number = context.cast(builder, value, ty, want.scalar)
    undefined = ir.Constant(want.vector, ir.Undefined)
    one = builder.insert_element(undefined, number, ir.Constant(_I32, 0))
    return _shuffle(builder, one, undefined, [0] * LANES)


def _define_operator(op: Any, of: dict[Lanes, str], predicate: str = "") -> None:
    """Make `op` work on vectors, by the named method of llvmlite's builder for each kind."""

    @intrinsic
    def emit(typing, x, y):
        kind = x if isinstance(x, Lanes) else y

        def code(context, builder, signature, arguments):
            a, b = (_lift(context, builder, t, v, kind) for t, v in zip(signature.args, arguments, strict=True))
            method = getattr(builder, of[kind])
            return method(predicate, a, b) if predicate else method(a, b)

        return (M if predicate else kind)(x, y), code

    @overload(op)
    def operate(x, y):
        if (isinstance(x, Lanes) and x in of) or (isinstance(y, Lanes) and y in of):
            return lambda x, y: emit(x, y)
        return None


_define_operator(operator.add, {U: "add", F: "fadd"})
_define_operator(operator.sub, {U: "sub", F: "fsub"})
_define_operator(operator.mul, {F: "fmul"})
_define_operator(operator.and_, {U: "and_"})
_define_operator(operator.or_, {U: "or_"})
_define_operator(operator.xor, {U: "xor"})
_define_operator(operator.lshift, {U: "shl"})
_define_operator(operator.rshift, {U: "lshr"})
_define_operator(operator.lt, {U: "icmp_unsigned"}, "<")
_define_operator(operator.gt, {U: "icmp_unsigned"}, ">")


def _unary(result: Lanes, emit: Any) -> Any:
    """An operation on one vector (or a number, repeated, where `result` is of its kind)."""

    @intrinsic
    def operation(typing, x):
        def code(context, builder, signature, arguments):
            (value,) = arguments
            return emit(builder, value if isinstance(signature.args[0], Lanes) else (context, signature.args[0], value))

        return result(x), code

    return operation


def _square_root(builder: Any, value: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(F.vector, [F.vector]), f"llvm.sqrt.v{LANES}f32")
    return builder.call(function, [value])


splat_u = _unary(U, lambda builder, number: _lift(number[0], builder, number[1], number[2], U))  # a number in all lanes
splat_f = _unary(F, lambda builder, number: _lift(number[0], builder, number[1], number[2], F))
as_u = _unary(U, lambda builder, v: builder.bitcast(v, U.vector))  # the same bits
as_f = _unary(F, lambda builder, v: builder.bitcast(v, F.vector))
signed_to_f = _unary(F, lambda builder, v: builder.sitofp(v, F.vector))  # int32 value -> nearest float32
truncate_to_u = _unary(U, lambda builder, v: builder.fptosi(v, U.vector))  # float32 in [0, 2^31) -> integer part
sign_shift_23 = _unary(U, lambda builder, v: builder.ashr(v, _constant([23] * LANES)))  # int32 value / 2^23, rounded down
sqrt = _unary(F, _square_root)


@intrinsic
def lane_numbers(typing):
    """0, 1, .., 15."""
    return U(), lambda context, builder, signature, arguments: _constant(list(range(LANES)))


@intrinsic
def where(typing, mask, x, y):
    """Lanes of x where the mask is set, else of y."""
    kind = x if isinstance(x, Lanes) else y

    def code(context, builder, signature, arguments):
        a, b = (_lift(context, builder, t, v, kind) for t, v in zip(signature.args[1:], arguments[1:], strict=True))
        return builder.select(arguments[0], a, b)

    return kind(mask, x, y), code


@intrinsic
def multiply(typing, x, m):
    """(high, low) 32 bits of x * m, m a number: even and odd lanes as two vectors of 64-bit products."""

    def code(context, builder, signature, arguments):
        wide = ir.VectorType(_I64, LANES // 2)
        low, by = _constant([0xFFFFFFFF] * (LANES // 2), _I64), _constant([32] * (LANES // 2), _I64)
        pairs = builder.bitcast(arguments[0], wide)
        factor = builder.and_(builder.bitcast(_lift(context, builder, signature.args[1], arguments[1], U), wide), low)
        even = builder.mul(builder.and_(pairs, low), factor)
        odd = builder.mul(builder.lshr(pairs, by), factor)
        high = builder.or_(builder.lshr(even, by), builder.and_(odd, builder.not_(low)))
        rest = builder.or_(builder.and_(even, low), builder.shl(odd, by))
        results = [builder.bitcast(v, U.vector) for v in (high, rest)]
        return context.make_tuple(builder, signature.return_type, results)

    return types.UniTuple(U, 2)(x, m), code


@intrinsic
def interleave(typing, a, b, c, d):
    """a0 b0 c0 d0 a1 b1 .. d15 as four vectors."""

    def code(context, builder, signature, arguments):
        a, b, c, d = arguments
        both = list(range(2 * LANES))
        order = [vector * LANES + lane for lane in range(LANES) for vector in range(4)]
        all_four = _shuffle(builder, _shuffle(builder, a, b, both), _shuffle(builder, c, d, both), order)
        parts = [
            _shuffle(builder, all_four, all_four, list(range(i, i + LANES))) for i in range(0, 4 * LANES, LANES)
        ]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(a, 4)(a, b, c, d), code


@intrinsic
def halves(typing, x):
    """The 32 half words of a vector in memory order, as two vectors of numbers below 2^16."""

    def code(context, builder, signature, arguments):
        short = builder.bitcast(arguments[0], ir.VectorType(_I16, 2 * LANES))
        parts = [
            builder.zext(_shuffle(builder, short, short, list(range(i, i + LANES))), U.vector) for i in (0, LANES)
        ]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(U, 2)(x), code


def _pointer(context: Any, builder: Any, ty: types.Type, address: Any, to: ir.Type) -> Any:
    return builder.inttoptr(context.cast(builder, address, ty, types.int64), to.as_pointer())


def _loader(result: Lanes, memory: ir.Type, align: int, widen: Any) -> Any:
    @intrinsic
    def load(typing, address):
        def code(context, builder, signature, arguments):
            return widen(context, builder, builder.load(_pointer(context, builder, address, arguments[0], memory), align=align))

        return result(address), code

    return load


def _storer(kind: Lanes, memory: ir.Type, align: int) -> Any:
    @intrinsic
    def store(typing, address, x):
        def code(context, builder, signature, arguments):
            value = builder.trunc(arguments[1], memory) if memory != kind.vector else arguments[1]
            builder.store(value, _pointer(context, builder, address, arguments[0], memory), align=align)
            return context.get_dummy_value()

        return types.void(address, x), code

    return store


_SHORT = ir.VectorType(_I16, LANES)
load_f = _loader(F, F.vector, 4, lambda context, builder, v: v)
load_u16 = _loader(U, _SHORT, 2, lambda context, builder, v: builder.zext(v, U.vector))
load_word = _loader(U, _I32, 4, lambda context, builder, v: _lift(context, builder, types.uint32, v, U))  # one, in all lanes
store_f = _storer(F, F.vector, 4)
store_u = _storer(U, U.vector, 4)
store_u16 = _storer(U, _SHORT, 2)  # the low half of each lane


@intrinsic
def load_i64(typing, address):
    """One number."""

    def code(context, builder, signature, arguments):
        return builder.load(_pointer(context, builder, address, arguments[0], _I64), align=8)

    return types.int64(address), code


@intrinsic
def copy(typing, target, source, size):
    """Copy `size` bytes; the ranges do not overlap."""

    def code(context, builder, signature, arguments):
        to, frm = (_pointer(context, builder, t, v, _I8) for t, v in zip(signature.args[:2], arguments[:2], strict=True))
        cgutils.raw_memcpy(builder, to, frm, context.cast(builder, arguments[2], size, types.intp), 1)
        return context.get_dummy_value()

    return types.void(target, source, size), code


@intrinsic(prefer_literal=True)
def scratch(typing, size):
    """Address of `size` (a literal) bytes on the stack of the calling function, aligned to cache lines."""

    def code(context, builder, signature, arguments):
        space = cgutils.alloca_once(builder, ir.ArrayType(_I8, size.literal_value))
        space.align = 64
        return builder.ptrtoint(space, _I64)

    if not isinstance(size, types.IntegerLiteral):
        return None
    return types.int64(size), code
