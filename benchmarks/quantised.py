"""`lozo` over an nf4 base: peak memory over the quantised weights against that of a plain forward plus the factors.

nf4_peak_ratio: one probe in a forward, against a plain forward of the same rows whose loss is computed in blocks of the
vocabulary, as ours is. nf4_peak_ratio_full_logits: against the model's own loss. nf4_peak_ratio_together: both probes in one
forward, against a plain forward of twice the rows, in blocks. Labels at every position; each side in a process of its own, two
steps, so that state is counted. Factors: the left factors of the interval.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from _models import batch, on_cpu, peak_over, plain_loss, seconds
from _quantised import llama, zeroth
from _record import emit

SIDES = ("forward", "full_logits", "forward_doubled", "lozo", "lozo_together")


def measure(side: str, shape: str, rows: int, length: int, layers: int | None) -> dict[str, float]:
    """Peak over the loaded model and bytes of the factors, in MiB, and seconds of a step or forward."""
    from smidgen import memory, quantised
    from smidgen.memory import resident

    memory.warm_up()
    run(side, "tiny", 2, 8, None)  # load libraries before the baseline is taken
    bare = resident()
    model = llama(shape, layers=layers)
    weights = (resident() - bare) / 2**20
    step, optimizer, data = prepared(side, model, rows, length)
    high, before = peak_over(lambda: (step(data), step(data)))
    factors = 0 if optimizer is None else sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    held = sum(t.nbytes for module in quantised.layers(model).values() for t in quantised.stored(module).values())
    mib = {"peak": high - before, "factors": factors, "codes": held}
    return {key: value / 2**20 for key, value in mib.items()} | {"weights": weights, "seconds": seconds(lambda: step(data))}


def prepared(side: str, model: torch.nn.Module, rows: int, length: int):  # type: ignore[no-untyped-def]
    """(step, optimizer or None, data) of a side."""
    from smidgen.params import ParamView
    from smidgen.probing import Engine

    data = batch(model, 2 * rows if side == "forward_doubled" else rows, length, every=True)
    if side == "full_logits":
        return lambda given: plain_loss(model, given), None, data
    if side.startswith("forward"):
        model.lm_head.requires_grad_(True)  # a view needs a tensor
        engine = Engine(model, ParamView.of_model(model), "causal")
        return engine.losses, None, data
    step, optimizer = zeroth(model, "lozo", 0 if side == "lozo" else 1 << 40, lr=1e-6, eps=1e-3)
    return step, optimizer, data


def run(side: str, shape: str, rows: int, length: int, layers: int | None) -> None:
    step, _, data = prepared(side, llama(shape, layers=layers), rows, length)
    step(data)


def figures_of(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The ratios from the measured sides."""

    def ratio(side: str, plain: str) -> float:
        return found[side]["peak"] / (found[plain]["peak"] + found[side]["factors"])

    return {
        "nf4_peak_ratio": ratio("lozo", "forward"),
        "nf4_peak_ratio_full_logits": ratio("lozo", "full_logits"),
        "nf4_peak_ratio_together": ratio("lozo_together", "forward_doubled"),
        **{f"{side}_{key}": value for side, parts in found.items() for key, value in parts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, help="fewer layers for a quick look")
    parser.add_argument("--small", action="store_true", help="a tiny model: a smoke test")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_cpu()
    shape = "tiny" if args.small else "110m"
    if args.side:
        print(json.dumps(measure(args.side, shape, args.rows, args.length, args.layers)))
        return
    found = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--side", side, *sys.argv[1:]]
        found[side] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        print(f"{side}: peak {found[side]['peak']:.0f} MiB over the weights, {found[side]['seconds']:.2f} s", flush=True)
    setting = {"model": f"Llama {shape} shape, random, nf4", "dtype": "float32", "rows": args.rows, "length": args.length}
    emit("quantised", figures_of(found), {"nf4_peak_ratio": ("<=", 1.05)}, {**setting, "layers": args.layers or "all"})


if __name__ == "__main__":
    main()
