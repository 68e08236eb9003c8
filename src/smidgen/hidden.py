"""How large hidden states are: for every tuned tensor, the deviation of what enters the layer that it belongs to.

Source: the public code of DFO-LoRA: hidden states of the training batch at theta are clipped five times to mean +- 3
deviations, both taken again each time; the deviation that is left counts. The first layer, and what belongs to no layer,
gets the deviation of the input embeddings, unclipped. Ours: padding does not count, and several micro-batches
are averaged in their squares, weighted by tokens.

Cost: one forward a micro-batch; one copy of the hidden states that enter one layer. Theta is not touched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.config import ConfigError
from smidgen.probing import Batch, Engine
from smidgen.reuse import stacks

_CLIPS, _REACH = 5, 3.0  # as published


def clipped_std(x: Tensor) -> float:
    """The deviation of all values after clipping them five times to mean +- 3 deviations.

    >>> clipped_std(torch.tensor([0.0] * 50 + [1.0] * 50 + [1e6])) < 1e6
    True
    """
    x = x.float().flatten()
    for _ in range(_CLIPS):
        mean, reach = x.mean(), _REACH * x.std()
        x = x.clamp(mean - reach, mean + reach)
    return float(x.std())


def hidden_squares(engine: Engine, batches: Sequence[Batch], names: Iterable[str]) -> Tensor:
    """(sum over tokens of the squared deviation of each name, tokens), float64 [names + 1]: what ranks exchange.

    Raises ConfigError where hidden states are not finite.
    """
    layers = [(stack, i) for stack in stacks(engine.model) for i in range(1, len(stack))]
    sums = [0.0] * len(layers)
    masks: list[Tensor | None] = [None]
    tokens = 0
    handles = []

    def count(at: int, _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        x, mask = (args[0] if args else given["hidden_states"]).detach(), masks[0]
        if mask is not None and mask.shape == x.shape[:-1]:
            x = x[mask.bool()]
        sums[at] += clipped_std(x) ** 2 * weight

    for batch in batches:
        engine.prepare(batch)  # the self-check's own evaluations would be counted
    try:
        for at, (stack, i) in enumerate(layers):
            handles.append(stack[i].register_forward_pre_hook(functools.partial(count, at), with_kwargs=True))
        for batch in batches:
            masks[0] = batch.get("attention_mask")
            weight = int(masks[0].sum()) if masks[0] is not None else batch["labels"].numel()
            tokens += weight
            engine.losses(batch)
    finally:
        for handle in handles:
            handle.remove()
    inside = {id(m): at for at, (stack, i) in enumerate(layers) for m in stack[i].modules()}
    embedding = float(engine.model.get_input_embeddings().weight.detach().float().std()) ** 2 * tokens  # type: ignore[operator]
    found = []
    for name in names:
        where = [inside[id(module)] for module, _ in engine.view[name].sites if id(module) in inside]
        found.append(sums[where[0]] if where else embedding)
    if not all(map(math.isfinite, found)):
        raise ConfigError("hidden states of the training batch are not finite, so maps cannot be scaled by them: init=random")
    return torch.tensor([*found, tokens], dtype=torch.float64)


def stds(squares: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Deviations by name from `hidden_squares`, added up over ranks."""
    return dict(zip(names, (squares[:-1] / squares[-1]).sqrt().tolist(), strict=True))
