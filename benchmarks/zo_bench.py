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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _record import emit
from _study import arguments, conduct
from _zo_grid import Grid, Record


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
    args = arguments(__doc__, __file__, "zo_bench")
    grid = Grid.read(args.grid, args.scale)
    made = conduct(grid, args)
    if made is None:
        return
    _, reasons, records = made
    setting = {"grid": args.grid.name, "scale": args.scale, "seeds": grid.raw["seeds"], "left_out": reasons}
    emit("zo_bench", figures(grid, records), {}, setting)


if __name__ == "__main__":
    main()
