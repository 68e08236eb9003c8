"""The vectors of all projected inputs of a model: chosen at the first forward with gradient, shared, saved, read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smidgen.activations._projection import Init, Projection, address
from smidgen.config import ConfigError

FILE = "velora.safetensors"  # in each checkpoint


class Split(Protocol):
    """The options that vectors depend on."""

    @property
    def init(self) -> Init: ...
    @property
    def per_group(self) -> bool: ...
    def split(self, width: int) -> tuple[int, int]: ...


class Vectors:
    """Projections by name of a layer's weight. `ids` address random vectors; a layer whose input is the tensor that was
    chosen for last shares that one's."""

    def __init__(self, model: nn.Module, config: Split, ids: Mapping[str, int], seed: int):
        self.config, self.ids, self.seed = config, ids, seed
        self.projections: dict[str, Projection] = {}  # name of the weight -> what it shares with others
        self._mask: Tensor | None = None
        self._recent: tuple[Tensor, int, Projection] | None = None  # last input of the first forward
        self._decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    @property
    def chosen(self) -> bool:
        """Whether all layers have their vectors."""
        return len(self.projections) == len(self.ids)

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()

    def forget(self, copied: nn.Module) -> None:
        """Take the hooks out of a copy of the model."""
        copied._forward_pre_hooks.pop(self._hooks[0].id)
        copied._forward_pre_hooks_with_kwargs.pop(self._hooks[0].id)
        copied._forward_hooks.pop(self._hooks[1].id)
        copied._forward_hooks_always_called.pop(self._hooks[1].id)

    def of(self, name: str, x: Tensor) -> Projection:
        """What the layer with this weight projects with, chosen from its input x [..., D] where that is the first."""
        found = self.projections.get(name)
        if found is not None:
            return found
        if self._recent is not None and self._recent[0] is x and self._recent[1] == x._version:
            projection = self._recent[2]
        else:
            projection = Projection(name, x.shape[-1], *self.config.split(x.shape[-1]))
            at = address(self.seed, self.ids[name])
            projection.choose(x.detach(), self._valid(name, x), self.config.init, self.config.per_group, at)
            self._recent = (x, x._version, projection)
        self.projections[name] = projection
        return projection

    def _enter(self, _: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if not self.chosen and torch.is_grad_enabled():
            self._mask = kwargs.get("attention_mask")

    def _leave(self, *_: Any) -> None:
        self._mask = self._recent = None

    def _valid(self, name: str, x: Tensor) -> Tensor | None:
        """Which tokens of an input are no padding, as far as the mask tells."""
        mask = self._mask
        if mask is None or mask.ndim != 2 or (self._decoder and "decoder" in name):
            return None
        if mask.shape == x.shape[:-1]:
            return mask.bool()
        return mask.flatten().bool() if x.ndim == 2 and mask.numel() == len(x) else None

    def save(self, folder: Path) -> None:
        """Write the vectors into a folder; nothing before the first forward with gradient."""
        if not self.projections:
            return
        shared = {name: p.name for name, p in self.projections.items()}
        vectors = {p.name: p.v.cpu() for p in self.projections.values() if p.v is not None}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(vectors, folder / FILE, metadata=shared)

    def load(self, folder: Path, places: Mapping[str, tuple[int, Any]]) -> None:
        """Read what `save` wrote; places: width and device of each layer. Raises ConfigError for a folder without vectors,
        or with those of other layers."""
        path = folder / FILE
        if not path.exists():
            raise ConfigError(
                f"{folder} holds no {FILE}: its vectors cannot be made again, so the run would go on in other subspaces; "
                "resume from a checkpoint of a velora run, or start a new run from its weights"
            )
        with safe_open(path, "pt") as file:
            shared = dict(file.metadata() or {})
        vectors, found = load_file(path), {}
        for reader, name in shared.items():
            if reader not in places or vectors[name].shape[1] != self.config.split(places[reader][0])[1]:
                raise ConfigError(
                    f"{path} holds vectors of other layers or sizes ({reader}): resume with the run's own settings"
                )
            if name not in found:
                width, device = places[reader]
                found[name] = Projection(name, width, *self.config.split(width))
                found[name].v = vectors[name].to(device)
            self.projections[reader] = found[name]
