"""Vectors of sixteen 32-bit lanes for numba kernels: Python functions on `Value`s that write LLVM code.

numba reaches the vector units only through LLVM's loop vectoriser, which gives up on the loops of `cpu`: bits of a word
spread over 32 elements, a generator's state, in-place updates (measured: 2 to 9 times slower). A `@stage` is a function
that runs once, when the kernel is compiled, on symbols: each operation on them appends the LLVM operation of that name.
LLVM maps sixteen lanes to whatever the processor has: one AVX-512 register, two of AVX2, four of NEON. Operations round
as scalar ones do and are never fused. numba compiles a stage as a function of its own that other kernels can call.

Types are those of LLVM: numbers (int64, float32) and vectors (uint32, float32, masks). Python numbers and number values
mix with vectors as in numpy: they are repeated in all lanes. Shifts are logical, comparisons unsigned. Memory is read
and written at plain addresses, unaligned, without bounds checks: the callers own the ranges. Lanes 0..15 are in memory
order (little endian, as all hosts of torch are).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16

I8, I16, I32, I64, F32, F64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
U = ir.VectorType(I32, LANES)
F = ir.VectorType(F32, LANES)
SHORT = ir.VectorType(I16, LANES)


class Value:
    """A number or vector of the code being written."""

    __slots__ = ("builder", "value")

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder, self.value = builder, value

    def like(self, other: Value | float) -> Any:
        """The other operand in this value's type."""
        if isinstance(other, Value):
            vector = isinstance(self.value.type, ir.VectorType)
            return other.value if other.value.type == self.value.type or not vector else splat(other).value
        return constant(self.value.type, other)

    def _operate(self, name: str, other: Value | float, swap: bool = False) -> Value:
        kind = self.value.type.element if isinstance(self.value.type, ir.VectorType) else self.value.type
        method = getattr(self.builder, "f" + name if isinstance(kind, ir.FloatType) else name)
        a, b = self.value, self.like(other)
        return Value(self.builder, method(b, a) if swap else method(a, b))

    def __add__(self, other: Value | float) -> Value:
        return self._operate("add", other)

    def __sub__(self, other: Value | float) -> Value:
        return self._operate("sub", other)

    def __rsub__(self, other: float) -> Value:
        return self._operate("sub", other, swap=True)

    def __mul__(self, other: Value | float) -> Value:
        return self._operate("mul", other)

    def __and__(self, other: Value | int) -> Value:
        return self._operate("and_", other)

    def __or__(self, other: Value | int) -> Value:
        return self._operate("or_", other)

    def __xor__(self, other: Value | int) -> Value:
        return self._operate("xor", other)

    def __lshift__(self, other: Value | int) -> Value:
        return self._operate("shl", other)

    def __rshift__(self, other: Value | int) -> Value:
        return self._operate("lshr", other)

    def __lt__(self, other: Value | int) -> Value:
        return Value(self.builder, self.builder.icmp_unsigned("<", self.value, self.like(other)))

    def __gt__(self, other: Value | int) -> Value:
        return Value(self.builder, self.builder.icmp_unsigned(">", self.value, self.like(other)))

    def to(self, operation: str, kind: ir.Type) -> Value:
        """A conversion by the builder's method of that name."""
        return Value(self.builder, getattr(self.builder, operation)(self.value, kind))


class Float(Value):
    """Annotates parameters of stages that are float32 numbers; the others are int64."""

    __slots__ = ()


def constant(kind: ir.Type, number: float) -> ir.Constant:
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [constant(kind.element, number)] * kind.count)
    # LLVM text takes float32 constants as float64 numbers without excess precision.
    return ir.Constant(kind, types.float32.cast_python_value(number) if kind == F32 else int(number))


def shuffle(x: Value, y: Value, order: Sequence[int]) -> Value:
    mask = ir.Constant(ir.VectorType(I32, len(order)), list(order))
    return Value(x.builder, x.builder.shuffle_vector(x.value, y.value, mask))


