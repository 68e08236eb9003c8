"""Node perturbation: noise on outputs, the update by hand, what it moves and refuses."""

from __future__ import annotations

import math

import pytest
import torch

from families import batch, make
from smidgen.batched import BatchedEngine
from smidgen.config import ConfigError
from smidgen.directions import Dense
from smidgen.objective import ModelObjective, Recorded, Replayed
from smidgen.optim.node import Config, Node
from smidgen.params import ParamView
from smidgen.probing import Engine


def test_a_probe_is_noise_on_the_outputs_of_linear_layers_shared_by_the_tokens_of_an_example():
    """The twin adds the vectors to the outputs itself, in the plain model, one batch for all examples."""
    kind, model = make("opt-tied")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("fc1.bias", "fc2.bias")))
    view, rows = ParamView.of_model(model), batch(kind, rows=3, seed=4, labels="all")
    opt = Node(view, lr=1e-3, momentum=0.0)
    recorded = Recorded(ModelObjective(BatchedEngine(model, view, kind), [rows]))
    before = view.snapshot()
    sizes, handles = {}, []
    for entry in view:

        def measure(_, __, y, name=entry.name):
            sizes[name] = float(y.detach().square().mean() ** 0.5)

        handles.append(entry.sites[0][0].register_forward_hook(measure))
    Engine(model, view, kind)._forward(rows)
    for handle in handles:
        handle.remove()
    opt.step(recorded)
    assert recorded.values[:4] == pytest.approx([sizes[e.name] for e in view], rel=1e-5)
    losses, c = torch.tensor(recorded.values[4:], dtype=torch.float64).view(2, 3), []
    for sign, seen in zip((1, -1), losses, strict=True):
        handles = []
        for entry in view:
            v = torch.stack([_signs(opt, entry.name, n) for n in range(3)])  # [rows, O]
            add = sign * 0.05 * sizes[entry.name] * v

            def noisy(_, __, y, add=add):
                return (y.view(3, -1, y.shape[-1]) + add[:, None]).view(y.shape)

            handles.append(entry.sites[0][0].register_forward_hook(noisy))
        twin = ModelObjective(Engine(model, ParamView.of_model(model), kind), [rows])
        restored = view.snapshot()
        view.restore(before)
        assert torch.allclose(twin.losses([()], each=True)[0], seen, atol=1e-5)
        view.restore(restored)
        for handle in handles:
            handle.remove()
    c = (losses[0] - losses[1]) / 0.1
    c = c / c.square().mean().sqrt()
    for entry in view:
        G = sum(float(c[n]) * _signs(opt, entry.name, n) for n in range(3)) / 3
        assert torch.allclose(entry.storage - before[entry.name], -1e-3 * sizes[entry.name] * G, atol=1e-6)


def _signs(opt, name, n):
    out = torch.zeros(opt.view[name].tensor.shape)
    Dense(0, 0, n, opt.view.ids).accumulate(name, slice(0, len(out)), out[:, None], 1.0)
    return out


def test_vectors_move_and_matrices_stay_also_without_biases(caplog):
    for family, kinds in (("llama-tied", {"norm"}), ("opt-tied", {"norm", "bias"})):
        kind, model = make(family)
        view = ParamView.of_model(model)
        before = view.snapshot()
        opt = Node(view, lr=1e-2)
        opt.step(ModelObjective(BatchedEngine(model, view, kind), [batch(kind)]))
        moved = {e.name for e in view if not torch.equal(e.storage, before[e.name])}
        assert moved == {e.name for e in view if e.tensor.ndim == 1} == {e.name for e in view if opt.moves(e.name)}
        assert {"bias" if n.endswith("bias") else "norm" for n in moved} == kinds
        assert "matrices stay" in caplog.text
    with pytest.raises(ConfigError, match="none of the 1 tuned tensors"):
        Node([torch.ones(3, 3, requires_grad=True)])


