"""Masks of noise: the asked share, the same bits on all backends, and nothing else touched."""

from __future__ import annotations

import math

import pytest
import torch
from test_backends import AT, BACKENDS, COMPILED, DISTRIBUTIONS, DTYPES, ON, RANGES, same_bits, terms, values

from smidgen import noise
from smidgen.noise import Address, Drawn, philox

SHARES = [0.5, 0.25, 1 / 3, 0.999, 2**-32, 0.0]
HERE = Address(seed=2**63 + 9, tensor=2**31 + 5, step=2**32 - 1, query=3, purpose=noise.MASK)


def bits(count: int, share: float = 0.3) -> torch.Tensor:
    return noise.pack(torch.rand(count, generator=torch.Generator().manual_seed(8)) < share)


def run(backend: str, operation, *tensors: torch.Tensor, keep=None, **options) -> torch.Tensor:
    """The first tensor after the operation, which works on copies."""
    to = ON if backend == "triton" else "cpu"
    copies = [t.to(to, copy=True) for t in tensors]
    with noise.use(backend):
        operation(*copies, keep=keep.to(to) if isinstance(keep, torch.Tensor) else keep, **options)
    return copies[0].cpu()


@pytest.mark.parametrize("share", [0.5, 0.1, 1 / 3, 0.9, 1e-3, 1 - 1e-4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_share_of_kept_elements_is_the_asked_one(share, seed):
    n = 1 << 20
    ones = torch.zeros(n)
    keep = Drawn.share(Address(seed, 7, 1, 0, noise.MASK), share)
    noise.accumulate_(ones, [(terms(1)[0][0], 1.0)], "rademacher", keep=keep)
    assert abs(int((ones != 0).sum()) - share * n) < 4 * math.sqrt(share * (1 - share) * n)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_kept_elements_are_independent(share):
    """Of their neighbours, of elements 128 on, of the noise they mask and of the masks at other steps."""
    n = 1 << 18
    k = (noise.kept(Drawn.share(HERE, share), n).double() - share) / math.sqrt(share * (1 - share))
    other = noise.kept(Drawn.share(Address(1, 2, 3, 0, noise.MASK), share), n).double()
    other = (other - share) / math.sqrt(share * (1 - share))
    z = noise.sample(Address(HERE.seed, HERE.tensor, HERE.step, HERE.query, noise.PROBE), "rademacher", n).double()
    for a, b in [(k[1:], k[:-1]), (k[32:], k[:-32]), (k[128:], k[:-128]), (k, z), (k, other)]:
        assert abs((a * b).mean()) < 4 / math.sqrt(len(a))


def test_the_threshold_is_met_to_the_last_digit():
    """The definition written out: the uniform number of an element, digit by digit, against every threshold around it."""
    element = 128 * 5 + 77
    uniform = 0
    for digit in range(philox.DIGITS):
        w = philox.words(HERE, torch.tensor([5 * philox.DIGITS + digit]))[0]
        uniform = uniform << 1 | int(w[77 // 32]) >> 77 % 32 & 1
    for backend in BACKENDS:
        for threshold, kept in [(uniform, False), (uniform + 1, True), (0, False), (1 << 32, True)]:
            keep = Drawn(HERE, threshold)
            assert bool(noise.kept(keep, 1, start=element)) == kept
            options = {"terms": terms(1), "distribution": "rademacher", "start": element, "keep": keep}
            assert (run(backend, noise.accumulate_, torch.zeros(1), **options) != 0).item() == kept


def test_digits_that_cannot_decide_are_not_drawn():
    assert [Drawn.share(HERE, s).digits for s in (1.0, 0.5, 0.75, 0.125, 2**-32, 0.0)] == [0, 1, 2, 3, 32, 0]
    with pytest.raises(ValueError, match=r"2\^32"):
        Drawn(HERE, (1 << 32) + 1)


def test_packed_bits_come_back():
    for count in (1, 7, 8, 9, 1000):
        mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
        packed = noise.pack(mask)
        assert packed.dtype == torch.uint8 and packed.shape == (-(-count // 8),)
        assert torch.equal(noise.kept(packed, count), mask)
        assert torch.equal(noise.kept(packed, count // 2, start=count // 3), mask[count // 3 :][: count // 2])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_elements_get_the_bits_of_the_dense_pass_and_others_stay(backend, dtype, distribution):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("goes through the twin")
    weight = torch.cat([values(1000, dtype=dtype), torch.tensor([-0.0, 0.0, math.inf, 65504.0, 1e-7], dtype=dtype)])
    options = {"terms": terms(2), "distribution": distribution, "decay": 0.97, "start": 77, "at": AT}
    dense = run(backend, noise.update_, weight, **options)
    for keep in (Drawn.share(HERE, 0.4), bits(2000)):
        kept = noise.kept(keep, len(weight), start=77)
        got = run(backend, noise.update_, weight, keep=keep, **options)
        same = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
        assert torch.equal(got.view(same), torch.where(kept, dense, weight).view(same))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("share", [*SHARES, None])
def test_update(dtype, distribution, k, share):
    options = {"terms": terms(k), "distribution": distribution, "decay": 0.97, "at": AT}
    ranges = RANGES if k == 1 else RANGES[3::4]
    for count, start in ranges:
        if share is None and start > 2**30:
            continue  # bits for all elements before
        weight, keep = values(count, dtype=dtype), bits(start + count) if share is None else Drawn.share(HERE, share)
        expected = run("torch", noise.update_, weight, start=start, keep=keep, **options)
        assert same_bits(run("numba", noise.update_, weight, start=start, keep=keep, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("share", [0.5, 1 / 3, None])
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is for Linux")
def test_update_by_triton(dtype, distribution, share):
    options = {"terms": terms(2), "distribution": distribution, "decay": 0.97, "at": AT}
    for count, start in [(1, 0), (2500, 77), (130, 2**33 + 1)]:
        if share is None and start > 2**30:
            continue
        weight, keep = values(count, dtype=dtype), bits(start + count) if share is None else Drawn.share(HERE, share)
        expected = run("torch", noise.update_, weight, start=start, keep=keep, **options)
        assert same_bits(run("triton", noise.update_, weight, start=start, keep=keep, **options), expected)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.5, 0.3, None])
def test_displace_and_accumulate(backend, dtype, share):
    weight = values(37, 61, dtype=dtype)
    keep = bits(37 * 61 + 5) if share is None else Drawn.share(HERE, share)
    for k in (1, 3):
        options = {"terms": terms(k), "distribution": "rademacher", "start": 5, "keep": keep}
        for out_dtype in {dtype, torch.float32}:
            out = torch.full((37, 61), 7.0, dtype=out_dtype)
            expected = run("torch", noise.displace_, out, weight, **options)
            assert same_bits(run(backend, noise.displace_, out, weight, **options), expected)
            kept = noise.kept(keep, weight.numel(), start=5).view_as(weight)
            assert torch.equal(expected[~kept], weight[~kept].to(out_dtype))
        expected = run("torch", noise.accumulate_, weight.float(), **options)
        assert same_bits(run(backend, noise.accumulate_, weight.float(), **options), expected)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 61, 128, 2100])
@pytest.mark.parametrize("share", [0.3, None])
def test_displace_rows(backend, dtype, width, share):
    weight, rows = values(19, width, dtype=dtype), torch.tensor([18, 0, 7, 7, 1])
    keep = bits(19 * width) if share is None else Drawn.share(HERE, share)
    options = {"terms": terms(2), "distribution": "gaussian", "keep": keep}
    out = torch.empty(5, width, dtype=dtype)
    expected = run("torch", noise.displace_rows_, out, weight, rows, **options)
    assert same_bits(run(backend, noise.displace_rows_, out, weight, rows, **options), expected)
    assert same_bits(expected, run("torch", noise.displace_, torch.empty_like(weight), weight, **options)[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_does_not_matter(dtype):
    weight, before = values(1_100_003, dtype=dtype), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for keep in (Drawn.share(HERE, 0.1), bits(len(weight) + 77)):
                options = {"terms": terms(1), "distribution": "rademacher", "at": AT, "start": 77, "keep": keep}
                results.append(run("numba", noise.update_, weight, **options))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.zeros(2, dtype=torch.uint8), "16 bits for 24 elements"),
        (torch.zeros(24, dtype=torch.bool), "uint8"),
        (torch.zeros(3, 8, dtype=torch.uint8), "vector"),
    ],
)
def test_masks_that_do_not_fit_are_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        noise.update_(values(4, 6), terms(1), "rademacher", at=AT, keep=keep)


def test_a_drawn_mask_has_room_for_2_34_elements():
    keep = Drawn.share(HERE, 0.5)
    noise.displace_(torch.empty(4), values(4), terms(1), "rademacher", start=(1 << 34) - 4, keep=keep)
    with pytest.raises(ValueError, match=r"2\^32"):
        noise.displace_(torch.empty(4), values(4), terms(1), "rademacher", start=(1 << 34) - 3, keep=keep)
