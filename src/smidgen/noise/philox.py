"""The definition of smidgen's noise, in plain torch: every other backend must give these bits.

Noise is a pure function of an address and an element number. Philox4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) maps a counter of four 32-bit words under a key of two to four random words, one *block*:

    key     = (seed mod 2^32, seed >> 32)
    counter = (block number, tensor, step, query << 8 | purpose)

What a block's words w0..w3 become:

`rademacher`, 128 elements a block. Element i is bit i mod 32 of word (i mod 128) // 32: 0 gives +1, 1 gives -1.

`gaussian`, 4 elements a block: (w0, w1) gives elements 0 and 1, (w2, w3) gives 2 and 3, by Box-Muller in float32. Every
operation is one IEEE float32 multiplication, addition, square root or conversion from an integer, rounded to nearest and
never fused, so all backends that forbid contraction agree bit for bit. With the words (a, b) of a pair:

    x = float(a >> 1) + 1/2                            u = x / 2^31 is in (0, 1]: at least 2^-32, so |z| <= 6.67
    x = 2^k (1 + f), 1 + f in [sqrt(1/2), sqrt(2))     on the bits of x
    r = sqrt((31 - k) 2 ln2 + (f^2 LOG(f) - 2f))       = sqrt(-2 ln u); Horner's rule from the highest coefficient
    y = float(signed(b << 2 | 2)) / 2^31, v = y^2      the low 30 bits of b: an angle of pi/4 y in (-pi/4, pi/4)
    s = y SIN(v), c = v COS(v) + 1; bit 30 of b flips the sign of c; bit 31 of b swaps c and s
    z = r c, r s

Largest error of z against float64 arithmetic on the same x and y, measured over 2^25 pairs: 6.9e-7, and 2.8e-7 of z.

Rounding, 16 bits an element, 8 elements a block: element i takes the low (i even) or high half of word (i mod 8) // 2.
Stochastic rounding adds them below the last kept bit and truncates, so the mean is the value: exactly for bfloat16 and
for normal float16 numbers; subnormal float16 numbers (spacing 2^-24) are low by less than 2^-40. As with rounding to
nearest, finite values beyond the largest 16-bit number may become infinite (their neighbours on the grid are that number
and infinity); infinities stay; NaN stays NaN (one canonical pattern with its sign).

Masks, one binary digit a block, 128 elements: digit j of the uniform number U_i (j = 0 is worth 1/2) of element i is bit
i mod 128 of block 32 (i // 128) + j, counted as for `rademacher`. The element is kept iff U_i < threshold / 2^32, for 32
digits: any threshold in 0 .. 2^32, so a share of kept elements is off by at most 2^-33, below a standard error of it for
shares above 2^-32 and up to 2^31 elements. The first digit that differs from the threshold's decides, and digits after the
threshold's last 1 never do: one half takes one block for 128 elements, any other share 12 for 2048 on average.

Cost of the functions here: some 150 torch kernels for each 2^18 elements and 40 MB of temporaries; about 100 times
slower than the compiled kernels (measured on two cores). Works on any device that torch has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smidgen.noise.address import Address, Term

VERSION = 1  # of the map from addresses to values; journals refuse another one

# Purposes: the same element at the same step needs independent noise for different uses.
PROBE, ROUND, INIT, MASK, SUBSPACE, DATA = range(6)

Distribution = Literal["rademacher", "gaussian"]

PER_BLOCK = {"rademacher": 128, "gaussian": 4}  # elements
ROUNDINGS_PER_BLOCK = 8
GROUP = 128  # elements of a mask that share blocks, one block a digit
DIGITS = 32  # of a mask's uniform numbers

# Random123's constants of Philox4x32: two multipliers and two key increments.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# Minimax polynomials (Lawson's algorithm in float64), lowest coefficient first; used as float32.
# -2 ln(1 + f) = f^2 LOG(f) - 2f, relative error 3.0e-8 on [sqrt(1/2) - 1, sqrt(2) - 1]
LOG = (0.99999983, -0.666679, 0.50003511, -0.39924144, 0.33141016, -0.29835947, 0.28615043, -0.17469686)
# sin(pi/4 y) = y SIN(y^2), relative error 3.2e-9; cos(pi/4 y) = 1 + y^2 COS(y^2), relative error 6.4e-11; |y| <= 1
SIN = (7.85398161e-01, -8.07454325e-02, 2.49000102e-03, -3.59504522e-05)
COS = (-3.08425136e-01, 1.58543266e-02, -3.25940080e-04, 3.53033805e-06)
TWO_LN2 = 2 * math.log(2)
SQRT_HALF_BITS = 0x3F3504F3  # sqrt(1/2) as float32

CHUNK = 1 << 18  # elements worked on at a time: bounds the temporaries to 40 MB (measured)
_32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Drawn:
    """A random mask: element i is kept iff its uniform number is below threshold / 2^32, independently of all others.

    Raises ValueError when the threshold is not in 0 .. 2^32.
    """

    address: Address
    threshold: int

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1 << DIGITS:
            raise ValueError(f"threshold {self.threshold} is not in 0 .. 2^{DIGITS}")

    @classmethod
    def share(cls, address: Address, keep: float) -> Drawn:
        """The mask that keeps an element with probability `keep`, to the nearest 2^-32."""
        return cls(address, round(keep * (1 << DIGITS)))

    @property
    def digits(self) -> int:
        """Digits of the uniform numbers that can decide: up to the threshold's last 1."""
        return DIGITS + 1 - (self.threshold & -self.threshold).bit_length() if self.threshold else 0


