"""AGZO: bases from a forward, directions inside them, replay without data."""

from __future__ import annotations

import math

import torch

from families import batch, make
from smidgen.batched import BatchedEngine
from smidgen.directions import Dense
from smidgen.objective import ModelObjective, Recorded, Replayed
from smidgen.optim.agzo import AGZO, Config, principal
from smidgen.params import ParamView


def test_bases_hold_the_inputs_of_the_layer_and_random_ones_the_rest():
    """Against the singular vectors of all inputs, from a plain forward of each row without its padding."""
    kind, model = make("llama-tied")
    view, rows = ParamView.of_model(model), batch(kind, seed=4, labels="all")
    opt = AGZO(view, rank=2, lr=1e-9)
    name = "model.layers.0.mlp.down_proj.weight"
    seen = []
    handle = view[name].sites[0][0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for n in range(3):
        real = rows["attention_mask"][n].bool()
        model(input_ids=rows["input_ids"][n : n + 1, real])
    handle.remove()
    X = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()
    opt.step(ModelObjective(BatchedEngine(model, view, kind), [rows]))
    A = opt.state[view[name].tensor]["basis"].double() / math.sqrt(2)
    assert torch.allclose(A.T @ A, torch.eye(2, dtype=torch.float64), atol=1e-5)
    best = torch.linalg.svd(X, full_matrices=False)[2][:2]
    assert (X @ A).square().sum() > 0.85 * (X @ best.T).square().sum()  # a random plane of 40 axes: a fifth of it
    z = opt.shaped(Dense(0, 0, 0, view.ids, "gaussian"))
    D = z.left(name) @ z.right(name).T
    assert torch.allclose(D @ (A @ A.T).float(), D, atol=1e-5)  # nothing outside of the subspace
    tied = opt.state[view["model.embed_tokens.weight"].tensor]["basis"]
    assert float(tied.square().mean()) > 0.5  # random: entries of unit variance


def test_replay_needs_no_data_over_refreshes():
    transcript, ends = [], []
    for replay in (False, True):
        kind, model = make("opt-tied")
        view = ParamView.of_model(model)
        opt, engine = AGZO(view, lr=1e-4, eps=1e-2, interval=2), BatchedEngine(model, view, kind)
        for t in range(5):
            data = [batch(kind, seed=t), batch(kind, seed=9 + t, labels="all")]
            objective = Replayed(transcript[t]) if replay else Recorded(ModelObjective(engine, data))
            opt.step(objective)
            assert not replay or objective.done()
            if not replay:
                transcript.append(objective.values)
        opt.merge_()
        ends.append(view.snapshot())
    assert [len(values) > 2 for values in transcript] == [True, False, True, False, True]
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_activations_that_are_not_finite_are_looked_at_again():
    W = torch.ones(4, 6, requires_grad=True)
    opt = AGZO([W], Config(lr=0.1, rank=1))

    class Once:
        key, sketches = None, iter([torch.full((6, 5), math.nan), torch.eye(6)[:, :5]])

        def input_squares(self, names, onto=None):
            return {"0": next(self.sketches)}

        def losses(self, probes, *, each=False):
            return torch.tensor([1.0, 0.5])

    assert math.isnan(opt.step(Once())) and torch.equal(W, torch.ones(4, 6))
    opt.step(Once())
    assert opt.outcome.written and opt.seen == 0


def test_principal_vectors_have_a_sign():
    Y = torch.tensor([[0.0, 0.0], [-3.0, 0.0], [0.0, 1.0]])
    assert torch.equal(principal(Y, 1), torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64))
