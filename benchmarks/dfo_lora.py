"""The derivative-free study: k = 16 rows a class, five draws, six tasks, every method of a grid on one masked LM.

    python scripts/pretrain_masked.py --text ../shared/data --to runs/masked     the model, about 8 minutes on one core
    python benchmarks/dfo_lora.py                                                run it, or go on with it
    python scripts/dfo_tables.py                                                 the page made from the records

Protocol. A run may spend its task's budget of forwards over the k-shot training batch; a back-propagation counts two. Looks
at the k-shot dev split are counted apart; the figures are those of the best look, where the test rows are read. Step sizes:
dfo_lora.yaml says how they are chosen. Draws are made one after another, each over all tasks and methods.

A record is one JSON file, TASK/SCHEME-METHOD-ROLE-N.json, with: format; place (the task), scheme, method (the grid's label),
role (search, seed), seed (the draw); settings (the run's configuration) and their settings_sha256, model (what its pre-training
says of itself), threads; metric, chance, status (done, diverged, refused) and reason; before, dev (last step), best (step,
forwards over the training batch, dev, and test of a seed), test (last step, of a seed); majority (share of the commonest test
label); forwards, evaluation_forwards, backwards, seconds, cpu_seconds, peak_bytes over the loaded libraries, tuned_weights,
weights, versions.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import yaml

import _study
import _zo_run as one
from _record import emit
from _zo_grid import Cell, Record, Run, fresh

FORMAT = 1  # of a record
MODEL = _study.ROOT / "runs" / "masked"


@dataclass
class Draws:
    """The grid of dfo_lora.yaml; a cell is (task, scheme, method label)."""

    raw: dict[str, Any]
    scale: float = 1.0

    @property
    def places(self) -> dict[str, dict[str, Any]]:
        return {task: {**values, "data": None, "rows": None} for task, values in self.raw["tasks"].items()}

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        return self.raw["methods"]

    def cells(self) -> list[Cell]:
        return [(task, m["scheme"], method) for task in self.raw["tasks"] for method, m in self.methods.items()]

    def budget(self, task: str) -> int:
        return int(self.scale * self.raw["tasks"][task]["budget"])

    def run(self, cell: Cell, role: str, draw: int, lr: float | None) -> Run:
        """One run with all its settings."""
        task, scheme, method = cell
        place, own = dict(self.raw["tasks"][task]), {k: v for k, v in self.methods[method].items() if k != "values"}
        chance, budget = place.pop("chance"), self.budget(task)
        del place["budget"]
        common = dict(self.raw["common"])
        options = dict(own.pop("options", {})) | ({} if lr is None else {"lr": lr})
        steps = 0 if scheme == "readout" else budget // (3 if own["method"] == "adamw" else self.raw["population"])
        if own["method"] in ("cma_es", "fireworks"):
            options |= {"population": self.raw["population"], "budget": budget}
        every = max(1, steps // self.raw["looks"])
        train = {
            **common.pop("train"),
            "max_steps": steps,
            "eval_steps": every,
            "logging_steps": every,
            "save_steps": steps + 1,
        }
        values = {**common, **place, **own, "task": task, "kind": "masked", "k_shot": self.raw["k_shot"], "seed": draw}
        if role == "search":
            values["test_rows"] = 2  # of which nothing is recorded
        settings = {"values": values | {"train": train, "method_args": options}, "lr": lr, "chance": chance, "budget": budget}
        return Run(task, scheme, method, role, draw, settings)  # type: ignore[arg-type]

    def search(self, method: str) -> list[Run]:
        """The trials of a method's step size."""
        known = self.raw["search"]
        cells = [(task, self.methods[method]["scheme"], method) for task in known["tasks"]]
        return [self.run(cell, "search", known["draw"], lr) for lr in self.methods[method].get("values", ()) for cell in cells]

    def chosen(self, method: str, records: Mapping[str, Record]) -> float | None:
        """The step size with the best dev accuracy of the trials, then the lower loss; None before all have a record."""
        found: dict[float, list[Record]] = {}
        for run in self.search(method):
            record = fresh(run, records)
            if record is None:
                return None
            found.setdefault(run.settings["lr"], []).append(record)

        def merit(lr: float) -> tuple[float, float]:
            if any(r["status"] != "done" for r in found[lr]):
                return -1.0, -math.inf
            best = [r["best"]["dev"] for r in found[lr]]
            return statistics.fmean(b["accuracy"] for b in best), -statistics.fmean(b["loss"] for b in best)

        return max(found, key=merit)

    def stated(self, records: Mapping[str, Record], cells: Sequence[Cell] | None = None) -> Iterator[Run]:
        """Every run whose settings are known by now."""
        cells = self.cells() if cells is None else cells
        for method in dict.fromkeys(cell[2] for cell in cells):
            yield from self.search(method)
        for draw in self.raw["draws"]:
            for cell in cells:
                searched = "values" in self.methods[cell[2]]
                lr = self.chosen(cell[2], records) if searched else None
                if lr is not None or not searched:
                    yield self.run(cell, "seed", draw, lr)


