"""Encoding: examples -> rows of token ids and labels, cut to a length, and a description of what came out.

Rows are kept as 4-byte integers and given out as plain lists, so that they pickle and need no torch.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

from smidgen.chat import Chat, question
from smidgen.config import ConfigError, DataError
from smidgen.drafts import IGNORED, Draft, draft_rows, frame, labelled, spare_tokens, tokenise
from smidgen.tasks import Example

__all__ = ["Encoded", "choose_max_length", "describe", "encode", "encode_options", "encode_prompts", "limit_of"]

LENGTH_SHARE, LENGTH_MOST = 0.95, 1024  # chosen: one row in twenty is cut rather than pad all to the longest


class Encoded:
    """Encoded rows, list-like: ``rows[i]`` is a dict of python lists (ids are kept as 4-byte integers).

    kind; max_length; choices: token ids of the options where every option is one token, the same for all rows;
    index: example of each row; option: option of each row (encode_options only); notices: what was cut or left out;
    least: tokens that the longest question takes without its passage (encode_prompts only).
    """

    def __init__(self, kind: str, max_length: int):
        self.kind = kind
        self.max_length = max_length
        self.choices: tuple[int, ...] | None = None
        self.index: list[int] = []
        self.option: list[int] = []
        self.notices: list[str] = []
        self.least = 0
        self._rows: list[dict[str, array | int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        row = self._rows[position]
        return {key: list(value) if isinstance(value, array) else value for key, value in row.items()}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, without padding."""
        return [len(row["input_ids"]) for row in self._rows]  # type: ignore[arg-type]

    def _add(self, index: int, option: int, **columns: Sequence[int] | int) -> None:
        self.index.append(index)
        self.option.append(option)
        self._rows.append({key: value if isinstance(value, int) else array("i", value) for key, value in columns.items()})


def choose_max_length(lengths: Sequence[int], context: int | None) -> int:
    """95th percentile of the lengths, at most the model's context and 1024."""
    ordered = sorted(lengths)
    percentile = ordered[math.ceil(LENGTH_SHARE * len(ordered)) - 1]
    return max(2, min(percentile, context or LENGTH_MOST, LENGTH_MOST))


def encode(
    examples: Sequence[Example | Chat],
    tokenizer: Any,
    kind: str,
    max_length: int | None = None,
    *,
    context: int | None = None,
) -> Encoded:
    """Examples as rows of token ids and labels.

    kind: 'causal', 'masked', 'seq2seq' (labels: token ids at the positions of input_ids, decoder tokens for seq2seq,
    -100 where no loss) or 'classification' (labels: class index). max_length None: `choose_max_length`.
    A row that is too long loses tokens at the left of its prompt, after the start token, never of its answer; a row that
    names its passage loses tokens of that alone; a conversation that is cut at the right loses its end. An answer that is
    too long by itself is cut at the right; a text without prompt is cut into blocks; a class row is cut as its tokenizer
    does. Raises DataError: nothing left to learn from, a question that does not fit without its passage, a label word of
    several tokens for a masked model.
    """
    if not examples:
        raise DataError("no examples to encode: the data set is empty")
    if kind == "classification":
        return _encode_classes(examples, tokenizer, max_length, context)
    drafts, choices, remarks = draft_rows(examples, tokenizer, kind)
    limit = limit_of([draft.length for draft in drafts], max_length, context, max((draft.least for draft in drafts), default=0))
    encoded = Encoded(kind, limit)
    encoded.choices = choices
    cut = Counter[str]()
    for draft in drafts:
        _place(encoded, draft, cut)
    total = len(examples)
    encoded.notices += remarks + [f"{count} of {total} rows: {line}".format(limit=limit) for line, count in cut.items()]
    if not len(encoded):
        raise DataError(f"none of the {total} rows has a token to learn from: {'; '.join(encoded.notices)}")
    return encoded


def encode_options(
    examples: Sequence[Example],
    tokenizer: Any,
    kind: str,
    max_length: int | None = None,
    *,
    context: int | None = None,
) -> Encoded:
    """One row for every option of every example, to be scored by the likelihood of its label tokens.

    Rows of one example have the same prompt tokens, cut for its longest option; `index` and `option` name them.
    For 'causal' and 'seq2seq'; a masked or classification row scores all options at once (`encode`).
    """
    if kind not in ("causal", "seq2seq"):
        raise ValueError(f"encode_options of kind '{kind}': causal or seq2seq; encode() scores all options at once")
    spread = [
        (index, option, dataclasses.replace(example, answer=answer, gold=option))
        for index, example in enumerate(examples)
        for option, answer in enumerate(example.options or ())
    ]
    if not spread:
        raise DataError("no options to score: the examples have free-text answers")
    drafts, _, remarks = draft_rows([example for *_, example in spread], tokenizer, kind)
    if len(drafts) != len(spread):
        raise DataError(f"an option has no token of its own: {'; '.join(remarks)}")
    longest: Counter[int] = Counter()
    for (index, option, _), draft in zip(spread, drafts, strict=True):
        draft.index, draft.option = index, option
        longest[index] = max(longest[index], len(draft.ids) - draft.core if draft.target is None else 0)
    limit = limit_of([draft.length for draft in drafts], max_length, context, max((draft.least for draft in drafts), default=0))
    encoded = Encoded(kind, limit)
    cut = Counter[str]()
    for draft in drafts:
        _place(encoded, draft, cut, reserve=longest[draft.index])
    encoded.notices += [f"{count} of {len(spread)} options: {line}".format(limit=limit) for line, count in cut.items()]
    return encoded