def splat(number: Value) -> Value:
    """A number (float32, or an integer's low 32 bits) in all lanes."""
    builder = number.builder
    if number.value.type == I64:
        number = number.to("trunc", I32)
    kind = ir.VectorType(number.value.type, LANES)
    undefined = Value(builder, ir.Constant(kind, ir.Undefined))
    one = Value(builder, builder.insert_element(undefined.value, number.value, ir.Constant(I32, 0)))
    return shuffle(one, undefined, [0] * LANES)


def lane_numbers(builder: ir.IRBuilder) -> Value:
    """0, 1, .., 15."""
    return Value(builder, ir.Constant(U, list(range(LANES))))


def as_u(x: Value) -> Value:
    """The same bits as uint32."""
    return x.to("bitcast", U)


def as_f(x: Value) -> Value:
    """The same bits as float32."""
    return x.to("bitcast", F)


def signed_to_f(x: Value) -> Value:
    """int32 values -> nearest float32."""
    return x.to("sitofp", F)


def truncate_to_u(x: Value) -> Value:
    """float32 values in [0, 2^31) -> integer parts."""
    return x.to("fptosi", U)


def signed_shift(x: Value, by: int) -> Value:
    """int32 values / 2^by, rounded down."""
    return Value(x.builder, x.builder.ashr(x.value, constant(U, by)))


def sqrt(x: Value) -> Value:
    """Square roots of float32 lanes, rounded to nearest."""
    kind = ir.FunctionType(F, [F])
    function = cgutils.get_or_insert_function(x.builder.module, kind, f"llvm.sqrt.v{LANES}f32")
    return Value(x.builder, x.builder.call(function, [x.value]))


def where(mask: Value, x: Value | int, y: Value) -> Value:
    """Lanes of x where the mask is set, else of y."""
    return Value(y.builder, y.builder.select(mask.value, y.like(x), y.value))


