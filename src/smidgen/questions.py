"""Questions: examples as a trainer's rows where a step compares all options of an example, or generates its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smidgen.chat import Chat, question
from smidgen.config import DataError
from smidgen.drafts import labelled
from smidgen.encode import Encoded, encode_options, encode_prompts, limit_of
from smidgen.tasks import Example

__all__ = ["MAX_NEW_TOKENS", "Candidates", "Prompts"]

MAX_NEW_TOKENS = 50  # of a generated answer; MeZO's large_models


class Candidates:
    """Examples with all their options, list-like: [i] is {"options": rows, "gold": option, "right": accepted options}.

    options: one row for every option (`encode_options`); rows: the positions of an example's rows in it.
    Raises DataError where an example has no options, or fewer than two.
    """

    def __init__(
        self,
        examples: Sequence[Example | Chat],
        tokenizer: Any,
        kind: str,
        max_length: int | None = None,
        *,
        context: int | None = None,
    ):
        chosen = labelled(examples, kind)
        self.options = encode_options(chosen, tokenizer, kind, max_length, context=context)
        self.golds = [example.gold or 0 for example in chosen]
        self.rights = [frozenset(example.right) | {gold} for example, gold in zip(chosen, self.golds, strict=True)]
        self.rows: list[list[int]] = [[] for _ in chosen]
        for position, index in enumerate(self.options.index):
            self.rows[index].append(position)
        for index, rows in enumerate(self.rows):
            if len(rows) < 2:
                raise DataError(f"example {index + 1} has {len(rows)} option(s) to choose from: it takes two or more")

    @property
    def max_length(self) -> int:
        """Tokens of a row, at most."""
        return self.options.max_length

    @property
    def notices(self) -> list[str]:
        """What was cut."""
        return self.options.notices

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        options = [self.options[k] for k in self.rows[position]]
        return {"options": options, "gold": self.golds[position], "right": self.rights[position]}


class Prompts:
    """Prompts to be continued by generation, list-like: [i] is {"input_ids": tokens, "prompt": text, "answers": texts}.

    answers: what is accepted, the example's `golds` or its one answer. A prompt is cut at its left to max_length (None: as
    `encode` chooses it), and so that an answer of `new_tokens` fits into the context after it. Raises DataError where there is
    no answer, unless they are not `needed`.
    """

    def __init__(
        self,
        examples: Sequence[Example | Chat],
        tokenizer: Any,
        kind: str,
        max_length: int | None = None,
        *,
        context: int | None = None,
        new_tokens: int = MAX_NEW_TOKENS,
        needed: bool = True,
    ):
        self.answers = [_accepted(example, tokenizer) for example in examples]
        self.texts = [question(example, tokenizer)[0] for example in examples]
        for index, answers in enumerate(self.answers):
            if needed and not answers:
                raise DataError(f"example {index + 1} has no answer to compare a generated one with")
        room = None if context is None or kind != "causal" else max(2, context - new_tokens)
        self.encoded: Encoded = encode_prompts(examples, tokenizer, kind)
        lengths = self.encoded.lengths
        limit = min(max_length or limit_of(lengths, None, room, self.encoded.least), room or max(lengths))
        cut = sum(length > limit for length in lengths)
        if cut:
            self.encoded = encode_prompts(examples, tokenizer, kind, limit)
            self.encoded.notices.append(
                f"{cut} of {len(lengths)} prompts: longer than {limit} tokens, which leave room for an answer, the left is cut"
            )

    @property
    def max_length(self) -> int:
        """Tokens of a prompt, at most."""
        return self.encoded.max_length

    @property
    def notices(self) -> list[str]:
        """What was cut."""
        return self.encoded.notices

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return self.encoded.lengths

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        return {**self.encoded[position], "prompt": self.texts[position], "answers": self.answers[position]}


def _accepted(example: Example | Chat, tokenizer: Any) -> tuple[str, ...]:
    if isinstance(example, Example) and example.golds:
        return example.golds
    answer = question(example, tokenizer)[1].strip()
    return (answer,) if answer else ()
