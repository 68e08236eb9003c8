"""Step time and memory of every method on OPT-125M's shape, random weights, float32, batch 16 x 64, labels at the last two
positions, against plain forwards with full logits.

<method>_forwards                  model evaluations that one step makes, as the engine counts them
<method>_over_two_forwards         time of a step, per two forwards made, over that of two plain forwards; of the step as a
                                   whole for zo_conservative, zo_momentum and zo_adam
<method>_over_forward_backward     time of a step over a plain forward and its back-propagation, for methods that differentiate
<method>_state_bytes               what `state_bytes` says, and <method>_state_held what the optimizer holds after some steps;
                                   state_bytes_exact is 1 when they are equal for all methods
<method>_peak_mib                  peak memory over the loaded model, each in its own process
<method>_peak_over_forward_peak    the same over that of a plain forward
block_reuse                        a sweep of zo_block that reuses the activations below the block over one that does not

Plain forwards and steps alternate in one process; medians of the ratios. Methods are listed at run time. `--small` is a smoke
test on a tiny model. With `--figures FILE` what has been measured is kept there, and a second start goes on after it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import nn

from _models import Stepper, batch, forward_backward, on_cpu, opt, peak_over, plain_loss, seconds, two_forwards
from _record import emit

SMALL_SPACES = ("cma_es", "fireworks")  # search adapters, not whole models: see dfo.py
AS_A_WHOLE = {"zo_conservative": 1.4, "zo_momentum": 1.15, "zo_adam": 1.15}  # goals of whole steps
ROWS, LENGTH = 16, 64
ENOUGH = 24  # forwards of all repeats together: a population's step is long, and its time scatters less


def differentiates(method: str) -> bool:
    """Whether a method takes derivatives: by back-propagation, or in forward mode."""
    from smidgen import optim

    return bool({"backward", "slope"} & optim.get(method).build.uses)


def ratio(model: nn.Module, step: Stepper, against: Callable[..., None], repeats: int) -> tuple[float, float]:
    """Median of step time over the time of `against`, and the forwards of one step. Long steps are repeated less often."""
    data = batch(model, ROWS, LENGTH)
    before = step.engine.forwards
    step(data)
    against(model, data)
    repeats = max(2, min(repeats, ENOUGH // max(1, step.engine.forwards - before)))
    before, ratios = step.engine.forwards, []
    for _ in range(repeats):
        other = seconds(lambda: against(model, data))
        ratios.append(seconds(lambda: step(data)) / other)
    return statistics.median(ratios), (step.engine.forwards - before) / repeats


def held(step: Stepper) -> int:
    """Bytes of the tensors in the optimizer's state."""
    tensors = [v for state in step.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return sum(v.numel() * v.element_size() for v in tensors)


def measure(method: str, shape: str, layers: int | None, repeats: int) -> dict[str, float]:
    """Time and state of one method, on a model of its own."""
    from smidgen.params import shapes

    model = opt(shape, layers)
    step = Stepper(model, method)
    over, forwards = ratio(model, step, two_forwards, repeats)
    figures = {f"{method}_forwards": forwards}
    if not differentiates(method):
        whole = method in AS_A_WHOLE or not forwards
        figures[f"{method}_over_two_forwards"] = over if whole else over * 2 / forwards
    else:
        figures[f"{method}_over_forward_backward"], _ = ratio(model, step, forward_backward, repeats)
    figures[f"{method}_state_bytes"] = step.optimizer.state_bytes(shapes(step.view), step.optimizer.config)
    figures[f"{method}_state_held"] = held(step)
    return figures


def block_reuse(shape: str, layers: int | None, repeats: int) -> float:
    """Time of a block-wise sweep with reuse over one without; the sweeps alternate."""
    sweeps = []
    data = batch(opt(shape, 0), ROWS, LENGTH)
    for every in (1, 0):
        step = Stepper(opt(shape, layers), "zo_block")
        step.engine.reuse.every = every
        step(data)  # a first sweep learns what to keep
        sweeps.append(step)
    ratios = [seconds(lambda: sweeps[0](data)) / seconds(lambda: sweeps[1](data)) for _ in range(repeats)]
    return statistics.median(ratios)


def peak(side: str, shape: str, layers: int | None) -> int:
    """Bytes of peak memory over the loaded model for a method's second step, or for a plain forward, in this process."""
    from smidgen import memory

    memory.warm_up()
    tiny = opt("tiny")
    small = batch(tiny, 2, 8)
    run = (lambda m: lambda rows: plain_loss(m, rows)) if side == "forward" else (lambda m: Stepper(m, side))
    run(tiny)(small)  # compile the kernels and load libraries before the baseline is taken
    model = opt(shape, layers)
    data = batch(model, ROWS, LENGTH)

    def twice() -> None:
        once = run(model)
        once(data)
        once(data)

    high, before = peak_over(twice)
    return high - before


def main() -> None:
    from smidgen import optim

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=optim.names(),
        default=[m for m in optim.names() if m not in SMALL_SPACES],
        metavar="METHOD",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, help="fewer layers for a quick look")
    parser.add_argument("--small", action="store_true", help="a tiny model, one repeat, no memory: a smoke test")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--figures", type=Path, help="keep figures in this file; those that it has are not measured again")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_cpu()
    shape, repeats = ("tiny", 1) if args.small else ("opt-125m", args.repeats)
    if args.peak:
        print(json.dumps(peak(args.peak, shape, args.layers)))
        return
    kept = args.figures is not None and args.figures.exists()
    figures: dict[str, float] = json.loads(args.figures.read_text()) if kept else {}

    def keep(found: dict[str, float]) -> None:
        print("  ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
        figures.update(found)
        if args.figures:
            args.figures.write_text(json.dumps(figures))

    for method in args.methods:
        if f"{method}_state_held" not in figures:
            keep(measure(method, shape, args.layers, repeats))
    if "zo_block" in args.methods and "block_reuse" not in figures:
        keep({"block_reuse": block_reuse(shape, args.layers, repeats)})
    for side in () if args.small else ("forward", *args.methods):
        if f"{side}_peak_mib" not in figures:
            command = [sys.executable, __file__, "--peak", side, "--threads", str(args.threads)]
            command += [] if args.layers is None else ["--layers", str(args.layers)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            keep({f"{side}_peak_mib": int(out.splitlines()[-1]) / 2**20})
    for method in () if args.small else args.methods:
        figures[f"{method}_peak_over_forward_peak"] = figures[f"{method}_peak_mib"] / figures["forward_peak_mib"]
    goals: dict[str, tuple[str, float]] = {}
    for method in args.methods:
        stateless = figures[f"{method}_state_bytes"] == 0
        if f"{method}_over_two_forwards" in figures and (stateless or method in AS_A_WHOLE):
            goals[f"{method}_over_two_forwards"] = ("<=", AS_A_WHOLE.get(method, 1.0))
    figures["state_bytes_exact"] = int(all(figures[f"{m}_state_bytes"] == figures[f"{m}_state_held"] for m in args.methods))
    goals["state_bytes_exact"] = (">=", 1)
    if "block_reuse" in figures:
        goals["block_reuse"] = ("<=", 0.6)
    setting = {"model": f"{shape} shape, random", "dtype": "float32", "batch": f"{ROWS} x {LENGTH}", "repeats": repeats}
    emit("zo_methods", figures, goals, {**setting, "layers": args.layers or "all"})


if __name__ == "__main__":
    main()
