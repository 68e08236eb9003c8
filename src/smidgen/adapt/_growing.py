"""Shared by schemes whose positions move while they train: the loop of `_reselection`, checks, and its state in checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from smidgen.adapt import _ranks
from smidgen.adapt._deltas import Deltas
from smidgen.adapt._reselection import Follows, Reselection, Scores
from smidgen.config import ConfigError

STATE, STATE_ABOUT = "growth.safetensors", "growth.json"  # of a phase that is open, in checkpoints


class Growing(Deltas):
    """Sparse deltas with a `Reselection`, `growing`; None: the positions stay."""

    growing: Reselection | None

    def begin(self, optimizer: Any) -> None:
        """Before the first step. Raises ConfigError where the optimizer cannot follow, UserError where ranks differ."""
        _ranks.checked({name: (site.index,) for name, site in self.sites.items()})
        if self.growing is None:
            return
        growth, method = self.growing.growth, type(optimizer).__name__
        if not isinstance(optimizer, Follows):
            raise ConfigError(
                f"growth {growth!r} moves the tuned entries, and the state of {method} cannot follow them: use method "
                f"{'sm3' if growth == 'ma' else 'sparse_adamw'}, or {self._fixed()}"
            )
        if growth == "ma" and not isinstance(optimizer, Scores):
            raise ConfigError(f"growth 'ma' scores entries by SM3's accumulators, which {method} has not: use method sm3")
        if self.growing.old and _ranks.count() > 1:
            raise ConfigError(
                f"compat_collect on {_ranks.count()} ranks: the public code's statistics are of one rank, and its ranks drift "
                "apart; leave it out, or run one process"
            )
        if self.growing.t == 0:
            self.growing.open()

    def _fixed(self) -> str:
        """Which option keeps the entries where they are."""
        raise NotImplementedError

    def after_step(self, optimizer: Any, steps: int) -> None:
        """After each step: drop and grow where a phase ends."""
        if self.growing is not None:
            self.growing.after(optimizer, steps)

    def save_state(self, folder: Path) -> None:
        """What `save` writes, and the phase that is open."""
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
        state = {"t": 0 if self.growing is None else self.growing.t, "phases": about}
        (folder / STATE_ABOUT).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def load_state(self, folder: Path) -> None:
        """Read what `save_state` wrote."""
        from safetensors.torch import load_file

        self.load(folder)
        if self.growing is None:
            return
        about, tensors = json.loads((folder / STATE_ABOUT).read_text(encoding="utf-8")), load_file(folder / STATE)
        self.growing.t = about["t"]
        for name, site in self.sites.items():
            site.phase = None
            if name in about["phases"]:
                site.phase = phase = self.growing.phase(site, about["phases"][name]["size"])
                phase.counted = about["phases"][name]["counted"]
                for key in phase.TENSORS:
                    value = tensors.get(f"{name}.{key}")
                    setattr(phase, key, None if value is None else value.to(site.delta.device))
