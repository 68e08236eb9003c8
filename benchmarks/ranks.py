"""Two ranks against one, over gloo with one thread a rank: rows a second, steps of ranks that share probes, bytes sent.

Rows: each rank has as many rows as the one rank has. Probes: both ranks have the same rows and half of the probes each. Bytes
are those that a rank other than the first sends in a step, by the number of its probes; hashes are not among them. The latency
of an exchange is measured alone, with nothing else to do. Interleaved, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _models import Stepper, batch, on_cpu, opt
from _record import emit

ROWS, LENGTH, QUERIES = 8, 64, 2


def worker(args: argparse.Namespace) -> None:
    """One rank's part; rank 0 prints what it measured."""
    import torch

    from smidgen import world
    from smidgen.objective import ModelObjective
    from smidgen.ranks import Reduced

    torch.set_num_threads(1)
    world.join(timeout=120)
    model = opt("tiny" if args.small else "opt-125m", layers=2 if args.small else args.layers)
    step = Stepper(model, queries=QUERIES)
    data = batch(model, ROWS, LENGTH)
    width = world.count() if args.share == "probes" else 1

    def once() -> float:
        inner: Any = ModelObjective(step.engine, [data])
        begun = time.perf_counter()
        step.optimizer.step(Reduced(inner, width) if world.count() > 1 else inner)
        return time.perf_counter() - begun

    once()
    before = world.traffic.sent, world.traffic.exchanges
    times = [once() for _ in range(args.steps)]
    found = {"seconds": statistics.median(times), "sent": world.traffic.sent - before[0]}
    if world.count() > 1:
        waits = []
        for _ in range(500):
            begun = time.perf_counter()
            world.from_first([0.0] * 2 * QUERIES)
            waits.append(time.perf_counter() - begun)
        found["latency"] = statistics.median(waits)
    sent = [int(part) for part in world.everywhere(torch.tensor([found["sent"]]))]
    if world.leads():
        print(json.dumps({**found, "sent": sent[-1], "bytes": 2 * QUERIES * args.steps}))


def measured(ranks: int, share: str, args: argparse.Namespace) -> dict[str, float]:
    """What a start of so many ranks measures."""
    port = str(23000 + os.getpid() % 16000)
    command = [sys.executable, __file__, "--worker", "--share", share, "--steps", str(args.steps), "--layers", str(args.layers)]
    runs = []
    for rank in range(ranks):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        more = ["--small"] if args.small else []
        runs.append(subprocess.Popen([*command, *more], env=env, stdout=subprocess.PIPE, text=True))
    outputs = [run.communicate()[0] for run in runs]
    if any(run.returncode for run in runs):
        raise SystemExit("a rank failed")
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--layers", type=int, default=6, help="of OPT-125M's shape")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--share", choices=["rows", "probes"], default="rows", help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_cpu()
    if args.worker:
        worker(args)
        return
    found: dict[str, list[dict[str, float]]] = {"one": [], "rows": [], "probes": []}
    for _ in range(args.repeats):
        found["one"].append(measured(1, "rows", args))
        found["rows"].append(measured(2, "rows", args))
        found["probes"].append(measured(2, "probes", args))
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in found.items()}
    per_step = 2 * QUERIES
    figures = {
        "two_rank_speedup": 2 * seconds["one"] / seconds["rows"],
        "two_rank_probe_speedup": seconds["one"] / seconds["probes"],
        "rows_per_second_one": ROWS / seconds["one"],
        "rows_per_second_two": 2 * ROWS / seconds["rows"],
        "bytes_per_probe": max(run["sent"] / run["bytes"] for run in found["rows"]),
        "bytes_per_probe_sharing_probes": max(run["sent"] / run["bytes"] for run in found["probes"]),
        "exchange_microseconds": 1e6 * statistics.median(run["latency"] for run in found["rows"]),
        "exchange_share_of_step": statistics.median(run["latency"] for run in found["rows"]) / seconds["rows"],
    }
    goals = {"two_rank_speedup": (">=", 1.8), "bytes_per_probe": ("<=", 64.0)}
    shape = "tiny" if args.small else f"OPT-125M, {args.layers} layers"
    setting = {"model": shape, "rows_a_rank": ROWS, "tokens": LENGTH, "probes": per_step, "steps": args.steps}
    emit("ranks", figures, goals, {**setting, "repeats": args.repeats, "threads_a_rank": 1, "backend_of_ranks": "gloo"})


if __name__ == "__main__":
    main()
