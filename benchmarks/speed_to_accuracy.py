"""Forwards and seconds to reach fixed dev losses and accuracies, for every method of a grid; `auto` against a searched MeZO.

    python benchmarks/speed_to_accuracy.py --dry-run     what would run, and for how long
    python benchmarks/speed_to_accuracy.py               run it, or go on with it; finished runs are skipped

Protocol. A run may spend its place's budget of example-forwards, whatever its method; a forward and a back-propagation count
three. The same number of trials on seed 0 for every method that is searched, the lowest dev loss wins; `auto` and the
readout are not searched. Final runs are evaluated on the dev rows at fixed points, outside their time and cost; test rows are
not read. Runs of one seed and place start from the same weights and see the same rows in the same order.

Places whose name ends in -fitted start from a head fitted in closed form (head_start: readout), the others cold; both MeZO
(zo_sgd, Gaussian, normalised) and auto run there, so that auto_over_mezo_same_start says what is left of the lead when both
have the head. A ratio is auto's forwards to the loss at which MeZO of that seed ends, over all of MeZO's; LATE where auto does
not get there. Its mean, and low and high of the 95 % bootstrap over seeds; seeds in which MeZO's loss rose are not counted,
and said. The figures without a place are means over places, `_worst_high` the largest upper end.

A record is one JSON file, PLACE/SCHEME-METHOD-ROLE-N.json: settings as in zo_bench.py, `used` (method, rate, options as
resolved), status, before, dev, counts, seconds, cpu_seconds, peak_bytes, cost, and curve: step, forwards, seconds,
cpu_seconds, loss, accuracy from the start to the end.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import _speed_run as speed
import _study
from _record import emit
from _speed_run import SpeedGrid
from _study import arguments, conduct
from _zo_grid import Cell, Record, Run, fresh

GOALS: dict[str, tuple[str, float]] = {"auto_over_mezo_same_start_worst_high": ("<=", 0.5)}  # the stretch is 1/3
FITTED = "-fitted"


def available(grid: SpeedGrid, shared: Path, only: Sequence[str]) -> tuple[list[Cell], list[str]]:
    """The cells that can run here, and why the others cannot; `auto` is no module of a method."""
    known = dict(grid.methods)
    try:
        grid.raw["methods"] = {name: m | ({"method": "zo_sgd"} if name == "auto" else {}) for name, m in known.items()}
        return _study.available(grid, shared, only)
    finally:
        grid.raw["methods"] = known


def plan(grid: SpeedGrid, cells: Sequence[Cell], records: Mapping[str, Record], workers: int) -> str:
    """The plan as text: per place its cells, runs still to be made and minutes; runs whose rate is open count too."""
    lines, total = [], 0.0
    for place in dict.fromkeys(cell[0] for cell in cells):
        mine, runs, trials = [cell for cell in cells if cell[0] == place], {}, 0.0
        for cell in mine:
            runs |= {run.name: run for run in grid.stated(records, [cell])}
            if grid.searched(cell[2]) and grid.chosen(cell, records) is None:
                middle = grid.centre(cell)
                runs |= {run.name: run for run in grid.finals(cell, middle)}
                known = grid.search(cell, records)
                open_trials = grid.raw["search"]["trials"] + grid.raw["search"]["more"] - len(known)
                trials += open_trials * grid.seconds(known[0])
        left = [run for run in runs.values() if fresh(run, records) is None]
        seconds = trials + sum(grid.seconds(run) for run in left)
        total += seconds
        lines.append(
            f"{place}: {len(mine)} cells, budget {grid.budget(place):.0f} example-forwards a run, {len(left)} of {len(runs)} "
            f"known runs to make, about {seconds / 60 / workers:.0f} min with {workers} workers"
        )
    return "\n".join([*lines, f"in all about {total / 60 / workers:.0f} min"])


def priced(grid: SpeedGrid, run: Run, record: dict[str, Any]) -> dict[str, Any]:
    """A record with its costs: example-forwards of every point of its curve, by the grid's price of a step."""
    before, price = grid.before(run.cell), grid.cost(run) * run.settings["batch"]
    for point in record.get("curve", ()):
        point["forwards"] = before + point["step"] * price
    return record | {"budget": grid.budget(run.place), "cost": grid.cost(run), "spent_before": before}


