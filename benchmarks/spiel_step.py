"""A training step of SpIEL against peft's LoRA, SHIRA and SUPERTUNING with the same number of tuned weights: a random Llama
of 110 million weights in float32 on a CPU, batch 4 x 128, every linear layer of the blocks adapted.

All sides but spiel_run and lora_run compute the model's own loss and its gradient; peft's are stepped by torch's AdamW, SpIEL
by sparse_adamw (AG; with 8-bit moments as well) or sm3 (MA). `q...` sides stand on nf4 weights of bitsandbytes. lora and
qlora have peft's defaults, no dropout; lora_dropout has the published baseline's, 0.1. spiel_run and lora_run, our LoRA, are
steps as `smidgen train` makes them: the loss in blocks of logits, whose gradient is made with them, products through
`smidgen.linear`. Sides alternate within one process; a ratio is the median of the rounds' ratios. Between selections AG
computes its own entries alone; `spiel_ag_cycle_over_lora` is the mean over a whole cycle of reselection, phase and selection
included.

--keep FILE keeps peaks: those that it holds are not measured again.

Peak: resident memory over the loaded base, adapter and state included, over six steps, for AG its first phase and selection;
each side in a process of its own that has made steps on a tiny model first, and under one fixed threshold of glibc's above
which freed blocks go back to the system: left to itself it moves, and what is measured is holes. `_saved_mib` is what the
forward keeps for the backward, counted by autograd's hooks.

--device cuda: width 2048, bfloat16, batch 8 x 512, without the sides over nf4; peaks are allocated memory, everything but
the base. Then a 7B-shaped random model in bfloat16 and in nf4, batch 1 x 2048: SpIEL-AG between selections beside LoRA and
QLoRA, one after the other in this process, its peak with the weights and the median time of a step (`7b_...`).
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

import _quantised
from _models import batch, on_cpu, peak_over, seconds
from _record import emit

PEFT = {"lora": {}, "lora_dropout": {"lora_alpha": 16, "lora_dropout": 0.1}, "shira": {}, "supertuning": {}, "qlora": {}}
SPIEL: dict[str, tuple[str, str, dict[str, Any]]] = {  # growth, method, its options
    "spiel_ag": ("ag", "sparse_adamw", {}),
    "spiel_8bit": ("ag", "sparse_adamw", {"state": "8bit"}),
    "spiel_ma": ("ma", "sm3", {}),
    "spiel_run": ("ag", "sparse_adamw", {}),
    "qspiel_ag": ("ag", "sparse_adamw", {}),
    "qspiel_8bit": ("ag", "sparse_adamw", {"state": "8bit"}),
    "qspiel_ma": ("ma", "sm3", {}),
}
SIDES = (*PEFT, "lora_run", *SPIEL)
SEVEN = ("lora", "spiel_ag", "qlora", "qspiel_ag")  # of the 7B-shaped model
ROWS = {"small": (2, 16), "cpu": (4, 128), "cuda": (8, 512), "7b": (1, 2048)}
RANK, EVERY, COLLECT = 8, 20, 5  # LoRA's usual rank; the published cycle
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}

GOALS = {
    "spiel_ag_over_lora": ("<=", 1.0),
    "spiel_ma_over_lora": ("<=", 1.0),
    "spiel_over_shira": ("<=", 0.85),
    "spiel_over_supertuning": ("<=", 0.85),
    "spiel_peak_over_lora": ("<=", 0.95),
}

Step = Callable[[], Any]
Loss = Callable[[], Tensor]


WIDTHS: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 256,
    },
    "cpu": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "cuda": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16},
    "7b": {},  # transformers' defaults
}


def llama(side: str, args: argparse.Namespace) -> nn.Module:
    """A random Llama of the shape asked for; of nf4 weights for the sides over these. Its weights are frozen."""
    kind = torch.bfloat16 if args.device == "cuda" else torch.float32
    if side.startswith("q"):
        named = {"small": "tiny", "cpu": "110m", "7b": "7b"}[args.shape]
        return _quantised.llama(named, args.device, kind, args.layers).requires_grad_(False)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = WIDTHS[args.shape] | ({} if args.layers is None else {"num_hidden_layers": args.layers})
    torch.manual_seed(0)
    with torch.device(args.device):
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=args.shape != "7b"))
    return model.to(kind).requires_grad_(False)


def peft_step(side: str, model: nn.Module, data: dict[str, Tensor], rank: int) -> tuple[Step, Loss]:
    """A step of one of peft's adapters, and its loss; the budget is LoRA's."""
    import peft

    layers = [m for n, m in model.named_modules() if n.rpartition(".")[2] in NAMES]
    sizes = [(m.out_features, m.in_features) for m in layers]
    share = sum(rank * sum(size) for size in sizes) / sum(a * b for a, b in sizes)
    if side == "shira":
        config: Any = peft.ShiraConfig(r=rank, target_modules=NAMES, random_seed=0)
    elif side == "supertuning":
        config = peft.SupertuningConfig(sparsity=1 - share, target_modules=NAMES)
    else:
        config = peft.LoraConfig(r=rank, target_modules=NAMES, **PEFT[side])
    wrapped = peft.get_peft_model(model, config).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)

    def loss() -> Tensor:
        return wrapped(**data, use_cache=False).loss  # type: ignore[no-any-return]

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, loss


def spiel_step(side: str, model: nn.Module, data: dict[str, Tensor], rank: int, selects: bool) -> tuple[Step, Loss]:
    """A step of SpIEL; `selects`: with its phases and selections, otherwise as between them."""
    from smidgen import adapt, optim

    growth, method, options = SPIEL[side]
    scheme, module = adapt.get("spiel"), optim.get(method)
    config = scheme.Config(rank=rank, growth=growth, every=EVERY, collect=COLLECT, target_modules=NAMES)
    adapted = scheme.build(model.train(), config)
    optimizer = module.build(adapted.view, module.Config(lr=1e-4, **options))
    if selects:
        adapted.begin(optimizer)
    objective, loss = as_in_a_run(adapted, data)
    if side != "spiel_run":
        objective = loss = lambda: model(**data, use_cache=False).loss

    def step() -> None:
        optimizer.step(objective)
        if selects:
            adapted.after_step(optimizer, 1000)

    return step, loss


def lora_run(model: nn.Module, data: dict[str, Tensor], rank: int) -> tuple[Step, Loss]:
    """A step of our LoRA."""
    from smidgen import adapt, optim

    scheme, module = adapt.get("lora"), optim.get("adamw")
    adapted = scheme.build(model.train(), scheme.Config(rank=rank, target_modules=NAMES))
    optimizer = module.build(adapted.view, module.Config(lr=1e-4))
    objective, loss = as_in_a_run(adapted, data)
    return (lambda: optimizer.step(objective)), loss


def as_in_a_run(adapted: Any, data: dict[str, Tensor]) -> tuple[Any, Loss]:
    """The objective that `smidgen train` steps on, and its loss."""
    from smidgen.batched import BatchedEngine
    from smidgen.objective import ModelObjective

    engine = BatchedEngine(adapted.model, adapted.view, "causal")
    return ModelObjective(engine, [data]), lambda: engine.differentiable(data).nll.mean()


def step_of(side: str, args: argparse.Namespace, selects: bool = False, model: nn.Module | None = None) -> tuple[Step, Loss]:
    """A side on a model of its own, or the given one."""
    model = llama(side, args) if model is None else model
    data, rank = data_of(model, args), 1 if args.shape == "small" else RANK
    if side == "lora_run":
        return lora_run(model, data, rank)
    if side in PEFT:
        return peft_step(side, model, data, rank)
    return spiel_step(side, model, data, rank, selects)


def data_of(model: nn.Module, args: argparse.Namespace) -> dict[str, Tensor]:
    return batch(model, *ROWS[args.shape], every=True)


def tiny(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(shape="small", layers=None, device=args.device)


def times(args: argparse.Namespace) -> dict[str, float]:
    """Medians of every side's step over LoRA's, and that of a cycle."""
    sides = [side for side in SIDES if args.device == "cpu" or not side.startswith("q")]
    steps = {side: step_of(side, args)[0] for side in sides}
    for step in steps.values():
        step()
        step()
    found: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(args.repeats):
        for side, step in steps.items():
            found[side].append(seconds(step, args.device))
    cycle, _ = step_of("spiel_ag", args, selects=True)
    for _ in range(COLLECT):  # the first selection replaces everything: the cycle after it is the usual one
        cycle()
    mean = statistics.fmean(seconds(cycle, args.device) for _ in range(EVERY))
    for side in sides:
        print(f"{side}: {statistics.median(found[side]):.3f} s a step", flush=True)

    def over(side: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(found[side], found[other], strict=True))

    ratios = {
        "spiel_ag_over_lora": over("spiel_ag", "lora"),
        "spiel_ma_over_lora": over("spiel_ma", "lora"),
        "spiel_ag_cycle_over_lora": mean / statistics.median(found["lora"]),
        "spiel_run_over_lora": over("spiel_run", "lora"),
        "spiel_run_over_lora_run": over("spiel_run", "lora_run"),
        "spiel_over_shira": over("spiel_ag", "shira"),
        "spiel_over_supertuning": over("spiel_ag", "supertuning"),
    }
    if "qlora" in sides:
        ratios["qspiel_ag_over_qlora"] = over("qspiel_ag", "qlora")
    return ratios | {f"{side}_seconds": statistics.median(taken) for side, taken in found.items()}


def seven(side: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak in MiB with the weights, and seconds of a step, of the 7B-shaped model."""
    step, _ = step_of(side, args)
    high, _ = peak_over(lambda: (step(), step()))
    return {"peak_mib": high / 2**20, "seconds": statistics.median(seconds(step, args.device) for _ in range(args.repeats))}


