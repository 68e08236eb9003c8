"""AdamW whose elements have ages of their own: for sparse deltas, whose positions come and go.

Source: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", 2024 (arXiv 2401.16405), and its public code:

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  a <- a + 1
    delta <- (1 - lr wd) (delta - lr m_hat / (sqrt(v_hat) + eps)),  m_hat = m / (1 - b1^a),  v_hat = v / (1 - b2^a)

where a is the age of the element: updates since it began to be tuned. It is stored as the number of its generation (two
bytes), with one update count for each generation. Decay pulls a delta to zero, so the weight to its pretrained value: the
published runs take 1 to 30. It applies to all tensors, also those with one axis. Without reselections and decay this is
Adam.

Cost: one forward and one backward a step; an element 8 bytes of float32 moments (about 2 in 8 bits), and 2 of its generation
where the tensor has a support. 8 bits: `_eight_bit`; encoding again after a reselection may change kept elements' moments
by their rounding, which in float32 stay bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from smidgen.objective import Objective
from smidgen.optim import _eight_bit as memory
from smidgen.optim._gradients import GradientOptimizer
from smidgen.optim._optimizer import MethodConfig, Outcome
from smidgen.params import ParamView, Rounding, SparseShape

status = "experimental"

# Without an lr of the user's: the top of the published grid (1e-4 to 3e-6), which is for models of 7B to 13B.
SUGGESTED: dict[str, dict[str, Any]] = {"spiel": {"lr": 1e-4}}

PRESETS: dict[str, dict[str, Any]] = {"spiel": {"lr": 1e-5, "weight_decay": 30.0, "eps": 1e-6, "compat_eps": True}}

_BLOCK = 1 << 20  # elements worked on at a time (a multiple of the 8-bit block); chosen


class Config(MethodConfig):
    """Options of AdamW over deltas."""

    lr: float = Field(1e-4, gt=0, description="learning rate; the top of the published grid")
    beta1: float = Field(0.9, ge=0, lt=1, description="memory of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="memory of the second moment")
    eps: float = Field(1e-6, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled decay of all tensors; of deltas the published runs take 1 to 30"
    )
    state: Literal["float32", "8bit"] = Field("float32", description="how moments are kept; 8bit needs bitsandbytes")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global gradient norm; 0 turns clipping off")
    compat_eps: bool = Field(False, description="as the public code: eps joins the root before its bias correction")
    rounding: Rounding = Field("stochastic", description="rounding of updates to 16-bit weights")
    seed: int = Field(0, ge=0, description="run seed: addresses the rounding")


class SparseAdamW(GradientOptimizer):
    """AdamW over any tensors; the state of those with a support can follow them (`reselect`)."""

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))
        self.updates = 0  # steps that were not bad
        self.births = [0]  # of each generation: updates made when it began
        if self.config.state == "8bit":
            memory.require()

    def _step(self, objective: Objective) -> Outcome:
        for entry in self.view:
            state = self.state[entry.tensor]
            if not state:
                for key in ("exp_avg", "exp_avg_sq"):
                    memory.allocate(state, key, entry.tensor, self.config.state == "8bit")
                if entry.support is not None:
                    state["generation"] = torch.zeros_like(entry.tensor, dtype=torch.int16)
        outcome = super()._step(objective)
        self.updates += outcome.written
        return outcome

    def _update(self, group: dict[str, Any], gradient: Tensor, state: dict[str, Any], weight: Tensor) -> None:
        cfg, lr = self.config, group["lr"]
        ages = self.updates + 1 - torch.tensor(self.births, dtype=torch.float64)
        first, second = (
            (1.0 - torch.tensor(b, dtype=torch.float64) ** ages).float().to(weight.device) for b in (cfg.beta1, cfg.beta2)
        )
        w, g = weight.view(-1), gradient.reshape(-1)
        for lo in range(0, w.numel(), _BLOCK):
            span = slice(lo, min(lo + _BLOCK, w.numel()))
            m = memory.read(state, "exp_avg", span, signed=True)
            m.lerp_(g[span], 1.0 - cfg.beta1)
            memory.write(state, "exp_avg", span, m, signed=True)
            v = _square(state, span)
            v.mul_(cfg.beta2).addcmul_(g[span], g[span], value=1.0 - cfg.beta2)
            root = v.sqrt()
            memory.write(state, "exp_avg_sq", span, root, signed=False)
            a, b = first, second
            if "generation" in state:
                born = state["generation"].view(-1)[span].long()
                a, b = first[born], second[born]
            if cfg.compat_eps:
                root.add_(cfg.eps).div_(b.sqrt())
            else:
                root.div_(b.sqrt()).add_(cfg.eps)
            w[span].sub_((m / a).div_(root).mul_(lr))
        if cfg.weight_decay:
            weight.mul_(1.0 - lr * cfg.weight_decay)

    @torch.no_grad()
    def reselect(self, name: str, origin: Tensor, seeds: Any) -> None:
        """Element j of a tensor with a support is now what element origin[j] was, or new where origin[j] = -1.

        A new one's moments are those that `seeds` (see `adapt._growth`) would have left after the updates that they cover,
        and it is as old as that; without seeds they are zero.
        """
        state, cfg = self.state[self.view[name].tensor], self.config
        new = origin < 0
        covers, lag = (0.0, 0) if seeds is None else (seeds.covers, seeds.lag)
        moments = (0.0, 0.0)
        if seeds is not None:
            moments = (seeds.mean * (1 - cfg.beta1**covers), seeds.square * (1 - cfg.beta2**covers))
        whole = slice(0, origin.numel())
        m = memory.read(state, "exp_avg", whole, signed=True)[origin]
        v = _square(state, whole)[origin]
        m[new], v[new] = moments
        _put(state, "exp_avg", m, signed=True)
        _put(state, "exp_avg_sq", v.sqrt_() if state["exp_avg_sq"].dtype == torch.uint8 else v, signed=False)
        born = self.updates - round(covers) + lag
        if born not in self.births:
            self.births.append(born)
        generation = state["generation"][origin]
        generation[new] = self.births.index(born)
        state["generation"].copy_(generation)

    def _scalars(self) -> dict[str, Any]:
        return {"updates": self.updates, "births": list(self.births)}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        self.updates, self.births = scalars["updates"], list(scalars["births"])

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """Two moments an element, and two bytes where the tensor has a support."""
        moments = sum(2 * memory.nbytes(shape, config.state == "8bit") for shape, _ in shapes.values())
        return moments + sum(2 * prod(shape) for shape, _ in shapes.values() if isinstance(shape, SparseShape))


def _square(state: memory.State, span: slice) -> Tensor:
    """The second moment, float32: the memory itself, or the square of the root that 8 bits hold."""
    value = memory.read(state, "exp_avg_sq", span, signed=False)
    return value.square_() if state["exp_avg_sq"].dtype == torch.uint8 else value


def _put(state: memory.State, key: str, value: Tensor, *, signed: bool) -> None:
    """Replace a whole moment."""
    if state[key].dtype == torch.float32:
        state[key].copy_(value)
    else:
        memory.write(state, key, slice(0, value.numel()), value, signed=signed)


build = SparseAdamW
