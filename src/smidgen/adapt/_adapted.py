"""What a scheme makes of a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict
from torch import nn

from smidgen.params import ParamView


class SchemeConfig(BaseModel):
    """Options of a scheme; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def positions(self) -> int:
        """Positions of the model's context that the scheme takes for itself."""
        return 0


class Adapted(Protocol):
    """A model with its tuned tensors chosen."""

    model: nn.Module
    view: ParamView
    fresh: Sequence[str]  # tuned tensors that are not in the base model

    def save(self, folder: Path) -> None:
        """Write what was tuned, in Hugging Face's format where there is one for it."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""

    def merged(self) -> nn.Module:
        """A plain model with the tuning merged in; the model itself where its own weights were tuned.

        Raises ConfigError with the reason where no plain model computes the same.
        """


@runtime_checkable
class Resting(Protocol):
    """An Adapted that is another model while it trains than when it is evaluated."""

    def resting(self) -> AbstractContextManager[None]:
        """Inside this context it is the latter."""


@runtime_checkable
class Moving(Protocol):
    """An Adapted whose tuned positions move while it trains; the trainer calls these (see `smidgen.moving`)."""

    def begin(self, optimizer: Any) -> None:
        """Before the first step. Raises ConfigError where the optimizer cannot follow."""

    def after_step(self, optimizer: Any, steps: int) -> None:
        """After each step of the optimizer, of `steps` in all."""

    def save_state(self, folder: Path) -> None:
        """What `save` writes, and all that a run needs to go on from here."""

    def load_state(self, folder: Path) -> None:
        """Read what `save_state` wrote."""
