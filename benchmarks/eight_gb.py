"""Tuning a 7B-shaped random nf4 Llama with the process capped to 8 GiB of a GPU, rows of 512 tokens: what runs, its peak, and
rows a second. Sides: lozo and es (16 members) over the base, QLoRA (rank 8, all linear layers) and qSpIEL (1 % of the
weights), the last two with activation checkpointing. Sides come one after the other, smallest batch first; what a side held
is given back before the next. Two steps warm up.

`--device cpu` is a rehearsal with a tiny model: memory is resident memory, without a cap.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch

from _models import batch, on_cpu, peak_over, seconds
from _quantised import first_order, llama, zeroth
from _record import emit

CAP = 8 * 2**30
SHARED = 2**30  # bytes that the probes of a step may take to share a forward; chosen
SIDES: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "lozo": lambda model: zeroth(model, "lozo", SHARED, lr=1e-6, eps=1e-3),
    "es": lambda model: zeroth(model, "es", SHARED, lr=1e-6, eps=1e-3, queries=8),
    "qlora": lambda model: first_order(model, "lora", "adamw", rank=8, target_modules="all-linear"),
    "qspiel": lambda model: first_order(model, "spiel", "sparse_adamw", density=0.01, growth="none"),
}


def measure(side: str, rows: list[int], length: int, device: str, layers: int | None) -> dict[str, float]:
    """For each number of rows whether it runs (1 or 0), peak in MiB with the weights on a GPU and without them on a CPU, and
    rows a second."""
    cuda = device == "cuda"
    model = llama("7b" if cuda else "tiny", device, torch.bfloat16 if cuda else torch.float32, layers)
    step, _ = SIDES[side](model)
    found: dict[str, float] = {}
    for count in sorted(rows):
        data = batch(model, count, length)
        try:
            high, before = peak_over(lambda data=data: (step(data), step(data)))  # type: ignore[misc]
            taken = min(seconds(lambda data=data: step(data), device) for _ in range(3))  # type: ignore[misc]
        except torch.OutOfMemoryError:
            return found | {f"{side}_{more}_runs": 0 for more in rows if more >= count}
        peak = high if cuda else high - before
        found |= {f"{side}_{count}_runs": 1, f"{side}_{count}_peak_mib": peak / 2**20}
        found[f"{side}_{count}_rows_a_second"] = count / taken
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--length", type=int, help="tokens of a row; 512, on a CPU 32")
    parser.add_argument("--layers", type=int, help="fewer layers for a quick look")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    args = parser.parse_args()
    if args.device == "cpu":
        on_cpu()
    elif not torch.cuda.is_available():
        parser.error("no CUDA device: --device cpu is a rehearsal with a tiny model")
    length = args.length or (512 if args.device == "cuda" else 32)
    if args.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total))
    figures: dict[str, float] = {}
    for side in args.sides:
        found = measure(side, args.rows, length, args.device, args.layers)
        print(f"{side}: {found}", flush=True)
        figures |= found
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    shape = "Llama 7B shape, random nf4, bfloat16" if args.device == "cuda" else "tiny Llama, random nf4: a rehearsal"
    setting = {"model": shape, "length": length, "cap_gib": CAP / 2**30 if args.device == "cuda" else None}
    emit("eight_gb", figures, {}, {**setting, "layers": args.layers or "all"})


if __name__ == "__main__":
    main()
