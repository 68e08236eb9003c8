"""Sparse deltas at positions that stay: of each matrix k entries are tuned, chosen once.

Sources: SHiRA (Bhardwaj et al., "Sparse High Rank Adapters", 2024, arXiv 2406.13175) and Super-Tuning (arXiv 2607.09287, as
PEFT has it). theta_eta = w_eta + delta, delta = 0 at the start, for the k positions eta of

    random      a uniformly random set: SHiRA-Rand, PEFT's SHIRA
    large       the largest |w|: SHiRA-WM, Super-Tuning, PEFT's SUPERTUNING
    small       the smallest |w|: Super-Tuning's "bottom"
    structured  the main diagonal and whole rows, spread evenly: SHiRA-Struct
    gradient    the largest |sum of gradients| over the first `collect` updates, which train a random set that is then let go
                of, as SpIEL's first selection: SHiRA-Grad, whose gradients are of a calibration set before training
    snip        the same of |w sum of gradients|, how much the loss would change without the weight: SHiRA-SNIP

Any method tunes the deltas, those from loss values alone too (zo_sgd: a probe displaces k entries); supports gradient and
snip need one whose state can follow (sparse_adamw, sm3). Bytes a tuned entry as in `spiel`, without candidates. On a base
quantised by bitsandbytes the deltas are added to the dequantised temporary. It does not: several adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from smidgen import noise
from smidgen.adapt import _deltas, _sparse_targets
from smidgen.adapt._growing import Growing
from smidgen.adapt._reselection import Reselection, Schedule
from smidgen.adapt._support import by_magnitude, in_lines, random_support

status = "experimental"

EXPORTS, REFUSED = _deltas.EXPORTS, _deltas.REFUSED

_NEVER = 1 << 62  # updates until a second selection


class Config(_deltas.DeltaConfig):
    """Options of sparse deltas at fixed positions."""

    support: Literal["random", "large", "small", "structured", "gradient", "snip"] = Field(
        "random",
        description="which entries: random, the largest or smallest weights, diagonal and rows, the largest gradients, or the "
        "largest products of weight and gradient",
    )
    collect: int = Field(
        5, ge=1, description="updates whose gradients choose the entries, with support gradient or snip; as in spiel"
    )


class Sparse(Growing):
    """A model with sparse deltas at fixed positions of its matrices; a new head is tuned whole beside them."""

    scheme = "sparse"

    def __init__(self, model: nn.Module, config: Config, seed: int, fresh: Sequence[str]):
        super().__init__(model, config, seed, fresh)
        self.growing = None
        growth = {"gradient": "ag", "snip": "snip"}.get(config.support)
        if growth is not None:
            once = Schedule(_NEVER, config.collect, 1.0, "linear", "all", False)
            self.growing = Reselection(self.sites, self.view, once, growth, 1.0, False)

    def _support(self, address: noise.Address, module: Any, count: int) -> Tensor:
        how, shape = self.config.support, _sparse_targets.shape(module)
        if how == "structured":
            return in_lines(shape, count)
        if how in ("large", "small"):
            return by_magnitude(_sparse_targets.values(module), count, largest=how == "large")
        return random_support(address, shape[0] * shape[1], count)

    def _fixed(self) -> str:
        return "another scheme_args.support"


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> Sparse:
    """Freeze `model` and put sparse deltas into its matrices; `seed` addresses random positions.

    Raises ConfigError for layers that are not there or not supported, and for more deltas than entries.
    """
    return Sparse(model, config, seed, fresh)
