"""Records of runs -> one self-contained HTML page: a table, loss curves, and memory against accuracy. Runs nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from typing import Any

Record = dict[str, Any]  # result.json plus method, scheme and curve (the lines of metrics.jsonl)

_COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8e6c8a", "#c77f24", "#4c566a")

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #667; --line: #d9dde5; --ground: #fff; --card: #f7f8fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #99a; --line: #394050; --ground: #171a21; --card: #fff } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--ground) }
body { max-width: 64rem; margin: 2.5rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 0 .3rem } p { color: var(--soft); margin: .2rem 0 1.4rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .35rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; color: var(--soft) } th:first-child, td:first-child { text-align: left }
figure { margin: 1.6rem 0; background: var(--card); border-radius: .5rem; padding: .8rem }
svg { width: 100%; height: auto; display: block }
footer { color: var(--soft); font-size: .85rem; margin-top: 2rem }
"""


def page(title: str, records: Sequence[Record]) -> str:
    """The page. Each record needs before, dev, metric, peak_bytes, seconds, forwards, backwards, method, scheme, curve."""
    metric = records[0]["metric"]
    heads = ("method", f"{metric} before", f"{metric} after", "peak memory", "forwards", "backwards", "time", "tuned")
    rows = [
        (
            _name(r),
            _figure(metric, r["before"][metric]),
            _figure(metric, r["dev"][metric]),
            f"{r['peak_bytes'] / 2**20:.0f} MiB",
            f"{r['forwards']:,}",
            f"{r['backwards']:,}",
            f"{r['seconds']:.1f} s",
            f"{100 * r['tuned_weights'] / r['weights']:.1f} %",
        )
        for r in records
    ]
    table = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    versions = ", ".join(f"{k} {v}" for k, v in records[0]["versions"].items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>Metrics on the dev split. Peak memory is that of the run's own process over its loaded libraries, model included.</p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{table}</tbody></table></div>
<figure>{_plots(records, metric)}</figure>
<footer>{escape(versions)}</footer>
</body></html>
"""


def _name(record: Record) -> str:
    return f"{record['method']} ({record['scheme']})"


def _figure(metric: str, value: float) -> str:
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.4f}"


def _plots(records: Sequence[Record], metric: str) -> str:
    """Loss against seconds, and memory against the metric, as inline SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "path", "font.size": 10, "svg.hashsalt": "smidgen"}):
        figure = Figure(figsize=(11, 4), layout="constrained")
        curves, scatter = figure.subplots(1, 2)
        for record, colour in zip(records, _COLOURS * len(records), strict=False):
            points = [(v["step"], v["eval_loss"]) for v in record["curve"] if "eval_loss" in v]
            points = [(0, record["before"]["loss"]), *points]
            share = [step / record["steps"] * record["seconds"] for step, _ in points]
            curves.plot(share, [loss for _, loss in points], marker="o", markersize=3, color=colour, label=_name(record))
            x, y = record["peak_bytes"] / 2**20, record["dev"][metric] * (100 if metric == "accuracy" else 1)
            scatter.scatter([x], [y], s=60, color=colour, zorder=3)
            scatter.annotate(_name(record), (x, y), xytext=(7, 5), textcoords="offset points", color=colour)
        curves.set(xlabel="seconds of training", ylabel="loss on dev (nats)", title="loss against time")
        curves.legend(frameon=False)
        unit = "accuracy on dev (%)" if metric == "accuracy" else "loss on dev (nats)"
        scatter.set(xlabel="peak memory (MiB)", ylabel=unit, title="memory against quality")
        scatter.margins(0.3)
        if metric == "accuracy":
            start = 100 * records[0]["before"][metric]
            scatter.axhline(start, color="#999", linewidth=1, linestyle="--")
            scatter.annotate(
                "before",
                (0.01, start),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                color="#777",
            )
        for axes in (curves, scatter):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
