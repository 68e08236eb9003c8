"""Derivative-free search of DFO-LoRA's small spaces on a RoBERTa-shaped random model of the size of the study's (hidden 128,
4 layers), float32: 32 rows of 50 tokens with one masked label word, populations of 20, query and key, r = 4, d = 500 a layer.

dfo_speedup       evaluations a second of processor time, of `cma_es` through the batched engine with the prefix cache, over
                  those of one candidate at a time without it; a round over all layers on both sides, which alternate
dfo_gap           largest difference of a candidate's fitness between the two
dfo_over_public   the same over the public code's loop: a candidate is written into the adapters, the whole model runs on the
                  batch, with its logits over the whole vocabulary at all positions; public_gap: difference of fitness
dfo_layers        share of the layers that the fast side runs
dfo_peak_ratio    peak memory over the loaded model of a round, over that of one plain forward of as many rows as the fast side
                  evaluates at once; each in its own process
at_once           candidates that the fast side evaluates in one forward
map_bytes         what the random maps would take if they were stored; they are not

`--small` is a smoke test on a tiny model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch

from _models import peak_over
from _record import emit

POPULATION = 20
SHAPES = {  # hidden, layers, heads, rows, tokens, d
    "base": (768, 12, 12, 32, 50, 500),
    "study": (128, 4, 4, 32, 50, 500),  # of benchmarks/dfo_lora.py
    "small": (256, 6, 4, 32, 50, 500),
    "tiny": (32, 2, 2, 4, 8, 20),
}


def model_and_rows(shape: str, rows: int | None = None) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A random masked LM, and rows whose fourth token is one of two label words."""
    import transformers

    hidden, layers, heads, count, length, _ = SHAPES[shape]
    config = transformers.RobertaConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=length + 4, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.RobertaForMaskedLM(config).eval()
        count = rows or count
        ids = torch.randint(5, 8192, (count, length))
    labels = torch.full_like(ids, -100)
    words = torch.tensor([100, 200])
    labels[:, 3] = words[torch.arange(count) % 2]
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "choices": words}


def processor(run: Callable[[], object]) -> float:
    """Processor time of a call, seconds: a busy machine changes it little; compare with one thread."""
    start = time.process_time()
    run()
    return time.process_time() - start


