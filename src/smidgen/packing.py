"""Packing: several encoded rows of a causal model in one, which do not see each other.

Positions start again with each row and attention is block-diagonal, so the loss of a packed row is that of its rows alone, in
another order of the same sums: 1e-5 nats a token in float32. Models differ in how they take a block-diagonal mask, so the first
packed rows are compared with their rows alone before a run: with a mask, else by positions alone (which transformers turns
into its own mask, also for sliding windows); a model that gives another loss either way is refused.

Rows are placed best-fit-decreasing (Johnson 1973), as trl's packing `bfd`; trl's collator is not used, since its
padding-free batches need flash attention, and its packing cuts rows. Does not do: encoder-decoder models, virtual tokens.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from smidgen.collate import Collator
from smidgen.config import ConfigError, notice
from smidgen.encode import LENGTH_MOST, Encoded
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.scoring import on_device

__all__ = ["Packs", "kept_apart", "pack", "pack_length"]

_TOLERANCE = 2e-4  # nats of a token between packed and alone in float32; chosen, twenty times what rounding makes
_TOLERANCE_16 = 0.1  # the same with 16-bit weights; chosen


def pack_length(max_length: int | None, context: int | None) -> int:
    """Tokens of a packed row: what was asked for, else the model's context, at most 1024."""
    return max_length or min(context or LENGTH_MOST, LENGTH_MOST)


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Members of packs of at most `size`, best fit decreasing: the longest first, each where it leaves least room.

    The same for equal lengths; members and packs in the order of the rows. Cost: n log n.
    """
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (room, pack), sorted
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(open_packs, (lengths[row], -1))
        room, chosen = open_packs.pop(place) if place < len(open_packs) else (size, len(packs))
        if chosen == len(packs):
            packs.append([])
        packs[chosen].append(row)
        bisect.insort(open_packs, (room - lengths[row], chosen))
    return sorted(sorted(members) for members in packs)


class Packs:
    """Encoded rows in packs, list-like: [i] is {"input_ids", "labels", "lengths": tokens of each row in it}."""

    def __init__(self, rows: Encoded):
        self.rows = rows
        self.members = pack(rows.lengths, rows.max_length)
        self.max_length = rows.max_length
        share = sum(rows.lengths) / (len(self.members) * rows.max_length)
        self.notices = [*rows.notices, f"{len(rows)} rows in {len(self.members)} of {rows.max_length} tokens, {share:.0%} full"]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        rows = [self.rows[k] for k in self.members[position]]
        ids, labels = ([token for row in rows for token in row[key]] for key in ("input_ids", "labels"))
        return {"input_ids": ids, "labels": labels, "lengths": [len(row["input_ids"]) for row in rows]}


def kept_apart(packs: Packs, collator: Collator, model: nn.Module, view: ParamView) -> Collator:
    """The collator with which packed rows of a model do not see each other.

    Compares two packs, that with the longest row and that with most rows, with their rows alone. Cost: at most six forwards.
    Raises ConfigError where the losses differ.
    """
    lengths = packs.rows.lengths
    longest = max(range(len(packs)), key=lambda i: max(lengths[k] for k in packs.members[i]))
    fullest = max(range(len(packs)), key=lambda i: len(packs.members[i]))
    tried = sorted({longest, fullest})
    engine = Engine(model, view, "causal")
    device = next(model.parameters()).device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    tolerance = _TOLERANCE if dtype == torch.float32 else _TOLERANCE_16
    alone = [_nll(engine, collator, [packs.rows[k] for k in packs.members[i]]) for i in tried]
    reasons = []
    for apart in ("mask", "positions"):
        found = dataclasses.replace(collator, apart=apart, mask_dtype=dtype)
        try:
            gap = max(float((_nll(engine, found, [packs[i]]) - a).abs().max()) for i, a in zip(tried, alone, strict=True))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            reasons.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}")
            continue
        if gap <= tolerance:
            if apart == "positions":
                notice(f"packed rows are kept apart by their positions, not by a mask ({reasons[0]})")
            return found
        reasons.append(f"losses differ by {gap:.2g} nats a token")
    raise ConfigError(
        f"packing: rows of a pack see each other in this model ({type(model).__name__} on {device.type}; with a mask: "
        f"{reasons[0]}; by positions: {reasons[1]}): leave packing out"
    )


def _nll(engine: Engine, collator: Collator, rows: Sequence[Any]) -> torch.Tensor:
    """Losses of the labels of some rows, row after row, float64."""
    found = [engine.losses(on_device(collator([row]), engine)).nll.double().cpu() for row in rows]
    return torch.cat(found)