def encode_prompts(examples: Sequence[Example | Chat], tokenizer: Any, kind: str, max_length: int | None = None) -> Encoded:
    """Prompts alone, to be continued by generation ('causal', 'seq2seq'); beyond max_length the left is cut, or the left
    of the passage. Raises DataError: no prompt, a question that does not fit without its passage."""
    head, foot = frame(tokenizer)
    prompts = [question(example, tokenizer)[0] for example in examples]
    drafts = []
    spared = any(isinstance(example, Example) and example.passage is not None for example in examples)
    for index, (ids, places) in enumerate(tokenise(tokenizer, prompts, offsets=spared)):
        rendered = isinstance(examples[index], Chat)
        spare = spare_tokens(examples[index], places) if spared else None
        draft = Draft(index, [] if rendered else head, ids, [], foot if kind == "seq2seq" else [], spare=spare)
        if not draft.length:
            raise DataError(f"example {index + 1} has no prompt to continue, and the model has no start token")
        drafts.append(draft)
    encoded = Encoded(kind, max_length or max(draft.length for draft in drafts))
    encoded.least = max(draft.least for draft in drafts)
    for draft in drafts:
        room = max(1, encoded.max_length - len(draft.head) - len(draft.foot))
        ids = draft.ids[-room:] if draft.spare is None else _spared(draft, room, len(draft.ids), Counter())[0]
        encoded._add(draft.index, 0, input_ids=draft.head + ids + draft.foot)
    return encoded


def limit_of(lengths: Sequence[int], max_length: int | None, context: int | None, least: int = 0) -> int:
    """Tokens of a row; where they are chosen, at least what the longest question needs, as far as the model has them.

    least: tokens of the longest question without its passage. Raises ConfigError: more than the context."""
    if max_length is not None and context is not None and max_length > context:
        raise ConfigError(f"max_length {max_length} is above the model's {context} positions: give at most {context}")
    if max_length is not None:
        return max_length
    return max(choose_max_length(lengths or [2], context), min(least, context or least))


def _spared(draft: Draft, room: int, needed: int, cut: Counter[str]) -> tuple[list[int], list[int]]:
    """(ids, labels) of a row that loses tokens of its passage alone: at the left of one before the answer, else at the right.

    needed: tokens that it would take whole. Raises DataError where the passage is not enough.
    """
    first, end = draft.spare or (0, 0)
    drop = needed - room
    if drop <= 0:
        return draft.ids, draft.labels
    if end - first < drop:
        around = len(draft.head) + len(draft.foot)
        raise DataError(
            f"example {draft.index + 1} needs {needed - (end - first) + around} tokens without its passage, and a row has "
            f"{room + around}: raise max_length, use a model with a longer context, or leave the row out"
        )
    before = draft.target is not None or not draft.labels or first < draft.core
    cut[f"longer than {{limit}} tokens, the {'left' if before else 'right'} of the passage is cut"] += 1
    lost = slice(first, first + drop) if before else slice(end - drop, end)
    ids, labels = list(draft.ids), list(draft.labels)
    del ids[lost]
    del labels[lost]
    return ids, labels


def _place(encoded: Encoded, draft: Draft, cut: Counter[str], reserve: int = 0) -> None:
    """Cut a draft to max_length and add it as a row, or as several blocks."""
    limit, kind = encoded.max_length, encoded.kind
    room = max(1, limit - len(draft.head) - len(draft.foot))
    ids, labels = draft.ids, draft.labels
    if draft.target is not None:
        if draft.spare is not None:
            ids, _ = _spared(draft, room, len(ids), cut)
        elif len(ids) > room:
            cut["longer than {limit} tokens, the left of the prompt is cut"] += 1
        if len(draft.target) > limit:
            cut["an answer longer than {limit} tokens, its right is cut"] += 1
        encoded._add(draft.index, draft.option, input_ids=draft.head + ids[-room:] + draft.foot, labels=draft.target[:limit])
        return
    if draft.cut == "right" and len(ids) > room:
        some = _add_labelled(encoded, draft, ids[:room], labels[:room])
        cut["longer than {limit} tokens, " + ("the right is cut" if some else "without room for an answer, left out")] += 1
        return
    core = draft.core
    if draft.spare is not None:
        ids, labels = _spared(draft, room, core + max(reserve, len(ids) - core), cut)
        _add_labelled(encoded, draft, ids, labels)
        return
    if len(ids) > room and kind == "causal" and core == 0 and not reserve:
        cut["longer than {limit} tokens, cut into blocks"] += 1
        overlap = 0 if draft.head else 1  # without a start token, the token before a block is its context
        for start in range(0, len(ids) - overlap, room - overlap or 1):
            block = labels[start : start + room]
            if overlap:
                block[0] = IGNORED
            _add_labelled(encoded, draft, ids[start : start + room], block)
        return
    needed = core + max(reserve, len(ids) - core)
    if needed > room:
        kept = 1 if kind == "causal" and not draft.head else 0  # something to predict the first answer token from
        drop = min(needed - room, max(0, core - kept))
        cut["longer than {limit} tokens, the left of the prompt is cut"] += 1
        ids, labels = ids[drop:], labels[drop:]
        if len(ids) > room:
            where = "the text after the answer" if kind == "masked" else "an answer"
            cut[f"{where} is longer than {{limit}} tokens, its right is cut"] += 1
            ids, labels = ids[:room], labels[:room]
    if not _add_labelled(encoded, draft, ids, labels):
        cut["without a token that carries loss, left out"] += 1


