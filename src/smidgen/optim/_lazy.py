"""Shared by methods whose steps are low-rank: a subspace that is kept for some steps, left factors that accumulate in it.

For a matrix W [m, n], with a right factor V [n, r] drawn every `interval` steps and left factors A_t [m, r] of the steps:

    theta = W + L V^T;  L <- L - lr * (the method's combination of A_t)

W is written at a refresh only: it takes up L V^T, and L starts anew (subzero sums a core between two bases in the same way).
The probes of a step, W + (L +- eps A_t) V^T, are evaluated in one batched forward as thin products beside the frozen one
(`smidgen.batched`). Tensors that are no matrices are displaced by dense noise and written in every step. Weight decay
multiplies W and L at once and costs a pass over the weights.

State: L, 4 r bytes a row of each matrix. Direction: `smidgen.lowrank.LowRank`, with entries of unit variance.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from smidgen.config import ConfigError
from smidgen.directions import Dense, Distribution, Probe
from smidgen.lowrank import Accumulated, Factored, LowRank, is_matrix, matrices, rank_of
from smidgen.objective import Objective
from smidgen.optim._values import Estimate, ScaledConfig, ValueOptimizer


class LazyConfig(ScaledConfig):
    """Options of a subspace that is kept, beside those of the estimate."""

    sides: Literal[1, 2] = Field(  # type: ignore[assignment]
        2, description="2: central difference; 1: forward difference with one shared base"
    )
    distribution: Distribution = Field("gaussian", description="entries of the factors: gaussian, or rademacher (+-1)")
    usual_rank: ClassVar[int] = 2  # where rank is left open
    rank: int = Field(2, ge=1, description="rank r of a direction; in a smaller matrix its smaller side")
    interval: int = Field(50, ge=1, description="steps for which the right factors are kept, nu")


def rank_in(config: LazyConfig) -> int:
    """The rank that was asked for, or the method's usual one."""
    return config.usual_rank if config.rank is None else config.rank  # type: ignore[redundant-expr]


class Shaped:
    """An objective that is asked about dense directions around theta and sees low-rank ones around weights and offset."""

    def __init__(self, inner: Objective, method: LazyOptimizer):
        self.inner, self.method = inner, method
        self.key: Hashable = inner.key

    def losses(self, probes: Sequence[Probe], *, each: bool = False) -> Tensor:
        offset = self.method.offset()
        shaped = {id(z): self.method.shaped(z) for probe in probes for z, _ in probe}  # type: ignore[arg-type]
        return self.inner.losses([(*offset, *((shaped[id(z)], s) for z, s in probe)) for probe in probes], each=each)


