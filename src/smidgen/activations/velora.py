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

`recompute: cheap`: RMS norms, `act(gate) * up` of gated MLPs, ReLU and GELUs of several operators, which save copies of the
same tensors of their own, save their inputs (ReLU: one byte an element) and compute the rest again in the backward: the same
bits forward, and gradients that are sums of the same terms. Dropout saves nothing: its masks are drawn again. `up`: gated MLPs
of plain linear layers save gate(x) alone and multiply up(x) again; `mlp`: they save neither, and multiply both again, which
costs about a sixth of the step's multiplications.

With other schemes: the inputs of LoRA's A, of both branches of Hydra and of SSF's scales; of sparse deltas (SpIEL), whose
gradient is gathered from U (x) v (see `_deltas`). Scheme velora is the same training as an adapter over a frozen base: its
adapters save projections by themselves, and `recompute` is what this policy adds.

Cost: one pass over each input in the forward; saved by a layer's input: tokens x G x itemsize, see `VeLoRA.saved_bytes`.
It does not: touch the output head, tied weights or layers other than nn.Linear; compress what attention saves (q, k, v, its
output, its dropout); run on several processes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from smidgen.activations import _compressed, _dropout, _recompute
from smidgen.activations._deltas import ProjectedDeltas, site_of
from smidgen.activations._linear import ProjectedLinear
from smidgen.activations._projection import Init
from smidgen.activations._scale import ProjectedScale, Scale
from smidgen.activations._vectors import FILE, Vectors
from smidgen.config import ConfigError
from smidgen.linear import linear
from smidgen.params import Entry, ParamView

__all__ = ["FILE", "Config", "VeLoRA", "build", "status"]

status = "experimental"

Recompute = Literal["none", "cheap", "up", "mlp"]

_AGAIN = {"up": ("up_proj",), "mlp": ("gate_proj", "up_proj")}  # of a gated MLP

