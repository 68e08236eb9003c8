"""Fused stepping: the bits of the plain step, one gradient alive at a time, and what cannot be fused is refused."""

from __future__ import annotations

import pytest
import torch

from families import batch, make
from smidgen import optim
from smidgen.activations import velora
from smidgen.config import ConfigError
from smidgen.objective import ModelObjective
from smidgen.params import ParamView
from smidgen.probing import Engine

FUSED = [name for name in optim.names() if "fused" in optim.get(name).Config.model_fields]


def test_the_methods_that_have_it():
    assert {"sgd", "adamw", "sinkgd", "swan"} <= set(FUSED)


def run(method, family="llama-tied", dtype=torch.float32, steps=3, compress=False, **options):
    """(weights, norms, most gradient bytes alive) after some steps with dropout."""
    kind, model = make(family, dtype)
    view = ParamView.of_model(model)
    policy = velora.build(model, velora.Config(groups=4), view=view) if compress else None
    opt = optim.get(method).build(view, optim.get(method).Config(lr=1e-3, **options))
    engine, most, norms = Engine(model, view, kind), 0, []

    def watch(_):
        nonlocal most
        most = max(most, sum(e.tensor.grad.nbytes for e in view if e.tensor.grad is not None))

    handles = [e.tensor.register_post_accumulate_grad_hook(watch) for e in view]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        for step in range(steps):
            opt.step(ModelObjective(engine, [batch(kind, labels="all", seed=step)]))
            norms.append(opt.outcome.measures["grad_norm"])
    for handle in handles:
        handle.remove()
    if policy is not None:
        policy.remove()
    return view.snapshot(), norms, most, max(e.tensor.nbytes for e in view)


@pytest.mark.parametrize("method", FUSED)
@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.0},
        {"max_grad_norm": 0.5, "family": "opt-tied", "weight_decay": 0.1},  # dropout: both passes see one mask
        {"max_grad_norm": 0.0, "dtype": torch.bfloat16, "compress": True},
    ],
)
def test_fused_steps_are_the_plain_ones_bit_for_bit(method, options):
    plain, fused = (run(method, fused=fused, **options) for fused in (False, True))
    assert all(torch.equal(plain[0][name], fused[0][name]) for name in plain[0]) and plain[1] == fused[1]
    assert len(set(fused[1])) == 3  # it moves
    assert fused[2] <= fused[3]  # at most the largest tensor's
    if not options.get("compress"):
        assert plain[2] > 2 * plain[3]


def test_micro_batches_are_refused_and_a_closure_that_sums_them_noticed():
    kind, model = make("llama-tied")
    view = ParamView.of_model(model)
    opt = optim.get("sgd").build(view, fused=True, max_grad_norm=0.0)
    before = view.snapshot()
    with pytest.raises(ConfigError, match="2 micro-batches"):
        opt.step(ModelObjective(Engine(model, view, kind), [batch(kind), batch(kind, seed=2)]))
    assert all(torch.equal(before[e.name], e.tensor) for e in view)
    w = torch.ones(3, requires_grad=True)
    opt = optim.get("sgd").build([w], fused=True, max_grad_norm=0.0)

    def twice():
        (w**2).sum().backward()
        return (w**2).sum()

    with pytest.raises(ConfigError, match="second gradient"):
        opt.step(twice)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_writes_nothing_after_it(limit):
    """With clipping nothing at all: the norm is known before the pass that writes."""
    below, above = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    opt = optim.get("sgd").build([below, above], fused=True, max_grad_norm=limit, lr=0.1)

    def loss():
        hidden = torch.sqrt(below - 1)  # an infinite slope
        return (hidden.sum() + above).sum()

    opt.step(loss)
    assert torch.equal(below, torch.ones(3)) and opt.outcome.voided == 1
    assert opt.outcome.written == (limit == 0) and torch.equal(above, torch.full((3,), 0.9 if limit == 0 else 1.0))
    assert opt.step(lambda: above.sum() * torch.nan) != opt.step(lambda: above.sum())
