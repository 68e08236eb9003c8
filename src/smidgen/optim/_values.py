"""Shared by methods that use loss values only: options, the estimate of the gradient along random directions, its
running RMS, the check of eps.

With z_i independent noise, q = `queries`, and the same data in all evaluations of one step:

    sides: 2         c_i = [L(theta + eps z_i) - L(theta - eps z_i)] / (2 eps)         2q forwards
    sides: 1         c_i = [L(theta + eps z_i) - L(theta)] / eps                       q + 1 forwards, one shared base
    sides: residual  c_i = [L(theta + eps z_i) - mean_j L'(theta' + eps z'_j)] / eps   q forwards; ' is the step before
    g_hat = (1/q) sum_i c_i z_i

Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023 (arXiv 2305.17333): SPSA and n-SPSA;
residual is its one-point feedback (Zhang et al., "A New One-Point Residual-Feedback Oracle", 2022), with q > 1 by us. Its
first step has no step before: c_i = 0, so it moves nothing along z. Non-finite losses void their query and are not kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from smidgen import noise
from smidgen.directions import Dense, Direction, Distribution, Probe
from smidgen.objective import Objective
from smidgen.optim._blocks import rewrite_
from smidgen.optim._optimizer import MethodConfig, Optimizer, Outcome
from smidgen.params import ParamView, Rounding

log = logging.getLogger("smidgen")

Normalise = Literal["none", "rms"]

_BETA = 0.99  # memory of the running mean square, about 100 steps; chosen
_STUCK = 0.05  # share of entries of a tensor that may stand still at eps before we warn
_SAMPLE = 1 << 16  # entries looked at per tensor


class ValueConfig(MethodConfig):
    """Options of the estimate and the update that all these methods share."""

    lr: float = Field(1e-6, gt=0, description="learning rate")
    eps: float = Field(1e-3, gt=0, description="size of a probe, in units of the weights")
    queries: int = Field(1, ge=1, description="directions per step, q")
    sides: Literal[1, 2, "residual"] = Field(
        2,
        description="2: central difference; 1: forward difference with one shared base; residual: one-point feedback, the "
        "difference to the losses of the step before (its first step moves nothing)",
    )
    distribution: Distribution = Field("rademacher", description="entries of z: rademacher (+-1) or gaussian")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of weights with two axes or more")
    rounding: Rounding = Field("stochastic", description="rounding of updates to 16-bit weights")
    seed: int = Field(0, ge=0, description="run seed: addresses all noise")


class ScaledConfig(ValueConfig):
    """The same for methods whose step grows with the projected gradient."""

    lr: float = Field(1e-6, gt=0, description="learning rate; with normalise: rms, the RMS change of a weight per step")
    normalise: Normalise = Field("none", description="rms: divide the projected gradient by its running RMS")


# Rates for a normalised step by scheme. full, lora: from results/real_input and the embedded model's README; eps of
# prefix: MeZO's; the others: chosen for the size of what is tuned (activations, embeddings, biases, head).
_RATES = {
    "full": {"lr": 3e-4, "eps": 1e-3},
    "lora": {"lr": 1e-3, "eps": 1e-2},
    "prefix": {"lr": 1e-2, "eps": 1e-1},
    "prompt": {"lr": 1e-3, "eps": 1e-2},
    "bitfit": {"lr": 1e-3, "eps": 1e-2},
    "head": {"lr": 1e-3, "eps": 1e-2},
}


def suggested(times: float = 1.0, **more: Any) -> dict[str, dict[str, Any]]:
    """SUGGESTED of a method whose step is `times` shorter at the same lr than a normalised one, with further options.

    >>> suggested(0.1)["full"]["lr"]
    3e-05
    """
    return {s: {"lr": float(f"{r['lr'] * times:g}"), "eps": r["eps"], **more} for s, r in _RATES.items()}


@dataclass(frozen=True)
class Estimate:
    """g_hat = (1/q) sum_i c_i z_i, from the q queries with finite losses."""

    Z: tuple[Dense, ...]
    c: tuple[float, ...]  # normalised where the method is asked to
    slope: float  # mean projected gradient before that
    loss: float  # mean loss of the step's data; NaN when no query is left
    voided: int

    @classmethod
    def of(cls, Z: Sequence[Dense], c: Tensor, base: Tensor, rms: RunningRMS | None) -> Estimate:
        """From the projected gradients [q] and the losses beside them [q]; non-finite ones are voided."""
        live = torch.isfinite(c).nonzero()[:, 0].tolist()
        if not live:
            return cls((), (), torch.nan, torch.nan, voided=len(Z))
        slopes = [float(c[i]) for i in live]
        steps = slopes if rms is None else rms(slopes)
        mean, loss = sum(slopes) / len(slopes), float(base[live].mean())
        return cls(tuple(Z[i] for i in live), tuple(steps), mean, loss, voided=len(Z) - len(live))

    @property
    def dead(self) -> bool:
        """Whether no query had finite losses."""
        return not self.Z

    def along(self, scale: float) -> Probe:
        """scale * g_hat."""
        return [(z, scale * c / len(self.Z)) for z, c in zip(self.Z, self.c, strict=True)]

    def terms(self, name: str, scale: float = 1.0) -> list[noise.Term]:
        """scale * g_hat[name], for `smidgen.noise`."""
        return [(z.address(name), scale * c / len(self.Z)) for z, c in zip(self.Z, self.c, strict=True)]

    def add_(self, name: str, start: int, out32: Tensor) -> None:
        """out32 += g_hat[name], for the elements from number `start` on, in the order of memory."""
        noise.accumulate_(out32, self.terms(name), self.Z[0].distribution, start=start)

    def outcome(self, **measures: float) -> Outcome:
        """What a step along this estimate did."""
        if self.dead:
            return Outcome(loss=torch.nan, written=False, voided=self.voided)
        return Outcome(self.loss, written=True, voided=self.voided, measures={"zo/projected_grad": self.slope, **measures})


def differences(
    objective: Objective, Z: Sequence[Direction], eps: float, sides: int, base: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(c [n], losses beside them [n]) along n directions: 2n forwards with two sides, n + 1 with one, n where its `base`,
    the loss at theta, is known."""
    if sides == 2:
        L = objective.losses([((z, s * eps),) for z in Z for s in (1, -1)]).view(-1, 2)
        return (L[:, 0] - L[:, 1]) / (2 * eps), L.mean(1)
    probes: list[Probe] = [((z, eps),) for z in Z]
    if base is None:
        base, L = objective.losses([(), *probes]).split([1, len(Z)])
    else:
        L = objective.losses(probes)
    return (L - base) / eps, base.expand(len(Z))


