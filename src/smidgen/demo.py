"""`smidgen demo`: the embedded model tuned on the embedded reviews by several methods, each in a process of its own so
that its peak memory is its own, then one page that compares them. No network, no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smidgen import folder as folders
from smidgen import records as runs
from smidgen import report
from smidgen.config import ConfigError, UserError

# method, scheme, options: rates from the embedded README; steps sized for two minutes on two cores.
CELLS: list[tuple[str, str, list[str]]] = [
    ("adamw", "full", ["--lr", "5e-4", "--steps", "126"]),
    ("adamw", "lora", ["--lr", "3e-3", "--steps", "126"]),
    ("zo_sgd", "full", ["--steps", "1000"]),
]


def demo(output: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the cells and write `report.html` and `demo.json` into `output`. Raises UserError when a cell fails."""
    if (output / "demo.json").exists() or any((output / f"{m}-{s}").exists() for m, s, _ in CELLS):
        raise ConfigError(f"{output} holds a demo already: remove it, or choose another --output")
    started = time.perf_counter()
    say("smidgen demo: reviews (two classes), the embedded 2M-parameter model, CPU, no network")
    say(f"{'method':<8} {'scheme':<6} {'accuracy on dev':<18} {'peak memory':>12} {'forwards':>9} {'backwards':>9} {'time':>7}")
    records = []
    for method, scheme, options in CELLS:
        record = _run(output / f"{method}-{scheme}", method, scheme, options)
        records.append(record)
        before, after = record["before"]["accuracy"], record["dev"]["accuracy"]
        say(
            f"{method:<8} {scheme:<6} {100 * before:5.1f} -> {100 * after:5.1f} %   {record['peak_bytes'] / 2**20:8.0f} MiB "
            f"{record['forwards']:>9} {record['backwards']:>9} {record['seconds']:5.1f} s"
        )
    found = {"task": "reviews", "model": "embedded", "records": records, "seconds": time.perf_counter() - started}
    folders.write_json(output / "demo.json", found)
    made = runs.read([output / f"{method}-{scheme}" for method, scheme, _ in CELLS])
    folders.write_text(output / "report.html", report.page("smidgen demo: reviews, embedded model", made))
    say(f"{found['seconds']:.0f} s in all; report: {output / 'report.html'}")
    say("next: smidgen train --model MODEL --data my.jsonl")
    return found


def _run(folder: Path, method: str, scheme: str, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "smidgen", "train", "--task", "reviews", "--method", method, "--scheme", scheme]
    command += [*options, "--output", str(folder), "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the demo's {method} run ended with exit code {done.returncode}: {reason}", done.returncode)
    return {**json.loads(done.stdout), "method": method, "scheme": scheme, "curve": folders.metrics(folder)}
