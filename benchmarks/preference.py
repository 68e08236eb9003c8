"""Preference pairs by DPO: held-out preference accuracy before and after, for a first-order and forward-only methods.

../shared/data/dpo_demo holds 200 pairs; 120 train, 80 are held out, by row hash, the same for all. Most are longer than what
two cores have time for: a prompt keeps the last 200 characters of its last turn, an answer what fits into 128 tokens with
them. A 3.4M-parameter chat model in the Tülu form, LoRA or SpIEL on its blocks; every method gets the rate that is best of
those below on other held-out pairs: 40 of the 120, one seed, half the steps. Then three seeds on all 120. `accuracy` is the
share of held-out pairs whose chosen answer gained more over the reference than the rejected one (0.5 before, by definition;
its standard error is 0.056 on 80 pairs), `likelihood_accuracy` that of pairs whose chosen answer is the likelier. Forward-
only methods make three times as many steps of two forwards, a pair's two answers counted once each: equal example-forwards, a
back-propagation counted as two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _models import on_cpu
from _record import emit

ROOT = Path(__file__).parents[1]
SIDES: dict[str, tuple[str, str, dict[str, Any], float, list[float]]] = {  # method, scheme, options, forwards a step, rates
    "adamw_lora": ("adamw", "lora", {}, 3.0, [3e-4, 1e-3, 3e-3]),
    "sparse_adamw_spiel": ("sparse_adamw", "spiel", {}, 3.0, [3e-4, 1e-3, 3e-3]),
    "zo_sgd_lora": ("zo_sgd", "lora", {"normalise": "rms", "eps": 1e-2}, 2.0, [1e-3, 3e-3, 1e-2]),
    "es_lora": ("es", "lora", {"queries": 4, "eps": 1e-2}, 8.0, [1e-3, 3e-3, 1e-2]),
}
MODEL = "tinystories-instruct-3m-chat"
MEASURES = ("accuracy", "likelihood_accuracy", "loss", "margin")
BATCH, FORWARDS = 8, 120.0  # pairs of a step; forwards of a batch that a run may spend
PROMPT = 200  # characters

GOALS = {
    "adamw_lora_accuracy_after": (">=", 0.6),
    "zo_sgd_lora_accuracy_after": (">=", 0.56),
}  # chosen: a standard error above 0.5


def shortened(row: str) -> str:
    """A pair with the end of its prompt's last turn."""
    pair = json.loads(row)
    last = pair["prompt"][-1]
    return json.dumps(pair | {"prompt": [last | {"content": last["content"][-PROMPT:]}]})


def split(rows: list[str], to: Path) -> None:
    """search: 80 training and 40 held-out pairs; final: all 120 of them and 80 others."""
    from smidgen.splits import take

    held = take(rows, 80)
    pool = [row for row in rows if row not in set(held)]
    trial = take(pool, 40)
    parts = {"search": ([row for row in pool if row not in set(trial)], trial), "final": (pool, held)}
    for name, (train, dev) in parts.items():
        for kind, lines in (("train", train), ("dev", dev)):
            (to / f"{name}-{kind}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(side: str, lr: float, seed: int, folder: Path, part: str, forwards: float, args: argparse.Namespace) -> dict[str, Any]:
    """The result of one run."""
    from smidgen import run as runs
    from smidgen.config_file import load

    method, scheme, options, cost, _ = SIDES[side]
    steps = max(1, int(forwards / cost))
    values: dict[str, Any] = {
        "model": str(args.shared / "models" / MODEL) if not args.small else "embedded",
        "task": "preference",
        "data": str(folder / f"{part}-train.jsonl"),
        "eval_data": str(folder / f"{part}-dev.jsonl"),
        "chat": "tulu",
        "max_length": args.length,
        "method": method,
        "scheme": scheme,
        "scheme_args.rank": 8,
        "method_args": {**options, "lr": lr},
        "train.max_steps": steps,
        "train.per_device_train_batch_size": BATCH,
        "train.per_device_eval_batch_size": BATCH,
        "train.lr_scheduler_type": "linear",
        "train.eval_strategy": "no",
        "train.save_strategy": "no",
        "seed": seed,
        "threads": args.threads,
    }
    with tempfile.TemporaryDirectory() as output:
        return runs.finetune(load(None, [], values | {"output": f"{output}/run"}), say=lambda line: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt with its answer")
    parser.add_argument("--small", action="store_true", help="the embedded model, few steps: whether it runs")
    args = parser.parse_args()
    on_cpu()
    forwards, seeds = (16.0, [0]) if args.small else (FORWARDS, [0, 1, 2])
    source, model = args.shared / "data" / "dpo_demo" / "train.jsonl", args.shared / "models" / MODEL
    if lacking := [str(path.relative_to(args.shared)) for path in (source, model) if not path.exists()]:
        emit("preference", {}, {}, {"left_out": [f"shared:{path} is not here" for path in lacking]})
        return
    rows = [shortened(row) for row in source.read_text(encoding="utf-8").splitlines()]
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split(rows, folder)
        for side in SIDES:
            rates = SIDES[side][-1][:1] if args.small else SIDES[side][-1]
            trials = {lr: run(side, lr, 0, folder, "search", forwards / 2, args)["dev"]["loss"] for lr in rates}
            lr = min(trials, key=lambda rate: trials[rate])
            found = [run(side, lr, seed, folder, "final", forwards, args) for seed in seeds]
            for measure in MEASURES:
                after = [result["dev"][measure] for result in found]
                figures[f"{side}_{measure}_before"] = statistics.fmean(result["before"][measure] for result in found)
                figures[f"{side}_{measure}_after"] = statistics.fmean(after)
                figures[f"{side}_{measure}_spread"] = statistics.stdev(after) if len(after) > 1 else 0.0
            figures |= {f"{side}_lr": lr, f"{side}_steps": found[0]["steps"], f"{side}_seconds": found[0]["seconds"]}
            shown = {m: round(figures[f"{side}_{m}_after"], 4) for m in MEASURES}
            print(f"{side}: lr {lr:g}, trials {trials}, after {shown}", flush=True)
    setting = {"model": MODEL, "pairs": {"train": 120, "held_out": 80}, "batch": BATCH, "prompt_characters": PROMPT}
    emit("preference", figures, GOALS, {**setting, "forwards": forwards, "seeds": seeds, "max_length": args.length})


if __name__ == "__main__":
    main()
