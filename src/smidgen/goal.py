"""Goal: what a step minimises, the rows that this takes, and the objective of a step.

answer: the loss of the right answer's tokens. choice: the loss of choosing the right option among all, hinge: the same with
a margin in place of the softmax, over label words of one token. accuracy, f1,
exact_match: minus that measure of the batch, without a gradient; the last two of generated answers. reward: minus a
function of the user's of generated answers. preference: the loss
of direct preference optimisation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smidgen import journal, optim
from smidgen.asked import Asked, AskedCollator
from smidgen.collate import Collator
from smidgen.config import ConfigError, DataError, RunConfig
from smidgen.data import Corpus
from smidgen.encode import Encoded, encode
from smidgen.evaluate import same_words
from smidgen.folder import JOURNAL
from smidgen.generation import Answerer
from smidgen.kinds import Kind, classifies
from smidgen.packing import Packs, kept_apart, pack_length
from smidgen.pairs import Pairs, refer
from smidgen.params import ParamView
from smidgen.pixels import PixelCollator, Pixels
from smidgen.probing import Batch, Engine
from smidgen.questions import MAX_NEW_TOKENS, Candidates, Prompts
from smidgen.rewards import AnswerMeasure, Measure, Reward, RewardObjective, Score, accuracy, no_gradient
from smidgen.stream import TextRows, TextStream
from smidgen.tasks import Example
from smidgen.tasks._answers import exact_match, f1

GENERATED: dict[str, Score] = {
    "f1": lambda prompt, text, answers: f1(text, answers),
    "exact_match": lambda prompt, text, answers: exact_match(text, answers),
}
METRICS = ("accuracy", *GENERATED, "reward")

Questions = Encoded | Candidates | Asked | Packs | Pairs | Pixels | TextRows | TextStream
Build = Callable[[Engine, Sequence[Batch]], RewardObjective]


def choose_goal(config: RunConfig, corpus: Corpus, kind: str) -> str:
    """The goal of a run: its `objective`, where `auto` is the task's. Raises ConfigError for one that cannot be had."""
    task = corpus.task
    goal: str = config.objective
    options = task is not None and not task.free and task.judged
    if corpus.beta is not None:
        return _preference(config)
    if config.reward is not None:
        if goal != "auto":
            raise ConfigError(f"reward and objective {goal} both say what a step minimises: leave objective out")
        goal = "reward"
    elif config.base_penalty:
        raise ConfigError(
            f"base_penalty = {config.base_penalty:g} is subtracted from a reward, and there is none: give --reward"
        )
    if goal == "auto":
        return "choice" if options and task is not None and task.choice else "answer"
    if goal in ("choice", "hinge", "accuracy") and not options:
        raise ConfigError(f"objective {goal} compares the options of a row, and '{corpus.name}' has answers of free text: f1")
    if goal == "answer" and classifies(kind):
        raise ConfigError("objective answer is the loss of an answer's tokens, and a classification head has none: choice")
    if goal in GENERATED and options:
        raise ConfigError(
            f"objective {goal} measures generated answers, and the rows of '{corpus.name}' have options: accuracy"
        )
    if goal in (*GENERATED, "reward") and kind not in ("causal", "seq2seq"):
        raise ConfigError(f"objective {goal} generates answers, which a model of kind {kind} does not do: choice or answer")
    if goal in METRICS and optim.get(config.method).build.uses & {"backward", "slope"}:
        raise ConfigError(f"{config.method} needs a gradient, and {no_gradient(f'objective {goal}')}")
    return goal


def _preference(config: RunConfig) -> str:
    """The goal of pairs. Raises ConfigError for what they cannot have."""
    if config.reward is not None:
        raise ConfigError(
            f"reward = {config.reward!r}: the rows are preference pairs, whose objective is their own: leave it out"
        )
    if config.objective != "auto":
        raise ConfigError(f"objective {config.objective}: the rows are preference pairs, whose objective is their own: auto")
    if config.packing:
        raise ConfigError("packing: the two answers of a pair are compared, each in a row of its own: leave packing out")
    return "preference"


def packable(config: RunConfig, goal: str, kind: str, virtual: int) -> bool | str:
    """Whether and how rows are packed. virtual: tokens that the scheme puts before a row. Raises ConfigError where they cannot
    be."""
    if not config.packing:
        return False
    if kind != "causal" or goal != "answer":
        raise ConfigError(
            f"packing is for answers of causal models: this is a {kind} model with objective {goal}: leave packing out"
        )
    if config.packing == "stream":
        return "stream"
    if virtual:
        raise ConfigError(
            f"packing: the {virtual} virtual tokens of scheme {config.scheme} stand before a row, and so before the first of a "
            "pack only: leave packing out, or take another scheme"
        )
    return True


