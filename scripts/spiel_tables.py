"""Write docs/spiel.md: SpIEL's quality from results/spiel, its speed and memory from results/bench.

`python scripts/spiel_tables.py` writes it, `--check` compares it with the committed one and ends with 1 if it differs. What
stands between the two conclusion marks is written by hand and kept. Records that are not there leave their part out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from docs import table
from zo_tables import MIB, Cells, Record, compared, done, median, percent, places_of, publish, read, scores, spread

ROOT = Path(__file__).parents[1]
HEAD = "<!-- Written by scripts/spiel_tables.py from results; only the conclusions are edited by hand. -->\n"
NAMES = {  # the study's labels, in the order of rows
    "spiel_ag": "SpIEL-AG",
    "spiel_ma": "SpIEL-MA",
    "ag_once": "SpIEL-AG, one selection",
    "ag_fifth": "SpIEL-AG, a fifth at the first, too",
    "ag_long": "SpIEL-AG, a fifth, long phases",
    "qspiel": "SpIEL-AG on nf4",
    "lora": "LoRA",
    "random_mask": "fixed random mask",
    "adamw": "AdamW, all weights",
}
ALPACA = "stories-alpaca"
STATES = (  # optimiser, base, side of spiel_step, label of the study
    ("AdamW", "float32", "spiel_ag", "spiel_ag"),
    ("8-bit AdamW", "float32", "spiel_8bit", "spiel_8bit"),
    ("SM3", "float32", "spiel_ma", "spiel_ma"),
    ("AdamW", "nf4", "qspiel_ag", "qspiel"),
    ("8-bit AdamW", "nf4", "qspiel_8bit", "qspiel_8bit"),
    ("SM3", "nf4", "qspiel_ma", "qspiel_ma"),
)
WAYS = ("gathered", "sampled")


def of(cells: Cells, place: str, method: str, role: str = "seed") -> list[Record]:
    """The runs of a method at a place that came to an end."""
    found = [records for (p, _, m, r), records in cells.items() if (p, m, r) == (place, method, role)]
    return done(found[0]) if found else []


def number(records: Sequence[Record]) -> str:
    """Mean and spread of the place's metric on the test rows: points, or nats."""
    values = scores(records)
    if records[0]["metric"] != "loss":
        return percent(values)
    deviation = spread(values)
    return f"{statistics.mean(values):.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def quality(cells: Cells) -> str:
    """A table a place, and who is better than LoRA there."""
    text = ""
    for place in places_of(cells):
        first = next(r for key, records in sorted(cells.items()) if key[0] == place for r in done(records))
        rows, said = [], []
        if untrained := of(cells, place, "zero_shot", "zero_shot"):
            rows.append(["untrained", "", "", number(untrained), f"{untrained[0]['dev']['loss']:.4f}", "", ""])
        lora = of(cells, place, "lora")
        for method, name in NAMES.items():
            if not (records := of(cells, place, method)):
                continue
            rates = [t["lr"] for t in of(cells, place, method, "search")]
            edge = "*" if rates and records[0]["lr"] in (min(rates), max(rates)) else ""
            dev = statistics.mean(r["dev"]["loss"] for r in records)
            used = f"{median(records, 'cpu_seconds'):.0f}", f"{median(records, 'peak_bytes') / MIB:.0f}"
            tuned = f"{records[0]['tuned_weights']:,}"
            rows.append([name, tuned, f"{records[0]['lr']:g}{edge}", number(records), f"{dev:.4f}", *used])
            if lora and method != "lora":
                verdict = compared(scores(records), scores(lora)).removesuffix(" from")
                said.append(f"{name} {verdict}")
        rows_of = first["rows"]
        text += (
            f"\n## {place}\n\n{first['model'].rpartition('/')[2].rpartition(':')[2]}, {first['task']}: {rows_of['train']} "
            f"training, {rows_of['validation']} dev and {rows_of['test']} test rows; batch {first['batch']}, "
            f"{first['budget']:.0f} example-forwards a run. Test: {first['metric']}"
            f"{' in nats a token' if first['metric'] == 'loss' else ' in points'}, mean ± standard deviation over seeds.\n\n"
        )
        text += table(("method", "tuned weights", "rate", "test", "dev loss", "s", "peak MiB"), rows)
        if said:
            text += f"\nAgainst LoRA's {first['metric']}, by two standard errors over seeds: {'; '.join(said)}.\n"
    return text


