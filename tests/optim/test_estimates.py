"""Statistics of the estimates that all value-only methods share. Bounds come from standard errors, with fixed seeds.

With g = A x the gradient of a quadratic, c = g z and E z_i^4 = k (1 for Rademacher noise, 3 for Gaussian):

    E |c z|^2 = E (g z)^2 |z|^2 = |g|^2 (d - 1 + k)        so Rademacher d, Gaussian d + 2
    E |(1/q) sum c_i z_i|^2 = |g|^2 [(d - 1 + k) / q + (q - 1) / q]        (d + q - 1) / q and (d + q + 1) / q
"""

from __future__ import annotations

import math

import pytest
import torch

from smidgen import noise
from smidgen.optim._values import ValueConfig, ValueOptimizer
from smidgen.optim.zo_conservative import ZOConservative
from smidgen.optim.zo_momentum import ZOMomentum
from smidgen.optim.zo_sgd import ZOSGD

D = 6
DRAWS = 12_000  # directions a case


class Quadratic:
    """0.5 x^T A x + t/6 sum x^3 at x + probe, evaluated in float64 on regenerated directions, all at once."""

    key = None

    def __init__(self, cubic=0.0):
        generator = torch.Generator().manual_seed(11)
        root = torch.randn(D, D, generator=generator, dtype=torch.float64)
        self.A = root @ root.T / D
        self.x = torch.randn(D, generator=generator, dtype=torch.float64)
        self.cubic, self.known = cubic, {}

    @property
    def gradient(self):
        return self.A @ self.x + self.cubic / 2 * self.x**2

    def z(self, direction):
        address = direction.address("0")
        if address not in self.known:
            out = torch.zeros(D)
            direction.accumulate("0", slice(0, D), out, 1.0)
            self.known[address] = out.double()
        return self.known[address]

    def losses(self, probes, *, each=False):
        still = torch.zeros(D, dtype=torch.float64)
        X = self.x + torch.stack([sum((s * self.z(z) for z, s in probe), still) for probe in probes])
        return 0.5 * torch.einsum("pi,ij,pj->p", X, self.A, X) + self.cubic / 6 * (X**3).sum(1)


def draws(problem, *, count=DRAWS, steps=1, **options):
    """(c z of each query [count, D], c [count], z [count, D]) of the last of `steps` estimates; theta stays."""
    opt = ValueOptimizer([problem.x.float()], ValueConfig(queries=count, **options))
    for _ in range(steps):
        estimate = opt.estimate(problem)
        opt.t += 1
    z = torch.stack([problem.z(direction) for direction in estimate.Z])
    c = torch.tensor(estimate.c, dtype=torch.float64)
    return c[:, None] * z, c, z


def assert_mean(samples, want):
    """Every mean within three standard errors."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - want).abs() < 3 * error).all()


CASES = [("rademacher", 1.0), ("gaussian", 3.0)]


@pytest.mark.parametrize("distribution,fourth", CASES)
@pytest.mark.parametrize("count", [DRAWS, pytest.param(100_000, marks=pytest.mark.slow)])
def test_the_mean_is_the_gradient_and_the_second_moment_the_known_one(distribution, fourth, count):
    problem = Quadratic()
    samples, _, _ = draws(problem, count=count, distribution=distribution, eps=0.5, seed=3)
    assert_mean(samples, problem.gradient)
    for q in (1, 2, 5):
        means = samples[: count // q * q].view(-1, q, D).mean(1)
        squares = means.square().sum(1, keepdim=True) / problem.gradient.square().sum()
        assert_mean(squares, (D + q - 2 + fourth) / q)
        other = (D + q - 2 + 4 - fourth) / q  # the other distribution's moment is told apart
        assert abs(float(squares.mean()) - other) > 6 * float(squares.std()) / math.sqrt(len(squares))


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_one_sided_is_off_by_eps_half_the_curvature_and_still_has_the_right_mean(distribution):
    """c is off by (eps/2) z A z, which an even distribution does not correlate with z: no bias of the mean."""
    problem = Quadratic()
    _, central, z = draws(problem, distribution=distribution, eps=0.5, count=3000, seed=4)
    bend = torch.einsum("pi,ij,pj->p", z, problem.A, z)
    for eps in (0.5, 0.25):
        samples, c, _ = draws(problem, distribution=distribution, eps=eps, sides=1, count=3000, seed=4)
        assert torch.allclose(c - central, eps / 2 * bend, atol=1e-9)
        assert_mean((c - central)[:, None], eps / 2 * problem.A.trace())
        assert_mean(samples, problem.gradient)


def test_the_central_difference_is_off_by_eps_squared_where_the_curvature_changes():
    problem = Quadratic(cubic=1.0)
    errors = []
    for eps in (0.5, 0.25):
        samples, c, z = draws(problem, distribution="gaussian", eps=eps, count=3000, seed=5)
        assert torch.allclose(c - z @ problem.gradient, eps**2 / 6 * (z**3).sum(1), atol=1e-9)
        assert_mean(samples, problem.gradient + eps**2 / 2)  # E z^4 / 6 = 1/2
        errors.append(float((c - z @ problem.gradient).square().mean().sqrt()))
    assert errors[0] == pytest.approx(4 * errors[1], rel=1e-9)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_residual_feedback_has_the_right_mean(distribution):
    """The loss of the step before is independent of z; it adds variance only."""
    problem = Quadratic()
    samples, _, z = draws(problem, distribution=distribution, eps=0.5, sides="residual", steps=2, count=3000, seed=6)
    assert_mean(samples, problem.gradient)
    _, central, _ = draws(problem, distribution=distribution, eps=0.5, steps=2, count=3000, seed=6)
    assert samples.square().sum() > 1.01 * (central[:, None] * z).square().sum()


METHODS = {
    "zo_sgd": (ZOSGD, {}),
    "zo_sgd residual": (ZOSGD, {"sides": "residual"}),
    "zo_momentum": (ZOMomentum, {"momentum": 0.0}),
    "zo_conservative": (ZOConservative, {}),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_the_update_over_lr_and_c_is_the_probed_z(name, distribution):
    """In every tensor, at every step, also after loading a saved state in mid run."""
    build, options = METHODS[name]
    options = {"distribution": distribution, "seed": 8, "lr": 2.0**-7, "eps": 0.125, **options}
    weights = [torch.zeros(5, 3), torch.zeros(7), torch.zeros(())]
    slope = [torch.linspace(-1, 2, w.numel()).view(w.shape).double() for w in weights]
    opt = build(weights, **options)
    for step in range(4):
        if step == 2:
            twin = build(weights, **options)
            twin.load_state_dict(opt.state_dict())
            opt = twin
        before = [w.clone() for w in weights]
        opt.step(lambda: sum((s * w.double()).sum() for s, w in zip(slope, weights, strict=True)))
        c = opt.outcome.measures["zo/projected_grad"]
        if name == "zo_sgd residual" and step == 0:
            assert c == 0.0 and all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
            continue
        assert c != 0.0
        for i, (w, b) in enumerate(zip(weights, before, strict=True)):
            z = torch.zeros(w.shape)
            noise.accumulate_(z, [(noise.Address(8, i, step, 0, noise.PROBE), 1.0)], distribution)
            assert torch.allclose((b - w) / (2.0**-7 * c), z, atol=1e-4)
