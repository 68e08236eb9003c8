"""Shared by searches in small spaces: blocks, their spaces, one generation a step, the transcript that rebuilds them.

A step is one generation of one block's strategy; blocks take turns, from the lowest layer up. Candidates y_k are points of
the block's space (`smidgen.space`); what the weights hold is the point y. The step asks for

    L_k = L(theta + P (y_k - y)),  k = 1..population;  the strategy names the next point y';  theta <- theta + P (y' - y)

all candidates in one batched forward, with the layers below the block run once. A strategy sees only points and losses, so
it is never saved: a checkpoint holds the losses it was told, and loading asks and tells again. A candidate without a finite
loss ranks last; a generation without any is a bad step, which the strategy is not told.

A schedule of the rate scales the cloud: with rate f * lr candidates stand at y + f (y_k - y), as far as the strategy would
have sent them for f = 1. Cost: `population` forwards over the step's data; with init = hidden one more at the first step.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from smidgen import noise
from smidgen.config import ConfigError
from smidgen.objective import Objective
from smidgen.optim._groups import groups
from smidgen.optim._optimizer import MethodConfig, Optimizer, Outcome
from smidgen.params import ParamView, Rounding
from smidgen.space import Space, shares

Generation = Generator[np.ndarray, np.ndarray, None]  # yields points [k, d], is sent their losses [k], as often as it wants


class SearchConfig(MethodConfig):
    """Options of every search in a small space."""

    lr: float = Field(1.0, gt=0, description="first step size sigma, in coordinates of the space")
    order: Literal["layers", "all"] = Field(
        "layers", description="layers: a space for each layer, optimised in turn from the lowest up; all: one space"
    )
    dimension: int | None = Field(
        None, ge=1, description="coordinates d of a space; none: as many as its tensors have weights, at most 500"
    )
    init: Literal["hidden", "random"] = Field(
        "random", description="scale of the maps: hidden: by the hidden states that enter a layer; random: torch's default"
    )
    alpha: float = Field(1.0, gt=0, description="factor of the scale for init: hidden")
    compat_whole_dimension: bool = Field(
        False,
        description="reproduces the public code, which scales maps by the dimension of the space, not of the tensor's share",
    )
    population: int = Field(20, ge=4, description="candidates of a generation, each one forward over the step's data")
    budget: int = Field(8000, ge=1, description="forwards over the training batch; sets the steps where none are given")
    rounding: Rounding = Field("stochastic", description="rounding of updates to 16-bit weights")
    seed: int = Field(0, ge=0, description="run seed: addresses all noise")

    @model_validator(mode="after")
    def _one_generation(self) -> SearchConfig:
        if self.budget < self.population:
            raise ValueError(f"budget {self.budget} is smaller than one generation of {self.population} forwards: raise it")
        return self

    @property
    def steps(self) -> int:
        return self.budget // self.population


class Strategy(Protocol):
    """The search of one block."""

    y: np.ndarray  # the point that the weights hold [d]

    def generation(self, t: int, factor: float) -> Generation:
        """One generation at step t: changes the strategy only after the last losses were sent."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What it holds between generations."""


