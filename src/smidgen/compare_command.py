"""`smidgen compare` and `smidgen report`: a grid of runs, or finished ones. Nothing heavy is imported before they run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from smidgen.config import ConfigError
from smidgen.tables import table

Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Items = Annotated[list[str], typer.Argument(metavar="GRID.yaml | DIR...", help="a grid, or folders of runs and comparisons")]
Folders = Annotated[list[str], typer.Argument(metavar="DIR...", help="folders of comparisons, of records, or of runs")]

_PAGES = ("report.html", "report.md", "report.csv")


def compare(
    items: Items,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="folder of the comparison")] = None,  # noqa: UP045
    workers: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each run")] = 1,
    minutes: Annotated[Optional[float], typer.Option(min=0, help="begin no run after so many minutes")] = None,  # noqa: UP045
    only: Annotated[Optional[list[str]], typer.Option(help="labels of the grid to keep; may be repeated")] = None,  # noqa: UP045
    retry: Annotated[bool, typer.Option("--retry", help="make failed runs, and those out of memory, again")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would run, and end")] = False,
    as_json: Json = False,
) -> None:
    """Compare methods: make the runs of a grid, one record each, and a report; or rank runs that are finished.

    The same command goes on where it was stopped. Exits with 1 where a run of the grid failed.
    """
    grids = [item for item in items if item.endswith((".yaml", ".yml"))]
    if not grids:
        _finished(items, as_json)
        return
    if len(items) > 1:
        raise ConfigError(f"'{items[1]}' beside a grid: give one grid, or folders of finished runs")
    if not Path(grids[0]).exists():
        raise ConfigError(f"there is no grid '{grids[0]}': recipes/ has some")
    os.environ |= {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    from smidgen.compare import Comparison
    from smidgen.grid import Grid

    path = Path(grids[0])
    grid = Grid.read(path)
    folder = output or Path("compare") / path.stem

    def say(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    comparison = Comparison(grid, folder, only=only or (), threads=threads, say=say)
    comparison.prepare()
    say(comparison.outline())
    if dry_run:
        return
    if not comparison.cells:
        raise ConfigError("no cell of the grid can run here: " + "; ".join(f"{k}: {v}" for k, v in comparison.absent.items()))
    ended = comparison.work(workers, minutes=minutes, retry=retry)
    say("  ".join(f"{status} {count}" for status, count in ended.items()) or "nothing to run: every record is there")
    records = comparison.results()
    if records:
        _show(str(grid.raw.get("title") or path.stem), records, folder, as_json, {"ended": dict(ended)})
    if any(record["status"] == "failed" for record in records):
        raise typer.Exit(1)


def report(
    items: Folders,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="where the pages are written; the folder itself")
    ] = None,
    title: Annotated[Optional[str], typer.Option(help="heading of the page")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Write report.html, report.md and report.csv from records of runs. Runs nothing."""
    from smidgen import records

    found = records.read(items)
    folder = output or (Path(items[0]) if len(items) == 1 else Path("."))
    _show(title or _title(items), found, folder, as_json, {})


def _title(items: list[str]) -> str:
    grid = Path(items[0]) / "grid.yaml"
    if len(items) == 1 and grid.exists():
        from smidgen.config_file import parse_value

        found = parse_value(grid.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.get("title"):
            return str(found["title"])
    return ", ".join(Path(item).name for item in items)


def _finished(items: list[str], as_json: bool) -> None:
    from smidgen import records

    _print(records.read(items), as_json, {})


def _show(title: str, records: Any, folder: Path, as_json: bool, more: dict[str, Any]) -> None:
    from smidgen import report
    from smidgen.folder import write_text

    folder.mkdir(parents=True, exist_ok=True)
    texts = (report.page(title, records), report.as_markdown(title, records), report.as_csv(records))
    for name, text in zip(_PAGES, texts, strict=True):
        write_text(folder / name, text)
    _print(records, as_json, {**more, "pages": [str(folder / name) for name in _PAGES]})
    if not as_json:
        print(f"report: {folder / _PAGES[0]}")


def _print(records: Any, as_json: bool, more: dict[str, Any]) -> None:
    """The tables on the console. Raises ConfigError where they would rank unequal data."""
    from smidgen import summary
    from smidgen.records import refuse_unequal

    refuse_unequal(records)
    tables = summary.tables(records)
    if as_json:
        found = [
            {
                "task": t.task,
                "models": t.models,
                "metric": t.metric,
                "split": t.split,
                "to_beat": t.floor,
                "lines": [
                    {
                        **{key: getattr(line, key) for key in ("model", "scheme", "method", "mean", "spread", "verdict")},
                        **{key: line.median(key) for key in ("peak_bytes", "seconds", "forwards", "backwards")},
                        "seeds": len(line.records),
                        "failed": len(line.failed),
                    }
                    for line in t.lines
                ],
                "failed": [line.label for line in t.failed],
            }
            for t in tables
        ]
        print(json.dumps({"tables": found, **more}, indent=2))
        return
    for t in tables:
        print(f"\n{t.title}: {t.metric} on {t.split}")
        if t.lines:
            table(*summary.rows(t))
        for sentence in summary.sentences(t):
            print(sentence)
    failed = [r for r in records if r["status"] != "done"]
    for record in failed:
        print(f"{record['status']}: {record['name']}: {record.get('error')}")
