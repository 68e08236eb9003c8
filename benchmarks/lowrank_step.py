"""Low-rank probes on an OPT-125M-shaped random model, float32: a two-sided `lozo` step against two plain forwards with full
logits and against the textbook in-place MeZO step, and a population of 32 probes against one plain forward of the same rows.

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

from _models import batch, opt, seconds, textbook_step, two_forwards
from _record import emit

POPULATION, ROWS, LENGTH = 32, 8, 32


def stepper(model: torch.nn.Module) -> Callable[[dict[str, torch.Tensor]], None]:
    from smidgen.batched import BatchedEngine
    from smidgen.objective import ModelObjective
    from smidgen.optim.lozo import LOZO
    from smidgen.params import ParamView

    view = ParamView.of_model(model)
    engine, optimizer = BatchedEngine(model, view, "causal"), LOZO(view, lr=1e-6, eps=1e-3)
    return lambda data: optimizer.step(ModelObjective(engine, [data])) and None


def step_figures(rows: int, length: int, repeats: int, layers: int) -> tuple[float, float]:
    """(step over two forwards, textbook step over step)."""
    model = opt(layers=layers)
    data = batch(model, rows, length)
    ours = stepper(model)
    ours(data)
    two_forwards(model, data)
    over, speedup = [], []
    for i in range(repeats):
        plain = seconds(lambda: two_forwards(model, data))
        mine = seconds(lambda: ours(data))
        over.append(mine / plain)
        speedup.append(seconds(lambda seed=i: textbook_step(model, data, seed)) / mine)
    return statistics.median(over), statistics.median(speedup)


def throughput(repeats: int, layers: int, rank: int) -> float:
    """Candidates a second of a population, over those of one plain forward of as many rows with the head where labels are."""
    from smidgen.batched import BatchedEngine
    from smidgen.lowrank import LowRank, matrices
    from smidgen.params import ParamView

    model = opt(layers=layers)
    view = ParamView.of_model(model)
    engine = BatchedEngine(model, view, "causal")
    data, all_rows = batch(model, ROWS, LENGTH), batch(model, ROWS * POPULATION, LENGTH)
    shapes = matrices(view)

    def population() -> None:
        Z = [LowRank(0, 0, i, view.ids, shapes, rank, 0) for i in range(POPULATION // 2)]
        engine.together(data, [((z, s * 1e-3),) for z in Z for s in (1, -1)])

    population()
    engine.losses(all_rows)
    ratios = []
    for _ in range(repeats):
        plain = seconds(lambda: engine.losses(all_rows))
        ratios.append(plain / seconds(population))
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    over, speedup16 = step_figures(16, 64, options.repeats, options.layers)
    over8, speedup8 = step_figures(8, 32, options.repeats, options.layers)
    figures = {
        "lozo_over_two_forwards_16x64": over,
        "lozo_speedup_over_textbook_16x64": speedup16,
        "lozo_over_two_forwards_8x32": over8,
        "lozo_speedup_over_textbook_8x32": speedup8,
        "population_throughput": throughput(options.repeats, options.layers, rank=1),
        "population_throughput_rank_2": throughput(options.repeats, options.layers, rank=2),
    }
    goals = {
        "lozo_over_two_forwards_16x64": ("<=", 0.60),
        "lozo_speedup_over_textbook_8x32": (">=", 7.0),
        "population_throughput": (">=", 0.95),
    }
    setting = {"model": f"OPT-125M shape, {options.layers} layers", "dtype": "float32", "rank": 2, "population": POPULATION}
    emit("lowrank_step", figures, goals, {**setting, "repeats": options.repeats, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