def states(cells: Cells, step: dict[str, Any]) -> str:
    """Peak, step time and held-out loss by optimiser and base."""
    figures, rows = step["figures"], []
    for optimiser, base, side, label in STATES:
        records = of(cells, ALPACA, label)
        loss = number(records) if records else "-"
        rows.append((optimiser, base, f"{figures[f'{side}_peak_mib']:.0f}", f"{figures[f'{side}_seconds']:.2f}", loss))
    others = [
        (name, base, f"{figures[f'{side}_peak_mib']:.0f}", f"{figures[f'{side}_seconds']:.2f}", "")
        for name, base, side in (
            ("LoRA (peft)", "float32", "lora"),
            ("LoRA (peft), dropout 0.1", "float32", "lora_dropout"),
            ("SHIRA (peft)", "float32", "shira"),
            ("SUPERTUNING (peft)", "float32", "supertuning"),
            ("LoRA (peft)", "nf4", "qlora"),
            ("SpIEL-AG in a run", "float32", "spiel_run"),
            ("LoRA in a run", "float32", "lora_run"),
        )
    ]
    setting = step["setting"]
    head = ("optimiser of the deltas", "base", "peak MiB", "s a step", "held-out loss")
    ratios = [(name, f"{figures[name]:.3f}", *_goal(step, name)) for name in figures if "_over_" in name]
    return (
        f"\n## Step and memory\n\nA random Llama ({setting['model']}), batch 4 x 128, {setting['threads']} threads, "
        f"{setting['cpu']}; the model's own loss on all sides but those in a run, whose logits come in blocks. Peak: over the "
        f"loaded base, through a phase and its selection. Held-out loss: {ALPACA}.\n\n{table(head, [*rows, *others])}\n"
        f"{table(('ratio', 'measured', 'goal', 'met'), ratios)}"
    )


def _goal(record: dict[str, Any], name: str) -> tuple[str, str]:
    if name not in record["goals"]:
        return "", ""
    sign, bound = record["goals"][name]
    return f"{sign} {bound:g}", "yes" if record["met"][name] else "no"


def crossing(record: dict[str, Any]) -> str:
    """Time of the ways to some entries of a gradient, by shape and tokens over densities."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for key, value in record["figures"].items():
        shape, *rest = key.split("_")
        if len(rest) == 6 and rest[-1] in WAYS:
            found.setdefault((shape, rest[0], rest[-1]), {})[int(rest[2])] = value
    densities = sorted({d for values in found.values() for d in values})
    rows = [(*key, *(f"{values[d]:.2f}" if d in values else "-" for d in densities)) for key, values in found.items()]
    figures = record["figures"]
    return (
        "\n## Some entries of a gradient\n\nTime over that of the dense product and a gather, by density in per mille; "
        f"float32, {record['setting']['threads']} threads.\n\n{table(('layer', 'tokens', 'way', *map(str, densities)), rows)}\n"
        f"Sampling is the quickest way in the median up to {figures['crossover_per_mille']:g} per mille; what the code takes "
        f"costs at most {figures['products_over_best']:.2f} of the best way.\n"
    )


def page(records: Path, bench: Path) -> str:
    """docs/spiel.md."""
    cells = read(records)
    text = """# SpIEL beside LoRA, fixed masks and all weights

Equal numbers of tuned weights (those of a LoRA of rank 8; AdamW tunes all), the same search of the rate for every method, the
same budget. `benchmarks/spiel_quality.py` with its grid, `spiel_step.py` and `sparse_gradient.py` describe what is measured;
* marks a rate at the edge of those tried.
"""
    text += quality(cells)
    makers = {"spiel_step": lambda record: states(cells, record), "sparse_gradient": crossing}
    for name, make in makers.items():
        path = bench / f"{name}.json"
        text += make(json.loads(path.read_text())) if path.exists() else ""
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if the page is written or current, 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; show how the committed page differs")
    parser.add_argument("--records", type=Path, default=ROOT / "results" / "spiel")
    parser.add_argument("--bench", type=Path, default=ROOT / "results" / "bench")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args(arguments)
    return publish({"spiel.md": page(args.records, args.bench)}, args.docs, args.check, HEAD)


if __name__ == "__main__":
    sys.exit(main())
