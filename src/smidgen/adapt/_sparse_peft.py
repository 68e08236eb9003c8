"""Sparse deltas as adapters of stock PEFT: SUPERTUNING and SHIRA, whose files hold the positions.

SUPERTUNING takes int((1 - sparsity) n) entries of a matrix with n, one sparsity for all; SHIRA r (rows + columns), one r for
all. Both add float32 values to linear layers. PEFT itself writes the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapt._sparse import Site
from smidgen.config import ConfigError


def write(base: nn.Module, sites: Mapping[str, Site], heads: Sequence[str], folder: Path, form: str) -> None:
    """Write an adapter of `base` (a plain model, which is wrapped) with the sites' deltas, by name of their layers.

    Raises ConfigError where the format cannot hold them.
    """
    import peft

    for name in sites:
        if not isinstance(base.get_submodule(name), nn.Linear):
            raise ConfigError(
                f"{name} is a {type(base.get_submodule(name)).__name__}, which {form} cannot adapt: export merged"
            )
    options: dict[str, Any] = {"target_modules": list(sites), "modules_to_save": list(heads) or None}
    with torch.random.fork_rng(devices=[]):  # PEFT draws values that are written over
        if form == "peft-supertuning":
            wrapped = peft.get_peft_model(base, peft.SupertuningConfig(sparsity=_sparsity(sites), **options))  # type: ignore[arg-type]
        else:
            masks = {id(base.get_submodule(name).weight): site for name, site in sites.items()}
            config = peft.ShiraConfig(r=_rank(sites), mask_type="spiel", **options)  # type: ignore[arg-type]
            config.mask_fn = lambda layer, r, **_: _mask(masks[id(layer.weight)], layer.weight)
            wrapped = peft.get_peft_model(base, config)  # type: ignore[arg-type]
    for name, site in sites.items():
        layer: Any = wrapped.get_submodule(f"base_model.model.{name}")
        if form == "peft-supertuning":
            index, delta = site.everything()
            layer.supertuning_indices["default"] = index.to(torch.int32)
            layer.supertuning_values["default"].data.copy_(delta)
        else:  # torch.where gives the positions of its mask in our order
            layer.shira_weight["default"].data.copy_(site.everything()[1])
    wrapped.save_pretrained(str(folder))


def _mask(site: Site, weight: Tensor) -> Tensor:
    mask = torch.zeros_like(weight)
    mask.view(-1)[site.everything()[0]] = 1
    return mask


def _sparsity(sites: Mapping[str, Site]) -> float:
    """One sparsity that gives every matrix its number of deltas."""
    numbers = [(len(site.everything()[0]), site.weight.numel()) for site in sites.values()]
    low, high = max(k / n for k, n in numbers), min((k + 1) / n for k, n in numbers)
    sparsity = 1 - (low + high) / 2
    if any(int(n * (1 - sparsity)) != k for k, n in numbers):
        raise ConfigError(
            "peft-supertuning has one density for all matrices, and these deltas have several: export merged, or peft-shira "
            "for a budget by rank"
        )
    return sparsity


def _rank(sites: Mapping[str, Site]) -> int:
    """The r with k = r (rows + columns) in every matrix."""
    found = {len(site.everything()[0]) / sum(site.support.shape) for site in sites.values()}
    rank = round(min(found))
    if found != {float(rank)}:
        raise ConfigError(
            "peft-shira wants r (rows + columns) deltas in every matrix with one r, which these are not: export "
            "peft-supertuning, or train with scheme_args.rank"
        )
    return rank
