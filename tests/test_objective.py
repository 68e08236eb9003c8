"""Objectives: reduction, records, closures."""

from __future__ import annotations

import pytest
import torch

from families import VOCAB, batch, make
from smidgen.directions import Dense
from smidgen.objective import CalledObjective, ClosureObjective, ModelObjective, Recorded, Replayed, as_objective
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
    with pytest.raises(ValueError, match="per-example"):
        objective.losses([()], each=True)
