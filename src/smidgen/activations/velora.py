"""VeLoRA without reconstruction: linear layers save rank-1 projections of their inputs' sub-tokens.

Source: Miles et al., "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections", 2024 (arXiv 2405.17991). A
token x [D] of a linear layer Y = X W^T is split into G sub-tokens of size M; with a fixed unit vector v [M]

    forward:  Y = X W^T exact; saved: Z_p[t, g] = x_t[gM : gM + M] . v, M times less than X
    backward: dX = g W exact;  dW = U (x) v with U = g^T Z_p  [O, G]

which is the exact dW with every M-block of its rows projected on v. The paper and its code build the rank-1 input again and
multiply with it; here neither it nor dW is ever built: gradient and multiplications shrink by M as well, and with
`velora_adamw` the optimizer's state too. Other methods with back-propagation get dW built for one weight at a time.

`groups` is the number G of sub-tokens, `size` their size M. The paper writes M for both ("M = 32" of its 7B runs is the
number of groups of its code, sub-tokens of 128 to 344 elements). Where G M is not D, the last sub-token is padded
with zeros and its vector cut and made a unit again: exact all the same. A layer that is no wider than G is left alone.

v is fixed at the first forward with gradient: the mean of the sub-tokens over that micro-batch's valid tokens (as
attention_mask says, where a layer's input has its shape; all tokens elsewhere, and in a decoder behind an encoder), summed
over ranks. It is saved with checkpoints and read again. Layers that read the same tensor (q, k, v; gate, up) share
vectors and one saved copy.

`recompute: cheap`: RMS norms, `act(gate) * up` of gated MLPs and ReLU, which save copies of the same tensors of their own,
save their inputs (ReLU: one byte an element) and compute the rest again in the backward: the same bits forward, and gradients
that are sums of the same terms. `mlp`: gated MLPs of plain linear layers save nothing of gate(x) and up(x) either, and
multiply both again, which costs about a sixth of the step's multiplications.

Cost: one pass over each input in the forward; saved by a layer's input: tokens x G x itemsize, see `VeLoRA.saved_bytes`.
It does not: touch the output head, tied weights or layers other than nn.Linear; compress what attention saves (q, k, v, its
output); replay dropout; run on several processes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smidgen.activations import _compressed, _recompute
from smidgen.activations._linear import ProjectedLinear
from smidgen.activations._projection import Init, Projection, address
from smidgen.config import ConfigError
from smidgen.linear import linear
from smidgen.params import Entry, ParamView

status = "experimental"

Recompute = Literal["none", "cheap", "mlp"]

FILE = "velora.safetensors"  # in each checkpoint

# The published placements, as Hugging Face models call these layers.
_VALUE = r"(\.(v_proj|value|v_lin)\b|Attention\.v\b)"
_DOWN = r"(\.(down_proj|fc2|wo|c_proj|dense_4h_to_h)\b|(?<!attention)\.output\.dense\b)"
_PLACES = {"all": "", "value": _VALUE, "down": _DOWN, "value+down": f"{_VALUE}|{_DOWN}"}


class Config(BaseModel):
    """Options of VeLoRA."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: int | None = Field(
        None, ge=1, description="number G of sub-tokens; none: 32, the paper's best, unless size is given"
    )
    size: int | None = Field(None, ge=1, description="elements M of a sub-token, instead of groups")
    layers: str = Field(
        "all", description="all, value, down, value+down (as published), or a regular expression of the tuned linear weights"
    )
    init: Init = Field("mean", description="vectors: mean of the first batch's sub-tokens, their power iteration, or random")
    per_group: bool = Field(False, description="a vector for each group instead of one for all")
    recompute: Recompute = Field(
        "cheap", description="computed again in the backward: none, cheap (norms, activations), or mlp (gate and up as well)"
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


class VeLoRA:
    """The policy as installed in a model. `remove` puts everything back."""

    def __init__(self, model: nn.Module, config: Config, view: ParamView, seed: int):
        self.model, self.config, self.seed = model, config, seed
        self.chosen = _chosen(model, config, view)  # canonical name of the weight -> its module
        self.projections: dict[str, Projection] = {}  # name of the weight -> what it shares with others
        self._ids = {name: view[name].id for name in self.chosen}
        self._mask: Tensor | None = None
        self._recent: tuple[Tensor, int, Projection] | None = None  # last input of the first forward
        self._decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._patched: list[nn.Module] = []
        free = [] if config.recompute == "none" else [m for m in model.modules() if _plain(m)]
        self._norms = [m for m in free if _recompute.is_rms_norm(m)]
        self._gates = [m for m in free if _recompute.is_gated(m)]
        for name, linear_module in self.chosen.items():
            self._patch(linear_module, functools.partial(self._linear, name, linear_module))
        for module in self._norms:
            self._patch(module, functools.partial(_norm, module, type(module).forward))
        for module in self._gates:
            self._patch(module, functools.partial(self._gate, module, type(module).forward))
        for module in free:
            if type(module) is nn.ReLU:
                self._patch(module, functools.partial(_relu, module))
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def _patch(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        module.forward = forward  # type: ignore[method-assign]
        self._patched.append(module)

    def _multiplied_again(self, gate: nn.Module) -> bool:
        plain = all(type(gate.get_submodule(part)) is nn.Linear for part in ("gate_proj", "up_proj"))
        return self.config.recompute == "mlp" and plain

    def remove(self) -> None:
        """Take the policy out of the model, with compressed gradients that are still held."""
        for module in self._patched:
            module.__dict__.pop("forward", None)
        for hook in self._hooks:
            hook.remove()
        _compressed.drop(m.weight for m in self.chosen.values())  # type: ignore[misc]

    # -- forward ------------------------------------------------------------------------------------------------------

    def _enter(self, _: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if len(self.projections) < len(self.chosen) and torch.is_grad_enabled():
            self._mask = kwargs.get("attention_mask")

    def _leave(self, *_: Any) -> None:
        self._mask = self._recent = None

    def _linear(self, name: str, module: nn.Linear, x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return linear(x, weight, bias)
        projection = self.projections.get(name) or self._choose(name, x)
        z = projection.project(x)
        if torch.is_autocast_enabled(x.device.type):
            kind = torch.get_autocast_dtype(x.device.type)
            x = x.to(kind)
        return ProjectedLinear.apply(x, weight, bias, z, projection.v)  # type: ignore[no-any-return]

    def _gate(self, module: nn.Module, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(module, x)
        if not self._multiplied_again(module):
            return _recompute.gated_again(module, x)
        for name, reader in self.chosen.items() if len(self.projections) < len(self.chosen) else ():
            if name not in self.projections and any(reader is m for m in (module.gate_proj, module.up_proj)):
                self._choose(name, x)  # now, while the mask is known: they run with gradient in the backward only
        return _recompute.gated_anew(module, x)

    def _choose(self, name: str, x: Tensor) -> Projection:
        """The vectors of a layer at its first input: those of the layer before, where both read the same tensor."""
        if self._recent is not None and self._recent[0] is x and self._recent[1] == x._version:
            projection = self._recent[2]
        else:
            projection = Projection(name, x.shape[-1], *self.config.split(x.shape[-1]))
            at = address(self.seed, self._ids[name])
            projection.choose(x.detach(), self._valid(name, x), self.config.init, self.config.per_group, at)
            self._recent = (x, x._version, projection)
        self.projections[name] = projection
        return projection

    def _valid(self, name: str, x: Tensor) -> Tensor | None:
        """Which tokens of an input are no padding, as far as the mask tells."""
        mask = self._mask
        if mask is None or mask.ndim != 2 or (self._decoder and "decoder" in name):
            return None
        if mask.shape == x.shape[:-1]:
            return mask.bool()
        return mask.flatten().bool() if x.ndim == 2 and mask.numel() == len(x) else None

    # -- what is kept -------------------------------------------------------------------------------------------------

    def saved_bytes(self, tokens: int, itemsize: int) -> dict[str, int]:
        """Bytes that one forward of so many tokens saves in the parts that the policy owns, once for each tensor that is
        saved. Layers whose inputs are not known yet (before the first forward) count as sharing nothing."""
        anew = [g for g in self._gates if self._multiplied_again(g)]
        made_again = {id(m) for g in anew for part in ("gate_proj", "up_proj") for m in g.get_submodule(part).modules()}
        kept = {name: module for name, module in self.chosen.items() if id(module) not in made_again}
        shared = {id(p): p.groups for name in kept if (p := self.projections.get(name)) is not None}
        alone = [self.config.split(m.in_features)[0] for name, m in kept.items() if name not in self.projections]
        widths = [int(g.get_submodule("gate_proj").out_features) for g in self._gates if g not in anew]  # type: ignore[arg-type]
        norms = [next(m.parameters()).numel() for m in self._norms]
        return {
            "projections": tokens * itemsize * (sum(shared.values()) + sum(alone)),
            "norms": tokens * itemsize * sum(norms),
            "gates": tokens * itemsize * 2 * sum(widths),
        }

    def gradient_shapes(self, shapes: Mapping[str, tuple[Any, torch.dtype]]) -> dict[str, tuple[Any, torch.dtype]]:
        """Shapes of the tuned tensors with those of compressed weights replaced by their U's: what `state_bytes` of
        `velora_adamw` wants to know."""
        found = dict(shapes)
        for name, module in self.chosen.items():
            found[name] = ((module.out_features, self.config.split(module.in_features)[0]), shapes[name][1])
        return found

    def save(self, folder: Path) -> None:
        """Write the vectors into a checkpoint's folder; nothing before the first forward with gradient."""
        if not self.projections:
            return
        shared = {name: p.name for name, p in self.projections.items()}
        vectors = {p.name: p.v.cpu() for p in self.projections.values() if p.v is not None}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(vectors, folder / FILE, metadata=shared)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises ConfigError for a checkpoint without vectors, or with those of other layers."""
        path = folder / FILE
        if not path.exists():
            raise ConfigError(
                f"{folder} holds no {FILE}: its vectors cannot be made again, so the run would go on in other subspaces; "
                "resume from a checkpoint of a velora run, or start a new run from its weights"
            )
        with safe_open(path, "pt") as file:
            shared = dict(file.metadata() or {})
        vectors, found = load_file(path), {}
        for reader, name in shared.items():
            module = self.chosen.get(reader)
            if module is None or vectors[name].shape[1] != self.config.split(module.in_features)[1]:
                raise ConfigError(
                    f"{path} holds vectors of other layers or sizes ({reader}): resume with the run's own settings"
                )
            if name not in found:
                found[name] = Projection(name, module.in_features, *self.config.split(module.in_features))
                found[name].v = vectors[name].to(module.weight.device)
            self.projections[reader] = found[name]


def _plain(module: nn.Module) -> bool:
    return "forward" not in module.__dict__


def _norm(module: nn.Module, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(module, x)
    return _recompute.norm_again(module, forward, x)


def _relu(module: nn.ReLU, x: Tensor) -> Tensor:
    return _recompute.relu(x) if torch.is_grad_enabled() else nn.ReLU.forward(module, x)


def _chosen(model: nn.Module, config: Config, view: ParamView) -> dict[str, nn.Linear]:
    """The tuned linear layers that are compressed, by the names of their weights. Raises ConfigError where there are none."""
    try:
        wanted = re.compile(_PLACES.get(config.layers, config.layers))
    except re.error as error:
        raise ConfigError(f"layers = {config.layers!r} is not a regular expression ({error}): correct it") from None
    getter = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    of_kind: list[Entry] = [e for e in view if any(type(m) is nn.Linear and a == "weight" for m, a in e.sites)]
    found: dict[str, nn.Linear] = {}
    for entry in of_kind:
        module = entry.sites[0][0]
        assert isinstance(module, nn.Linear) or len(entry.sites) > 1
        if len(entry.sites) > 1 or module is head or not _plain(module) or not wanted.search(entry.name):
            continue
        if config.split(module.in_features)[1] > 1:  # type: ignore[arg-type]
            found[entry.name] = module  # type: ignore[assignment]
    if not found:
        told = ", ".join(e.name for e in of_kind[:3]) or "none"
        raise ConfigError(
            f"velora with layers = {config.layers!r} finds nothing to compress among the {len(view)} tuned tensors: it takes "
            "weights of nn.Linear with more inputs than groups that are not tied and not the output head (linear weights "
            f"here: {told}); choose other layers or fewer groups, or leave activations out"
        )
    return found


def build(model: nn.Module, config: Config, *, view: ParamView, seed: int = 0) -> VeLoRA:
    """Install the policy in a model whose tuned tensors are `view`; `seed` addresses random vectors."""
    return VeLoRA(model, config, view, seed)
