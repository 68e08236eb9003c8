"""Data: rows of any source -> examples -> encoded batches.

Rows come from .jsonl, .json, .csv, .tsv, .parquet and .txt files, folders, hub ids and weighted lists of these; their
columns say what they are. Only the answer of an example carries loss: prompt and answer are tokenised as one text, and
a token belongs to the answer if it ends after the boundary. Order and choice of rows come from hashes of their content,
never from a random state. `datasets` is imported for hub ids only, torch in the Collator only.

Does not do: images, tool schemas, packing of several rows into one, masked-language-model noise.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from smidgen import tasks
from smidgen.config import ConfigError, DataError, RunConfig, Source, nearest, notice
from smidgen.tasks import Example, Row, Task
from smidgen.tasks._example import read_jsonl

if TYPE_CHECKING:
    import torch

__all__ = [
    "Chat",
    "Collator",
    "Corpus",
    "Encoded",
    "choose_max_length",
    "describe",
    "encode",
    "encode_options",
    "encode_prompts",
    "open_corpus",
    "read_rows",
    "split_rows",
    "take",
    "to_examples",
]

DataSpec = str | Path | Source | Sequence["str | Source"]

SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 500  # chosen: a tenth of the rows, enough for +-2 points of accuracy
LENGTH_SHARE, LENGTH_MOST = 0.95, 1024  # chosen: one row in twenty is cut rather than pad all to the longest
IGNORED = -100  # label of a position without loss, as in transformers

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
_EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_ACCEPTED = (
    "messages | conversations | prompt+completion | prompt+chosen+rejected | instruction(+input)+output | text+label | text"
)


# ---------------------------------------------------------------------------------------------------- reading


def read_rows(source: DataSpec, split: str | None = None) -> list[Row]:
    """All rows of a file, a folder, a hub id, or of several one after another.

    split names a split of a folder or hub id ('dev' and 'val' mean 'validation'); a lone file is a train split.
    Raises DataError: missing, empty, malformed (with file and line), no such split.
    """
    if not isinstance(source, str | Path | Source):
        return [row for part in source for row in read_rows(part, split)]
    name = str(source.path if isinstance(source, Source) else source)
    wanted = canonical_split(split) if split is not None else None
    path = Path(name).expanduser()
    if path.is_file() or path.is_dir():
        files = _split_files(path)
        if wanted is None:
            wanted = "train" if "train" in files else next(iter(files))
        if wanted not in files:
            raise DataError(f"'{name}' has no {wanted} split: it has {', '.join(files)}")
        rows = [row for file in files[wanted] for row in _read_file(file)]
    else:
        rows = _read_hub(*_hub_id(name), wanted or "train")
    if not rows:
        raise DataError(f"'{name}' is empty: at least one row is needed")
    return rows


def has_split(source: DataSpec, split: str) -> bool:
    """Whether every part of a source has this split."""
    if not isinstance(source, str | Path | Source):
        return all(has_split(part, split) for part in source)
    name = str(source.path if isinstance(source, Source) else source)
    path = Path(name).expanduser()
    if path.is_file() or path.is_dir():
        return split in _split_files(path)
    import datasets

    hub_id, configuration = _hub_id(name)
    return split in _ask_hub(name, lambda: datasets.get_dataset_split_names(hub_id, configuration))


def canonical_split(split: str) -> str:
    """'train', 'validation' or 'test'. Raises ConfigError for any other name."""
    for name, spellings in _SPLIT_NAMES.items():
        if split.lower() in spellings:
            return name
    raise ConfigError(f"unknown split '{split}': there are train, validation (dev) and test")


def _split_files(path: Path) -> dict[str, list[Path]]:
    """Files of each split. A file whose name starts with no split's name makes the whole folder a train split."""
    if path.is_file():
        return {"train": [path]}
    files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in _EXTENSIONS)
    if not files:
        raise DataError(f"the folder '{path}' holds no data file: it may hold {' '.join(_EXTENSIONS)}")
    found: dict[str, list[Path]] = {}
    for split, spellings in _SPLIT_NAMES.items():
        pattern = re.compile(rf"(?:{'|'.join(spellings)})(?:[-_.]?\d.*)?$", re.IGNORECASE)  # shards are numbered
        if chosen := [file for file in files if pattern.match(file.stem)]:
            found[split] = chosen
    return found or {"train": files}


