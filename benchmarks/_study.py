"""How a study is conducted: what of a grid can run here, its runs side by side in processes of their own, a record of each.

A second start goes on where the first stopped. A study brings its grid and what it measures; zo_bench.py, spiel_quality.py,
velora_quality.py and speed_to_accuracy.py are studies.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import _zo_run as one
from _zo_grid import Cell, Grid, Record, Run, fresh
from _zo_run import Measure

ROOT = Path(__file__).parents[1]

Complete = Callable[[Any, Run, dict[str, Any]], dict[str, Any]]
Line = Callable[[Run, Record, float], str]


def read_records(folder: Path) -> dict[str, Record]:
    """All records of a folder, by `Run.name`; without those of runs that ended after their study was killed, which are not
    complete and are made again."""
    found = {p.relative_to(folder).with_suffix("").as_posix(): json.loads(p.read_text()) for p in folder.glob("*/*.json")}
    return {name: record for name, record in found.items() if "budget" in record}


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


def completed(grid: Grid, run: Run, record: dict[str, Any]) -> dict[str, Any]:
    """A record with its place's metric and chance, and the budget and cost that the grid states."""
    place = grid.places[run.place]
    known = {"metric": place["metric"], "chance": place["chance"]}
    return record | known | {"budget": grid.budget(run.place), "cost": grid.cost(run)}


def outcome(run: Run, record: Record, seconds: float) -> str:
    """What a run came to, in one line."""
    if record["status"] != "done":
        return f"{run.name}: {record['status']}: {record['reason']}"
    counted = (record["forwards"] + 2 * record["backwards"]) / max(1, record["steps_made"])
    dev = "  ".join(f"{k} {v:.4f}" for k, v in record["dev"].items() if k in ("loss", "accuracy", "f1"))
    return f"{run.name}: dev {dev}  lr {record['lr']:g}  {counted:g} counted of {record['cost']:g} a step  {seconds:.1f} s"


def work(
    grid: Grid,
    cells: Sequence[Cell],
    args: argparse.Namespace,
    records: dict[str, Record],
    *,
    measure: Measure = one.measure,
    complete: Complete = completed,
    line: Line = outcome,
) -> Counter[str]:
    """Make every run that has no record, as soon as its settings are known; how many ended in which way.

    measure: makes a run and its record, in the run's process; complete: adds what the grid knows of it; line: says how it went.
    """
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
                process = one.start(run, args.shared, data, args.records, args.threads, args.start, measure)
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
                records[run.name] = record = complete(grid, run, record)
                path.write_text(json.dumps(record, indent=1) + "\n")
                ended[record["status"]] += 1
                print(line(run, record, time.monotonic() - began), flush=True)


def means(grid: Grid, records: Mapping[str, Record]) -> dict[str, float]:
    """Mean over seeds of the place's metric on the test rows, by place and method; and what is tuned."""
    found: dict[str, list[float]] = {}
    for record in records.values():
        if record["role"] in ("seed", "zero_shot") and record["status"] == "done" and record["place"] in grid.places:
            name = f"{record['place']}_{record['method']}"
            found.setdefault(name, []).append(record["test"][grid.places[record["place"]]["metric"]])
            found[f"{name}_tuned_weights"] = [record["tuned_weights"]]
    return {name: statistics.fmean(values) for name, values in sorted(found.items())}


def arguments(
    doc: str | None, script: str, results: str, more: Callable[[argparse.ArgumentParser], Any] = lambda parser: None
) -> argparse.Namespace:
    """The command line of a study; its grid lies beside its script, its records in results/NAME. more: adds options."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n\n")[0])
    parser.add_argument("--grid", type=Path, default=Path(script).with_suffix(".yaml"), help="what is compared")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the grid's budgets")
    parser.add_argument("--records", type=Path, default=ROOT / "results" / results)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="the folder of models and data")
    parser.add_argument("--only", nargs="*", default=[], help="places, schemes and methods to keep, by name")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--start", choices=("fork", "spawn"), default="fork", help="how a run's process begins; spawn on a GPU")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and end")
    more(parser)
    return parser.parse_args()


def conduct(
    grid: Any,
    args: argparse.Namespace,
    *,
    find: Callable[..., tuple[list[Cell], list[str]]] = available,
    outline: Callable[..., str] = plan,
    prepare: Callable[[int], None] = one.prepare,
    **how: Any,
) -> tuple[list[Cell], list[str], dict[str, Record]] | None:
    """Print the plan and make the runs; (cells, why others are left out, records), or None where only the plan was asked for.

    how: what `work` takes.
    """
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "NUMBA_NUM_THREADS": str(args.threads)}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    records = read_records(args.records)
    cells, reasons = find(grid, args.shared, args.only)
    for reason in reasons:
        print(f"left out: {reason}")
    print(outline(grid, cells, records, args.workers), flush=True)
    if args.dry_run:
        return None
    if args.start == "fork" and any(fresh(run, records) is None for run in grid.stated(records, cells)):
        prepare(args.threads)
    ended = work(grid, cells, args, records, **how)
    gc.unfreeze()
    print("  ".join(f"{status} {count}" for status, count in ended.items()) or "nothing to run")
    return cells, reasons, records
