"""Losses with noise on the outputs of linear layers, one vector an example, and the inputs that those layers got.

    y = W x + b + s v_n,  s = 1, -1    at every token x of example n;    X_n = mean over s of sum_tokens x

Two forwards a micro-batch. Held: X, 4 bytes for each example and input of a layer. Padding is left out of X. A layer whose rows
are not those of the batch (routed experts) raises ConfigError. Theta is not touched. The definition, one example after
the other with its bias displaced, is in the tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.config import ConfigError
from smidgen.inputs import is_linear, masked_modules
from smidgen.loss import Losses
from smidgen.per_example import Span, examples_of, owners
from smidgen.probing import Batch, Engine

Draw = Callable[[str, int, int], Tensor]  # tensor, example, of how many: the noise v on its layer's outputs, [O]
Answer = tuple[list[Losses], dict[str, Tensor]]  # losses at s = 1 and -1; X of each linear weight, [examples, D] float32


def perturbed(engine: Engine, batch: Batch, names: Sequence[str], draw: Draw, span: Span) -> Answer:
    """The answer for one micro-batch, whose examples are `span` of the step's. Names that are no linear weight are left out."""
    engine.prepare(batch)  # the self-check's own evaluations would be counted
    count, inside = examples_of(batch), masked_modules(engine)
    of, mask = owners(batch), batch.get("real", batch.get("attention_mask"))
    inputs: dict[str, Tensor] = {}
    layers: list[tuple[nn.Module, Tensor, Tensor, Tensor | None]] = []
    for name in names:
        entry = engine.view[name]
        if not is_linear(entry, engine.head):
            continue
        own = torch.stack([draw(name, span.first + n, span.total) for n in range(count)])
        place = of.to(own.device)
        for module, _ in entry.sites:
            axis = 1 if isinstance(module, nn.Linear) else 0
            X = inputs.setdefault(name, torch.zeros(count, entry.tensor.shape[axis], device=own.device))
            layers.append((module, own[place], X, mask if inside is None or id(module) in inside else None))
    found = []
    for sign in (1.0, -1.0):
        with _noisy(layers, of, sign):
            found.append(engine.losses(batch))
    return found, inputs


@contextmanager
def _noisy(layers: Sequence[Any], of: Tensor, sign: float) -> Iterator[None]:
    handles = []
    try:
        for module, noise, X, mask in layers:
            handles.append(module.register_forward_hook(functools.partial(_add, noise, X, mask, of, sign)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(
    noise: Tensor, X: Tensor, mask: Tensor | None, of: Tensor, sign: float, module: nn.Module, args: tuple[Any, ...], y: Tensor
) -> Tensor:
    rows, x = len(noise), args[0].detach()
    if y.shape[0] % rows:
        raise ConfigError(
            f"{type(module).__name__} {tuple(y.shape)} does not see the batch's {rows} rows in order: take credit=vectors"
        )
    x = x.reshape(rows, -1, x.shape[-1]).float()
    if mask is not None and x.shape[:2] == mask.shape:
        x = x * mask[:, :, None]
    X.index_add_(0, of.to(X.device), x.sum(1), alpha=0.5)
    return (y.view(rows, -1, y.shape[-1]) + (sign * noise[:, None]).to(y.dtype)).view(y.shape)