def _read_file(path: Path) -> list[Row]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            return read_jsonl(path)
        if suffix == ".json":
            return _read_json(path)
        if suffix in (".csv", ".tsv"):
            return _read_csv(path, "\t" if suffix == ".tsv" else ",")
        if suffix == ".txt":
            return _read_text(path)
        if suffix == ".parquet":
            return _read_parquet(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}): save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    raise DataError(f"'{path}' is no data file: it may be {' '.join(_EXTENSIONS)}")


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        values = json.loads(text)
    except ValueError as error:
        first = next((line for line in text.splitlines() if line.strip()), "")
        try:
            json.loads(first)
        except ValueError:
            raise DataError(f"{path}: not JSON ({error}): a list of objects, or one object a line") from None
        return read_jsonl(path)  # JSON Lines under the other name
    if isinstance(values, dict):
        lists = [v for v in values.values() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)]
        values = lists[0] if len(lists) == 1 else [values]
    if not isinstance(values, list):
        raise DataError(f"{path}: holds one {type(values).__name__}: write a list of objects")
    for number, row in enumerate(values, 1):
        if not isinstance(row, dict):
            raise DataError(f'{path}: entry {number} is not an object: write {{"column": value}}')
    return [Row(row, f"{path}: entry {number}") for number, row in enumerate(values, 1)]


