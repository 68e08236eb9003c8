"""SpIEL beside LoRA, a fixed random mask and full AdamW: quality at equal numbers of tuned weights and equal budgets.

The grid (spiel_quality.yaml) and the runner are those of the zeroth-order study: the learning rate of each cell is searched on
dev rows with as many trials for every method, the chosen one runs with all seeds and reads the test rows once, and every run
is a record; a second start makes only what is missing. Goal: SpIEL-AG at least as good as LoRA at each place, in the
place's own metric: test accuracy, or held-out loss.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _record import emit
from _study import arguments, conduct, means
from _zo_grid import Grid


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
    args = arguments(__doc__, __file__, "spiel")
    grid = Grid.read(args.grid, args.scale)
    made = conduct(grid, args)
    if made is None:
        return
    _, reasons, records = made
    figures = means(grid, records)
    setting = {"grid": args.grid.name, "scale": args.scale, "seeds": grid.raw["seeds"], "left_out": reasons}
    emit("spiel_quality", figures, against(grid, figures), setting)


if __name__ == "__main__":
    main()