def _add_labelled(encoded: Encoded, draft: Draft, ids: list[int], labels: list[int]) -> bool:
    labels = [IGNORED] * len(draft.head) + labels + [IGNORED] * len(draft.foot)
    if encoded.kind == "causal":
        labels[0] = IGNORED  # nothing comes before it to predict it from
    if all(label == IGNORED for label in labels):
        return False
    encoded._add(draft.index, draft.option, input_ids=draft.head + ids + draft.foot, labels=labels)
    return True


def _encode_classes(examples: Sequence[Example | Chat], tokenizer: Any, max_length: int | None, context: int | None) -> Encoded:
    """Rows for sequence classification: one or two texts, cut as the tokenizer cuts."""
    rows = labelled(examples, "classification")
    first = [example.text[0] if example.text else example.prompt for example in rows]
    second = ["\n".join(example.text[1:]) for example in rows]
    pair = any(second)
    whole = tokenizer(first, second if pair else None, verbose=False)["input_ids"]
    encoded = Encoded("classification", limit_of([len(ids) for ids in whole], max_length, context))
    fitted = tokenizer(first, second if pair else None, truncation=True, max_length=encoded.max_length)
    for index, example in enumerate(rows):
        columns: dict[str, Any] = {"input_ids": fitted["input_ids"][index], "labels": example.gold}
        if "token_type_ids" in fitted:
            columns["token_type_ids"] = fitted["token_type_ids"][index]
        encoded._add(index, 0, **columns)
    cut = sum(len(ids) > encoded.max_length for ids in whole)
    side = "left" if tokenizer.truncation_side == "left" else "end"
    if cut:
        encoded.notices.append(f"{cut} of {len(rows)} rows: longer than {encoded.max_length} tokens, cut at the {side}")
    return encoded


def describe(encoded: Encoded, tokenizer: Any, row: int = 0) -> dict[str, Any]:
    """What the `data` verb shows: counts, a histogram of lengths, and one row as (text, carries loss) parts."""
    lengths = sorted(encoded.lengths)
    classes = encoded.kind == "classification"
    step = max(1, math.ceil(lengths[-1] / 10))
    bins = Counter((length - 1) // step for length in lengths)
    return {
        "rows": len(encoded),
        "tokens": sum(lengths),
        "label_tokens": len(encoded)
        if classes
        else sum(label != IGNORED for index in range(len(encoded)) for label in encoded[index]["labels"]),
        "max_length": encoded.max_length,
        "length": {
            "min": lengths[0],
            "median": lengths[(len(lengths) - 1) // 2],
            "p95": lengths[math.ceil(LENGTH_SHARE * len(lengths)) - 1],
            "max": lengths[-1],
        },
        "histogram": [(i * step + 1, min((i + 1) * step, lengths[-1]), bins[i]) for i in range(max(bins) + 1)],
        "example": _parts(encoded, tokenizer, row),
        "notices": list(encoded.notices),
    }


def _parts(encoded: Encoded, tokenizer: Any, position: int) -> list[tuple[str, bool]]:
    row = encoded[position]
    ids, labels = row["input_ids"], row["labels"]
    if encoded.kind == "classification":
        return [(_text_of(ids, tokenizer), False), (f"class {labels}", True)]
    if encoded.kind == "seq2seq":
        return [(_text_of(ids, tokenizer), False), (_text_of(labels, tokenizer), True)]
    if encoded.kind == "masked":  # the mask stands where the answer was
        ids = [token if label == IGNORED else label for token, label in zip(ids, labels, strict=True)]
    parts: list[tuple[str, bool]] = []
    start, shown = 0, 0
    while start < len(ids):
        loss = labels[start] != IGNORED
        stop = start
        while stop < len(ids) and (labels[stop] != IGNORED) == loss:
            stop += 1
        text = _text_of(ids[:stop], tokenizer)  # decoded from the beginning: spaces depend on what stands before
        parts.append((text[shown:], loss))
        start, shown = stop, len(text)
    return parts


def _text_of(ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
