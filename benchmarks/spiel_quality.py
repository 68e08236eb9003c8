"""SpIEL beside LoRA, a fixed random mask and full AdamW: quality at equal numbers of tuned weights and equal budgets.

The grid (spiel_quality.yaml) and the runner are those of the zeroth-order study: the learning rate of each cell is searched on
dev rows with as many trials for every method, the chosen one runs with all seeds and reads the test rows once, and every run
is a record; a second start makes only what is missing. A method of this grid may add scheme options (`scheme_args`) and keys
of the run (`run`, such as quantise) to those of its place. Goal: SpIEL-AG at least as good as LoRA at each place, in the
place's own metric: test accuracy, or held-out loss.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import _zo_run as one
from _record import emit
from _zo_grid import Grid, Record, Role, Run, fresh
from zo_bench import ROOT, available, plan, read_records, work


class Cells(Grid):
    """A grid whose methods have scheme options and run keys of their own."""

    def run(self, cell: tuple[str, str, str], role: Role, seed: int, lr: float, steps: int, batch: int | None = None) -> Run:
        made, own = super().run(cell, role, seed, lr, steps, batch), self.methods[cell[2]]
        for key, name in (("scheme_args", "scheme_args"), ("run", "run")):
            made.settings[key] = {**made.settings[key], **own.get(name, {})}
        return made

    def zero_shot(self, place: str, scheme: str) -> Run:
        """The untrained model is the same under every scheme; zo_sgd takes it as it is."""
        return super().zero_shot(place, "full")


def means(grid: Grid, records: Mapping[str, Record]) -> dict[str, float]:
    """Mean over seeds of the place's metric on the test rows, by place and method; and what is tuned."""
    found: dict[str, list[float]] = {}
    for record in records.values():
        if record["role"] in ("seed", "zero_shot") and record["status"] == "done" and record["place"] in grid.places:
            name = f"{record['place']}_{record['method']}"
            found.setdefault(name, []).append(record["test"][grid.places[record["place"]]["metric"]])
            found[f"{name}_tuned_weights"] = [record["tuned_weights"]]
    return {name: statistics.fmean(values) for name, values in sorted(found.items())}


def against(grid: Grid, figures: dict[str, float]) -> dict[str, tuple[str, float]]:
    """Add how much better SpIEL-AG is than LoRA at each place, and the goal that it is not worse."""
    goals = {}
    for place, p in grid.places.items():
        ours, theirs = (figures.get(f"{place}_{method}") for method in ("spiel_ag", "lora"))
        if ours is not None and theirs is not None:
            figures[f"{place}_spiel_ag_over_lora"] = theirs - ours if p["metric"] == "loss" else ours - theirs
            goals[f"{place}_spiel_ag_over_lora"] = (">=", 0.0)
    return goals


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--grid", type=Path, default=Path(__file__).with_suffix(".yaml"), help="what is compared")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the grid's budgets")
    parser.add_argument("--records", type=Path, default=ROOT / "results" / "spiel")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="the folder of models and data")
    parser.add_argument("--only", nargs="*", default=[], help="places, schemes and methods to keep, by name")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and end")
    args = parser.parse_args()
    args.start = "fork"
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "NUMBA_NUM_THREADS": str(args.threads)}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    grid, records = Cells.read(args.grid, args.scale), read_records(args.records)
    cells, reasons = available(grid, args.shared, args.only)
    for reason in reasons:
        print(f"left out: {reason}")
    print(plan(grid, cells, records, args.workers), flush=True)
    if args.dry_run:
        return
    if any(fresh(run, records) is None for run in grid.stated(records, cells)):
        one.prepare(args.threads)
    ended = work(grid, cells, args, records)
    gc.unfreeze()
    print("  ".join(f"{how} {count}" for how, count in ended.items()) or "nothing to run")
    figures = means(grid, records)
    setting: dict[str, Any] = {"grid": args.grid.name, "scale": args.scale, "seeds": grid.raw["seeds"], "left_out": reasons}
    emit("spiel_quality", figures, against(grid, figures), setting)


if __name__ == "__main__":
    main()
