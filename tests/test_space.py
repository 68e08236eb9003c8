"""Small spaces: maps from the seed, their scale, and what does not fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from families import FAMILIES, batch, make
from smidgen import noise
from smidgen.adapt import dfo_lora
from smidgen.config import ConfigError
from smidgen.hidden import clipped_std
from smidgen.objective import ModelObjective
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.space import Space, shares


def tensors(dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return ParamView.of_tensors([torch.randn(s, generator=rng).to(dtype) for s in ((9, 7), (7, 41), (5,), ())])


@pytest.mark.parametrize("chunk", [1, 64, 1 << 20])
def test_a_map_is_its_seeds_noise_whatever_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr("smidgen.space._CHUNK", chunk)
    view = tensors()
    space = Space(view, ["0", "1"], seed=4, dimension=11)
    Z = np.random.default_rng(0).standard_normal((3, 11))
    P = noise.sample(noise.Address(4, view["1"].id, 0, 0, noise.SUBSPACE), "gaussian", 7 * 41 * 5).view(7 * 41, 5)
    expected = (P @ torch.tensor(Z[:, 6:], dtype=torch.float32).T / math.sqrt(15)).T.view(3, 7, 41)
    found = space.displacements(Z)
    assert all(torch.allclose(z.values["1"], e, atol=1e-5) for z, e in zip(found, expected, strict=True))
    alone = space.displacements(Z[1:2])[0]
    assert torch.allclose(alone.values["0"], found[1].values["0"], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_explicit_direction_in_every_form(dtype):
    """Displaced, looked up, accumulated in blocks of rows and as factors: one and the same."""
    view = tensors(dtype)
    space = Space(view, list(view.entries), seed=0)
    assert space.d == 63 + 125 + 5 + 1 and shares([63, 287, 5, 1], None, "") == [63, 125, 5, 1]
    (z,) = space.displacements(np.random.default_rng(0).standard_normal((1, space.d)))
    for entry in view:
        weight, value = entry.storage, z.values[entry.name]
        expected = (weight.float() + 0.5 * value).to(dtype)
        out = torch.full_like(weight, math.nan)
        z.displaced(entry.name, weight, 0.5, out)
        assert torch.allclose(out, expected, atol=1e-6)
        rows = 1 if weight.ndim == 0 else len(weight)
        flat = torch.zeros(rows, value.numel() // rows)
        for first in range(0, rows, 4):
            part = slice(first, min(first + 4, rows))
            z.accumulate(entry.name, part, flat[part], 2.0)
        assert torch.equal(flat.view(value.shape), 2 * value)
        if weight.ndim == 2:
            A, B = z.factors(entry.name)
            assert torch.equal(A @ B.T, value) and A.shape[1] == min(value.shape)
            picked = torch.tensor([3, 0, 3])
            out = torch.empty(3, weight.shape[1], dtype=dtype)
            z.displaced_rows(entry.name, weight, picked, 0.5, out)
            assert torch.equal(out, expected[picked])


def test_maps_look_like_hidden_states():
    """std(P z) for z ~ N(0, sigma^2), of layer 0 and of layer 1, against the formula by hand."""
    kind, model = make("roberta-masked")
    for module in (model.roberta.embeddings.word_embeddings, model.roberta.encoder.layer[0].output.LayerNorm):
        module.weight.data *= 3.0
    adapted = dfo_lora.build(model, dfo_lora.Config(rank=24))
    view, rows = adapted.view, batch(kind, seed=10)
    stds = ModelObjective(Engine(adapted.model, view, kind), [rows]).hidden_stds(list(view.entries))
    with torch.no_grad():
        states = model.roberta(rows["input_ids"], rows["attention_mask"], output_hidden_states=True).hidden_states[1]
    hidden = clipped_std(states[rows["attention_mask"].bool()])
    embedding = float(model.roberta.embeddings.word_embeddings.weight.std())
    layers = [[n for n in view.entries if f"layer.{i}." in n] for i in (0, 1)]
    assert stds[layers[0][0]] == pytest.approx(embedding, rel=1e-5) and stds[layers[1][0]] == pytest.approx(hidden, rel=1e-5)
    sigma, alpha, q = 0.5, 0.3, 30
    Z = sigma * np.random.default_rng(0).standard_normal((200, 4 * q))
    for names, std in zip(layers, (embedding, hidden), strict=True):
        for whole, factor in ((False, 1.0), (True, 0.5)):  # 500 in place of 125 under the root: half
            space = Space(view, names, seed=1, dimension=4 * q, stds=stds, sigma=sigma, alpha=alpha, whole=whole)
            found = space.displacements(Z)
            for name in names:
                expected = alpha * std * factor if ".lora_A." in name else sigma / math.sqrt(3)
                spread = float(torch.stack([z.values[name] for z in found]).std())
                assert spread == pytest.approx(expected, rel=0.04)  # 576 x 30 entries of P and 200 z: about 1 %


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_of_every_family(family):
    kind, model = make(family)
    adapted = dfo_lora.build(model, dfo_lora.Config())
    objective = ModelObjective(Engine(adapted.model, adapted.view, kind), [batch(kind, seed=s) for s in (10, 11)])
    found = objective.hidden_stds(list(adapted.view.entries))
    assert all(math.isfinite(std) and std > 0 for std in found.values()) and len(set(found.values())) > 1
    assert objective.engine.forwards == 2


def test_a_fused_projection_moves_in_its_query_and_key_parts():
    _, model = make("gpt2")
    view = dfo_lora.build(model, dfo_lora.Config(rank=2)).view
    (z,) = Space(view, list(view.entries)[:2], seed=0, dimension=8).displacements(np.ones((1, 8)))
    A, B = (z.values[name] for name in list(view.entries)[:2])
    assert A.shape == (4, 24) and B.shape == (72, 4) and bool((A != 0).all())
    assert not B[48:].any() and not B[:24, 2:].any() and not B[24:48, :2].any()
    assert bool((B[:24, :2] != 0).all()) and bool((B[24:48, 2:] != 0).all())


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        (301, "dimension = 301, but the block of 'w' has 300 weights: give at most as many"),
        (1, "dimension = 1, but the block of 'w' has 2 tensors"),
        (250, "one of which has 100 weights: give at most 200"),
    ],
)
def test_dimensions_that_do_not_fit(dimension, message):
    with pytest.raises(ConfigError, match=message):
        shares([100, 200], dimension, "w")


def test_a_block_that_is_too_large_names_the_small_schemes():
    with pytest.raises(ConfigError, match=r"8,388,608 weights.*scheme dfo_lora"):
        shares([1 << 23], None, "w")
