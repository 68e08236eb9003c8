"""Sparse ZO-SGD: descent along random directions that only move some of the weights.

Sources: ZO-Bench (Zhang et al., "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning", 2024, arXiv
2402.11592), random masks; Sparse-MeZO (Liu et al., 2024, arXiv 2402.15751), small weights; Wanda's score (Sun et al.,
2023, arXiv 2306.11695). With a binary mask M of the share 1 - s, and c_i as in zo_sgd:

    z'_i = M o z_i;  c_i from L(theta + eps z'_i);  theta <- theta - lr * (1/q) sum_i c_i z'_i

The mask that is probed is the mask that is updated, all q directions of a step share it, and a weight outside it does not
change by one bit, nor decay. What M keeps:

    random  every weight with probability 1 - s, drawn anew every `resample` steps;
            group: global moves the expected share of zeros of each tensor to its share of entries whose |w| is at most the
            s-quantile of all |theta_0|, as ZO-Bench does
    small   the smallest |theta_0| of each tensor (group: layer) or of all (group: global); Sparse-MeZO
    large   the largest
    wanda   the largest |W_ij| ||x_j||_2 of each output row of a linear weight, x_j its inputs over the first step's data;
            tensors that are no linear weight (embeddings, output heads, biases, norms, convolutions): as large

All but random are made once, at the first step, and are exact: round((1 - s) n) entries, among equal ones the earlier.

Cost: zo_sgd's; wanda one more forward once. A pass over the weights is at most 1.3 times zo_sgd's. State: none for random;
1 bit a weight. It does not: scale up for what is left out, or make the matrix products sparse.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from smidgen import noise
from smidgen.directions import Masked, Probe
from smidgen.objective import Objective
from smidgen.optim import _masks
from smidgen.optim._optimizer import Outcome
from smidgen.optim._values import ScaledConfig, ValueOptimizer, suggested
from smidgen.params import ParamView

status = "experimental"

_MEZO: dict[str, Any] = {"distribution": "gaussian", "normalise": "none", "lr": 1e-6, "eps": 1e-3, "sides": 2, "queries": 1}

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2402.15751: a threshold for each layer from the pretrained weights, .5 to .8 works best; the rest is MeZO's.
    "sparse_mezo": {**_MEZO, "mask": "small", "group": "layer", "sparsity": 0.75},
    # ZO-Bench's sweep on SST-2 with OPT-1.3B, sparsity .1 to .9, as its public code runs it.
    "zo_bench": {**_MEZO, "mask": "random", "group": "global", "compat_normal_threshold": True},
}

SUGGESTED = suggested(normalise="rms")


class Config(ScaledConfig):
    """Options of sparse ZO-SGD: those of ZO-SGD, and the mask."""

    sparsity: float = Field(
        0.5, ge=0, lt=1, allow_inf_nan=False, description="share of the weights that stand still, s; 0: zo_sgd"
    )
    mask: Literal["random", "small", "large", "wanda"] = Field(
        "random", description="which weights move: random, small or large |w|, or wanda: large |w| times the norm of its input"
    )
    group: Literal["layer", "global"] = Field(
        "layer", description="layer: sparsity holds in every tensor; global: in all together, by magnitude"
    )
    resample: int = Field(1, ge=1, description="random: steps for which a mask is kept")
    compat_normal_threshold: bool = Field(
        False,
        description="reproduces ZO-Bench's public code, on which its published sparsities depend: a weight stays where a "
        "normal sample is below s, so s = 0.1 leaves out 54 % and s = 0 half",
    )

    @model_validator(mode="after")
    def _belong_to_random(self) -> Config:
        for name in ("resample", "compat_normal_threshold"):
            if self.mask != "random" and getattr(self, name) != Config.model_fields[name].default:
                raise ValueError(f"{name}: {getattr(self, name)} needs mask: random; mask: {self.mask} is made once, by rank")
        return self


class _Sparse:
    """An objective that is asked about dense directions and sees them through masks."""

    def __init__(self, inner: Objective, masks: Mapping[str, noise.Keep]):
        self.inner, self.masks = inner, masks
        self.key: Hashable = inner.key

    def masked(self, probe: Probe) -> Probe:
        return [(Masked(z, self.masks), s) for z, s in probe]  # type: ignore[arg-type]

    def losses(self, probes: Sequence[Probe], *, each: bool = False) -> Tensor:
        return self.inner.losses([self.masked(probe) for probe in probes], each=each)


class ZOSparse(ValueOptimizer):
    """Sparse ZO-SGD over any tensors. See the module for the update."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))
        self.zeros: dict[str, float] = {}  # random: probability to stay, by tensor

    def _step(self, objective: Objective) -> Outcome:
        cfg = self.config
        if cfg.sparsity == 0.0 and not cfg.compat_normal_threshold:
            g = self.estimate(objective)
            if not g.dead:
                self.move_(g.along)
            return g.outcome()
        masks = self._drawn() if cfg.mask == "random" else self._ranked(objective)
        if masks is None:
            return Outcome(loss=torch.nan, written=False, voided=cfg.queries)
        sparse = _Sparse(objective, masks)
        g = self.estimate(sparse)  # type: ignore[arg-type]
        if not g.dead:
            self.move_(lambda scale: sparse.masked(g.along(scale)))
        return g.outcome()

    def _drawn(self) -> dict[str, noise.Keep]:
        """Random masks of this step."""
        cfg = self.config
        if self.t == 0:
            shares = _masks.shares_below(list(self.view), cfg.sparsity) if cfg.group == "global" else {}
            for entry in self.view:
                share = shares.get(entry.name, cfg.sparsity)
                self.zeros[entry.name] = _normal_cdf(share) if cfg.compat_normal_threshold else share
        drawn = self.t - self.t % cfg.resample
        return {
            e.name: noise.Drawn.share(noise.Address(cfg.seed, e.id, drawn, 0, noise.MASK), 1.0 - self.zeros[e.name])
            for e in self.view
        }

    def _ranked(self, objective: Objective) -> dict[str, noise.Keep] | None:
        """The masks that are made once; None when the inputs that they need are not finite."""
        if self.t == 0 or any("mask" not in self.state[e.tensor] for e in self.view):
            made = self._rank(objective)
            if made is None:
                return None
            for entry in self.view:
                self.state[entry.tensor]["mask"] = made[entry.name]
        return {e.name: self.state[e.tensor]["mask"] for e in self.view}

    def _rank(self, objective: Objective) -> dict[str, Tensor] | None:
        cfg, keep = self.config, 1.0 - self.config.sparsity
        squares: dict[str, Tensor] = {}
        if cfg.mask == "wanda":
            squares = objective.input_squares([e.name for e in self.view if e.tensor.ndim == 2])
            if not all(bool(s.isfinite().all()) for s in squares.values()):
                return None
        made = {n: _masks.by_wanda(self.view[n], keep, s) for n, s in squares.items()}
        others = [e for e in self.view if e.name not in made]
        for group in [others] if cfg.group == "global" else [[e] for e in others]:
            made |= _masks.by_magnitude(group, keep, largest=cfg.mask != "small")
        return made

    def _scalars(self) -> dict[str, Any]:
        return {**super()._scalars(), "zeros": dict(self.zeros)}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        self.zeros = dict(scalars.pop("zeros"))
        super()._load_scalars(scalars)

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """One bit a weight for masks that are not drawn."""
        if config.mask == "random" or config.sparsity == 0.0:
            return 0
        return sum(-(-math.prod(shape) // 8) for shape, _ in shapes.values())


def _normal_cdf(x: float) -> float:
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


build = ZOSparse
