"""Fireworks in a small space: sparks around an incumbent, an amplitude that follows success, guiding sparks.

Source: the F-LoRA of "Derivative-Free Optimization for Low-Rank Adaptation" names the Fireworks algorithm and publishes none of
it. These are Li and Tan, "The Bare Bones Fireworks Algorithm", 2018, and "Loser-Out Tournament-Based Fireworks Algorithm",
2018, with the guiding spark of Li, Zheng and Tan, 2017, in the layer-wise setting of DFO-LoRA. For a firework y of amplitude A:

    s_k = y + A u_k, u_k uniform in (-1, 1)^d;  g = y + mean(best fifth of s) - mean(worst fifth of s)
    y' <- the best of y, s and g;  A <- 1.2 A if y' is better than y, else 0.9 A

loser_out: several fireworks share the generation evenly; one whose gain in this generation, times the generations left, does
not reach the best one's loss starts anew at random. The weights hold the best firework. Ours: there are no bounds (nor spark
outside of them to draw again), the first amplitude is 2 sigma, and fireworks are evaluated anew in every generation, since
their losses change when other layers move. g points downhill; the authors' library has the difference the wrong way round.

State: (n + 1) d + n float64 numbers a space for n fireworks. It does not: explosion numbers by fitness, Gaussian sparks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from smidgen.optim._search import Generation, SearchConfig, SearchOptimizer, Strategy, ranked, uniforms
from smidgen.params import ParamView

status = "experimental"

PRESETS = {
    # The setting of cma_es: reference, with as many forwards.
    "reference": {
        "dimension": 500, "population": 20, "budget": 8000, "lr": 1.0, "init": "hidden", "compat_whole_dimension": True,
    },
    "recommended": {"dimension": 64, "init": "hidden", "lr": 0.5},
}  # fmt: skip

_GUIDING = 0.2  # share of sparks that make each end of the guiding difference: the papers'
_SPARKS, _RESTARTS, _STARTS = range(3)  # queries of the noise


class Config(SearchConfig):
    """Options of fireworks."""

    algorithm: Literal["bare_bones", "loser_out"] = Field(
        "bare_bones", description="bare_bones: one firework; loser_out: several, of which the hopeless start anew"
    )
    fireworks: int = Field(
        5, ge=2, description="fireworks of loser_out; each takes two forwards of a generation, and its sparks"
    )
    amplify: float = Field(1.2, gt=1, description="factor of the amplitude after a success")
    reduce: float = Field(0.9, gt=0, lt=1, description="factor of the amplitude without one")

    @property
    def count(self) -> int:
        """Fireworks of a space, n."""
        return self.fireworks if self.algorithm == "loser_out" else 1

    @model_validator(mode="after")
    def _sparks_for_all(self) -> Config:
        if self.population < 4 * self.count:
            raise ValueError(
                f"population {self.population} is too small for {self.count} fireworks, each of which needs itself, two sparks "
                f"and a guide: give at least {4 * self.count}"
            )
        return self


class _Fireworks(Strategy):
    """n fireworks at x [n, d] with amplitudes A [n]."""

    def __init__(self, d: int, config: Config, address: int, turns: int):
        self.config, self.address, self.turns = config, address, turns  # turns: blocks that take a step in turn
        n, self.reach = config.count, 2.0 * config.lr
        self.x = self.reach * self._uniform(0, _STARTS, (n, d))
        self.x[0] = 0.0
        self.A = np.full(n, self.reach)
        self.y = np.zeros(d)

    def _uniform(self, t: int, query: int, shape: tuple[int, ...]) -> np.ndarray:
        return uniforms(self.config.seed, self.address, t, query, shape)

    def generation(self, t: int, factor: float) -> Generation:
        cfg, (n, d) = self.config, self.x.shape
        sparks = np.array_split(self._uniform(t, _SPARKS, (cfg.population - 2 * n, d)), n)
        around = [x + factor * A * u for x, A, u in zip(self.x, self.A, sparks, strict=True)]
        losses = yield np.concatenate([self.x, *around])
        owned = np.split(ranked(losses)[n:], np.cumsum([len(s) for s in around])[:-1])
        guides = np.stack([x + guide(s, L) for x, s, L in zip(self.x, around, owned, strict=True)])
        losses = ranked(np.concatenate([losses, (yield guides)]))
        own, guided = losses[:n], losses[-n:]
        owned = np.split(losses[n:-n], np.cumsum([len(s) for s in around])[:-1])
        gains, best = np.zeros(n), np.zeros(n)
        for i in range(n):
            points = np.concatenate([self.x[i : i + 1], around[i], guides[i : i + 1]])
            L = np.array([own[i], *owned[i], guided[i]])
            k = int(L.argmin())
            gains[i], best[i] = own[i] - L[k], L[k]
            self.x[i] = points[k]
            self.A[i] *= cfg.amplify if gains[i] > 0 else cfg.reduce
        self.y = self.x[int(best.argmin())].copy()
        left = max(0, (cfg.steps - t - 1) // self.turns)
        anew = self.y + factor * self.reach * self._uniform(t, _RESTARTS, (n, d))
        for i in np.flatnonzero(gains * left < best - best.min()).tolist():
            self.x[i], self.A[i] = anew[i], self.reach

    def arrays(self) -> dict[str, np.ndarray]:
        return {"x": self.x, "A": self.A, "y": self.y}


def guide(sparks: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The guiding difference of sparks [n, d]: mean of the best fifth minus mean of the worst; it points downhill.

    >>> guide(np.array([[0.0], [1.0], [2.0]]), np.array([0.0, 1.0, 2.0])).tolist()
    [-2.0]
    """
    order = np.argsort(losses, kind="stable")
    m = max(1, round(_GUIDING * len(sparks)))
    return sparks[order[:m]].mean(0) - sparks[order[-m:]].mean(0)


class Fireworks(SearchOptimizer):
    """Fireworks over any tensors, one search a layer or one for all. Raises ConfigError for a dimension that does not fit."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))

    def strategy(self, d: int, address: int) -> Strategy:
        return _Fireworks(d, self.config, address, len(self.blocks))

    @classmethod
    def numbers(cls, d: int, config: Any) -> int:
        return (config.count + 1) * d + config.count


build = Fireworks
