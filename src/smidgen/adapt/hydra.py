"""Hydra: two low-rank branches at each linear layer, one beside it and one behind it; the model is frozen.

Source: Kim et al., "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", 2023 (arXiv 2309.06922):

    y = W x + b;   y' = y + B_p A_p x + B_s A_s y

B_p = B_s = 0 and A_p, A_s Gaussian of variance 1 / width at the start. Folds away: W <- (I + B_s A_s) W + B_p A_p,
b <- (I + B_s A_s) b. The paper adapts one projection of each block; here all linear layers unless they are named.
Bytes: 4 r (D + 3 O) a layer of D inputs and O outputs. The gradients of A_p and A_s read x and y, which `activations: velora`
saves as projections. Saved as the tuned tensors alone; exported merged. It does not: adapt the output head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from smidgen import noise
from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._attached import Adapter, Attached, sides
from smidgen.adapt._peft import new_modules
from smidgen.adapt._sparse_targets import find
from smidgen.params import canonical, tensor_id

status = "experimental"

EXPORTS = {"merged": "the whole model with both branches in its weights, for stock transformers"}
REFUSED = {"adapter": "PEFT has no adapter with a branch behind the layer"}


class Config(SchemeConfig):
    """Options of Hydra."""

    rank: int = Field(4, ge=1, description="rank r of each branch; VeLoRA's runs take 4")
    target_modules: list[str] | str | None = Field(
        None, description="layers to adapt: ends of names, or a regular expression; none: all linear layers but the output head"
    )


class Branches(Adapter):
    """The branch beside a layer (A_p, B_p) and the one behind it (A_s, B_s)."""

    def __init__(self, name: str, outputs: int, inputs: int, rank: int, seed: int):
        super().__init__()
        for part, width in (("beside", inputs), ("behind", outputs)):
            down = torch.zeros(rank, width)
            at = noise.Address(seed, tensor_id(f"{canonical(name)}.hydra.{part}.A.weight"), 0, 0, noise.INIT)
            noise.accumulate_(down, [(at, width**-0.5)], "gaussian")
            A, B = (
                nn.utils.skip_init(nn.Linear, width, rank, bias=False),
                nn.utils.skip_init(nn.Linear, rank, outputs, bias=False),
            )
            A.weight, B.weight = nn.Parameter(down), nn.Parameter(torch.zeros(outputs, rank))
            self.add_module(part, nn.ModuleDict({"A": A, "B": B}))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + (self._branch("beside", x) + self._branch("behind", y)).to(y.dtype)

    def _branch(self, part: str, x: Tensor) -> Tensor:
        branch: Any = self.get_submodule(part)
        return branch["B"](branch["A"](x.to(branch["A"].weight.dtype)))  # type: ignore[no-any-return]

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        product = {}
        for part in ("beside", "behind"):
            A, B = (self.get_parameter(f"{part}.{name}.weight").detach().to(weight) for name in "AB")
            product[part] = B @ A
        folded = weight + product["behind"] @ weight + product["beside"]
        return folded, None if bias is None else bias + product["behind"] @ bias


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> Attached:
    """Freeze `model` and give its linear layers two branches, drawn from `seed`. Raises ConfigError for layers that are not
    there."""
    layers = find(model, config.target_modules, new_modules(model, set(fresh)))
    adapters = {name: Branches(name, *sides(layer), config.rank, seed) for name, layer in layers.items()}
    return Attached(model, "hydra", adapters, fresh)
