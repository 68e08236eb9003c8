"""One dense two-sided step on a random OPT against (a) two plain forwards with full logits and (b) the textbook in-place
MeZO step (four sweeps of torch.normal): OPT-125M's shape in float32 on a CPU, OPT-1.3B's in bfloat16 on CUDA.

Sides alternate within one process and medians of the ratios are reported. Peak memory of each side is over the loaded
model: on a CPU resident memory of a subprocess of its own; on CUDA allocated memory, as a whole and over the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import nn

from _models import Stepper, batch, on_cpu, opt, peak_over, plain_loss, seconds, textbook_step, two_forwards
from _record import emit

SIDES = ("forward", "textbook", "ours")

GOALS = {
    "cpu": {
        "step_over_two_forwards_16x64": ("<=", 0.70),
        "speedup_over_textbook_16x64": (">=", 2.8),
        "speedup_over_textbook_8x32": (">=", 5.0),
        "full_labels_speedup_16x64": (">=", 1.7),
        "full_labels_speedup_8x32": (">=", 4.0),
        "peak_over_forward_peak": ("<=", 1.05),
    },
    "cuda": {
        "step_over_two_forwards_16x64": ("<=", 1.35),
        "speedup_over_textbook_16x64": (">=", 1.8),
        "peak_over_forward_peak": ("<=", 1.03),
    },
}


def compare(model: nn.Module, rows: int, length: int, every: bool, repeats: int, device: str) -> dict[str, float]:
    """Medians of our step over two forwards, and of the textbook step over ours."""
    data, ours = batch(model, rows, length, every), Stepper(model)
    ours(data)
    two_forwards(model, data)
    textbook_step(model, data, 0)
    over, speedup = [], []
    for i in range(repeats):
        a = seconds(lambda: two_forwards(model, data), device)
        mine = seconds(lambda: ours(data), device)
        b = seconds(lambda seed=i: textbook_step(model, data, seed), device)
        over.append(mine / a)
        speedup.append(b / mine)
    return {"over": statistics.median(over), "speedup": statistics.median(speedup)}


def peak(side: str, model: nn.Module) -> tuple[int, int]:
    """(peak bytes of one side, bytes of the loaded model), measured in this process."""
    data = batch(model, 16, 64)
    small = {k: v[:1, -8:] for k, v in data.items()}
    if side == "ours":
        ours = Stepper(model)
        ours(small)  # compile the kernels and load libraries before the baseline is taken
        return peak_over(lambda: ours(data))
    plain_loss(model, small)
    return peak_over(lambda: plain_loss(model, data) if side == "forward" else textbook_step(model, data, 0))


def peaks(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Peak and baseline of every side: on CUDA in this process, on a CPU each in a process of its own."""
    found = {}
    for side in SIDES:
        if args.device == "cuda":
            found[side] = peak(side, opt(args.shape, args.layers, dtype(args), args.device))
            continue
        command = [sys.executable, __file__, "--peak", side, "--shape", args.shape, "--threads", str(args.threads)]
        command += [] if args.layers is None else ["--layers", str(args.layers)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[side] = tuple(json.loads(out.splitlines()[-1]))
    for side, (high, before) in found.items():
        print(f"peak over the model, {side}: {(high - before) / 2**20:.0f} MiB", flush=True)
    return found


def dtype(args: argparse.Namespace) -> torch.dtype:
    """bfloat16 on CUDA, float32 on a CPU."""
    return torch.bfloat16 if args.device == "cuda" else torch.float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=sorted(GOALS), default="cpu")
    parser.add_argument("--shape", help="opt-125m, opt-1.3b or tiny; default: opt-1.3b on CUDA, else opt-125m")
    parser.add_argument("--layers", type=int, help="fewer layers for a quick look")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = args.shape or ("opt-1.3b" if args.device == "cuda" else "opt-125m")
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        on_cpu()
    if args.peak:
        print(json.dumps(peak(args.peak, opt(args.shape, args.layers))))
        return
    measured = peaks(args)
    model = opt(args.shape, args.layers, dtype(args), args.device)
    few, short, full, full_short = (
        compare(model, rows, length, every, args.repeats, args.device)
        for every in (False, True)
        for rows, length in ((16, 64), (8, 32))
    )
    extra = {side: high - before for side, (high, before) in measured.items()}
    whole = extra if args.device == "cpu" else {side: high for side, (high, _) in measured.items()}
    figures = {
        "step_over_two_forwards_16x64": few["over"],
        "speedup_over_textbook_16x64": few["speedup"],
        "speedup_over_textbook_8x32": short["speedup"],
        "full_labels_speedup_16x64": full["speedup"],
        "full_labels_speedup_8x32": full_short["speedup"],
        "peak_over_forward_peak": whole["ours"] / whole["forward"],
        "textbook_peak_over_forward_peak": whole["textbook"] / whole["forward"],
    }
    if args.device == "cuda":
        figures["extra_over_forward_extra"] = extra["ours"] / extra["forward"]
    setting = {
        "model": f"{args.shape} shape, random",
        "dtype": str(dtype(args)).removeprefix("torch."),
        "repeats": args.repeats,
        "layers": model.config.num_hidden_layers,  # type: ignore[union-attr]
    }
    emit("zo_step", figures, GOALS[args.device], setting)


if __name__ == "__main__":
    main()
