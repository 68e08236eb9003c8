"""Splits: which rows a run trains on, which are held out, and how several sources are mixed.

Order and choice come from hashes of the rows' content, never from a random state: the same on every machine, whatever
order the rows stand in.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from smidgen.config import DataError, Source
from smidgen.rows import DataSpec, canonical_split, has_split, read_rows
from smidgen.tasks import Row

__all__ = ["Splits", "draw", "draw_each", "mix", "row_hash", "split_rows", "take"]

HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 500  # chosen: a tenth of the rows, enough for +-2 points of accuracy


def row_hash(row: Any, salt: str) -> int:
    """64 bits of SHA-256 over a row's content, as JSON with sorted keys: the same on every machine."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.sha256(f"{salt}\n{text}".encode()).digest()[:8], "big")


def split_rows(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(train, held out): 10 % of the rows, at most 500, with the smallest hashes; equal rows stay together."""
    hashes = [row_hash(row, "held out") for row in rows]
    wanted = min(HELD_OUT_MOST, max(1, round(HELD_OUT_SHARE * len(rows))))
    counts = Counter(hashes)
    chosen: set[int] = set()
    total = 0
    for value in sorted(counts):
        if total >= wanted or total + counts[value] >= len(rows):  # something must be left to train on
            break
        chosen.add(value)
        total += counts[value]
    train = [row for row, value in zip(rows, hashes, strict=True) if value not in chosen]
    return train, [row for row, value in zip(rows, hashes, strict=True) if value in chosen]


Item = TypeVar("Item")


def take(items: list[Item], count: int | None, content: Callable[[Item], Any] = lambda item: item) -> list[Item]:
    """`count` items, those with the smallest hashes, in order: the same for every seed, nested in larger counts.

    content: what is hashed of an item, as JSON.
    """
    if count is None or count >= len(items):
        return items
    hashes = [row_hash(content(item), "take") for item in items]
    order = sorted(range(len(items)), key=lambda index: (hashes[index], index))
    return [items[index] for index in sorted(order[:count])]


def draw(rows: Sequence[Row], training: int, dev: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, dev rows) of a benchmark, drawn from the same rows by seed; without balancing classes.

    As MeZO draws them (one permutation, the first `training`, then `dev`), but by hash, and an equal row is never in
    both. Of fewer rows than asked, both get their share.
    """
    share = min(1.0, len(rows) / (training + dev))
    training, dev = round(share * training), round(share * dev)
    hashes = [row_hash(row, f"benchmark {seed}") for row in rows]
    order = sorted(range(len(rows)), key=lambda index: (hashes[index], index))
    seen = {hashes[index] for index in order[:training]}
    held = [index for index in order[training : training + dev] if hashes[index] not in seen]
    return [rows[index] for index in sorted(order[:training])], [rows[index] for index in sorted(held)]


def draw_each(rows: Sequence[Row], k: int, seed: int, columns: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """(training rows, dev rows) with k rows of every class in each, drawn by seed as `draw` does. The class stands in the
    first of the columns that a row has.

    Raises DataError for a class of fewer than 2 k different rows.
    """
    hashes = [row_hash(row, f"benchmark {seed}") for row in rows]
    classes: dict[str, dict[int, int]] = {}  # of a class: the first row with each hash
    for index, row in enumerate(rows):
        label = next((row[column] for column in columns if column in row), None)
        classes.setdefault(str(label), {}).setdefault(hashes[index], index)
    training: list[int] = []
    dev: list[int] = []
    for name, members in sorted(classes.items()):
        if len(members) < 2 * k:
            raise DataError(
                f"k_shot = {k} needs {2 * k} rows of every class, half of them for dev, and {columns[0]} {name} has "
                f"{len(members)}: take at most {len(members) // 2}"
            )
        order = [members[value] for value in sorted(members)]
        training += order[:k]
        dev += order[k : 2 * k]
    return [rows[index] for index in sorted(training)], [rows[index] for index in sorted(dev)]


def mix(parts: Sequence[Sequence[Row]], weights: Sequence[float], seed: int) -> list[Row]:
    """One epoch of several sources, spread evenly: source k shows each row weights[k] times (a part of one by hash)."""
    if len(parts) == 1 and weights[0] == 1:
        return list(parts[0])
    placed: list[tuple[float, int, int, Row]] = []
    for source, (rows, weight) in enumerate(zip(parts, weights, strict=True)):
        share = list(rows) * int(weight)
        part = round((weight - int(weight)) * len(rows))
        share += take(list(rows), part if share else max(1, part))
        for index, row in enumerate(share):
            jitter = row_hash({"source": source, "index": index}, f"mix {seed}") / 2**64
            placed.append(((index + jitter) / len(share), source, index, row))
    return [row for *_, row in sorted(placed, key=lambda entry: entry[:3])]


@dataclass
class Splits:
    """Reader of a run's rows: own splits where the source has them, else a part of its training rows held out.

    sizes: (training, dev, test) rows of a benchmark: training and dev drawn from the training rows, and the test from
    the validation rows, the same for every seed, because the test rows of most sets are published without labels.
    shots: (k, columns of the label): the same with k rows of every class for training and for dev; `sizes` gives the test.
    """

    data: Sequence[str | Source]
    eval_data: DataSpec | None
    seed: int
    notify: Callable[[str], None]
    sizes: tuple[int | None, int | None, int | None] | None = None
    shots: tuple[int, Sequence[str]] | None = None
    _read: dict[str, list[Row]] = field(default_factory=dict)

    def rows(self, split: str) -> list[Row]:
        split = canonical_split(split)
        if split not in self._read:
            if self.sizes is not None:
                self._read_benchmark(split, self.sizes)
            elif split == "test":
                self._read[split] = read_rows(self.data, "test")
            elif split == "validation" and self.eval_data is not None:
                named = has_split(self.eval_data, "validation")
                self._read[split] = read_rows(self.eval_data, "validation" if named else None)
            elif split == "validation" and has_split(self.data, "validation"):
                self._read[split] = read_rows(self.data, "validation")
            else:
                self._read_training()
        return self._read[split]

    def has(self, split: str) -> bool:
        """Whether the source has this split; rows for validation are held out where it has none."""
        if canonical_split(split) != "test":
            return True
        return has_split(self.data, "test") or (self.sizes is not None and has_split(self.data, "validation"))

    def _read_benchmark(self, split: str, sizes: tuple[int | None, int | None, int | None]) -> None:
        training, dev, test = sizes
        if split == "test":
            named = "validation" if has_split(self.data, "validation") else "test"
            rows = read_rows(self.data, named)
            self._read[split] = take(rows, test)
            self.notify(f"the test rows are {len(self._read[split])} of the {len(rows)} {named} rows")
            return
        rows = read_rows(self.data, "train")
        if self.shots is not None:
            drawn = draw_each(rows, self.shots[0], self.seed, self.shots[1])
        else:
            assert training is not None and dev is not None
            drawn = draw(rows, training, dev, self.seed)
        self._read["train"], self._read["validation"] = drawn
        made = len(drawn[0]), len(drawn[1])
        less = "" if self.shots or made == (training, dev) else f", fewer than the published {training} and {dev}"
        self.notify(f"{made[0]} rows to train on and {made[1]} dev rows, drawn from {len(rows)} training rows{less}")

    def _read_training(self) -> None:
        parts: list[list[Row]] = []
        held: list[Row] = []
        for source in self.data:
            rows = read_rows(source, "train")
            if self.eval_data is None:
                if has_split(source, "validation"):
                    held += read_rows(source, "validation")
                else:
                    everything = len(rows)
                    rows, out = split_rows(rows)
                    held += out
                    name = source.path if isinstance(source, Source) else source
                    self.notify(f"{name}: {len(out)} of {everything} rows held out for evaluation, by row hash")
            parts.append(rows)
        weights = [source.weight if isinstance(source, Source) else 1.0 for source in self.data]
        self._read["train"] = mix(parts, weights, self.seed)
        if self.eval_data is None:
            self._read.setdefault("validation", held)
