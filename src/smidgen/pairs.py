"""Pairs: preferred and rejected answers as a trainer's rows, their reference log-likelihoods, and how they are measured.

A pair is two rows of one example whose scores are compared: `beta (log pi(y|x) - log pi_ref(y|x))` (`smidgen.loss`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from smidgen.chat import Chat
from smidgen.collate import Collator
from smidgen.config import DataError
from smidgen.directions import Probe
from smidgen.encode import Encoded, encode
from smidgen.params import ParamView
from smidgen.probing import Batch, Engine
from smidgen.scoring import Sums, in_batches, on_device, row_sums
from smidgen.tasks import Pair

__all__ = ["PairEvaluation", "Pairs", "refer"]


class Pairs:
    """Pairs, list-like: [i] is {"options": two rows, the preferred one first, "gold": 0, ...} with references and 1/beta.

    references [2 n] float64: reference log-likelihoods, set by `refer`; until then a row has none.
    Raises DataError where no pair has room for both its answers.
    """

    def __init__(
        self, pairs: Sequence[Any], tokenizer: Any, kind: str, max_length: int | None, *, beta: float, context: int | None
    ):
        ends: list[Chat] = [end for pair in pairs if isinstance(pair, Pair) for end in (pair.chosen, pair.rejected)]
        assert len(ends) == 2 * len(pairs)
        self.encoded: Encoded = encode(ends, tokenizer, kind, max_length, context=context)
        self.beta = beta
        self.references: list[float] | None = None
        where = {index: position for position, index in enumerate(self.encoded.index)}
        self.rows = [(where[2 * i], where[2 * i + 1]) for i in range(len(pairs)) if 2 * i in where and 2 * i + 1 in where]
        self.notices = [line.replace("rows:", "answers of pairs:") for line in self.encoded.notices]
        if not self.rows:
            raise DataError(
                f"none of the {len(pairs)} pairs has room for both its answers in {self.max_length} tokens: raise max_length"
            )
        if len(self.rows) < len(pairs):
            self.notices.append(
                f"{len(pairs) - len(self.rows)} of {len(pairs)} pairs without room for both answers are left out"
            )

    @property
    def max_length(self) -> int:
        """Tokens of a row, at most."""
        return self.encoded.max_length

    @property
    def lengths(self) -> list[int]:
        """Tokens of the longer row of each pair."""
        lengths = self.encoded.lengths
        return [max(lengths[a], lengths[b]) for a, b in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        ends = self.rows[position]
        row = {"options": [self.encoded[k] for k in ends], "gold": 0, "right": frozenset({0}), "divisor": 1 / self.beta}
        if self.references is not None:
            row["references"] = [self.references[k] for k in ends]
        return row


class PairEvaluation:
    """A split of pairs. Calling it gives its measures at theta + probe; cost: one forward of both ends of all pairs.

    loss: of direct preference optimisation. accuracy: share of pairs whose preferred answer gained more over the reference
    than the rejected one, ties half: 0.5 at the reference itself. margin: mean of beta times that difference.
    likelihood_accuracy: share of pairs whose preferred answer is the likelier one, the reference left out.
    """

    def __init__(self, rows: Pairs, collator: Collator, batch_size: int):
        self.rows, self.collator, self.batch_size = rows, collator, batch_size

    def __call__(self, engine: Engine, probe: Probe = ()) -> dict[str, float]:
        assert self.rows.references is not None, "refer() was not called"
        found = _sums(self.rows, self.collator, self.batch_size, engine, probe)
        reference = torch.tensor(self.rows.references, dtype=torch.float64)
        chosen, rejected = torch.tensor(self.rows.rows).unbind(1)
        gained = -found.nll - reference
        margins = self.rows.beta * (gained[chosen] - gained[rejected])
        likelier = found.nll[rejected] - found.nll[chosen]
        return {
            "loss": float(torch.nn.functional.softplus(-margins).mean()),
            "accuracy": _share(margins),
            "margin": float(margins.mean()),
            "likelihood_accuracy": _share(likelier),
        }

    def refer(self, model: torch.nn.Module, view: ParamView, kind: Any) -> None:
        """`refer`, with the batches of an evaluation."""
        refer(self.rows, model, view, kind, self.collator, self.batch_size)


def refer(pairs: Pairs, model: torch.nn.Module, view: ParamView, kind: Any, collator: Collator, batch_size: int) -> None:
    """Set the reference log-likelihoods of pairs to a model's present ones, its PEFT adapter off. Cost: one forward of
    both ends of all pairs; 8 bytes an end."""
    off = model.disable_adapter() if hasattr(model, "peft_config") else contextlib.nullcontext()  # type: ignore[operator]
    with off:
        found = _sums(pairs, collator, batch_size, Engine(model, view, kind), ())
    pairs.references = (-found.nll).tolist()


def _sums(pairs: Pairs, collator: Collator, batch_size: int, engine: Engine, probe: Probe) -> Sums:
    """Sums of both ends of all pairs, in the order of `pairs.encoded`; rows outside pairs stay 0."""
    count = len(pairs.encoded)
    found = Sums(torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64))
    members = [k for ends in pairs.rows for k in ends]
    for chosen in in_batches(members, pairs.encoded.lengths, batch_size):
        batch: Batch = on_device(collator([pairs.encoded[k] for k in chosen]), engine)
        found.nll[chosen], found.tokens[chosen] = row_sums(engine, batch, probe)
    return found


def _share(differences: torch.Tensor) -> float:
    """Share of positive values, zeros half; NaN where one is."""
    return float(((differences.sign() + 1) / 2).mean())
