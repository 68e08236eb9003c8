"""The planner's bytes beside measured ones: every method x {full, lora} on three shapes with random weights.

planned / measured is the total over the process that has loaded the model, weights included: peak resident memory of two
steps in a process of its own (allocated bytes on CUDA). worst_ratio is the ratio farthest from 1.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _models import on_cpu
from _record import emit


def configs(small: bool) -> dict[str, tuple[Any, str]]:
    """The shapes: OPT-125M, a Llama of 110M with grouped-query attention and an untied head, RoBERTa-base."""
    from transformers import LlamaConfig, OPTConfig, RobertaConfig

    llama: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 2048, "vocab_size": 32000, "tie_word_embeddings": False}
    heads = {"num_hidden_layers": 12, "num_attention_heads": 12}
    roberta: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    less: dict[str, Any] = {"num_hidden_layers": 3} if small else {}
    return {
        "opt-125m": (OPTConfig(**less), "causal"),
        "llama-110m": (LlamaConfig(**{**llama, **heads, "num_key_value_heads": 4, **less}), "causal"),
        "roberta-base": (RobertaConfig(**{**roberta, **less}), "masked"),
    }


def cases(schemes: Sequence[str]) -> list[tuple[str, str, str]]:
    """(method, scheme, what the backward pass keeps)"""
    from smidgen import optim

    found = []
    for scheme in schemes:
        for method in optim.names():
            backward = "backward" in optim.get(method).build.uses
            found += [(method, scheme, keep) for keep in (("all", "checkpointing") if backward else ("all",))]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--shapes", nargs="*", help="these alone")
    parser.add_argument("--methods", nargs="*", help="these alone")
    parser.add_argument("--schemes", nargs="*", default=["full", "lora"])
    parser.add_argument("--small", action="store_true", help="three layers instead of twelve")
    args = parser.parse_args()
    if args.small:
        on_cpu()
    import torch

    from smidgen.measure import measured
    from smidgen.planner import Case, Model, Planner
    from smidgen.simulate import Rows

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ratios: dict[str, float] = {}
    shapes = configs(args.small)
    for shape in args.shapes or shapes:
        config, kind = shapes[shape]
        planner = Planner(Model(config, kind, device=device), Rows(args.rows, args.length))
        for method, scheme, keep in cases(args.schemes):
            if method not in (args.methods or [method]):
                continue
            case = Case(method, scheme, keep)
            real = measured(planner, case, threads=2)
            if isinstance(real, str):
                print(f"{shape} {case.key}: {real[:200]}", flush=True)
                continue
            terms = planner.plan(case).terms
            ratios[f"{shape}_{case.key}"] = terms.total / real
            detail = "  ".join(f"{k} {v / 2**20:.0f}" for k, v in vars(terms).items())
            found = f"planned {terms.total / 2**20:.0f} of measured {real / 2**20:.0f} MiB"
            print(f"{shape} {case.key}: {terms.total / real:.3f}, {found}: {detail}", flush=True)
    worst = max(ratios.values(), key=lambda r: abs(math.log(r)), default=math.nan)
    setting = {"rows": args.rows, "length": args.length, "dtype": "float32", "labels": "every position", "small": args.small}
    emit("plan_accuracy", {"worst_ratio": worst, **ratios}, {"worst_ratio": (">=", 0.9)}, setting)


if __name__ == "__main__":
    main()