def test_units_are_measured_once_and_replayed():
    transcript, ends = [], []
    for replay in (False, True):
        kind, model = make("qwen3")
        view = ParamView.of_model(model)
        opt, rows = Node(view, lr=1e-2, queries=2), batch(kind, seed=3)
        engine = BatchedEngine(model, view, kind)
        for t in range(3):
            objective = Replayed(transcript[t]) if replay else Recorded(ModelObjective(engine, [rows]))
            opt.step(objective)
            if replay:
                assert objective.done()
            else:
                transcript.append(objective.values)
        ends.append(view.snapshot())
    assert [len(values) for values in transcript] == [len(opt.moved) + 12, 12, 12]
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_outputs_that_are_not_finite_are_measured_again():
    w = torch.ones(3, requires_grad=True)
    opt = Node([w], Config(lr=0.1))

    class Once:
        key, sizes = None, iter([math.nan, 2.0])

        def output_sizes(self, names):
            return {"0": next(self.sizes)}

        def losses(self, probes, *, each=False):
            return torch.tensor([[1.0], [0.5]])

    assert math.isnan(opt.step(Once())) and not opt.outcome.written and torch.equal(w, torch.ones(3))
    opt.step(Once())
    assert opt.units == {"0": 2.0} and torch.allclose((w - 1).abs(), torch.full((3,), 0.2))


def test_weights_move_by_the_outer_product_with_token_summed_inputs():
    """By hand, from what the objective answers; that answer's own twin is in test_perturbed.py."""
    for family in ("opt-tied", "gpt2"):
        kind, model = make(family)
        view, rows = ParamView.of_model(model), [batch(kind, rows=3, seed=4), batch(kind, rows=2, seed=5)]
        objective, asked = ModelObjective(BatchedEngine(model, view, kind), rows), {}

        class Seen:
            key = None

            def __getattr__(self, name, objective=objective):
                return getattr(objective, name)

            def perturbed(self, names, draw, objective=objective, asked=asked):
                asked["draw"], asked["answer"] = draw, objective.perturbed(names, draw)
                return asked["answer"]

        before = view.snapshot()
        opt = Node(view, lr=1e-3, credit="weights", momentum=0.0)
        opt.step(Seen())
        (L, inputs), opt.t = asked["answer"], 0  # noise of the step that was made
        c = (L[0] - L[1]) / (2 * 0.05)
        c = c / c.square().mean().sqrt()
        moved = {e.name for e in view if not torch.equal(e.storage, before[e.name])}
        assert moved == inputs.keys() == {e.name for e in view if opt.moves(e.name)} and len(moved) >= 8 and not opt.state
        for name, X in inputs.items():
            V = torch.stack([asked["draw"](name, n, 5) for n in range(5)]) / (0.05 * opt.units[name])
            assert torch.allclose(V.abs(), torch.ones_like(V), atol=1e-5)
            G = sum(float(c[n]) * torch.outer(V[n], X[n]) for n in range(5))
            G = G if family == "opt-tied" else G.T
            step = view[name].storage - before[name]
            assert torch.allclose(step, -1e-3 * G / G.square().mean().sqrt(), atol=1e-6)


def test_credit_to_weights_lowers_the_loss_and_says_what_it_cannot():
    kind, model = make("llama-tied")
    view = ParamView.of_model(model)
    engine, rows = BatchedEngine(model, view, kind), batch(kind, rows=8, seed=3)
    first, opt = float(engine.losses(rows).nll.mean()), Node(view, lr=3e-3, credit="weights")
    for _ in range(30):
        opt.step(ModelObjective(engine, [rows]))
    assert float(engine.losses(rows).nll.mean()) < first - 0.05
    assert not Node.replayable(opt.config) and Node.replayable(Config())
    with pytest.raises(ConfigError, match="a closure has none: take vectors"):
        opt.step(lambda: torch.tensor(1.0))
    with pytest.raises(ConfigError, match="none of the 1 tuned tensors is one"):
        Node([torch.ones(3, requires_grad=True)], credit="weights")
    with pytest.raises(ValueError, match="queries = 2 with credit = weights"):
        Config(credit="weights", queries=2)
