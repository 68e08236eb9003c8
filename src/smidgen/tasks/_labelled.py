"""Classification by label words: the one implementation behind sst2, rte, reviews and any labelled file.

A template such as ``{sentence} It was {answer}.`` has column slots and one answer slot. A causal model reads the text
before the answer slot and predicts " terrible" or " great"; a masked model reads the whole text with the answer masked;
a sequence classifier reads the raw columns. Prompts with label words: LM-BFF (Gao et al. 2021, arXiv 2012.15723) for
masked models, MeZO (Malladi et al. 2023, arXiv 2305.17333) for causal ones. White space at the left of a prompt and
spaces at its right are removed, line breaks at its right are kept.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from smidgen.config import ConfigError, DataError
from smidgen.tasks._example import Example, Reader, Row, read_folder

ANSWER = "answer"  # name of the answer slot
NOTHING = ""  # the passage of a form of which nothing may be cut


class LabelConfig(BaseModel):
    """The options that tasks with label words share; each adds `words` and `source` with its own defaults."""

    model_config = ConfigDict(extra="forbid")

    template: str | None = Field(None, description="prompt: column slots and one {answer} slot; none: the published one")


@dataclass(frozen=True)
class Form:
    """A template for one kind of model.

    passage: the column that may lose tokens where a row is too long, from the left if it stands before the answer (with
    what stands before it), else from the right; None: anything at the left of the prompt. shapes: what is done to a
    column before it is shown. named: slots whose column has another name. trim: whether columns lose outer white space.
    """

    template: str
    passage: str | None = None
    shapes: Mapping[str, Callable[[str], str]] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    trim: bool = False


def forms(template: str | None, causal: Form, masked: Form | None) -> tuple[Form, Form | None]:
    """The (causal, masked) forms of a task, or a template of the user's for both."""
    return (causal, masked) if template is None else (own(template), own(template))


def own(template: str) -> Form:
    """The form of a template without rules of its own."""
    return Form(template, trim=True)


@dataclass(frozen=True)
class Template:
    """A parsed template: (literal, column) pairs before and after the answer slot."""

    before: tuple[tuple[str, str | None], ...]
    after: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the template shows, in order, each once."""
        return tuple(dict.fromkeys(column for _, column in self.before + self.after if column))

    @property
    def lead(self) -> str:
        """What an answer begins with: a space, unless the slot follows a line break or is glued to what it follows."""
        literal, glued = self.before[-1][0], len(self.before) > 1
        return "" if (literal or glued) and not literal.endswith(" ") else " "


def parse_template(template: str) -> Template:
    """Split a template at its answer slot. Raises ConfigError where it has none, two, or a slot that is no name."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template {template!r}: {error}: write {{{{ for a brace") from None
    before: list[tuple[str, str | None]] = []
    after: list[tuple[str, str | None]] | None = None
    for literal, name, spec, conversion in parts:
        side = before if after is None else after
        if name == ANSWER and after is None and not spec and not conversion:
            side.append((literal, None))
            after = []
        elif name is None:
            side.append((literal, None))
        elif name and name != ANSWER and not spec and not conversion:
            side.append((literal, name))
        else:
            raise ConfigError(f"template {template!r}: slot '{{{name}}}' is not a column: {{column}}s and one {{answer}}")
    if after is None:
        raise ConfigError(f"template {template!r} has no {{answer}} slot: end it with one, as '{{text}}\\nLabel: {{answer}}'")
    found = Template(tuple(before), tuple(after))
    if not found.columns:
        raise ConfigError(f"template {template!r} shows no column of the data: add one, as '{{text}}\\nLabel: {{answer}}'")
    return found


