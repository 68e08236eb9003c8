"""Streaming: rows of one source that are read while they are needed, through `datasets`; local files and hub ids alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from smidgen.config import ConfigError
from smidgen.rows import canonical_split, stream_splits
from smidgen.tasks import Row

__all__ = ["Streaming"]

BUFFER = 10_000  # rows that a shuffle draws from; chosen: `datasets` shuffles shards as well


@dataclass
class Streaming:
    """The splits of one source. `rows` begins anew at each call; a pass of training rows is shuffled by seed and number."""

    source: str
    seed: int
    _found: dict[str, Any] = field(default_factory=dict)

    def has(self, split: str) -> bool:
        """Whether the source has this split."""
        return canonical_split(split) in self._splits()

    def rows(self, split: str, limit: int | None = None, epoch: int | None = None) -> Iterator[Row]:
        """Rows of a split in order, at most `limit`; with `epoch` shuffled. Raises ConfigError where there is no such split."""
        split = canonical_split(split)
        if split not in self._splits():
            raise ConfigError(
                f"streaming: '{self.source}' has no {split} split, and rows not yet read cannot be held out: give "
                "eval_data, or leave streaming out"
            )
        rows = self._splits()[split]
        if limit is not None:
            rows = rows.take(limit)
        if epoch is not None:
            rows = rows.shuffle(seed=self.seed % 2**32, buffer_size=BUFFER)
            rows.set_epoch(epoch)
        for number, record in enumerate(islice(rows, limit), 1):
            yield Row(record, f"{self.source} {split} row {number}")

    def _splits(self) -> dict[str, Any]:
        if not self._found:
            self._found = stream_splits(self.source)
        return self._found
