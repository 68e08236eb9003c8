"""Tasks whose rows each ask a question of their own: with options of their own, or answered in free text.

There are no label words, so a masked model and a sequence classifier are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from smidgen.config import ConfigError, DataError
from smidgen.tasks._answers import measures
from smidgen.tasks._example import Example, Reader, Row, read_folder
from smidgen.tasks._labelled import accuracy

__all__ = ["AskedTask"]


@dataclass
class AskedTask:
    """A Task of questions. ask: a row as an Example; free: whether its answer is generated, rather than chosen."""

    name: str
    source: str
    ask: Callable[[Row], Example]
    free: bool
    read: Reader = read_folder
    choice: bool = False  # trained by the likelihood of the right answer
    judged: bool = True

    @property
    def words(self) -> None:
        """None: the answers are not the same in all rows."""
        return None

    def examples(self, split: str, kind: str = "causal") -> list[Example]:
        """Every row of a split as an Example. Raises ConfigError: a kind that cannot answer; DataError: a bad row."""
        if kind in ("masked", "classification"):
            told = {"masked": "prompt for a masked model", "classification": "classes for a sequence classifier"}[kind]
            raise ConfigError(f"task '{self.name}' has no {told}: use a causal or seq2seq model")
        rows = self.read(self.source, split)
        if not rows:
            raise DataError(f"'{self.source}' has no rows in its {split} split")
        return [self.ask(row) for row in rows]

    def metric(self, predictions: Sequence[Any], golds: Sequence[Any]) -> dict[str, float]:
        """Accuracy of chosen options (indices); F1 and exact match, means over questions, of generated texts."""
        return measures(predictions, golds) if self.free else {"accuracy": accuracy(predictions, golds)}
