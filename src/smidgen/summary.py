"""What records say together: a table for each task, with mean and spread over seeds, cost, and who is told apart from whom.

A difference counts when its 95 % interval leaves out zero: Student's t over seeds where both have two or more (pairwise where
they share them), else the standard error over the rows that judged. What does not exceed the model as it is, a guess and the
commonest answer by two standard errors of the rows is `no signal`, and is not ranked. Trials and pilots are left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smidgen.intervals import SHARES
from smidgen.records import Record, final, spent

ERRORS = 2.0  # standard errors of the rows that a gain must exceed to be called one
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # Student's t, two-sided, for 1 to 10 degrees of freedom


@dataclass
class Line:
    """A method under a scheme on a model: its finished seeds and those that failed."""

    model: str
    scheme: str
    method: str
    records: list[Record] = field(default_factory=list)
    failed: list[Record] = field(default_factory=list)
    verdict: str = ""

    @property
    def label(self) -> str:
        return f"{self.method} ({self.scheme})"

    @property
    def values(self) -> list[float]:
        """The measure of each seed, on the split that judges."""
        return [r[final(r)][r["metric"]] for r in self.records]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def median(self, key: str) -> float:
        return statistics.median(float(spent(r) if key == "seconds" else r[key]) for r in self.records)

    @property
    def error(self) -> float | None:
        """Standard error of the mean: over seeds, or over rows for one seed of a share; None where nothing tells."""
        if self.spread is not None:
            return self.spread / math.sqrt(len(self.values))
        return _row_error(self.records[0], self.mean)


@dataclass
class Table:
    """The lines of a task, the best first."""

    task: str
    metric: str
    split: str
    lines: list[Line]
    models: list[str]
    floor: float  # what has to be beaten
    untrained: float | None
    failed: list[Line]

    @property
    def title(self) -> str:
        return f"{self.task}, {', '.join(self.models)}"

    @property
    def share(self) -> bool:
        return self.metric in SHARES

    @property
    def higher(self) -> bool:
        """Whether more is better."""
        return self.metric != "loss"

    def shown(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.share else f"{value:.4f}"

    @property
    def unit(self) -> str:
        return "%" if self.share else "nats" if self.metric == "loss" else ""

    def score(self, line: Line) -> str:
        """Mean and spread as text."""
        return self.shown(line.mean) + ("" if line.spread is None else f" ± {self.shown(line.spread)}")


def tables(records: Sequence[Record]) -> list[Table]:
    """One table for each task and, in a comparison's records, each model."""
    untrained: dict[tuple[str, str], Record] = {}
    groups: dict[tuple[str, ...], dict[tuple[str, str, str], Line]] = {}
    for record in records:
        if record["role"] == "untrained" and record["status"] == "done":
            untrained[record["model"], record["task"]] = record
    metrics = {(r["model"], r["task"]): r["metric"] for r in records if r["status"] == "done" and r["role"] == "seed"}
    for record in records:
        if record["role"] != "seed":
            continue
        place = record["model"], record["task"]
        key = (record["task"], metrics.get(place, ""), record["model"] if "folder" not in record else "")
        lines = groups.setdefault(key, {})
        name = record["model"], record["scheme"], record["method"]
        line = lines.setdefault(name, Line(*name))
        (line.records if record["status"] == "done" else line.failed).append(record)
    return [_table(task, metric, list(lines.values()), untrained) for (task, metric, _), lines in groups.items()]


def _table(task: str, metric: str, lines: list[Line], untrained: Mapping[tuple[str, str], Record]) -> Table:
    done = [line for line in lines if line.records]
    models = list(dict.fromkeys(line.model for line in lines))
    failed = [line for line in lines if not line.records]
    if not done:
        return Table(task, metric or "no measure", "dev", [], models, 0.0, None, failed)
    split = final(done[0].records[0])
    before = [u[split][metric] for m in models if (u := untrained.get((m, task))) is not None and split in u]
    start = statistics.fmean(before) if before else None
    table = Table(task, metric, split, done, models, 0.0, start, failed)
    starts = [r["before"][metric] for line in done for r in line.records] if start is None and metric == "loss" else []
    known = [start] if start is not None else starts[:1]
    if table.share:
        rows = [r["data"].get(split, {}).get("majority") for line in done for r in line.records]
        guesses = [g for line in done for r in line.records for g in [r.get("chance")] if g is not None]
        table.floor = max([*known, *guesses, *(m for m in rows if m is not None), 0.0])
    else:
        table.floor = known[0] if known else (math.inf if metric == "loss" else -math.inf)
    sign = 1.0 if table.higher else -1.0
    done.sort(key=lambda line: -sign * line.mean)
    heard = [line for line in done if _signal(line, table)]
    most = max((len(line.records) for line in heard), default=0)
    heard.sort(key=lambda line: len(line.records) < most)  # one seed more or less: what has fewer is not called the best
    heard[1:] = sorted(heard[1:], key=lambda line: -sign * line.mean)
    for line in done:
        if line not in heard:
            line.verdict = "no signal"
        elif line is heard[0]:
            line.verdict = "best"
        else:
            line.verdict = against(line, heard[0], sign)
    table.lines = heard + [line for line in done if line not in heard]
    return table


