"""Records of runs -> one self-contained HTML page, Markdown, CSV. Runs nothing, reads no network, needs no script.

The page says what was compared and how, then for each task: measure against peak memory, against forwards and against seconds,
memory by part as planned beside what was measured, a table with mean, spread and who is told apart from whom; then what failed,
and every run with the command that makes it again.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from smidgen import summary
from smidgen.charts import Curve, Mark, bars, curves, scatter, swatch
from smidgen.page import frame
from smidgen.records import Record, final, refuse_unequal, spent
from smidgen.summary import Table, memory

_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "scratch")
_MIB = 2**20
_CURVES, _BARS = 12, 16  # lines of a chart; the table has the others

_COLUMNS: tuple[str, ...] = (
    "name",
    "model",
    "task",
    "scheme",
    "method",
    "role",
    "seed",
    "status",
    "metric",
    "split",
    "value",
    "low",
    "high",
)
_COLUMNS += ("before", "lr", "batch", "steps", "forwards", "backwards", "tokens", "seconds", "cpu_seconds", "peak_bytes")
_COLUMNS += ("planned_bytes", "tuned_weights", "weights", "train_rows", "judged_rows", "error")


def page(title: str, records: Sequence[Record]) -> str:
    """The HTML page. Raises ConfigError where runs that would be ranked were made on unequal data."""
    refuse_unequal(records)
    tables = summary.tables(records)
    parts = ["<section aria-labelledby=short><h2 id=short>In short</h2><ul>"]
    parts += [f"<li><b>{escape(table.title)}</b>: {escape(' '.join(summary.sentences(table)))}</li>" for table in tables]
    parts += ["</ul>", _how(records), "</section>"]
    parts += [_section(table, number) for number, table in enumerate(tables, 1)]
    parts += [_failures(records), _runs(records)]
    links = [(f"task-{number}", table.title) for number, table in enumerate(tables, 1)]
    return frame(title, [*links, ("failed", "What failed"), ("runs", "Every run")], "\n".join(parts))


# ---------------------------------------------------------------------------------------------------- what and how


def how(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What was compared and how: (term, text) pairs."""
    seeds = [r for r in records if r["role"] == "seed"]
    done = [r for r in seeds if r["status"] == "done"]

    def listed(key: str) -> str:
        return ", ".join(dict.fromkeys(str(r[key]) for r in seeds))

    found = [(plural, listed(key)) for key, plural in (("model", "models"), ("task", "tasks"), ("scheme", "schemes"))]
    found += [("methods", listed("method")), ("seeds", ", ".join(str(s) for s in sorted({r["seed"] for r in seeds})))]
    budgets = {k: v for r in seeds for k, v in (r.get("budget") or {}).items()} if seeds else {}
    if budgets:
        said = {"forwards": "{:,.0f} forwards of examples", "seconds": "{:g} s", "memory": "a peak of {}"}
        texts = [said[k].format(memory(v) if k == "memory" else v) for k, v in budgets.items() if k in said]
        found.append(("budget of a run", ", ".join(texts) + "; a back-propagation counts two forwards, recomputation one more"))
    trials = [r for r in records if r["role"] in ("trial", "search")]
    if trials:
        cells = {(r["model"], r["task"], r["scheme"], r["method"]) for r in trials}
        found.append(
            ("search", f"{len(trials)} trials over {len(cells)} cells, by the loss on the dev rows; none read test rows")
        )
    for split in dict.fromkeys(final(r) for r in done):
        judged = [r["data"].get(split, {}).get("rows") for r in done if final(r) == split]
        train = [r["data"].get("train", {}).get("rows") for r in done if final(r) == split]
        found.append((f"judged on {split}", f"{_span(judged)} rows, read once, after training on {_span(train)} rows"))
    versions = done[0].get("versions", {}) if done else {}
    found.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items()) or "unknown"))
    devices = dict.fromkeys(f"{r.get('device', 'cpu')}, {r.get('threads') or '?'} threads" for r in done)
    return [*found, ("device", "; ".join(devices) or "none")]


def _span(values: Sequence[Any]) -> str:
    known = sorted({v for v in values if v is not None})
    return "an unknown number of" if not known else f"{known[0]:,}" + (f" to {known[-1]:,}" if known[-1] > known[0] else "")


