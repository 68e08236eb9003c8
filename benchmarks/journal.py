"""Replay against training at OPT-125M's shape, float32: seconds a step of each, and bytes of the journal a step."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from _record import emit
from smidgen import journal
from smidgen.objective import ModelObjective, Recorded, Replayed
from smidgen.optim.zo_sgd import ZOSGD
from smidgen.params import ParamView
from smidgen.probing import Engine
from zo_step import EPS, LR, batch, opt_125m


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layers", type=int, default=12, help="fewer layers for a quick look")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, data = opt_125m(args.layers), batch(16, 64, every=False)
    view = ParamView.of_model(model)
    start = view.snapshot()
    engine, optimizer = Engine(model, view, "causal"), ZOSGD(view, lr=LR, eps=EPS)
    engine.check_batch(data)
    live, replayed = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.bin"
        with journal.Writer.create(path, {"groups": 1}) as writer:
            header = path.stat().st_size
            for _ in range(args.steps):
                began = time.perf_counter()
                recorded = Recorded(ModelObjective(engine, [data]))
                optimizer.step(recorded)
                writer.append([LR], recorded.values)
                live.append(time.perf_counter() - began)
        size = (path.stat().st_size - header) / args.steps
        end = view.snapshot()
        view.restore(start)
        optimizer = ZOSGD(view, lr=LR, eps=EPS)
        for record in journal.read(path).steps():
            began = time.perf_counter()
            optimizer.step(Replayed(record.values))
            replayed.append(time.perf_counter() - began)
    assert all(torch.equal(end[e.name], e.storage) for e in view), "replay differs from training"
    figures = {"replay_speedup": statistics.median(live[1:]) / statistics.median(replayed[1:]), "bytes_per_step": size}
    goals = {"replay_speedup": (">=", 10.0), "bytes_per_step": ("<=", 64.0)}
    emit(
        "journal",
        figures,
        goals,
        {"model": "OPT-125M shape, random", "batch": "16x64", "labels": 2, "steps": args.steps, "layers": args.layers},
    )


if __name__ == "__main__":
    main()