def _read_csv(path: Path, delimiter: str) -> list[Row]:
    rows = []
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KB is shorter than a long document
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter=delimiter)
            for values in reader:
                if None in values:
                    extra = values[None]  # type: ignore[index]
                    raise DataError(
                        f"{path}:{reader.line_num}: {len(extra)} field(s) more than the header's "
                        f"{len(reader.fieldnames or ())}: quote a field that holds a '{delimiter}'"
                    )
                rows.append(Row(values, f"{path}:{reader.line_num}"))
    except csv.Error as error:
        raise DataError(f"{path}: not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _read_text(path: Path) -> list[Row]:
    """Documents: paragraphs where blank lines separate them, else lines."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    content = [number for number, line in enumerate(lines, 1) if line.strip()]
    if not content:
        return []
    if len(content) == content[-1] - content[0] + 1:
        return [Row({"text": lines[number - 1]}, f"{path}:{number}") for number in content]
    rows: list[Row] = []
    for number in content:
        if rows and lines[number - 2].strip():
            rows[-1]["text"] += "\n" + lines[number - 1]
        else:
            rows.append(Row({"text": lines[number - 1]}, f"{path}:{number}"))
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        records = pyarrow.parquet.read_table(path).to_pylist()  # `datasets` would leave a copy in its cache
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file: {error}") from None
    return [Row(record, f"{path}: row {number}") for number, record in enumerate(records, 1)]


def _hub_id(name: str) -> tuple[str, str | None]:
    """(owner/name, configuration) of a hub id; DataError for a name that can only be a missing file."""
    path = Path(name).expanduser()
    matched = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", name)
    local = path.suffix.lower() in _EXTENSIONS or name.startswith((".", "~", "/")) or Path(path.parts[0]).is_dir()
    if matched and not local:
        return matched[1], matched[2]
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, beside) or nearest(name, tasks.names())
    hint = f"did you mean '{path.parent / close if close in beside else close}'?" if close else "check the path"
    raise DataError(f"there is no file, folder or task '{name}': {hint} (a hub id is owner/name)")


def _read_hub(hub_id: str, configuration: str | None, split: str) -> list[Row]:
    import datasets

    name = hub_id + (f":{configuration}" if configuration else "")
    table = _ask_hub(name, lambda: datasets.load_dataset(hub_id, configuration, split=split))
    return [Row(record, f"{name} {split} row {number}") for number, record in enumerate(table, 1)]


def _ask_hub(name: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:  # the hub's clients raise their own, the HTTP library's and built-in errors
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"the hub's data set '{name}' cannot be read ({type(error).__name__}: {reason}): check the name "
            "(owner/name or owner/name:configuration), the split and the network, or give a local file or folder"
        ) from None


# ---------------------------------------------------------------------------------------------------- splits


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


def mix(parts: Sequence[Sequence[Row]], weights: Sequence[float], seed: int) -> list[Row]:
    """One epoch of several sources, spread evenly: source k shows each row weights[k] times (a part of one by hash)."""
    if len(parts) == 1 and weights[0] == 1:
        return list(parts[0])
    placed: list[tuple[float, int, int, Row]] = []
    for source, (rows, weight) in enumerate(zip(parts, weights, strict=True)):
        share = list(rows) * int(weight)
        share += take(list(rows), round((weight - int(weight)) * len(rows)))
        for index, row in enumerate(share):
            jitter = row_hash({"source": source, "index": index}, f"mix {seed}") / 2**64
            placed.append(((index + jitter) / len(share), source, index, row))
    return [row for *_, row in sorted(placed, key=lambda entry: entry[:3])]


@dataclass
class _Splits:
    """Reader of a run's rows: own splits where the source has them, else a part of its training rows held out."""

    data: Sequence[str | Source]
    eval_data: DataSpec | None
    seed: int
    notify: Callable[[str], None]
    _read: dict[str, list[Row]] = field(default_factory=dict)

    def rows(self, split: str) -> list[Row]:
        split = canonical_split(split)
        if split not in self._read:
            if split == "test":
                self._read[split] = read_rows(self.data, "test")
            elif split == "validation" and self.eval_data is not None:
                named = has_split(self.eval_data, "validation")
                self._read[split] = read_rows(self.eval_data, "validation" if named else None)
            elif split == "validation" and has_split(self.data, "validation"):
                self._read[split] = read_rows(self.data, "validation")
            else:
                self._read_training()
        return self._read[split]

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


@dataclass
class Corpus:
    """What a run reads. task: the labelled task, or None where answers are free text."""

    name: str
    task: Task | None
    rows: Callable[[str], list[Row]]
    limits: Mapping[str, int | None] = field(default_factory=dict)
    notify: Callable[[str], None] = notice

    @property
    def words(self) -> tuple[str, ...] | None:
        """Label words in class order; None where answers are free text."""
        return self.task.words if self.task is not None else None

    def examples(self, split: str) -> list[Example | Chat]:
        """Examples of 'train', 'validation' (or 'dev') or 'test', as many as the run wants. Raises DataError."""
        split = canonical_split(split)
        if self.task is not None:
            found: list[Example | Chat] = list(self.task.examples(split))
        else:
            found, remarks = to_examples(self.rows(split))
            for line in remarks:
                self.notify(f"{self.name}, {split}: {line}")
        return take(found, self.limits.get(split), _content)


def _content(example: Example | Chat) -> Any:
    return list(example.messages) if isinstance(example, Chat) else [example.prompt, example.answer]


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
    sources: Sequence[str | Source] = [data] if isinstance(data, str) else data or []
    limits = {"train": config.train_rows, "validation": config.dev_rows, "test": config.test_rows}
    splits = _Splits(sources, config.eval_data, config.seed, notify)
    title = ", ".join(source.path if isinstance(source, Source) else source for source in sources)
    if name is None:
        columns = _columns(splits.rows("train"))
        if "label" in columns and ("text" in columns or "template" in chosen):
            name = "labelled"
        elif chosen:
            raise ConfigError(
                f"`{next(iter(chosen))}` is for labelled rows, and '{title}' has the columns {', '.join(columns)}: "
                "add a column label, or leave it out"
            )
        else:
            return Corpus(title, None, splits.rows, limits, notify)
    task = _build_task(name, chosen, title or None)
    splits.data = sources or [task.source]
    task.read = lambda source, split: splits.rows(split)
    return Corpus(name if name != "labelled" else title, task, splits.rows, limits, notify)


def _build_task(name: str, chosen: Mapping[str, Any], source: str | None) -> Task:
    module = tasks.get(name)
    accepted = module.Config.model_fields
    for key in chosen:
        if key not in accepted:
            raise ConfigError(f"the task '{name}' has no option '{key}': it has {', '.join(accepted) or 'none'}")
    values = dict(chosen) | ({"source": source} if source is not None and "source" in accepted else {})
    try:
        return module.build(module.Config(**values))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"task '{name}': {first['loc'][0]} = {first['input']!r}: {first['msg']}") from None


