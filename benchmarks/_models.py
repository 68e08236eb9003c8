"""Random models of OPT's shapes, batches for them, and the two things a step is compared with: plain forwards and the
textbook step. Time and peak memory of a side, on a CPU or a CUDA device."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

EPS, LR = 1e-3, 1e-6  # MeZO's

SHAPES: dict[str, dict[str, int]] = {  # transformers' defaults are OPT-125M's
    "opt-125m": {},
    "opt-1.3b": {
        "num_hidden_layers": 24,
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "ffn_dim": 8192,
        "num_attention_heads": 32,
    },
    "tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_attention_heads": 4,
        "vocab_size": 512,
    },
}


def on_cpu() -> None:
    """Hide CUDA devices from this process and those it starts, so that memory is measured as resident memory."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def opt(
    shape: str = "opt-125m", layers: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Module:
    """A random OPT of a named shape, in evaluation mode; `layers` replaces its number of layers."""
    from transformers import OPTConfig, OPTForCausalLM

    options = {**SHAPES[shape], **({} if layers is None else {"num_hidden_layers": layers})}
    torch.manual_seed(0)
    with torch.device(device):
        return OPTForCausalLM(OPTConfig(**options)).to(dtype).eval()


def batch(model: nn.Module, rows: int, length: int, every: bool = False) -> dict[str, Tensor]:
    """Random rows for a model, labelled at `every` position or, as in classification, at the last two."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, model.config.vocab_size, (rows, length), generator=generator).to(model.device)  # type: ignore[union-attr,arg-type]
    labels = ids.clone()
    if not every:
        labels[:, :-2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def plain_loss(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """The model's own loss over full logits, as transformers computes it."""
    with torch.no_grad():
        return model(**data, use_cache=False).loss


def two_forwards(model: nn.Module, data: dict[str, Tensor]) -> None:
    """Two plain forwards: the least that a two-sided step needs of an unchanged model."""
    plain_loss(model, data)
    plain_loss(model, data)


def forward_backward(model: nn.Module, data: dict[str, Tensor]) -> None:
    """One plain forward and its back-propagation; the gradients are dropped."""
    with torch.enable_grad():
        model(**data, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def textbook_step(model: nn.Module, data: dict[str, Tensor], seed: int) -> None:
    """MeZO in place: perturb, perturb back twice, restore, update; noise from torch's generator, reseeded each time."""

    def sweep(scale: float) -> None:
        torch.manual_seed(seed)
        for p in model.parameters():
            z = torch.normal(mean=0.0, std=1.0, size=p.shape, dtype=p.dtype, device=p.device)
            p.data.add_(z, alpha=scale)

    sweep(EPS)
    plus = plain_loss(model, data)
    sweep(-2 * EPS)
    minus = plain_loss(model, data)
    sweep(EPS)
    sweep(-LR * float(plus - minus) / (2 * EPS))


class Stepper:
    """A method of ours on all tensors of a model: call it with a batch for one step."""

    def __init__(self, model: nn.Module, method: str = "zo_sgd", **options: Any):
        from smidgen import optim
        from smidgen.batched import BatchedEngine
        from smidgen.params import ParamView

        module = optim.get(method)
        self.view = ParamView.of_model(model)
        self.engine = BatchedEngine(model, self.view, "causal")
        self.optimizer = module.build(self.view, module.Config(**{"lr": LR, **options}))

    def __call__(self, data: dict[str, Tensor]) -> None:
        from smidgen.objective import ModelObjective

        self.optimizer.step(ModelObjective(self.engine, [data]))


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """Wall-clock time of a call, until the device is done."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_over(run: Callable[[], object]) -> tuple[int, int]:
    """(peak bytes while `run` runs, bytes in use before): resident in this process, or allocated on CUDA."""
    from smidgen import memory

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    memory.reset_peak()
    before = memory.resident()
    run()
    return memory.peak(), before
