"""AdamW whose elements have ages of their own: for sparse deltas, whose positions come and go.

Source: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", 2024 (arXiv 2401.16405), and its public code:

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  a <- a + 1
    delta <- (1 - lr wd) (delta - lr m_hat / (sqrt(v_hat) + eps)),  m_hat = m / (1 - b1^a),  v_hat = v / (1 - b2^a)

where a is the age of the element: updates since it began to be tuned. It is stored as the number of its generation (one
byte; two once there have been more than 256), with one update count for each generation. Decay pulls a delta to zero, so
the weight to its pretrained value: the published runs take 1 to 30. It applies to all tensors, also those with one axis.
Without reselections and decay this is Adam.

Cost: one forward and one backward a step; an element 8 bytes of float32 moments (4 in bfloat16, 2.03 in 8 bits), and 1 of
its generation where the tensor has a support. bfloat16: rounded stochastically, by address, since a second moment that
changes by a thousandth an update would stand still if rounded to nearest. 8 bits: `_eight_bit`; encoding again after a
reselection may change kept elements' moments by their rounding, which otherwise stay bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from smidgen import noise
from smidgen.objective import Objective
from smidgen.optim import _eight_bit as memory
from smidgen.optim._gradients import GradientOptimizer
from smidgen.optim._optimizer import MethodConfig, Outcome
from smidgen.params import ParamView, Rounding, SparseShape

status = "experimental"

# Without an lr of the user's: the top of the published grid (1e-4 to 3e-6), which is for models of 7B to 13B.
# SaRA's is that of its repository at its default threshold, 1e-3 exp(-350 threshold).
SUGGESTED: dict[str, dict[str, Any]] = {"spiel": {"lr": 1e-4}, "sparse": {"lr": 1e-4}, "sara": {"lr": 5e-4}}

PRESETS: dict[str, dict[str, Any]] = {"spiel": {"lr": 1e-5, "weight_decay": 30.0, "eps": 1e-6, "compat_eps": True}}

MOMENTS = ("exp_avg", "exp_avg_sq")

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
    state: Literal["float32", "bfloat16", "8bit"] = Field(
        "float32", description="how moments are kept; 8bit needs bitsandbytes"
    )
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
        self._ids: dict[int, int] = {}  # of tensors, by their state's own identity: address their moments' rounding
        if self.config.state == "8bit":
            memory.require()

    def _step(self, objective: Objective) -> Outcome:
        self._ids = {}
        for entry in self.view:
            state = self.state[entry.tensor]
            if not state:
                for key in MOMENTS:
                    self._allocate(state, key, entry.tensor)
                if entry.support is not None:
                    state["generation"] = torch.zeros_like(entry.tensor, dtype=self._generations())
            self._ids[id(state)] = entry.id
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
            m = _read(state, "exp_avg", span)
            m.lerp_(g[span], 1.0 - cfg.beta1)
            self._write(state, "exp_avg", span, m)
            v = _read(state, "exp_avg_sq", span)
            v.mul_(cfg.beta2).addcmul_(g[span], g[span], value=1.0 - cfg.beta2)
            root = v.sqrt()
            self._write(state, "exp_avg_sq", span, v)
            born = state["generation"].view(-1)[span].long() if "generation" in state else 0  # the first: since the start
            a, b = first[born], second[born]
            if cfg.compat_eps:
                root.add_(cfg.eps).div_(b.sqrt())
            else:
                root.div_(b.sqrt()).add_(cfg.eps)
            w[span].sub_((m / a).div_(root).mul_(lr))
        if cfg.weight_decay:
            weight.mul_(1.0 - lr * cfg.weight_decay)

    def _allocate(self, state: memory.State, key: str, like: Tensor) -> None:
        """Zeros for a moment, in the shape of `like`."""
        memory.allocate(state, key, like, self.config.state == "8bit")
        if self.config.state == "bfloat16":
            state[key] = state[key].bfloat16()

    def _write(self, state: memory.State, key: str, span: slice, value: Tensor) -> None:
        """Put back a moment that `_read` gave, after a change."""
        if state[key].dtype == torch.bfloat16:
            at = replace(self.rounding_address(self.config.seed), tensor=self._ids[id(state)], query=1 + MOMENTS.index(key))
            noise.write_(state[key].view(-1)[span], value, rounding="stochastic", at=at, start=span.start)
        else:
            coded = value.sqrt() if _rooted(state, key) else value
            memory.write(state, key, span, coded, signed=key == "exp_avg")

    def _generations(self) -> torch.dtype:
        return torch.uint8 if len(self.births) <= 256 else torch.int16

    @torch.no_grad()
    def reselect(self, name: str, origin: Tensor, seeds: Any) -> None:
        """Element j of a tensor with a support is now what element origin[j] was, or new where origin[j] = -1; it may have
        fewer elements than before.

        A new one's moments are those that `seeds` (see `adapt._growth`) would have left after the updates that they cover,
        and it is as old as that; without seeds they are zero.
        """
        state, cfg = self.state[self.view[name].tensor], self.config
        new, held = origin < 0, {key: _read(state, key, slice(0, state[key].numel())) for key in MOMENTS}
        covers, lag = (0.0, 0) if seeds is None else (seeds.covers, seeds.lag)
        moments = (0.0, 0.0)
        if seeds is not None:
            moments = (seeds.mean * (1 - cfg.beta1**covers), seeds.square * (1 - cfg.beta2**covers))
        for key, of_new in zip(MOMENTS, moments, strict=True):
            value = held[key][origin]
            value[new] = of_new
            if state[key].dtype == torch.uint8 or origin.numel() != state[key].numel():
                state.pop(f"{key}_absmax", None)
                self._allocate(state, key, value)
            if state[key].dtype == torch.uint8:
                self._write(state, key, slice(0, value.numel()), value)
            else:
                state[key].copy_(value)
        born = self.updates - round(covers) + lag
        if born not in self.births and bool(new.any()):
            self._begin(born)
        generation = state["generation"][origin]
        if bool(new.any()):
            generation[new] = self.births.index(born)
        state["generation"] = generation

    def _begin(self, born: int) -> None:
        """A new generation; the tensors' numbers get wider where it is the 257th."""
        self.births.append(born)
        for state in self.state.values():
            if "generation" in state:
                state["generation"] = state["generation"].to(self._generations())

    def _scalars(self) -> dict[str, Any]:
        return {"updates": self.updates, "births": list(self.births)}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        self.updates, self.births = scalars["updates"], list(scalars["births"])

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """Two moments an element, and one byte where the tensor has a support (until there have been 256 generations)."""
        if config.state == "bfloat16":
            moments = sum(4 * prod(shape) for shape, _ in shapes.values())
        else:
            moments = sum(2 * memory.nbytes(shape, config.state == "8bit") for shape, _ in shapes.values())
        return moments + sum(prod(shape) for shape, _ in shapes.values() if isinstance(shape, SparseShape))


def _rooted(state: memory.State, key: str) -> bool:
    """Whether 8 bits hold the root of a moment."""
    return key == "exp_avg_sq" and state[key].dtype == torch.uint8


def _read(state: memory.State, key: str, span: slice) -> Tensor:
    """A moment as float32: the memory itself, or a new tensor."""
    if state[key].dtype == torch.bfloat16:
        return state[key].view(-1)[span].float()
    value = memory.read(state, key, span, signed=key == "exp_avg")
    return value.square_() if _rooted(state, key) else value


build = SparseAdamW