# ---------------------------------------------------------------------------------------------------- columns


@dataclass(frozen=True)
class Chat:
    """A conversation, rendered by the tokenizer's chat template; every assistant turn carries loss."""

    messages: tuple[dict[str, Any], ...]
    place: str


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
        return _chat(row["messages"], "role", "content", row.place)
    if "conversations" in columns:
        return _chat(row["conversations"], "from", "value", row.place)
    if {"prompt", "chosen"} <= columns:
        remarks["preference data: trained on 'chosen', 'rejected' is not used"] += 1
        return _completion(row, "prompt", "chosen", remarks)
    if {"prompt", "completion"} <= columns:
        return _completion(row, "prompt", "completion", remarks)
    if {"instruction", "output"} <= columns:
        return _instruction(row)
    if "text" in columns:
        return Example(prompt="", answer=_text(row, "text"))
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


def _text(row: Row, column: str) -> str:
    value = row[column]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{row.place}: '{column}' is {str(value)[:40]!r}: text is needed")


def _completion(row: Row, first: str, second: str, remarks: Counter[str]) -> Example | Chat:
    if isinstance(row[first], list) or isinstance(row[second], list):  # trl's conversational form
        turns = [
            part if isinstance(part, list) else [{"role": role, "content": part}]
            for part, role in ((row[first], "user"), (row[second], "assistant"))
        ]
        shared = turns[1][: len(turns[0])] == turns[0]
        return _chat(turns[1] if shared else turns[0] + turns[1], "role", "content", row.place)
    prompt, answer = _text(row, first), _text(row, second)
    if prompt and answer and not prompt[-1].isspace() and not answer[0].isspace() and prompt[-1].isascii():
        remarks[f"'{first}' and '{second}' meet without a space and are joined as they are"] += 1
    bare = prompt.rstrip()
    return Example(prompt=bare, answer=prompt[len(bare) :] + answer)


def _instruction(row: Row) -> Example:
    """The prompt of Stanford Alpaca, with and without input."""
    instruction, context = _text(row, "instruction"), _text(row, "input") if row.get("input") else ""
    opening = "Below is an instruction that describes a task"
    if context:
        opening += ", paired with an input that provides further context"
    prompt = f"{opening}. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    if context:
        prompt += f"### Input:\n{context}\n\n"
    return Example(prompt=prompt + "### Response:", answer="\n" + _text(row, "output"))


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _chat(turns: Any, role_key: str, text_key: str, place: str) -> Chat:
    messages = []
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: {str(turns)[:40]!r} is no conversation: a list of turns is needed")
    for turn in turns:
        if not isinstance(turn, dict) or role_key not in turn or not isinstance(turn.get(text_key), str):
            raise DataError(f"{place}: turn {str(turn)[:60]!r}: it needs '{role_key}' and '{text_key}', both text")
        role = turn[role_key]
        rest = {key: value for key, value in turn.items() if key not in (role_key, text_key)}
        messages.append({"role": _ROLES.get(role, role), "content": turn[text_key]} | rest)
    return Chat(tuple(messages), place)


# ---------------------------------------------------------------------------------------------------- encoding


@dataclass
class _Draft:
    """One row before it is cut: head and foot are the tokenizer's own tokens, ids carry `labels` (IGNORED: no loss)."""

    index: int
    head: list[int]
    ids: list[int]
    labels: list[int]
    foot: list[int] = field(default_factory=list)
    option: int = 0
    target: list[int] | None = None  # decoder tokens of a seq2seq row

    @property
    def length(self) -> int:
        return len(self.head) + len(self.ids) + len(self.foot)

    @property
    def core(self) -> int:
        """Where the last answer begins; nothing from here on is cut at the left."""
        last = max(position for position, label in enumerate(self.labels) if label != IGNORED)
        while last > 0 and self.labels[last - 1] != IGNORED:
            last -= 1
        return last


