"""Objectives: reduction, records, closures."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from families import FAMILIES, VOCAB, batch, make
from smidgen.called import CalledObjective
from smidgen.config import ConfigError
from smidgen.directions import Dense
from smidgen.objective import ClosureObjective, ModelObjective, Recorded, Replayed, as_objective
from smidgen.params import ParamView
from smidgen.probing import Engine


def setting(family="llama-tied"):
    kind, model = make(family)
    view = ParamView.of_model(model)
    return kind, model, view, Engine(model, view, kind)


def probes(view):
    return [(), ((Dense(1, 0, 0, view.ids), 1e-2),), ((Dense(1, 0, 1, view.ids), -1e-2),)]


@pytest.mark.parametrize("family", ["llama-tied", "bert-classification", "t5-tied"])
def test_a_ragged_accumulated_batch_equals_the_whole_batch(family):
    kind, _, view, engine = setting(family)
    whole = batch(kind, rows=5, labels="all")
    if whole["labels"].ndim == 2:
        whole["labels"][2, 2:] = -100  # rows with different numbers of labels
    parts = [{k: v[a:b] for k, v in whole.items()} for a, b in ((0, 1), (1, 4), (4, 5))]
    together = ModelObjective(engine, [whole]).losses(probes(view))
    split = ModelObjective(engine, parts).losses(probes(view))
    assert together.dtype == torch.float64
    assert torch.allclose(together, split, atol=1e-6)
    means = torch.stack([ModelObjective(engine, [p]).losses([()]) for p in parts]).mean(0)
    assert kind == "classification" or not torch.allclose(means, together[:1], atol=1e-4)  # the naive mean is wrong


def test_each_gives_one_loss_a_row():
    kind, _, view, engine = setting()
    whole = batch(kind, rows=4, labels="all")
    each = ModelObjective(engine, [whole]).losses(probes(view), each=True)
    assert each.shape == (3, 4)
    for row in range(4):
        alone = ModelObjective(engine, [{k: v[row : row + 1] for k, v in whole.items()}]).losses(probes(view))
        assert torch.allclose(each[:, row], alone, atol=1e-5)


@pytest.mark.parametrize("names", [None, ["model.norm.weight"]])
def test_backward_gives_the_models_own_gradient_of_the_accumulated_batch(names):
    kind, model, _, engine = setting()
    whole = batch(kind, rows=5, labels="all")
    parts = [{k: v[a:b] for k, v in whole.items()} for a, b in ((0, 2), (2, 5))]
    loss = ModelObjective(engine, parts).backward(names)
    got = {n: p.grad for n, p in model.named_parameters()}
    if names is not None:
        assert [n for n, g in got.items() if g is not None] == names
        assert all(p.requires_grad for p in model.parameters())
    model.zero_grad()
    model.train()
    own = model(**whole).loss
    own.backward()
    assert abs(loss - float(own.detach())) < 1e-6
    for name, parameter in model.named_parameters():
        if names is None or name in names:
            assert torch.allclose(got[name], parameter.grad, atol=1e-6), name


def test_a_trainers_own_loss_is_weighted_or_summed():
    kind, model, view, engine = setting()
    whole = batch(kind, rows=5, labels="all")
    parts = [{k: v[a:b] for k, v in whole.items()} for a, b in ((0, 2), (2, 5))]
    want = ModelObjective(engine, [whole]).losses(probes(view))
    mean = CalledObjective(engine, parts, lambda b: model(**b).loss, scaled=False)
    assert torch.allclose(mean.losses(probes(view)), want, atol=1e-5)
    items = int((whole["labels"][:, 1:] != -100).sum())
    summed = CalledObjective(engine, parts, lambda b: model(**b, num_items_in_batch=items).loss, scaled=True)
    assert torch.allclose(summed.losses(probes(view)), want, atol=1e-5)


def test_recorded_and_replayed_answers_are_the_same_bits():
    kind, _, view, engine = setting()
    recorded = Recorded(ModelObjective(engine, [batch(kind)]))
    first = recorded.losses(probes(view))
    each = recorded.losses(probes(view)[:2], each=True)
    replayed = Replayed(recorded.values)
    assert torch.equal(replayed.losses(probes(view)), first)
    assert torch.equal(replayed.losses(probes(view)[:2], each=True), each)
    assert replayed.done()
    with pytest.raises(ValueError, match="asks for more"):
        replayed.losses([()])


def test_closures_are_put_back_and_bad_questions_refused():
    weight = torch.linspace(0, 1, VOCAB)
    view = ParamView.of_tensors([weight])
    before = weight.clone()
    objective = as_objective(lambda: (weight**2).sum(), view)
    assert isinstance(objective, ClosureObjective)
    values = objective.losses([(), ((Dense(1, 0, 0, view.ids), 0.5),)])
    assert torch.equal(weight, before) and values[0] != values[1]
    assert as_objective(objective, view) is objective
    with pytest.raises(ValueError, match="function without arguments"):
        as_objective(3, view)
    assert objective.losses([()], each=True).shape == (1, 1), "a closure is one example"


def direction_of(view, distribution="gaussian"):
    return Dense(7, 3, 1, view.ids, distribution)


def inner_product(view, direction, gradients):
    """<gradient, z> in float64, z written out."""
    total = 0.0
    for entry in view:
        z = torch.zeros(entry.tensor.shape)
        direction.accumulate(entry.name, slice(0, len(z) if z.ndim else 1), z.view(len(z) if z.ndim else 1, -1), 1.0)
        if gradients[entry.name] is not None:
            total += float((gradients[entry.name].double() * z.double()).sum())
    return total


def unequal(kind):
    """Three micro-batches with different numbers of labels."""
    whole = batch(kind, rows=5, labels="all")
    if whole["labels"].ndim == 2 and kind != "seq2seq":
        whole["labels"][2, 4:] = -100
    return [{k: v[a:b] for k, v in whole.items()} for a, b in ((0, 1), (1, 4), (4, 5))]


@pytest.mark.parametrize("family", FAMILIES)
def test_slope_is_the_gradient_along_the_direction(family):
    """Relative to |grad| |z|, float32: 1e-6 measured at most over the families, 1e-5 allowed."""
    kind, model, view, engine = setting(family)
    objective = ModelObjective(engine, unequal(kind))
    direction = direction_of(view)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    choice = (model.config._attn_implementation, model.config._experts_implementation)
    loss, slope = objective.slope(direction)
    assert choice == (model.config._attn_implementation, model.config._experts_implementation)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) and type(parameter) is torch.nn.Parameter
    assert all(not m._forward_pre_hooks and not m._forward_hooks and "forward" not in m.__dict__ for m in model.modules())
    assert loss == pytest.approx(objective.backward(dropout=False), abs=2e-6)
    want = inner_product(view, direction, {e.name: e.tensor.grad for e in view})
    size = sum(float(e.tensor.grad.double().square().sum()) for e in view if e.tensor.grad is not None) ** 0.5
    assert abs(slope - want) < 1e-5 * size * view.numel() ** 0.5 and slope != 0.0
    assert (engine.forwards, engine.jvps) == (6, 3)  # of these three forwards by backward


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_slope_of_16_bit_weights(dtype, tolerance):
    """As exact as the dtype: relative to |grad| |z| / sqrt(d), the usual size of a slope, some of its rounding steps."""
    for family in ("opt-tied", "llama-untied", "t5-tied", "bert-masked"):
        kind, model = make(family, dtype)
        view = ParamView.of_model(model)
        objective = ModelObjective(Engine(model, view, kind), [batch(kind)])
        slope, direction = objective.slope(direction_of(view))[1], direction_of(view)
        objective.backward(dropout=False)
        grads = {e.name: e.tensor.grad for e in view}
        size = sum(float(g.double().square().sum()) for g in grads.values() if g is not None) ** 0.5
        assert abs(slope - inner_product(view, direction, grads)) < 5 * tolerance * size, family


def test_slope_of_choices_blocked_heads_and_partial_support(monkeypatch):
    from smidgen import loss as losses

    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", 24 * 10)  # ten rows of the head a block
    kind, model, view, engine = setting("llama-untied")
    data = batch(kind)
    chosen = {**data, "labels": data["labels"].clone(), "choices": torch.tensor([5, 11, 20])}
    chosen["labels"][:, -2], chosen["labels"][:, -1] = -100, torch.tensor([11, 5, 20])
    for one in (data, chosen):
        for support in (None, frozenset({"lm_head.weight"}), frozenset({"model.layers.1.mlp.down_proj.weight"})):
            direction = Dense(7, 3, 1, view.ids, "gaussian", support)
            slope = ModelObjective(engine, [one]).slope(direction)[1]
            ModelObjective(engine, [one]).backward(support)
            grads = {e.name: e.tensor.grad if support is None or e.name in support else None for e in view}
            assert slope == pytest.approx(inner_product(view, direction, grads), rel=1e-4, abs=1e-5)
            model.zero_grad()


def test_slope_holds_the_tangents_of_one_module_and_runs_on_no_graph():
    _, _, view, engine = setting("llama-untied")
    objective = ModelObjective(engine, [batch("causal")])
    objective.slope(direction_of(view))
    assert 0 < engine.scratch_bytes() <= 2 * max(e.tensor.numel() * 4 for e in view) + 128
    assert engine.scratch_bytes() < 0.5 * view.nbytes()
    assert all(e.tensor.grad is None for e in view)


@pytest.mark.parametrize("family", ["opt-tied", "mixtral", "t5-tied"])
def test_theta_is_put_back_when_a_slope_raises(family):
    kind, model, view, engine = setting(family)
    data = batch(kind)
    engine.check_batch(data)
    objects = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    choice = (model.config._attn_implementation, model.config._experts_implementation)

    def fail(*_):
        raise RuntimeError("out of cheese")

    handle = list(model.modules())[-1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="cheese"):
        ModelObjective(engine, [data]).slope(direction_of(view))
    handle.remove()
    for name, parameter in model.named_parameters():
        assert parameter is objects[name][0] and torch.equal(parameter, objects[name][1])
    assert choice == (model.config._attn_implementation, model.config._experts_implementation)
    assert forward_ad._current_level == -1
    assert torch.equal(engine.losses(data).nll, engine.losses(data).nll)


def test_an_attention_without_forward_mode_is_replaced_and_named(caplog):
    kind, model, view, engine = setting("llama-tied")
    with caplog.at_level("WARNING", "smidgen"):
        fused = ModelObjective(engine, [batch(kind)]).slope(direction_of(view))
        ModelObjective(engine, [batch(kind)]).slope(direction_of(view))
    assert [r.getMessage() for r in caplog.records if "attn 'sdpa'" in r.getMessage()][1:] == []
    assert "attn 'sdpa'" in caplog.text
    model.set_attn_implementation("eager")
    eager = ModelObjective(engine, [batch(kind)]).slope(direction_of(view))
    assert fused == pytest.approx(eager, rel=1e-5)


def test_an_operation_without_forward_mode_is_named():
    """Also a foreign kernel, which torch would let drop the tangent in silence."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    foreign = torch.library.custom_op("smidgen_tests::double", lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor")

    class Kernel(torch.nn.Module):
        def __init__(self, run):
            super().__init__()
            self.run = run

        def forward(self, x):
            return self.run(x)

    for run, name in ((lambda x: x + flash(*[x.view(1, 1, *x.shape)] * 3)[0][0, 0], "_flash_attention"), (foreign, "double")):
        kind, model, view, engine = setting("bert-classification")
        ModelObjective(engine, [batch(kind)]).slope(direction_of(view))
        model.classifier = torch.nn.Sequential(Kernel(run), model.classifier)
        view = ParamView.of_model(model)
        engine = Engine(model, view, kind)
        with pytest.raises(ConfigError, match=f"{name}.* has no forward-mode derivative.* zo_sgd"):
            ModelObjective(engine, [batch(kind)]).slope(direction_of(view))
        assert engine.losses(batch(kind)).nll.isfinite().all()


