"""The self-attention of a model: where its query, key, value and output projections are, by the names that models give them.

Cross-attention is left out. A projection that makes query, key and value at once, one after another (GPT-2's c_attn), is
`fused`; those that interleave heads (GPT-NeoX, Falcon) are not known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from smidgen.config import ConfigError

_NAMES = {
    "query": ("q_proj", "query", "q", "q_lin"),
    "key": ("k_proj", "key", "k", "k_lin"),
    "value": ("v_proj", "value", "v", "v_lin"),
}
_OUTPUT = ("o_proj", "out_proj", "c_proj", "o", "out_lin", "dense")
_FUSED = "c_attn"
_CROSS = re.compile(r"cross|EncDecAttention|encoder_attn", re.IGNORECASE)


@dataclass(frozen=True)
class Attention:
    """One self-attention module."""

    path: str
    projections: Mapping[str, str]  # role -> path of its linear module; without query, key, value where they are fused
    fused: str | None  # path of the projection that makes query, key and value


def attentions(model: nn.Module) -> list[Attention]:
    """Every self-attention of a model, in the model's order."""
    modules = dict(model.named_modules())
    found = []
    for path, module in modules.items():
        children = {name for name, _ in module.named_children()}
        inner = {role: next((n for n in names if n in children), None) for role, names in _NAMES.items()}
        fused = _FUSED if _FUSED in children else None
        if _CROSS.search(path) or not (fused or all(inner.values())):
            continue
        projections = {} if fused else {role: f"{path}.{name}" for role, name in inner.items()}
        around = path.rpartition(".")[0]
        outputs = [*(f"{path}.{name}" for name in _OUTPUT), f"{around}.output.dense"]
        output = next((name for name in outputs if name in modules), None)
        found.append(
            Attention(path, projections | ({"output": output} if output else {}), f"{path}.{fused}" if fused else None)
        )
    return found


def chosen(model: nn.Module, pattern: str | None) -> list[Attention]:
    """The self-attention modules in whose paths `pattern` is found, all where it is None. Raises ConfigError for none."""
    every = attentions(model)
    if not every:
        raise ConfigError(
            f"{type(model).__name__} has no self-attention whose query and key projections are known: use scheme lora with "
            "scheme_args.target_modules"
        )
    if pattern is None:
        return every
    try:
        found = [a for a in every if re.search(pattern, a.path)]
    except re.error as error:
        raise ConfigError(f"scheme_args.pattern {pattern!r} is not a regular expression ({error}): correct it") from None
    if not found:
        raise ConfigError(
            f"scheme_args.pattern {pattern!r} has no attention projections: it is found in none of the {len(every)} "
            f"self-attention modules, which are called like {every[0].path!r}"
        )
    return found
