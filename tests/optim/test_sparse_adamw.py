"""AdamW with ages: torch's where nothing moves, the public code's with its switch, new entries as young as they are."""

from __future__ import annotations

import pytest
import torch

from smidgen.optim.sparse_adamw import SparseAdamW
from smidgen.params import ParamView, Support, shapes


def problem():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, 3, generator=generator).requires_grad_(), torch.randn(5, generator=generator).requires_grad_()]


def loss_of(tensors):
    return sum(((t - 1) ** 4).sum() for t in tensors)


def supported(k=3):
    view = ParamView.of_tensors([torch.zeros(k, requires_grad=True)])
    view["0"].support = Support((4, 4), torch.arange(k))
    return view


def test_without_decay_it_is_adam():
    a, b = problem(), problem()
    ours, theirs = SparseAdamW(a, lr=0.01, max_grad_norm=0, eps=1e-8), torch.optim.Adam(b, lr=0.01, foreach=False)
    for _ in range(12):
        ours.step(lambda: loss_of(a))
        theirs.zero_grad()
        loss_of(b).backward()
        theirs.step()
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("compat", [False, True])
def test_one_step_by_hand(compat):
    """The public code adds eps to the root before its correction, and decays after the step."""
    w = torch.tensor([2.0, -3.0], requires_grad=True)
    opt = SparseAdamW([w], lr=0.1, eps=0.5, weight_decay=1.0, compat_eps=compat, max_grad_norm=0)
    opt.step(lambda: (w * torch.tensor([0.4, -1.0])).sum())
    g = torch.tensor([0.4, -1.0])
    root = (0.001**0.5 * g.abs() + 0.5) / 0.001**0.5 if compat else g.abs() + 0.5
    assert torch.allclose(w.detach(), (torch.tensor([2.0, -3.0]) - 0.1 * g / root) * 0.9, atol=1e-5)


def test_decay_is_of_all_tensors():
    a = problem()
    before = [t.detach().clone() for t in a]
    SparseAdamW(a, lr=0.1, weight_decay=1.0).step(lambda: sum(t.sum() * 0 for t in a))
    assert all(torch.allclose(t.detach(), 0.9 * b) for t, b in zip(a, before, strict=True))


def test_an_entry_without_seeds_begins_anew():
    view = supported()
    opt = SparseAdamW(view, lr=0.1, max_grad_norm=0)
    w = view["0"].tensor
    for _ in range(3):
        opt.step(lambda: (w * torch.tensor([1.0, 2.0, 3.0])).sum())
    opt.reselect("0", torch.tensor([2, -1, 0]), None)
    assert opt.births == [0, 3] and opt.state[w]["generation"].tolist() == [0, 1, 0]
    assert torch.allclose(opt.state[w]["exp_avg"], torch.tensor([3.0, 0.0, 1.0]) * (1 - 0.9**3))
    before = w.detach().clone()
    opt.step(lambda: (w * 5.0).sum())
    assert abs(float(before[1] - w[1]) - 0.1) < 1e-6  # a first step of Adam is lr long


@pytest.mark.parametrize("size", [2, 5])
def test_a_tensor_without_support_is_as_old_as_the_run(size):
    """Beside one whose entries are of two generations: a classifier's new head, which is tuned whole."""
    a, b = torch.linspace(-1, 1, size).requires_grad_(), torch.linspace(-1, 1, size).requires_grad_()
    support = Support((4, 4), torch.arange(3))
    view = ParamView.of_tensors([torch.zeros(3, requires_grad=True), a])
    view["0"].support = support
    ours, theirs = SparseAdamW(view, lr=0.01, max_grad_norm=0), torch.optim.Adam([b], lr=0.01, foreach=False)
    for t in range(6):
        ours.step(lambda: loss_of([a]) + view["0"].tensor.sum())
        theirs.zero_grad()
        loss_of([b]).backward()
        theirs.step()
        if t == 2:
            ours.reselect("0", torch.tensor([0, -1, 2]), None)
    assert ours.births == [0, 3] and torch.allclose(a, b, atol=1e-6)


