"""Data: what a run reads. A task, or rows that are recognised by their columns, become examples.

Labelled rows (columns text and label, or a template; columns image and label) are a task's; rows of every other accepted
column set have free-text answers. Does not do: tool schemas.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smidgen import tasks
from smidgen.chat import Chat, as_turn
from smidgen.config import ConfigError, DataError, RunConfig, Source, nearest, notice
from smidgen.rows import canonical_split
from smidgen.splits import Splits, take
from smidgen.streaming import Streaming
from smidgen.tasks import Example, Pair, Row, Task
from smidgen.tasks._conversation import continued, text_of, turns_of
from smidgen.tasks._example import column

__all__ = ["Corpus", "open_corpus", "to_examples"]

_ACCEPTED = (
    "messages | conversations | prompt+completion | prompt+chosen+rejected | instruction(+input)+output | text+label | "
    "image+label | text"
)


@dataclass
class Corpus:
    """What a run reads. task: the task, or None where rows are recognised by their columns.

    rows(split) reads the rows as they are, has(split) says whether there are any with answers. chat: the form of a
    conversation that prompts are put into (`smidgen.chat.as_turn`).
    """

    name: str
    task: Task | None
    rows: Callable[[str], list[Row]]
    has: Callable[[str], bool]
    limits: Mapping[str, int | None] = field(default_factory=dict)
    notify: Callable[[str], None] = notice
    chat: str = "none"
    streaming: Streaming | None = None

    @property
    def words(self) -> tuple[str, ...] | None:
        """Label words in class order; None where answers are free text, or each row has options of its own."""
        return self.task.words if self.task is not None else None

    @property
    def pictures(self) -> bool:
        """Whether its rows are pictures."""
        return getattr(self.task, "pictures", False)

    @property
    def beta(self) -> float | None:
        """Of direct preference optimisation where rows are pairs; else None."""
        return getattr(self.task, "beta", None)

    def fingerprint(self, split: str) -> str:
        """Hex digest of a split's examples, as a causal model is asked: equal where two runs read the same rows alike."""
        canonical = canonical_split(split)
        rows = self.task.examples(canonical, "causal") if self.task is not None else to_examples(self.rows(canonical))[0]
        digest = hashlib.sha256()
        for example in take(list(rows), self.limits.get(canonical), _content):
            digest.update(json.dumps(_content(example), default=str).encode())
        return digest.hexdigest()

    def examples(self, split: str, kind: str = "causal", tokenizer: Any = None) -> list[Example | Chat | Pair]:
        """Examples of 'train', 'validation' (or 'dev') or 'test', as many as the run wants, asked as a kind is asked.

        tokenizer: the model's, needed for chat 'model'. Raises DataError, ConfigError.
        """
        split = canonical_split(split)
        if self.task is not None:
            found: list[Example | Chat | Pair] = list(self.task.examples(split, kind))
        else:
            read, remarks = to_examples(self.rows(split))
            found = list(read)
            for line in remarks:
                self.notify(f"{self.name}, {split}: {line}")
        found = take(found, self.limits.get(split), _content)
        if self.chat == "none" or (self.task is not None and not self.task.judged):  # conversations carry no form
            return found
        if kind in ("masked", "classification", "image"):
            raise ConfigError(f"chat {self.chat}: a {kind} model has no conversations: leave `chat` out")
        plain = [example for example in found if isinstance(example, Example)]
        if len(plain) < len(found):
            raise ConfigError(f"chat {self.chat}: the rows of {self.name} are conversations already: leave `chat` out")
        return list(as_turn(plain, self.chat, tokenizer))

    def texts(self, split: str) -> list[str]:
        """The text of the rows of a split, for a text stream. Raises DataError for rows without text, ConfigError for tasks."""
        if self.task is not None:
            raise ConfigError(
                f"packing = stream takes rows of text, and '{self.name}' is a task with labels: leave packing out"
            )
        rows = self.rows(split)
        return [column(row, "text") for row in take(rows, self.limits.get(canonical_split(split)))]

    def training_texts(self) -> list[str] | Callable[[int], Iterator[str]]:
        """The texts of training rows; where they are streamed, a function of the pass that gives them."""
        return self.texts("train") if self.streaming is None else self.stream

    def stream(self, epoch: int) -> Iterator[str]:
        """The text of training rows, read as it is asked for. Raises DataError for rows without text."""
        assert self.streaming is not None
        for row in self.streaming.rows("train", self.limits["train"], epoch):
            yield column(row, "text")


def _content(example: Example | Chat | Pair) -> Any:
    if isinstance(example, Pair):
        return [list(example.chosen.messages), list(example.rejected.messages)]
    if isinstance(example, Chat):
        return list(example.messages)
    return [example.prompt, example.answer, *([] if example.image is None else [str(example.image)])]


