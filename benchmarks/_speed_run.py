"""One run of speed_to_accuracy.py, in a process of its own: its grid, its curve of dev measures, its record.

Built on the study's grid (`_zo_grid`) and runner (`_zo_run`). What differs: final runs are evaluated on the dev rows along the
way, no test rows are read, a method may have no search, and methods are compared by what it takes to reach a loss.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _zo_run as one
from _zo_grid import Cell, Grid, Record, Role, Run

FORMAT = 1  # of a record
LATE = 2.0  # what a run that does not reach a loss counts, in lengths of the run: the penalised average of solver contests
_RESAMPLES = 10_000  # of the bootstrap; more change no third digit


class SpeedGrid(Grid):
    """The grid of benchmarks/speed_to_accuracy.yaml, which explains its keys."""

    def searched(self, method: str) -> bool:
        """Whether a method's rate is searched; one without search brings its own, or has none."""
        return self.methods[method].get("search", True)

    def steps(self, cell: Cell, share: float = 1.0, batch: int | None = None) -> int:
        return super().steps(cell, share, batch) if self.forwards(cell) else 0  # a readout is fitted, not trained

    def run(self, cell: Cell, role: Role, seed: int, lr: float, steps: int, batch: int | None = None) -> Run:
        run = super().run(cell, role, seed, lr, steps, batch)
        run.settings["test"] = False
        if role == "seed":
            every = max(1, steps // self.raw["points"])
            run.settings["train"] |= {"eval_strategy": "steps", "eval_steps": every, "logging_steps": every}
        return run

    def stated(self, records: Mapping[str, Record], cells: Sequence[Cell] | None = None) -> Iterator[Run]:
        for cell in self.cells() if cells is None else cells:
            if not self.searched(cell[2]):
                yield from self.finals(cell, None)  # type: ignore[arg-type]
                continue
            yield from self.search(cell, records)
            lr = self.chosen(cell, records)
            if lr is not None:
                yield from self.finals(cell, lr)

    def before(self, cell: Cell) -> int:
        """Example-forwards that are spent before the first step: those of a fitted head."""
        return self.places[cell[0]].get("before", 0) + self.methods[cell[2]].get("before", 0)

    def seconds(self, run: Run) -> float:
        p = self.places[run.place]
        evaluations = self.raw["points"] + 2 if run.role == "seed" else 2
        own = run.settings["steps"] * run.settings["batch"] * self.cost(run) + self.before(run.cell)
        return (own + evaluations * p["rows"]["dev"]) / p["speed"] + p["start"]


def measure(run: Run, shared: Path, data: Path, threads: int) -> dict[str, Any]:
    """The record of a run, but its costs; that of a run refused or diverged says why. Other exceptions are bugs."""
    from smidgen import run as runs
    from smidgen.config import Interrupted, UserError
    from smidgen.config_file import load

    s = run.settings
    record: dict[str, Any] = {"format": FORMAT, "place": run.place, "scheme": run.scheme, "method": run.method}
    record |= {"role": run.role, **{k: v for k, v in s.items() if k not in ("method", "options", "test")}}
    record |= {"module": s["method"], "options": s["options"], "settings_sha256": run.sha256, "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        config = one.configuration(run, shared, data, Path(folder) / "run", threads)
        if s["lr"] is None:
            config = config.model_copy(update={"method_args": {}})
        clock = Clock()
        try:
            result = runs.finetune(config, say=clock)
        except Interrupted:
            raise  # not an outcome: the next start makes the run again
        except UserError as error:
            status = "diverged" if error.exit_code == 4 else "refused"
            return record | {"status": status, "reason": str(error).replace(str(folder), "OUTPUT")}
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        resolved = load(Path(folder) / "run" / "config.resolved.yaml")
    counts = ("bad_steps", "forwards", "backwards", "tokens", "seconds", "cpu_seconds", "peak_bytes")
    kept = (*counts, "tuned_weights", "weights", "kind")
    record |= {key: result[key] for key in ("status", "before", "dev", "weights_sha256", "versions", *kept)}
    used = {"method": resolved.method, "lr": resolved.train.learning_rate, **resolved.method_args}
    record["fit_forwards"] = result.get("head_start", {}).get("forwards", 0)  # of batches, for a fitted head
    return record | {"steps_made": result["steps"], "used": used, "curve": curve(result, rows, clock)}


class Clock:
    """Listens to a run's lines: the seconds and processor seconds of training, without evaluations, at each log step."""

    def __init__(self) -> None:
        self.at: dict[int, tuple[float, float]] = {}
        self._since = self._now()
        self._spent = (0.0, 0.0)

    def __call__(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        now = self._now()
        if word in ("before", "fitted"):  # the last line before the first step
            self._since, self._spent = now, (0.0, 0.0)
        elif word == "step":
            if "eval_" not in line:  # training up to here
                self._spent = tuple(a + b - c for a, b, c in zip(self._spent, now, self._since, strict=True))  # type: ignore[assignment]
                self.at[int(rest.partition("/")[0])] = self._spent
            self._since = now

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def curve(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], clock: Clock) -> list[dict[str, float]]:
    """Dev measures along a run: step, seconds, cpu_seconds, loss and the rest, from its start (with a fitted head, where
    there is one) to its end."""
    points = [{"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, **result.get("start", result["before"])}]
    for row in rows:
        if "eval_loss" in row and row["step"] in clock.at:
            seconds, cpu = clock.at[row["step"]]
            found = {k.removeprefix("eval_"): v for k, v in row.items() if k in ("eval_loss", "eval_accuracy")}
            points.append({"step": row["step"], "seconds": seconds, "cpu_seconds": cpu, **found})
    if points[-1]["step"] < result["steps"]:
        points.append(
            {"step": result["steps"], "seconds": result["seconds"], "cpu_seconds": result["cpu_seconds"], **result["dev"]}
        )
    return points


def prepare(threads: int) -> None:
    """As the study's, after rehearsing what it does not: Gaussian noise, factors and batches of probes."""
    from smidgen import run as runs
    from smidgen.config import RunConfig

    few = {"task": "reviews", "train_rows": 8, "dev_rows": 8, "test_rows": 8, "threads": threads}
    train = {"max_steps": 1, "per_device_train_batch_size": 4}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        for method in ("lozo", "subzero"):
            config = RunConfig.model_validate({**few, "train": train, "method": method, "output": f"{folder}/{method}"})
            runs.finetune(config, say=lambda line: None)
    one.prepare(threads)


# ---------------------------------------------------------------------------------------------------- what records say


def reached(points: Sequence[Mapping[str, float]], axis: str, measure: str, target: float) -> float | None:
    """Where on an axis (forwards, seconds, cpu_seconds) a curve first reaches a target, between two points by a line; None
    where it does not. A loss has to fall to it, any other measure to rise.

    >>> reached([{"forwards": 0, "loss": 1.0}, {"forwards": 10, "loss": 0.5}], "forwards", "loss", 0.75)
    5.0
    """
    sign = 1 if measure == "loss" else -1
    gap = [sign * (p[measure] - target) for p in points]
    for k, point in enumerate(points):
        if gap[k] <= 0:
            if k == 0:
                return float(point[axis])
            share = gap[k - 1] / (gap[k - 1] - gap[k])
            return float(points[k - 1][axis] + share * (point[axis] - points[k - 1][axis]))
    return None


def penalised(points: Sequence[Mapping[str, float]], axis: str, measure: str, target: float) -> float:
    """The same, where a curve that ends above its target counts LATE times its length."""
    found = reached(points, axis, measure, target)
    return LATE * points[-1][axis] if found is None else found


def ratios(ours: Mapping[int, Record], theirs: Mapping[int, Record], axis: str = "forwards") -> list[float]:
    """For each seed of both: what ours takes to the loss at which theirs ends, over the whole of theirs.

    A seed whose other run ends no lower than it began says nothing and is left out. What both spent before is in neither.
    """
    found = []
    for seed in sorted(ours.keys() & theirs.keys()):
        mine, other = ours[seed]["curve"], theirs[seed]["curve"]
        end, spent = other[-1]["loss"], other[-1][axis] - other[0][axis]
        if not end < other[0]["loss"]:
            continue
        took = reached(mine, axis, "loss", end)
        found.append(LATE if took is None else (took - mine[0][axis]) / spent)
    return found


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its 95 % percentile bootstrap interval; addressed by `seed`, no global generator."""
    draw = random.Random(seed)
    means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(_RESAMPLES))
    return sum(values) / len(values), means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES)]
