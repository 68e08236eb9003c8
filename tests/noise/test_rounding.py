"""Rounding to 16 bits: nearest is torch's, stochastic has the right mean, and neither invents or loses NaN."""

from __future__ import annotations

import math

import pytest
import torch

from smidgen import noise
from smidgen.noise import Address, philox

DTYPES = [torch.bfloat16, torch.float16]
AT = Address(seed=5, tensor=6, step=7, query=0, purpose=noise.ROUND)


def write(value32: torch.Tensor, dtype: torch.dtype, rounding: str = "stochastic", at: Address = AT) -> torch.Tensor:
    out = torch.empty_like(value32, dtype=dtype)
    noise.write_(out, value32, rounding=rounding, at=at)
    return out


def grid(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a 16-bit type in order, as float32."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return numbers[numbers.isfinite()].float().sort().values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_nearest_is_torchs_conversion(dtype, backend):
    numbers = grid(dtype)
    middles = (numbers[1:].double() + numbers[:-1].double()).div(2).float()
    around = torch.cat([torch.nextafter(middles, torch.full_like(middles, end)) for end in (-math.inf, math.inf)])
    patterns = torch.arange(-(2**31), 2**31, 65521, dtype=torch.int64).to(torch.int32).view(torch.float32)
    value = torch.cat(
        [numbers, middles, around, patterns, torch.tensor([math.inf, -math.inf, 65520.0, 65519.99, 3.4e38, -3.4e38])]
    )
    with noise.use(backend):
        got = write(value, dtype, "nearest")
    nan = value.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.int16), value[~nan].to(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_the_grid_stay(dtype):
    numbers = grid(dtype)
    assert torch.equal(write(numbers, dtype).float(), numbers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_infinity_and_nan_stay_and_are_not_invented(dtype, backend):
    special = torch.tensor([math.inf, -math.inf, math.nan])
    # NaN whose payload sits in the bits that are cut, with either sign: truncation alone would make it infinite.
    payload = torch.tensor([0x7F800001, 0x7F800001 - 2**31, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    finite = torch.linspace(-1, 1, 1001) * torch.finfo(dtype).max
    with noise.use(backend):
        for rounding in ("stochastic", "nearest"):
            got = write(torch.cat([special, payload]), dtype, rounding)
            assert got[:2].tolist() == [math.inf, -math.inf]
            assert got[2:].isnan().all()
            assert write(finite, dtype, rounding).isfinite().all()


@pytest.mark.parametrize(("dtype", "top"), [(torch.bfloat16, 2.0**128), (torch.float16, 2.0**16)])
def test_overflow_goes_to_infinity_in_proportion(dtype, top):
    largest = torch.finfo(dtype).max
    value = largest + 0.25 * (top - largest)
    got = write(torch.full((4000,), value), dtype).float()
    assert set(got.tolist()) == {largest, math.inf}
    assert abs(got.isinf().float().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(
    ("dtype", "low", "spacing"),
    [
        (torch.bfloat16, 1.0, 2.0**-7),
        (torch.bfloat16, -1.0 - 2.0**-7, 2.0**-7),
        (torch.bfloat16, 2.0**-126, 2.0**-133),
        (torch.bfloat16, 3 * 2.0**-133, 2.0**-133),  # subnormal
        (torch.float16, 1.0, 2.0**-10),
        (torch.float16, -1.0 - 2.0**-10, 2.0**-10),
        (torch.float16, 0.0, 2.0**-24),  # subnormal
        (torch.float16, 1023 * 2.0**-24, 2.0**-24),  # between the last subnormal and the first normal number
        (torch.float16, 2.0**-14, 2.0**-24),
    ],
)
def test_stochastic_rounding_reaches_the_two_neighbours_with_the_right_mean(dtype, low, spacing, backend):
    n = 1 << 14
    for fraction in (1 / 64, 0.3, 0.5, 0.99):
        value = torch.tensor(low + fraction * spacing, dtype=torch.float32)
        fraction = (value.double().item() - low) / spacing  # what float32 makes of it
        with noise.use(backend):
            got = write(value.repeat(n), dtype).double()
        up = (got - low) / spacing
        assert set(up.tolist()) <= {0.0, 1.0}
        assert abs(up.mean() - fraction) <= 5 * math.sqrt(fraction * (1 - fraction) / n)


def test_small_updates_add_up_in_the_mean():
    """Steps of a hundredth of the spacing: nearest rounding loses all of them, stochastic rounding none in the mean."""
    steps, n, step = 200, 4096, 2.0**-7 / 100
    weight, stuck = torch.ones(n, dtype=torch.bfloat16), torch.ones(n, dtype=torch.bfloat16)
    value = torch.full((n,), step)
    for t in range(steps):
        at = Address(1, 2, t, 0, noise.ROUND)
        noise.write_(weight, weight.float() + value, rounding="stochastic", at=at)
        noise.write_(stuck, stuck.float() + value, rounding="nearest", at=at)
    assert torch.equal(stuck, torch.ones_like(stuck))
    moved = weight.double() - 1
    # Each step moves a weight by the spacing with probability step / spacing.
    deviation = 2.0**-7 * math.sqrt(steps * 0.01 * 0.99)
    assert abs(moved.mean() - steps * step) < 5 * deviation / math.sqrt(n)
    assert moved.std() == pytest.approx(deviation, rel=0.1)


def test_rounding_depends_on_its_address_and_the_element_alone():
    value = torch.rand(1000, generator=torch.Generator().manual_seed(1)) - 0.5
    whole = write(value, torch.bfloat16)
    assert torch.equal(write(value, torch.bfloat16), whole)
    assert not torch.equal(write(value, torch.bfloat16, at=Address(5, 6, 8, 0, noise.ROUND)), whole)
    part = torch.empty(301, dtype=torch.bfloat16)
    noise.write_(part, value[77:378].clone(), rounding="stochastic", at=AT, start=77)
    assert torch.equal(part, whole[77:378])


def test_narrow_takes_the_bits_it_is_given():
    value = torch.tensor([1 + 2.0**-8]).repeat(3)  # half way between two bfloat16 numbers
    got = philox.narrow(value, torch.bfloat16, torch.tensor([0, 0x7FFF, 0x8000]))
    assert got.tolist() == [1.0, 1.0, 1 + 2.0**-7]
