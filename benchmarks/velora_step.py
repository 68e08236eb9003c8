"""Steps of full fine-tuning with VeLoRA on all linear inputs against AdamW, plain and with activation checkpointing, and of
LoRA with VeLoRA against LoRA with checkpointing and peft's own VeLoRA variant: a random Llama of 110M weights, float32.

velora_over_plain, velora_over_checkpointed              time of a step over the opponent's; medians, sides alternate
velora_peak_over_plain, velora_peak_over_checkpointed    peak over the loaded weights over the opponent's; own processes
velora_over_<side>, velora_peak_over_<side>              the same against checkpointing with 8-bit AdamW, and with SinkGD,
                                                         which has no state, updated in the backward pass; and VeLoRA
                                                         with checkpointing itself
velora_cheap_...                                         recompute: cheap, which keeps gate(x) and up(x) of the MLPs, in
                                                         place of up, which keeps gate(x)
same_kernels_over_plain                                  velora_over_plain with torch's matrix products on both sides: our
                                                         layers multiply through oneDNN where there is AVX512
lora_velora_over_<side>, lora_velora_peak_over_<side>    LoRA + VeLoRA over LoRA with checkpointing and over peft's variant
<side>_peak_mib, _gradient_mib, _state_mib, _saved_mib   of two steps; what is held at the end of a backward (of a fused side:
                                                         one tensor's); the optimizer's tensors; what the forward saves for
                                                         the backward, of its own hooks, recomputation inside checkpoints and
                                                         logits not included
weights_mib, logits_mib                                  the loaded weights, which no peak includes; a block of logits

All sides share our chunked cross-entropy (logits of 4M numbers at a time, and their gradient with them) and one policy for the
embedding, which is tied to the head: it is frozen. Times are those of runs; peaks, of processes that give tensors of a megabyte
and more back to the system at once (glibc keeps holes between them, which are no side's need), and `..._usual_peak...` of
processes that do not. `--device cuda`: width 2048, bfloat16, 8 x 1024.
`--small` is a smoke test on a tiny model; `--only velora,plain` leaves the other sides out. `--keep FILE` keeps figures:
those that it holds are not measured again. `--part memory`, which needs no quiet machine, or `times` measures no more, and its
record has the goals of its figures alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import Tensor, nn

from _models import Stepper, batch, on_cpu, peak_over, seconds
from _record import emit

GOALS = {
    "velora_over_plain": ("<=", 0.78),
    "velora_over_checkpointed": ("<=", 0.65),
    "velora_peak_over_plain": ("<=", 0.35),
    "velora_peak_over_checkpointed": ("<=", 0.65),
}
USUAL = ("velora", "plain", "checkpointed")  # sides whose peak is also measured under glibc's own threshold
GROUPS, RANK, RECOMPUTE = 32, 8, "up"
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
GPU: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "vocab_size": 32000,
}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
FULL: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 32000,
}


def skeleton(options: dict[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**options, tie_word_embeddings=True))


def llama(shape: str) -> nn.Module:
    """A random Llama with its embedding, tied to the head, frozen; shape: tiny, full or gpu."""
    with torch.random.fork_rng(devices=[]), torch.device("cuda" if shape == "gpu" else "cpu"):
        torch.manual_seed(0)
        model = skeleton({"tiny": TINY, "full": FULL, "gpu": GPU}[shape])
    model.get_input_embeddings().weight.requires_grad_(False)  # type: ignore[operator]
    return model.to("cuda", torch.bfloat16) if shape == "gpu" else model


def plain(model: nn.Module) -> Stepper:
    return Stepper(model, "adamw")


def checkpointed(model: nn.Module, method: str = "adamw", **options: Any) -> Stepper:
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return Stepper(model, method, **options)


def checkpointed_8bit(model: nn.Module) -> Stepper:
    return checkpointed(model, "sparse_adamw", state="8bit")


def checkpointed_sinkgd(model: nn.Module) -> Stepper:
    return checkpointed(model, "sinkgd", fused=True)


def velora(model: nn.Module) -> Stepper:
    return compressed(model, "velora_adamw")


def velora_checkpointed(model: nn.Module) -> Stepper:
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return velora(model)


def velora_cheap(model: nn.Module) -> Stepper:
    return compressed(model, "velora_adamw", "cheap")


def compressed(model: nn.Module, method: str, recompute: str = RECOMPUTE) -> Stepper:
    from smidgen import activations
    from smidgen.params import ParamView

    policy = activations.get("velora")
    policy.build(model, policy.Config(groups=GROUPS, recompute=recompute), view=ParamView.of_model(model))
    return Stepper(model, method)


def adapters(model: nn.Module, **options: Any) -> nn.Module:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear", **options))  # type: ignore[arg-type]


def lora_checkpointed(model: nn.Module) -> Stepper:
    model.enable_input_require_grads()  # type: ignore[operator]
    return checkpointed(adapters(model))


def lora_velora(model: nn.Module) -> Stepper:
    return compressed(adapters(model), "velora_adamw")


def lora_peft_velora(model: nn.Module) -> Stepper:
    from peft.tuners.lora import VeloraConfig

    return Stepper(adapters(model, velora_config=VeloraConfig(num_groups=GROUPS, init_type="batch_average_once")), "adamw")


SIDES: dict[str, Callable[[nn.Module], Stepper]] = {
    side.__name__: side
    for side in (
        plain,
        checkpointed,
        checkpointed_8bit,
        checkpointed_sinkgd,
        velora,
        velora_checkpointed,
        velora_cheap,
        lora_checkpointed,
        lora_velora,
        lora_peft_velora,
    )
}
PAIRS = {
    "velora": ("plain", "checkpointed", "checkpointed_8bit", "checkpointed_sinkgd", "velora_checkpointed", "velora_cheap"),
    "lora_velora": ("lora_checkpointed", "lora_peft_velora"),
}


def made(side: str, shape: str) -> Stepper:
    """One side's model and optimizer. peft draws its adapters from torch's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SIDES[side](llama(shape))