class ValueOptimizer(Optimizer):
    """Base of methods that move along one estimate a step. State: the running RMS and, for residual, the last loss."""

    uses: ClassVar[frozenset[str]] = frozenset({"losses"})

    def __init__(self, params: Any, config: MethodConfig):
        super().__init__(params, config)
        self.rms = RunningRMS()
        self.last: float | None = None  # mean probed loss of the last step that had one

    def estimate(self, objective: Objective) -> Estimate:
        """Ask for the losses of this step. Cost: see the module."""
        cfg = self.config
        if self.t == 0:
            warn_if_stuck(self.view, cfg.eps)
        eps = cfg.eps
        Z = [Dense(cfg.seed, self.t, i, self.view.ids, cfg.distribution) for i in range(cfg.queries)]
        if cfg.sides in (1, 2):
            c, base = differences(objective, Z, eps, cfg.sides)
        else:
            base = objective.losses([((z, eps),) for z in Z])
            c = (base - (base if self.last is None else self.last)) / eps
        first = cfg.sides == "residual" and self.last is None
        scaled = isinstance(cfg, ScaledConfig) and cfg.normalise == "rms" and not first
        g = Estimate.of(Z, c, base, self.rms if scaled else None)
        if cfg.sides == "residual" and not g.dead:
            self.last = g.loss
        return g

    def move_(self, along: Callable[[float], Probe]) -> None:
        """theta <- decay * theta + along(-lr): one pass over the weights. `along` is called for each parameter group."""
        cfg = self.config
        for group in self.param_groups:
            names, decay = self.names_of(group), self.decay(group, cfg.weight_decay)
            at = self.rounding_address(cfg.seed)
            self.view.apply_(along(-group["lr"]), decay=decay, names=names, at=at, rounding=cfg.rounding)

    def rewrite_(self, update: Callable[[str, float, slice, Tensor, Tensor], None], write: int = 0) -> None:
        """theta <- decay * theta, then `update(name, lr, span, w, work)` in place, block by block; see `_blocks`.

        write: which of this step's writes it is.
        """
        cfg, at = self.config, self.rounding_address(self.config.seed, write)
        for group in self.param_groups:
            decay = self.decay(group, cfg.weight_decay)
            for name in self.names_of(group):
                factor = decay if isinstance(decay, float) else decay[name]

                def block(
                    span: slice, w: Tensor, work: Tensor, *, name: str = name, lr: float = group["lr"], factor: float = factor
                ) -> None:
                    if factor != 1.0:
                        w.mul_(factor)
                    update(name, lr, span, w, work)

                rewrite_(self.view, name, block, at=at, rounding=cfg.rounding)

    def _scalars(self) -> dict[str, Any]:
        return {"mean_square": self.rms.mean_square, "count": self.rms.count, "last": self.last}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        self.rms.mean_square, self.rms.count, self.last = scalars["mean_square"], scalars["count"], scalars["last"]


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
        if entry.addend is not None or entry.tensor.dtype not in (torch.bfloat16, torch.float16):
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
