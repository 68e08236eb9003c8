"""Full fine-tuning: every weight of the model is tuned.

State: none beyond the method's. Saved as the whole model in safetensors.

Over a quantised base nothing is written to it: its matrices are tuned by methods with low-rank steps, what these accumulate is
the adapter that is saved, in PEFT's format, and all other tensors are frozen; see `_over_quantised`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from torch import nn

from smidgen import quantised, shelves
from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._over_quantised import OverQuantised
from smidgen.config import ConfigError
from smidgen.params import ParamView, canonical

status = "experimental"

EXPORTS = {"merged": "the whole model, for stock transformers"}
REFUSED = {"adapter": "all weights of the model may have changed"}


class Config(SchemeConfig):
    """Options of full fine-tuning."""

    only: str | None = Field(None, description="regular expression: tune only tensors whose name it matches")


class Full:
    """A model whose weights are all tuned."""

    def __init__(self, model: nn.Module, config: Config, fresh: Sequence[str]):
        self.model = model
        wanted = None if config.only is None else re.compile(config.only)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and (wanted is None or bool(wanted.search(canonical(name)))))
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError(f"scheme_args.only = {config.only!r} matches no tensor of the model")
        self.view = ParamView.of_model(model)
        self.fresh = [name for name in fresh if name in self.view.entries]

    def save(self, folder: Path) -> None:
        """The whole model, as `from_pretrained` reads it."""
        if hasattr(self.model, "smidgen_shelves"):
            shelves.publish(self.model, folder)
        else:
            self.model.save_pretrained(folder)  # type: ignore[operator]

    def load(self, folder: Path) -> None:
        """Read the tuned tensors from a folder that `save` wrote."""
        saved = type(self.model).from_pretrained(folder, local_files_only=True)  # type: ignore[attr-defined]
        for name, parameter in saved.named_parameters():
            if canonical(name) in self.view.entries:
                self.view[canonical(name)].storage.copy_(parameter.detach())

    def merged(self) -> nn.Module:
        return self.model


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> Full | OverQuantised:
    """Tune all weights of `model`; `fresh` names the tensors that the checkpoint did not hold (a new head)."""
    return OverQuantised(model, config.only, fresh) if quantised.layers(model) else Full(model, config, fresh)
