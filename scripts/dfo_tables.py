"""Write docs/dfo_lora.md from the records in results/dfo_lora (benchmarks/dfo_lora.py makes them).

`--check` compares the page with the committed one. What stands between its two conclusion marks is written by hand and kept.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from docs import table
from zo_tables import ERRORS, MIB, ROOT, arguments, done, error, median, percent, publish

RECORDS = ROOT / "results" / "dfo_lora"
HEAD = "<!-- Written by scripts/dfo_tables.py from results/dfo_lora; only the conclusions are edited by hand. -->\n"

Record = Mapping[str, Any]


def read(folder: Path) -> tuple[dict[tuple[str, str], list[Record]], dict[str, list[Record]]]:
    """The draws of every cell (task, method), and the trials of every method."""
    cells: dict[tuple[str, str], list[Record]] = {}
    trials: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*/*.json")):
        r = json.loads(path.read_text())
        if r["role"] == "seed":
            cells.setdefault((r["place"], r["method"]), []).append(r)
        else:
            trials.setdefault(r["method"], []).append(r)
    return cells, trials


def scores(records: Sequence[Record], split: str) -> list[float]:
    """The metric of each draw at its best look."""
    return [r["best"][split][r["metric"]] for r in records]


def signal(records: Sequence[Record]) -> bool:
    """Whether the mean over draws exceeds the untrained model, chance and the commonest label by two standard errors of the
    test rows."""
    first, mean = records[0], statistics.mean(scores(records, "test"))
    untrained = statistics.mean(r["before"][r["metric"]] for r in records)
    floor = max(untrained, first["chance"], first["majority"] or 0.0)
    return mean > floor + ERRORS * error(mean, first["settings"]["values"]["test_rows"])


def cell(records: Sequence[Record]) -> str:
    """A cell of the main table."""
    ended = done(records)
    if not ended:
        return records[0]["status"] if records else "-"
    text = percent(scores(ended, "test"))
    return text if signal(ended) else f"({text})"


def ordered(records: Mapping[tuple[str, str], Any], at: int) -> list[str]:
    """Tasks or methods, in the order of the study's grid."""
    order = [
        ["sst2", "ag_news", "yelp", "dbpedia", "mrpc", "snli"],
        ["cma_es_reference", "cma_es", "fireworks", "bbt", "bbtv2", "lora_adamw", "prompt_adamw", "readout"],
    ][at]
    return sorted({key[at] for key in records}, key=lambda name: (order.index(name) if name in order else len(order), name))


def costs(cells: Mapping[tuple[str, str], list[Record]], task: str) -> str:
    """What the methods cost on one task, medians over draws."""
    rows = []
    for method in ordered(cells, 1):
        ended = done(cells.get((task, method), []))
        if ended:
            lr = ended[0]["settings"]["lr"]
            row = [method, "as published" if lr is None else f"{lr:g}", percent([r["before"][r["metric"]] for r in ended])]
            row += [percent(scores(ended, "dev")), f"{median(ended, 'forwards'):g}", f"{median(ended, 'backwards'):g}"]
            row += [f"{statistics.median(r['best']['forwards'] for r in ended):g}", f"{median(ended, 'evaluation_forwards'):g}"]
            row += [f"{median(ended, 'peak_bytes') / MIB:.0f}", f"{median(ended, 'cpu_seconds'):.1f}"]
            rows.append((*row, f"{median(ended, 'tuned_weights'):,.0f}"))
    head = ("method", "step size", "dev untrained", "dev best", "forwards", "backwards", "forwards to best dev",
            "evaluation forwards", "peak MiB", "CPU s", "tuned weights")  # fmt: skip
    return table(head, rows)


def page(folder: Path) -> str | None:
    """The text of the page, None without records."""
    cells, trials = read(folder)
    if not cells:
        return None
    draws = sorted({r["seed"] for records in cells.values() for r in records})
    some = next(r for records in cells.values() for r in done(records))
    model, values = some["model"], some["settings"]["values"]
    about = (
        f"a masked LM of {model['weights']:,} weights ({model['layers']} layers of {model['hidden']}, pre-trained for "
        f"{model['steps']} steps of {model['batch']} texts to a perplexity of {model['perplexity']:.0f})"
        if isinstance(model, dict)
        else str(model)
    )
    tasks = ordered(cells, 0)
    rows = [(method, *(cell(cells.get((task, method), [])) for task in tasks)) for method in ordered(cells, 1)]
    guess = [(f"{100 * max(r['chance'], r['majority'] or 0):.1f}") for r in (next(iter(cells[k])) for k in
             (next(key for key in cells if key[0] == task) for task in tasks))]  # fmt: skip
    rows.append(("chance or commonest label", *guess))
    searched = [
        (method, *(f"{lr:g}: {percent(found)}" for lr, found in sorted(by_rate(records).items())))
        for method, records in sorted(trials.items())
    ]
    text = f"""# Derivative-free LoRA at k = {values["k_shot"]}

Test accuracy in points at the best look at the dev split, mean ± standard deviation over draws
{", ".join(map(str, draws))} of the training and dev rows, on {about}.
In parentheses where there is no signal: the mean does not exceed the untrained model, chance and the commonest label, whichever
is best, by two standard errors of the {values["test_rows"]} test rows.
`benchmarks/dfo_lora.py` describes the protocol and the records, `benchmarks/dfo_lora.yaml` the grid and how its size was
chosen.

{table(("method", *tasks), rows)}"""
    if searched:
        width = max(map(len, searched))
        text += "\n## Step sizes tried\n\nBest dev accuracy, mean over the search's tasks, ± their spread.\n\n"
        text += table(("method", *[""] * (width - 1)), [(*row, *[""] * (width - len(row))) for row in searched])
    for task in tasks:
        text += f"\n## {task}\n\nMedians over draws; dev accuracies are means.\n\n{costs(cells, task)}"
    return text


def by_rate(records: Sequence[Record]) -> dict[float, list[float]]:
    """Best dev figures of the trials at each step size."""
    found: dict[float, list[float]] = {}
    for r in done(records):
        found.setdefault(r["settings"]["lr"], []).append(r["best"]["dev"][r["metric"]])
    return found


def main(given: Sequence[str] | None = None) -> int:
    """0 if the page is written or current, 1 if `--check` finds a difference."""
    args = arguments(__doc__, RECORDS, given)
    text = page(args.records)
    return 0 if text is None else publish({"dfo_lora.md": text}, args.docs, args.check, HEAD)


if __name__ == "__main__":
    sys.exit(main())