def multiply(x: Value, m: int) -> tuple[Value, Value]:
    """High and low 32 bits of x * m: even and odd lanes as two vectors of 64-bit products, then sorted."""
    wide = ir.VectorType(I64, LANES // 2)
    pairs = x.to("bitcast", wide)
    even, odd = (((v & 0xFFFFFFFF) * m).to("bitcast", U) for v in (pairs, pairs >> 32))
    low = [lane + part for lane in range(0, LANES, 2) for part in (0, LANES)]
    return shuffle(even, odd, [lane + 1 for lane in low]), shuffle(even, odd, low)


def interleave(a: Value, b: Value, c: Value, d: Value) -> list[Value]:
    """a0 b0 c0 d0 a1 b1 .. d15 as four vectors."""
    pair = range(2 * LANES)
    order = [vector * LANES + lane for lane in range(LANES) for vector in range(4)]
    whole = shuffle(shuffle(a, b, pair), shuffle(c, d, pair), order)
    return [shuffle(whole, whole, range(i, i + LANES)) for i in range(0, 4 * LANES, LANES)]


def halves(x: Value) -> list[Value]:
    """The 32 half words of a vector in memory order, as two vectors of numbers below 2^16."""
    short = x.to("bitcast", ir.VectorType(I16, 2 * LANES))
    return [shuffle(short, short, range(i, i + LANES)).to("zext", U) for i in (0, LANES)]


def load(address: Value, kind: ir.Type, align: int = 4) -> Value:
    builder = address.builder
    return Value(builder, builder.load(builder.inttoptr(address.value, kind.as_pointer()), align=align, typ=kind))


def store(address: Value, x: Value, align: int = 4) -> None:
    builder = address.builder
    builder.store(x.value, builder.inttoptr(address.value, x.value.type.as_pointer()), align=align)


def load_f(address: Value) -> Value:
    """Sixteen float32."""
    return load(address, F)


def load_u16(address: Value) -> Value:
    """Sixteen 16-bit numbers."""
    return load(address, SHORT, 2).to("zext", U)


def load_mask(address: Value) -> Value:
    """Sixteen bits as a mask."""
    return load(address, I16, 2).to("bitcast", ir.VectorType(ir.IntType(1), LANES))


def union(x: Value) -> Value:
    """The bits that any lane of x has, int64."""
    function = cgutils.get_or_insert_function(x.builder.module, ir.FunctionType(I32, [U]), f"llvm.vector.reduce.or.v{LANES}i32")
    return Value(x.builder, x.builder.call(function, [x.value])).to("zext", I64)


def store_u16(address: Value, x: Value) -> None:
    """The low half of each lane."""
    store(address, x.to("trunc", SHORT), 2)


def scratch(builder: ir.IRBuilder, size: int) -> Value:
    """Address of `size` bytes on the stack of the function being written, aligned to cache lines."""
    with builder.goto_entry_block():
        space = builder.alloca(ir.ArrayType(I8, size))
    space.align = 64
    return Value(builder, builder.ptrtoint(space, I64))


@contextmanager
def loop(count: Value) -> Iterator[Value]:
    """The code written inside runs `count` (int64) times; the counter is yielded."""
    with cgutils.for_range(count.builder, count.value, intp=I64) as counter:
        yield Value(count.builder, counter.index)


def stage(function: Callable[..., None], name: str = "") -> Any:
    """Make a function that writes code into one that numba kernels can call.

    Its parameters are int64, or float32 where annotated `Float`; it returns nothing. `name`: unique among stages.
    """
    parameters = inspect.signature(function).parameters.values()
    symbol = f"smidgen.{name or function.__name__}"
    kinds = [F32 if p.annotation in (Float, "Float") else I64 for p in parameters]

    def code(context, builder, signature, arguments):
        callee = builder.module.globals.get(symbol)
        if callee is None:
            callee = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), kinds), symbol)
            callee.linkage = "internal"
            callee.attributes.add("noinline")
            inner = ir.IRBuilder(callee.append_basic_block())
            function(*(Value(inner, argument) for argument in callee.args))
            inner.ret_void()
        builder.call(callee, arguments)
        return context.get_dummy_value()

    result = types.void(*(types.float32 if kind == F32 else types.int64 for kind in kinds))

    def typed(typing, *arguments):
        return result, code

    typed.__name__ = function.__name__
    # numba asks for the names of the parameters.
    context = inspect.Parameter("typing", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    typed.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    return intrinsic(typed)


def _pointer(builder: ir.IRBuilder, address: Any, kind: ir.Type) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def number_at(typing, record, field):
    """The float64 number `field` of a record in memory."""

    def code(context, builder, signature, arguments):
        at = builder.add(arguments[0], builder.mul(context.cast(builder, arguments[1], field, types.int64), I64(8)))
        return builder.load(_pointer(builder, at, F64), align=8, typ=F64)

    return types.float64(types.int64, field), code


@intrinsic
def int64_at(typing, address):
    """The int64 number in memory."""

    def code(context, builder, signature, arguments):
        return builder.load(_pointer(builder, arguments[0], I64), align=8, typ=I64)

    return types.int64(types.int64), code


@intrinsic
def take(typing, address, amount):
    """Add `amount` to the int64 in memory atomically; what was there."""

    def code(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _pointer(builder, arguments[0], I64), arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), code


@intrinsic
def copy(typing, target, source, size):
    """Copy bytes between ranges that do not overlap."""

    def code(context, builder, signature, arguments):
        to, from_, count = arguments
        cgutils.raw_memcpy(builder, _pointer(builder, to, I8), _pointer(builder, from_, I8), count, 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic(prefer_literal=True)
def stack(typing, size):
    """Address of `size` (a literal) bytes on the stack of the calling kernel."""

    def code(context, builder, signature, arguments):
        return scratch(builder, size.literal_value).value

    return types.int64(size), code