def line(run: Run, record: Record, seconds: float) -> str:
    """What a run came to, in one line."""
    if record["status"] != "done":
        return f"{run.name}: {record['status']}: {record['reason']}"
    first, last = record["curve"][0], record["curve"][-1]
    counted = (record["forwards"] - record["fit_forwards"] + 2 * record["backwards"]) / max(1, record["steps_made"])
    return (
        f"{run.name}: loss {first['loss']:.4f} -> {last['loss']:.4f}, {last['forwards']:.0f} forwards, lr "
        f"{record['used']['lr']:g}, {counted:g} counted of {record['cost']:g} a step, {seconds:.1f} s"
    )


def finals(grid: SpeedGrid, cell: Cell, records: Mapping[str, Record]) -> dict[int, Record]:
    """The finished final runs of a cell, by seed."""
    known = (run for run in grid.stated(records, [cell]) if run.role == "seed")
    found = {run.seed: fresh(run, records) for run in known}
    return {seed: record for seed, record in found.items() if record is not None and record["status"] == "done"}


def prices(grid: SpeedGrid, cells: Sequence[Cell], records: Mapping[str, Record]) -> dict[str, float]:
    """For every cell and target, the median over seeds of forwards and processor seconds to reach it; the median loss at
    the end. A seed that does not reach it counts LATE times its run, and the figure is left out where most do not."""
    figures: dict[str, float] = {}
    for cell in cells:
        runs = [r["curve"] for r in finals(grid, cell, records).values()]
        if not runs:
            continue
        name = "_".join(cell)
        figures[f"{name}_loss"] = statistics.median(points[-1]["loss"] for points in runs)
        for measure, targets in grid.places[cell[0]]["targets"].items():
            for target in targets:
                hits = [speed.reached(points, "forwards", measure, target) is not None for points in runs]
                if 2 * sum(hits) <= len(hits):
                    continue
                for axis in ("forwards", "cpu_seconds"):
                    took = [speed.penalised(points, axis, measure, target) for points in runs]
                    figures[f"{name}_{axis}_to_{measure}_{target:g}"] = statistics.median(took)
    return figures


def comparison(grid: SpeedGrid, cells: Sequence[Cell], records: Mapping[str, Record]) -> dict[str, float]:
    """The ratios of auto to MeZO, per place and together, cold and from the same fitted start."""
    figures: dict[str, float] = {}
    together: dict[str, list[tuple[float, float]]] = {}
    for place in dict.fromkeys(cell[0] for cell in cells):
        mezo, ours = (finals(grid, (place, "full", method), records) for method in ("zo_sgd", "auto"))
        found = speed.ratios(ours, mezo) if ours and mezo else []
        start = "same_start" if place.endswith(FITTED) else "cold"
        if not found:
            continue
        for seed in mezo.keys() & ours.keys():
            same = mezo[seed]["curve"][0]["loss"] == ours[seed]["curve"][0]["loss"]
            assert same, f"{place}, seed {seed}: MeZO and auto start from other weights"
        mean, low, high = speed.interval(found)
        name = f"auto_over_mezo_{start}_{place.removesuffix(FITTED)}"
        figures |= {name: mean, f"{name}_low": low, f"{name}_high": high, f"{name}_seeds": len(found)}
        together.setdefault(start, []).append((mean, high))
    for start, pairs in together.items():
        figures[f"auto_over_mezo_{start}"] = statistics.fmean(mean for mean, _ in pairs)
        figures[f"auto_over_mezo_{start}_worst_high"] = max(high for _, high in pairs)
    return figures


def main() -> None:
    args = arguments(__doc__, __file__, "speed_to_accuracy")
    grid = SpeedGrid.read(args.grid, args.scale)
    own = {"find": available, "outline": plan, "prepare": speed.prepare}
    made = conduct(grid, args, **own, measure=speed.measure, complete=priced, line=line)
    if made is None:
        return
    cells, reasons, records = made
    figures = comparison(grid, cells, records) | prices(grid, cells, records)
    goals = {key: goal for key, goal in GOALS.items() if key in figures}
    setting = {"grid": args.grid.name, "scale": args.scale, "late": speed.LATE, "left_out": reasons}
    emit("speed_to_accuracy", figures, goals, setting)


if __name__ == "__main__":
    main()
