"""The derivative-free study: k = 16 rows a class, five draws, six tasks, every method of dfo_lora.yaml on one masked LM.

    python scripts/pretrain_masked.py --text ../shared/data --to runs/masked --minutes 30
    python scripts/dfo_lora.py --model runs/masked --data ../shared/data --to results/dfo_lora

One JSON record a run in --to/runs, written when it is done: a second start goes on where the first stopped. The summary is
--to/summary.json and a table: mean and standard deviation over the draws of the test figure after the last step, forwards
over the training batch until the best dev accuracy was first seen, peak bytes over the loaded model, seconds. A run that is
refused is recorded with its reason and counts as no figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
FIGURES = ("test", "dev", "forwards_to_best_dev", "forwards", "evaluation_forwards", "peak_bytes", "seconds")


def values_of(plan: dict[str, Any], task: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The configuration of one run."""
    place, chosen, common = dict(plan["tasks"][task]), dict(plan["methods"][method]), dict(plan["common"])
    train = {**common.pop("train", {}), **chosen.pop("train", {})}
    if options.steps is not None:
        train["max_steps"] = options.steps
    data = str(options.data / place.pop("folder"))
    return {**common, **place, **chosen, "train": train, "task": task, "data": data, "model": str(options.model),
            "kind": "masked", "k_shot": plan["k_shot"], "seed": seed}  # fmt: skip


def best_dev(folder: Path, metric: str) -> tuple[float | None, int | None]:
    """The best dev figure of a run, and the forwards made when it was first seen."""
    best, at, forwards = None, None, 0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        forwards = int(row.get("zo/forwards", forwards))
        value = row.get(f"eval_{metric}")
        if value is not None and (best is None or value > best):
            best, at = value, forwards
    return best, at


def run(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run in a process of its own, so that its peak memory is its own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**values, "output": str(folder), "force": True}))
    done = subprocess.run([sys.executable, "-m", "smidgen", "train", str(path)], capture_output=True, text=True)
    if done.returncode:
        return {"status": "refused", "reason": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found = json.loads((folder / "result.json").read_text())
    metric = found["metric"]
    dev, at = best_dev(folder, metric)
    record = {
        key: found[key] for key in ("status", "metric", "forwards", "evaluation_forwards", "peak_bytes", "seconds", "steps")
    }
    return {**record, "test": found["test"][metric], "dev": dev, "forwards_to_best_dev": at, "before": found["before"][metric]}


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a task and method: mean and standard deviation of every figure over the draws."""
    rows = []
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in records):
        mine = [r for r in records if (r["task"], r["method"]) == (task, method)]
        live = [r for r in mine if r["status"] == "done"]
        row: dict[str, Any] = {"task": task, "method": method, "draws": len(live), "refused": len(mine) - len(live)}
        for key in FIGURES:
            given = [r[key] for r in live if r[key] is not None]
            if given:
                row[key] = [statistics.mean(given), statistics.stdev(given) if len(given) > 1 else 0.0]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=HERE / "dfo_lora.yaml")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--steps", type=int, help="steps of every run, for a trial")
    options = parser.parse_args()
    plan = yaml.safe_load(options.plan.read_text())
    records = []
    for task in options.tasks or plan["tasks"]:
        for method in options.methods or plan["methods"]:
            for seed in options.seeds or plan["seeds"]:
                path = options.to / "runs" / f"{task}-{method}-{seed}.json"
                if not path.exists():
                    values = values_of(plan, task, method, seed, options)
                    record = {"task": task, "method": method, "seed": seed, **run(values, options.to / "work" / path.stem)}
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(record, indent=2) + "\n")
                records.append(json.loads(path.read_text()))
                print(json.dumps(records[-1]), flush=True)
    (options.to / "summary.json").write_text(json.dumps(summary(records), indent=2) + "\n")
    for row in summary(records):
        shown = " ".join(f"{key} {row[key][0]:.4g}+-{row[key][1]:.2g}" for key in FIGURES if key in row)
        print(f"{row['task']:8} {row['method']:18} {shown}")


if __name__ == "__main__":
    main()
