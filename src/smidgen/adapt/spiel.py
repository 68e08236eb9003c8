"""SpIEL: sparse fine-tuning whose positions move. Of each matrix k entries are tuned; now and then those that moved least
are dropped and others grow in their place.

Source: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", 2024 (arXiv 2401.16405), and its public code
(AlanAnsell/peft at 73b455b). Of each matrix W, with positions eta and deltas delta:

    update   delta <- optimizer(grad at eta);  W_eta = W0_eta + delta
    drop     the p k entries of the smallest |delta|
    grow AG  of the candidates (the largest |dW| of a phase's first update), those of the largest |sum of gradients| over
             the phase; Adam's moments of a new entry are what they were had it been tuned during the phase
    grow MA  those of the largest R_r C_c, SM3's accumulators of row r and column c
    grow none: a fixed random support; any method

A new entry starts at delta = 0 and a dropped one leaves the base's own bits. When and how many: `_reselection`; the deltas
are swapped into the weight (`_sparse`), their gradient never needs a dense dW (`_sparse_gradient`).

Methods: AG needs sparse_adamw (or sm3, whose state takes no seeds), MA needs sm3.
Bytes a tuned entry: delta 4, position 2, the base's value 2 to 4 (none where it is quantised), the method's state
(sparse_adamw: 9; 5 in bfloat16, 3 in 8 bits; sm3: none), and 4 to 8 a row and column of the matrix; during a step its
gradient, 4; AG holds 16 more a candidate while a phase is open.

Not as the public code, unless the compat options say so: gradient statistics are of whole updates in float32 (not of
micro-batches, divided by their number, in the gradient's dtype), the age of seeds counts right, every phase takes as many
updates as the first, density is that of the adapted matrices. On a base quantised by bitsandbytes (qSpIEL) the deltas are
added to the dequantised temporary, in the dtype of its input. It does not: move budget between matrices, tune output heads
or embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from smidgen import noise
from smidgen.adapt import _deltas, _sparse_targets
from smidgen.adapt._growing import Growing
from smidgen.adapt._reselection import Reselection, Schedule
from smidgen.adapt._support import random_support
from smidgen.config import ConfigError

status = "experimental"

EXPORTS, REFUSED = _deltas.EXPORTS, _deltas.REFUSED


class Config(_deltas.DeltaConfig):
    """Options of SpIEL; defaults are the paper's where they have one."""

    growth: Literal["ag", "ma", "none"] = Field(
        "ag", description="what grows: accumulated gradients, SM3's accumulators, or nothing (a fixed random support)"
    )
    every: int = Field(20, ge=2, description="updates from one selection to the next, S")
    collect: int = Field(5, ge=1, description="updates of a phase of collecting gradients, gamma; less than every")
    rate: float = Field(0.2, gt=0, le=1, description="share of the deltas that is replaced at the start, r0")
    schedule: Literal["linear", "cosine"] = Field("linear", description="how the share falls to zero over the run")
    first: Literal["auto", "all", "rate"] = Field(
        "auto", description="share replaced at the first selection: all or the schedule's; auto: all if linear, as published"
    )
    candidates: float = Field(
        2.0, ge=1, description="entries that a phase watches for each that is replaced; at most k; chosen"
    )
    compat_density: bool = Field(False, description="as the public code: density counts all parameters of the model")
    compat_phases: bool = Field(False, description="as the public code: phases after the first take one update more")
    compat_collect: bool = Field(
        False,
        description="as the public code: k candidates from one micro-batch, sums over micro-batches in 16 bits, age one short",
    )


class SpIEL(Growing):
    """A model with sparse deltas in its matrices; a new head is tuned whole beside them."""

    scheme = "spiel"

    def __init__(self, model: nn.Module, config: Config, seed: int, fresh: Sequence[str]):
        if config.collect >= config.every:
            raise ConfigError(
                f"scheme_args.collect = {config.collect} must be less than every = {config.every}: a phase ends before the "
                "next begins"
            )
        super().__init__(model, config, seed, fresh)
        first = config.first if config.first != "auto" else {"linear": "all", "cosine": "rate"}[config.schedule]
        schedule = Schedule(config.every, config.collect, config.rate, config.schedule, first, config.compat_phases)
        self.growing = None
        if config.growth != "none":
            self.growing = Reselection(self.sites, self.view, schedule, config.growth, config.candidates, config.compat_collect)

    def _counts(self, modules: dict[str, Any]) -> dict[str, int]:
        config = self.config
        return _sparse_targets.budget(self.model, modules, config.density, config.rank, config.compat_density)

    def _support(self, address: noise.Address, module: Any, count: int) -> Tensor:
        rows, columns = _sparse_targets.shape(module)
        return random_support(address, rows * columns, count)

    def _fixed(self) -> str:
        return "a fixed random support with scheme_args.growth=none"


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> SpIEL:
    """Freeze `model` and put sparse deltas into its matrices, at random positions addressed by `seed`.

    Raises ConfigError for layers that are not there or not supported, and for more deltas than entries.
    """
    return SpIEL(model, config, seed, fresh)