def available(model: Path, grid: Draws, shared: Path, only: Sequence[str]) -> tuple[list[Cell], list[str]]:
    """The cells that can run here, and why the others cannot; only: tasks and methods to keep."""
    reasons = (
        [] if model.exists() else [f"{model.name} is not here: scripts/pretrain_masked.py makes it, --model names another"]
    )
    for task, place in grid.raw["tasks"].items():
        if not (shared / "data" / place["data"]).exists():
            reasons.append(f"{task}: shared:data/{place['data']} is not here")
    if reasons:
        return [], reasons
    return [cell for cell in grid.cells() if not only or (set(cell) & set(only))], reasons


def plan(grid: Draws, cells: Sequence[Cell], records: Mapping[str, Record], workers: int) -> str:
    runs = list(grid.stated(records, cells))
    return f"{len(cells)} cells, {sum(fresh(r, records) is None for r in runs)} of {len(runs)} runs known by now to make"


def measure(model: Path, run: Run, shared: Path, data: Path, threads: int) -> dict[str, Any]:
    """The record of a run; that of a run refused or diverged says why. Other exceptions are bugs and pass through."""
    import smidgen
    from smidgen.config import Interrupted, RunConfig, UserError

    s = run.settings
    about = model / "pretraining.json"
    record: dict[str, Any] = {"format": FORMAT, "place": run.place, "scheme": run.scheme, "method": run.method}
    record |= {"role": run.role, "seed": run.seed, "settings": s, "settings_sha256": run.sha256, "threads": threads}
    record["majority"] = one.majority(shared / "data" / s["values"]["data"] / "validation.jsonl")
    record["model"] = json.loads(about.read_text()) if about.exists() else model.name
    with tempfile.TemporaryDirectory() as folder:
        values = s["values"] | {"model": str(model), "data": str(shared / "data" / s["values"]["data"]), "threads": threads}
        config = RunConfig.model_validate(values | {"output": f"{folder}/run"})
        try:
            found = smidgen.finetune(config, say=lambda line: None)
        except Interrupted:
            raise  # not an outcome: the next start makes the run again
        except UserError as error:
            status = "diverged" if error.exit_code == 4 else "refused"
            return record | {"status": status, "reason": str(error).replace(folder, "OUTPUT").replace(str(shared), "SHARED")}
    if run.role == "search":
        found.pop("test", None)
        found["best"].pop("test", None)
    counts = ("forwards", "evaluation_forwards", "backwards", "seconds", "cpu_seconds", "peak_bytes")
    kept = ("status", "metric", "before", "dev", "test", "best", *counts, "tuned_weights", "weights", "versions")
    return record | {key: found[key] for key in kept if key in found}


def completed(grid: Draws, run: Run, record: dict[str, Any]) -> dict[str, Any]:
    return record | {"chance": run.settings["chance"], "budget": run.settings["budget"]}


def line(run: Run, record: Record, seconds: float) -> str:
    """What a run came to."""
    if record["status"] != "done":
        return f"{run.name}: {record['status']}: {record['reason']}"
    best = record["best"]
    test = f"  test {best['test'][record['metric']]:.3f}" if "test" in best else ""
    return f"{run.name}: dev {best['dev'][record['metric']]:.3f} at {best['forwards']} forwards{test}  {seconds:.1f} s"


def figures(grid: Draws, records: Mapping[str, Record]) -> dict[str, float]:
    """Mean over draws of the test metric at the best look, for every cell; the number of finished draws."""
    found: dict[str, list[float]] = {}
    for r in records.values():
        if r["role"] == "seed" and r["status"] == "done" and r["place"] in grid.raw["tasks"]:
            found.setdefault(f"{r['place']}_{r['method']}", []).append(r["best"]["test"][r["metric"]])
    counts = {f"{name}_draws": len(values) for name, values in found.items()}
    return {name: statistics.fmean(values) for name, values in sorted(found.items())} | dict(sorted(counts.items()))


def main() -> None:
    args = _study.arguments(
        __doc__, __file__, "dfo_lora", lambda parser: parser.add_argument("--model", type=Path, default=MODEL)
    )
    grid = Draws(yaml.safe_load(args.grid.read_text()), args.scale)
    find, make = functools.partial(available, args.model), functools.partial(measure, args.model)
    made = _study.conduct(grid, args, find=find, outline=plan, measure=make, complete=completed, line=line)
    if made is None:
        return
    _, reasons, records = made
    setting = {"grid": args.grid.name, "scale": args.scale, "draws": grid.raw["draws"], "left_out": reasons}
    emit("dfo_lora", figures(grid, records), {}, setting)


if __name__ == "__main__":
    main()
