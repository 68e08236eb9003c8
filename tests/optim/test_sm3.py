"""SM3: the definition on a matrix, AdaGrad on a vector, and deltas that share rows and columns."""

from __future__ import annotations

import torch

from smidgen.optim.sm3 import SM3
from smidgen.params import ParamView, Support, shapes


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_matrix_is_covered_by_its_rows_and_columns():
    w, gradients = torch.zeros(3, 4, requires_grad=True), [randn(3, 4, seed=i) for i in range(4)]
    opt = SM3([w], lr=0.1, max_grad_norm=0)
    rows, columns, want = torch.zeros(3), torch.zeros(4), torch.zeros(3, 4)
    for g in gradients:
        opt.step(lambda g=g: (w * g).sum())
        u = torch.minimum(rows[:, None], columns[None]) + g * g
        rows, columns = u.amax(1), u.amax(0)
        want -= 0.1 * g / (u + 1e-8).sqrt()
    assert torch.allclose(w.detach(), want, atol=1e-6)


def test_a_vector_gets_adagrad():
    a, b = torch.zeros(5, requires_grad=True), torch.zeros(5, requires_grad=True)
    ours, theirs = SM3([a], lr=0.1, max_grad_norm=0), torch.optim.Adagrad([b], lr=0.1, eps=1e-10)
    for i in range(5):
        g = randn(5, seed=i)
        ours.step(lambda g=g: (a * g).sum())
        b.grad = g
        theirs.step()
    assert torch.allclose(a, b, atol=1e-5)


def test_all_entries_of_a_matrix_as_deltas_are_the_matrix():
    w = torch.zeros(3, 4, requires_grad=True)
    view = ParamView.of_tensors([torch.zeros(12, requires_grad=True)])
    view["0"].support = Support((3, 4), torch.arange(12, dtype=torch.int32))
    dense, sparse = SM3([w], lr=0.1, momentum=0.5), SM3(view, lr=0.1, momentum=0.5)
    for i in range(4):
        g = randn(3, 4, seed=i)
        dense.step(lambda g=g: (w * g).sum())
        sparse.step(lambda g=g: (view["0"].tensor * g.flatten()).sum())
    assert torch.equal(w.detach().flatten(), view["0"].storage)
    assert [s.shape for s in sparse.scores("0")] == [(3,), (4,)]
    assert all(torch.equal(s, t) for s, t in zip(sparse.scores("0"), list(dense.state[w].values())[:2], strict=True))


def test_state_of_deltas_is_rows_and_columns():
    view = ParamView.of_tensors([torch.zeros(6, requires_grad=True)])
    view["0"].support = Support((50, 70), torch.arange(6))
    opt = SM3(view, lr=0.1)
    opt.step(lambda: view["0"].tensor.sum())
    assert SM3.state_bytes(shapes(view), opt.config) == 4 * (50 + 70)
    assert sum(v.numel() * 4 for v in opt.state[view["0"].tensor].values()) == 4 * (50 + 70)


def test_momentum_of_a_new_entry_begins_at_zero():
    view = ParamView.of_tensors([torch.zeros(3, requires_grad=True)])
    view["0"].support = Support((2, 2), torch.arange(3))
    opt = SM3(view, lr=0.1, momentum=0.5)
    opt.step(lambda: view["0"].tensor.sum())
    held = opt.state[view["0"].tensor]["momentum"].clone()
    opt.reselect("0", torch.tensor([-1, 0, 2]), None)
    assert torch.equal(opt.state[view["0"].tensor]["momentum"], torch.tensor([0.0, float(held[0]), float(held[2])]))
