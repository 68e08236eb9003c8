"""Write docs/velora_transfer.md: VeLoRA on a vision transformer and in pre-training, from the records in results/velora.

benchmarks/velora_transfer.py and velora_pretrain.py make the records. `--check` compares the page with the committed one and
ends with 1 if it differs. What stands between the two conclusion marks is written by hand and kept.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from docs import table
from zo_tables import MIB, ROOT, Cells, arguments, done, median, publish, read, scores, spread

HEAD = "<!-- Written by scripts/transfer_tables.py from results/velora; only the conclusions are edited by hand. -->\n"
RECORDS = ROOT / "results" / "velora"

Record = Mapping[str, Any]


def own(cells: Cells, place: str, role: str = "seed") -> dict[str, list[Record]]:
    """Runs of a place that came to an end, by method, in the order of the page."""
    found: dict[str, list[Record]] = {}
    for (where, _, method, which), records in cells.items():
        if where == place and which == role and done(records):
            found[method] = done(records)
    return dict(sorted(found.items(), key=lambda item: _ORDER.index(item[0]) if item[0] in _ORDER else len(_ORDER)))


_ORDER = [
    "full", "full_velora", "velora", "velora_vd", "galore", "sinkgd", "probe", "probe_velora", "ssf", "ssf_velora", "hydra",
    "hydra_velora", "lora", "lora_velora",
]  # fmt: skip


def score(values: Sequence[float], digits: int, factor: float = 1.0) -> str:
    """Mean and standard deviation over seeds."""
    deviation = spread(values)
    mean = f"{factor * statistics.mean(values):.{digits}f}"
    return mean if deviation is None else f"{mean} ± {factor * deviation:.{digits}f}"


def costs(records: Sequence[Record]) -> list[str]:
    """Tuned weights, bytes and time of a cell, medians over seeds."""
    step = median(records, "cpu_seconds") / records[0]["steps_made"]
    bytes_ = [f"{median(records, key) / MIB:.1f}" for key in ("state_bytes", "saved_bytes", "peak_bytes")]
    return [f"{records[0]['tuned_weights']:,}", *bytes_, f"{1000 * step:.0f}"]


COSTS = ("tuned weights", "state MiB", "saved MiB", "peak MiB", "CPU ms a step")


def vision(cells: Cells) -> str:
    found = own(cells, "digits")
    if not found:
        return ""
    first = next(iter(found.values()))[0]
    rows = [(name, f"{r[0]['lr']:g}", score(scores(r), 1, 100), *costs(r)) for name, r in found.items()]
    zero = own(cells, "digits", "zero_shot").get("zero_shot")
    untrained = "" if zero is None else f", {100 * statistics.mean(scores(zero)):.1f} % before"
    return f"""
## A vision transformer on other digits

{first["weights"]:,} weights, pre-trained on MNIST's digits 0 to 4, {first["steps_made"]} steps of {first["batch"]} of 1,000
pictures of 5 to 9; test: the validation pictures of these digits, in percent, mean and deviation of three seeds{untrained}.

{table(("method", "lr", "test %", *COSTS), rows)}"""


def pretraining(cells: Cells) -> str:
    found = own(cells, "llama-9m")
    if not found:
        return ""
    first = next(iter(found.values()))[0]
    rows = [(name, f"{r[0]['lr']:g}", score(scores(r), 1), *costs(r)) for name, r in found.items()]
    at = [step for step, _ in first["curve"]]
    curves = []
    for name, records in found.items():
        means = [statistics.mean(r["curve"][k][1] for r in records) for k in range(len(at))]
        curves.append((name, *(f"{2.718281828459045**mean:.0f}" for mean in means)))
    tokens = first["batch"] * first["max_length"]
    return f"""
## Pre-training the 9M configuration

{first["weights"]:,} weights with 2,048 tokens, {first["steps_made"]} steps of {tokens:,} tokens; perplexity of held-out
text, mean and deviation of three seeds.

{table(("method", "lr", "test perplexity", *COSTS), rows)}
Perplexity of the dev text on the way (time: a step costs what the table above says):

{table(("method", *(f"step {step}" for step in at)), curves)}"""


def large(cells: Cells) -> str:
    found = own(cells, "llama-60m")
    if not found:
        return ""
    first = next(iter(found.values()))[0]
    rows = [(name, *costs(r)) for name, r in found.items()]
    return f"""
## The 60M configuration: memory and speed

{first["weights"]:,} weights with 32,000 tokens, {first["steps_made"]} steps of {first["batch"]} rows of
{first["max_length"]} tokens.

{table(("method", *COSTS), rows)}"""


def pages(folder: Path) -> dict[str, str]:
    """Name -> text of the page, where there are records for it."""
    cells = read(folder)
    body = vision(cells) + pretraining(cells) + large(cells)
    if not body:
        return {}
    text = """# VeLoRA on a vision transformer and in pre-training

The learning rate of each cell was searched on dev rows with as many trials for every method. State: what the method declares to
hold; saved: what one forward of a training batch keeps for the backward pass, parameters left out, counted through
saved-tensor hooks; peak: that of the run's process over its loaded libraries, evaluation included. One thread.
"""
    return {"velora_transfer.md": text + body}


def main(given: Sequence[str] | None = None) -> int:
    """0 if the page is written or current, 1 if `--check` finds a difference."""
    args = arguments(__doc__, RECORDS, given)
    return publish(pages(args.records), args.docs, args.check, HEAD)


if __name__ == "__main__":
    sys.exit(main())