class LazyOptimizer(ValueOptimizer):
    """Base of these methods. A subclass writes `_step`, from `shaped_estimate`, `descend_`, `pull_` and `refresh_`.

    A rank that no matrix has is refused where it was asked for. `views` are the shapes of which a rank can be asked.
    """

    lazy: ClassVar[bool] = True

    def __init__(self, params: Any, config: LazyConfig):
        super().__init__(params, config)
        self.rank = rank_in(config)
        self.shapes = matrices(self.view)
        self.views = {name: self.viewed(shape, config) for name, shape in self.shapes.items()}
        self.device = next(iter(self.view)).tensor.device
        self.subspace = 0  # step at which V was drawn
        widest = max((min(shape) for shape in self.views.values()), default=0)
        if not widest:
            raise ConfigError("no tuned tensor is a matrix: take zo_sgd, or another scheme")
        if config.rank is not None and config.rank > widest:
            raise ConfigError(
                f"rank = {config.rank}, and the tuned matrices have at most {widest} rows or columns: take a smaller rank"
            )

    @staticmethod
    def viewed(shape: tuple[int, int], config: Any) -> tuple[int, int]:
        """The shape as which a matrix is seen."""
        return shape

    def shaped(self, z: Dense) -> Factored:
        """The low-rank direction at the address of a dense one."""
        rank, subspace = self.rank, self.subspace
        return LowRank(z.seed, z.step, z.query, z.ids, self.shapes, rank, subspace, self.device, z.distribution)

    def subspace_of(self, step: int) -> LowRank:
        """A direction whose right factors are those drawn at a step."""
        cfg = self.config
        return LowRank(cfg.seed, 0, 0, self.view.ids, self.shapes, self.rank, step, self.device, cfg.distribution)

    def offset(self) -> Probe:
        """L V^T, what the matrices have moved since the last refresh."""
        held = self.held("left")
        return [(Accumulated(held, self.subspace_of(self.subspace)), 1.0)] if held else ()

    def held(self, key: str) -> dict[str, Tensor]:
        """State of the matrices that have it."""
        return {n: s[key] for n in self.shapes if key in (s := self.state[self.view[n].tensor])}

    def shaped_estimate(self, objective: Objective) -> Estimate:
        """The estimate along low-rank directions at theta."""
        return self.estimate(Shaped(objective, self))  # type: ignore[arg-type]

    def left(self, name: str, key: str = "left") -> Tensor:
        """A left factor of a matrix that is held as state, [m, r] float32; zero at first."""
        tensor = self.view[name].tensor
        state = self.state[tensor]
        if key not in state:
            state[key] = torch.zeros(self.held_shape(name), device=self.device)  # where factors are drawn
        return state[key]

    def held_shape(self, name: str) -> tuple[int, int]:
        """Shape of what a matrix accumulates."""
        shape = self.shapes[name]
        return shape[0], rank_of(shape, self.rank)

    def coordinates(self, z: Factored, names: Sequence[str]) -> list[Tensor]:
        """What a direction adds to what accumulates in some matrices, A_t."""
        return z.lefts(names) if type(z) is LowRank else [z.left(name) for name in names]

    def pull_(self, names: Sequence[str], g: Estimate, scale: float, onto: Sequence[Tensor]) -> None:
        """onto += scale * (1/q) sum_i c_i A_i, for some matrices."""
        for z, weight in g.along(scale) if names else ():
            torch._foreach_add_(list(onto), self.coordinates(self.shaped(z), names), alpha=weight)  # type: ignore[arg-type]

    def descend_(self, g: Estimate) -> None:
        """theta <- decay * theta - lr * g_hat, then the refresh if it is due."""
        cfg = self.config
        self.decay_()
        for lr, held, rest in self.groups_of():
            self.view.apply_(g.along(-lr), names=rest, at=self.rounding_address(cfg.seed), rounding=cfg.rounding)
            self.pull_(held, g, -lr, [self.left(name) for name in held])
        self.refresh_()

    def decay_(self) -> None:
        """Theta of all tensors times 1 - lr * weight_decay, of those with two axes or more."""
        cfg, at = self.config, self.rounding_address(self.config.seed)
        for group in self.param_groups:
            factors = self.decay(group, cfg.weight_decay)
            if isinstance(factors, float):
                continue
            self.view.apply_((), decay=factors, names=self.names_of(group), at=at, rounding=cfg.rounding)
            for name in (n for n in self.names_of(group) if n in self.shapes):
                self.left(name).mul_(factors[name])

    def groups_of(self) -> list[tuple[float, list[str], list[str]]]:
        """(rate, matrices, other tensors) of each parameter group."""
        found = []
        for group in self.param_groups:
            names = self.names_of(group)
            found.append((group["lr"], [n for n in names if n in self.shapes], [n for n in names if n not in self.shapes]))
        return found

    def refresh_(self) -> bool:
        """At the end of an interval: merge, and let the next step draw a new subspace. Called after a good step only."""
        if self.t + 1 - self.subspace < self.config.interval:
            return False
        self.merge_()
        self.subspace = self.t + 1
        return True

    def merge_(self) -> None:
        """Write L V^T into the matrices and start L anew. Theta stays what it is, up to one rounding of 16-bit weights."""
        cfg, offset = self.config, self.offset()
        if offset:
            self.view.apply_(offset, names=list(self.shapes), at=self.rounding_address(cfg.seed), rounding=cfg.rounding)
            for name in self.shapes:
                self.left(name).zero_()

    def _scalars(self) -> dict[str, Any]:
        return {**super()._scalars(), "subspace": self.subspace}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        self.subspace = scalars.pop("subspace")
        super()._load_scalars(scalars)

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: LazyConfig) -> int:
        """The left factors, float32."""
        rank = rank_in(config)
        return sum(4 * rank_of(shape, rank) * shape[0] for shape, _ in shapes.values() if is_matrix(shape))
