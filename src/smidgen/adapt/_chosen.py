"""Shared by schemes that tune some of a model's own tensors: which are tuned, and the file that holds only those.

No format of Hugging Face's holds a few tensors of a model, so a run writes `tuned.safetensors`, the tuned tensors under
the names that the model gives them, and `tuned.json`, which names the scheme and the hash of the frozen ones.
For stock transformers the whole model is exported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from smidgen.config import ConfigError
from smidgen.fingerprint import state_sha256
from smidgen.params import ParamView, canonical

TENSORS, ABOUT = "tuned.safetensors", "tuned.json"
VERSION = 1  # of these two files


class Chosen:
    """A model some of whose own tensors are tuned, and new ones always."""

    def __init__(self, model: nn.Module, scheme: str, tuned: Callable[[str, nn.Parameter], bool], fresh: Sequence[str]):
        """`tuned` is asked for the canonical name and the parameter."""
        self.model, self.scheme = model, scheme
        new = set(fresh)
        for name, parameter in model.named_parameters():
            wanted = canonical(name) in new or tuned(canonical(name), parameter)
            parameter.requires_grad_(parameter.is_floating_point() and wanted)
        self.view = ParamView.of_model(model)
        self.fresh = [name for name in fresh if name in self.view.entries]

    def save(self, folder: Path) -> None:
        """The tuned tensors, and what they belong to."""
        from safetensors.torch import save_file

        save_file({e.name: e.storage.contiguous().cpu() for e in self.view}, folder / TENSORS, metadata={"format": "pt"})
        about = {"version": VERSION, "scheme": self.scheme, "frozen_sha256": self._frozen_sha256()}
        (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises ConfigError where it belongs to another model or scheme."""
        from safetensors.torch import load_file

        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["version"] != VERSION:
            raise ConfigError(f"{folder / ABOUT} has version {about['version']}, not {VERSION}: use the smidgen that wrote it")
        tensors = load_file(folder / TENSORS)
        shapes = {e.name: e.tensor.shape for e in self.view}
        if about["scheme"] != self.scheme or {n: t.shape for n, t in tensors.items()} != shapes:
            raise ConfigError(
                f"{folder / TENSORS} was written by scheme {about['scheme']} and does not fit this model under {self.scheme}: "
                "load it with the model and scheme_args of its run"
            )
        if about["frozen_sha256"] != self._frozen_sha256():
            raise ConfigError(f"{folder / TENSORS} belongs to another base model: give the one that its run started from")
        for name, value in tensors.items():
            self.view[name].storage.copy_(value)

    def merged(self) -> nn.Module:
        return self.model

    def _frozen_sha256(self) -> str:
        frozen = {canonical(n): p for n, p in self.model.named_parameters() if canonical(n) not in self.view.entries}
        return state_sha256(frozen)
