"""Block-wise ZO-SGD: blocks from names, sequential and joint sweeps, the noise of blocks, and reuse of hidden states."""

from __future__ import annotations

import math

import pytest
import torch

from families import FAMILIES, batch, make
from smidgen.config import ConfigError
from smidgen.objective import ModelObjective
from smidgen.optim.zo_block import ZOBlock
from smidgen.params import ParamView
from smidgen.probing import Engine

D = 5


def setting(family="opt-untied"):
    kind, model = make(family)
    view = ParamView.of_model(model)
    return kind, model, view, Engine(model, view, kind)


def short(blocks):
    return [sorted(n.removeprefix("model.decoder.").removesuffix(".weight") for n in b) for b in blocks]


def test_blocks_by_level_from_the_top_down():
    _, _, view, _ = setting()
    opt = ZOBlock(view)
    names = short(opt.blocks)
    assert [b[0].split(".")[:2] for b in names[2:4]] == [["layers", "1"], ["layers", "0"]]
    assert names[0] == ["lm_head"] and names[1] == ["final_layer_norm", "final_layer_norm.bias"]
    assert names[4:] == [["embed_positions", "embed_tokens"]]
    assert sorted(n for b in opt.blocks for n in b) == sorted(view.entries)
    modules = short(ZOBlock(view, blocks="module").blocks)
    assert any(len(b) == 8 and all("self_attn." in n for n in b) for b in modules) and len(modules) == 2 + 2 * 5 + 2
    tensors = short(ZOBlock(view, blocks="tensor").blocks)
    assert ["layers.1.self_attn.q_proj", "layers.1.self_attn.q_proj.bias"] in tensors and len(tensors) == 2 + 2 * 8 + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_layers_are_blocks(family):
    view = setting(family)[2]
    blocks = ZOBlock(view).blocks
    layers = [b for b in blocks if len(b) > 5]
    assert len(layers) == (4 if family.startswith("t5") else 2)
    assert all(not any(part.isdigit() for part in n.split(".")) for b in blocks if b not in layers for n in b)


def test_a_pattern_makes_blocks_and_must_match():
    _, _, view, _ = setting()
    by_kind = ZOBlock(view, pattern=r"self_attn\.|fc[12]").blocks
    assert [len(b) for b in by_kind if any("fc1" in n or "self_attn." in n for n in b)] == [4, 16] or [
        len(b) for b in by_kind if any("fc1" in n or "self_attn." in n for n in b)
    ] == [16, 4]
    assert sorted(n for b in by_kind for n in b) == sorted(view.entries)
    with pytest.raises(ConfigError, match=r"pattern 'attention' matches none of the .* names like 'model.decoder"):
        ZOBlock(view, pattern="attention")
    with pytest.raises(ConfigError, match="not a regular expression"):
        ZOBlock(view, pattern="(")


def flat(opt, b, q=0):
    z = opt.directions(b)[q]
    parts = []
    for name in opt.view.entries:
        if name in opt.blocks[b]:
            shape = opt.view[name].tensor.shape
            out = torch.zeros(shape)
            z.accumulate(name, slice(0, shape[0]), out.view(shape[0], -1), 1.0)
            parts.append(out.flatten())
    return torch.cat(parts).double()


def test_noise_of_equal_blocks_is_uncorrelated_or_by_option_the_same():
    """Correlation of d signs has standard error 1 / sqrt(d)."""
    _, _, view, _ = setting()
    opt = ZOBlock(view)
    upper, lower = flat(opt, 2), flat(opt, 3)
    assert len(upper) == len(lower)
    assert abs(float(upper @ lower) / len(upper)) < 4 / math.sqrt(len(upper))
    shared = ZOBlock(view, compat_shared_noise=True)
    assert torch.equal(flat(shared, 2), flat(shared, 3)) and not torch.equal(flat(shared, 2), upper)
    first = flat(shared, 2)
    shared.t = 1
    assert not torch.equal(flat(shared, 2), first)


def tensors():
    return [torch.linspace(0.25, 1.0, D) * (i + 1) for i in range(3)]


def coupled(w):
    return ((w[0] * w[1]).sum() + w[2].sum() + 1.0) ** 2


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_joint_sweep_is_the_sum_of_single_block_updates(sides, queries):
    options = {"lr": 1e-3, "eps": 1e-2, "seed": 4, "sides": sides, "queries": queries, "update": "joint"}
    w = tensors()
    joint = ZOBlock(w, **options)
    joint.step(lambda: coupled(w))
    for i in range(3):
        v = tensors()
        single = ZOBlock(v, **options)
        single.blocks = [b for b in single.blocks if str(i) in b]
        single.step(lambda v=v: coupled(v))
        assert torch.equal(v[i], w[i]) and not torch.equal(v[i], tensors()[i])
        assert all(torch.equal(v[j], tensors()[j]) for j in range(3) if j != i)


