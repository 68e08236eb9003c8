"""Conversations: as data, as the text that the tokenizer's chat template makes of them, and around a task's prompts.

The template decides where an assistant's turn begins: its text up to there is rendered with the turn's opening, and
what follows is the answer. Does not do: tool schemas, images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from smidgen.config import ConfigError, DataError
from smidgen.tasks import Chat, Example

__all__ = ["FORMS", "Chat", "as_turn", "give_form", "question", "render"]

# The conversation form of Vicuna v1.1 to v1.5 (lmsys.org, 2023): system sentences, then the turns, each after a space.
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ",
    " ASSISTANT:",
)


# The form of Tulu and open-instruct (allenai): each turn under its role, the assistant's ends with the end token.
_TULU = ("<|user|>\n", "\n<|assistant|>\n")

# What opens the user's turn, what closes it, and what an answer begins with.
_AROUND = {"vicuna": (*_VICUNA, " "), "tulu": (*_TULU, "")}

# The same forms as chat templates, several turns long. START is the tokenizer's start token where it puts one itself.
FORMS = {
    "vicuna": (
        "{{ START }}{% if messages[0].role == 'system' %}{% set opening = messages[0].content %}{% set turns = messages[1:] %}"
        "{% else %}{% set opening = '" + _VICUNA[0].removesuffix(" USER: ").replace("'", "\\'") + "' %}"
        "{% set turns = messages %}{% endif %}{{ opening }}"
        "{% for m in turns %}{% if m.role == 'assistant' %}{{ ' ASSISTANT: ' + m.content + eos_token }}"
        "{% else %}{{ ' USER: ' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    ),
    "tulu": (
        "{{ START }}{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
        "{{ m.content.strip() + eos_token + '\n' }}{% else %}{{ m.content.strip() + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}


def give_form(tokenizer: Any, style: str) -> None:
    """Make a form of ours the tokenizer's chat template; it is saved with it. Raises ConfigError without an end token."""
    if tokenizer.eos_token is None:
        raise ConfigError(f"chat {style}: the tokenizer has no end token, with which the assistant's turns end: set eos_token")
    bos = tokenizer.bos_token if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else None
    tokenizer.chat_template = FORMS[style].replace("{{ START }}", "" if bos is None else "{{ bos_token }}")


def render(chat: Chat, tokenizer: Any, remarks: Counter[str]) -> list[tuple[str, list[tuple[int, int]]]]:
    """(text, spans of the assistant's turns), one row, or one row a turn if the template rewrites earlier turns."""
    turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    turns = turns[-1:] if chat.turns == "last" else turns
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


def as_turn(examples: Sequence[Example], style: str, tokenizer: Any = None) -> list[Example]:
    """Examples whose prompts are the user's turn of a conversation, and whose answers are the assistant's.

    style: 'vicuna', 'tulu', or 'model': the tokenizer's chat template, whose own start token is left to the tokenizer. The turn
    loses outer white space; an answer begins as the form writes it. The form itself is never cut from a long row.
    Raises ConfigError where the tokenizer has no template, or renders the prompt in another spelling; DataError where an
    example has no prompt.
    """
    for number, example in enumerate(examples, 1):
        if not example.prompt.strip():
            raise DataError(
                f"chat {style}: example {number} has no prompt, and a conversation begins with the user: leave it out"
            )
    if style in _AROUND:
        return [_turned(example, *_AROUND[style]) for example in examples]
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("chat model: the model's tokenizer has no chat template: use chat vicuna, or leave it out")
    found = []
    lead: str | None = None
    for number, example in enumerate(examples, 1):
        asked = {"role": "user", "content": example.prompt.strip()}
        before = _apply([asked], tokenizer, f"example {number}", ask=True)
        if lead is None:  # white space that the template puts before an answer
            replied = {"role": "assistant", "content": "yes"}
            after = _apply([asked, replied], tokenizer, f"example {number}").removeprefix(before).partition("yes")[0]
            lead = after if not after.strip() else ""
        before = before.removeprefix(tokenizer.bos_token or "")
        opening, content, closing = before.rpartition(asked["content"])
        if not content:
            raise ConfigError(
                f"chat: model: the chat template does not show the prompt of example {number} as it is: use vicuna"
            )
        found.append(_turned(example, opening, closing, lead))
    return found


def _turned(example: Example, opening: str, closing: str, lead: str) -> Example:
    content = example.prompt.strip()
    passage = example.passage
    if passage is not None:
        shift = len(opening) - (len(example.prompt) - len(example.prompt.lstrip()))
        passage = max(len(opening), passage[0] + shift), max(len(opening), min(passage[1] + shift, len(opening + content)))
    return replace(
        example,
        prompt=opening + content + closing,
        answer=lead + example.answer.lstrip(),
        options=None if example.options is None else tuple(lead + option.lstrip() for option in example.options),
        passage=passage or (len(opening), len(opening + content)),
    )


def _apply(messages: Sequence[Mapping[str, Any]], tokenizer: Any, place: str, *, ask: bool = False) -> str:
    """The text of a conversation; ask: with the opening of the assistant's next turn."""
    import jinja2

    if not tokenizer.chat_template:
        raise DataError(
            f"{place}: a conversation, and the model's tokenizer has no chat template: use an instruction-tuned model, "
            "name a form (chat=tulu or chat=vicuna), or put a chat_template.jinja into the model's folder"
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
