"""LOZO-M: the closed form of its momentum inside an interval, and what a refresh makes of it."""

from __future__ import annotations

import torch

from smidgen.objective import ClosureObjective, Recorded
from smidgen.optim.lozo_m import LOZOM, Config


def run(steps, **options):
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=rng).requires_grad_() for s in ((6, 40), (7,))]
    opt = LOZOM(weights, Config(lr=1e-3, **options))
    slopes = []
    for _ in range(steps):
        recorded = Recorded(ClosureObjective(lambda: sum(((w - 1.0) ** 2).sum() for w in weights), opt.view))
        opt.step(recorded)
        plus, minus = recorded.values
        slopes.append((plus - minus) / (2 * opt.config.eps))
    return opt, weights, slopes


def test_momentum_is_the_geometric_sum_of_the_interval():
    """M = b^(t-1) c_0 A_0 + (1 - b) sum_k b^(t-1-k) c_k A_k; the vector's buffer is the same sum of its noise."""
    opt, weights, c = run(4, interval=10)
    share = [0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    Z = [_dense(opt, t) for t in range(4)]
    M = sum(s * k * opt.shaped(z).left("0") for s, k, z in zip(share, c, Z, strict=True))
    assert torch.allclose(opt.state[weights[0]]["momentum"], M, rtol=1e-4, atol=1e-5)
    v = torch.zeros(7)
    for s, k, z in zip(share, c, Z, strict=True):
        z.accumulate("1", slice(0, 7), v.view(7, 1), s * k)
    assert torch.allclose(opt.state[weights[1]]["momentum_buffer"], v, rtol=1e-4, atol=1e-5)


def test_a_refresh_carries_momentum_into_the_new_subspace():
    opt, weights, _ = run(3, interval=3)
    twin, others, _ = run(3, interval=4)  # the same steps, before a refresh
    before, now = twin.subspace_of(0), opt.subspace_of(3)
    M = twin.state[others[0]]["momentum"]
    expected = M @ (before.right("0").T @ now.right("0")) / 40
    assert opt.subspace == 3 and torch.allclose(opt.state[weights[0]]["momentum"], expected, atol=1e-6)
    assert not opt.state[weights[0]]["left"].any()
    twin.merge_()
    assert torch.allclose(weights[0], others[0], atol=1e-6)


def _dense(opt, t):
    from smidgen.directions import Dense

    return Dense(opt.config.seed, t, 0, opt.view.ids, opt.config.distribution)
