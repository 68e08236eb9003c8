"""A training step of SpIEL against peft's LoRA, SHIRA and SUPERTUNING with the same number of tuned weights: a random Llama
of 110 million weights in float32 on a CPU, batch 4 x 128, every linear layer of the blocks adapted.

All sides compute the model's own loss and its gradient; peft's are stepped by torch's AdamW, SpIEL by sparse_adamw (AG) or
sm3 (MA). Sides alternate within one process and medians of ratios are reported. Between selections AG computes its own
entries alone; `spiel_ag_cycle_over_lora` is the mean over a whole cycle of reselection, phase and selection included. Peak:
resident memory over the loaded model, each side in a process of its own that has made steps on a tiny model first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import nn

from _models import batch, on_cpu, peak_over, seconds
from _record import emit

PEFT = ("lora", "shira", "supertuning")
SIDES = (*PEFT, "spiel_ag", "spiel_ma")
RANK, EVERY, COLLECT = 8, 20, 5  # LoRA's usual rank; the published cycle

GOALS = {
    "spiel_ag_over_lora": ("<=", 1.0),
    "spiel_ma_over_lora": ("<=", 1.0),
    "spiel_over_shira": ("<=", 0.85),
    "spiel_over_supertuning": ("<=", 0.85),
    "spiel_peak_over_lora": ("<=", 0.95),
}

Step = Callable[[], Any]


def llama(layers: int, small: bool) -> nn.Module:
    """A random Llama of width 768, or a tiny one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 12}
    tiny = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(tiny if small else wide), tie_word_embeddings=True))


def peft_step(side: str, model: nn.Module, data: dict[str, torch.Tensor], rank: int) -> Step:
    """A step of one of peft's adapters; the budget is LoRA's."""
    import peft

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = [m for n, m in model.named_modules() if n.rpartition(".")[2] in names]
    share = sum(rank * sum(m.weight.shape) for m in layers) / sum(m.weight.numel() for m in layers)
    config = {
        "lora": lambda: peft.LoraConfig(r=rank, target_modules=names),
        "shira": lambda: peft.ShiraConfig(r=rank, target_modules=names, random_seed=0),
        "supertuning": lambda: peft.SupertuningConfig(sparsity=1 - share, target_modules=names),
    }[side]()
    wrapped = peft.get_peft_model(model, config).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        wrapped(**data, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def spiel_step(growth: str, model: nn.Module, data: dict[str, torch.Tensor], rank: int, selects: bool) -> Step:
    """A step of SpIEL; `selects`: with its phases and selections, otherwise as between them."""
    from smidgen import adapt, optim

    scheme = adapt.get("spiel")
    adapted = scheme.build(model.train(), scheme.Config(rank=rank, growth=growth, every=EVERY, collect=COLLECT))
    module = optim.get("sparse_adamw" if growth == "ag" else "sm3")
    optimizer = module.build(adapted.view, module.Config(lr=1e-4))
    if selects:
        adapted.begin(optimizer)

    def step() -> None:
        optimizer.step(lambda: model(**data, use_cache=False).loss)
        if selects:
            adapted.after_step(optimizer, 1000)

    return step


def step_of(side: str, args: argparse.Namespace, selects: bool = False) -> Step:
    """A side on a model of its own."""
    model = llama(args.layers, args.small)
    rows, length, rank = (2, 16, 1) if args.small else (4, 128, RANK)
    data = batch(model, rows, length, every=True)
    if side in PEFT:
        return peft_step(side, model, data, rank)
    return spiel_step(side.removeprefix("spiel_"), model, data, rank, selects)


def times(args: argparse.Namespace) -> dict[str, float]:
    """Medians of every side's step over LoRA's, and that of a cycle."""
    steps = {side: step_of(side, args) for side in SIDES}
    for step in steps.values():
        step()
        step()
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(args.repeats):
        for side, step in steps.items():
            found[side].append(seconds(step))
    cycle = step_of("spiel_ag", args, selects=True)
    for _ in range(COLLECT):  # the first selection replaces everything: the cycle after it is the usual one
        cycle()
    mean = statistics.fmean(seconds(cycle) for _ in range(EVERY))
    ratios = {s: statistics.median(a / b for a, b in zip(found[s], found["lora"], strict=True)) for s in SIDES}
    ag = found["spiel_ag"]
    over = {s: statistics.median(a / b for a, b in zip(ag, found[s], strict=True)) for s in ("shira", "supertuning")}
    return {
        "spiel_ag_over_lora": ratios["spiel_ag"],
        "spiel_ma_over_lora": ratios["spiel_ma"],
        "spiel_ag_cycle_over_lora": mean / statistics.median(found["lora"]),
        "spiel_over_shira": over["shira"],
        "spiel_over_supertuning": over["supertuning"],
        **{f"{side}_seconds": statistics.median(found[side]) for side in SIDES},
    }


def peaks(args: argparse.Namespace) -> dict[str, float]:
    """Peak bytes over the loaded model of each side."""
    found = {}
    for side in SIDES:
        command = [
            sys.executable,
            __file__,
            "--peak",
            side,
            "--threads",
            str(args.threads),
            "--layers",
            str(args.layers),
            *(["--small"] if args.small else []),
        ]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        high, before = json.loads(out.splitlines()[-1])
        found[side] = high - before
        print(f"peak over the model, {side}: {found[side] / 2**20:.0f} MiB", flush=True)
    return {
        "spiel_peak_over_lora": found["spiel_ag"] / found["lora"],
        "spiel_peak_over_shira": found["spiel_ag"] / found["shira"],
        "spiel_ma_peak_over_lora": found["spiel_ma"] / found["lora"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12, help="fewer make a quicker, cruder comparison")
    parser.add_argument("--small", action="store_true", help="a tiny model: whether it runs")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_cpu()
    if args.peak:
        tiny = step_of(args.peak, argparse.Namespace(layers=2, small=True), selects=True)
        for _ in range(COLLECT + 1):  # what is imported and compiled on first use is no side's memory
            tiny()
        step = step_of(args.peak, args, selects=True)

        def several() -> None:
            for _ in range(COLLECT + 1):  # through a phase and its selection
                step()

        print(json.dumps(peak_over(several)))
        return
    figures = {**peaks(args), **times(args)}
    shape = "tiny" if args.small else f"{args.layers} layers, width 768, random"
    emit(
        "spiel_step",
        figures,
        GOALS,
        {"model": shape, "dtype": "float32", "rank": 1 if args.small else RANK, "repeats": args.repeats},
    )


if __name__ == "__main__":
    main()