def _how(records: Sequence[Record]) -> str:
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in how(records) if text)
    rule = (
        "Seconds are those of training, without evaluations; on a CPU processor time over threads, which other work on the "
        "machine changes little. Peak memory is that of the run's process over its loaded "
        "libraries, the model and its evaluation included. ± is the standard deviation over seeds. A difference counts "
        "when its 95 % interval leaves out zero: Student's t over seeds, pairwise where both have the same; over the rows "
        "that judged where there is one seed. “No signal”: not more than two standard errors of the rows "
        "better than the model as it is, "
        "a guess and the commonest answer. With many methods, some differences count by chance."
    )
    return f"<details><summary>What was compared, and how</summary><dl>{items}</dl><p>{rule}</p></details>"


# ---------------------------------------------------------------------------------------------------- a task


def _section(table: Table, number: int) -> str:
    head = f'<section aria-labelledby="task-{number}"><h2 id="task-{number}">{escape(table.title)}</h2>'
    if not table.lines:
        return f"{head}<p>No run came to an end.</p></section>"
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in summary.sentences(table))
    charts = [_memory_chart(table), _curve_chart(table, "forwards"), _curve_chart(table, "seconds"), _bars(table)]
    figures = "".join(f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for caption, svg in charts)
    return f'{head}{said}<div class="figures">{figures}</div>{_legend(table)}{_table(table)}</section>'


def _order(table: Table) -> dict[int, int]:
    """A series for every line, by its name, so that a line has one colour on the whole page."""
    names = sorted({line.label for line in table.lines})
    return {id(line): names.index(line.label) for line in table.lines}


def _axis(table: Table, split: str) -> str:
    return f"{table.metric} on {split}" + (f" ({table.unit})" if table.unit else "")


def _scaled(table: Table, value: float) -> float:
    return 100 * value if table.share else value


def _memory_chart(table: Table) -> tuple[str, str]:
    heard = [line for line in table.lines if line.verdict != "no signal"]
    order, best = _order(table), {id(line) for line in summary.frontier(heard, table.higher)}
    longest = max(line.median("seconds") for line in table.lines) or 1.0
    marks = []
    for line in table.lines:
        peak, seconds = line.median("peak_bytes"), line.median("seconds")
        words = f"{line.label}: {table.score(line)} {table.unit}, {memory(peak)}, {summary.time(seconds)}; {line.verdict}"
        y = _scaled(table, line.mean)
        error = None if line.error is None else summary.ERRORS * _scaled(table, line.error)
        marks.append(Mark(peak / _MIB, y, seconds / longest, line.label, words, order[id(line)], id(line) in best, error))
    level = None if table.untrained is None else (_scaled(table, table.untrained), "untrained")
    caption = "Measure against peak memory. Size: time; bars: two standard errors"
    return caption, scatter(marks, "peak memory (MiB)", _axis(table, table.split), f"{table.title}: {caption}", line=level)


def _curve_chart(table: Table, axis: str) -> tuple[str, str]:
    """Mean dev measure over seeds along the runs, against forwards (a back-propagation counts three) or seconds."""
    order, lines = _order(table), []
    for line in table.lines[:_CURVES]:
        length = min(len(r["curve"]) for r in line.records)
        points = []
        for k in range(length):
            at = [r["curve"][k] for r in line.records]
            x = [
                p["forwards"] + 2 * p["backwards"] if axis == "forwards" else spent(r, p)
                for r, p in zip(line.records, at, strict=True)
            ]
            points.append((statistics.fmean(x), _scaled(table, statistics.fmean(p[table.metric] for p in at))))
        lines.append(Curve(points, line.label, order[id(line)]))
    unit = "batches forward; a back-propagation counts two more" if axis == "forwards" else "seconds of training"
    caption = f"Measure against {axis}, mean of the seeds" + (f"; the best {_CURVES}" if len(table.lines) > _CURVES else "")
    return caption, curves(lines, unit, _axis(table, "dev"), f"{table.title}: {caption}")


def _bars(table: Table) -> tuple[str, str]:
    rows, chosen = [], table.lines[:_BARS]
    for line in sorted(chosen, key=lambda a: a.median("peak_bytes")):
        plan = line.records[0].get("planned") or {}
        parts = [(part, plan.get(part, 0) / _MIB) for part in _PARTS] if plan else []
        rows.append((line.label, parts, line.median("peak_bytes") / _MIB))
    planned = any(parts for _, parts, _ in rows)
    keys = "".join(f'<span class="key"><i class="p{k}"></i>{part}</span>' for k, part in enumerate(_PARTS) if planned)
    svg = bars(rows, "MiB; the upright line is the measured peak", f"{table.title}: memory by part")
    caption = "Peak memory: planned by part, and as measured of the run" if planned else "Peak memory as measured of the run"
    caption += f"; the best {_BARS}" if len(table.lines) > _BARS else ""
    return caption, svg + f'<p class="keys">{keys}</p>'


