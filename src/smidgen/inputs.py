"""What reaches the linear layers of a model: for every weight, the sum of squares of each of its inputs over the data.

For W with y = W x this is s_j = sum over tokens of x_j^2, the square of ||x_j||_2 in Wanda (Sun et al., "A Simple and
Effective Pruning Approach for Large Language Models", 2023, arXiv 2306.11695, eq. 1). A linear weight is one that only
torch.nn.Linear modules, or only transformers' Conv1D (W stored transposed, [in, out]), hold, and not as the output head:
that one is used at label positions only. A tied embedding is none.

Cost: one forward a micro-batch, and a float64 vector for each weight. Padding does not count, except in the decoder of an
encoder-decoder model, whose batches carry no mask for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smidgen.params import Entry
from smidgen.probing import Batch, Engine


def input_squares(
    engine: Engine, batches: Sequence[Batch], names: Iterable[str], onto: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Sums of squares by name, float64, [1, in] for a weight [out, in] and [in, 1] for a weight [in, out].

    With `onto`, a matrix [in, k] for each name, the sums over tokens of x (x^T onto) instead, [in, k]: X^T X seen through it;
    Conv1D's are then left out, too. Names that are no linear weight are left out. Theta is not touched.
    """
    for batch in batches:
        engine.prepare(batch)  # the self-check's own evaluations would be counted
    sums: dict[str, Tensor] = {}
    masks: list[Tensor | None] = [None]  # of the batch at work
    inside = masked_modules(engine)
    handles = []
    try:
        for name in names:
            entry = engine.view[name]
            axis = 1 if isinstance(entry.sites[0][0], nn.Linear) else 0
            if not is_linear(entry, engine.head) or (onto is not None and not axis):
                continue
            through = None if onto is None else onto[name]
            shape = entry.tensor.shape[axis : axis + 1] if through is None else through.shape
            sums[name] = torch.zeros(shape, dtype=torch.float64, device=entry.tensor.device)
            for module, _ in entry.sites:
                seen: list[Tensor | None] = masks if inside is None or id(module) in inside else [None]
                count = functools.partial(_count, sums[name], through, seen)
                handles.append(module.register_forward_pre_hook(count))
            if through is None:
                sums[name] = sums[name].unsqueeze(1 - axis)
        for batch in batches:
            masks[0] = batch.get("real", batch.get("attention_mask"))
            engine.losses(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.cpu() for name, total in sums.items()}


def _count(total: Tensor, onto: Tensor | None, masks: list[Tensor | None], _: nn.Module, inputs: tuple[Any, ...]) -> None:
    shape, mask = inputs[0].shape, masks[0]
    x = inputs[0].detach().reshape(-1, shape[-1])
    # Some models hand over rows of tokens, others (OPT) all tokens in one row.
    if mask is not None and shape[:-1] in (mask.shape, (mask.numel(),)):
        x = x[mask.flatten().bool()]
    x = x.float()
    total += x.square().sum(0, dtype=torch.float64) if onto is None else x.T @ (x @ onto)


def is_linear(entry: Entry, head: nn.Module | None) -> bool:
    """Whether a tensor is the weight of linear layers, all of a kind and none of them the output head."""
    owners = [module for module, attribute in entry.sites if attribute == "weight"]
    if len(owners) < len(entry.sites) or any(module is head for module in owners) or entry.tensor.ndim != 2:
        return False
    return all(isinstance(m, nn.Linear) for m in owners) or all(isinstance(m, Conv1D) for m in owners)


def masked_modules(engine: Engine) -> set[int] | None:
    """Ids of the modules that a batch's attention mask speaks of; None: all."""
    if engine.kind != "seq2seq":
        return None
    encoder = engine.model.get_encoder()  # type: ignore[operator]
    return {id(module) for module in encoder.modules()}
