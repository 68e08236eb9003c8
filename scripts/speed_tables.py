"""Write docs/speed_to_accuracy.md from the records in results/speed_to_accuracy (benchmarks/speed_to_accuracy.py makes them).

`--check` compares it with the committed page and ends with 1 if it differs. What stands between the two conclusion marks is
written by hand and kept.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from _speed_run import LATE, interval, ratios, reached
from _study import read_records
from docs import table
from zo_tables import arguments, done, publish

RECORDS = Path(__file__).parents[1] / "results" / "speed_to_accuracy"
HEAD = "<!-- Written by scripts/speed_tables.py from results/speed_to_accuracy; only the conclusions are edited by hand. -->\n"
FITTED = "-fitted"
SHARES = (0.25, 0.5, 1.0)  # of the budget, where losses are shown

Record = Mapping[str, Any]
Cells = dict[tuple[str, str, str], list[Record]]  # place, scheme, method -> its finished final runs, by seed


def read(folder: Path) -> Cells:
    """The final runs of the study."""
    cells: Cells = {}
    for _, r in sorted(read_records(folder).items()):
        if r["role"] == "seed":
            cells.setdefault((r["place"], r["scheme"], r["method"]), []).append(r)
    return {key: sorted(done(records), key=lambda r: r["seed"]) for key, records in cells.items() if done(records)}


def spread(values: Sequence[float], digits: int, times: float = 1.0) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {times * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{times * statistics.mean(values):.{digits}f}{deviation}"


def at(points: Sequence[Mapping[str, float]], share: float) -> Mapping[str, float]:
    """The last point of a curve within a share of its forwards."""
    first, last = points[0]["forwards"], points[-1]["forwards"]
    return [p for p in points if p["forwards"] <= first + share * (last - first) + 1e-9][-1]


def losses(cells: Cells, place: str) -> str:
    """Where each method stands along its budget."""
    rows = []
    for (_, scheme, method), records in sorted(cells.items()):
        if records[0]["place"] != place:
            continue
        curves = [r["curve"] for r in records]
        line = [spread([at(c, share)["loss"] for c in curves], 4) for share in (0.0, *SHARES)]
        points = spread([c[-1]["accuracy"] for c in curves], 1, 100.0)
        rate = records[0]["used"]["lr"]
        used = (f"{curves[0][-1]['forwards']:.0f}", f"{statistics.median(r['cpu_seconds'] for r in records):.0f}")
        rows.append((statistics.mean(c[-1]["loss"] for c in curves), (method, scheme, f"{rate:g}", *line, points, *used)))
    shares = (f"{100 * share:.0f} %" for share in SHARES)
    head = ("method", "scheme", "rate", "dev loss at the start", *shares, "accuracy", "example-forwards", "s")
    return table(head, [row for _, row in sorted(rows)])


def pairs(cells: Cells) -> str:
    """auto against the searched MeZO."""
    rows = []
    for place in dict.fromkeys(key[0] for key in sorted(cells)):
        mezo, ours = ({r["seed"]: r for r in cells.get((place, "full", m), [])} for m in ("zo_sgd", "auto"))
        found = ratios(ours, mezo)
        if not found:
            continue
        mean, low, high = interval(found)
        start = "same fitted head" if place.endswith(FITTED) else "cold"
        each = " ".join("late" if ratio == LATE else f"{ratio:.2f}" for ratio in found)
        left = len(mezo.keys() & ours.keys()) - len(found)
        rows.append((place.removesuffix(FITTED), start, f"{mean:.2f}", f"{low:.2f} to {high:.2f}", each, str(left)))
    return table(("task", "start", "auto over MeZO", "95 % interval", "seeds", "left out"), rows) if rows else ""


def reach(cells: Cells, place: str, loss: float) -> str:
    """Forwards of each method to a dev loss, where most seeds reach it."""
    rows = []
    for (_, scheme, method), records in sorted(cells.items()):
        found = [reached(r["curve"], "forwards", "loss", loss) for r in records if r["place"] == place]
        hits = sorted(f for f in found if f is not None)
        if 2 * len(hits) > len(found):
            rows.append(
                (statistics.median(hits), (method, scheme, f"{statistics.median(hits):.0f}", f"{len(hits)}/{len(found)}"))
            )
    return table(("method", "scheme", "example-forwards", "seeds"), [row for _, row in sorted(rows)]) if rows else ""


def page(cells: Cells) -> str:
    """docs/speed_to_accuracy.md."""
    text = f"""# Speed to accuracy

Dev loss (nats, 160 rows) and accuracy (points) against example-forwards; a forward and a back-propagation count three, with
recomputation four. Mean ± standard deviation over seeds. Every method with a rate was searched with the same trials on seed
0; `auto` brings its rate. zo_sgd is MeZO: Gaussian, normalised. `benchmarks/speed_to_accuracy.py` says more.

## auto against a searched MeZO

Forwards of auto to the dev loss at which MeZO of the same seed ends, over all of MeZO's; late: not reached, counted {LATE:g}.
Left out: seeds in which MeZO ended no lower than it began.

{pairs(cells)}"""
    for place in dict.fromkeys(key[0] for key in sorted(cells)):
        text += f"\n## {place}\n\n{losses(cells, place)}"
        mezo = cells.get((place, "full", "zo_sgd"))
        if mezo is not None:
            end = statistics.mean(r["curve"][-1]["loss"] for r in mezo)
            text += f"\nForwards to {end:.4f}, where MeZO ends in the mean:\n\n{reach(cells, place, end)}"
    return text


def pages(folder: Path) -> dict[str, str]:
    """Name -> text; nothing without records."""
    cells = read(folder)
    return {"speed_to_accuracy.md": page(cells)} if cells else {}


def main(given: Sequence[str] | None = None) -> int:
    """0 if the page is written or current, 1 if `--check` finds a difference."""
    args = arguments(__doc__, RECORDS, given)
    return publish(pages(args.records), args.docs, args.check, HEAD)


if __name__ == "__main__":
    sys.exit(main())
