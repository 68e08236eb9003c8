"""Some entries of a weight gradient: the three ways, and where they cross.

For a layer of a model of width 768 in float32 on a CPU, over densities and tokens: the time of `gathered` (row blocks by
matrix products, then the entries) and `sampled` (one dot product an entry) over that of the dense product and a gather, and
what `products` takes. Ways alternate within one process; a figure is the median of their ratios. `crossover_per_mille`: the
largest density up to which `sampled` was the quickest in the median over shapes and numbers of tokens; the code's constant,
`_sparse_gradient._SAMPLED_PER_MILLE`, is that number as measured here, rounded, and part of the code rather than of a run's
record, so that a run takes the same way wherever it is resumed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from _models import on_cpu, seconds
from _record import emit

SHAPES = ((768, 768), (2048, 768), (768, 2048))
DENSITIES = (1, 5, 10, 20, 50, 100)  # per mille
TOKENS = (128, 512, 2048, 4096)

GOALS = {"products_over_best": ("<=", 1.15)}  # what the code takes over the best way, at the worst place


def ratios(shape: tuple[int, int], tokens: int, per_mille: int, repeats: int) -> dict[str, float]:
    """Medians of each way's time over that of the dense product and its gather."""
    from smidgen import noise
    from smidgen.adapt import _sparse_gradient as ways
    from smidgen.adapt._support import random_support
    from smidgen.linear import linear

    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(tokens, n, generator=generator) for n in shape)
    size = rows * columns
    index = random_support(noise.Address(0, 0, 0, 0, noise.INIT), size, max(1, size * per_mille // 1000)).int()
    calls = {
        "dense": lambda: linear(left.t(), right.t(), None).view(-1)[index],
        "gathered": lambda: ways.gathered(left, right, index),
        "sampled": lambda: ways.sampled(left, right, index),
        "products": lambda: ways.products(left, right, index),
    }
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(seconds(call))
    return {n: statistics.median(a / b for a, b in zip(t, found["dense"], strict=True)) for n, t in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="one small shape: whether it runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_cpu()
    shapes, densities, tokens = (((96, 64),), (10, 100), (128,)) if args.small else (SHAPES, DENSITIES, TOKENS)
    figures: dict[str, float] = {}
    over: dict[int, list[float]] = {density: [] for density in densities}  # sampled over the better of the others
    worst = 0.0
    for shape, length, per_mille in itertools.product(shapes, tokens, densities):
        found = ratios(shape, length, per_mille, args.repeats)
        best = min(found["dense"], found["gathered"], found["sampled"])
        over[per_mille].append(found["sampled"] / min(found["dense"], found["gathered"]))
        worst = max(worst, found["products"] / best)
        key = f"{shape[0]}x{shape[1]}_{length}_tokens_{per_mille}_per_mille"
        figures |= {f"{key}_{way}": found[way] for way in ("gathered", "sampled")}
        print(key, {way: round(ratio, 3) for way, ratio in found.items()}, flush=True)
    below = [d for d in densities if all(statistics.median(over[e]) < 1 for e in densities if e <= d)]
    figures["crossover_per_mille"] = max(below, default=0)
    figures["products_over_best"] = worst
    setting = {"shapes": [list(shape) for shape in shapes], "dtype": "float32", "repeats": args.repeats}
    emit("sparse_gradient", figures, GOALS, setting)


if __name__ == "__main__":
    main()