class SearchOptimizer(Optimizer):
    """Base of searches in small spaces. Subclasses write `strategy` and `held`, the numbers that it holds."""

    uses: ClassVar[frozenset[str]] = frozenset({"losses"})

    def __init__(self, params: ParamView | Iterable[Any], config: Any):
        super().__init__(params, config)
        self.blocks = blocks(list(self.view.entries), config.order)
        self.dims = [
            sum(shares(_sizes(self.view, block), config.dimension, block[0])) for block in self.blocks
        ]  # also refuses what does not fit
        self._stds: dict[str, float] | None = None
        self._spaces: dict[int, Space] = {}
        self._anew()

    def _anew(self) -> None:
        self.told: list[tuple[int, float, list[list[float]]]] = []  # step, factor, losses of each round; none: a bad step
        self.strategies = [self.strategy(d, self.view[block[0]].id) for d, block in zip(self.dims, self.blocks, strict=True)]
        for b in range(len(self.blocks)):
            self._hold(b)

    def strategy(self, d: int, address: int) -> Strategy:
        """A new search of d coordinates, whose noise has `address` as its tensor."""
        raise NotImplementedError

    def space(self, b: int) -> Space:
        """The space of block b."""
        if b not in self._spaces:
            cfg = self.config
            self._spaces[b] = Space(
                self.view, self.blocks[b], seed=cfg.seed, dimension=cfg.dimension, stds=self._stds, sigma=cfg.lr,
                alpha=cfg.alpha, whole=cfg.compat_whole_dimension,
            )  # fmt: skip
        return self._spaces[b]

    def _step(self, objective: Objective) -> Outcome:
        cfg, b = self.config, self.t % len(self.blocks)
        if cfg.init == "hidden" and self._stds is None:
            self._stds = objective.hidden_stds(list(self.view.entries))
        factor = self.param_groups[0]["lr"] / cfg.lr
        search = self.strategies[b]
        y, rounds = search.y.copy(), list[list[float]]()
        generation = search.generation(self.t, factor)
        points = next(generation, None)
        while points is not None:
            moved = self.space(b).displacements(points - y)
            losses = objective.losses([((z, 1.0),) for z in moved]).double().cpu()
            if not rounds and not bool(losses.isfinite().any()):
                generation.close()
                self.told.append((self.t, factor, []))
                return Outcome(loss=torch.nan, written=False, voided=len(losses))
            rounds.append(losses.tolist())
            points = _send(generation, losses)
        self.told.append((self.t, factor, rounds))
        if (search.y != y).any():
            (z,) = self.space(b).displacements((search.y - y)[None])
            self.view.apply_([(z, 1.0)], names=self.blocks[b], at=self.rounding_address(cfg.seed), rounding=cfg.rounding)
        self._hold(b)
        every = torch.tensor([x for values in rounds for x in values], dtype=torch.float64)
        live = every[every.isfinite()]
        measures = {"dfo/best": float(live.min()), "dfo/block": float(b)}
        return Outcome(float(live.mean()), written=True, voided=len(every) - len(live), measures=measures)

    def _hold(self, b: int) -> None:
        tensor = self.view[self.blocks[b][0]].tensor
        self.state[tensor].update(
            {key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in self.strategies[b].arrays().items()}
        )

    # -- state: the transcript, not the strategies --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The losses that were told, in place of what the strategies made of them."""
        return {**super().state_dict(), "state": {}}

    def _scalars(self) -> dict[str, Any]:
        return {"told": [[t, factor, rounds] for t, factor, rounds in self.told], "stds": self._stds}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        self._stds, self._spaces = scalars["stds"], {}
        self._anew()
        for t, factor, rounds in scalars["told"]:
            generation = self.strategies[t % len(self.blocks)].generation(t, factor)
            next(generation)
            for values in rounds:
                _send(generation, torch.tensor(values, dtype=torch.float64))
            self.told.append((t, factor, rounds))
        for b in range(len(self.blocks)):
            self._hold(b)

    @classmethod
    def numbers(cls, d: int, config: Any) -> int:
        """Float64 numbers that a strategy of d coordinates holds between generations."""
        raise NotImplementedError

    @classmethod
    def state_bytes(cls, shapes: Mapping[str, Any], config: Any) -> int:  # type: ignore[override]
        """What the strategies hold; beside it 8 bytes a forward made, the transcript."""
        sizes = {name: prod(shape) for name, (shape, _) in shapes.items()}
        dims = [
            sum(shares([sizes[name] for name in block], config.dimension, block[0]))
            for block in blocks(list(shapes), config.order)
        ]
        return 8 * sum(cls.numbers(d, config) for d in dims)


def blocks(names: Sequence[str], order: str) -> list[list[str]]:
    """The tensors of each space, from the lowest layer up, or all in one."""
    return [list(names)] if order == "all" else groups(names, "layer")[::-1]


def _sizes(view: ParamView, names: Sequence[str]) -> list[int]:
    """Weights of each tensor, or of each rectangle of one, that a space moves."""
    found = []
    for name in names:
        entry = view[name]
        found += [entry.storage[area].numel() for area in entry.areas] or [entry.tensor.numel()]
    return found


def _send(generation: Generation, losses: Tensor) -> np.ndarray | None:
    """The next points, or None when the generation is over."""
    try:
        return generation.send(losses.numpy())
    except StopIteration:
        return None


def ranked(losses: np.ndarray) -> np.ndarray:
    """The losses with those that are not finite put behind the worst.

    >>> ranked(np.array([2.0, np.nan, 1.0, np.inf])).tolist()
    [2.0, 3.0, 1.0, 3.0]
    """
    finite = np.isfinite(losses)
    worst = losses[finite].max() if finite.any() else 0.0
    return np.where(finite, losses, worst + max(1.0, abs(worst)) if abs(worst) > 1.0 else worst + 1.0)


def normals(seed: int, address: int, t: int, query: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float64 values, addressed."""
    out = torch.zeros(prod(shape))
    noise.accumulate_(out, [(noise.Address(seed, address, t, query, noise.PROBE), 1.0)], "gaussian")
    return out.double().numpy().reshape(shape)


def uniforms(seed: int, address: int, t: int, query: int, shape: Sequence[int]) -> np.ndarray:
    """Float64 values in (-1, 1), addressed, each with 32 random bits."""
    from smidgen.noise import philox

    count = prod(shape)
    words = philox.words(noise.Address(seed, address, t, query, noise.PROBE), torch.arange(-(-count // 4)))
    return ((words.flatten()[:count].double() + 0.5) / 2**31 - 1.0).numpy().reshape(shape)


def require_cma() -> Any:
    """The package `cma`. Raises ConfigError with the command that installs it."""
    try:
        import cma
    except ImportError:
        raise ConfigError("cma_es needs the package cma: pip install 'smidgen[dfo]'") from None
    return cma
