"""Noise on outputs and what entered the layers, against their definition: one example, one sign at a time, biases displaced."""

from __future__ import annotations

import copy

import pytest
import torch

from families import batch, make
from smidgen.config import ConfigError
from smidgen.objective import ModelObjective
from smidgen.params import ParamView
from smidgen.per_example import Span, only
from smidgen.perturbed import _add, perturbed
from smidgen.probing import Engine


def draw(name, row, rows):
    """Noise that depends on all that it may depend on."""
    return 0.3 * torch.sin(torch.arange(float(SIZES[name])) * (1 + row) + len(name) + rows)


SIZES: dict[str, int] = {}


def setting(family, keep):
    """A model that tunes the weights of some layers, and its engine."""
    kind, model = make(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(keep))
    view = ParamView.of_model(model)
    for entry in view:
        axis = 0 if isinstance(entry.sites[0][0], torch.nn.Linear) else 1
        SIZES[entry.name] = entry.tensor.shape[axis] if entry.tensor.ndim == 2 else 0
    return kind, model, view, Engine(model, view, kind)


def alone(model, view, kind, one, n, total, sign):
    """The loss of an example, number n of the step's, and the token sums of what enters its layers; biases displaced."""
    twin, sums = copy.deepcopy(model), {}
    mask = one["attention_mask"][0].bool()
    for entry in view:
        module = twin.get_submodule(entry.name.removesuffix(".weight"))

        def enter(_, args, name=entry.name):
            x = args[0].view(-1, args[0].shape[-1])
            sums[name] = sum(x[t] for t in range(len(x)) if len(x) != len(mask) or mask[t])

        module.register_forward_pre_hook(enter)
        if module.bias is None:
            module.bias = torch.nn.Parameter(torch.zeros(SIZES[entry.name]))
        module.bias.data += sign * draw(entry.name, n, total)
    loss = Engine(twin, ParamView.of_model(twin), kind)._evaluate(one, ()).nll.mean()
    return float(loss), sums


@pytest.mark.parametrize(
    ("family", "keep"),
    [
        ("opt-tied", ("fc1.weight", "out_proj.weight")),
        ("llama-tied", ("o_proj.weight", "down_proj.weight")),
        ("gpt2", ("c_proj.weight", "c_attn.weight")),
        ("bert-classification", ("output.dense.weight",)),
    ],
)
def test_one_example_after_the_other(family, keep):
    kind, model, view, engine = setting(family, keep)
    before, parts = view.snapshot(), [batch(kind, rows=3, seed=4), batch(kind, rows=2, seed=5)]
    losses, inputs = ModelObjective(engine, parts).perturbed(list(view.entries), draw)
    assert losses.shape == (2, 5) and inputs.keys() == view.entries.keys() and engine.forwards == 4
    for n in range(5):
        one, halves = only(parts[0], n) if n < 3 else only(parts[1], n - 3), []
        for k, sign in enumerate((1.0, -1.0)):
            loss, sums = alone(model, view, kind, one, n, 5, sign)
            assert float(losses[k, n]) == pytest.approx(loss, abs=1e-5)
            halves.append(sums)
        for name, X in inputs.items():
            torch.testing.assert_close(X[n], (halves[0][name] + halves[1][name]) / 2, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], view[name].storage) for name in before)


def test_what_is_no_linear_weight_is_left_out_and_tokens_out_of_order_are_refused():
    kind, _, view, engine = setting("opt-tied", ("fc1.weight", "fc1.bias", "embed_tokens.weight", "norm.weight"))
    span = Span(0, 3)
    _, inputs = perturbed(engine, batch(kind), list(view.entries), draw, span)
    assert {name.rpartition("fc1.")[2] for name in inputs} == {"weight"}
    routed, seen = torch.nn.Linear(4, 2, device="meta"), torch.zeros(26, 4)  # tokens of several rows, not as many of each
    with pytest.raises(ConfigError, match=r"does not see the batch's 3 rows in order: take credit=vectors"):
        _add(torch.zeros(3, 2), torch.zeros(3, 4), None, torch.arange(3), 1.0, routed, (seen,), torch.zeros(26, 2))
