"""What a run reports while it goes: metrics.jsonl, and one line a log step on the console."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from smidgen import folder as folders
from smidgen import memory, world
from smidgen.signals import Signals

Say = Callable[[str], None]


def silent(line: str) -> None:
    """What ranks other than the first say."""


def say_aloud(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


class Progress(transformers.TrainerCallback):
    """metrics.jsonl and one console line a log step; ends the run when a signal came, with a checkpoint where it `saves`.

    A line says how long the run has trained, without its evaluations: seconds, and cpu_seconds of processor time.
    """

    def __init__(self, folder: Path, signals: Signals, saves: bool, say: Say):
        self.folder, self.signals, self.saves, self.say = folder, signals, saves, say
        self._spent = self._since = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            folders.rewind_metrics(self.folder, state.global_step)
        self._spent = next(
            ((v["seconds"], v["cpu_seconds"]) for v in reversed(folders.metrics(self.folder)) if "seconds" in v), (0.0, 0.0)
        )
        self._since = _clocks()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        logs = {k: v for k, v in (logs or {}).items() if k != "total_flos"}
        if "loss" in logs:
            logs["mem/peak_mb"] = round(memory.peak() / 2**20, 1)
        seconds, cpu_seconds = self._spent
        spent = {"seconds": round(seconds, 4), "cpu_seconds": round(cpu_seconds, 4)}
        folders.append_metrics(self.folder, {"step": state.global_step, **logs, **spent})
        if "loss" in logs or any(k.startswith("eval_") for k in logs):
            self.say(f"step {state.global_step}/{state.max_steps}  " + line(logs))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = _clocks()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = _clocks()
        self._spent = self._spent[0] + now[0] - self._since[0], self._spent[1] + now[1] - self._since[1]
        told = bool(self.signals.received) if world.count() == 1 else world.traffic.stop
        if told and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_evaluate = control.should_log = False
            control.should_save = self.saves


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def line(logs: dict[str, Any]) -> str:
    """The measures of a log step that fit on a line."""
    measures = ("loss", *(f"eval_{name}" for name in ("loss", "reward", "accuracy", "f1", "exact_match", "perplexity")))
    shown = (*measures, "learning_rate", "grad_norm", "zo/projected_grad")
    return "  ".join(f"{k} {logs[k]:.4g}" for k in shown if isinstance(logs.get(k), (int, float)))


def summary(result: dict[str, Any]) -> str:
    """The lines that end a run."""
    metric = result["metric"]
    lines = [
        f"{metric}: {result['before'][metric]:.4f} -> {result['dev'][metric]:.4f} on the dev split"
        + (f", {result['test'][metric]:.4f} on the test split" if "test" in result else ""),
        f"{result['steps']} steps, {result['forwards']} forwards, {result['backwards']} backwards, {result['seconds']:.1f} s, "
        f"peak memory {result['peak_bytes'] / 2**20:.0f} MiB",
        f"written to {result['output']}",
    ]
    return "\n".join(lines)
