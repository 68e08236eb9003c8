"""SSF: every linear layer's and layer norm's output is scaled and shifted feature by feature; the model is frozen.

Source: Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", 2022 (arXiv 2210.08823):

    y' = gamma y + beta,   gamma = 1 and beta = 0 at the start

behind each operation. Folds away: W <- diag(gamma) W, b <- gamma b + beta. So that every model can take it up, there is
a beta only where the layer has a bias, and RMS norms, whose scale is a parameter of their own (scheme bitfit), have no
scale here.
Bytes: 8 a feature. The gradient of gamma reads y, a tensor of each layer's outputs: `activations: velora` saves
its projections.

Saved as the tuned tensors alone; exported merged. It does not: scale the output head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from smidgen.activations._scale import Scale
from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._attached import Adapter, Attached, sides
from smidgen.adapt._peft import new_modules
from smidgen.adapt._sparse_targets import find

status = "experimental"

EXPORTS = {"merged": "the whole model with scales and shifts in its weights, for stock transformers"}
REFUSED = {"adapter": "PEFT has no adapter of scales and shifts"}


class Config(SchemeConfig):
    """Options of SSF."""

    target_modules: list[str] | str | None = Field(
        None, description="linear layers: ends of names, or a regular expression; none: all but the output head"
    )
    norms: bool = Field(True, description="behind layer norms too")


class Scaled(Adapter):
    """gamma and beta behind one layer."""

    def __init__(self, width: int, shift: bool):
        super().__init__()
        self.features = Scale(width, shift)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.features(y)  # type: ignore[no-any-return]

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gamma = self.features.scale.detach().to(weight)
        scaled = weight * (gamma[:, None] if weight.ndim == 2 else gamma)
        return scaled, None if bias is None or self.features.shift is None else gamma * bias + self.features.shift.detach()


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> Attached:
    """Freeze `model` and scale its layers' outputs. Raises ConfigError for layers that are not there."""
    heads = new_modules(model, set(fresh))
    layers = find(model, config.target_modules, heads)
    adapters = {name: Scaled(sides(layer)[0], layer.bias is not None) for name, layer in layers.items()}
    for name, module in model.named_modules() if config.norms else ():
        norm: Any = module
        if isinstance(module, nn.LayerNorm) and norm.weight is not None and not _inside(name, heads):
            adapters[name] = Scaled(norm.weight.numel(), norm.bias is not None)
    return Attached(model, "ssf", adapters, fresh)


def _inside(name: str, heads: Sequence[str]) -> bool:
    return any(name == head or name.startswith(head + ".") for head in heads)
