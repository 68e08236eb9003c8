"""Drafts: examples -> token ids with labels, before anything is cut; one builder for each kind of model.

Only the answer of an example carries loss: prompt and answer are tokenised as one text, and a token belongs to the
answer if it ends after the boundary. Does not do: masked-language-model noise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from smidgen.chat import Chat, question, render
from smidgen.config import ConfigError, DataError
from smidgen.tasks import Example

__all__ = ["IGNORED", "Draft", "draft_rows", "frame", "labelled", "spare_tokens", "tokenise"]

IGNORED = -100  # label of a position without loss, as in transformers


@dataclass
class Draft:
    """One row before it is cut: head and foot are the tokenizer's own tokens, ids carry `labels` (IGNORED: no loss).

    spare: (first, end) of the tokens in ids that may be lost; None: any before the last answer.
    """

    index: int
    head: list[int]
    ids: list[int]
    labels: list[int]
    foot: list[int] = field(default_factory=list)
    option: int = 0
    target: list[int] | None = None  # decoder tokens of a seq2seq row
    spare: tuple[int, int] | None = None
    cut: str = "left"  # the end that is lost where a row is too long, as of Chat

    @property
    def length(self) -> int:
        return len(self.head) + len(self.ids) + len(self.foot)

    @property
    def least(self) -> int:
        """Tokens that stay however the row is cut; 0 where that is not said."""
        return self.length - (self.spare[1] - self.spare[0]) if self.spare is not None else 0

    @property
    def core(self) -> int:
        """Where the last answer begins; nothing from here on is cut at the left."""
        last = max(position for position, label in enumerate(self.labels) if label != IGNORED)
        while last > 0 and self.labels[last - 1] != IGNORED:
            last -= 1
        return last


Drafts = tuple[list[Draft], tuple[int, ...] | None, list[str]]  # drafts, choices, notices


def draft_rows(examples: Sequence[Example | Chat], tokenizer: Any, kind: str) -> Drafts:
    builders = {"causal": _causal_drafts, "masked": _masked_drafts, "seq2seq": _seq2seq_drafts}
    if kind not in builders:
        raise ConfigError(f"unknown kind '{kind}': one of {', '.join(builders)}, classification")
    return builders[kind](examples, tokenizer)


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer itself puts before and after a text."""
    bare, framed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    return [], []