def open_corpus(config: RunConfig, *, notify: Callable[[str], None] = notice) -> Corpus:
    """The task and rows that a configuration names: its `task`, or `data` recognised by its columns.

    Raises ConfigError: neither given, unknown task, options that the task does not have; DataError on reading.
    """
    name, data = config.task, config.data
    if name is None and isinstance(data, str) and data in tasks.names() and not Path(data).exists():
        name, data = data, None
    if name is None and data is None:
        raise ConfigError("nothing to read: give a task (--task reviews) or data (--data FILE)")
    chosen = {key: value for key in ("template", "words") if (value := getattr(config, key)) is not None}
    for key, value in config.task_args.items():
        if key in chosen or key == "source":
            raise ConfigError(f"task_args.{key} = {value!r}: give it as `{'data' if key == 'source' else key}`, once")
        chosen[key] = value
    sources: Sequence[str | Source] = [data] if isinstance(data, str) else data or []
    limits = {"train": config.train_rows, "validation": config.dev_rows, "test": config.test_rows}
    if config.streaming:
        return _streamed(config, sources, limits, notify)
    splits = Splits(sources, config.eval_data, config.seed, notify)
    title = ", ".join(source.path if isinstance(source, Source) else source for source in sources)
    if name is None:
        columns = _columns(splits.rows("train"))
        if "label" in columns and ("text" in columns or "template" in chosen):
            name = "labelled"
        elif {"image", "label"} <= set(columns):
            name = "images"
        elif chosen:
            raise ConfigError(
                f"`{next(iter(chosen))}` is for labelled rows, and '{title}' has the columns {', '.join(columns)}: "
                "add a column label, or leave it out"
            )
        else:
            if config.benchmark_split:
                raise ConfigError(f"benchmark_split is for tasks with published numbers of rows, and '{title}' is none")
            if config.k_shot is not None:
                raise ConfigError(f"k_shot = {config.k_shot} counts rows of a class, and the rows of '{title}' have no classes")
            return Corpus(title, None, splits.rows, splits.has, limits, notify, config.chat)
    task = _build_task(name, chosen, title or None)
    if not sources and not task.source:
        raise ConfigError(f"the task '{name}' has no rows of its own: give --data FILE")
    splits.data = sources or [task.source]
    if config.benchmark_split:
        splits.sizes = _published(name, config)
    if config.k_shot is not None:
        tested = getattr(tasks.get(name), "SIZES", (None, None, None))[2]
        splits = replace(splits, shots=_shots(task, config), sizes=(None, None, tested), _read={})
    task.read = lambda source, split: splits.rows(split)
    has = functools.partial(_has, splits, name, notify)
    return Corpus(title if name in ("labelled", "images") else name, task, splits.rows, has, limits, notify, config.chat)


def _streamed(
    config: RunConfig, sources: Sequence[str | Source], limits: Mapping[str, int | None], notify: Callable[[str], None]
) -> Corpus:
    """A corpus of text whose training rows are read as the run goes; those for evaluation are read whole."""
    if config.packing != "stream" or config.task is not None:
        raise ConfigError(
            "streaming is for text without a task, cut into rows of one length: set packing=stream, or leave it out"
        )
    if len(sources) != 1 or not isinstance(sources[0], str):
        raise ConfigError("streaming reads one source: give `data` as one file, folder or hub id, or leave streaming out")
    source = Streaming(sources[0], config.seed)
    held = Splits([], config.eval_data, config.seed, notify) if config.eval_data is not None else None

    def rows(split: str) -> list[Row]:
        if held is not None and canonical_split(split) == "validation":
            return held.rows("validation")
        return list(source.rows(split, limits.get(canonical_split(split))))

    return Corpus(sources[0], None, rows, source.has, limits, notify, streaming=source)


def _has(splits: Splits, name: str, notify: Callable[[str], None], split: str) -> bool:
    """Whether a task has this split. Test rows that are published without answers (-1, or nothing) are none."""
    if not splits.has(split) or canonical_split(split) != "test":
        return splits.has(split)
    nothing: tuple[Any, ...] = (-1, "-1", "", [])
    hidden = all(any(row.get(column) in nothing for column in ("label", "answer", "answers")) for row in splits.rows(split))
    if hidden:
        notify(f"{name}: the test rows have no answers and are left out")
    return not hidden


def _published(name: str, config: RunConfig) -> tuple[int, int, int]:
    """Training, dev and test rows of a benchmark's task."""
    sized = [known for known in tasks.names() if hasattr(tasks.get(known), "SIZES")]
    if name not in sized:
        raise ConfigError(f"benchmark_split: no numbers of rows are published for '{name}': {', '.join(sized)} have them")
    if config.eval_data is not None:
        raise ConfigError("benchmark_split and eval_data both say what the dev rows are: give one of the two")
    return tasks.get(name).SIZES