def bytes_of(step: Stepper, data: dict[str, Tensor]) -> dict[str, float]:
    """MiB of gradients, of the optimizer's state and of what a forward saves, without parameters."""
    from smidgen.activations._compressed import held
    from smidgen.objective import ModelObjective

    known = {p.untyped_storage().data_ptr() for p in step.engine.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.engine.differentiable(data).nll.sum().detach()
    with torch.enable_grad():
        ModelObjective(step.engine, [data]).backward()
    dense = [e.tensor.grad for e in step.view if e.tensor.grad is not None]
    if getattr(step.optimizer.config, "fused", False):
        dense = [max(dense, key=lambda gradient: gradient.nbytes)]
    compressed = [u.u for e in step.view if (u := held(e.tensor)) is not None]
    step.optimizer.zero_grad()
    state = [v for s in step.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    sizes = {"gradient": [*dense, *compressed], "state": state}
    found = {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in sizes.items()}
    return {name: size / 2**20 for name, size in {**found, "saved": sum(saved.values())}.items()}


def measure(side: str, shape: str, rows: int, length: int) -> dict[str, float]:
    """Peak MiB over the loaded weights of two steps in this process, and its parts."""
    from smidgen import memory

    memory.warm_up()
    tiny = made(side, "tiny")
    tiny(batch(tiny.engine.model, 2, 8, every=True))  # load libraries before the baseline is taken
    model = llama(shape)
    data = batch(model, rows, length, every=True)
    kept: list[Stepper] = []

    def steps() -> None:
        kept.append(SIDES[side](model))
        kept[0](data)
        kept[0](data)

    high, before = peak_over(steps)
    return {"peak": (high - before) / 2**20, **bytes_of(kept[0], data)}


def times(names: list[str], first: str, shape: str, rows: int, length: int, repeats: int) -> dict[str, float]:
    """Median of the first side's step time over each other side's; the sides alternate in this process."""
    from smidgen import linear

    steps = {side: made(side, shape) for side in (first, *names)}
    data = batch(steps[first].engine.model, rows, length, every=True)
    device = "cuda" if shape == "gpu" else "cpu"
    taken: dict[str, list[float]] = {side: [] for side in (*steps, "same_kernels")}
    for step in steps.values():
        step(data)
    for _ in range(repeats):
        for side, step in steps.items():
            taken[side].append(seconds(lambda step=step: step(data), device))  # type: ignore[misc]
        if "plain" in names:
            usual, linear.SMALLEST = linear.SMALLEST, sys.maxsize
            taken["same_kernels"].append(seconds(lambda: steps[first](data), device))
            linear.SMALLEST = usual
    for side in steps:
        print(f"{side}: {statistics.median(taken[side]):.2f} s a step", flush=True)
    found = {f"{first}_over_{side}": _ratio(taken[first], taken[side]) for side in names}
    if "velora_cheap" in names:
        others = [side for side in ("plain", "checkpointed") if side in names]
        found |= {f"velora_cheap_over_{side}": _ratio(taken["velora_cheap"], taken[side]) for side in others}
    return found | ({"same_kernels_over_plain": _ratio(taken["same_kernels"], taken["plain"])} if "plain" in names else {})


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a tiny model and short rows: a smoke test")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the larger model")
    parser.add_argument("--keep", type=Path, help="file that keeps figures")
    parser.add_argument("--part", choices=("memory", "times"), help="measure this alone")
    parser.add_argument("--only", help="sides to measure, separated by commas; all")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--times", choices=PAIRS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = "tiny" if args.small else "gpu" if args.device == "cuda" else "full"
    if shape != "gpu":
        on_cpu()
    rows, length = (2, 16) if args.small else (args.rows, args.length or (1024 if shape == "gpu" else 256))
    only = list(SIDES) if args.only is None else args.only.split(",")
    pairs = {first: [side for side in others if side in only] for first, others in PAIRS.items() if first in only}
    if args.peak:
        print(json.dumps(measure(args.peak, shape, rows, length)))
        return
    if args.times:
        print(json.dumps(times(pairs[args.times], args.times, shape, rows, length, 1 if args.small else args.repeats)))
        return

    def apart(*more: str, **environment: str) -> dict[str, float]:
        """The figures that a process of this script prints at its end; on CUDA, where memory is counted exactly, without it."""
        if args.device == "cuda":
            gc.collect()
            if more[0] == "--peak":
                return measure(more[1], shape, rows, length)
            return times(pairs[more[1]], more[1], shape, rows, length, args.repeats)
        command = [sys.executable, __file__, *sys.argv[1:], *more]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment)
        *lines, last = done.stdout.splitlines()
        print("\n".join(lines), flush=True)
        return json.loads(last)  # type: ignore[no-any-return]

    from smidgen.loss import KEPT_LOGITS

    size = {"gpu": 2}.get(shape, 4)
    config = {"tiny": TINY, "full": FULL, "gpu": GPU}[shape]
    logits = rows * length * config["vocab_size"]
    with torch.device("meta"):
        weights = sum(p.numel() for p in skeleton(config).parameters())
    figures = {"weights_mib": weights * size / 2**20, "logits_mib": min(logits, KEPT_LOGITS) * 4 / 2**20}
    if args.keep and args.keep.exists():
        figures |= json.loads(args.keep.read_text())

    def known(found: dict[str, float]) -> None:
        figures.update(found)
        if args.keep:
            args.keep.write_text(json.dumps(figures))

    for side in only if args.part != "times" else ():
        if f"{side}_peak_mib" not in figures:
            known({f"{side}_{part}_mib": value for part, value in apart("--peak", side, **ALLOCATOR).items()})
            print(f"{side}: peak over the weights {figures[f'{side}_peak_mib']:.0f} MiB", flush=True)
        if side in USUAL and f"{side}_usual_peak_mib" not in figures and args.device == "cpu":
            known({f"{side}_usual_peak_mib": apart("--peak", side)["peak"]})
    for first, others in pairs.items() if args.part != "memory" else ():
        if missing := [side for side in others if f"{first}_over_{side}" not in figures]:
            known(apart("--times", first, "--only", ",".join([first, *missing])))
    for side in USUAL[1:]:
        if {"velora_cheap_peak_mib", f"{side}_peak_mib"} <= set(figures):
            ratio = figures["velora_cheap_peak_mib"] / max(figures[f"{side}_peak_mib"], 1e-9)
            figures[f"velora_cheap_peak_over_{side}"] = ratio
        if {"velora_usual_peak_mib", f"{side}_usual_peak_mib"} <= set(figures):
            ratio = figures["velora_usual_peak_mib"] / max(figures[f"{side}_usual_peak_mib"], 1e-9)
            figures[f"velora_usual_peak_over_{side}"] = ratio
    for first, others in pairs.items():
        for side in others if f"{first}_peak_mib" in figures else ():
            figures[f"{first}_peak_over_{side}"] = figures[f"{first}_peak_mib"] / max(figures[f"{side}_peak_mib"], 1e-9)
    names = {"tiny": "tiny", "full": "llama 110M, random", "gpu": "llama 0.9B, random"}
    setting = {"model": names[shape], "dtype": "bfloat16" if shape == "gpu" else "float32", "rows": rows, "length": length}
    setting |= {"groups": GROUPS, "recompute": RECOMPUTE, "lora_rank": RANK, "embedding": "tied, frozen on all sides"}
    goals = {key: goal for key, goal in GOALS.items() if key in figures and shape == "full"}
    emit("velora_step", figures, goals, setting | ALLOCATOR)


if __name__ == "__main__":
    main()