def tokenise(
    tokenizer: Any, texts: Sequence[str], *, offsets: bool = True
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """(ids, character spans; without offsets the ids again) of each text, without the tokenizer's own tokens."""
    if offsets and not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} gives no character positions, which tell answers from prompts: "
            "use a model with a tokenizer.json"
        )
    for start in range(0, len(texts), 1000):  # positions of a thousand texts at a time, not of all
        batch = tokenizer(
            list(texts[start : start + 1000]),
            add_special_tokens=False,
            return_offsets_mapping=offsets,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        yield from zip(batch["input_ids"], batch["offset_mapping"] if offsets else batch["input_ids"], strict=True)


def _in_spans(end: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether a token that ends at `end` belongs to one of the spans."""
    return any(start < end <= stop for start, stop in spans)


def spare_tokens(example: Example | Chat, places: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """(first, end) of the tokens that lie in an example's passage; None where it names none."""
    if isinstance(example, Chat) or example.passage is None:
        return None
    start, stop = example.passage
    inside = [index for index, (first, end) in enumerate(places) if start <= first and end <= stop]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _causal_drafts(examples: Sequence[Example | Chat], tokenizer: Any) -> Drafts:
    head, _ = frame(tokenizer)
    texts: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    origin: list[int] = []
    remarks: Counter[str] = Counter()
    for index, example in enumerate(examples):
        if isinstance(example, Chat):
            for text, found in render(example, tokenizer, remarks):
                texts.append(text)
                spans.append(found)
                origin.append(index)
            continue
        if example.options is not None and not example.prompt and (example.suffix or not head):
            raise ConfigError("the template has nothing before its {answer} slot: a causal model reads left to right")
        texts.append(example.prompt + example.answer)
        spans.append([(len(example.prompt), len(texts[-1]))] if example.answer.strip() else [])
        origin.append(index)
    added = set(tokenizer.added_tokens_decoder)  # end-of-turn tokens are among these
    drafts = []
    for index, found, (ids, places) in zip(origin, spans, tokenise(tokenizer, texts), strict=True):
        example = examples[index]
        labels = [token if _in_spans(end, found) else IGNORED for token, (_, end) in zip(ids, places, strict=True)]
        if all(label == IGNORED for label in labels):
            remarks["no answer to learn from, left out"] += 1
            continue
        if isinstance(example, Chat):
            closed = labels[-1] == IGNORED or ids[-1] in added
        else:
            closed = example.options is not None or bool(example.golds) or ids[-1] == tokenizer.eos_token_id
        if not closed and tokenizer.eos_token_id is None:
            remarks["the tokenizer has no end token, so the answer's end is not learned"] += 1
        elif not closed:
            ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
        last = max(position for position, label in enumerate(labels) if label != IGNORED)
        spare = spare_tokens(example, places)
        start = [] if isinstance(example, Chat) else head
        cut = example.cut if isinstance(example, Chat) else "left"
        drafts.append(Draft(index, start, ids[: last + 1], labels[: last + 1], spare=spare, cut=cut))
    notices = [f"{count} of {len(examples)} rows: {line}" for line, count in remarks.items()]
    choices = _choices(examples, tokenizer)
    if choices is not None:
        for draft in drafts:
            gold = examples[draft.index].gold  # type: ignore[union-attr]
            if [label for label in draft.labels if label != IGNORED] != [choices[gold or 0]]:
                notices.append("the label words are other tokens in some rows: the loss is over the whole vocabulary")
                return drafts, None, notices
    return drafts, choices, notices


def _choices(examples: Sequence[Example | Chat], tokenizer: Any) -> tuple[int, ...] | None:
    """Token ids of the options, if every row has the same ones and each is one token of its own; else None."""
    first = examples[0]
    if isinstance(first, Chat) or first.options is None:
        return None
    if any(isinstance(example, Chat) or example.options != first.options for example in examples):
        return None
    found = [_option_tokens(first.prompt, option, "", tokenizer) for option in first.options]
    if any(len(tokens) != 1 for _, tokens in found) or len({str(before) for before, _ in found}) > 1:
        return None
    ids = tuple(tokens[0] for _, tokens in found)
    return ids if len(set(ids)) == len(ids) else None


def _option_tokens(prompt: str, option: str, suffix: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(tokens that end before an option, tokens that end in it)"""
    ((ids, places),) = tokenise(tokenizer, [prompt + option + suffix])
    span = [(len(prompt), len(prompt + option))]
    return (
        [token for token, (_, end) in zip(ids, places, strict=True) if end <= len(prompt)],
        [token for token, (_, end) in zip(ids, places, strict=True) if _in_spans(end, span)],
    )


def labelled(examples: Sequence[Example | Chat], kind: str) -> list[Example]:
    """The examples, if all have options. Raises DataError."""
    for example in examples:
        if isinstance(example, Chat) or example.options is None or example.gold is None:
            raise DataError(
                f"a {kind} model needs labelled rows (a task, or columns text and label), and these have free-text "
                "answers: use a causal or seq2seq model"
            )
    return [example for example in examples if isinstance(example, Example)]


def _masked_drafts(examples: Sequence[Example | Chat], tokenizer: Any) -> Drafts:
    rows = labelled(examples, "masked")
    if tokenizer.mask_token_id is None:
        raise ConfigError(f"{type(tokenizer).__name__} has no mask token: use --kind causal or classification")
    head, foot = frame(tokenizer)
    vocabulary: dict[str, int] = {}
    drafts = []
    texts = [example.prompt + example.answer + example.suffix for example in rows]
    for index, (example, (ids, places)) in enumerate(zip(rows, tokenise(tokenizer, texts), strict=True)):
        for option in example.options or ():
            if option not in vocabulary:
                vocabulary[option] = _single(example, option, tokenizer)
        span = [(len(example.prompt), len(example.prompt + example.answer))]
        where = [position for position, (_, end) in enumerate(places) if _in_spans(end, span)]
        if [ids[position] for position in where] != [vocabulary[example.answer]]:
            raise DataError(
                f"example {index + 1}: in '...{texts[index][-60:]}' the label word '{example.answer.strip()}' is not "
                "the token it is elsewhere: put a space or a full stop around the {answer} slot"
            )
        labels = [IGNORED] * len(ids)
        labels[where[0]] = ids[where[0]]
        ids = [*ids[: where[0]], tokenizer.mask_token_id, *ids[where[0] + 1 :]]
        drafts.append(Draft(index, head, ids, labels, foot, spare=spare_tokens(example, places)))
    if any(example.options != rows[0].options for example in rows):
        return drafts, None, []
    choices = tuple(vocabulary[option] for option in rows[0].options or ())
    if len(set(choices)) < len(choices):
        raise DataError(f"two of the label words {', '.join(vocabulary)} are the same token: choose other words")
    return drafts, choices, []


def _single(example: Example, option: str, tokenizer: Any) -> int:
    """The token of a label word where it stands in the template. Raises DataError unless it is exactly one."""
    _, tokens = _option_tokens(example.prompt, option, example.suffix, tokenizer)
    if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(tokens)
        raise DataError(
            f"the label word '{option.strip()}' is {len(tokens)} tokens here ({' '.join(pieces)}), and a masked model "
            "fills in one: choose words that the tokenizer keeps whole (`words`), or use --kind classification"
        )
    return tokens[0]


def _seq2seq_drafts(examples: Sequence[Example | Chat], tokenizer: Any) -> Drafts:
    head, foot = frame(tokenizer)
    pairs = [question(example, tokenizer) for example in examples]
    drafts, empty = [], 0
    spared = any(isinstance(example, Example) and example.passage is not None for example in examples)
    for index, (ids, places) in enumerate(tokenise(tokenizer, [prompt for prompt, _ in pairs], offsets=spared)):
        answer = pairs[index][1].strip()
        if not answer:
            empty += 1
            continue
        if not ids:
            raise DataError(f"example {index + 1} has an answer and no prompt: a seq2seq model needs one; use a causal model")
        target = list(tokenizer(text_target=answer)["input_ids"])
        if tokenizer.eos_token_id is not None and target[-1] != tokenizer.eos_token_id:
            target.append(tokenizer.eos_token_id)
        spare = spare_tokens(examples[index], places) if spared else None
        drafts.append(Draft(index, head, ids, [], foot, target=target, spare=spare))
    return drafts, None, [f"{empty} of {len(examples)} rows: no answer to learn from, left out"] if empty else []
