"""ZO-SGD with momentum (ZO-SGD-MMT): heavy-ball descent along forward-only gradient estimates.

Source: the ZO-Bench study's ZO-SGD-MMT (Zhang et al., "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM
Fine-Tuning", 2024, arXiv 2402.11592), which is torch's SGD fed with the estimate of zo_sgd:

    v <- mu v + g_hat;  theta <- theta - lr * v        no dampening, no Nesterov; the first step has v = g_hat

There is no factor 1 - mu, so the effective rate is lr / (1 - mu): grids lie one decade below those of zo_sgd.
With `memory: K` nothing is stored but K steps' scalars: v is summed anew from the regenerated directions of the last K
steps, v = sum_k mu^k g_hat_(t-k), k < K, which leaves out a share mu^K of the geometric sum.

Cost: forwards of zo_sgd; one pass over weights and v. State: v, 4 bytes a weight (the study keeps v in the dtype of the
weights, where 16 bits lose small terms); none with `memory`, which generates K q noise values a weight instead of q.
A step without a finite loss leaves v as it is. It does not: Nesterov's variant, bias correction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from smidgen import noise
from smidgen.directions import Dense, Probe
from smidgen.objective import Objective
from smidgen.optim._optimizer import Outcome
from smidgen.optim._values import Estimate, ScaledConfig, ValueOptimizer, suggested
from smidgen.params import ParamView

status = "experimental"

PRESETS: dict[str, dict[str, Any]] = {  # lr: of the study's grid, 1e-5 .. 1e-8
    "zo_bench": {"distribution": "gaussian", "normalise": "none", "lr": 1e-7, "eps": 1e-3, "momentum": 0.9},
}

SUGGESTED = suggested(0.1, normalise="rms")


class Config(ScaledConfig):
    """Options of ZO-SGD with momentum; the study's, except the noise."""

    lr: float = Field(1e-7, gt=0, description="learning rate; v is about 1 / (1 - momentum) times the size of one estimate")
    momentum: float = Field(0.9, ge=0, lt=1, description="mu")
    memory: int = Field(0, ge=0, description="0: store v; K: no tensor state, v is regenerated from the last K steps")


class ZOMomentum(ValueOptimizer):
    """ZO-SGD with momentum over any tensors."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))
        self.past: list[tuple[int, list[tuple[int, float]]]] = []  # newest first: step, its queries and their c / q

    def _step(self, objective: Objective) -> Outcome:
        cfg = self.config
        g = self.estimate(objective)
        if g.dead:
            return g.outcome()
        if cfg.memory:
            kept = [(z.query, c) for z, c in g.along(1.0)]  # type: ignore[attr-defined]
            self.past = [(self.t, kept), *self.past][: cfg.memory]
            self.move_(partial(self._regenerated, g.Z[0]))
        else:
            self.rewrite_(partial(self._update, g))
        return g.outcome()

    def _update(self, g: Estimate, name: str, lr: float, span: slice, w: Tensor, _: Tensor) -> None:
        """v <- mu v + g_hat;  w <- w - lr * v, for one block."""
        v = self._v(name).view(-1)[span]
        noise.update_(v, g.terms(name), g.Z[0].distribution, decay=self.config.momentum, at=_UNUSED, start=span.start)
        w.add_(v, alpha=-lr)

    def _v(self, name: str) -> Tensor:
        tensor = self.view[name].tensor
        state = self.state[tensor]
        if not state:
            state["momentum_buffer"] = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
        return state["momentum_buffer"]

    def _regenerated(self, like: Dense, scale: float) -> Probe:
        """scale * v as a sum over the last steps' directions."""
        mu = self.config.momentum
        steps = ((t, scale * mu**k, queries) for k, (t, queries) in enumerate(self.past))
        return [(replace(like, step=t, query=i), s * c) for t, s, queries in steps for i, c in queries]

    def _scalars(self) -> dict[str, Any]:
        return {**super()._scalars(), "past": self.past}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        super()._load_scalars(scalars)
        self.past = scalars["past"]

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """One float32 number a weight; none with memory."""
        return 0 if config.memory else sum(4 * prod(shape) for shape, _ in shapes.values())


_UNUSED = noise.Address(0, 0, 0, 0, noise.ROUND)  # float32 state is not rounded

build = ZOMomentum
