"""Low-rank probes on a random OPT: a two-sided `lozo` step against two plain forwards with full logits, against one of doubled
batch, and against the textbook in-place MeZO step; and a population of 32 probes against one plain forward of the same rows.
OPT-125M's shape in float32 on a CPU, OPT-1.3B's in bfloat16 on CUDA.

Sides alternate within one process; medians of the ratios are reported. Labels stand at the last two positions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from _models import batch, on_cpu, opt, plain_loss, seconds, textbook_step, two_forwards
from _record import emit

POPULATION, ROWS, LENGTH = 32, 8, 32

GOALS = {
    "cpu": {
        "lozo_over_two_forwards_16x64": ("<=", 0.60),
        "lozo_speedup_over_textbook_8x32": (">=", 7.0),
        "population_throughput": (">=", 0.95),
    },
    "cuda": {"lozo_over_doubled_forward_16x64": ("<=", 1.10), "population_throughput": (">=", 0.90)},
}


def stepper(model: torch.nn.Module) -> Callable[[dict[str, torch.Tensor]], None]:
    from smidgen.batched import BatchedEngine
    from smidgen.objective import ModelObjective
    from smidgen.optim.lozo import LOZO
    from smidgen.params import ParamView

    view = ParamView.of_model(model)
    engine, optimizer = BatchedEngine(model, view, "causal"), LOZO(view, lr=1e-6, eps=1e-3)
    return lambda data: optimizer.step(ModelObjective(engine, [data])) and None


def step_figures(model: torch.nn.Module, rows: int, length: int, repeats: int, device: str) -> dict[str, float]:
    """Step over two forwards and over one of doubled batch, and textbook step over step."""
    data, doubled = batch(model, rows, length), batch(model, 2 * rows, length)
    ours = stepper(model)
    ours(data)
    two_forwards(model, data)
    plain_loss(model, doubled)
    found: dict[str, list[float]] = {"over_two_forwards": [], "over_doubled_forward": [], "speedup_over_textbook": []}
    for i in range(repeats):
        plain = seconds(lambda: two_forwards(model, data), device)
        mine = seconds(lambda: ours(data), device)
        found["over_two_forwards"].append(mine / plain)
        found["over_doubled_forward"].append(mine / seconds(lambda: plain_loss(model, doubled), device))
        found["speedup_over_textbook"].append(seconds(lambda seed=i: textbook_step(model, data, seed), device) / mine)
    return {f"lozo_{name}_{rows}x{length}": statistics.median(ratios) for name, ratios in found.items()}


def throughput(model: torch.nn.Module, repeats: int, rank: int, device: str) -> float:
    """Candidates a second of a population, over those of one plain forward of as many rows with the head where labels are."""
    from smidgen.batched import BatchedEngine
    from smidgen.lowrank import LowRank, matrices
    from smidgen.params import ParamView

    view = ParamView.of_model(model)
    engine = BatchedEngine(model, view, "causal")
    data, all_rows = batch(model, ROWS, LENGTH), batch(model, ROWS * POPULATION, LENGTH)
    shapes = matrices(view)

    def population() -> None:
        Z = [LowRank(0, 0, i, view.ids, shapes, rank, 0, torch.device(device)) for i in range(POPULATION // 2)]
        engine.together(data, [((z, s * 1e-3),) for z in Z for s in (1, -1)])

    population()
    engine.losses(all_rows)
    ratios = []
    for _ in range(repeats):
        plain = seconds(lambda: engine.losses(all_rows), device)
        ratios.append(plain / seconds(population, device))
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=sorted(GOALS), default="cpu")
    parser.add_argument("--shape", help="opt-125m, opt-1.3b or tiny; default: opt-1.3b on CUDA, else opt-125m")
    parser.add_argument("--layers", type=int, help="fewer layers for a quick look")
    args = parser.parse_args()
    if args.device == "cpu":
        on_cpu()
    cuda = args.device == "cuda"
    shape, dtype = args.shape or ("opt-1.3b" if cuda else "opt-125m"), torch.bfloat16 if cuda else torch.float32
    model = opt(shape, args.layers, dtype, args.device)
    figures: dict[str, float] = {}
    for rows, length in ((16, 64), (8, 32)):
        figures |= step_figures(model, rows, length, args.repeats, args.device)
    for rank in (1, 2):
        name = "population_throughput" + (f"_rank_{rank}" if rank > 1 else "")
        figures[name] = throughput(model, args.repeats, rank, args.device)
    setting = {"model": f"{shape} shape, random", "layers": model.config.num_hidden_layers, "rank": 2}  # type: ignore[union-attr]
    setting |= {"dtype": str(dtype).removeprefix("torch."), "population": POPULATION, "repeats": args.repeats}
    emit("lowrank_step", figures, GOALS[args.device], setting)


if __name__ == "__main__":
    main()
