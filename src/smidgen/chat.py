"""Conversations: as data, and as the text that the tokenizer's chat template makes of them.

The template decides where an assistant's turn begins: its text up to there is rendered with the turn's opening, and
what follows is the answer. Does not do: tool schemas, images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smidgen.config import DataError
from smidgen.tasks import Example

__all__ = ["Chat", "question", "render"]


@dataclass(frozen=True)
class Chat:
    """A conversation, rendered by the tokenizer's chat template; every assistant turn carries loss."""

    messages: tuple[dict[str, Any], ...]
    place: str


def render(chat: Chat, tokenizer: Any, remarks: Counter[str]) -> list[tuple[str, list[tuple[int, int]]]]:
    """(text, spans of the assistant's turns), one row, or one row a turn if the template rewrites earlier turns."""
    turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if not turns:
        return [(chat.messages[0]["content"], [])]
    whole = _apply(chat.messages, tokenizer, chat.place)
    rows, spans = [], []
    for turn in turns:
        before = _apply(chat.messages[:turn], tokenizer, chat.place, ask=True) if turn else ""
        text = _apply(chat.messages[: turn + 1], tokenizer, chat.place)
        if not text.startswith(before):
            raise DataError(
                f"{chat.place}: the model's chat template does not open the assistant's turn as it renders it, so its "
                "answer cannot be told from the prompt: give columns prompt and completion"
            )
        spans.append((len(before), _turn_end(text, tokenizer)))
        rows.append((text, [spans[-1]]))
    if all(whole.startswith(text) for text, _ in rows):
        return [(whole, spans)]
    remarks["the chat template rewrites earlier turns, so each assistant turn is a row of its own"] += 1
    return rows


def question(example: Example | Chat, tokenizer: Any) -> tuple[str, str]:
    """(prompt, answer) as text; of a conversation its last assistant turn, '' if it has none."""
    if isinstance(example, Example):
        return example.prompt, example.answer
    turns = [index for index, message in enumerate(example.messages) if message["role"] == "assistant"]
    end = turns[-1] if turns else len(example.messages)
    prompt = _apply(example.messages[:end], tokenizer, example.place, ask=True) if end else ""
    return prompt, example.messages[end]["content"] if turns else ""


def _apply(messages: Sequence[Mapping[str, Any]], tokenizer: Any, place: str, *, ask: bool = False) -> str:
    """The text of a conversation; ask: with the opening of the assistant's next turn."""
    import jinja2

    if not tokenizer.chat_template:
        raise DataError(
            f"{place}: a conversation, and the model's tokenizer has no chat template: use an instruction-tuned model, "
            "put a chat_template.jinja into the model's folder, or give columns prompt and completion"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{place}: the model's chat template refuses this conversation: {error}") from None


def _turn_end(text: str, tokenizer: Any) -> int:
    """End of a turn: white space after an end-of-turn token is never generated."""
    bare = text.rstrip()
    if any(bare.endswith(str(token)) for token in tokenizer.added_tokens_decoder.values()):
        return len(bare)
    return len(text)
