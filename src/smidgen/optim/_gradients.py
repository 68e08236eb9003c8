"""Shared by methods with back-propagation: gradients from the objective, clipping, float32 work on 16-bit weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.optim.adamw import adamw

from smidgen.activations._compressed import Compressed, drop, held
from smidgen.config import ConfigError
from smidgen.objective import Objective
from smidgen.optim._fused import as_they_come, refuse_accumulation, same_draws
from smidgen.optim._optimizer import MethodConfig, Optimizer, Outcome
from smidgen.params import Entry

Update = Callable[[dict[str, Any], Tensor, dict[str, Any], Tensor], None]  # of a parameter group, gradient, state, weight

_BLOCK = 1 << 20  # elements of a block of AdamW's update (4 MB); chosen

CompressedUpdate = Callable[[dict[str, Any], Compressed, dict[str, Any], Tensor], None]


def descend(
    opt: Optimizer, loss: float, update: Update, compressed: CompressedUpdate | None = None, limit: float | None = None
) -> float:
    """Clip the gradients that are held to a norm of `limit` (None: the config's `max_grad_norm`), call `update` for each
    tensor that has one, and let them go. Returns their norm before clipping; not finite when the loss or a gradient is not,
    and nothing is written.

    A gradient in compressed form (`smidgen.activations`), whose norm is known without building it, goes to `compressed`,
    or is built for `update`, one tensor at a time.
    """
    entries = _entries(opt)
    gradients = {name: found for name, (_, e) in entries.items() if (found := _gradient(name, e.tensor)) is not None}
    norm = _total([_norm(g) for g in gradients.values()], loss)
    if not math.isfinite(norm):
        opt.zero_grad(set_to_none=True)
        return norm
    scale = _scale(norm, opt.config.max_grad_norm if limit is None else limit)
    for name, (group, entry) in entries.items():
        if name in gradients:
            _write(opt, group, entry, gradients.pop(name), scale, update, compressed)
    return norm


def _entries(opt: Optimizer) -> dict[str, tuple[dict[str, Any], Entry]]:
    """Parameter group and entry of each tensor, in the optimizer's order."""
    return {name: (g, opt.view[name]) for g in opt.param_groups for name in opt.names_of(g)}


def _total(norms: Sequence[Tensor], loss: float) -> float:
    """The norm of all gradients, infinite where there are none or the loss is not finite."""
    return float(torch.linalg.vector_norm(torch.stack(list(norms)))) if norms and math.isfinite(loss) else math.inf


def _scale(norm: float, limit: float) -> float:
    """What clipping multiplies gradients by: torch.nn.utils.clip_grad_norm_'s rule."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0


def _write(
    opt: Optimizer,
    group: dict[str, Any],
    entry: Entry,
    gradient: Tensor | Compressed,
    scale: float,
    update: Update,
    compressed: CompressedUpdate | None,
) -> None:
    """Update one tensor with its gradient, which is used up."""
    state, change = opt.state[entry.tensor], None
    if isinstance(gradient, Compressed):
        if scale != 1.0:
            gradient.u.mul_(scale)
        if compressed is not None:
            change = functools.partial(compressed, group, gradient, state)
        else:
            gradient, scale = gradient.dense(), 1.0
    if isinstance(gradient, Tensor):
        value = gradient.float()
        if scale != 1.0:
            value.mul_(scale)
        change = functools.partial(update, group, value, state)
    assert change is not None
    opt.view.edit_(entry.name, change, at=opt.rounding_address(opt.config.seed), rounding=opt.config.rounding)
    entry.tensor.grad = None
    drop([entry.tensor])


def _gradient(name: str, tensor: Tensor) -> Tensor | Compressed | None:
    """What a tensor holds. Raises ConfigError where parts of the model gave it gradients of both forms."""
    compressed = held(tensor)
    if compressed is not None and tensor.grad is not None:
        raise _read_elsewhere(name)
    return tensor.grad if compressed is None else compressed


def _read_elsewhere(name: str) -> ConfigError:
    return ConfigError(
        f"{name} is read by its layer, which compresses its gradient, and elsewhere in the model, which does not: leave it "
        "out with activations_args.layers"
    )


def _norm(gradient: Tensor | Compressed) -> Tensor:
    return gradient.norm() if isinstance(gradient, Compressed) else torch.linalg.vector_norm(gradient.float())


def adamw_(
    weight: Tensor, gradient: Tensor, state: dict[str, Any], *, lr: float, betas: tuple[float, float], eps: float, decay: float
) -> None:
    """torch's AdamW on one tensor, all float32; weights with two axes or more decay. Block by block: torch's two
    temporaries of the size of the tensor would be the step's peak where a model has a large vocabulary."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(weight)
        state["exp_avg_sq"] = torch.zeros_like(weight)
    step, whole = state["step"], (weight, gradient, state["exp_avg"], state["exp_avg_sq"])
    dense = all(t.is_contiguous() for t in whole)
    for parts in zip(*(t.view(-1).split(_BLOCK) for t in whole), strict=True) if dense else [whole]:
        w, g, m, v = parts
        adamw(
            [w],
            [g],
            [m],
            [v],
            [],
            [step.clone()],
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
    step.add_(1)


def adamw_bytes(shape: Sequence[int]) -> int:
    """Bytes of AdamW's state of a tensor: two float32 moments a weight and a float32 counter."""
    return 8 * prod(shape) + 4


class GradientConfig(MethodConfig):
    """Options that methods with a fused step share."""

    fused: bool = Field(
        False,
        description="update each tensor in the backward pass, where one gradient is alive at a time; one micro-batch a step; "
        "with max_grad_norm the pass is made twice, first for the norm",
    )


class GradientOptimizer(Optimizer):
    """One back-propagation a step, then `_update` for each tensor that has a gradient.

    The update works in float32: on the weight itself where it is float32, else on a temporary copy of one tensor that
    is rounded once when it is written back. A non-finite loss or gradient makes a bad step: nothing is written.

    With the option `fused` each tensor is updated in the backward pass: the same bits. Clipping needs the norm of all
    gradients first, from a forward and backward pass of its own with the same dropout. Without clipping, a gradient that is
    not finite ends the writing where it is met: tensors nearer to the loss keep their update, and the step counts as bad.
    """

    uses = frozenset({"backward"})

    def _update(self, group: dict[str, Any], gradient: Tensor, state: dict[str, Any], weight: Tensor) -> None:
        """weight <- one update, in place; both float32."""
        raise NotImplementedError

    def _compressed_update(self) -> CompressedUpdate | None:
        """An update of a weight by a compressed gradient; without one the gradient is built for `_update`."""
        return None

    def _limit(self) -> float:
        """The norm to which gradients are clipped; 0: they are not."""
        return self.config.max_grad_norm  # type: ignore[no-any-return]

    def _step(self, objective: Objective) -> Outcome:
        if getattr(self.config, "fused", False):
            return self._fused_step(objective)
        with torch.enable_grad():
            loss = objective.backward()
        norm = descend(self, loss, self._update, self._compressed_update(), self._limit())
        if not math.isfinite(norm):
            return Outcome(loss=torch.nan, written=False, voided=1)
        return Outcome(loss=loss, written=True, measures={"grad_norm": norm})

    def _fused_step(self, objective: Objective) -> Outcome:
        refuse_accumulation(objective)
        entries, scale, limit = _entries(self), 1.0, self._limit()
        tensors = {name: e.tensor for name, (_, e) in entries.items()}
        norms: dict[str, Tensor] = {}

        def measure(name: str, gradient: Tensor | Compressed) -> None:
            norms[name] = _norm(gradient)

        if limit > 0:
            with same_draws(tensors):
                loss = self._pass(objective, tensors, measure)
            norm = _total([norms[name] for name in entries if name in norms], loss)
            if not math.isfinite(norm):
                return Outcome(loss=torch.nan, written=False, voided=1)
            scale = _scale(norm, limit)
            norms.clear()
        written, dead = False, False

        def take(name: str, gradient: Tensor | Compressed) -> None:
            nonlocal written, dead
            measure(name, gradient)
            dead = dead or not math.isfinite(float(norms[name]))
            if not dead:
                group, entry = entries[name]
                with torch.no_grad():
                    _write(self, group, entry, gradient, scale, self._update, self._compressed_update())
                written = True

        loss = self._pass(objective, tensors, take)
        norm = _total([norms[name] for name in entries if name in norms], loss)
        if not math.isfinite(norm):
            return Outcome(loss=torch.nan, written=written, voided=1)
        return Outcome(loss=loss, written=True, measures={"grad_norm": norm})

    def _pass(
        self, objective: Objective, tensors: Mapping[str, Tensor], take: Callable[[str, Tensor | Compressed], None]
    ) -> float:
        """One forward and backward pass that hands each gradient to `take`; compressed ones, which are small, at its end."""
        with torch.enable_grad(), as_they_come(tensors, take) as taken:
            loss = objective.backward()
        for name, tensor in tensors.items():
            gradient = held(tensor)
            if gradient is not None:
                if name in taken:
                    raise _read_elsewhere(name)
                take(name, gradient)
                drop([tensor])
        return loss
