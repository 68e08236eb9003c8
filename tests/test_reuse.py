"""Reuse of hidden states: the same bits, fewer layers, nothing held that nobody asks for."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from families import FAMILIES, batch, make
from smidgen import noise
from smidgen.directions import Dense
from smidgen.objective import ModelObjective
from smidgen.params import ParamView
from smidgen.probing import Engine

STACKED = [f for f in FAMILIES if not f.startswith("t5")]
AT = noise.Address(0, 0, 0, 0, noise.ROUND)


def setting(family="opt-untied", dtype=torch.float32):
    kind, model = make(family, dtype)
    view = ParamView.of_model(model)
    return kind, model, view, Engine(model, view, kind)


def in_layer(view, i):
    return frozenset(n for n in view.entries if f".{i}." in n)


def pair(view, names, query=0):
    z = Dense(7, 0, query, view.ids, support=frozenset(names))
    return [((z, 1e-2),), ((z, -1e-2),)]


def sweep(view, kind, engine, steps=2, parts=1):
    """Layers from the top down, then what is left, each updated at once; all losses."""
    top, low = in_layer(view, 1), in_layer(view, 0)
    rest = frozenset(view.entries) - top - low
    values = []
    for t in range(steps):
        objective = ModelObjective(engine, [batch(kind, seed=10 * t + i) for i in range(parts)])
        for names in (top, low, rest):
            up, down = objective.losses(pair(view, names, t)).tolist()
            values += [up, down]
            view.apply_([(Dense(7, 0, t, view.ids, support=names), 1e-2)], at=AT, names=names)
    return values


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sweep_with_reuse_is_one_without_bit_for_bit(family, dtype):
    ends = []
    for every in (0, 1):
        kind, model, view, engine = setting(family, dtype)
        engine.reuse.every = every
        values = sweep(view, kind, engine, parts=2)
        ends.append((values, {n: p.detach().clone() for n, p in model.named_parameters()}))
        assert (engine.reuse.skipped > 0) == (every == 1 and family in STACKED)
        assert engine.forwards == len(values) * 2  # what checks the reuse is not counted
        assert all("forward" not in m.__dict__ and not m._forward_hooks for m in model.modules())
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(ends[0][1][n], ends[1][1][n]) for n in ends[0][1])


def test_layers_below_the_probe_are_not_run():
    kind, model, view, engine = setting()
    calls = []
    for i, layer in enumerate(model.model.decoder.layers):
        layer.fc1.register_forward_hook(lambda *_, i=i: calls.append(i))
    sweep(view, kind, engine, steps=2)
    behind = ["model.decoder.final_layer_norm.weight", "lm_head.weight"]
    ModelObjective(engine, [batch(kind)]).losses(pair(view, behind))
    calls.clear()
    objective = ModelObjective(engine, [batch(kind)])
    objective.losses(pair(view, in_layer(view, 1)))
    assert calls == [0, 1, 1]  # the second probe starts at layer 1
    calls.clear()
    objective.losses(pair(view, behind, 1))
    assert calls == [1]  # from the hidden states before layer 1, and then from those behind it
    calls.clear()
    objective.losses(pair(view, ["model.decoder.embed_tokens.weight"], 2))
    assert calls == [0, 1, 0, 1]


def test_a_write_below_ends_the_reuse_and_one_above_does_not():
    kind, _, view, engine = setting()
    objective = ModelObjective(engine, [batch(kind)])
    probes = pair(view, in_layer(view, 1))
    objective.losses(probes)
    skipped = engine.reuse.skipped
    above = next(iter(in_layer(view, 1)))
    view.write_(above, view[above].storage * 1.5, at=AT)
    objective.losses(probes[:1])
    assert engine.reuse.skipped == skipped + 1
    below = next(iter(in_layer(view, 0)))
    view.write_(below, view[below].storage * 1.5, at=AT)
    got = objective.losses(probes[:1])
    assert engine.reuse.skipped == skipped + 1
    assert torch.equal(got, ModelObjective(Engine(engine.model, view, kind), [batch(kind)]).losses(probes[:1]))


def test_only_what_is_asked_for_is_held_and_only_while_its_data_lives():
    kind, _, view, engine = setting()
    objective = ModelObjective(engine, [batch(kind)])
    objective.losses([(), *pair(view, view.entries)])
    assert objective.held[0].nbytes() == 0  # all layers are displaced: nothing to hold
    objective.losses(pair(view, in_layer(view, 1)))
    assert objective.held[0].nbytes() == 3 * 9 * 24 * 4  # batch x length x width, once
    tensor = weakref.ref(next(iter(objective.held[0]._states.values()))[0])
    del objective
    gc.collect()
    assert tensor() is None


def test_every_second_layer_only():
    kind, _, view, engine = setting()
    engine.reuse.every = 2
    objective = ModelObjective(engine, [batch(kind)])
    objective.losses(pair(view, in_layer(view, 1)))
    assert engine.reuse.skipped == 0 and objective.held[0].nbytes() == 0
    objective.losses(pair(view, ["model.decoder.final_layer_norm.weight"]))
    assert engine.reuse.skipped == 2


def test_a_model_that_cannot_is_named_once_and_only_when_it_matters(caplog):
    kind, _, view, engine = setting("t5-tied")
    with caplog.at_level("WARNING", "smidgen"):
        ModelObjective(engine, [batch(kind)]).losses([((Dense(7, 0, 0, view.ids), 1e-2),)])
        assert "reuse" not in caplog.text
        for _ in range(2):
            ModelObjective(engine, [batch(kind)]).losses(pair(view, ["shared.weight"]))
    assert caplog.text.count("hidden states are not reused") == 1 and "no single stack" in caplog.text


def test_layers_that_talk_to_each_other_on_the_side_are_noticed(caplog):
    """A layer whose result depends on more than its input: the comparison at first use turns the reuse off."""
    kind, model, view, engine = setting()
    layers = model.model.decoder.layers
    said = []
    layers[0].fc2.register_forward_hook(lambda *_: said.append(1))
    layers[1].fc2.register_forward_hook(lambda m, a, out: (out * (1 + len(said)), said.clear())[0])
    objective = ModelObjective(engine, [batch(kind)])
    probes = pair(view, in_layer(view, 1))
    with caplog.at_level("WARNING", "smidgen"):
        got = objective.losses(probes)
    assert "changes the loss" in caplog.text
    engine.reuse.every = 0
    assert torch.equal(got, objective.losses(probes))


def test_hidden_states_changed_in_place_are_not_reused():
    kind, _, view, engine = setting()
    objective = ModelObjective(engine, [batch(kind)])
    probes = pair(view, in_layer(view, 1))
    objective.losses(probes[:1])
    next(iter(objective.held[0]._states.values()))[0].mul_(2.0)
    skipped = engine.reuse.skipped
    objective.losses(probes[1:])
    assert engine.reuse.skipped == skipped
