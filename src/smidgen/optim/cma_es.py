"""CMA-ES in a small space: covariance matrix adaptation over the coordinates of low-rank modules or virtual tokens.

Source: "Derivative-Free Optimization for Low-Rank Adaptation" (DFO-LoRA, its C-LoRA), which optimises the modules of one
layer after another; the strategy is Hansen's, by his package `cma` (Hansen, "The CMA Evolution Strategy: A Tutorial", 2016,
arXiv 1604.00772). For a layer with space theta_l + P_l y and its strategy (m, sigma, C):

    y_k = m + sigma N(0, C), k = 1..population;  L_k = L(theta + P_l (y_k - y));  m, sigma, C <- cma(y_k, L_k);  y <- incumbent

incumbent: `best_ever`, the best point so far, is the public code's; it goes stale when other layers move. `best` is that of
the generation, `mean` the new m. covariance: at the paper's budget, 16 generations of 20 in 500 dimensions, C stays within
about 1 % of the unit matrix, so that `diagonal` (separable CMA-ES, the default; `cma` adapts sigma by two points above 299
dimensions) does what `full` does, for d numbers instead of 2 d^2. Our normals, addressed, drive it; its own stopping rules are
not asked.

State: 2 d^2 + 13 d (full) or 13 d (diagonal) float64 numbers a space. It does not: bounds, restarts, integer variables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from pydantic import Field

from smidgen.config import ConfigError
from smidgen.optim._search import Generation, SearchConfig, SearchOptimizer, Strategy, normals, ranked, require_cma
from smidgen.params import ParamView

status = "experimental"

PRESETS = {
    # The public code: query and key (scheme dfo_lora), d = 500, population 20, 8000 forwards.
    "reference": {
        "dimension": 500, "population": 20, "budget": 8000, "lr": 1.0, "alpha": 1.0, "init": "hidden",
        "compat_whole_dimension": True, "covariance": "full", "incumbent": "best_ever",
    },
    "recommended": {"dimension": 64, "covariance": "diagonal", "incumbent": "mean", "init": "hidden", "lr": 0.5},
    # BBT and BBTv2 as their README has them: virtual tokens in one space (scheme prompt), or in one for each layer, in turn
    # (scheme deep_prompt).
    "bbt": {"dimension": 500, "order": "all", "init": "hidden", "covariance": "full", "incumbent": "best_ever"},
    "bbtv2": {
        "dimension": 500, "order": "layers", "init": "hidden", "lr": 0.2, "alpha": 0.2, "covariance": "full",
        "incumbent": "best_ever",
    },
}  # fmt: skip

_LARGEST_FULL = 2000  # coordinates of a full covariance: 64 MB and a cubic decomposition a space; chosen

# What the package holds of a strategy, each of length d, beside the matrices.
_VECTORS = (
    "mean",
    "mean0",
    "mean_old",
    "mean_old_old",
    "mean_after_tell",
    "x0",
    "pc",
    "pc2",
    "pc_neg",
    "_isotropic_mean_shift",
    "D",
)


class Config(SearchConfig):
    """Options of CMA-ES."""

    covariance: Literal["diagonal", "full"] = Field(
        "diagonal", description="full: C as published; diagonal: separable CMA-ES, the same at such budgets and far smaller"
    )
    incumbent: Literal["best_ever", "best", "mean"] = Field(
        "best_ever", description="what the weights become: the best point so far, that of the generation, or the mean"
    )


class _CMA(Strategy):
    """cma's strategy with addressed normals."""

    def __init__(self, d: int, config: Any, address: int):
        self.d, self.config, self.address = d, config, address
        self.t = self.draws = 0
        options = {
            "popsize": config.population, "randn": self._randn, "seed": np.nan, "CMA_diagonal": config.covariance == "diagonal",
            "verbose": -9, "verb_log": 0, "verb_disp": 0,
        }  # fmt: skip
        self.es = require_cma().CMAEvolutionStrategy(np.zeros(max(2, d)), config.lr, options)  # it has no one-dimensional form
        self.y = np.zeros(d)
        self.centre, self.best = np.zeros(max(2, d)), math.inf

    def _randn(self, *shape: int) -> np.ndarray:
        self.draws += 1
        return normals(self.config.seed, self.address, self.t, self.draws, shape)

    def generation(self, t: int, factor: float) -> Generation:
        self.t, self.draws = t, 0
        mean = np.array(self.es.mean)
        X = self.es.ask()
        points = self.centre + factor * (np.array(X) - mean)
        losses = yield points[:, : self.d]
        order = ranked(losses)
        self.es.tell(X, order.tolist())
        self.es.ary, self.es.pop_sorted, self.es._tell2_args = [], None, None  # a generation's points, of no use any more
        self.centre = self.centre + factor * (np.array(self.es.mean) - mean)
        k = int(order.argmin())
        if self.config.incumbent == "mean":
            self.y = self.centre[: self.d].copy()
        elif self.config.incumbent == "best" or losses[k] < self.best:
            self.y, self.best = points[k, : self.d].copy(), float(losses[k])

    def arrays(self) -> dict[str, np.ndarray]:
        known, empty = vars(self.es), np.zeros(self.es.N)  # some exist from the first generation on
        held = {"y": self.y, "centre": self.centre, **{key: np.asarray(known.get(key, empty)) for key in _VECTORS}}
        return held if self.config.covariance == "diagonal" else held | {"C": self.es.sm.C, "B": self.es.sm.B}


class CMAES(SearchOptimizer):
    """CMA-ES over any tensors, with one strategy a layer or one for all. Raises ConfigError where `cma` is not installed, for a
    dimension that does not fit, and for a full covariance of too many coordinates."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))

    def strategy(self, d: int, address: int) -> Strategy:
        if self.config.covariance == "full" and d > _LARGEST_FULL:
            raise ConfigError(
                f"a full covariance of {d:,} coordinates takes {16 * d * d / 1e9:.1f} GB and a slow decomposition: give a "
                f"dimension of at most {_LARGEST_FULL:,}, or covariance=diagonal"
            )
        return _CMA(d, self.config, address)

    @classmethod
    def numbers(cls, d: int, config: Any) -> int:
        n = max(2, d)
        return d + (1 + len(_VECTORS)) * n + (2 * n * n if config.covariance == "full" else 0)


build = CMAES
