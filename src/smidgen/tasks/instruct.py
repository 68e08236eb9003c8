"""Instruct: conversations in the model's chat template, of which the assistant's turns carry loss.

Rows: messages, conversations, prompt and completion, or Alpaca's and Dolly's columns; an input follows its instruction
after an empty line. The template is the tokenizer's, or the form that the key `chat` names. A row that is too long loses
its right end, and is left out if no answer is left.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from smidgen.tasks._conversation import ConversationTask, answer_of, turns_of_row
from smidgen.tasks._example import Chat, Row

status = "experimental"


class Config(BaseModel):
    """Options of the task."""

    model_config = ConfigDict(extra="forbid")

    source: str = Field("", description="file, folder or hub id; usually given as `data`")
    turns: Literal["all", "last"] = Field("all", description="which of the assistant's turns carry loss: all, or the last")
    empty: Literal["refuse", "skip"] = Field("refuse", description="what is done with a row whose answer is empty")


def build(config: Config) -> ConversationTask:
    def read_row(row: Row) -> Chat | None:
        turns = turns_of_row(row)
        last = answer_of(turns, row.place)
        learned = [t for i, t in enumerate(turns) if t["role"] == "assistant" and (config.turns == "all" or i == last)]
        if not all(turn["content"].strip() for turn in learned):
            return None
        return Chat(turns, row.place, config.turns, cut="right")

    return ConversationTask("instruct", config.source, read_row, config.empty == "skip")
