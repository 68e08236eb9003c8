"""What a scheme makes of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict
from torch import nn

from smidgen.params import ParamView


class SchemeConfig(BaseModel):
    """Options of a scheme; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Adapted(Protocol):
    """A model with its tuned tensors chosen."""

    model: nn.Module
    view: ParamView
    fresh: Sequence[str]  # tuned tensors that are not in the base model

    def save(self, folder: Path) -> None:
        """Write what was tuned, in Hugging Face's format for it."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""

    def merged(self) -> nn.Module:
        """A plain model with the tuning merged in; for full fine-tuning the model itself."""
