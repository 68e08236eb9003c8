"""Evolution strategy: an antithetic population of low-rank members, weighted by their shaped fitness.

Source: Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", 2017 (arXiv
1703.03864), with low-rank members as in EGGROLL (2025, arXiv 2511.16652). With N = `queries` pairs of members theta +- eps D_i:

    l_i+ = L(theta + eps D_i),  l_i- = L(theta - eps D_i);  s = shape(all 2N losses)
    G = 1/N sum_i (s_i+ - s_i-) / 2 * D_i;  theta <- theta - lr * step(G)

shape: `zscore` (l - mean) / standard deviation, over the members; `rank`: ranks from -1/2 to 1/2. Either makes the step
independent of the scale of the loss. With `relative` shaping is done for each example (each prompt of a reward) and then
averaged, so that an example whose loss is always large weighs no more than the others. step: `sgd`, `momentum` (v <- b v + G)
or `adam`, on the left factors inside one subspace: state starts anew at a refresh, as the coordinates are others.

All members share one forward and one product with the frozen weights (`_lazy`, `smidgen.batched`). Cost: 2N forwards.
State: the left factor, and one (momentum) or two (adam) of its size; as much for tensors that are no matrices. A member
without a finite loss ranks last with `rank`; with `zscore` its pair is left out. It does not: mutation of eps, elites, reuse
of old members.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from smidgen.directions import Dense
from smidgen.lowrank import is_matrix
from smidgen.objective import Objective
from smidgen.optim._lazy import LazyConfig, LazyOptimizer, Shaped
from smidgen.optim._optimizer import Outcome
from smidgen.optim._values import Estimate, suggested, warn_if_stuck
from smidgen.params import ParamView

status = "experimental"

SUGGESTED = suggested(rank=1, queries=8)

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # Adam's own


class Config(LazyConfig):
    """Options of the evolution strategy."""

    lr: float = Field(
        1e-4, gt=0, description="learning rate, about sqrt(queries) times the change of a weight in one step of sgd"
    )
    sides: Literal[2] = Field(2, description="antithetic: every member has its mirror image")  # type: ignore[assignment]
    normalise: Literal["none"] = Field("none", description="fitness is shaped, see `shape`")  # type: ignore[assignment]
    queries: int = Field(8, ge=1, description="pairs of members, N: the population is twice as large")
    rank: int = Field(1, ge=1, description="rank r of a member; in a smaller matrix its smaller side")
    shape: Literal["zscore", "rank"] = Field("zscore", description="fitness: z-scored losses, or ranks from -1/2 to 1/2")
    relative: bool = Field(False, description="shape the losses of each example apart, then average")
    step: Literal["sgd", "momentum", "adam"] = Field("sgd", description="what is done with the estimate inside a subspace")
    momentum: float = Field(0.9, ge=0, lt=1, description="b of step: momentum")


class ES(LazyOptimizer):
    """The evolution strategy over any tensors. Raises ConfigError where no tuned tensor is a matrix."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))
        self.steps = 0  # of this subspace

    def _step(self, objective: Objective) -> Outcome:
        cfg = self.config
        if self.t == 0:
            warn_if_stuck(self.view, cfg.eps)
        Z = [Dense(cfg.seed, self.t, i, self.view.ids, cfg.distribution) for i in range(cfg.queries)]
        probes = [((z, s * cfg.eps),) for z in Z for s in (1, -1)]
        L = Shaped(objective, self).losses(probes, each=cfg.relative).view(2 * cfg.queries, -1)  # [2N, rows or 1]
        means = L.mean(1).view(-1, 2)
        c = shaped(L, cfg.shape).view(-1, 2)
        c = (c[:, 0] - c[:, 1]) / 2
        finite = L[L.isfinite()]
        g = Estimate.of(Z, c, means.mean(1), None)
        if g.dead or not finite.numel():
            return Outcome(loss=torch.nan, written=False, voided=cfg.queries)
        self.decay_()
        self.steps += 1
        for lr, held, rest in self.groups_of():
            gradients = [torch.zeros_like(self.left(name)) for name in held]
            self.pull_(held, g, 1.0, gradients)
            for name, G in zip(held, gradients, strict=True):
                self.left(name).add_(self._stepped(name, G), alpha=-lr)
            for name in rest:
                self._move(name, g, lr)
        if self.refresh_():
            self.steps = 0
            for name in self.view.entries:
                for key in ("first", "second"):
                    if key in (state := self.state[self.view[name].tensor]):
                        state[key].zero_()
        return replace(g, loss=float(finite.mean())).outcome(**{"zo/spread": float(finite.std())})

    def _stepped(self, name: str, G: Tensor) -> Tensor:
        """The direction of the step: G, its momentum, or Adam's."""
        cfg, state = self.config, self.state[self.view[name].tensor]
        if cfg.step == "sgd":
            return G
        first = state.setdefault("first", torch.zeros_like(G))
        if cfg.step == "momentum":
            return first.mul_(cfg.momentum).add_(G)
        second = state.setdefault("second", torch.zeros_like(G))
        first.lerp_(G, 1.0 - _BETAS[0])
        second.lerp_(G * G, 1.0 - _BETAS[1])
        corrected = first / (1.0 - _BETAS[0] ** self.steps)
        return corrected / ((second / (1.0 - _BETAS[1] ** self.steps)).sqrt() + _EPSILON)

    def _move(self, name: str, g: Estimate, lr: float) -> None:
        """The same step for a tensor that is no matrix, along dense noise."""
        cfg, entry = self.config, self.view[name]
        G = torch.zeros(entry.tensor.shape, device=entry.tensor.device)
        g.add_(name, 0, G)
        step = self._stepped(name, G)

        def descend(w: Tensor) -> None:
            w.add_(step, alpha=-lr)

        self.view.edit_(name, descend, at=self.rounding_address(cfg.seed), rounding=cfg.rounding)

    def _scalars(self) -> dict[str, Any]:
        return {**super()._scalars(), "steps": self.steps}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        self.steps = scalars.pop("steps")
        super()._load_scalars(scalars)

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Any) -> int:
        """The left factors, and the step's state of all tensors; float32."""
        held = LazyOptimizer.state_bytes(shapes, config)
        copies = {"sgd": 0, "momentum": 1, "adam": 2}[config.step]
        return held + copies * (held + sum(4 * prod(shape) for shape, _ in shapes.values() if not is_matrix(shape)))


def shaped(losses: Tensor, shape: str) -> Tensor:
    """Fitness of the members, [2N], from losses [2N, examples]: smaller is better, means over the examples that count.

    zscore: NaN for a member without a finite loss, zero where all are equal. rank: ties share their mean rank.

    >>> shaped(torch.tensor([[3.0], [1.0], [2.0]]), "rank").tolist()
    [0.5, -0.5, 0.0]
    """
    if shape == "rank":
        losses = torch.where(losses.isfinite(), losses, torch.inf)
        below = (losses[:, None] > losses[None]).sum(1) + ((losses[:, None] == losses[None]).sum(1) - 1) / 2
        return (below / max(1, len(losses) - 1) - 0.5).mean(1)
    alive = losses.isfinite()
    count = alive.sum(0).clamp(min=1)
    known = torch.where(alive, losses, 0.0)
    centred = torch.where(alive, losses - known.sum(0) / count, 0.0)
    deviation = (centred.square().sum(0) / count).sqrt()
    scores = centred / torch.where(deviation > 0, deviation, 1.0)
    return torch.where(alive.all(1), scores.mean(1), torch.nan)


build = ES
