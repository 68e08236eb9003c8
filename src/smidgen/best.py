"""The step of a run with the best figure on the dev split, and what the test split says there.

At every evaluation that is better than all before, the untrained model's included, the tuned tensors go to a file in the run's
folder; of equals the first counts. A resumed run finds them there. What the run publishes is its last step all the same:
`smidgen replay --at STEP` rebuilds the best one where the run has a journal. Cost: the tuned bytes on disk, once more in memory
after the last step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from smidgen import folder as folders
from smidgen.config import ConfigError
from smidgen.params import ParamView

LOWER = ("loss",)  # measures that are better when they are lower


class Best(transformers.TrainerCallback):
    """Keeps the best step by `metric` of a run over the tensors of `view`; forwards: how many were made by now."""

    def __init__(self, folder: Path, view: ParamView, metric: str, forwards: Callable[[], int]):
        self.folder, self.view, self.metric, self.forwards = folder, view, metric, forwards

    @property
    def found(self) -> dict[str, Any] | None:
        """step, forwards and dev figures of the best evaluation, None before the first."""
        from safetensors import safe_open

        path = self.folder / folders.BEST
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["best"])

    def look(self, step: int, dev: dict[str, float]) -> None:
        """An evaluation at the weights as they are."""
        from safetensors.torch import save_file

        held, value = self.found, dev[self.metric]
        sign = -1.0 if self.metric in LOWER else 1.0
        if held is not None and not sign * value > sign * held["dev"][self.metric]:
            return
        about = {"step": step, "forwards": self.forwards(), "dev": dev}
        part = self.folder / (folders.BEST + ".part")
        save_file({e.name: e.storage.contiguous().cpu() for e in self.view}, part, metadata={"best": json.dumps(about)})
        part.replace(self.folder / folders.BEST)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any) -> None:
        found = {key.removeprefix("eval_"): value for key, value in (metrics or {}).items() if key.startswith("eval_")}
        if self.metric in found:
            self.look(state.global_step, found)

    def figures(self, measure: Callable[[], dict[str, float]] | None) -> dict[str, Any]:
        """What the best evaluation was, with what `measure` says of the test split there. The view is left at that step."""
        from safetensors.torch import load_file

        held = self.found
        assert held is not None
        if measure is None:
            return held
        self.view.restore(load_file(self.folder / folders.BEST))
        return {**held, "test": measure()}


def check_best(method: str, lazy: bool, moving: bool, quantised: bool) -> None:
    """Raise ConfigError where tensors alone do not say what the model was at a step."""
    if lazy:
        raise ConfigError(f"best = true, but {method} merges its factors into the weights only now and then: leave best out")
    if moving:
        raise ConfigError("best = true, but this scheme's tuned positions move while it trains: leave best out")
    if quantised:
        raise ConfigError("best = true, but quantised weights are tuned by what is added beside them: leave best out")
