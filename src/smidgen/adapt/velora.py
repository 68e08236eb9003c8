"""VeLoRA as an adapter: full fine-tuning of sub-token directions over a frozen base, which may be quantised.

    y = W0 x + A s(x),   s(x)_g = sum_m sign(v_m) x_{gM + m},   A [O, G] = 0 at the start

This is what full fine-tuning with activations: velora and velora_adamw computes, weight decay apart: there W = W0 +
A (x) sign(v) (see `activations/_subtokens.py`). Source of the projections: Miles et al., "VeLoRA", 2024 (arXiv 2405.17991);
that they make an adapter is ours. W0 is never written, so it may be held in 4 bits (quantise: nf4): "full" fine-tuning with
O G tuned numbers a layer. Any optimizer with back-propagation may be used; with adamw the equality above holds.

v is the mean of the first batch's sub-tokens over valid tokens, as in `activations: velora`; layers with the same input share
it. Bytes: 4 O G a layer, and saved for the backward z [tokens, G] once for layers that share an input.

Saved as PEFT's LoRA adapter, which it is with rank G: lora_B = A, lora_A = the signs in their places, lora_alpha = rank; v
beside it (velora.safetensors), without which smidgen cannot go on training. Exported merged: W0 + A (x) sign(v),
of a quantised base with `--base MODEL`. It does not: adapt the output head, embeddings or tied weights; decay W0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from smidgen import quantised
from smidgen.activations._deltas import placed
from smidgen.activations._projection import Init, Projection
from smidgen.activations._subtokens import SubTokenProduct, multiplied
from smidgen.activations._vectors import FILE, Vectors
from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._attached import Adapter, Attached, sides
from smidgen.adapt._peft import new_modules
from smidgen.adapt._sparse_targets import find
from smidgen.config import ConfigError
from smidgen.params import canonical, tensor_id

status = "experimental"

EXPORTS = {
    "adapter": "PEFT's adapter_model.safetensors and adapter_config.json: a LoRA adapter whose rank is the number of groups",
    "peft-lora": "the same as adapter",
    "merged": "the whole model with the adapters added in, for stock transformers",
}
REFUSED: dict[str, str] = {}

ADAPTER = "adapter_model.safetensors"
_PREFIX = "base_model.model."


class Config(SchemeConfig):
    """Options of the adapter."""

    groups: int | None = Field(
        None, ge=1, description="number G of sub-tokens; none: 32, the paper's best, unless size is given"
    )
    size: int | None = Field(None, ge=1, description="elements M of a sub-token, instead of groups")
    target_modules: list[str] | str | None = Field(
        None, description="layers to adapt: ends of names, or a regular expression; none: all linear layers but the output head"
    )
    init: Init = Field("mean", description="vectors: mean of the first batch's sub-tokens, their power iteration, or random")
    per_group: bool = Field(False, description="a vector for each group instead of one for all")
    along: Literal["sign", "v"] = Field(
        "sign", description="what A multiplies: sign(v), which makes adamw full fine-tuning's, or v, an exact adapter (for sgd)"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Config:
        if self.groups is not None and self.size is not None:
            raise ValueError("groups is the number and size the length of sub-tokens: give one of them")
        return self

    def split(self, width: int) -> tuple[int, int]:
        """(G, M) of a layer of some width: as asked, with as few groups as cover it."""
        size = min(width, self.size or -(-width // (self.groups or 32)))
        return -(-width // size), size


class SubTokens(Adapter):
    """A [O, G] behind one layer."""

    def __init__(self, name: str, outputs: int, width: int, config: Config):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(outputs, config.split(width)[0]))
        self.weight_name, self.width, self.along = f"{name}.weight", width, config.along
        self.vectors: list[Vectors] = []  # in a list: shared by all adapters, no part of one

    @property
    def awaits_vectors(self) -> bool:
        """Whether the next forward with gradient chooses the vectors: such a forward cannot be made in parts."""
        return self.weight_name not in self.vectors[0].projections

    def rows(self, projection: Projection) -> Projection:
        """What A multiplies, as a projection that layers with the same input share."""
        if self.along == "v":
            return projection
        found = getattr(projection, "signs", None)
        if found is None:
            assert projection.v is not None
            found = Projection(projection.name, projection.width, projection.groups, projection.size)
            found.v = projection.v.sign()
            projection.signs = found  # type: ignore[attr-defined]
        return found  # type: ignore[no-any-return]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        A, gradient = self.A, torch.is_grad_enabled() and self.A.requires_grad
        forward_mode = any(forward_ad.unpack_dual(t).tangent is not None for t in (x, A))
        if self.awaits_vectors and not gradient and not forward_mode:
            moved = A.detach()
            if not bool(moved.any()) or not bool(moved.isfinite().all()):  # at the start; or a stand-in of a self-check
                return y
        projection = self.vectors[0].of(self.weight_name, x)
        if forward_mode:  # tangents do not pass through projections that are kept
            s = F.linear(x, self.directions().to(x.dtype))
            return y + F.linear(s.to(A.dtype), A).to(y.dtype)
        along = self.rows(projection)
        s = along.project(x)
        if not gradient:
            return y + multiplied(s, A).view_as(y).to(y.dtype)
        z = s if along is projection else projection.project(x)
        return y + SubTokenProduct.apply(x, A, s, z, along.v).to(y.dtype)

    def directions(self) -> Tensor:
        """The signs (or v) of all groups in their places, [G, D]; zeros before v is chosen."""
        found = self.vectors[0].projections.get(self.weight_name)
        if found is None:
            return torch.zeros(self.A.shape[1], self.width)
        rows = self.rows(found).v
        assert rows is not None
        return placed(rows, self.A.shape[1], self.width)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.A.detach().to(weight) @ self.directions().to(weight), bias


class Adapted(Attached):
    """A model with sub-token adapters behind its linear layers."""

    def __init__(self, model: nn.Module, config: Config, seed: int, fresh: Sequence[str]):
        quantised.refuse_unknown(model)
        self.config = config
        self.heads = new_modules(model, set(fresh))
        layers = find(model, config.target_modules, self.heads)
        made = {name: SubTokens(name, *sides(layer), config) for name, layer in layers.items()}
        ids = {a.weight_name: tensor_id(canonical(a.weight_name)) for a in made.values()}
        self.vectors = Vectors(model, config, ids, seed)
        for adapter in made.values():
            adapter.vectors = [self.vectors]
        super().__init__(model, "velora", made, fresh)

    def begin(self, optimizer: Any) -> None:
        if "backward" not in optimizer.uses and self.config.init != "random":
            raise ConfigError(
                f"init {self.config.init!r} takes vectors from the first batch, which the journal of "
                f"{type(optimizer).__name__} does not hold: set scheme_args.init=random, or take a method with "
                "back-propagation (adamw)"
            )

    def save(self, folder: Path) -> None:
        """PEFT's LoRA adapter files, and the vectors."""
        import peft
        from safetensors.torch import save_file

        tensors = {_PREFIX + name: self.view[name].storage.contiguous().cpu() for name in self.fresh}
        ranks = {}
        for name, adapter in self.adapters.items():
            assert isinstance(adapter, SubTokens)
            plain = _PREFIX + canonical(name)
            tensors |= {
                f"{plain}.lora_A.weight": adapter.directions().cpu(),
                f"{plain}.lora_B.weight": adapter.A.detach().cpu(),
            }
            ranks[canonical(name)] = adapter.A.shape[1]
        most = max(ranks.values())
        other: dict[str, Any] = {"^" + re.escape(name) + "$": rank for name, rank in ranks.items() if rank != most}
        config = peft.LoraConfig(
            r=most,
            lora_alpha=most,
            rank_pattern=other,
            alpha_pattern=other,
            target_modules=list(ranks),
            modules_to_save=self.heads or None,
            fan_in_fan_out=any(isinstance(self.model.get_submodule(name), Conv1D) for name in self.adapters),
            auto_mapping={"base_model_class": type(self.model).__name__, "parent_library": type(self.model).__module__},
            base_model_name_or_path=getattr(self.model, "name_or_path", None),
            inference_mode=True,
        )
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER)
        self.vectors.save(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises ConfigError where it belongs to another model or other layers, or has no vectors."""
        from safetensors.torch import load_file

        if not (folder / ADAPTER).exists():
            raise ConfigError(f"{folder} holds no {ADAPTER}: give the folder of a run with scheme velora")
        tensors, values = load_file(folder / ADAPTER), {}
        for name, adapter in self.adapters.items():
            key = f"{_PREFIX}{canonical(name)}"
            A = tensors.pop(f"{key}.lora_B.weight", None)
            tensors.pop(f"{key}.lora_A.weight", None)
            if A is None or A.shape != adapter.A.shape:  # type: ignore[union-attr]
                raise ConfigError(f"{folder} holds no adapter of {name} in this model: load it on the base of its run")
            values[f"{canonical(name)}.velora.A"] = A
        values |= {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
        if strange := sorted(values.keys() ^ self.view.entries.keys()):
            raise ConfigError(f"{folder} and this run do not both tune {strange[0]}: load it with the options of its run")
        if (folder / FILE).exists() or any(bool(A.any()) for name, A in values.items() if name.endswith(".velora.A")):
            places = {a.weight_name: (a.width, a.A.device) for a in self.adapters.values() if isinstance(a, SubTokens)}
            self.vectors.load(folder, places)
        self.view.restore({name: value.to(self.view[name].tensor.device) for name, value in values.items()})

    def merged(self) -> nn.Module:
        if quantised.layers(self.model):
            raise quantised.unmerged()
        plain = super().merged()
        self.vectors.forget(plain)
        return plain


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> Adapted:
    """Freeze `model` and put adapters behind its linear layers; `seed` addresses random vectors. Raises ConfigError."""
    return Adapted(model, config, seed, fresh)