def _row_error(record: Record, value: float) -> float | None:
    rows = record["data"].get(final(record), {}).get("rows")
    if record["metric"] not in SHARES or not rows:
        return None
    return math.sqrt(max(value * (1 - value), 0.0) / rows)


def _signal(line: Line, table: Table) -> bool:
    """Whether a line exceeds what has to be beaten: by two standard errors of the rows, or of a loss by its interval."""
    gain = line.mean - table.floor if table.higher else table.floor - line.mean
    if table.share:
        return gain > ERRORS * (_row_error(line.records[0], line.mean) or 0.0)
    return gain > student(len(line.values) - 1) * (line.error or 0.0) if line.spread is not None else gain > 0


def against(line: Line, best: Line, sign: float) -> str:
    """`below the best`, `not told apart`, or `one run each` where nothing tells."""
    mine, theirs = ({r["seed"]: v for r, v in zip(a.records, a.values, strict=True)} for a in (line, best))
    shared = sorted(mine.keys() & theirs.keys())
    if len(shared) > 1 and len(shared) == len(mine) == len(theirs):
        differences = [theirs[s] - mine[s] for s in shared]
        room: float | None = student(len(shared) - 1) * statistics.stdev(differences) / math.sqrt(len(shared))
    elif min(len(mine), len(theirs)) > 1:
        room = student(min(len(mine), len(theirs)) - 1) * math.hypot(line.error or 0.0, best.error or 0.0)
    else:
        errors = [_row_error(a.records[0], a.mean) for a in (line, best)]
        room = None if None in errors else ERRORS * math.hypot(*(e for e in errors if e is not None))
    if room is None:
        return "one run each"
    return "below the best" if sign * (best.mean - line.mean) > room else "not told apart"


def student(freedom: int) -> float:
    """How many standard errors a 95 % interval reaches with so many degrees of freedom."""
    return _T95[freedom - 1] if freedom <= len(_T95) else ERRORS


def frontier(lines: Sequence[Line], higher: bool) -> list[Line]:
    """The lines that no other beats in both memory and measure, the smallest memory first."""
    found: list[Line] = []
    sign = 1.0 if higher else -1.0
    for line in sorted(lines, key=lambda a: (a.median("peak_bytes"), -sign * a.mean)):
        if not found or sign * line.mean > sign * found[-1].mean:
            found.append(line)
    return found


def sentences(table: Table) -> list[str]:
    """What a table says, in words."""
    if not table.lines:
        return ["no run came to an end."]
    best = table.lines[0]
    if best.verdict == "no signal":
        return [f"no method exceeds the model as it is, a guess or the commonest answer ({table.shown(table.floor)})."]
    cost = f"{memory(best.median('peak_bytes'))}, {time(best.median('seconds'))}"
    first = f"{best.label} is the best: {table.score(best)} {table.unit} at {cost}."
    equal = [line.label for line in table.lines if line.verdict == "not told apart"]
    found = [first + (f" Not told apart from it: {', '.join(equal)}." if equal else "")]
    heard = [line for line in table.lines if line.verdict != "no signal"]
    least = frontier(heard, table.higher)
    if least and least[0] is not best:
        line = least[0]
        peak = memory(line.median("peak_bytes"))
        found.append(f"The least memory that still learns: {line.label}, {table.score(line)} {table.unit} at {peak}.")
    return found


def memory(n: float) -> str:
    """Bytes as a person reads them."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def time(seconds: float) -> str:
    """Seconds as a person reads them."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"


def rows(table: Table) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(heads, rows) of a table as text."""
    several = len(table.models) > 1
    heads = (
        "method",
        "scheme",
        *(("model",) if several else ()),
        f"{table.metric} {table.unit}".strip(),
        "seeds",
        "against the best",
    )
    heads = (*heads, "peak", "forwards", "backwards", "time", "lr", "tuned")
    found = []
    for line in table.lines:
        first = line.records[0]
        rate = "-" if first.get("lr") is None else f"{first['lr']:.3g}"
        cells: tuple[Any, ...] = (line.method, line.scheme, *((line.model,) if several else ()), table.score(line))
        lost = f" + {len(line.failed)} failed" if line.failed else ""
        cells = (*cells, f"{len(line.records)}{lost}", line.verdict, memory(line.median("peak_bytes")))
        cells = (
            *cells,
            f"{line.median('forwards'):,.0f}",
            f"{line.median('backwards'):,.0f}",
            time(line.median("seconds")),
            rate,
        )
        found.append((*cells, f"{100 * first['tuned_weights'] / first['weights']:.3g} %" if first.get("weights") else "-"))
    return heads, found