class Search:
    """A CMA-ES over the layers of a model; call it for one round."""

    def __init__(self, shape: str, fast: bool):
        from smidgen.adapt import dfo_lora
        from smidgen.batched import BatchedEngine
        from smidgen.optim.cma_es import CMAES
        from smidgen.probing import Engine

        model, self.data = model_and_rows(shape)
        adapted = dfo_lora.build(model, dfo_lora.Config())
        self.engine = (BatchedEngine if fast else Engine)(adapted.model, adapted.view, "masked")
        self.engine.reuse.every = int(fast)
        self.optimizer = CMAES(adapted.view, dimension=SHAPES[shape][5], population=POPULATION, init="hidden", incumbent="mean")

        self.engine.prepare(self.data)
        probes = [((z, 1.0),) for z in self.optimizer.space(0).displacements(np.ones((1, self.optimizer.dims[0])))]
        self.at_once = min(POPULATION, max(1, self.engine.memory // self.engine.bytes_of(self.data, probes))) if fast else 1

    def __call__(self) -> list[float]:
        """The fitness of every candidate of a round."""
        from smidgen.objective import ModelObjective, Recorded

        values: list[float] = []
        for _ in self.optimizer.blocks:
            recorded = Recorded(ModelObjective(self.engine, [self.data]))
            self.optimizer.step(recorded)
            values += recorded.values[-POPULATION:]
        return values

    def public(self) -> tuple[float, float]:
        """Processor time of a candidate in the public code's loop, and the largest difference from the engine's fitness."""
        optimizer, view, words = self.optimizer, self.optimizer.view, self.data["choices"]
        inputs = {key: self.data[key] for key in ("input_ids", "attention_mask")}
        rows, at = (self.data["labels"] >= 0).nonzero(as_tuple=True)
        golds = (self.data["labels"][rows, at][:, None] == words).long().argmax(1)
        Z = np.random.default_rng(0).standard_normal((4, optimizer.dims[0]))
        start, probes = view.snapshot(), optimizer.space(0).displacements(Z)
        expected = self.engine.together(self.data, [((z, 1.0),) for z in probes])
        gaps, took = [], []
        for z, known in zip(probes, expected, strict=True):

            def run(z: Any = z) -> float:
                for name, value in z.values.items():
                    view[name].storage.copy_(start[name] + value)
                with torch.no_grad():
                    logits = self.engine.model(**inputs).logits[rows, at][:, words]
                return float(torch.nn.functional.cross_entropy(logits, golds))

            found: list[float] = []
            took.append(processor(lambda run=run, found=found: found.append(run())))
            gaps.append(abs(found[0] - float(known.nll.mean())))
        view.restore(start)
        return statistics.median(took), max(gaps)


def speed(shape: str, repeats: int) -> dict[str, float]:
    """Speed-up, gap and share of layers run."""
    fast, slow = Search(shape, True), Search(shape, False)
    gaps = [max(abs(a - b) for a, b in zip(fast(), slow(), strict=True))]
    layers = len(fast.optimizer.blocks)
    skipped, ratios, mine = fast.engine.reuse.skipped, [], 0.0
    for _ in range(repeats):
        found: list[list[float]] = []
        mine = processor(lambda found=found: found.append(fast()))
        ratios.append(processor(lambda found=found: found.append(slow())) / mine)
        gaps.append(max(abs(a - b) for a, b in zip(*found, strict=True)))
    calls = repeats * layers * -(-POPULATION // fast.at_once)
    share = 1.0 - (fast.engine.reuse.skipped - skipped) / (calls * layers)
    each, gap = slow.public()
    over = each * layers * POPULATION / mine
    figures = {"dfo_speedup": statistics.median(ratios), "dfo_gap": max(gaps), "dfo_layers": share}
    return figures | {"at_once": fast.at_once, "dfo_over_public": over, "public_gap": gap}


def peak(side: str, shape: str, at_once: int) -> int:
    """Bytes of peak memory over the loaded model of a round, or of a plain forward of the rows of so many candidates."""
    from smidgen import memory

    memory.warm_up()
    run: Any
    if side == "search":
        Search("tiny", True)()
        run = Search(shape, True)
    else:
        from smidgen.params import ParamView
        from smidgen.probing import Engine

        model, data = model_and_rows(shape, at_once * SHAPES[shape][3])
        engine = Engine(model, ParamView.of_model(model), "masked")
        engine.prepare(data)

        def run() -> None:
            engine.losses(data)

    high, before = peak_over(run)
    return high - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, default="study")
    parser.add_argument("--at-once", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=("search", "forward"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = "tiny" if options.small else options.shape
    if options.peak:
        print(json.dumps(peak(options.peak, shape, options.at_once)))
        return
    figures = speed(shape, 1 if options.small else options.repeats)
    peaks = {}
    for side in ("search", "forward"):
        command = [sys.executable, __file__, "--peak", side, "--shape", shape, "--at-once", str(figures["at_once"])]
        peaks[side] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    hidden, layers, *_, d = SHAPES[shape]
    figures |= {"dfo_peak_ratio": peaks["search"] / max(1, peaks["forward"]), "map_bytes": layers * hidden * 4 * d * 4}
    goals = {"dfo_speedup": (">=", 3.0), "dfo_gap": ("<=", 1e-4), "dfo_peak_ratio": ("<=", 1.10)}
    setting = {"model": f"RoBERTa, hidden {hidden}, {layers} layers", "dtype": "float32", "population": POPULATION, "d": d}
    emit("dfo", figures, goals, {**setting, "repeats": options.repeats, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
