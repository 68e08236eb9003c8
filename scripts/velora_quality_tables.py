"""Write docs/velora.md from the records in results/velora (benchmarks/velora_quality.py makes them) and results/bench.

`--check` compares it with the committed page and ends with 1 if it differs. What stands between the two conclusion marks is
written by hand and kept.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from docs import table
from zo_tables import MIB, Cells, Record, arguments, compared, done, median, places_of, publish, read, scores

ROOT = Path(__file__).parents[1]
GRID = ROOT / "benchmarks" / "velora_quality.yaml"
RECORDS, STEP = ROOT / "results" / "velora", ROOT / "results" / "bench" / "velora_step.json"
HEAD = "<!-- Written by scripts/velora_quality_tables.py from results/velora; only the conclusions are edited by hand. -->\n"
# What each compresses, which is what it is compared with.
COMPRESSES = {"velora": "adamw", "velora_vd": "adamw", "lora_velora": "lora", "qlora_velora": "qlora"}
SPEC = (
    "adamw: full fine-tuning without the embeddings; velora: the same with the inputs of all linear layers compressed (32 "
    "groups), and compressed AdamW; velora_vd: value and down projections alone, as published; sinkgd: no optimizer state, "
    "updated in the backward; lora: rank 8 in all linear layers; qlora: over nf4 weights."
)


def metric(records: Sequence[Record]) -> str:
    """Mean and deviation over seeds of the test metric: points of accuracy, or nats."""
    values, loss = scores(records), records[0]["metric"] == "loss"
    factor, digits = (1, 3) if loss else (100, 1)
    text = f"{factor * statistics.mean(values):.{digits}f}"
    return text + (f" ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def line(cells: Cells, place: str, scheme: str, method: str) -> tuple[str, ...]:
    """One method of a place."""
    ended = done(cells[place, scheme, method, "seed"])
    first = ended[0]
    rates = [t["lr"] for t in cells.get((place, scheme, method, "search"), [])]
    edge = "*" if first["lr"] in rates[:1] + rates[-1:] else ""
    other = COMPRESSES.get(method)
    theirs = done(cells.get((place, scheme, other, "seed"), [])) if other else []
    verdict = f"{compared(scores(ended), scores(theirs))} {other}" if theirs else ""
    memory = (f"{median(ended, key) / MIB:.{digits}f}" for key, digits in (("peak_bytes", 0), ("state_bytes", 2)))
    return (method, metric(ended), verdict, *memory, f"{median(ended, 'cpu_seconds'):.0f}", f"{first['lr']:g}{edge}")


def place_text(cells: Cells, place: str) -> str:
    """The methods of a place, and its ablations."""
    found = {key[1:3]: records for key, records in cells.items() if key[0] == place and key[3] == "seed" and done(records)}
    if not found:
        return ""
    first = done(next(iter(found.values())))[0]
    searched = {(scheme, method) for p, scheme, method, role in cells if p == place and role == "search"}
    rows = first["rows"]
    unit = "nats, lower is better" if first["metric"] == "loss" else "points"
    majority = "" if first["majority"] is None else f", commonest label {100 * first['majority']:.1f}"
    text = (
        f"\n## {place}\n\n{first['task']}: {rows['train']} training, {rows['validation']} dev and {rows['test']} test rows; "
        f"test {first['metric']} in {unit}{majority}; {first['steps']} updates of {first['batch']} rows.\n\n"
    )
    head = ("method", "test", "against what it compresses", "peak MiB", "state MiB", "s", "rate")
    text += table(head, [line(cells, place, *key) for key in found if key in searched])
    own = [key for key in found if key not in searched]
    if own:
        text += "\nAblation, at the rate of velora:\n\n" + table(head, [line(cells, place, *key) for key in own])
    return text


def step_text(record: Record) -> str:
    """benchmarks/velora_step.py: the step, side by side."""
    f = record["figures"]
    sides = [key.removesuffix("_peak_mib") for key in f if key.endswith("_peak_mib") and not key.endswith("_usual_peak_mib")]
    rows = []
    for side in sides:
        parts = (f"{f[f'{side}_{part}_mib']:.0f}" for part in ("peak", "gradient", "state", "saved"))
        ratios = (f.get(f"{'lora_' if side.startswith('lora') else ''}velora_{over}{side}") for over in ("over_", "peak_over_"))
        rows.append((side, *parts, *("" if r is None else f"{r:.2f}" for r in ratios)))
    s = record["setting"]
    head = ("side", "peak MiB", "gradient", "state", "saved", "time: VeLoRA over it", "peak: VeLoRA over it")
    return (
        f"\n## A step, side by side\n\n{s['model']}, {s['dtype']}, {s['rows']} x {s['length']} tokens, {s['threads']} threads, "
        f"embedding {s['embedding']}; peaks are over the loaded weights. `benchmarks/velora_step.py` describes the sides.\n\n"
        + table(head, rows)
    )


def pages(folder: Path) -> dict[str, str]:
    """Name -> text; nothing without records."""
    wanted = yaml.safe_load(GRID.read_text())["places"]  # the folder holds other studies too
    cells = {key: records for key, records in read(folder).items() if key[0] in wanted}
    if not cells and not STEP.exists():
        return {}
    text = f"""# VeLoRA beside what it compresses

Mean ± standard deviation over three seeds on the test rows; the rate was searched with as many trials for every method (* at
the edge of those tried). {SPEC} Told apart: by two standard errors over seeds. Peaks are those of
the run's process over its libraries, weights included; `benchmarks/velora_quality.yaml` is the grid.
"""
    for place in places_of(cells):
        text += place_text(cells, place)
    return {"velora.md": text + (step_text(json.loads(STEP.read_text())) if STEP.exists() else "")}


def main(given: Sequence[str] | None = None) -> int:
    """0 if the page is written or current, 1 if `--check` finds a difference."""
    args = arguments(__doc__, RECORDS, given)
    return publish(pages(args.records), args.docs, args.check, HEAD)


if __name__ == "__main__":
    sys.exit(main())
