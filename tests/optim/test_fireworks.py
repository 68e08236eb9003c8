"""Fireworks: known targets, guiding sparks downhill, amplitudes, restarts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smidgen.config import ConfigError
from smidgen.optim.fireworks import PRESETS, Fireworks, guide
from smidgen.trainer import method_config


@pytest.mark.parametrize("algorithm", ["bare_bones", "loser_out"])
def test_reaches_the_minimum_of_a_sphere(algorithm):
    w = torch.zeros(3)
    opt = Fireworks([w], lr=0.5, algorithm=algorithm, fireworks=2)
    for _ in range(100):
        opt.step(lambda: ((w - 1.5) ** 2).sum())
    assert float(((w - 1.5) ** 2).sum()) < 1e-4


def test_the_guiding_spark_points_downhill():
    slope = np.array([1.0, -2.0, 0.5])
    sparks = np.random.default_rng(0).uniform(-1, 1, (40, 3))
    step = guide(sparks, sparks @ slope)
    assert step @ slope < -1.0 and step @ -slope / np.linalg.norm(step) / np.linalg.norm(slope) > 0.9
    best, worst = sparks[np.argsort(sparks @ slope)[:8]].mean(0), sparks[np.argsort(sparks @ slope)[-8:]].mean(0)
    assert np.allclose(step, best - worst)


def test_a_generation_by_hand():
    """Itself, 18 sparks in the cube around it, one guide; the best is kept and the amplitude follows."""
    w, asked = torch.zeros(3), []

    class Spy:
        key = None

        def losses(self, probes, *, each=False):
            points = torch.stack([w + z.values["0"] for ((z, _),) in probes])
            asked.append(points)
            return points.double().sum(1) + 10

    opt = Fireworks([w], lr=0.25)
    opt.step(Spy())
    first, last = asked
    assert first.shape == (19, 3) and last.shape == (1, 3) and not first[0].any()
    assert float(first.abs().max()) <= 0.5 and float(first[1:].abs().max()) > 0.4
    every = torch.cat(asked)
    best = every[every.sum(1).argmin()]
    assert torch.allclose(w, best, atol=1e-6) and opt.strategies[0].A.tolist() == [0.5 * 1.2]
    start = w.clone()
    opt.step(lambda: (w - start).abs().sum())
    assert torch.equal(w, start) and opt.strategies[0].A.tolist() == pytest.approx([0.5 * 1.2 * 0.9])


def test_a_loser_starts_anew_and_the_best_stays():
    w = torch.zeros(2)
    opt = Fireworks([w], lr=0.5, algorithm="loser_out", fireworks=3, budget=40)  # two generations: the second has none left
    search = opt.strategies[0]
    search.x[1] = [30.0, 30.0]
    opt.step(lambda: w.square().sum())
    opt.step(lambda: w.square().sum())
    assert np.abs(search.x[1]).max() < 5.0 and search.A[1] == 1.0
    assert np.allclose(search.y, w.numpy(), atol=1e-6) and float(w.square().sum()) < 0.5


def test_bad_options():
    with pytest.raises(ConfigError, match=r"population 20 is too small for 6 fireworks.*give at least 24"):
        method_config("fireworks", None, {"algorithm": "loser_out", "fireworks": 6})
    for name in PRESETS:
        assert method_config("fireworks", name, {}).steps == 400
