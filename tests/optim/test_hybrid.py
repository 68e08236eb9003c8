"""Hybrid: which part back-propagates, what it costs in memory, and both updates against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from families import FAMILIES, batch, make
from smidgen.config import ConfigError
from smidgen.directions import Dense
from smidgen.objective import ModelObjective
from smidgen.optim.hybrid import Config, Hybrid, parts
from smidgen.params import ParamView, shapes
from smidgen.probing import Engine


def setting(family="opt-untied"):
    kind, model = make(family)
    view = ParamView.of_model(model)
    return kind, model, view, Engine(model, view, kind)


def test_the_upper_part_is_the_last_layers_and_what_follows_them():
    _, _, view, _ = setting()
    opt = Hybrid(view, top=1)
    above = set(opt.upper)
    assert {n for n in view.entries if ".layers.1." in n} < above and "lm_head.weight" in above
    assert "model.decoder.final_layer_norm.weight" in above
    assert above & {n for n in view.entries if ".layers.0." in n or "embed" in n} == set()
    assert sorted(opt.upper + opt.lower) == sorted(view.entries)
    assert set(Hybrid(view, pattern=r"fc2").upper) == {n for n in view.entries if "fc2" in n}
    _, _, bert, _ = setting("bert-classification")
    assert "classifier.weight" in Hybrid(bert).upper and "bert.embeddings.LayerNorm.weight" in Hybrid(bert).lower


def test_parts_that_would_be_empty_are_named():
    _, _, view, _ = setting()
    with pytest.raises(ConfigError, match="top = 3, but the tuned tensors belong to 2 layers"):
        Hybrid(view, top=3)
    with pytest.raises(ConfigError, match="none be left for the zeroth-order part"):
        Hybrid(view, pattern="weight|bias")
    with pytest.raises(ConfigError, match="pattern 'conv' matches none"):
        Hybrid(view, pattern="conv")
    with pytest.raises(ConfigError, match=r"none of the tuned tensors, such as 'prompt\.weight', belongs to a layer"):
        parts(["prompt.weight"], Config())


def test_no_activation_of_the_lower_part_is_kept_for_the_backward_pass():
    kind, _, view, engine = setting()
    opt = Hybrid(view, lr=1e-6)
    data = batch(kind)
    engine.check_batch(data)
    kept = {}
    for part in ("upper", "all"):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t):
            objective = ModelObjective(engine, [data])
            if part == "upper":
                opt.step(objective)
            else:
                with torch.enable_grad():
                    objective.backward(dropout=False)
        weights = {e.tensor.data_ptr() for e in view}
        kept[part] = sum(t.numel() for t in saved if t.data_ptr() not in weights)
        own = {e.name for e in view if any(t.data_ptr() == e.tensor.data_ptr() for t in saved)}
        assert part == "all" or own <= set(opt.upper)
    assert 0 < kept["upper"] < 0.6 * kept["all"]  # one layer of two, and the head


@pytest.mark.parametrize("sides,queries,forwards", [(2, 1, 3), (1, 1, 2), (2, 2, 5), (1, 3, 4)])
def test_forwards_and_backwards_a_step(sides, queries, forwards):
    kind, _, view, engine = setting()
    Hybrid(view, sides=sides, queries=queries).step(ModelObjective(engine, [batch(kind)]))
    assert (engine.forwards, engine.backwards) == (forwards, 1)


def low(w):
    return w[0].pow(2).sum() * 0.5 + (w[0].sum() * w[1].sum()) + w[1].pow(4).sum()


def start():
    return [torch.linspace(-1.0, 1.0, 6).requires_grad_(), torch.linspace(0.5, 1.0, 4).requires_grad_()]


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("first_order", ["adamw", "sgd"])
def test_both_updates_are_made_at_the_same_theta(first_order, sides):
    w = start()
    opt = Hybrid(w, lr=1e-2, eps=1e-2, top_lr=1e-2, first_order=first_order, max_grad_norm=0, seed=5, sides=sides)
    assert (opt.upper, opt.lower) == (["1"], ["0"])
    before = low(w).item()
    assert opt.step(lambda: low(w)) == pytest.approx(before)
    twin = start()
    low(twin).backward()
    reference = (torch.optim.AdamW if first_order == "adamw" else torch.optim.SGD)([twin[1]], lr=1e-2, weight_decay=0.0)
    z = torch.zeros(6)
    Dense(5, 0, 0, {"0": 0}).accumulate("0", slice(0, 6), z, 1.0)
    values = []
    for s in (1, -1 if sides == 2 else 0):
        values.append(low([twin[0].detach() + s * 1e-2 * z, twin[1].detach()]).item())
    c = (values[0] - values[1]) / (sides * 1e-2)
    reference.step()
    assert torch.allclose(w[0].detach(), twin[0].detach() - 1e-2 * c * z, atol=1e-4)
    assert torch.allclose(w[1].detach(), twin[1].detach(), atol=1e-6)
    assert all(t.grad is None for t in w)


def test_one_dead_part_leaves_the_other_alive():
    w, calls = start(), []

    def loss():
        calls.append(1)
        return low(w) * (math.nan if len(calls) == 2 else 1.0)

    opt = Hybrid(w, lr=1e-3)
    assert math.isfinite(opt.step(loss)) and opt.outcome.voided == 1
    assert torch.equal(w[0], start()[0]) and not torch.equal(w[1], start()[1])


def test_gradients_are_let_go_when_an_evaluation_raises():
    w, calls = start(), []

    def loss():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no")
        return low(w)

    opt = Hybrid(w)
    with pytest.raises(RuntimeError, match="no"):
        opt.step(loss)
    assert all(t.grad is None for t in w) and all(torch.equal(a, b) for a, b in zip(w, start(), strict=True))


def test_dropout_is_off_in_both_parts():
    kind, model, view, engine = setting()
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    objective = ModelObjective(engine, [batch(kind)])
    model.train()
    try:
        loss = Hybrid(view).step(objective)
        assert model.training
    finally:
        model.eval()
    other = setting()[3]
    assert loss == pytest.approx(float(ModelObjective(other, [batch(kind)]).losses([()])), abs=1e-6)


@pytest.mark.parametrize("first_order", ["adamw", "sgd"])
def test_state_is_held_for_the_upper_part_only(first_order):
    kind, _, view, engine = setting()
    opt = Hybrid(view, first_order=first_order)
    opt.step(ModelObjective(engine, [batch(kind)]))
    held = sum(v.numel() * v.element_size() for s in opt.state.values() for v in s.values())
    assert held == Hybrid.state_bytes(shapes(view), opt.config)
    assert {n for n in view.entries if opt.state.get(view[n].tensor)} == (set(opt.upper) if first_order == "adamw" else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_steps(family):
    kind, _, view, engine = setting(family)
    opt = Hybrid(view, lr=1e-5, normalise="rms", top_lr=1e-3)
    objective = ModelObjective(engine, [batch(kind), batch(kind, seed=3)])
    first = float(objective.losses([()]))
    for _ in range(2):
        assert math.isfinite(opt.step(objective))
    assert float(objective.losses([()])) < first
    assert all(e.tensor.grad is None and e.tensor.requires_grad for e in view)


def test_back_propagation_over_a_quantised_base_without_adapter_is_refused():
    import smidgen

    for method in ("hybrid", "adamw"):
        model = make("llama-tied")[1]
        model.is_quantized = True
        with pytest.raises(ConfigError, match=rf"{method} back-propagates, .*quantised.*--scheme lora"):
            smidgen.Trainer(model=model, method=method)


@pytest.mark.trainer
def test_a_run_resumes_from_its_checkpoint(tmp_path):
    from test_trainer import equal, run

    options = {"method": "hybrid", "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    straight, t = run(tmp_path / "a", **options)
    assert (t.engine.forwards, t.engine.backwards) == (15, 5)
    run(tmp_path / "b", stop=4, **options)
    resumed, again = run(tmp_path / "b", resume=True, **options)
    assert equal(straight, resumed) and again.engine.forwards == 15