def test_a_sequential_sweep_probes_with_the_upper_blocks_moved():
    w, v = tensors(), tensors()
    opt = ZOBlock(w, lr=1e-3, eps=1e-2, seed=4)
    opt.step(lambda: coupled(w))
    twin = ZOBlock(v, lr=1e-3, eps=1e-2, seed=4)
    for b, block in enumerate(twin.blocks):  # from the top down, written out
        (name,) = block
        z = flat(twin, b).float()
        i, start = int(name), v[int(name)].clone()
        values = []
        for sign in (1, -1):
            v[i] = start + sign * 1e-2 * z
            values.append(float(coupled(v)))
        v[i] = start - 1e-3 * (values[0] - values[1]) / 2e-2 * z
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(w, v, strict=True))
    joint = tensors()
    ZOBlock(joint, lr=1e-3, eps=1e-2, seed=4, update="joint").step(lambda: coupled(joint))
    assert not torch.equal(joint[0], w[0])


@pytest.mark.parametrize(
    "update,sides,forwards", [("sequential", 2, 12), ("joint", 2, 12), ("sequential", 1, 9), ("joint", 1, 7)]
)
def test_forwards_a_sweep(update, sides, forwards):
    w, calls = tensors(), []
    ZOBlock(w, update=update, sides=sides, queries=2).step(lambda: calls.append(1) or coupled(w))
    assert len(calls) == forwards


@pytest.mark.parametrize("update", ["sequential", "joint"])
def test_a_loss_that_is_not_finite_voids_its_block_only(update):
    w, calls = tensors(), []

    def loss():
        calls.append(1)
        return coupled(w) * (math.nan if len(calls) == 3 else 1.0)

    opt = ZOBlock(w, update=update, lr=1e-3, eps=1e-2)
    value = opt.step(loss)
    moved = [not torch.equal(a, b) for a, b in zip(w, tensors(), strict=True)]
    assert math.isfinite(value) and opt.outcome.voided == 1 and opt.outcome.written
    assert moved == [True, False, True]  # blocks run 2, 1, 0


@pytest.mark.parametrize("update", ["sequential", "joint"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_sweeps_with_reuse_are_those_without_bit_for_bit(family, update):
    ends = []
    for every in (0, 1, 2):
        kind, _, view, engine = setting(family)
        engine.reuse.every = every
        opt = ZOBlock(view, lr=1e-4, update=update, normalise="rms", seed=2)
        losses = [opt.step(ModelObjective(engine, [batch(kind, seed=t), batch(kind, seed=t + 9)])) for t in range(2)]
        ends.append((losses, [e.storage for e in view]))
        assert all(math.isfinite(x) for x in losses)
        assert (engine.reuse.skipped > 0) == (every == 1 and not family.startswith("t5")) or every == 2
    for losses, weights in ends[1:]:
        assert losses == ends[0][0]
        assert all(torch.equal(a, b) for a, b in zip(weights, ends[0][1], strict=True))


def test_a_sweep_of_twelve_layers_runs_about_half_of_them():
    """Layers run in a sweep of B = 12 blocks of one layer: 2 * (12 + 11 + ... + 1) of 2 * 12 * 12, and 12 for the first."""
    import transformers as tf

    config = tf.OPTConfig(
        vocab_size=37, hidden_size=8, word_embed_proj_dim=8, ffn_dim=8, num_hidden_layers=12, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.OPTForCausalLM(config).eval()
    view = ParamView.of_model(model, tuned=lambda name: ".layers." in name)
    engine = Engine(model, view, "causal")
    opt = ZOBlock(view, lr=1e-5)
    data = batch("causal")
    data["input_ids"], data["labels"] = data["input_ids"] % 37, data["labels"].clamp(max=36)
    assert len(opt.blocks) == 12
    opt.step(ModelObjective(engine, [data]))  # learns what to keep, and compares
    before = engine.reuse.skipped
    opt.step(ModelObjective(engine, [data]))
    run = 2 * 12 * 12 - (engine.reuse.skipped - before)
    assert run == 2 * sum(range(1, 13)) + 11
    assert engine.forwards == 2 * 24


@pytest.mark.trainer
def test_the_options_of_a_run_reach_it(tmp_path):
    import smidgen
    from smidgen.config_file import load
    from test_run import labelled

    data, found = labelled(tmp_path), []
    for every in (0, 1):
        values = {"data": str(data), "method": "zo_block", "train.max_steps": 2, "train.per_device_train_batch_size": 4}
        values |= {"reuse": every, "output": str(tmp_path / f"{every}")}
        found.append(smidgen.finetune(load(None, [], values), say=lambda line: None))
    assert found[0]["weights_sha256"] == found[1]["weights_sha256"] and found[0]["forwards"] == found[1]["forwards"]
    again = smidgen.replay("embedded", tmp_path / "1", tmp_path / "rebuilt")
    assert again["weights_sha256"] == found[1]["weights_sha256"]
