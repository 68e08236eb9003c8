"""The definition in plain torch: known answers, ranges, distributions, error against float64 arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.noise import Address, philox, sample

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SOME = Address(seed=11, tensor=22, step=33, query=44, purpose=philox.PROBE)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, words):
    got = philox.philox([torch.tensor(c) for c in counter], key)
    assert tuple(w.item() for w in got) == words


@pytest.mark.parametrize(
    "field", [{"seed": 2**64}, {"tensor": 2**32}, {"step": -1}, {"query": 2**24}, {"purpose": 256}], ids=lambda f: next(iter(f))
)
def test_an_address_that_does_not_fit_is_refused(field):
    with pytest.raises(ValueError, match=r"query 24"):
        Address(**{"seed": 0, "tensor": 0, "step": 0, "query": 0, "purpose": 0, **field})


def test_elements_beyond_the_counter_are_refused():
    last = 4 << 32
    assert sample(SOME, "gaussian", 1, start=last - 1).isfinite().all()
    for distribution, start in [("gaussian", last), ("gaussian", -1), ("cauchy", 0)]:
        with pytest.raises(ValueError, match=r"2\^32|unknown"):
            sample(SOME, distribution, 1, start=start)


@given(start=st.integers(0, 700), count=st.integers(0, 300), distribution=st.sampled_from(["rademacher", "gaussian"]))
@settings(max_examples=30, deadline=None)
def test_any_range_is_that_part_of_the_whole(start, count, distribution):
    whole = sample(SOME, distribution, 1000)
    assert torch.equal(sample(SOME, distribution, count, start=start), whole[start : start + count])


def test_rounding_bits_are_the_halves_of_the_words_in_order():
    w = philox.words(SOME, torch.arange(3)).flatten().tolist()
    expected = [half for word in w for half in (word & 0xFFFF, word >> 16)]
    assert philox.rounding_bits(SOME, 24).tolist() == expected
    assert philox.rounding_bits(SOME, 9, start=7).tolist() == expected[7:16]


def test_rademacher_is_the_bits_of_the_words_in_order():
    w = philox.words(SOME, torch.arange(2)).flatten().tolist()
    assert sample(SOME, "rademacher", 256).tolist() == [1 - 2 * (word >> bit & 1) for word in w for bit in range(32)]


N = 1 << 20


def standard_errors(values: torch.Tensor, mean: float, variance: float) -> float:
    """How many standard errors the mean of independent values lies from what it should be."""
    return abs(values.double().mean().item() - mean) / math.sqrt(variance / len(values))


# Fixed addresses: bounds of five standard errors would fail one seed in 1.7 million, and never flake.
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_moments(distribution):
    z = sample(SOME, distribution, N).double()
    fourth, eighth = (1, 1) if distribution == "rademacher" else (3, 105)
    assert standard_errors(z, 0, 1) < 5
    assert (z.square().mean() - 1).abs() <= 5 * math.sqrt((fourth - 1) / N)
    assert (z.pow(4).mean() - fourth).abs() <= 5 * math.sqrt((eighth - fourth**2) / N)
    assert (z.pow(3).mean()).abs() <= 5 * math.sqrt((1 if distribution == "rademacher" else 15) / N)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_neighbours_and_other_addresses_are_uncorrelated(distribution):
    z = sample(SOME, distribution, N)
    others = [
        sample(Address(**{"seed": 11, "tensor": 22, "step": 33, "query": 44, "purpose": 0, field: 1}), distribution, N)
        for field in ("seed", "tensor", "step", "query", "purpose")
    ]
    others += [z.roll(shift) for shift in (1, 2, 3, 4, 32, 128)]
    for other in others:
        assert standard_errors(z * other, 0, 1) < 5
        if distribution == "gaussian":
            assert standard_errors(z.square() * other.square(), 1, 8) < 5


def test_gaussian_passes_kolmogorov_smirnov():
    z = sample(SOME, "gaussian", N).double().sort().values
    cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    ranks = torch.arange(N, dtype=torch.float64) / N
    distance = torch.maximum((cdf - ranks).abs().max(), (cdf - ranks - 1 / N).abs().max())
    assert distance < 1.95 / math.sqrt(N)  # Kolmogorov's distribution exceeds 1.95 once in a thousand


def exact_normals(w: torch.Tensor) -> torch.Tensor:
    """Box-Muller of words [n, 4] in float64, from the float32 number x and the integer angle."""
    a, b = w[:, 0::2], w[:, 1::2]
    x = ((a >> 1).to(torch.float32) + 0.5).double()
    turn = (b << 2 | 2) & 0xFFFFFFFF
    angle = (turn - (turn >> 31 << 32)).double() * (math.pi / 4 * 2.0**-31)
    r = (-2 * torch.log(x * 2.0**-31)).sqrt()
    c, s = torch.cos(angle), torch.sin(angle)
    c = torch.where(b >> 30 & 1 == 1, -c, c)
    swap = b >> 31 == 1
    return torch.stack((r * torch.where(swap, s, c), r * torch.where(swap, c, s)), dim=-1).flatten(-2)


def test_error_of_the_float32_arithmetic():
    w = philox.words(SOME, torch.arange(1 << 18))
    got, exact = philox.normals(w).double(), exact_normals(w)
    assert (got - exact).abs().max() < ABSOLUTE_ERROR
    assert ((got - exact) / exact).abs().max() < RELATIVE_ERROR


ABSOLUTE_ERROR, RELATIVE_ERROR = 8e-7, 3e-7  # stated in philox's docstring


def test_extreme_words_give_finite_values():
    edges = [0, 1, 2, 3, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 256, 2**32 - 2, 2**32 - 1]
    edges += [2**k + d for k in range(2, 32) for d in (-1, 0, 1)] + [
        int(2**k * math.sqrt(2)) + d for k in range(32) for d in (-1, 0, 1)
    ]
    edges = sorted({e for e in edges if 0 <= e < 2**32})
    a, b = (t.flatten() for t in torch.meshgrid(torch.tensor(edges), torch.tensor(edges), indexing="ij"))
    w = torch.stack((a, b, b, a), dim=-1)
    z = philox.normals(w)
    assert z.isfinite().all()
    assert z.abs().max() < 6.67
    assert (z.double() - exact_normals(w)).abs().max() < ABSOLUTE_ERROR
