"""Steps of full fine-tuning with VeLoRA on all linear inputs against AdamW, plain and with activation checkpointing, and of
LoRA with VeLoRA against LoRA with checkpointing and peft's own VeLoRA variant: a random Llama of 110M weights, float32.

velora_over_plain, velora_over_checkpointed              time of a step over the opponent's; medians, sides alternate
velora_peak_over_plain, velora_peak_over_checkpointed    peak over the loaded weights over the opponent's; own processes
velora_over_<side>, velora_peak_over_<side>              the same against checkpointing with SinkGD, which has no state
lora_velora_over_<side>, lora_velora_peak_over_<side>    LoRA + VeLoRA over LoRA with checkpointing and over peft's variant
<side>_peak_mib, _gradient_mib, _state_mib, _saved_mib   of two steps; what is held at the end of a backward; the optimizer's
                                                         tensors; what the forward saves for the backward (of its own hooks,
                                                         recomputation inside checkpoints not included)

All sides share our chunked cross-entropy (logits of at most 16M numbers at a time, made again in the backward) and one
policy for the embedding, which is tied to the head: it is frozen. `--small` is a smoke test on a tiny model.
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
from torch import Tensor, nn

from _models import Stepper, batch, on_cpu, peak_over, seconds
from _record import emit

GOALS = {
    "velora_over_plain": ("<=", 0.78),
    "velora_over_checkpointed": ("<=", 0.65),
    "velora_peak_over_plain": ("<=", 0.35),
    "velora_peak_over_checkpointed": ("<=", 0.65),
}
GROUPS, RANK = 32, 8
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
FULL: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 32000,
}


def llama(small: bool) -> nn.Module:
    """A random Llama with its embedding, tied to the head, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(TINY if small else FULL), tie_word_embeddings=True))
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def plain(model: nn.Module) -> Stepper:
    return Stepper(model, "adamw")


def checkpointed(model: nn.Module, method: str = "adamw") -> Stepper:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return Stepper(model, method)


def checkpointed_sinkgd(model: nn.Module) -> Stepper:
    return checkpointed(model, "sinkgd")


def velora(model: nn.Module) -> Stepper:
    return compressed(model, "velora_adamw")


def compressed(model: nn.Module, method: str) -> Stepper:
    from smidgen import activations
    from smidgen.params import ParamView

    policy = activations.get("velora")
    policy.build(model, policy.Config(groups=GROUPS, recompute="mlp"), view=ParamView.of_model(model))
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
    for side in (plain, checkpointed, checkpointed_sinkgd, velora, lora_checkpointed, lora_velora, lora_peft_velora)
}
PAIRS = {
    "velora": ("plain", "checkpointed", "checkpointed_sinkgd"),
    "lora_velora": ("lora_checkpointed", "lora_peft_velora"),
}


def made(side: str, small: bool) -> Stepper:
    """One side's model and optimizer. peft draws its adapters from torch's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SIDES[side](llama(small))


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
    compressed = [u.u for e in step.view if (u := held(e.tensor)) is not None]
    step.optimizer.zero_grad()
    state = [v for s in step.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    sizes = {"gradient": [*dense, *compressed], "state": state}
    found = {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in sizes.items()}
    return {name: size / 2**20 for name, size in {**found, "saved": sum(saved.values())}.items()}


def measure(side: str, small: bool, rows: int, length: int) -> dict[str, float]:
    """Peak MiB over the loaded weights of two steps in this process, and its parts."""
    from smidgen import memory

    memory.warm_up()
    tiny = made(side, True)
    tiny(batch(tiny.engine.model, 2, 8, every=True))  # load libraries before the baseline is taken
    model = llama(small)
    data = batch(model, rows, length, every=True)
    kept: list[Stepper] = []

    def steps() -> None:
        kept.append(SIDES[side](model))
        kept[0](data)
        kept[0](data)

    high, before = peak_over(steps)
    return {"peak": (high - before) / 2**20, **bytes_of(kept[0], data)}


def times(names: tuple[str, ...], first: str, small: bool, rows: int, length: int, repeats: int) -> dict[str, float]:
    """Median of the first side's step time over each other side's; the sides alternate in this process."""
    steps = {side: made(side, small) for side in (first, *names)}
    data = batch(steps[first].engine.model, rows, length, every=True)
    taken: dict[str, list[float]] = {side: [] for side in steps}
    for step in steps.values():
        step(data)
    for _ in range(repeats):
        for side, step in steps.items():
            taken[side].append(seconds(lambda step=step: step(data)))  # type: ignore[misc]
    for side in steps:
        print(f"{side}: {statistics.median(taken[side]):.2f} s a step", flush=True)
    return {
        f"{first}_over_{side}": statistics.median(a / b for a, b in zip(taken[first], taken[side], strict=True))
        for side in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a tiny model and short rows: a smoke test")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_cpu()
    rows, length = (2, 16) if args.small else (args.rows, args.length)
    if args.peak:
        print(json.dumps(measure(args.peak, args.small, rows, length)))
        return
    figures: dict[str, float] = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--peak", side, "--rows", str(rows), "--length", str(length)]
        command += ["--threads", str(args.threads), *(["--small"] if args.small else [])]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = json.loads(out.splitlines()[-1])
        figures |= {f"{side}_{part}_mib": value for part, value in found.items()}
        print(f"{side}: peak over the weights {found['peak']:.0f} MiB", flush=True)
    for first, others in PAIRS.items():
        for side in others:
            figures[f"{first}_peak_over_{side}"] = figures[f"{first}_peak_mib"] / max(figures[f"{side}_peak_mib"], 1e-9)
        figures |= times(others, first, args.small, rows, length, 1 if args.small else args.repeats)
    setting = {"model": "tiny" if args.small else "llama 110M, random", "dtype": "float32", "rows": rows, "length": length}
    setting |= {"groups": GROUPS, "recompute": "mlp", "lora_rank": RANK, "embedding": "tied, frozen on all sides"}
    emit("velora_step", figures, {} if args.small else GOALS, setting)


if __name__ == "__main__":
    main()
