"""Asked: prompts that a step lets the model answer, and what the base model, before the first step, answers to them.

How far theta has gone from the base is how much less likely these answers have become: the base's weights need not be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smidgen.collate import Collator
from smidgen.drafts import IGNORED
from smidgen.generation import Answerer, answer_all
from smidgen.loss import Losses
from smidgen.probing import Batch, Engine
from smidgen.questions import Prompts
from smidgen.scoring import in_batches, on_device


class Asked:
    """Prompts of a step, and what the base model answers to them: list-like, the rows of `AskedCollator`."""

    def __init__(self, prompts: Prompts):
        self.prompts = prompts
        self.base: dict[int, tuple[Any, float]] = {}  # by prompt: the row of the base's answer, its loss in nats a token

    def answer(self, engine: Engine, answerer: Answerer, collator: Collator, batch_size: int) -> None:
        """Let the base, the model as it is now, answer all prompts. Cost: a generation and a forward of each."""
        rows = {}
        for k, text in enumerate(answer_all(engine, answerer, self.prompts, batch_size)):
            ids, tokens = self.prompts[k]["input_ids"], answerer.tokenizer(text, add_special_tokens=False)["input_ids"]
            if tokens and answerer.kind == "causal":
                rows[k] = {"input_ids": ids + tokens, "labels": [IGNORED] * len(ids) + tokens}
            elif tokens:
                rows[k] = {"input_ids": ids, "labels": tokens}
        lengths = [len(rows[k]["input_ids"]) if k in rows else 0 for k in range(len(self))]
        for chosen in in_batches(list(rows), lengths, batch_size):
            found = per_token(engine.losses(on_device(collator([rows[k] for k in chosen]), engine)))
            self.base |= {k: (rows[k], loss) for k, loss in zip(chosen, found.tolist(), strict=True)}

    @property
    def max_length(self) -> int:
        """Tokens of a prompt, at most."""
        return self.prompts.max_length

    @property
    def notices(self) -> list[str]:
        """What was cut."""
        return self.prompts.notices

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        return self.prompts[position] | ({"base": self.base[position]} if position in self.base else {})


@dataclass(frozen=True)
class AskedCollator:
    """Rows of `Asked` -> a batch of prompts with their texts and, where there are any, the base's answers as a batch of
    their own: base, base_rows [n] (the rows they answer) and base_nll [n]."""

    plain: Collator

    def __call__(self, rows: Sequence[Any]) -> Batch:
        batch: Batch = self.plain([{k: row[k] for k in ("input_ids", "answers")} for row in rows])
        batch["prompts"] = [row["prompt"] for row in rows]
        if known := [k for k, row in enumerate(rows) if "base" in row]:
            batch["base"] = self.plain([rows[k]["base"][0] for k in known])
            batch["base_rows"] = torch.tensor(known)
            batch["base_nll"] = torch.tensor([rows[k]["base"][1] for k in known], dtype=torch.float64)
        return batch


def per_token(losses: Losses) -> Tensor:
    """Mean loss of each row's labels, float64 [rows] on the CPU."""
    zero, rows = torch.zeros(losses.size, dtype=torch.float64), losses.rows.cpu()
    total = zero.index_add(0, rows, losses.nll.double().cpu())
    return total / torch.bincount(rows, minlength=losses.size).clamp(min=1)