# Which elements an operation touches: drawn, or bit i % 8 of byte i // 8 of a uint8 tensor for element i of the tensor.
Keep = Drawn | Tensor


def philox(counter: Sequence[Tensor | int], key: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. `counter`: four words, int64 tensors of one shape or ints, in [0, 2^32); returns four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        hi0, lo0 = _multiply(c0, MULTIPLIERS[0])
        hi1, lo1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + INCREMENTS[0]) & _32, (k1 + INCREMENTS[1]) & _32
    return c0, c1, c2, c3  # type: ignore[return-value]


def _multiply(a: Tensor | int, m: int) -> tuple[Tensor | int, Tensor | int]:
    """High and low 32 bits of a 32 x 32 bit product, by 16-bit halves of `a`: int64 has no bits to spare for more."""
    low = (a & 0xFFFF) * m
    high = (a >> 16) * m + (low >> 16)
    return high >> 16, (high << 16 | low & 0xFFFF) & _32


def words(address: Address, blocks: Tensor) -> Tensor:
    """The random words of blocks: int64 [...] -> int64 [..., 4] in [0, 2^32)."""
    *key, tensor, step, use = address.words
    return torch.stack(philox((blocks, tensor, step, use), key), dim=-1)


def signs(w: Tensor) -> Tensor:
    """Rademacher values of blocks: words [..., 4] -> float32 [..., 128]."""
    bits = w.unsqueeze(-1) >> torch.arange(32, device=w.device) & 1
    return (1 - 2 * bits).flatten(-2).to(torch.float32)


def normals(w: Tensor) -> Tensor:
    """Gaussian values of blocks: words [..., 4] -> float32 [..., 4]. The docstring of this module says how."""
    a, b = w[..., 0::2], w[..., 1::2]
    x = (a >> 1).to(torch.float32) + 0.5
    bits = x.view(torch.int32)
    above = bits - SQRT_HALF_BITS
    f = (bits - (above & -(1 << 23))).view(torch.float32) - 1
    halvings = (31 - (above >> 23)).to(torch.float32)
    r = _sqrt(halvings * TWO_LN2 + (f * f * _horner(LOG, f) - 2 * f))

    turn = (b << 2 | 2) & _32
    y = (turn - (turn >> 31 << 32)).to(torch.float32) * 2.0**-31
    v = y * y
    s = y * _horner(SIN, v)
    c = v * _horner(COS, v) + 1
    c = torch.where(b >> 30 & 1 == 1, -c, c)
    swap = b >> 31 == 1
    return torch.stack((r * torch.where(swap, s, c), r * torch.where(swap, c, s)), dim=-1).flatten(-2)


