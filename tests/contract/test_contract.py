"""The contract of optimizers, run over every method found in `smidgen.optim`.

No method is named here: a new file in the folder is tested by being there. `SMIDGEN_CONTRACT_METHODS` (a folder) adds
methods from elsewhere; CONTRIBUTING's example is tested through it.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from smidgen import optim
from smidgen.directions import restrict
from smidgen.objective import ClosureObjective, Recorded, Replayed
from smidgen.params import ParamView, shapes

LR = 0.02  # for the quadratic below; a step of this size helps every method


def _modules():
    found = {name: optim.get(name) for name in optim.names()}
    if folder := os.environ.get("SMIDGEN_CONTRACT_METHODS"):
        found = {}
        for path in sorted(Path(folder).glob("*.py")):
            spec = importlib.util.spec_from_file_location(f"smidgen.optim.{path.stem}", path)
            found[path.stem] = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = found[path.stem]
            spec.loader.exec_module(found[path.stem])
    return found


METHODS = _modules()
VALUES = [n for n, m in METHODS.items() if "backward" not in m.build.uses]
every_method = pytest.mark.parametrize("method", METHODS)
value_method = pytest.mark.parametrize("method", VALUES)


class Quadratic:
    """0.5 * sum a (w - 1)^2 over tensors of odd shapes; deterministic, with known gradient."""

    def __init__(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(5)
        self.tensors = [
            torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((3, 5), (7,), (2, 1, 3), ())
        ]
        self.curvature = [0.5 + torch.rand(t.shape, generator=generator) for t in self.tensors]
        self.untuned = torch.ones(3)

    def loss(self):
        return sum(
            (0.5 * a * (t.float() - self.untuned[0]) ** 2).sum() for a, t in zip(self.curvature, self.tensors, strict=True)
        )

    def loss_of(self, moved):
        """The part of the loss that comes from some tensors."""
        terms = zip(self.curvature, self.tensors, moved, strict=True)
        return sum(float((0.5 * a * (t.detach().float() - 1.0) ** 2).sum()) for a, t, mine in terms if mine)

    def copy(self):
        return [t.detach().clone() for t in self.tensors]

    def equals(self, saved):
        return all(torch.equal(t.detach(), s) for t, s in zip(self.tensors, saved, strict=True))


def theta(problem: Quadratic, opt) -> torch.Tensor:
    """Weights and offset, flat, float64."""
    parts = []
    for entry in opt.view:
        moved = torch.zeros(entry.tensor.shape)
        for z, s in restrict(opt.offset(), entry.name):
            z.accumulate(entry.name, slice(0, len(moved) if moved.ndim else 1), moved.view(-1, _width(moved)), s)
        parts.append((entry.storage.double() + moved.double()).flatten())
    return torch.cat(parts)


def _width(tensor: torch.Tensor) -> int:
    return tensor.numel() // tensor.shape[0] if tensor.ndim else 1


def make(method: str, problem: Quadratic, **options):
    module = METHODS[method]
    view = ParamView.of_tensors(problem.tensors)
    return module.build(view, module.Config(**{"lr": LR, **options}))


class Spy:
    """An objective that keeps the probes it was asked for; a slope is asked along a probe of one direction."""

    key = None

    def __init__(self, problem, view):
        self.inner, self.probes = ClosureObjective(problem.loss, view), []

    def __getattr__(self, name):  # other questions
        return getattr(self.inner, name)

    def losses(self, probes, *, each=False):
        self.probes.extend(probes)
        return self.inner.losses(probes, each=each)

    def slope(self, direction):
        self.probes.append([(direction, 1.0)])
        return self.inner.slope(direction)

    def backward(self, names=None, *, dropout=True):
        return self.inner.backward(names, dropout=dropout)


@every_method
def test_loss_falls_on_a_quadratic(method):
    ends = []
    for lr in (LR, LR / 10, LR * 4):  # momentum multiplies the rate by ten; sums that never decay want a larger one
        if ends and min(ends) < 0.3:
            break
        problem = Quadratic()
        opt = make(method, problem, lr=lr)
        moved = [opt.moves(e.name) for e in opt.view]  # some methods leave some tensors alone
        first = problem.loss_of(moved)
        for _ in range(400):
            opt.step(problem.loss)
        opt.merge_()
        ends.append(problem.loss_of(moved) / first)
    assert min(ends) < 0.3


@value_method
def test_update_lies_along_the_probed_directions(method):
    problem = Quadratic()
    opt = make(method, problem)
    view = opt.view
    if not opt.linear:
        pytest.skip("its update is no sum of directions: see the next test")
    memory = METHODS[method].build.state_bytes(shapes(view), opt.config) > 0
    directions = []
    for _ in range(3):
        directions = directions if memory else []  # what is remembered moves along the directions of steps before
        before = theta(problem, opt)
        spy = Spy(problem, view)
        opt.step(spy)
        moved = theta(problem, opt) - before
        for probe in spy.probes:
            total = [torch.zeros(e.tensor.shape, dtype=torch.float64) for e in view]
            for entry, out in zip(view, total, strict=True):
                rows = slice(0, entry.tensor.shape[0] if entry.tensor.ndim else 1)
                for z, s in restrict(probe, entry.name):  # each alone: eps z beside an offset would lose its last digits
                    part = torch.zeros(entry.tensor.shape)
                    z.accumulate(entry.name, rows, part.view(-1, _width(part)), s)
                    out += part
            directions.append(torch.cat([t.flatten() for t in total]))
        basis = torch.stack([d / d.norm() for d in directions if d.norm() > 0], 1)
        residual = moved - basis @ torch.linalg.lstsq(basis, moved[:, None], driver="gelsd").solution[:, 0]
        assert moved.norm() > 0
        assert residual.norm() < 1e-5 * moved.norm()


@pytest.mark.parametrize("method", [n for n in VALUES if not METHODS[n].build.linear])
def test_update_that_bends_the_estimate_stays_in_the_probed_subspace(method):
    """Each matrix moves in the row space of its probes, every other tensor along them."""
    problem = Quadratic()
    opt = make(method, problem)
    for _ in range(2):
        before = theta(problem, opt)
        spy = Spy(problem, opt.view)
        opt.step(spy)
        moved = (theta(problem, opt) - before).split([e.tensor.numel() for e in opt.view])
        for entry, part in zip(opt.view, moved, strict=True):
            shape = entry.tensor.shape
            wide = (shape[0], -1) if len(shape) > 1 else (1, -1)
            probed = []
            for probe in spy.probes:
                for z, _ in restrict(probe, entry.name):
                    probed.append(torch.zeros(shape))
                    z.accumulate(entry.name, slice(0, shape[0] if shape else 1), probed[-1].view(-1, _width(probed[-1])), 1.0)
            rows = torch.cat([p.view(wide).double() for p in probed])
            _, size, basis = torch.linalg.svd(rows, full_matrices=False)
            basis = basis[size > 1e-5 * size[0]]
            part = part.view(wide)
            assert part.norm() > 0 and (part - part @ basis.T @ basis).norm() < 1e-5 * part.norm()
            assert len(shape) < 2 or len(basis) < part.shape[1]  # a subspace that leaves something out


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_seed_same_bits(method, dtype):
    ends = []
    for _ in range(2):
        problem = Quadratic(dtype)
        opt = make(method, problem, seed=3)
        for _ in range(5):
            opt.step(problem.loss)
        ends.append(problem.copy())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@value_method
def test_another_seed_other_bits(method):
    ends = []
    for seed in (3, 4):
        problem = Quadratic()
        opt = make(method, problem, seed=seed)
        for _ in range(3):
            opt.step(problem.loss)
        opt.merge_()
        ends.append(problem.copy())
    assert not all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@value_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_equals_live(method, dtype):
    problem = Quadratic(dtype)
    opt = make(method, problem)
    transcript = []
    for t in range(12):
        opt.param_groups[0]["lr"] = LR / (1 + t)
        recorded = Recorded(ClosureObjective(problem.loss, opt.view))
        opt.step(recorded)
        transcript.append((opt.param_groups[0]["lr"], recorded.values))
    opt.merge_()
    twin = Quadratic(dtype)
    other = make(method, twin)
    for lr, values in transcript:
        other.param_groups[0]["lr"] = lr
        replayed = Replayed(values)
        other.step(replayed)
        assert replayed.done()
    other.merge_()
    assert twin.equals(problem.copy())


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_in_mid_run_equals_a_straight_run(method, dtype, tmp_path):
    straight = Quadratic(dtype)
    opt = make(method, straight)
    for _ in range(9):
        opt.step(straight.loss)
    problem = Quadratic(dtype)
    first = make(method, problem)
    for _ in range(4):
        first.step(problem.loss)
    torch.save({"weights": problem.copy(), "optimizer": first.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = Quadratic(dtype)
    for tensor, value in zip(again.tensors, saved["weights"], strict=True):
        tensor.data.copy_(value)
    second = make(method, again)
    second.load_state_dict(saved["optimizer"])
    for _ in range(5):
        second.step(again.loss)
    assert again.equals(straight.copy())


@value_method
def test_theta_is_unchanged_by_probing_also_when_the_forward_raises(method):
    counted = Quadratic()
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        return counted.loss()

    make(method, counted).step(count)
    last = min(2, calls)  # in the second evaluation, or the only one
    problem = Quadratic()
    opt = make(method, problem)
    before = problem.copy()
    calls = 0

    def loss():
        nonlocal calls
        calls += 1
        value = problem.loss()
        if calls == last:
            raise RuntimeError("no")
        return value

    with pytest.raises(RuntimeError, match="no"):
        opt.step(loss)
    assert problem.equals(before)
    assert opt.t == 0


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_shapes_untuned_tensors_and_global_generators_stay(method, dtype):
    problem = Quadratic(dtype)
    kinds = [(t.dtype, t.shape, t.data_ptr()) for t in problem.tensors]
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    opt = make(method, problem)
    for _ in range(3):
        opt.step(problem.loss)
    assert [(t.dtype, t.shape, t.data_ptr()) for t in problem.tensors] == kinds
    assert torch.equal(problem.untuned, torch.ones(3))
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_a_finite_loss_writes_nothing(method, value):
    problem = Quadratic()
    opt = make(method, problem)
    opt.step(problem.loss)
    before = problem.copy()
    loss = opt.step(lambda: problem.loss() * value)
    assert not np.isfinite(loss)
    assert problem.equals(before)
    assert not opt.outcome.written and opt.outcome.voided >= 1 and opt.bad_steps == 1
    opt.step(problem.loss)
    assert opt.bad_steps == 0 and not problem.equals(before)


@every_method
def test_state_bytes_is_what_is_held(method):
    problem = Quadratic(torch.bfloat16)
    opt = make(method, problem)
    for _ in range(2):
        opt.step(problem.loss)
    held = sum(v.numel() * v.element_size() for s in opt.state.values() for v in s.values() if torch.is_tensor(v))
    assert METHODS[method].build.state_bytes(shapes(opt.view), opt.config) == held


@every_method
def test_a_schedule_may_change_the_rate_and_a_bare_step_does_nothing(method):
    problem = Quadratic()
    opt = make(method, problem)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.0 if t else 1.0)
    opt.step(problem.loss)
    assert opt.step() is None and opt.t == 1
    schedule.step()
    before = problem.copy()
    opt.step(problem.loss)
    assert problem.equals(before)


@every_method
def test_options_are_documented_and_unknown_ones_refused(method):
    module = METHODS[method]
    assert module.__doc__ and module.status in ("recommended", "reproduction", "experimental")
    for name, info in module.Config.model_fields.items():
        assert info.description, name
    with pytest.raises(ValueError):
        module.Config(no_such_option=1)


def test_two_ranks_hold_equal_weights_and_agree_with_one(tmp_path):
    """Over gloo: the same bits on both ranks, of every method; of ranks that share out the probes, the same as in one process;
    of ranks that share out the rows, the same to 1e-6."""
    script = Path(__file__).with_name("ranks.py")
    port = str(20000 + os.getpid() % 20000)
    runs = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        runs.append(subprocess.Popen([sys.executable, script, str(tmp_path), ",".join(METHODS)], env=env))
    assert [run.wait(timeout=600) for run in runs] == [0, 0]
    for method in METHODS:
        one, other = (torch.load(tmp_path / f"{method}-{rank}.pt") for rank in range(2))
        alone = (one if "alone" in one else other)["alone"]
        for how in one.keys() & other.keys():
            assert all(torch.equal(one[how][n], other[how][n]) for n in alone), (method, how)
        if method in VALUES:  # Adam makes steps of what is zero but for the order of adding: tests/test_parallel.py takes SGD
            assert all(torch.allclose(one["rows"][n], alone[n], atol=1e-6) for n in alone), method
            assert all(torch.equal(one["probes"][n], alone[n]) for n in alone), method
        assert any(not torch.equal(alone[n], alone[n] * 0) for n in alone)


def test_contract_would_notice_a_wrong_direction():
    """The suite can fail: an optimizer that steps along other noise than it probed is caught."""
    if "zo_sgd" not in METHODS:
        pytest.skip("needs zo_sgd")

    class Wrong(METHODS["zo_sgd"].ZOSGD):
        def _step(self, objective):
            view = copy.copy(self.view)
            original = view.apply_
            view.apply_ = lambda probe, **k: original([(type(z)(**{**vars(z), "step": 99}), s) for z, s in probe], **k)
            self.view, kept = view, self.view
            try:
                return super()._step(objective)
            finally:
                self.view = kept

    saved = METHODS["zo_sgd"].build
    METHODS["zo_sgd"].build = Wrong
    try:
        with pytest.raises(AssertionError):
            test_update_lies_along_the_probed_directions("zo_sgd")
    finally:
        METHODS["zo_sgd"].build = saved
