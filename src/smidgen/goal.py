"""Goal: what a step minimises, the rows that this takes, and the objective of a step.

answer: the loss of the right answer's tokens. choice: the loss of choosing the right option among all. accuracy, f1,
exact_match: minus that measure of the batch, without a gradient; the last two of generated answers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from smidgen import optim
from smidgen.chat import Chat
from smidgen.collate import Collator
from smidgen.config import ConfigError, DataError, RunConfig
from smidgen.data import Corpus
from smidgen.encode import Encoded, encode
from smidgen.evaluate import same_words
from smidgen.generation import Answerer
from smidgen.probing import Batch, Engine
from smidgen.questions import Candidates, Prompts
from smidgen.rewards import AnswerMeasure, Measure, RewardObjective, accuracy, no_gradient
from smidgen.tasks import Example
from smidgen.tasks._answers import exact_match, f1

GENERATED = {"f1": f1, "exact_match": exact_match}
METRICS = ("accuracy", *GENERATED)

Questions = Encoded | Candidates | Prompts
Build = Callable[[Engine, Sequence[Batch]], RewardObjective]


def choose_goal(config: RunConfig, corpus: Corpus, kind: str) -> str:
    """The goal of a run: its `objective`, where `auto` is the task's. Raises ConfigError for one that cannot be had."""
    task, goal = corpus.task, config.objective
    options = task is not None and not task.free
    if goal == "auto":
        return "choice" if options and task is not None and task.choice else "answer"
    if goal in ("choice", "accuracy") and not options:
        raise ConfigError(f"objective {goal} compares the options of a row, and '{corpus.name}' has answers of free text: f1")
    if goal == "answer" and kind == "classification":
        raise ConfigError("objective answer is the loss of an answer's tokens, and a classification head has none: choice")
    if goal in GENERATED and options:
        raise ConfigError(
            f"objective {goal} measures generated answers, and the rows of '{corpus.name}' have options: accuracy"
        )
    if goal in GENERATED and kind not in ("causal", "seq2seq"):
        raise ConfigError(f"objective {goal} generates answers, which a model of kind {kind} does not do: choice or answer")
    if goal in METRICS and optim.get(config.method).build.uses & {"backward", "slope"}:
        raise ConfigError(f"{config.method} needs a gradient, and {no_gradient(f'objective {goal}')}")
    return goal


@dataclass(frozen=True)
class Goal:
    """Training rows, their collator, and how a step's objective is made of micro-batches (None: the loss of the rows)."""

    rows: Questions
    collator: Collator
    build: Build | None


def prepare(
    goal: str,
    examples: Sequence[Example | Chat],
    tokenizer: Any,
    kind: str,
    *,
    name: str,
    max_length: int | None,
    context: int | None,
    position_ids: bool,
    scoring: str,
) -> Goal:
    """Encode training examples for a goal. name: of the data, for messages. Raises DataError as `encode` does.

    Options of one token, the same in every row, are compared in one forward (`choices`); others take a row each.
    """
    collate = functools.partial(Collator, tokenizer.pad_token_id, kind, position_ids=position_ids, scoring=scoring)
    if goal in GENERATED:
        prompts = Prompts(examples, tokenizer, kind, max_length, context=context)
        return Goal(prompts, collate(), _rewarded(AnswerMeasure(Answerer(tokenizer, kind), GENERATED[goal])))
    build = _rewarded(accuracy) if goal == "accuracy" else None
    rows = encode(examples, tokenizer, kind, max_length, context=context)
    if goal == "answer" or kind == "classification":
        return Goal(rows, collate(), build)
    several = goal == "accuracy" and any(isinstance(e, Example) and len(e.right) > 1 for e in examples)
    if rows.choices is not None and not several:
        return Goal(rows, collate(choices=rows.choices), build)
    if kind == "masked":
        raise DataError(same_words(name))
    return Goal(Candidates(examples, tokenizer, kind, max_length, context=context), collate(), build)


def _rewarded(measure: Measure) -> Build:
    return lambda engine, batches: RewardObjective(engine, batches, measure)