def _legend(table: Table) -> str:
    order = {line.label: series for line in table.lines for series in [_order(table)[id(line)]]}
    items = "".join(f"<li>{swatch(series)}{escape(label)}</li>" for label, series in order.items())
    return f'<ul class="legend" aria-label="marks">{items}</ul>'


def _table(table: Table) -> str:
    heads, rows = summary.rows(table)
    caption = f"{table.title}: {table.metric} on {table.split}; forwards and backwards are of batches; medians over seeds"
    return html_table(heads, rows, caption)


def html_table(heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table that scrolls by itself where the screen is narrow, the first cell of a row its head."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# ---------------------------------------------------------------------------------------------------- runs


def _failures(records: Sequence[Record]) -> str:
    failed = [r for r in records if r["status"] != "done"]
    head = '<section aria-labelledby="failed"><h2 id="failed">What failed</h2>'
    if not failed:
        return f"{head}<p>Every run came to an end.</p></section>"
    rows = [(r["name"], r["role"], r["status"], str(r.get("error") or "no reason given")) for r in failed]
    return (
        head
        + html_table(("run", "role", "status", "reason"), rows, f"{len(failed)} of {len(records)} runs failed")
        + "</section>"
    )


def _runs(records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        value = row(r)
        shown = "-" if value["value"] == "" else f"{value['value']:.4f}"
        shown += "" if value["low"] == "" else f" [{value['low']:.3f}, {value['high']:.3f}]"
        peak = "-" if r["status"] != "done" else memory(r["peak_bytes"])
        rate = "-" if r.get("lr") is None else f"{r['lr']:.3g}"
        rows.append((r["name"], r["role"], r["status"], f"{value['metric']} {shown}", peak, rate, str(r.get("steps", "-"))))
    heads = ("run", "role", "status", "measure [95 % interval over rows]", "peak", "lr", "steps")
    commands = [f"{r['name']}\n    {r['command']}" for r in records if r.get("command") and r["role"] in ("seed", "untrained")]
    text = escape("\n".join(commands))
    listing = f"<details><summary>The exact commands</summary><pre>{text}</pre></details>" if commands else ""
    title = f"All {len(rows)} runs, trials of searches included"
    every = f"<details><summary>{title}</summary>{html_table(heads, rows, 'every run')}</details>"
    return f'<section aria-labelledby="runs"><h2 id="runs">Every run</h2>{every}{listing}</section>'


def row(record: Record) -> dict[str, Any]:
    """A record as a line of the CSV file."""
    found: dict[str, Any] = {key: record.get(key, "") for key in _COLUMNS}
    found = {key: "" if value is None else value for key, value in found.items()}
    if record["status"] == "done":
        split = final(record)
        low, high = record.get("interval") or ("", "")
        found |= {"split": split, "value": record[split][record["metric"]], "low": low, "high": high}
        found |= {"before": record["before"][record["metric"]], "judged_rows": record["data"].get(split, {}).get("rows", "")}
        found |= {"train_rows": record["data"].get("train", {}).get("rows", "")}
        found["planned_bytes"] = (record.get("planned") or {}).get("total", "")
    return found


def as_csv(records: Sequence[Record]) -> str:
    """One line a run, trials and failures included; bytes, seconds, shares between 0 and 1."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row(record) for record in records)
    return text.getvalue()


def as_markdown(title: str, records: Sequence[Record]) -> str:
    """The same in Markdown: sentences, tables, failures. Raises ConfigError as `page` does."""
    refuse_unequal(records)
    parts = [f"# {title}", ""]
    for table in summary.tables(records):
        parts += [f"## {table.title}", "", *summary.sentences(table), ""]
        if table.lines:
            heads, rows = summary.rows(table)
            parts += [_bar(heads), _bar(["---"] * len(heads)), *map(_bar, rows), ""]
            parts += [f"To beat: {table.shown(table.floor)} {table.unit} ({table.metric} on {table.split}).", ""]
    failed = [r for r in records if r["status"] != "done"]
    if failed:
        parts += ["## What failed", "", *(f"- `{r['name']}`: {r['status']}: {r.get('error')}" for r in failed), ""]
    parts += ["## How", "", *(f"- {term}: {text}" for term, text in how(records) if text), ""]
    return "\n".join(parts)


def _bar(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
