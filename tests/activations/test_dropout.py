"""Replayed dropout: one mask in both passes, nothing saved, the same under checkpointing, in modules and functions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from families import batch, make
from smidgen.activations import _dropout, velora
from smidgen.activations._compressed import drop, held
from smidgen.objective import ModelObjective
from smidgen.params import ParamView
from smidgen.probing import Engine


def seeded(run, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return run()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_the_backward_draws_the_mask_of_the_forward(dtype, p):
    x = torch.full((37, 111), 3.0, dtype=dtype).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = seeded(lambda: _dropout.dropout(x.mT, p))
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0))
    assert not saved
    assert torch.equal(y == 0, dx.mT == 0) and abs(float((y == 0).double().mean()) - p) < 0.03
    assert set(y.detach().unique().tolist()) <= {0.0, float(torch.tensor(3.0, dtype=dtype) / (1 - p if p < 1 else 1))}


def test_two_calls_draw_two_masks_and_evaluation_none():
    module, x = nn.Dropout(0.5), torch.ones(999)
    one, other = seeded(lambda: (_dropout.forward(module, x), _dropout.forward(module, x)))
    assert not torch.equal(one, other) and torch.equal(one, seeded(lambda: _dropout.forward(module, x)))
    assert _dropout.forward(module.eval(), x) is x


def gradients(model, kind, data):
    view = ParamView.of_model(model)
    seeded(lambda: ModelObjective(Engine(model, view, kind), [data]).backward())
    found = {}
    for entry in view:
        u = held(entry.tensor)
        found[entry.name] = entry.tensor.grad if u is None else u.u
        entry.tensor.grad = None
        if u is not None:
            drop([entry.tensor])
    return found


@pytest.mark.parametrize("family", ["opt-untied", "roberta-classification"])
def test_a_model_with_dropout_saves_no_mask(family):
    """OPT's layers call the function, RoBERTa's modules; attention's own dropout, torch's, is off."""
    kind, model = make(family)
    for module in model.modules():
        for name in ("attention_dropout", "dropout_prob"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
        if hasattr(module, "dropout") and "Attention" in type(module).__name__ and isinstance(module.dropout, nn.Dropout):
            module.dropout.p = 0.0
    found = []

    def pack(tensor):
        found.append(tensor.dtype.is_floating_point and float((tensor == 1 / 0.9).double().mean()) > 0)
        return tensor

    policy = velora.build(model, velora.Config(groups=4), view=ParamView.of_model(model))
    data = batch(kind, labels="all")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gradients(model, kind, data)
    assert sum(found) == 0
    policy.remove()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gradients(model, kind, data)
    assert sum(found) > 0


@pytest.mark.parametrize("family", ["opt-untied", "roberta-classification"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_runs_again_with_the_same_masks(family, reentrant):
    kind, model = make(family)
    data, view = batch(kind, labels="all"), ParamView.of_model(model)
    policy = velora.build(model, velora.Config(groups=4, init="random"), view=view)
    gradients(model, kind, data)
    if family == "opt-untied":  # its layers checkpoint themselves and keep torch's masks then
        policy.remove()
        policy = velora.build(model, velora.Config(groups=4, init="random", recompute="none"), view=view)
    plain = gradients(model, kind, data)
    policy.remove()
    policy = velora.build(model, velora.Config(groups=4, init="random"), view=view)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients(model, kind, data)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
