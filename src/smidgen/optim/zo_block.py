"""Block-wise ZO-SGD: each block of the model is probed and moved along its own direction, from the top down.

Source: module_wise_perturbation of ZO-Bench (Zhang et al., "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM
Fine-Tuning", 2024, arXiv 2402.11592). For b = B..1, with z_b zero outside block b:

    c_b = [L(theta + eps z_b) - L(theta - eps z_b)] / (2 eps)          one-sided: [L(theta + eps z_b) - L(theta)] / eps
    theta_b <- theta_b - lr * c_b z_b,  weights with two axes or more first decayed by 1 - lr * weight_decay

sequential (Gauss-Seidel): at once, so lower blocks are probed with the upper ones moved; joint (Jacobi): after all
estimates. The variance of c_b z_b grows with the size of the block instead of the model's, for B times the forwards.

Cost: a sweep, which is one step, takes 2 q B forwards (one-sided: (q + 1) B, joint q B + 1), of which the layers below
the block are not run again: about half of the work, for one batch x length x width of hidden states a block held
during the sweep (`smidgen.reuse`). One pass over the weights. State: none (two numbers a block with normalise: rms).
It does not: momentum, other orders, choose blocks by their gain. An exception in mid-sweep leaves the upper blocks moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from smidgen.directions import Dense
from smidgen.objective import Objective
from smidgen.optim._groups import Level, groups
from smidgen.optim._optimizer import Optimizer, Outcome
from smidgen.optim._values import Estimate, RunningRMS, ScaledConfig, differences, suggested, warn_if_stuck
from smidgen.params import ParamView

status = "experimental"

SUGGESTED = suggested(normalise="rms")


class Config(ScaledConfig):
    """Options of block-wise ZO-SGD."""

    queries: int = Field(1, ge=1, description="directions per block and step, q")
    sides: Literal[1, 2] = Field(  # type: ignore[assignment]
        2, description="2: central difference; 1: forward difference; its base is shared by the queries of a block, or of all"
    )
    blocks: Level = Field(
        "layer",
        description="layer: a transformer block; module: its attention, its MLP; tensor: a single linear module; "
        "outside the layers every module is a block, and for layer all embeddings are one",
    )
    pattern: str | None = Field(
        None, description="regular expression: tensors in whose names it finds the same text are a block; the others: blocks"
    )
    update: Literal["sequential", "joint"] = Field(
        "sequential", description="sequential: a block moves before the next is probed; joint: all move after all estimates"
    )
    compat_shared_noise: bool = Field(
        False,
        description="reproduces the one seed a step that the public code restarts at each block, on which its published "
        "block-wise numbers depend: blocks of the same shapes move along the same z",
    )


class ZOBlock(Optimizer):
    """Block-wise ZO-SGD over any tensors. Raises ConfigError for a pattern that matches nothing."""

    uses: ClassVar[frozenset[str]] = frozenset({"losses"})

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))
        cfg = self.config
        self.blocks = [frozenset(g) for g in groups(list(self.view.entries), cfg.blocks, cfg.pattern)]
        self.rms = [RunningRMS() for _ in self.blocks]

    def directions(self, b: int) -> list[Dense]:
        """z of each query of block b: zero outside it, other noise than any other block's (or the same, as an option)."""
        cfg, block = self.config, self.blocks[b]
        names = [n for n in self.view.entries if n in block]
        ids = {n: i for i, n in enumerate(names)} if cfg.compat_shared_noise else {n: self.view[n].id for n in names}
        return [Dense(cfg.seed, self.t, i, ids, cfg.distribution, block) for i in range(cfg.queries)]

    def _step(self, objective: Objective) -> Outcome:
        cfg = self.config
        if self.t == 0:
            warn_if_stuck(self.view, cfg.eps)
        every = list(range(len(self.blocks)))
        done: list[Estimate] = []
        for together in [every] if cfg.update == "joint" else [[b] for b in every]:
            found = self._estimates(objective, together)
            for b, g in zip(together, found, strict=True):
                if not g.dead:
                    self._move(b, g)
            done += found
        live = [g for g in done if not g.dead]
        voided = sum(g.voided for g in done)
        if not live:
            return Outcome(loss=torch.nan, written=False, voided=voided)
        measures = {"zo/projected_grad": sum(g.slope for g in live) / len(live)}
        return Outcome(sum(g.loss for g in live) / len(live), written=True, voided=voided, measures=measures)

    def _estimates(self, objective: Objective, together: list[int]) -> list[Estimate]:
        """Estimates of some blocks at one theta."""
        cfg = self.config
        Z = [self.directions(b) for b in together]
        shape = (len(together), cfg.queries)
        c, base = (x.view(shape) for x in differences(objective, [z for block in Z for z in block], cfg.eps, cfg.sides))
        rms = [self.rms[b] if cfg.normalise == "rms" else None for b in together]
        return [Estimate.of(*parts) for parts in zip(Z, c, base, rms, strict=True)]

    def _move(self, b: int, g: Estimate) -> None:
        cfg, at = self.config, self.rounding_address(self.config.seed)
        for group in self.param_groups:
            names = [n for n in self.names_of(group) if n in self.blocks[b]]
            decay = self.decay(group, cfg.weight_decay)
            self.view.apply_(g.along(-group["lr"]), decay=decay, names=names, at=at, rounding=cfg.rounding)

    def _scalars(self) -> dict[str, Any]:
        return {"mean_squares": [r.mean_square for r in self.rms], "counts": [r.count for r in self.rms]}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        for rms, mean_square, count in zip(self.rms, scalars["mean_squares"], scalars["counts"], strict=True):
            rms.mean_square, rms.count = mean_square, count

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """No tensor is held."""
        return 0


build = ZOBlock
