"""The Triton kernel on a real GPU gives the bits that the definition gives on the CPU."""

from __future__ import annotations

import pytest
import torch

from smidgen import noise
from smidgen.noise import Address

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DISTRIBUTIONS = ["rademacher", "gaussian"]
AT = Address(seed=2**63 + 1, tensor=2**32 - 1, step=3, query=4, purpose=noise.ROUND)


def terms(k: int) -> list[noise.Term]:
    """k terms with words on both sides of 2^31."""
    return [(Address(2**64 - 1 - i, 2**31 + i, i, i, noise.PROBE), 0.003 * (i + 1) / 7) for i in range(k)]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)


def masks(count: int) -> list[noise.Keep]:
    """A drawn mask and a packed one, both of about a third."""
    packed = noise.pack(torch.rand(count, generator=torch.Generator().manual_seed(8)) < 0.3)
    return [noise.Drawn.share(Address(2**63 + 9, 2**31 + 5, 2**32 - 1, 3, noise.MASK), 1 / 3), packed]


def agree(operation, *tensors: torch.Tensor, keep: noise.Keep | None = None, **options) -> bool:
    """The first tensor has the same bits after the operation on the GPU and, by the torch twin, on the CPU."""
    ours, theirs = [t.cuda() for t in tensors], [t.clone() for t in tensors]
    assert noise.backend("cuda") == "triton"
    masked = {} if keep is None else {"keep": keep}
    operation(*ours, **{k: v.cuda() if torch.is_tensor(v) else v for k, v in masked.items()}, **options)
    with noise.use("torch"):
        operation(*theirs, **masked, **options)
    return torch.equal(ours[0].cpu(), theirs[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_update(dtype, distribution, k, rounding):
    for count, start, decay in [(1, 0, 1.0), (5001, 77, 0.97), (300_001, 2**33 + 1, 1.0)]:
        options = {"terms": terms(k), "distribution": distribution, "decay": decay, "rounding": rounding, "start": start}
        assert agree(noise.update_, values(count, dtype=dtype), at=AT, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_displace(dtype, distribution):
    weight = values(37, 611, dtype=dtype)
    for k in (1, 3):
        options = {"terms": terms(k), "distribution": distribution}
        assert agree(noise.displace_, torch.empty_like(weight), weight, start=5, **options)
        rows = torch.tensor([36, 0, 7, 7, 1])
        assert agree(noise.displace_rows_, torch.empty(5, 611, dtype=dtype), weight, rows, **options)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_accumulate(distribution):
    assert agree(noise.accumulate_, values(5001), terms=terms(2), distribution=distribution, start=9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("mask", [0, 1])
def test_masked(dtype, distribution, mask):
    weight, start, options = values(37, 611, dtype=dtype), 131, {"terms": terms(2), "distribution": distribution}
    keep = masks(start + weight.numel())[mask]
    assert agree(noise.update_, weight, keep=keep, start=start, decay=0.97, at=AT, **options)
    assert agree(noise.displace_, torch.empty_like(weight), weight, keep=keep, start=start, **options)
    assert agree(noise.accumulate_, values(5001), keep=keep, start=start, **options)
    rows = torch.tensor([36, 0, 7, 7, 1])
    assert agree(noise.displace_rows_, torch.empty(5, 611, dtype=dtype), weight, rows, keep=keep, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_write(dtype, rounding):
    scales = 2.0 ** torch.arange(-160, 140, dtype=torch.float64)  # subnormal, normal and infinite in every type
    value = (values(9, 300).double() * 50 * scales).float()
    assert agree(noise.write_, torch.empty(9, 300, dtype=dtype), value, rounding=rounding, at=AT, start=3)


def test_more_rows_than_a_grid_axis_holds():
    weight, rows = values(100, 8), torch.arange(70_000) % 100
    assert agree(noise.displace_rows_, torch.empty(70_000, 8), weight, rows, terms=terms(1), distribution="rademacher")


def test_elements_beyond_2_to_the_31():
    """A tensor whose element numbers and byte addresses leave 32 bits; only its ends are compared."""
    count = 2**31 + 5001
    weight = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    noise.update_(weight, terms(1), "rademacher", at=AT)
    for first in (0, 2**31 - 300, count - 999):
        expected = torch.zeros(999, dtype=torch.bfloat16)
        with noise.use("torch"):
            noise.update_(expected, terms(1), "rademacher", at=AT, start=first)
        assert torch.equal(weight[first : first + 999].cpu(), expected)


def test_global_generators_are_untouched():
    state = torch.cuda.get_rng_state()
    noise.update_(torch.zeros(300, device="cuda"), terms(1), "gaussian", at=AT)
    assert torch.equal(torch.cuda.get_rng_state(), state)
