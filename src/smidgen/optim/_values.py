"""Shared by methods that use loss values only: the running RMS of projected gradients, and the check of eps."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from smidgen.params import ParamView

log = logging.getLogger("smidgen")

Normalise = Literal["none", "rms"]

_BETA = 0.99  # memory of the running mean square, about 100 steps; chosen
_STUCK = 0.05  # share of entries of a tensor that may stand still at eps before we warn
_SAMPLE = 1 << 16  # entries looked at per tensor


class RunningRMS:
    """Divides projected gradients by their running root mean square: the learning rate is then the RMS change of one
    weight in one step, whatever the scale of the loss.

    State: one float. The mean square is corrected for its start from zero, so the first step has size one.
    """

    def __init__(self) -> None:
        self.mean_square = 0.0
        self.count = 0

    def __call__(self, c: Sequence[float]) -> list[float]:
        """Normalised values of one step's live projected gradients."""
        square = sum(x * x for x in c) / len(c)
        self.mean_square = _BETA * self.mean_square + (1.0 - _BETA) * square
        self.count += 1
        rms = math.sqrt(self.mean_square / (1.0 - _BETA**self.count))
        return [x / rms if rms > 0.0 else 0.0 for x in c]


def smallest_eps(view: ParamView) -> float:
    """The smallest eps at which at most 5 % of the entries of any tuned tensor stand still under w -> w + eps.

    An entry moves when eps is above half the spacing of its dtype around it. Looks at up to 65,536 entries a tensor.
    """
    worst = 0.0
    for entry in view:
        if entry.tensor.dtype not in (torch.bfloat16, torch.float16):
            continue
        flat = entry.storage.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE]
        half_spacing = _half_ulp(sample)
        worst = max(worst, float(torch.quantile(half_spacing, 1.0 - _STUCK)))
    return worst


def _half_ulp(sample: Tensor) -> Tensor:
    info = torch.finfo(sample.dtype)
    magnitude = sample.abs().float().clamp(min=info.tiny)
    return torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps / 2


def warn_if_stuck(view: ParamView, eps: float) -> None:
    """One line when a dense probe of size eps would leave over 5 % of a 16-bit tensor where it is."""
    needed = smallest_eps(view)
    if eps < needed:
        log.warning(
            "eps = %g is below the rounding of the 16-bit weights for over 5 %% of a tensor: use eps >= %.2g or float32",
            eps,
            needed,
        )
