"""TinyLoRA: all linear layers of a model moved by a few numbers in all, 13 to 1,000. The implementation is PEFT's.

Source: "Learning to Reason in 13 Parameters", 2026 (arXiv 2602.04118). A matrix with its singular value decomposition cut to
rank r moves inside it, by random r x r matrices that come from the seed:

    W + U_r S_r^(1/2) (sum_i v_i P_i) S_r^(1/2) V_r^T,  P_i ~ N(0, 1 / r),  v = 0 at the start

All matrices share v, or consecutive ones do, in `groups` of as many. The change is linear in v, so that every method moves from
the start; so few coordinates are what covariance adaptation is made for (cma_es with order=all covariance=full).

Bytes: 4 for each number; beside the model 4 r (m + n) of a matrix and 4 r^2 for each coordinate of it. Building it costs the
whole decomposition of every matrix. A batch of probes is evaluated one at a time, since PEFT holds v outside the layers.
Saved in PEFT's own format. It does not: quantised bases, whose matrices have no decomposition at hand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import Field
from torch import nn

from smidgen import quantised
from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._lora import Adapters
from smidgen.config import ConfigError

status = "experimental"

EXPORTS = {
    "adapter": "PEFT's adapter_model.safetensors and adapter_config.json",
    "merged": "the whole model with the changes added in, for stock transformers",
}
REFUSED = {"peft-lora": "it is saved as what it is, PEFT's TinyLoRA"}


class Config(SchemeConfig):
    """Options of TinyLoRA."""

    numbers: int = Field(64, ge=1, description="tuned numbers in all")
    groups: int = Field(1, ge=1, description="vectors that these are split into, each shared by consecutive matrices")
    rank: int = Field(2, ge=1, description="rank r of the decomposition")
    pattern: str | None = Field(
        None, description="regular expression: only matrices in whose path it is found; none: every linear module of the layers"
    )


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> Adapters:
    """Freeze `model` and add adapters whose random matrices come from `seed`. Raises ConfigError where numbers and groups do
    not fit, and for a quantised model."""
    if quantised.layers(model):
        raise ConfigError("scheme tinylora decomposes the matrices of a model, and a quantised one has none: use scheme lora")
    found = _linear(model, config.pattern)
    if config.groups > len(found) or config.numbers % config.groups:
        raise ConfigError(
            f"groups = {config.groups} does not divide {config.numbers} numbers and {len(found)} matrices into groups: give a "
            "divisor of the numbers, at most as many as there are matrices"
        )
    fused = {type(model.get_submodule(path)).__name__ == "Conv1D" for path in found}
    if fused == {True, False}:
        raise ConfigError("some of the matrices are stored transposed and some are not: choose one kind with a pattern")
    options = {
        "r": config.rank, "u": config.numbers // config.groups, "weight_tying": 1.0 - config.groups / len(found),
        "projection_seed": seed, "target_modules": found, "fan_in_fan_out": fused == {True},
    }  # fmt: skip
    return Adapters(model, options, seed, fresh, family="TinyLoraConfig")


def _linear(model: nn.Module, pattern: str | None) -> list[str]:
    """Paths of the linear modules in numbered layers, in the model's order. Raises ConfigError for none."""
    every = [
        path
        for path, module in model.named_modules()
        if any(part.isdigit() for part in path.split("."))
        and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ]
    if not every:
        raise ConfigError(f"{type(model).__name__} has no linear modules in numbered layers: use scheme lora")
    try:
        found = [path for path in every if pattern is None or re.search(pattern, path)]
    except re.error as error:
        raise ConfigError(f"scheme_args.pattern {pattern!r} is not a regular expression ({error}): correct it") from None
    if not found:
        raise ConfigError(
            f"scheme_args.pattern {pattern!r} is found in none of the {len(every)} linear modules of the layers, which are "
            f"called like {every[0]!r}"
        )
    return found
