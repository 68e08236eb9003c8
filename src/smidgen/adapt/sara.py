"""SaRA: the weights near zero are tuned, kept of low rank, and let go of once they have grown.

Source: Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation", ICLR 2025
(arXiv 2409.06633). Of each matrix W

    support      M = |W| < threshold: theta = W + delta on M
    penalty      lambda ||theta . M||_*, the sum of singular values, of one matrix an update, drawn anew
    progressive  after every `reselect` updates the entries that have reached the threshold settle: they keep the value that
                 they have, and those still below it are tuned further

The penalty's gradient, lambda U V^T on M for theta . M = U S V^T, joins the loss's before the step (and its clipping); the
loss that is logged is without it. Defaults are the public repository's setting for Stable Diffusion, whose lr is 1e-3
exp(-350 threshold); how many weights of another model lie below its threshold is another matter. Written from the paper:
in the public code the penalty's gradient reaches nothing that is trained, and masked weights lose their signs.

Method: sparse_adamw or sm3, whose state can follow; any other with reselect = 0 (one from loss values sees no penalty: set
nuclear = 0). Cost: as `spiel` between selections, and a singular value decomposition an update. Bytes a tuned entry as in
`sparse`; a settled one takes 12 (its position, value and base's value) and no state. It does not: adjust the threshold.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from smidgen import noise
from smidgen.adapt import _deltas, _ranks, _sparse_targets
from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._reselection import Follows
from smidgen.adapt._sparse import Site
from smidgen.adapt._support import below, members
from smidgen.config import ConfigError
from smidgen.noise import philox
from smidgen.params import tensor_id

status = "experimental"

EXPORTS, REFUSED = _deltas.EXPORTS, _deltas.REFUSED

STATE = "settled.safetensors"  # in checkpoints: positions that have settled, and the updates made

_SMALL = 1e-6  # singular values below this share of the largest count as zero: their vectors are arbitrary; chosen


class Config(SchemeConfig):
    """Options of SaRA; defaults are its repository's."""

    threshold: float = Field(2e-3, gt=0, description="weights of a smaller magnitude are tuned")
    reselect: int = Field(2500, ge=0, description="updates after which entries that reached the threshold settle; 0: never")
    nuclear: float = Field(5e-4, ge=0, description="weight of the penalty, lambda")
    target_modules: list[str] | str | None = Field(None, description=_deltas.TARGETS)


class SaRA(_deltas.Deltas):
    """A model with deltas on its smallest weights; a new head is tuned whole beside them."""

    scheme = "sara"

    def __init__(self, model: nn.Module, config: Config, seed: int, fresh: Sequence[str]):
        super().__init__(model, config, seed, fresh)
        self.t = 0  # updates made, bad ones included

    def _counts(self, modules: dict[str, Any]) -> dict[str, int]:
        counts = {n: len(below(_sparse_targets.values(m), self.config.threshold)) for n, m in modules.items()}
        if not any(counts.values()):
            least = min(float(_sparse_targets.values(m).detach().abs().min()) for m in modules.values())
            raise ConfigError(
                f"scheme_args.threshold = {self.config.threshold:g} is below every weight of the adapted layers, of which the "
                f"smallest is {least:.3g}: take a larger one"
            )
        return counts

    def _support(self, address: noise.Address, module: Any, count: int) -> Tensor:
        return below(_sparse_targets.values(module), self.config.threshold)

    # -- while it trains (`Moving`) -----------------------------------------------------------------------------------

    def begin(self, optimizer: Any) -> None:
        method, cfg = type(optimizer).__name__, self.config
        if cfg.reselect and not isinstance(optimizer, Follows):
            raise ConfigError(
                f"entries settle, and the state of {method} cannot follow them: use method sparse_adamw or sm3, or "
                "scheme_args.reselect=0"
            )
        if cfg.nuclear and "backward" not in optimizer.uses:
            raise ConfigError(
                f"the penalty is a gradient, which {method} does not ask for: use method sparse_adamw, or scheme_args.nuclear=0"
            )
        self._check()
        self._owe()

    def after_step(self, optimizer: Any, steps: int) -> None:
        self.t = optimizer.t
        if self.config.reselect and self.t % self.config.reselect == 0:
            for name, site in self.sites.items():
                self._settle(optimizer, name, site)
            self._check()
        self._owe()

    def _settle(self, optimizer: Any, name: str, site: Site) -> None:
        size = theta(site).abs()
        stays = size < self.config.threshold
        if not bool(stays.any()):
            stays[size.argmin()] = True  # a tensor without elements cannot be tuned
        if not bool(stays.all()):
            site.settle(stays)
            optimizer.reselect(name, stays.nonzero()[:, 0], None)

    def _owe(self) -> None:
        """Let one matrix get the penalty's gradient in the coming update; on several ranks a share of it on each."""
        sites = list(self.sites.values())
        for site in sites:
            site.owed = None
        if self.config.nuclear:
            address = noise.Address(self.seed, tensor_id("sara.nuclear"), self.t, 0, philox.DATA)
            drawn = sites[int(philox.words(address, torch.zeros(1, dtype=torch.int64))[0, 0]) % len(sites)]
            drawn.owed = functools.partial(nuclear_gradient, drawn, self.config.nuclear / _ranks.count())

    def _check(self) -> None:
        _ranks.checked({name: (site.index,) for name, site in self.sites.items()})

    def save_state(self, folder: Path) -> None:
        from safetensors.torch import save_file

        self.save(folder)
        held = {name: site.settled.index.cpu() for name, site in self.sites.items() if site.settled is not None}
        save_file({**held, "t": torch.tensor(self.t)}, folder / STATE)

    def load_state(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.load(folder)
        held = load_file(folder / STATE)
        self.t = int(held.pop("t"))
        for name, index in held.items():
            site = self.sites[name]
            site.settle(~members(site.index, index.to(site.delta.device)))
        self._owe()


def theta(site: Site) -> Tensor:
    """w + delta of the tuned entries, float32 [k]."""
    base = _sparse_targets.values(site.module).view(-1)[site.index] if site.base is None else site.base
    return base.float() + site.delta.detach()


def nuclear_gradient(site: Site, weight: float) -> Tensor:
    """weight U V^T at the tuned entries [k], for the matrix that holds theta there and zeros elsewhere. Cost: its singular
    value decomposition, and five matrices of its size in float32."""
    rows, columns = site.support.shape
    matrix = torch.zeros(rows * columns, device=site.delta.device)
    matrix[site.index] = theta(site)
    u, s, vt = torch.linalg.svd(matrix.view(rows, columns), full_matrices=False)
    kept = s > _SMALL * s[0]
    return weight * (u[:, kept] @ vt[kept]).reshape(-1)[site.index]


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> SaRA:
    """Freeze `model` and put deltas on its weights near zero; `seed` addresses the draw of the penalised matrix.

    Raises ConfigError for layers that are not there or not supported, and where no weight is below the threshold.
    """
    return SaRA(model, config, seed, fresh)
