"""SubZero: forward-only descent inside random subspaces between orthonormal bases.

Source: Yu, Zhou, Wang, Pan, Tian, Hu, "Zeroth-Order Fine-Tuning of LLMs in Random Subspaces", 2024 (arXiv 2410.08989). For
a matrix W, viewed as [a, b], with U [a, r] and V [b, r] drawn by QR every `interval` steps and Z [r, r] every step:

    D = sqrt(a b) / r * U Z V^T;  c = [L(W + eps D) - L(W - eps D)] / (2 eps);  W <- W - lr * c * D

E |D|^2 = a b as for dense noise, so lr and eps of MeZO carry over. Tensors that are no matrices move as in zo_sgd. The steps
of an interval are summed in a core C [r, r], and W is written at a refresh only (`_lazy`, `smidgen.subspace`).

Cost: 2q forwards; no pass over the matrices but at a refresh, whose QR costs about 4 r^2 (a + b) operations. State, float32:
U, V and C, 4 r (a + b + r) bytes a matrix. Narrow matrices (LoRA's factors, prompts) are folded to nearly squares, where the
paper folds all tensors of LoRA, prefix and prompt and none of full tuning. Deviations: QR in float64 with the signs that make
bases uniform, while the public code rounds them to the weights' dtype. It does not: momentum, Adam on the core (SubZero+).
Raises ConfigError where no tuned tensor is a matrix, or where a rank is asked for that none has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from smidgen import noise
from smidgen.directions import Dense, Probe
from smidgen.lowrank import Factored, is_matrix, rank_of, sides
from smidgen.objective import Objective
from smidgen.optim._lazy import LazyConfig, LazyOptimizer, rank_in
from smidgen.optim._optimizer import Outcome
from smidgen.optim._values import suggested
from smidgen.params import ParamView
from smidgen.subspace import LEFT, RIGHT, Bases, Between, Cores, folded, orthonormal

status = "experimental"

_GAUSS = {"distribution": "gaussian", "normalise": "none"}
PRESETS: dict[str, dict[str, Any]] = {
    "subzero": {**_GAUSS, "lr": 1e-6, "eps": 1e-3, "rank": 8, "interval": 1000},  # full tuning: lr and eps are MeZO's
    "subzero-prompt": {**_GAUSS, "lr": 1e-3, "eps": 1e-2, "rank": 24, "interval": 1000},  # README's run: OPT-1.3B, SST-2
}

SUGGESTED = suggested(normalise="rms")


class Config(LazyConfig):
    """Options of SubZero. Defaults are the paper's."""

    usual_rank: ClassVar[int] = 8
    rank: int | None = Field(  # type: ignore[assignment]
        None, ge=1, description="rank r of a direction; none: 8; in a smaller matrix its smaller side"
    )
    interval: int = Field(1000, ge=1, description="steps for which the bases are kept, F")
    reshape: Literal["narrow", "never"] = Field(
        "narrow", description="narrow: view a matrix whose smaller side is below the root of the larger as nearly a square"
    )


class SubZero(LazyOptimizer):
    """SubZero over any tensors. See the module for the update."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))
        self._bases: Bases | None = None  # those in the state

    def _step(self, objective: Objective) -> Outcome:
        g = self.shaped_estimate(objective)
        if not g.dead:
            self.descend_(g)
        return g.outcome()

    @staticmethod
    def viewed(shape: tuple[int, int], config: Any) -> tuple[int, int]:
        return folded(shape) if config.reshape == "narrow" else shape

    def shaped(self, z: Dense) -> Between:
        return Between(z.seed, z.step, z.query, z.ids, self.bases(), z.distribution)

    def offset(self) -> Probe:
        """U C V^T, what the matrices have moved since the last refresh."""
        cores = self.held("left")
        return [(Cores(cores, self.bases()), 1.0)] if cores else ()

    def held_shape(self, name: str) -> tuple[int, int]:
        rank = rank_of(self.views[name], self.rank)
        return rank, rank

    def coordinates(self, z: Factored, names: Sequence[str]) -> list[Tensor]:
        assert isinstance(z, Between)
        return [z.core(name) for name in names]

    def bases(self) -> Bases:
        """U and V of this subspace, held as state; drawn where they are not there yet."""
        if self._bases is None:
            for name in self.shapes:
                state = self.state[self.view[name].tensor]
                if "U" not in state:
                    state["U"], state["V"] = self._drawn(name)
            key = self.config.seed, self.subspace
            self._bases = Bases(self.shapes, self.views, self.held("U"), self.held("V"), key)
        return self._bases

    def _drawn(self, name: str) -> tuple[Tensor, Tensor]:
        entry, (a, b) = self.view[name], self.views[name]
        rank, device = rank_of((a, b), self.rank), entry.tensor.device
        left, right = (
            noise.Address(self.config.seed, entry.id, self.subspace, query, noise.SUBSPACE) for query in (LEFT, RIGHT)
        )
        return orthonormal(left, a, rank, device), orthonormal(right, b, rank, device)

    def refresh_(self) -> bool:
        """As `_lazy`'s; the next step draws new bases."""
        fresh = super().refresh_()
        if fresh:
            for name in self.shapes:
                state = self.state[self.view[name].tensor]
                state["U"], state["V"] = self._drawn(name)
            self._bases = None
        return fresh

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        super()._load_scalars(scalars)
        self._bases = None

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: LazyConfig) -> int:
        """U, V and C of the matrices, float32."""
        total = 0
        for shape in (sides(shape) for shape, _ in shapes.values() if is_matrix(shape)):
            a, b = SubZero.viewed(shape, config)
            rank = rank_of((a, b), rank_in(config))
            total += 4 * rank * (a + b + rank)
        return total


build = SubZero
