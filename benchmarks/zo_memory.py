"""Peak memory of one method's steps against the length of a row, on OPT-125M's shape in float32, labels at every position:
zo_sgd, AdamW on LoRA, AdamW, and AdamW with activation checkpointing; a plain forward with full logits beside them.

<side>_<length>_mib is the peak of two steps over the loaded model, in MiB, each in a process of its own; the state of the
optimizer is made in the first step and counted. The record is kept as results/zo_bench/memory.json (`--output`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import nn

from _models import Stepper, batch, on_cpu, opt, peak_over, plain_loss
from _record import emit


def forward(model: nn.Module) -> Callable[..., object]:
    return lambda rows: plain_loss(model, rows)


def zo_sgd(model: nn.Module) -> Callable[..., object]:
    return Stepper(model, "zo_sgd")


def lora(model: nn.Module) -> Callable[..., object]:
    from smidgen import adapt

    scheme = adapt.get("lora")
    return Stepper(scheme.build(model, scheme.Config(), seed=0, fresh=[]).model, "adamw")


def adamw(model: nn.Module) -> Callable[..., object]:
    return Stepper(model, "adamw")


def adamw_checkpointed(model: nn.Module) -> Callable[..., object]:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return Stepper(model, "adamw")


SIDES: dict[str, Callable[[nn.Module], Callable[..., object]]] = {
    side.__name__: side for side in (forward, zo_sgd, lora, adamw, adamw_checkpointed)
}


def peak(side: str, length: int, rows: int, shape: str, layers: int | None) -> float:
    """MiB over the loaded model, in this process."""
    from smidgen import memory

    memory.warm_up()
    tiny = opt("tiny")
    SIDES[side](tiny)(batch(tiny, 2, 8))  # load libraries before the baseline is taken
    model = opt(shape, layers)
    data = batch(model, rows, length, every=True)

    def steps() -> None:
        step = SIDES[side](model)
        step(data)
        step(data)

    high, before = peak_over(steps)
    return (high - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--layers", type=int, help="fewer layers for a quick look")
    parser.add_argument("--small", action="store_true", help="a tiny model and two short lengths: a smoke test")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the record to this file too")
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_cpu()
    shape = "tiny" if args.small else "opt-125m"
    if args.peak:
        side, length = args.peak
        print(json.dumps(peak(side, int(length), args.rows, shape, args.layers)))
        return
    lengths = [16, 64] if args.small else args.lengths
    figures = {}
    for side in SIDES:
        for length in lengths:
            command = [sys.executable, __file__, "--peak", side, str(length), "--rows", str(args.rows)]
            command += ["--threads", str(args.threads), *(["--small"] if args.small else [])]
            command += [] if args.layers is None else ["--layers", str(args.layers)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            figures[f"{side}_{length}_mib"] = float(out.splitlines()[-1])
            print(f"{side} at {length}: {figures[f'{side}_{length}_mib']:.0f} MiB", flush=True)
    setting = {"model": f"{shape} shape, random", "dtype": "float32", "rows": args.rows, "layers": args.layers or "all"}
    record = emit("zo_memory", figures, {}, setting)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
