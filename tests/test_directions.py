"""Directions: a masked one is the dense one where the mask keeps, in every way it is asked, and nothing elsewhere."""

from __future__ import annotations

import pytest
import torch

from smidgen import noise
from smidgen.directions import Dense, Masked, OnePass, displace, displace_rows
from smidgen.lowrank import LowRank, matrices
from smidgen.params import ParamView

SHAPES = [(37, 61), (7,), (2, 1, 3), (), (130, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
AT = noise.Address(1, 0, 0, 0, noise.ROUND)


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    made = [(torch.randn(shape, generator=generator) * 0.02).to(dtype) for shape in SHAPES]
    made[0][0, :4] = torch.tensor([-0.0, 0.0, 1.0, -65504.0])
    return made


def masks(view, packed, share=0.4, step=0):
    drawn = {e.name: noise.Drawn.share(noise.Address(5, e.id, step, 0, noise.MASK), share) for e in view}
    if not packed:
        return drawn
    return {e.name: noise.pack(noise.kept(drawn[e.name], e.tensor.numel())) for e in view}


def kept(view, masks, name):
    return noise.kept(masks[name], view[name].tensor.numel()).view(view[name].tensor.shape)


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_a_masked_direction_is_the_dense_one_where_the_mask_keeps(packed, dtype, distribution):
    view = ParamView.of_tensors(tensors(dtype))
    M = masks(view, packed)
    dense = Dense(5, 3, 1, view.ids, distribution)
    z = Masked(dense, M)
    assert z.support is None and z.factors("0") is None
    for entry in view:
        w, keep = entry.storage, kept(view, M, entry.name)
        whole, got = torch.empty_like(w), torch.empty_like(w)
        displace([(dense, 0.01)], entry.name, w, whole)
        displace([(z, 0.01)], entry.name, w, got)
        expected = torch.where(keep, whole, w)
        assert torch.equal(bits(got), bits(expected))
        if w.ndim != 2:
            continue
        part = torch.empty_like(w[11:29])
        displace([(z, 0.01)], entry.name, w[11:29], part, first=11)
        assert torch.equal(bits(part), bits(expected[11:29]))
        rows = torch.tensor([5, 0, 36, 5])
        picked = torch.empty(4, w.shape[1], dtype=dtype)
        displace_rows([(z, 0.01)], entry.name, w, rows, picked)
        assert torch.equal(bits(picked), bits(expected[rows]))
        sums, mine = torch.zeros(18, w.shape[1]), torch.zeros(18, w.shape[1])
        dense.accumulate(entry.name, slice(11, 29), sums, 1.0)
        z.accumulate(entry.name, slice(11, 29), mine, 1.0)
        assert torch.equal(mine, torch.where(keep[11:29], sums, 0.0))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_writes_kept_entries_as_the_dense_one_does_and_no_others(packed, dtype):
    view, twin = (ParamView.of_tensors(tensors(dtype)) for _ in range(2))
    M, before = masks(view, packed), view.snapshot()
    Z = [Dense(5, 3, i, view.ids) for i in range(3)]
    view.apply_([(Masked(z, M), 0.001 * (i + 1)) for i, z in enumerate(Z)], at=AT, decay=0.9)
    twin.apply_([(z, 0.001 * (i + 1)) for i, z in enumerate(Z)], at=AT, decay=0.9)
    for entry in view:
        expected = torch.where(kept(view, M, entry.name), twin[entry.name].storage, before[entry.name])
        assert torch.equal(bits(entry.storage), bits(expected))


def test_a_tensor_that_is_not_contiguous_is_masked_in_its_own_order():
    w = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    view, twin = ParamView.of_tensors([w.T.contiguous().T]), ParamView.of_tensors([w.clone()])
    M, z = masks(view, True), Dense(5, 3, 0, view.ids)
    for v in (view, twin):
        v.apply_([(Masked(z, M), 0.1)], at=AT)
    assert torch.equal(view["0"].tensor, twin["0"].tensor) and not torch.equal(w, twin["0"].tensor)


def test_directions_with_different_masks_add_up():
    view, twin = (ParamView.of_tensors(tensors()) for _ in range(2))
    one, two = masks(view, False, step=0), masks(view, True, step=1)
    dense = Dense(5, 3, 0, view.ids)
    probe = [(Masked(dense, one), 0.01), (Masked(dense, two), 0.02)]
    assert OnePass.of(probe, "0") is None
    view.apply_(probe, at=AT)
    for z, s in probe:
        twin.apply_([(z, s)], at=AT)
    for entry in view:
        assert torch.equal(entry.storage, twin[entry.name].storage)
    with pytest.raises(ValueError, match="differ in their masks"):
        view.apply_(probe, at=AT, decay=0.5)


def test_what_makes_one_pass():
    ids = {"a": 1, "b": 2}
    dense, other = Dense(5, 3, 0, ids), Dense(5, 3, 1, ids)
    drawn = noise.Drawn.share(noise.Address(5, 1, 0, 0, noise.MASK), 0.5)
    again = noise.Drawn.share(noise.Address(5, 1, 0, 0, noise.MASK), 0.5)
    octets = torch.zeros(1, dtype=torch.uint8)
    assert OnePass.of([], "a").terms == []
    assert OnePass.of([(Masked(dense, {"a": drawn}), 1.0), (Masked(other, {"a": again}), 2.0)], "a").keep == drawn
    assert OnePass.of([(Masked(dense, {"a": octets}), 1.0), (Masked(other, {"a": octets}), 2.0)], "a").keep is octets
    assert OnePass.of([(Masked(dense, {"a": octets}), 1.0), (Masked(other, {"a": octets.clone()}), 2.0)], "a") is None
    assert OnePass.of([(Masked(dense, {"a": drawn}), 1.0), (other, 2.0)], "a") is None
    assert OnePass.of([(Masked(dense, {"a": drawn}), 1.0), (other, 2.0)], "b").keep is None  # no mask: kept whole
    assert OnePass.of([(dense, 1.0), (Dense(5, 3, 1, ids, "gaussian"), 1.0)], "a") is None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_of_directions_is_displaced_in_one_pass_with_the_bits_of_term_by_term(dtype, masked, monkeypatch):
    view = ParamView.of_tensors(tensors(dtype))
    M = masks(view, True)
    Z = [Dense(5, 3, query, view.ids, "gaussian") for query in range(3)]
    probe = [(Masked(z, M) if masked else z, 0.01 * (i + 1)) for i, z in enumerate(Z)]
    weight = view["0"].storage
    rows = torch.tensor([5, 0, 5, 36])
    value32 = weight.to(torch.float32, copy=True)
    for z, s in probe:
        z.accumulate("0", slice(0, len(weight)), value32, s)

    def refused(*_, **__):
        raise AssertionError("one term at a time")

    monkeypatch.setattr(noise, "accumulate_", refused)
    out = torch.empty_like(weight)
    displace(probe, "0", weight, out)
    assert torch.equal(bits(out), bits(value32.to(dtype)))
    part, looked_up = torch.empty_like(weight[7:]), torch.empty_like(weight[rows])
    displace(probe, "0", weight[7:], part, first=7)
    displace_rows(probe, "0", weight, rows, looked_up)
    assert torch.equal(bits(part), bits(out[7:])) and torch.equal(bits(looked_up), bits(out[rows]))
    displace([], "0", weight, out)
    assert torch.equal(bits(out), bits(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_sum_with_factors_are_those_of_the_whole_and_factors_are_made_once(dtype, monkeypatch):
    view = ParamView.of_tensors(tensors(dtype))
    weight, rows = view["0"].storage, torch.tensor([5, 0, 5, 36])
    Z = [LowRank(5, 3, query, view.ids, matrices(view), 2, 0) for query in range(2)]
    probe = [(Z[0], 0.01), (Dense(5, 3, 7, view.ids), 0.02), (Z[1], -0.03)]
    whole, looked_up = torch.empty_like(weight), torch.empty_like(weight[rows])
    displace(probe, "0", weight, whole)
    made = []
    original = LowRank.left
    monkeypatch.setattr(LowRank, "left", lambda z, name: made.append(name) or original(z, name))
    displace_rows(probe, "0", weight, rows, looked_up)
    assert made == ["0", "0"]
    close = torch.finfo(dtype).eps * whole.abs().max().item()
    assert torch.allclose(looked_up.double(), whole[rows].double(), rtol=0, atol=max(close, 1e-6))
