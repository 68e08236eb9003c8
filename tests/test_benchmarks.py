"""The benchmarks of methods run on a tiny model: their figures are of the form that their documents state."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _models
import velora_step
import zo_memory
import zo_methods
import zo_step
from smidgen import optim


@pytest.fixture(autouse=True)
def seeded():
    """Random models and the textbook step draw from torch's generator."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        yield


@pytest.mark.parametrize("method", optim.names())
def test_every_method_is_measured(method, monkeypatch):
    monkeypatch.setattr(zo_methods, "ROWS", 2)
    monkeypatch.setattr(zo_methods, "LENGTH", 8)
    figures = zo_methods.measure(method, "tiny", None, 1)
    name = "over_forward_backward" if zo_methods.differentiates(method) else "over_two_forwards"
    assert figures[f"{method}_{name}"] > 0 and figures[f"{method}_forwards"] >= 0
    assert figures[f"{method}_state_bytes"] == figures[f"{method}_state_held"]


def test_a_step_is_compared_with_the_textbook():
    found = zo_step.compare(_models.opt("tiny"), 2, 8, False, 1, "cpu")
    assert found["over"] > 0 and found["speedup"] > 0


@pytest.mark.parametrize("side", zo_memory.SIDES)
def test_every_side_of_the_memory_curve_steps(side):
    model = _models.opt("tiny")
    before = [p.detach().clone() for p in model.parameters()]
    zo_memory.SIDES[side](model)(_models.batch(model, 2, 8, every=True))
    tuned = [p for p in model.parameters() if p.requires_grad]
    moved = len(tuned) != len(before) or any(not torch.equal(p, b) for p, b in zip(tuned, before, strict=True))
    assert moved == (side != "forward")


def test_the_textbook_step_is_mezos():
    """In place: after the step the weights differ from the start by one multiple of the seeded noise."""
    model = _models.opt("tiny")
    before = [p.detach().clone() for p in model.parameters()]
    _models.textbook_step(model, _models.batch(model, 2, 8), 5)
    torch.manual_seed(5)
    ratios = []
    for p, b in zip(model.parameters(), before, strict=True):
        z = torch.normal(mean=0.0, std=1.0, size=p.shape, dtype=p.dtype)
        ratios.append(float(((p - b) * z).sum() / (z * z).sum()))
    assert max(ratios) - min(ratios) < 1e-6 and abs(ratios[0]) < 1e-3


@pytest.mark.parametrize("side", ["lozo", "qlora"])
def test_quantised_llamas_are_tuned_in_place_of_nothing(side):
    """The codes stay as they are, and the loss is that of another model after a step."""
    pytest.importorskip("bitsandbytes")
    import _quantised
    import eight_gb
    from smidgen.provenance import base_sha256

    model = _quantised.llama("tiny")
    data, held = _models.batch(model, 2, 8), base_sha256(model)
    step, optimizer = eight_gb.SIDES[side](model)
    with torch.enable_grad():
        step(data), step(data)
    moved = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.any()]
    assert moved and (base_sha256(model) == held or side == "qlora")


@pytest.mark.parametrize("side", ["velora", "lora_velora"])
def test_sides_with_velora_are_measured_in_parts(side):
    found = velora_step.measure(side, "tiny", 2, 8)
    assert set(found) == {"peak", "gradient", "state", "saved"} and min(found["gradient"], found["saved"]) > 0
    assert 2 * found["gradient"] < found["state"] < 2.1 * found["gradient"]  # two moments and a counter
