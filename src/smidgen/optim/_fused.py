"""Gradients that are used as soon as they are there, so that one tensor's is alive at a time.

A backward pass finishes a tensor's gradient when all of its readers have run, and nothing of the pass reads the tensor after
that: it may be written then. Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited
Resources" (LOMO), 2023 (arXiv 2306.09782).

It does not: add up micro-batches, since each backward pass hands over its own gradients (ConfigError).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from smidgen.config import ConfigError


@contextlib.contextmanager
def as_they_come(tensors: Mapping[str, Tensor], take: Callable[[str, Tensor], None]) -> Iterator[set[str]]:
    """Inside this context `take(name, gradient)` is called for each tensor when its gradient is complete; then the gradient
    is let go. Gives the names of those that came. Raises ConfigError where a tensor gets a second one."""
    seen: set[str] = set()

    def hook(name: str, tensor: Tensor) -> None:
        gradient, tensor.grad = tensor.grad, None
        if gradient is None:  # its layer compresses it
            return
        if name in seen:
            raise ConfigError(
                f"{name} has a second gradient in one fused step, whose first is used up: give all rows to one backward "
                "pass, or set fused=false"
            )
        seen.add(name)
        take(name, gradient)

    handles = [
        t.register_post_accumulate_grad_hook(functools.partial(hook, name)) for name, t in tensors.items() if t.requires_grad
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def refuse_accumulation(objective: Any) -> None:
    """Raise ConfigError where a step's gradient is a sum over micro-batches."""
    count = len(getattr(objective, "batches", ()))
    if count > 1:
        raise ConfigError(
            f"fused=true writes each weight when its gradient is there, and this step has {count} micro-batches, whose "
            "gradients would have to be added first: set train.gradient_accumulation_steps=1, or fused=false"
        )


def same_draws(tensors: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[None]:
    """A context after which torch's generators stand where they stood: a pass that is made twice sees the same dropout."""
    devices = sorted({t.device.index or 0 for t in tensors.values() if t.device.type == "cuda"})
    return torch.random.fork_rng(devices=devices)  # type: ignore[no-any-return]