def _shots(task: Task, config: RunConfig) -> tuple[int, Sequence[str]]:
    """Rows of a class, and the columns that may name it."""
    assert config.k_shot is not None
    columns = getattr(task, "label", None)
    if columns is None:
        raise ConfigError(f"k_shot = {config.k_shot} counts rows of a class, and the task '{task.name}' has no classes")
    for key in ("benchmark_split", "eval_data"):
        if getattr(config, key):
            raise ConfigError(f"k_shot and {key} both say what the dev rows are: give one of the two")
    return config.k_shot, columns


def _build_task(name: str, chosen: Mapping[str, Any], source: str | None) -> Task:
    module = tasks.get(name)
    accepted = module.Config.model_fields
    for key in chosen:
        if key not in accepted:
            others = [known for known in tasks.names() if key in tasks.get(known).Config.model_fields]
            elsewhere = f"; '{key}' is an option of {', '.join(others)}" if others else ""
            raise ConfigError(f"the task '{name}' has no option '{key}': it has {', '.join(accepted) or 'none'}{elsewhere}")
    values = dict(chosen) | ({"source": source} if source is not None and "source" in accepted else {})
    try:
        return module.build(module.Config(**values))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"task '{name}': {first['loc'][0]} = {first['input']!r}: {first['msg']}") from None


def to_examples(rows: Sequence[Row]) -> tuple[list[Example | Chat], list[str]]:
    """(examples, notices) of rows with free-text answers, each recognised by its columns.

    Raises DataError where a row has none of the accepted column sets.
    """
    found: list[Example | Chat] = []
    remarks: Counter[str] = Counter()
    for row in rows:
        found.append(_free(row, remarks))
    return found, [f"{count} of {len(rows)} rows: {line}" for line, count in remarks.items()]


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _free(row: Row, remarks: Counter[str]) -> Example | Chat:
    columns = {column for column, value in row.items() if value is not None}
    if "messages" in columns:
        return Chat(turns_of(row["messages"], row.place), row.place)
    if "conversations" in columns:
        return Chat(turns_of(row["conversations"], row.place, "from", "value"), row.place)
    if {"prompt", "chosen"} <= columns:
        remarks["preference data: trained on 'chosen', 'rejected' is not used"] += 1
        return _completion(row, "prompt", "chosen", remarks)
    if {"prompt", "completion"} <= columns:
        return _completion(row, "prompt", "completion", remarks)
    if {"instruction", "output"} <= columns:
        return _instruction(row)
    if "text" in columns:
        return Example(prompt="", answer=text_of(row, "text"))
    raise DataError(f"{row.place}: columns {', '.join(row)}: accepted are {_ACCEPTED}: {_rename(columns)}")


def _rename(columns: Iterable[str]) -> str:
    """The way out: which column is probably one of ours under another name."""
    spelled = {"question": "prompt", "query": "prompt", "answer": "completion", "response": "completion"}
    spelled |= {"sentence": "text", "content": "text", "document": "text", "dialog": "messages"}
    if "label" in columns:
        return "give a `template` that shows the columns, such as '{sentence}\\nLabel: {answer}'"
    known = ["messages", "conversations", "prompt", "completion", "chosen", "instruction", "output", "text"]
    meant = {column: spelled.get(column) or nearest(column, known) for column in sorted(set(columns) - {*known, "context"})}
    found = [f"'{column}' to '{name}'" for column, name in meant.items() if name]
    return f"rename {', '.join(found)}" if found else "rename the columns"


def _completion(row: Row, first: str, second: str, remarks: Counter[str]) -> Example | Chat:
    if isinstance(row[first], list) or isinstance(row[second], list):  # trl's conversational form
        return Chat(continued(row, first, second), row.place)
    prompt, answer = text_of(row, first), text_of(row, second)
    if prompt and answer and not prompt[-1].isspace() and not answer[0].isspace() and prompt[-1].isascii():
        remarks[f"'{first}' and '{second}' meet without a space and are joined as they are"] += 1
    bare = prompt.rstrip()
    return Example(prompt=bare, answer=prompt[len(bare) :] + answer)


def _instruction(row: Row) -> Example:
    """The prompt of Stanford Alpaca, with and without input."""
    instruction, context = text_of(row, "instruction"), text_of(row, "input") if row.get("input") else ""
    opening = "Below is an instruction that describes a task"
    if context:
        opening += ", paired with an input that provides further context"
    prompt = f"{opening}. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    if context:
        prompt += f"### Input:\n{context}\n\n"
    return Example(prompt=prompt + "### Response:", answer="\n" + text_of(row, "output"))
