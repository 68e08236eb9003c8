"""ZO-Muon: the lazy steps equal dense ones in the paper's letters, msign is the polar factor, the loss's scale is nothing."""

from __future__ import annotations

import math

import pytest
import torch

from smidgen import noise
from smidgen.config import ConfigError
from smidgen.directions import Dense
from smidgen.objective import ClosureObjective, Recorded
from smidgen.optim.zo_muon import Config, ZOMuon, msign

SHAPES = ((6, 5), (7,), (2, 2, 3), ())


def tensors():
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng).requires_grad_() for shape in SHAPES]


def loss_of(weights, scale=1.0):
    return lambda: scale * sum(((w - 1.0) ** 2).sum() for w in weights)


def gaussian(shape, i, step, query, purpose):
    out = torch.zeros(shape)
    noise.accumulate_(out, [(noise.Address(0, i, step, query, purpose), 1.0)], "gaussian")
    return out.double()


def polar(G):
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


@pytest.mark.parametrize("length", ["spectral", "rms"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_lazy_steps_equal_dense_ones_that_are_written_at_once(rank, length):
    lr, N = 1e-2, 3
    weights, twin = tensors(), [w.detach().double() for w in tensors()]
    lazy = ZOMuon(weights, lr=lr, rank=rank, interval=3, queries=N, length=length)
    for t in range(7):
        lazy.step(recorded := Recorded(ClosureObjective(loss_of(weights), lazy.view)))
        base, *losses = recorded.values
        c = [(x - base) / lazy.config.eps for x in losses]
        for i, W in enumerate(twin):
            if W.ndim > 1:
                m, n = W.shape[0], W[0].numel()
                r = min(rank, m, n)
                P, R = torch.linalg.qr(gaussian((n, r), i, t // 3 * 3, 0, noise.SUBSPACE))
                P = P @ torch.diag(R.diagonal().sign())
                G = sum(ck * gaussian((m, r), i, t, k, noise.PROBE) for k, ck in enumerate(c)) / N
                step = (polar(G) @ P.T).view(W.shape) * (math.sqrt(m * n / r) if length == "rms" else 1.0)
            else:
                g = sum(ck * gaussian(W.shape, i, t, k, noise.PROBE) for k, ck in enumerate(c)) / N
                step = g / g.norm() * (math.sqrt(W.numel()) if length == "rms" else 1.0)
            W -= lr * step
    lazy.merge_()
    for a, b in zip(weights, twin, strict=True):
        assert torch.allclose(a.double(), b, atol=2e-5)


@pytest.mark.parametrize("shape", [(9, 1), (40, 7), (6, 6)])
def test_msign_is_the_polar_factor_and_the_limit_of_newton_schulz(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(msign(G).double(), polar(G.double()), atol=1e-6)
    X = G.double() / G.norm()
    for _ in range(60):
        X = 1.5 * X - 0.5 * X @ X.T @ X
    assert torch.allclose(msign(1e-8 * G).double(), X, atol=1e-6)


def test_msign_of_what_is_not_of_full_rank():
    assert torch.equal(msign(torch.zeros(5, 3)), torch.zeros(5, 3))
    u = torch.randn(5, 1, generator=torch.Generator().manual_seed(3))
    v = torch.tensor([[3.0, 0.0, 4.0]])
    assert torch.allclose(msign(u @ v), u / u.norm() @ v / 5, atol=1e-6)


def test_probes_have_unit_variance_and_are_unbiased_over_bases():
    opt = ZOMuon(tensors(), rank=2)
    G, draws = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), []
    for t in range(2500):
        opt.subspace = t
        opt.state.clear()
        opt._rights = None
        A, B = opt.shaped(Dense(0, t, 0, opt.view.ids, "gaussian")).factors("0")
        draws.append(A @ B.T)
    D = torch.stack(draws)
    estimate = D * (D * G).sum((1, 2))[:, None, None]
    for samples, want in ((estimate, G), ((D**2).sum((1, 2)), torch.tensor(30.0))):
        assert bool(((samples.mean(0) - want).abs() < 4.5 * samples.std(0) / math.sqrt(len(D))).all())


def test_neither_the_scale_of_the_loss_nor_equal_losses_move_more_or_less():
    ends = []
    for scale in (1.0, 1e3):
        weights = tensors()
        opt = ZOMuon(weights, Config(lr=1e-2, eps=1e-2, length="rms", queries=2))
        opt.step(loss_of(weights, scale))
        opt.merge_()
        ends.append(weights)
        for w, start in zip(weights, tensors(), strict=True):
            assert float((w - start).square().mean().sqrt()) == pytest.approx(1e-2, rel=1e-3)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(*ends, strict=True))
    weights = tensors()
    opt = ZOMuon(weights)
    opt.step(lambda: torch.tensor(1.0))
    opt.merge_()
    assert opt.outcome.written and all(torch.equal(a, b) for a, b in zip(weights, tensors(), strict=True))


def test_a_rank_beyond_every_matrix_is_refused():
    with pytest.raises(ConfigError, match="rank = 64, and the tuned matrices have at most 5"):
        ZOMuon(tensors(), rank=64)