# The published placements, as Hugging Face models call these layers.
_VALUE = r"(\.(v_proj|value|v_lin)\b|Attention\.v\b)"
_DOWN = r"(\.(down_proj|fc2|wo|c_proj|dense_4h_to_h)\b|(?<!attention)\.output\.dense\b)"
_KINDS = ("weight", "scale", "delta")  # tuned tensors of linear layers, scales, and linear layers with sparse deltas
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
        "cheap",
        description="computed again in the backward: none, cheap (norms, activations), up (of gated MLPs, too), mlp (and gate)",
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
        # Canonical name of the tuned tensor -> its module.
        self.chosen, self.scales, self.sparse = _chosen(model, config, view)
        ids = {name: view[name].id for name in (*self.chosen, *self.scales, *self.sparse)}
        self._vectors = Vectors(model, config, ids, seed)
        self.projections = self._vectors.projections  # name of the weight -> what it shares with others
        self._patched: list[nn.Module] = []
        free = [] if config.recompute == "none" else [m for m in model.modules() if _plain(m)]
        self._norms = [m for m in free if _recompute.is_rms_norm(m)]
        self._gates = [m for m in free if _recompute.is_gated(m)]
        for name, linear_module in self.chosen.items():
            self._patch(linear_module, functools.partial(self._linear, name, linear_module))
        for name, scale in self.scales.items():
            self._patch(scale, functools.partial(self._scale, name, scale))
        for name, layer in self.sparse.items():
            self._patch(layer, functools.partial(self._deltas, name, layer))
        for module in self._norms:
            self._patch(module, functools.partial(_norm, module, type(module).forward))
        for module in self._gates:
            self._patch(module, functools.partial(self._gate, module, type(module).forward))
        self._acts = {m: _width(model, m) for m in free if type(m) is nn.ReLU or _recompute.saves_copies(m)}
        for module in self._acts:
            self._patch(module, functools.partial(_activation, module, type(module).forward))
        for module in free:
            if type(module) is nn.Dropout and not module.inplace:
                self._patch(module, functools.partial(_dropout.forward, module))
            elif _plain(module) and _dropout.by_function(module):
                self._patch(module, functools.partial(_dropout.replaying, module, type(module).forward))

    def _patch(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        module.forward = forward  # type: ignore[method-assign]
        self._patched.append(module)

    def _multiplied_again(self, gate: nn.Module) -> list[nn.Module]:
        """The layers of a gated MLP whose outputs the backward makes again."""
        parts = [gate.get_submodule(name) for name in _AGAIN.get(self.config.recompute, ())]
        return parts if all(map(_recompute.repeatable, parts)) else []

    def remove(self) -> None:
        """Take the policy out of the model, with compressed gradients that are still held."""
        for module in self._patched:
            module.__dict__.pop("forward", None)
        self._vectors.remove()
        _compressed.drop(m.weight for m in self.chosen.values())  # type: ignore[misc]

    # -- forward ------------------------------------------------------------------------------------------------------

    def _linear(self, name: str, module: nn.Linear, x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return linear(x, weight, bias)
        projection = self._vectors.of(name, x)
        z = projection.project(x)
        if torch.is_autocast_enabled(x.device.type):
            kind = torch.get_autocast_dtype(x.device.type)
            x = x.to(kind)
        return ProjectedLinear.apply(x, weight, bias, z, projection.v)  # type: ignore[no-any-return]

    def _scale(self, name: str, module: Scale, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and module.scale.requires_grad):
            return Scale.forward(module, x)
        projection = self._vectors.of(name, x)
        z = projection.project(x)
        return ProjectedScale.apply(x, module.scale, module.shift, z, projection.v)  # type: ignore[no-any-return]

    def _deltas(self, name: str, module: nn.Linear, x: Tensor) -> Tensor:
        site, delta = site_of(module), module._parameters["delta"]
        assert site is not None
        if not torch.is_grad_enabled() or delta is not site.delta or torch.is_autocast_enabled(x.device.type):
            return type(module).forward(module, x)
        site.swap_in()
        projection = self._vectors.of(name, x)
        z = projection.project(x)
        return ProjectedDeltas.apply(x, delta, module.weight, module.bias, z, projection.v, site)  # type: ignore[no-any-return]

    def _gate(self, module: nn.Module, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(module, x)
        parts = self._multiplied_again(module)
        if not parts or any(getattr(m, "awaits_vectors", False) for m in module.modules()):
            return _recompute.gated_again(module, x)
        for name, reader in () if self._vectors.chosen else self.chosen.items():
            inside = (m for part in parts for m in part.modules())
            if name not in self.projections and any(reader is m for m in inside):
                self._vectors.of(name, x)  # now, while the mask is known: they run with gradient in the backward only
        return _recompute.gated_anew(module, x, gate=len(parts) == 2)

    # -- what is kept -------------------------------------------------------------------------------------------------

    def saved_bytes(self, tokens: int, itemsize: int) -> dict[str, int]:
        """Bytes that one forward of so many tokens saves in the parts that the policy owns, once for each tensor that is
        saved. Layers whose inputs are not known yet (before the first forward) count as sharing nothing."""
        again = {g: self._multiplied_again(g) for g in self._gates}
        made_again = {id(m) for parts in again.values() for part in parts for m in part.modules()}
        kept = {n: m for n, m in self._all().items() if id(m) not in made_again}
        shared = {id(p): p.groups for name in kept if (p := self.projections.get(name)) is not None}
        alone = [self.config.split(width)[0] for name, width in self._places(kept).items() if name not in self.projections]
        widths = [int(g.get_submodule("gate_proj").out_features) * (2 - len(parts)) for g, parts in again.items()]  # type: ignore[arg-type]
        norms = [next(m.parameters()).numel() for m in self._norms]
        return {
            "projections": tokens * itemsize * (sum(shared.values()) + sum(alone)),
            "norms": tokens * itemsize * sum(norms),
            "gates": tokens * itemsize * sum(widths),
            "activations": tokens * sum(w * (1 if type(m) is nn.ReLU else itemsize) for m, w in self._acts.items()),
        }

    def _all(self) -> dict[str, nn.Linear | Scale]:
        return {**self.chosen, **self.scales, **self.sparse}

    @staticmethod
    def _places(modules: Mapping[str, nn.Linear | Scale]) -> dict[str, int]:
        """Width of each module's input."""
        return {n: m.in_features if isinstance(m, nn.Linear) else m.scale.numel() for n, m in modules.items()}

    def gradient_shapes(self, shapes: Mapping[str, tuple[Any, torch.dtype]]) -> dict[str, tuple[Any, torch.dtype]]:
        """Shapes of the tuned tensors with those of compressed weights replaced by their U's: what `state_bytes` of
        `velora_adamw` wants to know."""
        found = dict(shapes)
        for name, module in self.chosen.items():
            found[name] = ((module.out_features, self.config.split(module.in_features)[0]), shapes[name][1])
        return found

    def save(self, folder: Path) -> None:
        """Write the vectors into a checkpoint's folder; nothing before the first forward with gradient."""
        self._vectors.save(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises ConfigError for a checkpoint without vectors, or with those of other layers."""
        modules = self._all()
        devices = {name: next(m.parameters()).device for name, m in modules.items()}
        self._vectors.load(folder, {name: (width, devices[name]) for name, width in self._places(modules).items()})


def _plain(module: nn.Module) -> bool:
    return "forward" not in module.__dict__


def _norm(module: nn.Module, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(module, x)
    return _recompute.norm_again(module, forward, x)


def _activation(module: nn.Module, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(module, x)
    return _recompute.relu(x) if type(module) is nn.ReLU else _recompute.activation_again(module, forward, x)


def _width(model: nn.Module, activation: nn.Module) -> int:
    """Elements of an activation's input a token: the most outputs among the layers that stand beside it."""
    beside = next(m for m in model.modules() if activation in m.children()).children()
    widths: list[Any] = [getattr(m, "out_features", None) for m in beside]
    return max((width for width in widths if isinstance(width, int)), default=0)


def _chosen(
    model: nn.Module, config: Config, view: ParamView
) -> tuple[dict[str, nn.Linear], dict[str, Scale], dict[str, nn.Linear]]:
    """The modules that are compressed, by the names of their tuned tensors: linear layers, scales, and linear layers with
    sparse deltas. Raises ConfigError where there are none."""
    try:
        wanted = re.compile(_PLACES.get(config.layers, config.layers))
    except re.error as error:
        raise ConfigError(f"layers = {config.layers!r} is not a regular expression ({error}): correct it") from None
    getter = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    of_kind: list[Entry] = [e for e in view if any(_kind(m, a) for m, a in e.sites)]
    found: dict[str | None, dict[str, Any]] = {kind: {} for kind in _KINDS}
    for entry in of_kind:
        module = entry.sites[0][0]
        if len(entry.sites) > 1 or module is head or not _plain(module) or not wanted.search(entry.name):
            continue
        width = module.in_features if isinstance(module, nn.Linear) else entry.tensor.numel()
        if config.split(width)[1] > 1:
            found[_kind(*entry.sites[0])][entry.name] = module
    if not any(found.values()) and not any(hasattr(m, "awaits_vectors") for m in model.modules()):
        told = ", ".join(e.name for e in of_kind[:3]) or "none"
        raise ConfigError(
            f"velora with layers = {config.layers!r} finds nothing to compress among the {len(view)} tuned tensors: it takes "
            "weights of nn.Linear with more inputs than groups that are not tied and not the output head (linear weights "
            f"here: {told}); choose other layers or fewer groups, or leave activations out"
        )
    weights, scales, deltas = (found[kind] for kind in _KINDS)
    return weights, scales, deltas


def _kind(module: nn.Module, attribute: str) -> str | None:
    """How a tuned tensor of a module is read, one of `_KINDS`; None where it is not compressed."""
    if (type(module), attribute) in ((nn.Linear, "weight"), (Scale, "scale")):
        return attribute
    return "delta" if attribute == "delta" and site_of(module) is not None else None


def build(model: nn.Module, config: Config, *, view: ParamView, seed: int = 0) -> VeLoRA:
    """Install the policy in a model whose tuned tensors are `view`; `seed` addresses random vectors."""
    return VeLoRA(model, config, view, seed)
