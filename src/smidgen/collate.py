"""Collator: encoded rows -> a batch of padded tensors. `torch` is imported on use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smidgen.drafts import IGNORED

if TYPE_CHECKING:
    import torch

__all__ = ["Collator"]


@dataclass(frozen=True)
class Collator:
    """Rows -> batch of int64 tensors: input_ids, attention_mask [B, T], labels [B, T] or [B] for classification.

    Pads at the left for 'causal', so that answers end at one position, else at the right. choices: token ids that the
    batch carries along, [C]. position_ids: count positions from the first real token; needed by models that number
    positions by place (GPT-2, GPT-Neo); ignored for other kinds, which are padded at the right. criterion: what the batch
    says of how its choices or classes are compared, see `smidgen.loss.criterion_loss`.

    Examples with several options (`smidgen.questions.Candidates`) are stacked, one row an option, R rows of E examples:
    groups [R] is the example of a row, golds [E] the row of the right option, accepted [R] whether an option counts as
    right, divisors [R] what a row's log-likelihood is divided by: its labels (scoring 'mean') or 1 ('sum').
    Pairs of a preference (`smidgen.pairs.Pairs`) bring divisors of their own, and references [R] float64.
    The accepted texts of a question that is answered by generation stay a list of tuples, `answers`.

    Packed rows (`smidgen.packing.Packs`) have position_ids that start again with each of their rows, and `real` [B, T]
    instead of an attention mask of that shape. apart says how their rows are kept from each other: 'mask', attention_mask
    [B, 1, T, T] of dtype `mask_dtype`, added to attention scores; 'positions', by position_ids alone.
    """

    pad_id: int
    kind: str
    choices: tuple[int, ...] | None = None
    position_ids: bool = False
    scoring: str = "mean"
    apart: str = "mask"
    mask_dtype: Any = None
    criterion: str | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if "options" in rows[0]:
            return self._stacked(rows)
        if "lengths" in rows[0]:
            return self._packed(rows)
        batch: dict[str, Any] = self._padded(rows)
        if self.criterion is not None:
            batch["criterion"] = self.criterion
        if "answers" in rows[0]:
            batch["answers"] = [tuple(row["answers"]) for row in rows]
        return batch

    def _stacked(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        options = [option for row in rows for option in row["options"]]
        firsts = [0]
        for row in rows:
            firsts.append(firsts[-1] + len(row["options"]))
        accepted = [k in row["right"] for row in rows for k in range(len(row["options"]))]
        labels = [sum(label != IGNORED for label in option["labels"]) for option in options]
        divisors: list[float] = [*labels] if self.scoring == "mean" else [1] * len(options)
        more = {}
        if "divisor" in rows[0]:
            divisors = [row["divisor"] for row in rows for _ in row["options"]]
        if "references" in rows[0]:
            more["references"] = torch.tensor([value for row in rows for value in row["references"]], dtype=torch.float64)
        return {
            **self._padded(options),
            **more,
            "groups": torch.tensor([e for e, row in enumerate(rows) for _ in row["options"]]),
            "golds": torch.tensor([first + row["gold"] for first, row in zip(firsts, rows, strict=False)]),
            "accepted": torch.tensor(accepted),
            "divisors": torch.tensor(divisors, dtype=torch.float32),
        }

    def _packed(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Several rows in one; padding stands at the right, as a row of its own."""
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        lengths = [[*row["lengths"], *filter(None, [width - len(row["input_ids"])])] for row in rows]
        batch = {
            "input_ids": torch.tensor([row["input_ids"] + [self.pad_id] * (width - len(row["input_ids"])) for row in rows]),
            "labels": torch.tensor([row["labels"] + [IGNORED] * (width - len(row["labels"])) for row in rows]),
            "real": torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]),
            "position_ids": torch.tensor([[k for length in row for k in range(length)] for row in lengths]),
        }
        if self.apart == "mask":
            of = torch.tensor([[k for k, length in enumerate(row) for _ in range(length)] for row in lengths])
            seen = (of[:, :, None] == of[:, None, :]) & torch.ones(width, width, dtype=torch.bool).tril()
            dtype = self.mask_dtype or torch.float32
            batch["attention_mask"] = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
        return batch

    def _padded(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        mask = [[1] * len(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": self._pad([row["input_ids"] for row in rows], width, self.pad_id),
            "attention_mask": self._pad(mask, width, 0),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self._pad([row["token_type_ids"] for row in rows], width, 0)
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            if self.kind == "classification":
                batch["labels"] = torch.tensor(labels)
            else:
                batch["labels"] = self._pad(labels, max(len(row) for row in labels), IGNORED)
        if self.position_ids and self.kind == "causal":
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_(min=0)
        if self.choices is not None:
            batch["choices"] = torch.tensor(self.choices)
        return batch

    def _pad(self, rows: Sequence[Sequence[int]], width: int, value: int) -> torch.Tensor:
        import torch

        if self.kind == "causal":
            return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows])
        return torch.tensor([list(row) + [value] * (width - len(row)) for row in rows])