@dataclass(frozen=True)
class Goal:
    """Training rows, their collator, and how a step's objective is made of micro-batches (None: the loss of the rows)."""

    rows: Questions
    collator: Any
    build: Build | None
    measure: AnswerMeasure | None = None  # of generated answers


def prepare(
    goal: str,
    examples: Any,
    tokenizer: Any,
    kind: str,
    *,
    name: str,
    max_length: int | None,
    context: int | None,
    position_ids: bool,
    scoring: str,
    packed: bool | str = False,
    beta: float | None = None,
    reward: Reward | None = None,
    penalty: float = 0.0,
    new_tokens: int = MAX_NEW_TOKENS,
) -> Goal:
    """Encode training examples for a goal. name: of the data, for messages; beta: of pairs; examples of a text
    stream: texts, or a function of the pass that gives them; penalty: of a reward, see `AnswerMeasure`; new_tokens: of a
    generated answer, at most. Raises DataError as `encode` does.

    Options of one token, the same in every row, are compared in one forward (`choices`); others take a row each.
    """
    criterion = goal if goal in ("hinge", "accuracy") else None
    build = _rewarded(accuracy) if goal == "accuracy" else None
    if kind == "image":
        return Goal(Pixels(examples, tokenizer), PixelCollator(criterion), build)
    collate = functools.partial(Collator, tokenizer.pad_token_id, kind, position_ids=position_ids, scoring=scoring)
    if goal in GENERATED or reward is not None:
        prompts = Prompts(examples, tokenizer, kind, max_length, context=context, new_tokens=new_tokens, needed=reward is None)
        answerer = Answerer(tokenizer, kind, max_new_tokens=new_tokens, whole_text=reward is not None)
        measure = AnswerMeasure(answerer, reward or GENERATED[goal], penalty)
        return Goal(Asked(prompts), AskedCollator(collate()), _rewarded(measure), measure)
    if goal == "preference":
        assert beta is not None
        return Goal(Pairs(examples, tokenizer, kind, max_length, beta=beta, context=context), collate(), None)
    if packed == "stream":
        length = pack_length(max_length, context)
        return Goal(
            TextStream(examples, tokenizer, length) if callable(examples) else TextRows(examples, tokenizer, length),
            collate(),
            None,
        )
    if packed:
        found = encode(examples, tokenizer, kind, pack_length(max_length, context), context=context)
        return Goal(Packs(found), collate(), None)
    rows = encode(examples, tokenizer, kind, max_length, context=context)
    if goal == "answer" or kind == "classification":
        return Goal(rows, collate(criterion=criterion), build)
    several = goal == "accuracy" and any(isinstance(e, Example) and len(e.right) > 1 for e in examples)
    if rows.choices is not None and not several:
        return Goal(rows, collate(choices=rows.choices, criterion=criterion), build)
    if goal == "hinge":
        raise DataError(
            f"objective hinge compares label words of one token, the same in every row, and '{name}' has other options: give "
            "`words` that the tokenizer knows, or objective choice"
        )
    if kind == "masked":
        raise DataError(same_words(name))
    return Goal(Candidates(examples, tokenizer, kind, max_length, context=context), collate(), build)


def settled(goal: Goal, model: Any, view: ParamView, kind: Kind, batch_size: int) -> Goal:
    """The goal with what takes the model as it is at the start: the reference log-likelihoods of pairs (a forward of each end),
    how packed rows are kept apart, or what the base answers to prompts. Raises ConfigError where they cannot be."""
    if isinstance(goal.rows, Asked) and goal.measure is not None and goal.measure.penalty:
        goal.rows.answer(Engine(model, view, kind), goal.measure.answerer, goal.collator.plain, batch_size)
    if isinstance(goal.rows, Pairs):
        refer(goal.rows, model, view, kind, goal.collator, batch_size)
    if isinstance(goal.rows, Packs):
        return replace(goal, collator=kept_apart(goal.rows, goal.collator, model, view))
    return goal


def reward_of(config: RunConfig) -> Reward | None:
    """The reward that a configuration names, None where it names none. Raises ConfigError where it cannot be had."""
    return None if config.reward is None else Reward(config.reward)


def failed(folder: Path) -> int:
    """How many values of a run's transcript are no finite number: candidates that lost because an answer of theirs had no
    reward; with methods that ask for each example, answers without one."""
    return sum(not math.isfinite(value) for record in journal.read(folder / JOURNAL).steps() for value in record.values)


def _rewarded(measure: Measure) -> Build:
    return lambda engine, batches: RewardObjective(engine, batches, measure)
