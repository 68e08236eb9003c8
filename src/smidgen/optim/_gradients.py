"""Shared by methods with back-propagation: gradients from the objective, clipping, float32 work on 16-bit weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from smidgen.activations._compressed import Compressed, drop, held
from smidgen.config import ConfigError
from smidgen.objective import Objective
from smidgen.optim._optimizer import Optimizer, Outcome

Update = Callable[[dict[str, Any], Tensor, dict[str, Any], Tensor], None]  # of a parameter group, gradient, state, weight


CompressedUpdate = Callable[[dict[str, Any], Compressed, dict[str, Any], Tensor], None]


def descend(opt: Optimizer, loss: float, update: Update, compressed: CompressedUpdate | None = None) -> float:
    """Clip the gradients that are held to the config's `max_grad_norm`, call `update` for each tensor that has one, and
    let them go. Returns their norm before clipping; not finite when the loss or a gradient is not, and nothing is written.

    A gradient in compressed form (`smidgen.activations`), whose norm is known without building it, goes to `compressed`,
    or is built for `update`, one tensor at a time.
    """
    entries = [(g, e) for g in opt.param_groups for e in map(opt.view.entries.get, opt.names_of(g)) if e]
    gradients = {e.name: found for _, e in entries if (found := _gradient(e.name, e.tensor)) is not None}
    norm = math.inf
    if gradients and math.isfinite(loss):
        norm = float(torch.linalg.vector_norm(torch.stack([_norm(g) for g in gradients.values()])))
    if not math.isfinite(norm):
        opt.zero_grad(set_to_none=True)
        return norm
    limit = opt.config.max_grad_norm
    scale = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0  # torch.nn.utils.clip_grad_norm_'s rule
    for group, entry in entries:
        gradient = gradients.pop(entry.name, None)
        if gradient is None:
            continue
        state, change = opt.state[entry.tensor], None
        if isinstance(gradient, Compressed):
            if scale != 1.0:
                gradient.u.mul_(scale)
            if compressed is not None:
                change = functools.partial(compressed, group, gradient, state)
            else:
                gradient = gradient.dense()
        if isinstance(gradient, Tensor):
            value = gradient.float()
            if scale != 1.0 and held(entry.tensor) is None:
                value = value * scale
            change = functools.partial(update, group, value, state)
        assert change is not None
        at = opt.rounding_address(opt.config.seed)
        opt.view.edit_(entry.name, change, at=at, rounding=opt.config.rounding)
        entry.tensor.grad = None
        drop([entry.tensor])
    return norm


def _gradient(name: str, tensor: Tensor) -> Tensor | Compressed | None:
    """What a tensor holds. Raises ConfigError where parts of the model gave it gradients of both forms."""
    compressed = held(tensor)
    if compressed is not None and tensor.grad is not None:
        raise ConfigError(
            f"{name} is read by its layer, which compresses its gradient, and elsewhere in the model, which does not: leave it "
            "out with activations_args.layers"
        )
    return tensor.grad if compressed is None else compressed


def _norm(gradient: Tensor | Compressed) -> Tensor:
    return gradient.norm() if isinstance(gradient, Compressed) else torch.linalg.vector_norm(gradient.float())


def adamw_(
    weight: Tensor, gradient: Tensor, state: dict[str, Any], *, lr: float, betas: tuple[float, float], eps: float, decay: float
) -> None:
    """torch's AdamW on one tensor, all float32; weights with two axes or more decay."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(weight)
        state["exp_avg_sq"] = torch.zeros_like(weight)
    adamw(
        [weight],
        [gradient],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        foreach=False,
        fused=False,
        capturable=False,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=decay if weight.ndim >= 2 else 0.0,
        eps=eps,
        maximize=False,
    )


def adamw_bytes(shape: Sequence[int]) -> int:
    """Bytes of AdamW's state of a tensor: two float32 moments a weight and a float32 counter."""
    return 8 * prod(shape) + 4


class GradientOptimizer(Optimizer):
    """One back-propagation a step, then `_update` for each tensor that has a gradient.

    The update works in float32: on the weight itself where it is float32, else on a temporary copy of one tensor that
    is rounded once when it is written back. A non-finite loss or gradient makes a bad step: nothing is written.
    """

    uses = frozenset({"backward"})

    def _update(self, group: dict[str, Any], gradient: Tensor, state: dict[str, Any], weight: Tensor) -> None:
        """weight <- one update, in place; both float32."""
        raise NotImplementedError

    def _compressed_update(self) -> CompressedUpdate | None:
        """An update of a weight by a compressed gradient; without one the gradient is built for `_update`."""
        return None

    def _step(self, objective: Objective) -> Outcome:
        with torch.enable_grad():
            loss = objective.backward()
        norm = descend(self, loss, self._update, self._compressed_update())
        if not math.isfinite(norm):
            return Outcome(loss=torch.nan, written=False, voided=1)
        return Outcome(loss=loss, written=True, measures={"grad_norm": norm})
