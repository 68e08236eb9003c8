"""LoRTA: the changes of all attention matrices of a model as one tensor of low rank in canonical polyadic form.

Source: Hounie, Kanatsoulis, Tandon, Ribeiro, "LoRTA: Low Rank Tensor Adaptation of Large Language Models", 2024 (arXiv
2410.04060). With modes input i, output o within a head, head h, matrix q and layer l,

    dW[i, o, h, q, l] = (alpha / r) sum_k A[i, k] B[o, k] C_head[h, k] C_matrix[q, k] C_layer[l, k],  k = 1..r

The modes are those of the paper as its summaries tell them; ours: how it starts (A from the seed with variance 1 / d_in, B = 0,
all else 1: one LoRA that all heads, matrices and layers share), alpha, and that with fewer key-value heads these are the first
rows of C_head. Weights: r (d_in + d_head + heads + matrices + layers), whatever the depth, in float32: a space small enough for
cma_es, and for any other method. A forward costs r (d_in + d_out) products a token and matrix.

Saved as the tuned tensors alone; exported merged. It does not: adapt other layers, or matrices whose input is not the
hidden state's size.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from smidgen import noise, quantised
from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._attention import Attention, chosen
from smidgen.adapt._chosen import Chosen
from smidgen.config import ConfigError
from smidgen.params import canonical, tensor_id

status = "experimental"

EXPORTS = {"merged": "the whole model with the changes added in, for stock transformers"}
REFUSED = {"adapter": "PEFT has no adapter that layers share a tensor in"}

Role = Literal["query", "key", "value", "output"]
_FUSED = ("query", "key", "value")  # in the order of a fused projection
_NAME = "lorta"


class Config(SchemeConfig):
    """Options of LoRTA."""

    rank: int = Field(4, ge=1, description="rank r of the tensor")
    alpha: float = Field(8.0, gt=0, description="scale: the changes are multiplied by alpha / r")
    matrices: tuple[Role, ...] = Field(
        ("query", "key", "value", "output"), min_length=1, description="attention matrices that change"
    )
    pattern: str | None = Field(
        None, description="regular expression: only self-attention modules in whose path it is found; none: all"
    )


class Delta(nn.Module):
    """The change of one linear module: slices of the factors that all of them share."""

    def __init__(self, factors: dict[str, nn.Parameter], layer: int, spans: Sequence[tuple[int | None, int]], scale: float):
        """spans: (matrix, heads) of each part of the output, in order; matrix None: a part that does not change."""
        super().__init__()
        for name, factor in factors.items():
            self.register_parameter(name, factor)
        self.at, self.spans, self.scale = layer, tuple(spans), scale

    def rights(self) -> list[Tensor | None]:
        """[heads * d_head, r] of each part, with the layer, the matrix and the scale folded in."""
        B, heads = self._parameters["output"], self._parameters["head"]
        assert B is not None and heads is not None
        found: list[Tensor | None] = []
        for matrix, count in self.spans:
            if matrix is None:
                found.append(None)
                continue
            scale = self.scale * self._parameters["matrix"][matrix] * self._parameters["layer"][self.at]  # type: ignore[index]
            found.append((heads[:count, None] * B * scale).flatten(0, 1))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]."""
        inner = F.linear(x, self._parameters["input"].T.to(x.dtype))  # type: ignore[union-attr]
        width = len(self._parameters["output"])  # type: ignore[arg-type]
        parts = [
            inner.new_zeros(*inner.shape[:-1], count * width) if right is None else F.linear(inner, right.to(x.dtype))
            for right, (_, count) in zip(self.rights(), self.spans, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def weight(self) -> Tensor:
        """dW [d_out, d_in], float32."""
        A = self._parameters["input"]
        assert A is not None
        width = len(self._parameters["output"])  # type: ignore[arg-type]
        rows = [
            A.new_zeros(count * width, len(A)) if right is None else right @ A.T
            for right, (_, count) in zip(self.rights(), self.spans, strict=True)
        ]
        return torch.cat(rows).detach()


def _beside(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out + module.lorta(args[0])


class LoRTA(Chosen):
    """A model whose attention matrices share one tuned tensor."""

    def __init__(self, model: nn.Module, targets: Sequence[nn.Module], fresh: Sequence[str]):
        self._hooks = [module.register_forward_hook(_beside).id for module in targets]
        self._paths = [path for path, module in model.named_modules() if any(module is target for target in targets)]
        super().__init__(model, _NAME, lambda name, _: f".{_NAME}." in name, fresh)
        self.fresh = [e.name for e in self.view if f".{_NAME}." in e.name or e.name in {canonical(n) for n in fresh}]

    def merged(self) -> nn.Module:
        """A copy of the model with the changes added in. Raises ConfigError where the base is quantised."""
        if quantised.layers(self.model):
            raise quantised.unmerged()
        plain = copy.deepcopy(self.model)
        for path in self._paths:
            module: Any = plain.get_submodule(path)
            weight = module.lorta.weight()
            with torch.no_grad():
                module.weight.add_(weight.to(module.weight.dtype) if isinstance(module, nn.Linear) else weight.T)
            for number in self._hooks:
                module._forward_hooks.pop(number, None)
            del module.lorta
        return plain


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> LoRTA:
    """Freeze `model` and put one tensor beside its attention matrices. Raises ConfigError where their shapes do not fit."""
    if len(set(config.matrices)) < len(config.matrices):
        raise ConfigError(f"scheme_args.matrices names a matrix twice: {', '.join(config.matrices)}: name each once")
    found = chosen(model, config.pattern)
    modules = dict(model.named_modules())
    heads = model.config.get_text_config().num_attention_heads  # type: ignore[union-attr,operator]
    plans = [plan for a in found for plan in _plans(a, modules, config.matrices, heads)]
    d_in, width = _sides(modules[plans[0][0]])[0], plans[0][2]
    for path, _, mine in plans:
        if (_sides(modules[path])[0], mine) != (d_in, width):
            raise ConfigError(
                f"{path} takes {_sides(modules[path])[0]} inputs and has heads of {mine}, {plans[0][0]} {d_in} and {width}: "
                "matrices of one tensor have equal sides: leave some out with scheme_args.matrices"
            )
    device = modules[plans[0][0]].weight.device
    r = config.rank
    sizes = {"output": width, "head": heads, "matrix": len(config.matrices), "layer": len(found)}
    A = torch.zeros(d_in, r)
    at = noise.Address(seed, tensor_id(_NAME), 0, 0, noise.INIT)
    noise.accumulate_(A, [(at, 1.0 / math.sqrt(d_in))], "gaussian")
    factors = {"input": nn.Parameter(A.to(device))}
    for name, size in sizes.items():
        start = torch.zeros if name == "output" else torch.ones
        factors[name] = nn.Parameter(start(size, r, device=device))
    layers = {path: number for number, a in enumerate(found) for path in _paths(a)}
    for path, spans, _ in plans:
        modules[path].lorta = Delta(factors, layers[path], spans, config.alpha / r)
    return LoRTA(model, [modules[path] for path, _, _ in plans], fresh)


def _paths(attention: Attention) -> list[str]:
    return [*attention.projections.values(), *([attention.fused] if attention.fused else [])]


Plan = tuple[str, list[tuple[int | None, int]], int]  # path of a module, its spans, the width of a head


def _plans(attention: Attention, modules: dict[str, nn.Module], roles: Sequence[str], heads: int) -> list[Plan]:
    """The modules of one attention that change. A matrix that makes another number of outputs than heads has fewer heads."""
    index = {role: number for number, role in enumerate(roles)}
    found: list[Plan] = []
    if attention.fused is not None:
        width = _sides(modules[attention.fused])[1] // 3 // heads
        if any(role in index for role in _FUSED):
            found.append((attention.fused, [(index.get(role), heads) for role in _FUSED], width))
    else:
        width = _sides(modules[attention.projections["query"]])[1] // heads
    for role, path in attention.projections.items():
        if role in index:
            found.append((path, [(index[role], _sides(modules[path])[1] // width)], width))
    if (missing := set(roles) - set(_FUSED) - attention.projections.keys()) or not found:
        raise ConfigError(
            f"{attention.path} has no {', '.join(missing) or 'such'} projection: leave it out of scheme_args.matrices"
        )
    if any(count > heads for _, spans, _ in found for _, count in spans):
        raise ConfigError(
            f"a matrix of {attention.path} has more outputs than {heads} heads of {width}: leave it out of scheme_args.matrices"
        )
    return found


@functools.singledispatch
def _sides(module: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear module."""
    return tuple(module.weight.shape)  # type: ignore[return-value] # Conv1D


@_sides.register
def _(module: nn.Linear) -> tuple[int, int]:
    return module.in_features, module.out_features
