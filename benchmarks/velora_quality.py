"""VeLoRA beside what it is made of and what it competes with: quality, peak memory and time at equal budgets.

The grid (velora_quality.yaml) and the runner are those of the zeroth-order study: the learning rate of each cell is searched on
dev rows with as many trials for every method, the chosen one runs with all seeds and reads the test rows once, and every run
is a record; a second start makes only what is missing. Ablations take the rate of the cell that they vary. Goal: VeLoRA not
below what it compresses by more than two standard errors over seeds, at each place.

Runs give tensors of a megabyte and more back to the system at once: glibc would keep holes between them, which no method needs.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import _zo_run as one
from _record import emit
from _study import arguments, conduct, means
from _zo_grid import Grid, Record

PAIRS = {"velora": "adamw", "velora_vd": "adamw", "lora_velora": "lora", "qlora_velora": "qlora"}  # and what each compresses


def prepare(threads: int) -> None:
    """As for every study, with a heap that holds no large tensors."""
    from smidgen import memory

    memory.release_at(1 << 20)
    one.prepare(threads)


def against(
    grid: Grid, records: Mapping[str, Record], figures: dict[str, float], pairs: Mapping[str, str] = PAIRS
) -> dict[str, tuple[str, float]]:
    """Add by how much each pair's first is better, in standard errors over seeds as well, and its memory and time over the
    second's; the goal is not to be two errors worse."""
    goals: dict[str, tuple[str, float]] = {}
    for place, p in grid.places.items():
        cells: dict[str, list[Record]] = {}
        for r in records.values():
            if r["place"] == place and r["role"] == "seed" and r["status"] == "done":
                cells.setdefault(r["method"], []).append(r)
        for first, second in pairs.items():
            ours, theirs = (cells.get(method, []) for method in (first, second))
            if min(len(ours), len(theirs)) < 2:
                continue
            a, b = ([r["test"][p["metric"]] for r in side] for side in (ours, theirs))
            better = (statistics.fmean(a) - statistics.fmean(b)) * (-1 if p["metric"] in ("loss", "perplexity") else 1)
            error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
            name = f"{place}_{first}_over_{second}"
            figures[name] = better
            figures[f"{name}_errors"] = better / max(error, 1e-9)
            for key in ("peak_bytes", "cpu_seconds"):
                x, y = (statistics.median(r[key] for r in side) for side in (ours, theirs))
                figures[f"{name}_{key}"] = x / y
            goals[f"{name}_errors"] = (">=", -2.0)
    return goals


def main() -> None:
    args = arguments(__doc__, __file__, "velora")
    grid = Grid.read(args.grid, args.scale)
    made = conduct(grid, args, prepare=prepare)
    if made is None:
        return
    _, reasons, records = made
    figures = means(grid, records)
    setting = {"grid": args.grid.name, "scale": args.scale, "seeds": grid.raw["seeds"], "left_out": reasons}
    emit("velora_quality", figures, against(grid, records, figures), setting)


if __name__ == "__main__":
    main()