def measure(side: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak over the loaded base and what a forward saves, in MiB, in this process."""
    first, _ = step_of(side, tiny(args), selects=True)
    for _ in range(COLLECT + 1):  # what is imported and compiled on first use is no side's memory
        first()
    base = llama(side, args)
    kept: list[Loss] = []

    def several() -> None:
        step, loss = step_of(side, args, selects=True, model=base)
        kept.append(loss)
        for _ in range(COLLECT + 1):  # through a phase and its selection
            step()

    high, before = peak_over(several)
    return {"peak": (high - before) / 2**20, "saved": saved(kept[0], base) / 2**20}


def saved(loss: Loss, model: nn.Module) -> int:
    """Bytes that a forward keeps for its backward, the model's parameters left out."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            if (storage := part.untyped_storage()).data_ptr() not in known:
                held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    assert value.requires_grad
    return sum(held.values())


def apart(args: argparse.Namespace, *more: str) -> dict[str, float]:
    """What a process of this script prints at its end; on CUDA, where memory is counted exactly, without the process."""
    if args.device == "cuda":
        gc.collect()
        side = more[1]
        if more[0] == "--peak":
            return measure(side, args)
        return seven(side, argparse.Namespace(**{**vars(args), "shape": "7b"}))
    command = [sys.executable, __file__, *sys.argv[1:], *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | ALLOCATOR)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def peaks(args: argparse.Namespace) -> dict[str, float]:
    """Peak over the loaded base of each side, and its ratios."""
    found: dict[str, float] = json.loads(args.keep.read_text()) if args.keep and args.keep.exists() else {}
    sides = SIDES if args.device == "cpu" else [side for side in SIDES if not side.startswith("q")]
    for side in sides:
        if f"{side}_peak_mib" in found:
            continue
        found |= {f"{side}_{part}_mib": value for part, value in apart(args, "--peak", side).items()}
        print(f"{side}: peak over the base {found[f'{side}_peak_mib']:.0f} MiB", flush=True)
        if args.keep:
            args.keep.write_text(json.dumps(found))

    def over(side: str, other: str) -> float:
        return found[f"{side}_peak_mib"] / max(found[f"{other}_peak_mib"], 1e-9)

    ratios = {
        "spiel_peak_over_lora": over("spiel_ag", "lora"),
        "spiel_8bit_peak_over_lora": over("spiel_8bit", "lora"),
        "spiel_ma_peak_over_lora": over("spiel_ma", "lora"),
        "spiel_run_peak_over_lora": over("spiel_run", "lora"),
        "spiel_run_peak_over_lora_run": over("spiel_run", "lora_run"),
        "spiel_peak_over_lora_dropout": over("spiel_ag", "lora_dropout"),
        "spiel_peak_over_shira": over("spiel_ag", "shira"),
        "spiel_peak_over_supertuning": over("spiel_ag", "supertuning"),
    }
    if "qlora" in sides:
        ratios["qspiel_peak_over_qlora"] = over("qspiel_ag", "qlora")
    return ratios | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, help="fewer make a quicker, cruder comparison")
    parser.add_argument("--keep", type=Path, help="file that keeps peaks")
    parser.add_argument("--small", action="store_true", help="a tiny model: whether it runs")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--seven", choices=SEVEN, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = "small" if args.small else "7b" if args.seven else args.device
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        on_cpu()
    if args.peak or args.seven:
        print(json.dumps(measure(args.peak, args) if args.peak else seven(args.seven, args)))
        return
    figures = times(args)
    print("times are taken; peaks need no quiet machine", flush=True)
    figures |= peaks(args)
    for side in SEVEN if args.device == "cuda" else ():
        found = apart(args, "--seven", side)
        print(f"7b {side}: {found}", flush=True)
        figures |= {f"7b_{side}_{name}": value for name, value in found.items()}
    shape = "tiny" if args.small else f"llama, width {WIDTHS[args.shape]['hidden_size']}, random"
    setting = {"model": shape, "layers": args.layers or WIDTHS[args.shape]["num_hidden_layers"]}
    setting |= {"dtype": "bfloat16" if args.device == "cuda" else "float32", "rank": 1 if args.small else RANK}
    goals = GOALS if args.device == "cpu" else {}
    emit("spiel_step", figures, goals, {**setting, "batch": ROWS[args.shape], "repeats": args.repeats, **ALLOCATOR})


if __name__ == "__main__":
    main()
