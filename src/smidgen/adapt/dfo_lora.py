"""DFO-LoRA: low-rank modules without a scale in every self-attention, made for search without gradients.

Source: "Derivative-Free Optimization for Low-Rank Adaptation"; its public code. For the query and the key of every layer

    Q = W_Q h + B_Q A_Q h,  K = W_K h + B_K A_K h,  A [r, H], B [H, r], A = B = 0 at the start

with no alpha / r and no dropout. At A = B = 0 the loss is flat to first order in both, and does not change when A and B of
a projection change sign together: `start: random` (ours) draws A from the seed, freezes it, and tunes B alone, so that the
change of W is linear in what is searched, for half the weights. GPT-2's fused projection gets an adapter of rank 2 r, of which
a search moves the parts of query and key; methods that do not search a space tune it whole.
`smidgen.optim.cma_es` and `fireworks` search a small space for each layer; other methods need `start: random`.

Bytes: 2 r (H + H) weights a layer in float32. Saved in PEFT's own format. head_bias: zero is the public code's for RoBERTa: the
bias of the output head counts as zero, which an adapter cannot say: such a run is exported merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._attention import Attention, chosen
from smidgen.adapt._lora import Adapters
from smidgen.config import ConfigError

status = "experimental"

EXPORTS = {
    "adapter": "PEFT's adapter_model.safetensors and adapter_config.json",
    "peft-lora": "the same as adapter",
    "merged": "the whole model with the product added in, for stock transformers",
}
REFUSED: dict[str, str] = {}

Role = Literal["query", "key", "value"]
_PLACE = {"query": 0, "key": 1, "value": 2}  # in a fused projection


class Config(SchemeConfig):
    """Options of DFO-LoRA."""

    rank: int = Field(4, ge=1, description="rank r of each product")
    matrices: tuple[Role, ...] = Field(("query", "key"), min_length=1, description="projections that get a product")
    pattern: str | None = Field(
        None, description="regular expression: only self-attention modules in whose path it is found; none: all"
    )
    start: Literal["zero", "random"] = Field(
        "zero", description="zero: A = B = 0, both tuned; random: A random and frozen, B = 0 tuned"
    )
    head_bias: Literal["kept", "zero"] = Field("kept", description="zero: leave out the bias of the output head")


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> Adapters:
    """Freeze `model` and add adapters to its self-attention. Raises ConfigError where a projection is not found."""
    if len(set(config.matrices)) < len(config.matrices):
        raise ConfigError(f"scheme_args.matrices names a projection twice: {', '.join(config.matrices)}: name each once")
    found = chosen(model, config.pattern)
    fused = {a.fused is not None for a in found}
    if fused == {True, False}:
        raise ConfigError("some self-attention modules fuse their projections and some do not: choose one kind with a pattern")
    targets = [path for a in found for path in _targets(a, config.matrices)]
    rank = config.rank * (len(config.matrices) if fused == {True} else 1)
    options: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": targets, "fan_in_fan_out": fused == {True}}
    if config.head_bias == "zero":
        _without_bias(model)
    adapted = Adapters(model, options, seed, fresh)
    for name, parameter in adapted.model.named_parameters():
        if ".lora_A." in name and config.start == "zero":
            with torch.no_grad():
                parameter.zero_()
        elif ".lora_A." in name:
            parameter.requires_grad_(False)
    adapted.refresh()
    if fused == {True}:
        _areas(adapted, config)
    return adapted


def _targets(attention: Attention, roles: Sequence[str]) -> list[str]:
    return [attention.fused] if attention.fused else [attention.projections[role] for role in roles]


def _areas(adapted: Adapters, config: Config) -> None:
    """Query, key and value get r of the ranks each, and their third of the outputs."""
    r = config.rank
    for entry in adapted.view:
        bands = [slice(i * r, (i + 1) * r) for i in range(len(config.matrices))]
        if ".lora_A." in entry.name:
            entry.areas = [(band, slice(None)) for band in bands]
        elif ".lora_B." in entry.name:
            width = entry.tensor.shape[0] // 3
            places = [slice(_PLACE[role] * width, (_PLACE[role] + 1) * width) for role in config.matrices]
            entry.areas = list(zip(places, bands, strict=True))


def _without_bias(model: nn.Module) -> None:
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or head.bias is None:
        raise ConfigError(f"head_bias = zero, but {type(model).__name__} has no output head with a bias: leave it out")
    with torch.no_grad():
        head.bias.zero_()