def test_products_through_onednn_carry_tangents(monkeypatch):
    from smidgen import linear

    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "_available", lambda: True)  # on any processor
    generator = torch.Generator().manual_seed(4)
    x, w, b, dx, dw, db = (torch.randn(shape, generator=generator) for shape in ((3, 6), (5, 6), (5,)) * 2)
    for parts in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        with torch.no_grad(), forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, t) if on else p for p, t, on in zip((x, w, b), (dx, dw, db), parts, strict=True)]
            got = forward_ad.unpack_dual(linear.linear(*duals))
            want = forward_ad.unpack_dual(torch.nn.functional.linear(*duals))
            assert torch.allclose(got.primal, want.primal, atol=1e-5)
            assert torch.allclose(got.tangent, want.tangent, atol=1e-5), parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_slope_of_a_closure_is_autograds(dtype):
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((3, 5), (7,), ())]
    weights.append(torch.randn(4, 3, generator=generator).to(dtype).t().requires_grad_())
    view = ParamView.of_tensors(weights)
    before = [w.detach().clone() for w in weights]

    def loss():
        return sum((w.float() ** 3).sum() for w in weights) * weights[2].float() + weights[3].float()[0].prod()

    direction = direction_of(view)
    value, slope = as_objective(loss, view).slope(direction)
    assert all(torch.equal(w.detach(), b) for w, b in zip(weights, before, strict=True))
    with forward_ad.dual_level():
        assert all(forward_ad.unpack_dual(w).tangent is None for w in weights)
    loss().backward()
    want = 0.0
    for entry in view:
        z = torch.zeros(entry.tensor.shape)
        direction.accumulate(entry.name, slice(0, len(z) if z.ndim else 1), z.view(len(z) if z.ndim else 1, -1), 1.0)
        want += float((entry.tensor.grad.double() * z.to(dtype).double()).sum())
    assert value == pytest.approx(float(loss().detach()))
    assert slope == pytest.approx(want, rel=2e-2 if dtype == torch.bfloat16 else 1e-5)

    def fail():
        loss()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        as_objective(fail, view).slope(direction)
    assert all(torch.equal(w.detach(), b) for w, b in zip(weights, before, strict=True))
    with pytest.raises(ValueError, match="as a tensor"):
        as_objective(lambda: 1.0, view).slope(direction)
    assert as_objective(lambda: torch.ones(()), view).slope(direction) == (1.0, 0.0)


