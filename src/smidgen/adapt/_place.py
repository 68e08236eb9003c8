"""Where a causal model sees virtual tokens: before the row or inside it, and how many of them.

PEFT puts m virtual tokens before every row. What a causal model computes depends on positions and on who sees whom, not on the
order in memory: so they stay in front, and a token after n real ones, with positions p and mask

    p(token i) = i + m [i >= n],  p(virtual j) = n + j,  a sees b iff p(b) <= p(a) and b is no padding

gives what a row with the virtual tokens after its n-th token gives (a test compares). The first k of them are used, the others
are masked and take no position. Positions count real tokens only, so padding at the left changes nothing.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.config import ConfigError


@dataclass(frozen=True)
class Place:
    """tokens: virtual tokens m. position: n >= 0: after the row's first n tokens; n < 0: before its last -n. count: how many of
    the first virtual tokens are used now; None: all."""

    tokens: int = 0
    position: int = 0
    count: Callable[[], int] | None = None


def seen(base: nn.Module, place: Place) -> None:
    """Let a causal model see its virtual tokens where `place` says, and count positions wherever it is given none."""
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return
    # PEFT says, for every batch, that it drops the positions which the hook below puts back
    warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")

    def before(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = given.get("attention_mask")
        row = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if given.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.ndim != 2 or row is None:
            return args, given
        m = place.tokens
        if m and place.count is not None:
            mask = mask.clone()
            mask[:, place.count() : m] = 0
            given["attention_mask"] = mask
        positions = (mask.long().cumsum(1) - 1).clamp_(min=0)
        if m and place.position and row.shape[1] == mask.shape[1]:  # later tokens of a generation see everything before them
            positions = _inside(mask, m, place.position)
            given["attention_mask"] = _sees(mask, positions, row.dtype)
        given["position_ids"] = positions[:, -row.shape[1] :]
        return args, given

    base.register_forward_pre_hook(before, with_kwargs=True)


def try_inside(model: Any, matrix: Tensor, m: int) -> None:
    """Raise ConfigError where `model`, PEFT's, masks attention by the order in memory (GPT-Neo): compares virtual tokens at
    position 1 with a row that holds them there."""
    base = model.get_base_model()
    embedding = base.get_input_embeddings()
    ids = torch.arange(3, 6, device=matrix.device)[None] % embedding.weight.shape[0]
    place, saved = Place(m, 1), matrix.detach().clone()
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            scale = float(embedding(ids).float().std()) / max(float(matrix.float().std()), 1e-6)
            matrix.data.mul_(scale)  # as large as what they stand among, so that a difference shows
            e, row = embedding(ids), matrix.detach()[None].to(embedding.weight.dtype)
            mask = torch.ones(1, m + 3, dtype=torch.long, device=ids.device)
            positions = _inside(mask, m, place.position)
            memory = {"inputs_embeds": torch.cat([row, e], 1), "attention_mask": _sees(mask, positions, e.dtype)}
            mine = base(**memory, position_ids=positions).logits[:, -2:].float()
            order = torch.arange(m + 3, device=ids.device)[None]
            held = torch.cat([e[:, :1], row, e[:, 1:]], 1)
            theirs = base(inputs_embeds=held, attention_mask=mask, position_ids=order).logits[:, -2:].float()
    finally:
        matrix.data.copy_(saved)
        model.train(mode)
    half = embedding.weight.element_size() == 2
    if not torch.allclose(mine, theirs, rtol=0, atol=(0.05 if half else 1e-4) * float(theirs.std())):
        raise ConfigError(
            f"{type(base).__name__} masks attention by the order in memory, so virtual tokens cannot stand inside its rows: "
            "leave position out of scheme_args"
        )


def _inside(mask: Tensor, m: int, position: int) -> Tensor:
    """Positions [B, m + T] of virtual tokens that stand inside the rows."""
    virtual, real = mask[:, :m].long(), mask[:, m:].long()
    length, used = real.sum(1, keepdim=True), virtual.sum(1, keepdim=True)
    n = (length + position if position < 0 else torch.full_like(length, position)).clamp(min=0).minimum(length)
    order = (real.cumsum(1) - 1).clamp(min=0)
    return torch.cat([n + (virtual.cumsum(1) - 1).clamp(min=0), order + used * (order >= n)], 1)


def _sees(mask: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, [B, 1, m + T, m + T]: zero where a sees b, else the lowest number.

    Padding sees itself, so that no row of the softmax is empty.
    """
    allowed = (positions[:, None, :] <= positions[:, :, None]) & mask[:, None, :].bool()
    allowed |= torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return torch.zeros(allowed.shape, dtype=dtype, device=mask.device).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
