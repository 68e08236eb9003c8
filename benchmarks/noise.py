"""Noise against plain torch: one pass of update, displacement or rounding over 125 million weights, beside torch's own passes.

Rademacher: a plain in-place axpy, `w.add_(x, alpha=s)`, that reads its x from memory. Gaussian: `torch.normal(out=z)` and
`w.add_(z, alpha=s)`, the sweep of textbook zeroth-order code. All sides take turns in one process; figures are ratios of
medians.

    python benchmarks/noise.py            125 million weights, about 2 GB
    python benchmarks/noise.py --quick    a smoke test
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from _record import emit
from smidgen import noise

SCALE = 1e-6


def sides(count: int, device: str) -> dict[str, Callable[[], object]]:
    """The passes that are compared, by name. Each works on all `count` weights."""
    generator = torch.Generator(device).manual_seed(0)
    w32, x32 = (torch.randn(count, generator=generator, device=device) for _ in range(2))
    w16, x16 = w32.bfloat16(), x32.bfloat16()
    z = torch.empty_like(w32)
    terms = [(noise.Address(1, 2, 3, 4, noise.PROBE), SCALE)]
    at = noise.Address(1, 2, 3, 0, noise.ROUND)

    def textbook(weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.normal(0.0, 1.0, (count,), generator=generator, out=out)
        weight.add_(out, alpha=SCALE)

    return {
        "axpy": lambda: w32.add_(x32, alpha=SCALE),
        "axpy to another tensor": lambda: torch.add(w32, x32, alpha=SCALE, out=z),
        "rademacher": lambda: noise.update_(w32, terms, "rademacher", at=at),
        "rademacher displaced": lambda: noise.displace_(z, w32, terms, "rademacher"),
        "normal and add": lambda: textbook(w32, z),
        "gaussian": lambda: noise.update_(w32, terms, "gaussian", at=at),
        "bfloat16 axpy": lambda: w16.add_(x16, alpha=SCALE),
        "bfloat16 rademacher": lambda: noise.update_(w16, terms, "rademacher", at=at),
        "bfloat16 rademacher to nearest": lambda: noise.update_(w16, terms, "rademacher", at=at, rounding="nearest"),
        "bfloat16 rademacher displaced": lambda: noise.displace_(x16, w16, terms, "rademacher"),
        "bfloat16 normal and add": lambda: textbook(w16, x16),
        "bfloat16 gaussian": lambda: noise.update_(w16, terms, "gaussian", at=at),
        "copy to bfloat16": lambda: w16.copy_(x32),
        "write to bfloat16": lambda: noise.write_(w16, x32, rounding="stochastic", at=at),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one million weights, three repetitions")
    parser.add_argument("--count", type=int, default=125_000_000, help="weights")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    count, repeats = (1_000_000, 3) if args.quick else (args.count, args.repeats)

    passes = sides(count, args.device)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(repeats + 1):  # the first compiles and touches the memory
        for name, run in passes.items():
            wait()
            began = time.perf_counter()
            run()
            wait()
            if repeat:
                times[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    for name, median in seconds.items():
        print(f"{name:<32} {median * 1e3:9.2f} ms {median / count * 1e9:8.3f} ns a weight")

    # A call on a small tensor: what a training step pays for each of its hundreds of biases and norms.
    small = torch.zeros(768, device=args.device)
    terms, at = [(noise.Address(1, 2, 3, 4, noise.PROBE), SCALE)], noise.Address(1, 2, 3, 0, noise.ROUND)
    calls = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(100):
            noise.update_(small, terms, "rademacher", at=at)
        calls.append((time.perf_counter() - began) / 100)

    figures = {
        "rademacher_over_axpy": seconds["rademacher"] / seconds["axpy"],
        "gaussian_speedup": seconds["normal and add"] / seconds["gaussian"],
        "displaced_over_axpy_out": seconds["rademacher displaced"] / seconds["axpy to another tensor"],
        "bfloat16_rademacher_over_axpy": seconds["bfloat16 rademacher"] / seconds["bfloat16 axpy"],
        "bfloat16_nearest_over_axpy": seconds["bfloat16 rademacher to nearest"] / seconds["bfloat16 axpy"],
        "bfloat16_displaced_over_axpy": seconds["bfloat16 rademacher displaced"] / seconds["bfloat16 axpy"],
        "bfloat16_gaussian_speedup": seconds["bfloat16 normal and add"] / seconds["bfloat16 gaussian"],
        "bfloat16_write_over_copy": seconds["write to bfloat16"] / seconds["copy to bfloat16"],
        "microseconds_per_small_call": statistics.median(calls) * 1e6,
    }
    goals = {"rademacher_over_axpy": ("<=", 3.0), "gaussian_speedup": (">=", 2.0)}
    emit("noise", figures, goals, {"weights": count, "repeats": repeats, "on": args.device})


if __name__ == "__main__":
    main()