@dataclass
class LabelledTask:
    """A Task whose answers are label words.

    causal, masked: how a row is shown to each kind; seq2seq models read the causal form, sequence classifiers its raw
    columns; masked None: such a model is refused. given: the label words in class order; None infers the classes from
    the training rows, sorted, once: string labels are their own words, integer labels their digits. label: the columns
    that may hold the label, the first that a row has counts. aliases: further spellings of a class, with its index.
    left_out: the integer that marks rows without a label, which are left out.
    """

    name: str
    source: str
    causal: Form
    masked: Form | None
    given: tuple[str, ...] | None = None
    label: tuple[str, ...] = ("label",)
    aliases: Mapping[str, int] = field(default_factory=dict)
    left_out: int | None = None
    read: Reader = read_folder
    choice: bool = True
    free: bool = False
    judged: bool = True
    _classes: dict[str, int] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._parsed = {form.template: parse_template(form.template) for form in (self.causal, self.masked) if form}
        if self.given is not None:
            words = [word.strip() for word in self.given]
            if "" in words or len(set(words)) < max(2, len(words)):
                raise ConfigError(f"label words {list(self.given)}: give at least two, all different and none empty")
            self.given = tuple(words)

    @property
    def words(self) -> tuple[str, ...]:
        """Label words in class order; the first access may read the training rows."""
        return self.given if self.given is not None else tuple(self._inferred())

    def examples(self, split: str, kind: str = "causal") -> list[Example]:
        """Every row of a split as an Example.

        Raises ConfigError: no prompt for a masked model; DataError: empty, no label, foreign label, missing column.
        """
        form = self.masked if kind == "masked" else self.causal
        if form is None:
            raise ConfigError(
                f"task '{self.name}' has no prompt for a masked model here: use --kind classification, or give a `template`"
            )
        rows = self.read(self.source, split)
        if self.left_out is not None:
            rows = [row for row in rows if _integer(self._label(row)) != self.left_out]
        if not rows:
            raise DataError(f"'{self.source}' has no rows with a label in its {split} split")
        lead = self._parsed[form.template].lead
        options = tuple(lead + word for word in self.words)
        return [self._example(row, form, options) for row in rows]

    def metric(self, predictions: Sequence[int], golds: Sequence[int]) -> dict[str, float]:
        """Accuracy and macro F1."""
        return {"accuracy": accuracy(predictions, golds), "macro_f1": macro_f1(predictions, golds)}

    def _example(self, row: Row, form: Form, options: tuple[str, ...]) -> Example:
        parsed = self._parsed[form.template]
        columns = {slot: form.named.get(slot, slot) for slot in parsed.columns}
        missing = [column for column in columns.values() if row.get(column) is None]
        if missing:
            raise DataError(
                f"{row.place}: no column '{missing[0]}' (found: {', '.join(row)}): "
                f"the template is {form.template!r}; give another with `template`"
            )
        fields = {slot: str(row[column]) for slot, column in columns.items()}
        text = tuple(value.strip() for value in fields.values())
        shown = dict(zip(fields, text, strict=True)) if form.trim else fields
        shown |= {column: shape(shown[column]) for column, shape in form.shapes.items()}
        gold = self._class(row)
        before, left = _fill(parsed.before, shown, form.passage)
        after, right = _fill(parsed.after, shown, form.passage)
        prompt = before.lstrip().rstrip(" ")  # line breaks before the answer are kept
        passage: tuple[int, int] | None = None
        if left is not None:
            passage = 0, max(0, min(left[1] - len(before) + len(before.lstrip()), len(prompt)))
        elif right is not None:
            start = len(prompt + options[gold])
            passage = start + right[0], start + right[1]
        elif form.passage == NOTHING:
            passage = 0, 0
        return Example(prompt, options[gold], after, options, gold, text, passage=passage)

    def _class(self, row: Row) -> int:
        """Class index of a row."""
        label = self._label(row)
        words = self.words
        if self.given is None:
            found = self._inferred().get(_spell(label))
        elif _spell(label) in words:
            found = words.index(_spell(label))
        elif _spell(label) in self.aliases:
            found = self.aliases[_spell(label)]
        else:
            index = _integer(label)
            found = index if index is not None and 0 <= index < len(words) else None
        if found is None:
            allowed = ", ".join(words) if len(words) <= 12 else f"{', '.join(words[:12])}, ... ({len(words)} in all)"
            indices = f" or 0 to {len(words) - 1}" if self.given is not None else ""
            way_out = "correct the row, or give `words`" if self.given is not None else "correct it, or add training rows"
            raise DataError(f"{row.place}: label {label!r} is not among the label words: {allowed}{indices}: {way_out}")
        return found

    def _label(self, row: Row) -> str | int:
        return _label(row, next((name for name in self.label if name in row), self.label[0]))

    def _inferred(self) -> dict[str, int]:
        if self._classes is None:
            rows = self.read(self.source, "train")
            values = {_spell(label): label for label in map(self._label, rows)}
            numbers = {word: label for word, label in values.items() if isinstance(label, int)}
            ordered = sorted(numbers, key=numbers.__getitem__) if len(numbers) == len(values) else sorted(values)
            if len(ordered) < 2:
                raise DataError(
                    f"the training rows of '{self.source}' hold {len(ordered)} label value(s) {ordered}: a "
                    "classification needs two or more; give `words`, or rename the column to train on the text alone"
                )
            self._classes = {label: index for index, label in enumerate(ordered)}
        return self._classes


def _fill(
    parts: Sequence[tuple[str, str | None]], fields: Mapping[str, str], passage: str | None
) -> tuple[str, tuple[int, int] | None]:
    """(the text of a half of a template, where the passage stands in it)"""
    text, where = "", None
    for literal, column in parts:
        text += literal
        if column:
            where = (len(text), len(text) + len(fields[column])) if column == passage else where
            text += fields[column]
    return text, where


def _label(row: Row, column: str) -> str | int:
    """The label of a row: a word, or an integer; digits in a text file are an integer."""
    label = row.get(column)
    if label is None or label == "":
        raise DataError(f"{row.place}: row without '{column}' (found: {', '.join(row)}): every row needs one")
    if isinstance(label, bool):
        return label
    index = _integer(label)
    if index is not None:
        return index
    if not isinstance(label, str):
        raise DataError(f"{row.place}: label {label!r} is not a word or a whole number: regression is not supported")
    return label.strip()


def _spell(label: str | int) -> str:
    """The word of a label."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def _integer(label: Any) -> int | None:
    if isinstance(label, int):
        return int(label)  # true is class 1
    if isinstance(label, float) and label.is_integer():
        return int(label)
    if isinstance(label, str) and label.strip().lstrip("-").isdecimal():
        return int(label)
    return None


def accuracy(predictions: Sequence[int], golds: Sequence[int]) -> float:
    """Share of predictions that equal their gold."""
    if len(predictions) != len(golds) or not golds:
        raise ValueError(f"{len(predictions)} predictions for {len(golds)} golds: as many of both, at least one")
    return sum(p == g for p, g in zip(predictions, golds, strict=True)) / len(golds)


def macro_f1(predictions: Sequence[int], golds: Sequence[int]) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN); classes that neither side names are left out."""
    scores = []
    for label in set(predictions) | set(golds):
        hits = sum(p == g == label for p, g in zip(predictions, golds, strict=True))
        scores.append(2 * hits / (sum(p == label for p in predictions) + sum(g == label for g in golds)))
    return sum(scores) / len(scores)
