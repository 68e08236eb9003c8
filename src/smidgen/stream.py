"""Text streams for pre-training: documents one after another, an end token behind each, cut into rows of equal length.

Every token but a row's first carries loss, and sees all before it in its row, also those of earlier documents (rows of
`smidgen.packing` see only themselves). `TextRows` holds all tokens, 4 bytes each; `TextStream` reads and tokenises while a run
goes, as often through its source as it needs. What does not fill the last row is left out.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from smidgen.config import ConfigError, DataError

__all__ = ["TextRows", "TextStream", "blocks"]

_TOGETHER = 256  # documents that are tokenised at a time; chosen


def blocks(texts: Iterable[str], tokenizer: Any, length: int) -> Iterator[array[int]]:
    """Rows of `length` token ids. Raises ConfigError for a tokenizer without an end token."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError(
            "a text stream ends each document with the tokenizer's end token, and this one has none: set eos_token"
        )
    waiting: array[int] = array("i")
    documents = iter(texts)
    while group := list(itertools.islice(documents, _TOGETHER)):
        for ids in tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]:
            waiting.extend(ids)
            waiting.append(end)
        whole = len(waiting) - len(waiting) % length
        for first in range(0, whole, length):
            yield waiting[first : first + length]
        waiting = waiting[whole:]


def _row(ids: array[int]) -> dict[str, list[int]]:
    return {"input_ids": list(ids), "labels": list(ids)}


class TextRows:
    """A text stream in memory, list-like: [i] is {"input_ids", "labels"}. The same attributes as `smidgen.encode.Encoded`."""

    kind = "causal"
    choices = None

    def __init__(self, texts: Iterable[str], tokenizer: Any, length: int):
        self.max_length = length
        texts = list(texts)
        self._rows = list(blocks(texts, tokenizer, length))
        if not self._rows:
            raise DataError(f"the text fills no row of {length} tokens: give more of it, or a smaller max_length")
        self.index = list(range(len(self._rows)))
        self.lengths = [length] * len(self._rows)
        self.notices = [f"{len(texts)} documents in {len(self._rows)} rows of {length} tokens"]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [_row(ids) for ids in self._rows[position]]
        return _row(self._rows[position])


class TextStream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """A text stream that is read while the run goes, without end: after its last document it begins again, in another order.

    texts(epoch) gives the documents of a pass. Trainer goes on in the middle by reading again what was used.
    """

    def __init__(self, texts: Any, tokenizer: Any, length: int):
        self.texts, self.tokenizer, self.max_length = texts, tokenizer, length
        self.notices: list[str] = []

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for epoch in itertools.count():
            empty = True
            for ids in blocks(self.texts(epoch), self.tokenizer, self.max_length):
                empty = False
                yield _row(ids)
            if empty:
                raise DataError(f"the text fills no row of {self.max_length} tokens: give more of it, or a smaller max_length")
