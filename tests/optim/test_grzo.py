"""GRZO: the update by hand, examples without a finite loss, an estimate that is the gradient on average."""

from __future__ import annotations

import math

import pytest
import torch

from families import batch, make
from smidgen.batched import BatchedEngine
from smidgen.directions import Dense
from smidgen.objective import ModelObjective, Recorded, Replayed
from smidgen.optim._examples import estimate
from smidgen.optim.grzo import GRZO, Config
from smidgen.params import ParamView


class Rows:
    """Losses of examples of their own: what the record holds."""

    key = None

    def __init__(self, values):
        self.values = torch.tensor(values, dtype=torch.float64)

    def losses(self, probes, *, each=False):
        assert each and len(probes) == len(self.values)
        return self.values


def weights(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=rng).requires_grad_() for s in ((6, 5), (7,))]


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_update_by_hand_and_an_example_without_a_loss(scale):
    tuned, before = weights(), weights()
    opt = GRZO(tuned, Config(lr=0.1, eps=0.5, queries=2, rank=2))
    up, down = [[1.0, math.nan, 2.0], [0.5, 1.0, 4.0]], [[0.0, 1.0, 3.0], [0.5, 3.0, 1.0]]
    opt.step(Rows([[scale * x for x in row] for row in (up[0], down[0], up[1], down[1])]))
    c = {0: 1.0, 2: -1.0, 3: 0.0, 4: -2.0, 5: 3.0}  # by query * 3 + row; the dead one is left out
    s = math.sqrt(15.0 / 5)
    assert opt.outcome.written and opt.outcome.voided == 1
    opt.merge_()
    for name, old in zip("01", before, strict=True):
        step = torch.zeros(old.shape)
        for query, value in c.items():
            z = opt.shaped(Dense(0, 0, query, opt.view.ids, "gaussian"))
            z.accumulate(name, slice(0, len(step)), step.view(len(step), -1), -0.1 * value / s / 5)
        assert torch.allclose(opt.view[name].storage - old.detach(), step, atol=1e-6)


def test_replay_of_a_model_with_ragged_micro_batches():
    ends = []
    transcript = []
    for replay in (False, True):
        kind, model = make("llama-tied")
        view = ParamView.of_model(model)
        opt = GRZO(view, lr=1e-3, eps=1e-2, interval=2)
        rows = [batch(kind, rows=r, seed=s, labels="all") for r, s in ((3, 1), (2, 2))]
        engine = BatchedEngine(model, view, kind)
        for t in range(3):
            objective = Replayed(transcript[t]) if replay else Recorded(ModelObjective(engine, rows))
            opt.step(objective)
            if not replay:
                assert len(objective.values) == 2 * 5
                transcript.append(objective.values)
        opt.merge_()
        ends.append(view.snapshot())
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_the_estimate_is_the_gradient_on_average():
    """Over many draws g_hat, before it is divided by the spread, tends to the gradient of the mean loss of the rows."""
    A = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))  # l_n(W) = <A_n, W>
    W = torch.zeros(4, 5, requires_grad=True)
    opt = GRZO([W], Config(lr=1.0, eps=1.0, rank=2, interval=1))

    class Linear:
        key = None

        def losses(self, probes, *, each=False):
            out = torch.zeros(len(probes), 3, dtype=torch.float64)
            for p, probe in enumerate(probes):
                z, s = probe[-1]
                for n in range(3):
                    D = torch.zeros(4, 5)
                    z.of(n, 3).accumulate("0", slice(0, 4), D, s)
                    out[p, n] = (A[n] * D).sum()
            return out

    total, count = torch.zeros(4, 5), 500
    square = torch.zeros(4, 5)
    for t in range(count):
        opt.subspace = t
        z = Dense(0, t, 0, opt.view.ids, "gaussian")
        g = estimate(Linear(), [z], [opt.shaped(z)], (), 1.0)
        step = torch.zeros(4, 5)
        for d, weight in g.along(1.0):
            opt.shaped(d).accumulate("0", slice(0, 4), step, weight)
        total += step
        square += step**2
    mean = total / count
    error = ((square / count - mean**2) / count).sqrt()
    assert float(((mean - A.mean(0)) / error).abs().max()) < 4.0  # standard errors, 20 entries