class Encoded:
    """Encoded rows, list-like: ``rows[i]`` is a dict of python lists (ids are kept as 4-byte integers).

    kind; max_length; choices: token ids of the options where every option is one token, the same for all rows;
    index: example of each row; option: option of each row (encode_options only); notices: what was cut or left out.
    """

    def __init__(self, kind: str, max_length: int):
        self.kind = kind
        self.max_length = max_length
        self.choices: tuple[int, ...] | None = None
        self.index: list[int] = []
        self.option: list[int] = []
        self.notices: list[str] = []
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
    A row that is too long loses tokens at the left of its prompt, after the start token, never of its answer; an answer
    that is too long by itself is cut at the right; a text without prompt is cut into blocks; a class row is cut as its
    tokenizer does. Raises DataError: nothing left to learn from, a label word of several tokens for a masked model.
    """
    if not examples:
        raise DataError("no examples to encode: the data set is empty")
    if kind == "classification":
        return _encode_classes(examples, tokenizer, max_length, context)
    drafts, choices, remarks = _drafts(examples, tokenizer, kind)
    limit = _limit([draft.length for draft in drafts], max_length, context)
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
    drafts, _, remarks = _drafts([example for *_, example in spread], tokenizer, kind)
    if len(drafts) != len(spread):
        raise DataError(f"an option has no token of its own: {'; '.join(remarks)}")
    longest: Counter[int] = Counter()
    for (index, option, _), draft in zip(spread, drafts, strict=True):
        draft.index, draft.option = index, option
        longest[index] = max(longest[index], len(draft.ids) - draft.core if draft.target is None else 0)
    limit = _limit([draft.length for draft in drafts], max_length, context)
    encoded = Encoded(kind, limit)
    cut = Counter[str]()
    for draft in drafts:
        _place(encoded, draft, cut, reserve=longest[draft.index])
    encoded.notices += [f"{count} of {len(spread)} options: {line}".format(limit=limit) for line, count in cut.items()]
    return encoded


def encode_prompts(examples: Sequence[Example | Chat], tokenizer: Any, kind: str, max_length: int | None = None) -> Encoded:
    """Prompts alone, to be continued by generation ('causal', 'seq2seq'); the left is cut beyond max_length."""
    head, foot = _frame(tokenizer)
    prompts = [_question(example, tokenizer)[0] for example in examples]
    drafts = []
    for index, (ids, _) in enumerate(_tokenise(tokenizer, prompts, offsets=False)):
        rendered = isinstance(examples[index], Chat)
        draft = _Draft(index, [] if rendered else head, ids, [], foot if kind == "seq2seq" else [])
        if not draft.length:
            raise DataError(f"example {index + 1} has no prompt to continue, and the model has no start token")
        drafts.append(draft)
    encoded = Encoded(kind, max_length or max(draft.length for draft in drafts))
    for draft in drafts:
        room = max(1, encoded.max_length - len(draft.head) - len(draft.foot))
        encoded._add(draft.index, 0, input_ids=draft.head + draft.ids[-room:] + draft.foot)
    return encoded


def _limit(lengths: Sequence[int], max_length: int | None, context: int | None) -> int:
    if max_length is not None and context is not None and max_length > context:
        raise ConfigError(f"max_length {max_length} is above the model's {context} positions: give at most {context}")
    return max_length if max_length is not None else choose_max_length(lengths or [2], context)


def _place(encoded: Encoded, draft: _Draft, cut: Counter[str], reserve: int = 0) -> None:
    """Cut a draft to max_length and add it as a row, or as several blocks."""
    limit, kind = encoded.max_length, encoded.kind
    room = max(1, limit - len(draft.head) - len(draft.foot))
    ids, labels = draft.ids, draft.labels
    if draft.target is not None:
        if len(ids) > room:
            cut["longer than {limit} tokens, the left of the prompt is cut"] += 1
        if len(draft.target) > limit:
            cut["an answer longer than {limit} tokens, its right is cut"] += 1
        encoded._add(draft.index, draft.option, input_ids=draft.head + ids[-room:] + draft.foot, labels=draft.target[:limit])
        return
    core = draft.core
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


def _add_labelled(encoded: Encoded, draft: _Draft, ids: list[int], labels: list[int]) -> bool:
    labels = [IGNORED] * len(draft.head) + labels + [IGNORED] * len(draft.foot)
    if encoded.kind == "causal":
        labels[0] = IGNORED  # nothing comes before it to predict it from
    if all(label == IGNORED for label in labels):
        return False
    encoded._add(draft.index, draft.option, input_ids=draft.head + ids + draft.foot, labels=labels)
    return True


def _drafts(
    examples: Sequence[Example | Chat], tokenizer: Any, kind: str
) -> tuple[list[_Draft], tuple[int, ...] | None, list[str]]:
    """(drafts, choices, notices)"""
    builders = {
        "causal": _causal_drafts,
        "masked": _masked_drafts,
        "seq2seq": _seq2seq_drafts,
    }
    if kind not in builders:
        raise ConfigError(f"unknown kind '{kind}': one of {', '.join(builders)}, classification")
    return builders[kind](examples, tokenizer)


Drafts = tuple[list[_Draft], tuple[int, ...] | None, list[str]]


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer itself puts before and after a text."""
    bare, framed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    return [], []


