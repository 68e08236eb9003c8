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
Bytes a tuned entry: delta 4, position 4, the base's value 2 to 4, the method's state (sparse_adamw: 10, 4 in 8 bits; sm3: 4
a row and a column of the matrix) and, during a step, its gradient 4; AG holds 16 more a candidate while a phase is open.

Not as the public code, unless the compat options say so: gradient statistics are of whole updates in float32 (not of
micro-batches, divided by their number, in the gradient's dtype), the age of seeds counts right, every phase takes as many
updates as the first, density is that of the adapted matrices. It does not: move budget between matrices, tune output heads
or embeddings, train quantised bases, move positions on several ranks.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from smidgen import noise
from smidgen.adapt import _sparse_file, _sparse_targets
from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._peft import new_modules
from smidgen.adapt._reselection import Follows, Reselection, Schedule, Scores
from smidgen.adapt._sparse import DELTA, bare, install, strip
from smidgen.adapt._support import random_support
from smidgen.config import ConfigError
from smidgen.fingerprint import state_sha256
from smidgen.params import ParamView, canonical, tensor_id

status = "experimental"

EXPORTS = {
    "merged": "the whole model with the deltas in its weights, for stock transformers",
    "peft-supertuning": "PEFT's SUPERTUNING adapter, positions included (linear layers)",
    "peft-shira": "PEFT's SHIRA adapter, positions included (linear layers, budget given by rank)",
}
REFUSED = {"adapter": "its own sparse.safetensors is read by smidgen alone; PEFT reads peft-supertuning and peft-shira"}

STATE, STATE_ABOUT = "growth.safetensors", "growth.json"  # of a phase that is open, in checkpoints


class Config(SchemeConfig):
    """Options of SpIEL; defaults are the paper's where they have one."""

    density: float = Field(0.01, gt=0, le=1, description="share of the adapted matrices' entries that is tuned")
    rank: int | None = Field(
        None, ge=1, description="tune as many entries of a matrix as a LoRA of this rank has weights there; none: by density"
    )
    target_modules: list[str] | str | None = Field(
        None, description="layers to adapt: ends of names, or a regular expression; none: all linear layers but the output head"
    )
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


class SpIEL:
    """A model with sparse deltas in its matrices; a new head is tuned whole beside them."""

    def __init__(self, model: nn.Module, config: Config, seed: int, fresh: Sequence[str]):
        if config.collect >= config.every:
            raise ConfigError(
                f"scheme_args.collect = {config.collect} must be less than every = {config.every}: a phase ends before the "
                "next begins"
            )
        self.model, self.config = model, config
        self.heads = new_modules(model, set(fresh))
        modules = _sparse_targets.find(model, config.target_modules, self.heads)
        counts = _sparse_targets.budget(model, modules, config.density, config.rank, config.compat_density)
        new = set(fresh)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and canonical(name) in new)
        self.sites = {}
        for name, module in modules.items():
            key = f"{canonical(name)}.{DELTA}"
            address = noise.Address(seed, tensor_id(key), 0, 0, noise.INIT)
            self.sites[key] = install(module, random_support(address, module.weight.numel(), counts[name]))  # type: ignore[arg-type,union-attr,operator]
        self.view = ParamView.of_model(model)
        for name, site in self.sites.items():
            site.entry = self.view[name]
            site.entry.support = site.support
        self.fresh = [name for name in fresh if name in self.view.entries]
        first = config.first if config.first != "auto" else {"linear": "all", "cosine": "rate"}[config.schedule]
        schedule = Schedule(config.every, config.collect, config.rate, config.schedule, first, config.compat_phases)
        self.growing = Reselection(self.sites, self.view, schedule, config.growth, config.candidates, config.compat_collect)
        self._base: str | None = None

    # -- while it trains (`Moving`) -----------------------------------------------------------------------------------

    def begin(self, optimizer: Any) -> None:
        growth, method = self.config.growth, type(optimizer).__name__
        if growth == "none":
            return
        if not isinstance(optimizer, Follows):
            raise ConfigError(
                f"growth {growth!r} moves the tuned entries, and the state of {method} cannot follow them: use method "
                "sparse_adamw (growth ag) or sm3 (growth ma), or a fixed support with scheme_args.growth=none"
            )
        if growth == "ma" and not isinstance(optimizer, Scores):
            raise ConfigError(f"growth 'ma' scores entries by SM3's accumulators, which {method} has not: use method sm3")
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ConfigError(
                f"growth {growth!r} would pick other entries on each of {torch.distributed.get_world_size()} ranks: run one "
                "process, or take a fixed support with scheme_args.growth=none"
            )
        if self.growing.t == 0:
            self.growing.open()

    def after_step(self, optimizer: Any, steps: int) -> None:
        if self.config.growth != "none":
            self.growing.after(optimizer, steps)

    def save_state(self, folder: Path) -> None:
        from safetensors.torch import save_file

        self.save(folder)
        tensors: dict[str, Tensor] = {}
        about: dict[str, dict[str, int]] = {}
        for name, site in self.sites.items():
            if (phase := site.phase) is not None:
                held = {key: getattr(phase, key) for key in phase.TENSORS}
                tensors |= {f"{name}.{key}": value for key, value in held.items() if value is not None}
                about[name] = {"size": phase.size, "counted": phase.counted}
        save_file(tensors, folder / STATE)
        (folder / STATE_ABOUT).write_text(json.dumps({"t": self.growing.t, "phases": about}) + "\n", encoding="utf-8")

    def load_state(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.load(folder)
        about, tensors = json.loads((folder / STATE_ABOUT).read_text(encoding="utf-8")), load_file(folder / STATE)
        self.growing.t = about["t"]
        for name, site in self.sites.items():
            site.phase = None
            if name in about["phases"]:
                site.phase = phase = self.growing.phase(about["phases"][name]["size"])
                phase.counted = about["phases"][name]["counted"]
                for key in phase.TENSORS:
                    value = tensors.get(f"{name}.{key}")
                    setattr(phase, key, None if value is None else value.to(site.delta.device))

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Positions and deltas, and new heads; see `_sparse_file`."""
        deltas = {name: (site.index, site.delta) for name, site in self.sites.items()}
        whole = {name: self.view[name].storage for name in self.fresh}
        _sparse_file.save(folder, "spiel", self.base_sha256(), deltas, self._shapes(), whole)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises ConfigError where it belongs to another base, scheme or choice of layers."""
        deltas, whole = _sparse_file.load(folder, "spiel", self.base_sha256(), self._shapes())
        for name, site in self.sites.items():
            index, values = deltas[name]
            if len(values) != len(site.index):
                raise ConfigError(
                    f"{folder} holds {len(values)} deltas of {name.removesuffix('.' + DELTA)}, this model {len(site.index)}: "
                    "load it with the density, or rank, of its run"
                )
            site.move(index.to(site.index.device))
            self.view.restore({name: values.to(site.delta.device)})
        self.view.restore({name: value.to(self.view[name].tensor.device) for name, value in whole.items()})

    def base_sha256(self) -> str:
        """Hash of the frozen weights without the deltas; made once."""
        if self._base is None:
            with self.bare():
                named = {canonical(n): p for n, p in self.model.named_parameters()}
                self._base = state_sha256({n: p for n, p in named.items() if n not in self.view.entries})
        return self._base

    def bare(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model's weights are the base's, bit for bit."""
        return bare(list(self.sites.values()))

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {name: site.support.shape for name, site in self.sites.items()}

    def merged(self) -> nn.Module:
        """A plain copy of the model with the deltas in its weights."""
        for site in self.sites.values():
            site.swap_in()
        return strip(copy.deepcopy(self.model))

    def export(self, folder: Path, form: str) -> None:
        """Write a format of PEFT's. Cost: one copy of the model. Raises ConfigError with the reason where it cannot."""
        from smidgen.adapt import _sparse_peft

        with self.bare():
            base = strip(copy.deepcopy(self.model))
        _sparse_peft.write(base, {n.removesuffix("." + DELTA): s for n, s in self.sites.items()}, self.heads, folder, form)


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> SpIEL:
    """Freeze `model` and put sparse deltas into its matrices, at random positions addressed by `seed`.

    Raises ConfigError for layers that are not there or not supported, and for more deltas than entries.
    """
    return SpIEL(model, config, seed, fresh)
