"""SubZero: lazy cores equal dense steps written at once, estimates are unbiased in the subspace and over subspaces, narrow
matrices are folded, runs resume over a refresh to the same bits."""

from __future__ import annotations

import math

import pytest
import torch

from families import batch, make
from smidgen import noise
from smidgen.batched import BatchedEngine
from smidgen.config import ConfigError
from smidgen.directions import Dense
from smidgen.objective import ClosureObjective, ModelObjective, Recorded
from smidgen.optim.subzero import SubZero
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.subspace import orthonormal

SHAPES = ((6, 5), (7,), (4, 2, 3), (3, 40), (40, 3), (1, 4), ())
SEEN = {"0": (6, 5), "2": (4, 6), "3": (10, 12), "4": (10, 12)}


def tensors(shapes=SHAPES):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng).requires_grad_() for shape in shapes]


def loss_of(weights):
    return lambda: sum(((w - 1.0) ** 2).sum() for w in weights)


def dense(name, shape, seen, rank, step, subspace, seed=0):
    """D = sqrt(a b) / r U Z V^T in the paper's letters, from the addresses alone."""

    def gaussian(rows, columns, at, query, purpose):
        out = torch.zeros(rows, columns)
        noise.accumulate_(out, [(noise.Address(seed, int(name), at, query, purpose), 1.0)], "gaussian")
        return out.double()

    a, b = seen
    r = min(rank, a, b)
    U, V = (torch.linalg.qr(gaussian(n, r, subspace, query, noise.SUBSPACE)) for n, query in ((a, 1), (b, 0)))
    U, V = (Q @ torch.diag(R.diagonal().sign()) for Q, R in (U, V))
    return (math.sqrt(a * b) / r * U @ gaussian(r, r, step, 0, noise.PROBE) @ V.T).reshape(shape).float()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_lazy_cores_equal_dense_steps_that_are_written_at_once(rank, decay):
    weights, twin = tensors(), [w.detach() for w in tensors()]
    lazy = SubZero(weights, rank=rank, lr=1e-3, interval=4, weight_decay=decay)
    for t in range(10):
        lazy.step(recorded := Recorded(ClosureObjective(loss_of(weights), lazy.view)))
        c = (recorded.values[0] - recorded.values[1]) / (2 * lazy.config.eps)
        for i, w in enumerate(twin):
            if str(i) in SEEN:
                z = dense(str(i), w.shape, SEEN[str(i)], rank, t, t // 4 * 4)
            else:
                z = torch.zeros(w.shape)
                noise.accumulate_(z, [(noise.Address(0, i, t, 0, noise.PROBE), 1.0)], "gaussian")
            w.mul_(1 - 1e-3 * decay if w.ndim > 1 else 1.0).add_(z, alpha=-1e-3 * c)
    lazy.merge_()
    for a, b, start in zip(weights, twin, tensors(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert not torch.allclose(a, start, atol=1e-4)


def test_the_estimate_is_unbiased_in_its_subspace_and_over_subspaces():
    """E[D <G, D>] = a b / r^2 P_U G P_V for given bases, G over bases; E |D|^2 = a b; within 4.5 standard errors."""
    G = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    over, rank, count = tensors(((6, 5),)), 2, 2500
    opt = SubZero(over, rank=rank, interval=1)
    cases = {"fixed": [], "over": []}
    for t in range(count):
        z = Dense(0, t, 0, opt.view.ids, "gaussian")
        for case, found in cases.items():
            opt.subspace = t if case == "over" else 0
            opt.state.clear()
            opt._bases = None
            A, B = opt.shaped(z).factors("0")
            found.append(A @ B.T)
    opt.subspace = 0
    opt.state.clear()
    opt._bases = None
    bases = opt.bases()
    U, V = bases.U["0"], bases.V["0"]
    assert torch.allclose(U.T @ U, torch.eye(rank), atol=1e-6) and torch.allclose(V.T @ V, torch.eye(rank), atol=1e-6)
    wanted = {"fixed": 30 / rank**2 * U @ U.T @ G @ V @ V.T, "over": G}
    for case, found in cases.items():
        D = torch.stack(found)
        estimate = D * (D * G).sum((1, 2))[:, None, None]
        for samples, want in ((estimate, wanted[case]), ((D**2).sum((1, 2)), torch.tensor(30.0))):
            error = samples.std(0) / math.sqrt(count)
            assert bool(((samples.mean(0) - want).abs() < 4.5 * error).all())


def test_bases_are_uniform():
    """Without R's signs the first entries of Q would all be of one sign."""
    Q = torch.stack([orthonormal(noise.Address(3, 1, t, 0, noise.SUBSPACE), 4, 2) for t in range(1500)])
    error = Q.std(0) / math.sqrt(len(Q))
    assert bool((Q.mean(0).abs() < 4.5 * error).all())
    assert float((Q[:, 0, 0] > 0).float().mean()) == pytest.approx(0.5, abs=0.06)


def test_batched_and_sequential_engines_give_the_same_run_of_folded_matrices_to_rounding():
    ends = []
    for engine_of in (Engine, BatchedEngine):
        kind, model = make("llama-untied")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
        for longer in (True, False):  # the identity is the left factor of one, the right factor of the other
            next(w for w in linear if len({*w.shape}) == 2 and (w.shape[0] > w.shape[1]) == longer).requires_grad_()
        view = ParamView.of_model(model)
        engine, opt = engine_of(model, view, kind), SubZero(view, lr=1e-4, eps=1e-2, rank=2, interval=2, queries=2)
        opt.views = {name: (shape[0] // 2, shape[1] * 2) for name, shape in opt.shapes.items()}  # fold them all
        for t in range(3):
            opt.step(ModelObjective(engine, [batch(kind, seed=t, labels="all")]))
        opt.merge_()
        assert getattr(engine, "_reason", None) is None
        ends.append(view.snapshot())
    assert all(torch.allclose(ends[0][n], ends[1][n], atol=1e-5) for n in ends[0])


def test_a_run_that_is_loaded_goes_on_over_a_refresh_to_the_same_bits():
    straight, other = tensors(), tensors()
    one = SubZero(straight, interval=3, lr=1e-3)
    for t in range(8):
        one.step(loss_of(straight))
        if t == 3:
            state, kept = one.state_dict(), [w.detach().clone() for w in straight]
            state = {**state, "state": {k: {n: x.clone() for n, x in s.items()} for k, s in state["state"].items()}}
    for w, value in zip(other, kept, strict=True):
        w.data.copy_(value)
    two = SubZero(other, interval=3, lr=1e-3)
    two.load_state_dict(state)
    for _ in range(4):
        two.step(loss_of(other))
    assert one.subspace == two.subspace == 6
    assert all(torch.equal(a, b) for a, b in zip(straight, other, strict=True))


def test_a_rank_beyond_every_matrix_is_refused_where_it_was_asked_for():
    with pytest.raises(ConfigError, match="rank = 6, and the tuned matrices have at most 5"):
        SubZero(tensors(SHAPES[:3]), rank=6)
    assert SubZero(tensors(SHAPES[:3])).held_shape("0") == (5, 5)  # the usual 8 is not insisted on
    assert SubZero(tensors(((3, 40),)), rank=8).held_shape("0") == (8, 8)  # seen as 10 x 12
    with pytest.raises(ConfigError, match="at most 3"):
        SubZero(tensors(((3, 40),)), rank=8, reshape="never")
    with pytest.raises(ConfigError, match="no tuned tensor is a matrix"):
        SubZero([torch.zeros(4, requires_grad=True)])