def _tokenise(
    tokenizer: Any, texts: Sequence[str], *, offsets: bool = True
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """(ids, character spans) of each text, without the tokenizer's own tokens."""
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


def _causal_drafts(examples: Sequence[Example | Chat], tokenizer: Any) -> Drafts:
    head, _ = _frame(tokenizer)
    texts: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    origin: list[int] = []
    remarks: Counter[str] = Counter()
    for index, example in enumerate(examples):
        if isinstance(example, Chat):
            for text, found in _render(example, tokenizer, remarks):
                texts.append(text)
                spans.append(found)
                origin.append(index)
            continue
        if example.options is not None and not example.prompt:
            raise ConfigError("the template has nothing before its {answer} slot: a causal model reads left to right")
        texts.append(example.prompt + example.answer)
        spans.append([(len(example.prompt), len(texts[-1]))] if example.answer.strip() else [])
        origin.append(index)
    added = set(tokenizer.added_tokens_decoder)  # end-of-turn tokens are among these
    drafts = []
    for index, found, (ids, places) in zip(origin, spans, _tokenise(tokenizer, texts), strict=True):
        example = examples[index]
        labels = [token if _in_spans(end, found) else IGNORED for token, (_, end) in zip(ids, places, strict=True)]
        if all(label == IGNORED for label in labels):
            remarks["no answer to learn from, left out"] += 1
            continue
        closed = example.options is not None if isinstance(example, Example) else labels[-1] == IGNORED
        if not closed and tokenizer.eos_token_id is not None and ids[-1] not in added:
            ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
        last = max(position for position, label in enumerate(labels) if label != IGNORED)
        drafts.append(_Draft(index, [] if isinstance(example, Chat) else head, ids[: last + 1], labels[: last + 1]))
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
    ((ids, places),) = _tokenise(tokenizer, [prompt + option + suffix])
    span = [(len(prompt), len(prompt + option))]
    return (
        [token for token, (_, end) in zip(ids, places, strict=True) if end <= len(prompt)],
        [token for token, (_, end) in zip(ids, places, strict=True) if _in_spans(end, span)],
    )


def _labelled(examples: Sequence[Example | Chat], kind: str) -> list[Example]:
    """The examples, if all have options. Raises DataError."""
    for example in examples:
        if isinstance(example, Chat) or example.options is None or example.gold is None:
            raise DataError(
                f"a {kind} model needs labelled rows (a task, or columns text and label), and these have free-text "
                "answers: use a causal or seq2seq model"
            )
    return [example for example in examples if isinstance(example, Example)]


def _masked_drafts(examples: Sequence[Example | Chat], tokenizer: Any) -> Drafts:
    rows = _labelled(examples, "masked")
    if tokenizer.mask_token_id is None:
        raise ConfigError(f"{type(tokenizer).__name__} has no mask token: use --kind causal or classification")
    head, foot = _frame(tokenizer)
    vocabulary: dict[str, int] = {}
    drafts = []
    texts = [example.prompt + example.answer + example.suffix for example in rows]
    for index, (example, (ids, places)) in enumerate(zip(rows, _tokenise(tokenizer, texts), strict=True)):
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
        drafts.append(_Draft(index, head, ids, labels, foot))
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
    head, foot = _frame(tokenizer)
    pairs = [_question(example, tokenizer) for example in examples]
    drafts, empty = [], 0
    for index, (ids, _) in enumerate(_tokenise(tokenizer, [prompt for prompt, _ in pairs], offsets=False)):
        answer = pairs[index][1].strip()
        if not answer:
            empty += 1
            continue
        if not ids:
            raise DataError(f"example {index + 1} has an answer and no prompt: a seq2seq model needs one; use a causal model")
        target = list(tokenizer(text_target=answer)["input_ids"])
        if tokenizer.eos_token_id is not None and target[-1] != tokenizer.eos_token_id:
            target.append(tokenizer.eos_token_id)
        drafts.append(_Draft(index, head, ids, [], foot, target=target))
    return drafts, None, [f"{empty} of {len(examples)} rows: no answer to learn from, left out"] if empty else []


def _encode_classes(examples: Sequence[Example | Chat], tokenizer: Any, max_length: int | None, context: int | None) -> Encoded:
    """Rows for sequence classification: one or two texts, cut as the tokenizer cuts."""
    rows = _labelled(examples, "classification")
    first = [example.text[0] if example.text else example.prompt for example in rows]
    second = ["\n".join(example.text[1:]) for example in rows]
    pair = any(second)
    whole = tokenizer(first, second if pair else None, verbose=False)["input_ids"]
    encoded = Encoded("classification", _limit([len(ids) for ids in whole], max_length, context))
    fitted = tokenizer(first, second if pair else None, truncation=True, max_length=encoded.max_length)
    for index, example in enumerate(rows):
        columns: dict[str, Any] = {"input_ids": fitted["input_ids"][index], "labels": example.gold}
        if "token_type_ids" in fitted:
            columns["token_type_ids"] = fitted["token_type_ids"][index]
        encoded._add(index, 0, **columns)
    cut = sum(len(ids) > encoded.max_length for ids in whole)
    if cut:
        encoded.notices.append(f"{cut} of {len(rows)} rows: longer than {encoded.max_length} tokens, cut at the end")
    return encoded


# ---------------------------------------------------------------------------------------------------- chat


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


def _render(chat: Chat, tokenizer: Any, remarks: Counter[str]) -> list[tuple[str, list[tuple[int, int]]]]:
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


def _turn_end(text: str, tokenizer: Any) -> int:
    """End of a turn: white space after an end-of-turn token is never generated."""
    bare = text.rstrip()
    if any(bare.endswith(str(token)) for token in tokenizer.added_tokens_decoder.values()):
        return len(bare)
    return len(text)


def _question(example: Example | Chat, tokenizer: Any) -> tuple[str, str]:
    """(prompt, answer) as text; of a conversation its last assistant turn, '' if it has none."""
    if isinstance(example, Example):
        return example.prompt, example.answer
    turns = [index for index, message in enumerate(example.messages) if message["role"] == "assistant"]
    end = turns[-1] if turns else len(example.messages)
    prompt = _apply(example.messages[:end], tokenizer, example.place, ask=True) if end else ""
    return prompt, example.messages[end]["content"] if turns else ""


# ---------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Collator:
    """Rows -> batch of int64 tensors: input_ids, attention_mask [B, T], labels [B, T] or [B] for classification.

    Pads at the left for 'causal', so that answers end at one position, else at the right. choices: token ids that the
    batch carries along, [C]. position_ids: count positions from the first real token; needed by models that number
    positions by place (GPT-2, GPT-Neo); ignored for other kinds, which are padded at the right.
    """

    pad_id: int
    kind: str
    choices: tuple[int, ...] | None = None
    position_ids: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        mask = [[1] * len(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": self._pad([row["input_ids"] for row in rows], width, self.pad_id),
            "attention_mask": self._pad(mask, width, 0),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self._pad([row["token_type_ids"] for row in rows], width, 0)
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            if self.kind == "classification":
                batch["labels"] = torch.tensor(labels)
            else:
                batch["labels"] = self._pad(labels, max(len(row) for row in labels), IGNORED)
        if self.position_ids and self.kind == "causal":
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_(min=0)
        if self.choices is not None:
            batch["choices"] = torch.tensor(self.choices)
        return batch

    def _pad(self, rows: Sequence[Sequence[int]], width: int, value: int) -> torch.Tensor:
        import torch

        if self.kind == "causal":
            return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows])
        return torch.tensor([list(row) + [value] * (width - len(row)) for row in rows])


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
        "histogram": [(i * step + 1, (i + 1) * step, bins[i]) for i in range(max(bins) + 1)],
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
