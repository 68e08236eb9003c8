"""GaLore is galore-torch's update in our loop: what is projected, its state, and the same weights step by step."""

from __future__ import annotations

import copy

import pytest
import torch

from smidgen.config import ConfigError
from smidgen.optim.galore import GaLore


def matrices():
    made = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=made).requires_grad_() for shape in ((12, 6), (6, 12), (4, 4), (7,))]


def loss(tensors):
    return sum((t.sin() * torch.arange(t.numel()).view(t.shape)).square().mean() for t in tensors)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_weights_are_those_of_galore_torch(decay):
    from galore_torch import GaLoreAdamW

    ours, theirs = matrices(), matrices()
    method = GaLore(ours, lr=1e-2, rank=4, interval=3, scale=0.5, eps=1e-12, max_grad_norm=0, weight_decay=decay)
    low = {"params": theirs[:2], "rank": 4, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std"}
    groups = [{**low, "weight_decay": decay}, {"params": theirs[2:3], "weight_decay": decay}, {"params": theirs[3:]}]
    reference = GaLoreAdamW(groups, lr=1e-2, eps=1e-12, no_deprecation_warning=True)
    for _ in range(8):
        method.step(lambda: loss(ours))
        reference.zero_grad()
        loss(theirs).backward()
        reference.step()
    # its decay comes after the step and ours before: lr^2 decay apart, 1e-5 in eight steps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 if not decay else 1e-3)


def test_the_state_is_as_small_as_stated_and_goes_on_after_a_load():
    config = {"rank": 4, "interval": 3, "lr": 1e-2}
    ours, again = matrices(), matrices()
    first, second = GaLore(ours, **config), GaLore(again, **config)
    for _ in range(4):
        first.step(lambda: loss(ours))
    shapes = {e.name: (tuple(e.tensor.shape), torch.float32) for e in first.view}
    held = sum(t.numel() * t.element_size() for s in first.state.values() for t in s.values())
    assert held == GaLore.state_bytes(shapes, first.config) < 8 * sum(t.numel() for t in ours)
    for a, b in zip(again, ours, strict=True):
        a.data.copy_(b.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(3):  # past a new subspace
        first.step(lambda: loss(ours))
        second.step(lambda: loss(again))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_without_the_package_the_way_out_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "galore_torch.galore_projector", None)
    with pytest.raises(ConfigError, match=r"smidgen\[galore\]"):
        GaLore(matrices())