def _sqrt(x: Tensor) -> Tensor:
    """Square root rounded to nearest float32.

    torch.sqrt may be off by one unit in the last place (MKL's is, on the CPU); through float64 it is not. Devices without
    float64 give what they have.
    """
    return x.sqrt() if x.device.type == "mps" else x.double().sqrt().float()


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    *rest, last = coefficients  # torch rounds numbers to the tensor's float32
    p = x * last + rest.pop()
    while rest:
        p = p * x + rest.pop()
    return p


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def sample(
    address: Address, distribution: Distribution, count: int, *, start: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Elements start .. start + count of the noise at `address`: float32 [count]. This is the definition."""
    check_range(distribution, start, count)
    per = PER_BLOCK[distribution]
    first = start // per
    blocks = torch.arange(first, -(-(start + count) // per), device=device)
    return _field(address, distribution, blocks).flatten()[start - first * per :][:count]


def _field(address: Address, distribution: Distribution, blocks: Tensor) -> Tensor:
    """Values of whole blocks: int64 [...] -> float32 [..., elements per block]."""
    return (signs if distribution == "rademacher" else normals)(words(address, blocks))


def rounding_bits(at: Address, count: int, *, start: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The bits that round elements start .. start + count: int64 [count] in [0, 2^16)."""
    per = ROUNDINGS_PER_BLOCK
    first = start // per
    w = words(at, torch.arange(first, -(-(start + count) // per), device=device))
    halves = torch.stack((w & 0xFFFF, w >> 16), dim=-1)
    return halves.flatten()[start - first * per :][:count]


def kept(keep: Keep, count: int, *, start: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Whether the mask keeps elements start .. start + count: bool [count]. This is the definition."""
    first = start // GROUP
    blocks = torch.arange(first, -(-(start + count) // GROUP), device=device)
    return _kept(keep, blocks).flatten()[start - first * GROUP :][:count]


def pack(kept: Tensor) -> Tensor:
    """The bit mask of a boolean tensor: uint8 [elements / 8, rounded up], on its device."""
    flat = kept.flatten()
    octets = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    # Byte k of a number times bit 56 - 7k of the factor is bit 56 + k of the product: the eight end up in the top byte.
    return (octets * 0x0102040810204080 >> 56).to(torch.uint8)


def _kept(keep: Keep, groups: Tensor) -> Tensor:
    """The mask of whole groups of 128 elements: int64 [...] -> bool [..., 128]. False beyond the end of a bit mask."""
    if isinstance(keep, Tensor):
        octets = groups.unsqueeze(-1) * (GROUP // 8) + torch.arange(GROUP // 8, device=groups.device)
        found = torch.where(octets < len(keep), keep[octets.clamp(max=len(keep) - 1)], 0)
        return (found.unsqueeze(-1) >> torch.arange(8, device=groups.device) & 1).flatten(-2).bool()
    uniform = torch.zeros(*groups.shape, GROUP, dtype=torch.int64, device=groups.device)
    for digit in range(keep.digits):
        w = words(keep.address, groups * DIGITS + digit)
        uniform = uniform << 1 | (w.unsqueeze(-1) >> torch.arange(32, device=w.device) & 1).flatten(-2)
    return uniform < keep.threshold >> DIGITS - keep.digits


def check_range(distribution: str, start: int, count: int, rounded: bool = False, drawn: bool = False) -> None:
    """Raise ValueError when the elements do not lie in the 2^32 blocks of an address, or the distribution is unknown."""
    per = PER_BLOCK.get(distribution)
    if per is None:
        raise ValueError(f"distribution {distribution!r} is unknown; there are {', '.join(PER_BLOCK)}")
    if rounded:
        per = min(per, ROUNDINGS_PER_BLOCK)
    if drawn:
        per = min(per, GROUP // DIGITS)
    if start < 0 or count < 0 or start + count > per << 32:
        raise ValueError(f"elements {start} .. {start + count} are not all among the {per} * 2^32 that an address has")


def narrow(value32: Tensor, dtype: torch.dtype, bits: Tensor | None) -> Tensor:
    """float32 [n] rounded to bfloat16 or float16: stochastically by `bits` (int64 [n] in [0, 2^16)), or to nearest even.

    float32 and float64 are returned as they are or widened.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return value32.to(dtype)
    pattern = value32.view(torch.int32).to(torch.int64) & _32
    sign, magnitude = pattern >> 16 & 0x8000, pattern & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        half = _shift(magnitude, 16, bits)
        infinity, nan = 0x7F80, 0x7FC0
    else:
        normal = _shift(magnitude, 13, None if bits is None else bits >> 3) - (112 << 10)  # exponent bias 127 -> 15
        small = torch.where(magnitude < 0x38800000, magnitude, 0).to(torch.int32).view(torch.float32)  # below 2^-14
        if bits is None:
            # Adding 2^23 rounds to an integer, to nearest even: the multiples of 2^-24 are the subnormal numbers.
            subnormal = (small * 2.0**24 + 2.0**23).view(torch.int32).to(torch.int64) - 0x4B000000
        else:
            subnormal = (small * 2.0**40).to(torch.int64) + bits >> 16
        half = torch.where(magnitude < 0x38800000, subnormal, normal)
        infinity, nan = 0x7C00, 0x7E00
    half = half.clamp(max=infinity)
    half = torch.where(magnitude > 0x7F800000, nan, half) | sign
    return (half - (half >> 15 << 16)).to(torch.int16).view(dtype)


def _shift(magnitude: Tensor, by: int, bits: Tensor | None) -> Tensor:
    """magnitude / 2^by, rounded to nearest even or by the random bits."""
    if bits is None:
        bits = (1 << by - 1) - 1 + (magnitude >> by & 1)
    return magnitude + bits >> by


@torch.no_grad()
def apply_(
    out: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    terms: Sequence[Term],
    distribution: Distribution,
    decay: float,
    at: Address | None,
    start: int,
    keep: Keep | None = None,
) -> None:
    """out <- round(decay * weight + sum(scale * z)): what all five operations of `noise` are, and what all backends offer.

    `weight`, `out`: contiguous, of equal size; element 0 is element `start` of the tensor. With `rows` (int64 [n]), out
    [n, D] takes those rows of weight [V, D]. `at` addresses the bits of stochastic rounding; None rounds to nearest.
    An element that `keep` does not keep is its weight, not decayed. Sums run in float32 (float64 for float64 weights)
    from left to right.
    """
    if rows is None:
        flat, source = out.view(-1), weight.view(-1)
        for i in range(0, out.numel(), CHUNK):
            here = slice(i, min(i + CHUNK, out.numel()))
            count = here.stop - i
            value = _wide(source[here], decay)
            for address, scale in terms:
                z = sample(address, distribution, count, start=start + i, device=out.device)
                value += z * _float32(scale)
            if keep is not None:
                mask = kept(keep, count, start=start + i, device=out.device)
                value = torch.where(mask, value, source[here].to(value.dtype))
            flat[here] = _narrow(value, out.dtype, at, start + i)
        return
    width, per = weight.shape[1], PER_BLOCK[distribution]
    step = max(1, CHUNK // (width + per))
    for i in range(0, len(rows), step):
        some = rows[i : i + step]
        value = _wide(weight[some], decay)
        element = some.unsqueeze(1) * width  # number of a row's first element
        columns = element % per + torch.arange(width, device=rows.device)
        blocks = element // per + torch.arange(-(-width // per) + 1, device=rows.device)
        for address, scale in terms:
            z = _field(address, distribution, blocks).flatten(1).gather(1, columns)
            value += z * _float32(scale)
        if keep is not None:
            groups = element // GROUP + torch.arange(-(-width // GROUP) + 1, device=rows.device)
            places = element % GROUP + torch.arange(width, device=rows.device)
            mask = _kept(keep, groups).flatten(1).gather(1, places)
            value = torch.where(mask, value, weight[some].to(value.dtype))
        out[i : i + step] = _narrow(value.flatten(), out.dtype, None, 0).view(value.shape)


def _wide(weight: Tensor, decay: float) -> Tensor:
    value = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32, copy=True)
    return value if decay == 1 else value * _float32(decay)


def _narrow(value: Tensor, dtype: torch.dtype, at: Address | None, start: int) -> Tensor:
    if dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    bits = None if at is None else rounding_bits(at, value.numel(), start=start, device=value.device)
    return narrow(value.to(torch.float32), dtype, bits)