def test_slopes_are_recorded_and_replayed_and_counted():
    kind, _, view, engine = setting()
    recorded = Recorded(ModelObjective(engine, [batch(kind)]))
    first = recorded.slope(direction_of(view))
    values = recorded.losses(probes(view))
    assert len(recorded.values) == 2 + 3
    replayed = Replayed(recorded.values)
    assert replayed.slope(direction_of(view)) == first and torch.equal(replayed.losses(probes(view)), values)
    assert replayed.done() and (replayed.forwards, replayed.jvps) == (engine.forwards, engine.jvps) == (4, 1)
    called = CalledObjective(engine, [], lambda b: None, scaled=False)
    with pytest.raises(ValueError, match="use smidgen's loss"):
        called.slope(direction_of(view))


def test_a_quantised_tensor_without_gradient_is_named():
    kind, _, view, engine = setting()
    view["model.norm.weight"].tensor = torch.zeros(24, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"model.norm.weight is torch.uint8 .*scheme lora"):
        ModelObjective(engine, [batch(kind)]).backward()


def test_slope_of_a_loss_over_the_options_of_each_example():
    kind, _, view, engine = setting("llama-untied")
    data = batch(kind, rows=4)
    data |= {
        "groups": torch.tensor([0, 0, 1, 1]),
        "golds": torch.tensor([1, 2]),
        "divisors": torch.tensor([2.0, 2.0, 1.0, 2.0]),
    }
    objective = ModelObjective(engine, [data])
    loss, slope = objective.slope(direction_of(view))
    assert loss == float(objective.losses([()]))
    objective.backward(dropout=False)
    want = inner_product(view, direction_of(view), {e.name: e.tensor.grad for e in view})
    assert slope == pytest.approx(want, rel=1e-5)
