"""The zeroth-order study: every method, scheme and task of a grid at equal numbers of forwards, against AdamW.

    python benchmarks/zo_bench.py --dry-run     what would run, and for how long
    python benchmarks/zo_bench.py               run it, or go on with it; finished runs are skipped
    python scripts/zo_tables.py                 the pages made from the records

Protocol. A run may spend a budget of example-forwards, whatever its method; the grid states what a step of each costs.
Rates: five trials for each cell on one seed, a third of the budget each: three around a centre, two where these point; the
lowest loss on the dev rows wins, and the trials' data hold no test rows. Then the seeds at that rate, whose end is measured
on dev and, once, on test. `zero_shot` is the untrained model under the scheme.

A record is one JSON file, PLACE/SCHEME-METHOD-ROLE-N.json, with: format; place, scheme, method (the grid's label), module
(the method's name), role (zero_shot, search, seed, equal_time, equal_memory), seed; model, task, task_args, data, rows,
max_length, run, scheme_args, train as configured, lr, eps, options (all of the method's, resolved), batch, steps,
steps_made, bad_steps; metric, chance; budget and cost (example-forwards a run, forwards a step, as the grid states them);
forwards, backwards, tokens as the engine counted them; seconds of training, and cpu_seconds, its processor time, which
depends little on what else the machine does; peak_bytes of the process above what it was before the model was loaded;
state_bytes; weights_bytes; tuned_weights, weights, kind; before, dev, test (metrics);
majority (share of the commonest test label); status (done, diverged, refused) and reason; settings_sha256,
weights_sha256, versions, threads.

Two runs at a time, one thread each. What a method, scheme, model or data set of the grid lacks here is said and left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import _zo_run as one
from _record import emit
from _zo_grid import Cell, Grid, Record, Run, fresh

ROOT = Path(__file__).parents[1]


def read_records(folder: Path) -> dict[str, Record]:
    """All records of a folder, by `Run.name`."""
    return {p.relative_to(folder).with_suffix("").as_posix(): json.loads(p.read_text()) for p in folder.glob("*/*.json")}


def available(grid: Grid, shared: Path, only: Sequence[str]) -> tuple[list[Cell], list[str]]:
    """The cells that can run here, and why the others cannot. only: see `kept`."""
    from smidgen import adapt, optim, tasks

    cells, reasons = [], []
    for cell in grid.cells():
        place, scheme, method = cell
        p, module = grid.places[place], grid.methods[method].get("method", method)
        lacking = [
            one.absent(p["model"], shared),
            one.absent(p["data"]["folder"], shared) if p["data"] else None,
            None if p["task"] in tasks.names() else f"there is no task {p['task']}",
            None if scheme in adapt.names() else f"there is no scheme {scheme}",
            None if module in optim.names() else f"there is no method {module}",
        ]
        reason = next((r for r in lacking if r), None)
        if reason is not None:
            reasons.append(reason)
        elif kept(grid, cell, only):
            cells.append(cell)
    return cells, list(dict.fromkeys(reasons))


def kept(grid: Grid, cell: Cell, only: Sequence[str]) -> bool:
    """Whether `only` lets a cell pass: it restricts the places, schemes or methods of which it names one."""
    known = (set(grid.places), {s for p in grid.places.values() for s in p["schemes"]}, set(grid.methods))
    return all(own in only or not names & set(only) for own, names in zip(cell, known, strict=True))


def plan(grid: Grid, cells: Sequence[Cell], records: dict[str, Record], workers: int) -> str:
    """The plan as text: per place its cells, runs still to be made and minutes; runs whose rate is open count too."""
    lines, total = [], 0.0
    for place in dict.fromkeys(cell[0] for cell in cells):
        mine = [cell for cell in cells if cell[0] == place]
        runs = {run.name: run for run in grid.stated(records, mine)}
        for cell in mine:
            if grid.chosen(cell, records) is None:  # the rate does not change what a run costs
                middle = grid.centre(cell)
                runs |= {run.name: run for run in grid.finals(cell, middle)}
        open_ = [run for run in runs.values() if fresh(run, records) is None]
        seconds = sum(grid.seconds(run) for run in open_)
        total += seconds
        lines.append(
            f"{place}: {len(mine)} cells, budget {grid.budget(place):.0f} example-forwards a run, "
            f"{len(open_)} of {len(runs)} runs to make, about {seconds / 60 / workers:.0f} min with {workers} workers"
        )
    lines.append(f"in all about {total / 60 / workers:.0f} min (without the variants, whose length the records decide)")
    return "\n".join(lines)


def work(grid: Grid, cells: Sequence[Cell], args: argparse.Namespace, records: dict[str, Record]) -> Counter[str]:
    """Make every run that has no record, as soon as its settings are known; how many ended in which way."""
    ended: Counter[str] = Counter()
    running: dict[Any, tuple[Any, Run, float]] = {}
    broken: set[str] = set()
    until = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    with tempfile.TemporaryDirectory() as scratch:
        for place in dict.fromkeys(cell[0] for cell in cells):
            one.divide(grid.places[place], args.shared, Path(scratch) / place)
        while True:
            busy = {run.name for _, run, _ in running.values()} | broken
            waiting = (r for r in grid.stated(records, cells) if r.name not in busy and fresh(r, records) is None)
            while len(running) < args.workers and time.monotonic() < until and (run := next(waiting, None)) is not None:
                data = Path(scratch) / run.place
                process = one.start(run, args.shared, data, args.records, args.threads, args.start)
                running[process.sentinel] = process, run, time.monotonic()
            if not running:
                return ended
            for sentinel in connection.wait(list(running)):
                process, run, began = running.pop(sentinel)
                process.join()
                path = args.records / f"{run.name}.json"
                record = json.loads(path.read_text()) if process.exitcode == 0 else None
                if record is None or record["settings_sha256"] != run.sha256:
                    broken.add(run.name)
                    ended["broken"] += 1
                    continue
                place = grid.places[run.place]
                record |= {"metric": place["metric"], "chance": place["chance"]}
                record |= {"budget": grid.budget(run.place), "cost": grid.cost(run)}
                path.write_text(json.dumps(record, indent=1) + "\n")
                records[run.name] = record
                ended[record["status"]] += 1
                print(_line(run, record, time.monotonic() - began), flush=True)


def _line(run: Run, record: Record, seconds: float) -> str:
    if record["status"] != "done":
        return f"{run.name}: {record['status']}: {record['reason']}"
    counted = (record["forwards"] + 2 * record["backwards"]) / max(1, record["steps_made"])
    dev = "  ".join(f"{k} {v:.4f}" for k, v in record["dev"].items() if k in ("loss", "accuracy", "f1"))
    return f"{run.name}: dev {dev}  lr {record['lr']:g}  {counted:g} counted of {record['cost']:g} a step  {seconds:.1f} s"


def figures(grid: Grid, records: dict[str, Record]) -> dict[str, float]:
    """Mean test metric over the seeds of every finished cell."""
    found: dict[str, list[float]] = {}
    for record in records.values():
        if record["role"] in ("seed", "zero_shot") and record["status"] == "done":
            metric = grid.places.get(record["place"], {}).get("metric")
            if metric is not None:
                name = f"{record['place']}_{record['scheme']}_{record['method']}"
                found.setdefault(name, []).append(record["test"][metric])
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--grid", type=Path, default=Path(__file__).with_suffix(".yaml"), help="what is compared")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the grid's budgets")
    parser.add_argument("--records", type=Path, default=ROOT / "results" / "zo_bench")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="the folder of models and data")
    parser.add_argument("--only", nargs="*", default=[], help="places, schemes and methods to keep, by name")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--start", choices=("fork", "spawn"), default="fork", help="how a run's process begins; spawn on a GPU")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and end")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "NUMBA_NUM_THREADS": str(args.threads)}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    grid, records = Grid.read(args.grid, args.scale), read_records(args.records)
    cells, reasons = available(grid, args.shared, args.only)
    for reason in reasons:
        print(f"left out: {reason}")
    print(plan(grid, cells, records, args.workers), flush=True)
    if args.dry_run:
        return
    if args.start == "fork" and any(fresh(run, records) is None for run in grid.stated(records, cells)):
        one.prepare(args.threads)
    ended = work(grid, cells, args, records)
    gc.unfreeze()
    print("  ".join(f"{how} {count}" for how, count in ended.items()) or "nothing to run")
    setting = {"grid": args.grid.name, "scale": args.scale, "seeds": grid.raw["seeds"], "left_out": reasons}
    emit("zo_bench", figures(grid, records), {}, setting)


if __name__ == "__main__":
    main()