def test_generations_are_shared_and_come_back_from_the_state():
    view = supported()
    opt = SparseAdamW(view, lr=0.1)
    for _ in range(2):
        opt.step(lambda: view["0"].tensor.sum())
    for _ in range(2):
        opt.reselect("0", torch.tensor([0, 1, -1]), None)
    assert opt.births == [0, 2]
    again = SparseAdamW(supported(), lr=0.1)
    again.load_state_dict(opt.state_dict())
    assert again.births == [0, 2] and again.updates == 2
    state = next(iter(again.state.values()))
    assert state["generation"].dtype == torch.uint8 and state["generation"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("state,size", [("float32", 9.0), ("bfloat16", 5.0), ("8bit", 3.0 + 2 * 4 / 256)])
def test_bytes_an_entry(state, size):
    view = supported(8192)
    view["0"].support = Support((100, 100), torch.arange(8192))
    opt = SparseAdamW(view, lr=0.1, state=state)
    opt.step(lambda: view["0"].tensor.sum())
    held = sum(v.numel() * v.element_size() for s in opt.state.values() for v in s.values() if torch.is_tensor(v))
    assert held == SparseAdamW.state_bytes(shapes(view), opt.config) == size * 8192


def test_the_257th_generation_takes_a_second_byte_and_ages_stay_exact():
    view = supported()
    w = view["0"].tensor
    opt = SparseAdamW(view, lr=1e-3, max_grad_norm=0)
    for t in range(260):
        opt.step(lambda: w.sum())
        opt.reselect("0", torch.tensor([0, -1, 2]), None)
        assert opt.state[w]["generation"].dtype == (torch.uint8 if t < 255 else torch.int16)
    assert [opt.births[g] for g in opt.state[w]["generation"].tolist()] == [0, 260, 0]


def test_moments_in_bfloat16_follow_float32_on_average():
    """A second moment grows by a thousandth of g^2 an update and then decays by a thousandth: half an ulp is 4 times that."""
    held = {}
    for state in ("float32", "bfloat16"):
        view = supported(4096)
        opt = SparseAdamW(view, lr=1e-3, max_grad_norm=0, state=state)
        for t in range(120):
            opt.step(lambda t=t, view=view: view["0"].tensor.sum() * (1.0 if t < 60 else 0.0))
        kept = opt.state[view["0"].tensor]
        held[state] = kept["exp_avg_sq"].float().mean(), kept["exp_avg"].float().mean()
        assert kept["exp_avg_sq"].dtype == getattr(torch, state)
    assert abs(held["bfloat16"][0] / held["float32"][0] - 1) < 2e-3  # 4 standard errors: 2^-8 / sqrt(4096) each of 100 steps
    assert abs(held["bfloat16"][1] / held["float32"][1] - 1) < 2e-3


@pytest.mark.parametrize("state", ["float32", "bfloat16", "8bit"])
def test_a_tensor_may_lose_elements(state):
    view = supported(6000)
    view["0"].support = Support((100, 100), torch.arange(6000))
    w = view["0"].tensor
    opt = SparseAdamW(view, lr=0.1, state=state)
    opt.step(lambda: (w * torch.arange(6000.0)).sum())
    before = {k: v.clone() for k, v in opt.state[w].items()}
    stays = torch.arange(0, 6000, 2)
    w.requires_grad_(False).resize_(3000).requires_grad_(True)
    opt.reselect("0", stays, None)
    if state != "8bit":  # below 4,096 elements 8 bits are float32 again
        assert all(torch.equal(opt.state[w][k], v[stays]) for k, v in before.items())
    assert all(v.numel() == 3000 for v in opt.state[w].values())
    opt.step(lambda: w.sum())
    assert opt.outcome.written
