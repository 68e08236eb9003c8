"""Shared by schemes that tune sparse deltas: which entries at the start, files, merging, exports.

A subclass says which entries of a matrix are tuned (`_support`) and, where they move, what happens after a step. New heads
are tuned whole beside the deltas. What the base is, also in files, is told by its hash.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from smidgen import noise
from smidgen.adapt import _sparse_file, _sparse_targets
from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._peft import new_modules
from smidgen.adapt._sparse import DELTA, bare, install, strip
from smidgen.config import ConfigError
from smidgen.fingerprint import state_sha256
from smidgen.params import ParamView, canonical, tensor_id

EXPORTS = {
    "merged": "the whole model with the deltas in its weights, for stock transformers",
    "peft-supertuning": "PEFT's SUPERTUNING adapter, positions included (linear layers)",
    "peft-shira": "PEFT's SHIRA adapter, positions included (linear layers, budget given by rank)",
}
REFUSED = {"adapter": "its own sparse.safetensors is read by smidgen alone; PEFT reads peft-supertuning and peft-shira"}

TARGETS = "layers to adapt: ends of names, or a regular expression; none: all linear layers but the output head"


class DeltaConfig(SchemeConfig):
    """Options of schemes that tune a given number of entries."""

    density: float = Field(0.01, gt=0, le=1, description="share of the adapted matrices' entries that is tuned")
    rank: int | None = Field(
        None, ge=1, description="tune as many entries of a matrix as a LoRA of this rank has weights there; none: by density"
    )
    target_modules: list[str] | str | None = Field(None, description=TARGETS)


class Deltas:
    """A model with sparse deltas in its matrices; a new head is tuned whole beside them.

    Raises ConfigError for layers that are not there or not supported, and for more deltas than entries.
    """

    scheme: str  # the name in files

    def __init__(self, model: nn.Module, config: Any, seed: int, fresh: Sequence[str]):
        self.model, self.config, self.seed = model, config, seed
        self.heads = new_modules(model, set(fresh))
        modules = _sparse_targets.find(model, config.target_modules, self.heads)
        counts = self._counts(modules)
        new = set(fresh)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and canonical(name) in new)
        self.sites = {}
        for name, module in modules.items():
            if not counts[name]:
                continue
            key = f"{canonical(name)}.{DELTA}"
            address = noise.Address(seed, tensor_id(key), 0, 0, noise.INIT)
            self.sites[key] = install(module, self._support(address, module, counts[name]))
        self.view = ParamView.of_model(model)
        for name, site in self.sites.items():
            site.entry = self.view[name]
            site.entry.support = site.support
        self.fresh = [name for name in fresh if name in self.view.entries]
        self._base: str | None = None

    def _counts(self, modules: dict[str, Any]) -> dict[str, int]:
        """Entries of each layer to be tuned, where their number is given."""
        return _sparse_targets.budget(self.model, modules, self.config.density, self.config.rank, False)

    def _support(self, address: noise.Address, module: Any, count: int) -> Tensor:
        """Flat positions of a layer's entries to be tuned, sorted and distinct; the address is the layer's own."""
        raise NotImplementedError

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Positions and deltas, and new heads; see `_sparse_file`."""
        deltas = {name: site.everything() for name, site in self.sites.items()}
        whole = {name: self.view[name].storage for name in self.fresh}
        _sparse_file.save(folder, self.scheme, self.base_sha256(), deltas, self._shapes(), whole)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises ConfigError where it belongs to another base, scheme or choice of layers."""
        deltas, whole = _sparse_file.load(folder, self.scheme, self.base_sha256(), self._shapes())
        for name, site in self.sites.items():
            index, values = deltas[name]
            if len(values) != (held := len(site.everything()[0])):
                raise ConfigError(
                    f"{folder} holds {len(values)} deltas of {name.removesuffix('.' + DELTA)}, this model {held}: "
                    "load it with the scheme_args of its run"
                )
            site.restore(index.to(site.delta.device), values.to(site.delta.device))
        self.view.restore({name: value.to(self.view[name].tensor.device) for name, value in whole.items()})

    def base_sha256(self) -> str:
        """Hash of the frozen weights without the deltas, of quantised ones their codes and scales; made once."""
        if self._base is None:
            with self.bare():
                named: dict[str, Tensor] = {canonical(n): p for n, p in self.model.named_parameters()}
                for name, site in self.sites.items():
                    if site.quantised:
                        state = site.module.state_dict(prefix=name.removesuffix(DELTA))
                        named |= {n: tensor for n, tensor in state.items() if isinstance(tensor, Tensor)}
                self._base = state_sha256({n: p for n, p in named.items() if n not in self.view.entries})
        return self._base

    def bare(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model's weights are the base's, bit for bit."""
        return bare(list(self.sites.values()))

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {name: site.support.shape for name, site in self.sites.items()}

    def merged(self) -> nn.Module:
        """A plain copy of the model with the deltas in its weights. Raises ConfigError for a quantised base."""
        self._refuse_quantised("merged")
        for site in self.sites.values():
            site.swap_in()
        return strip(copy.deepcopy(self.model))

    def export(self, folder: Path, form: str) -> None:
        """Write a format of PEFT's. Cost: one copy of the model. Raises ConfigError with the reason where it cannot."""
        from smidgen.adapt import _sparse_peft

        self._refuse_quantised(form)
        with self.bare():
            base = strip(copy.deepcopy(self.model))
        _sparse_peft.write(base, {n.removesuffix("." + DELTA): s for n, s in self.sites.items()}, self.heads, folder, form)

    def _refuse_quantised(self, form: str) -> None:
        for name, site in self.sites.items():
            if site.quantised:
                raise ConfigError(
                    f"{form}: the weights of {name.removesuffix('.' + DELTA)} are quantised, and would be rounded to other "
                    "codes with deltas added: keep the run's own files, which smidgen eval and generate read"
                )
