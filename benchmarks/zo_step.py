"""One dense two-sided step on an OPT-125M-shaped random model, float32, against (a) two plain forwards with full logits
and (b) the textbook in-place MeZO step (four sweeps of torch.normal).

Sides alternate within one process and medians of the ratios are reported. Peak memory of each side is measured in a
subprocess of its own, as peak resident memory over the loaded model.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import Tensor, nn

from _record import emit

EPS, LR = 1e-3, 1e-6


def opt_125m(layers: int = 12) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(num_hidden_layers=layers)).eval()  # defaults are OPT-125M's shape


def batch(rows: int, length: int, every: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 50000, (rows, length), generator=generator)
    labels = ids.clone()
    if not every:
        labels[:, :-2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def plain_loss(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """The model's own loss over full logits, as transformers computes it."""
    with torch.no_grad():
        return model(**data, use_cache=False).loss


def two_forwards(model: nn.Module, data: dict[str, Tensor]) -> None:
    plain_loss(model, data)
    plain_loss(model, data)


def textbook_step(model: nn.Module, data: dict[str, Tensor], seed: int) -> None:
    """MeZO in place: perturb, perturb back twice, restore, update; noise from torch's generator, reseeded each time."""

    def sweep(scale: float) -> None:
        torch.manual_seed(seed)
        for p in model.parameters():
            z = torch.normal(mean=0.0, std=1.0, size=p.shape, dtype=p.dtype)
            p.data.add_(z, alpha=scale)

    sweep(EPS)
    plus = plain_loss(model, data)
    sweep(-2 * EPS)
    minus = plain_loss(model, data)
    sweep(EPS)
    sweep(-LR * float(plus - minus) / (2 * EPS))


def our_step(model: nn.Module) -> Callable[[dict[str, Tensor]], None]:
    from smidgen.objective import ModelObjective
    from smidgen.optim.zo_sgd import ZOSGD
    from smidgen.params import ParamView
    from smidgen.probing import Engine

    view = ParamView.of_model(model)
    engine, optimizer = Engine(model, view, "causal"), ZOSGD(view, lr=LR, eps=EPS)
    checked = False

    def step(data: dict[str, Tensor]) -> None:
        nonlocal checked
        if not checked:
            engine.check_batch(data)
            checked = True
        optimizer.step(ModelObjective(engine, [data]))

    return step


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(rows: int, length: int, every: bool, repeats: int, layers: int) -> dict[str, float]:
    model, data = opt_125m(layers), batch(rows, length, every)
    ours = our_step(model)
    ours(data)
    two_forwards(model, data)
    over, speedup = [], []
    for i in range(repeats):
        a = seconds(lambda: two_forwards(model, data))
        mine = seconds(lambda: ours(data))
        b = seconds(lambda seed=i: textbook_step(model, data, seed))
        over.append(mine / a)
        speedup.append(b / mine)
    return {"over": statistics.median(over), "speedup": statistics.median(speedup)}


def peak(side: str, rows: int, length: int, layers: int) -> float:
    """Bytes of peak resident memory over the loaded model, measured in this (fresh) process."""
    model, data = opt_125m(layers), batch(rows, length, every=False)
    small = {k: v[:1, -8:] for k, v in data.items()}
    ours = our_step(model) if side == "ours" else None
    if ours is not None:
        ours(small)  # compile the kernels and load libraries before the baseline is taken
    else:
        plain_loss(model, small)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    if side == "forward":
        plain_loss(model, data)
    elif side == "textbook":
        textbook_step(model, data, 0)
    else:
        assert ours is not None
        ours(data)
    return _status("VmHWM") - before


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return float(line.split()[1]) * 1024
    raise RuntimeError(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12, help="fewer layers for a quick look")
    parser.add_argument("--peak", choices=["forward", "textbook", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(json.dumps({"peak": peak(args.peak, 16, 64, args.layers)}))
        return
    peaks = {}
    for side in ("forward", "textbook", "ours"):
        command = [sys.executable, __file__, "--peak", side, "--layers", str(args.layers), "--threads", str(args.threads)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[side] = json.loads(out.splitlines()[-1])["peak"]
        print(f"peak over the resident weights, {side}: {peaks[side] / 2**20:.0f} MiB", flush=True)
    few, short = (compare(*shape, False, args.repeats, args.layers) for shape in ((16, 64), (8, 32)))
    full, full_short = (compare(*shape, True, args.repeats, args.layers) for shape in ((16, 64), (8, 32)))
    figures = {
        "step_over_two_forwards_16x64": few["over"],
        "speedup_over_textbook_16x64": few["speedup"],
        "speedup_over_textbook_8x32": short["speedup"],
        "full_labels_speedup_16x64": full["speedup"],
        "full_labels_speedup_8x32": full_short["speedup"],
        "peak_over_forward_peak": peaks["ours"] / peaks["forward"],
        "textbook_peak_over_forward_peak": peaks["textbook"] / peaks["forward"],
    }
    goals = {
        "step_over_two_forwards_16x64": ("<=", 0.70),
        "speedup_over_textbook_16x64": (">=", 2.8),
        "speedup_over_textbook_8x32": (">=", 5.0),
        "full_labels_speedup_16x64": (">=", 1.7),
        "full_labels_speedup_8x32": (">=", 4.0),
        "peak_over_forward_peak": ("<=", 1.05),
    }
    setting = {"model": "OPT-125M shape, random", "dtype": "float32", "repeats": args.repeats, "layers": args.layers}
    emit("zo_step", figures, goals, setting)


if __name__ == "__main__":
    main()
