"""`smidgen compare GRID`: the runs of a grid side by side, each in a process of its own, one record each.

The folder of a comparison holds `grid.yaml`, `records/MODEL-TASK/SCHEME-METHOD-ROLE-N.json`, `search.db` and, at the end, the
report. A second start goes on where the first stopped: a record whose settings are those of the grid is kept, any other is made
again. A run that was cut off is made again from its start, since its time and its memory are part of its record. Several
starts may work on one folder: each run is claimed by a lock that ends with its process.

Roles: `untrained`, the model as it is; `pilot`, a few steps that say how long one takes, where the budget is time; `trial` of a
search, which reads no test rows; `seed`, the runs that are compared.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import yaml

from smidgen import data, estimate, isolated
from smidgen import folder as folders
from smidgen.compared import lock, lock_file, opening, pace, perform, write
from smidgen.config import Interrupted, RunConfig, UserError
from smidgen.grid import Cell, Grid, Run, select
from smidgen.planner import Planner
from smidgen.records import FOLDER, Record
from smidgen.run import device
from smidgen.search import FILE as DATABASE
from smidgen.search import Search, Values
from smidgen.signals import Signals

_PILOT = 12  # steps of a pilot; the first ones warm up, see `pace`

Say = Callable[[str], None]


class Comparison:
    """A grid at work in a folder."""

    def __init__(self, grid: Grid, folder: Path, *, only: Sequence[str] = (), threads: int = 1, say: Say = print):
        self.grid, self.folder, self.threads, self.say = grid, folder, threads, say
        self.cells = grid.cells(only)
        self.absent: dict[str, str] = {}  # why a cell cannot run here
        self.records: dict[str, Record] = {}
        self._search: Search | None = None
        self._working = False
        self._known: dict[Cell, tuple[float, int, str | None]] = {}
        self._planners: dict[tuple[Any, ...], Planner] = {}

    # -- which runs there are -----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read the records that exist, and find out what cannot run here. Writes nothing."""
        below = self.folder / FOLDER
        for path in sorted(below.glob("*/*.json")):
            with contextlib.suppress(ValueError):  # cut off by a crash of the machine: made again
                self.records[path.relative_to(below).with_suffix("").as_posix()] = json.loads(path.read_text())
        for cell in list(self.cells):
            reason = self._absence(cell)
            if reason is not None:
                self.absent[f"{cell.model}, {cell.task}"] = reason
                self.cells.remove(cell)

    def _absence(self, cell: Cell) -> str | None:
        config = self.grid.config(cell)
        paths = [config.model, *(s if isinstance(s, str) else s.path for s in _sources(config.data))]
        for path in paths:
            if path.startswith((".", "/")) and not Path(path).exists():
                return f"{path} is not here"
        return None

    def fresh(self, run: Run) -> Record | None:
        """The record of a run, unless it was made with other settings."""
        record = self.records.get(run.name)
        return record if record is not None and record.get("settings_sha256") == run.sha256 else None

    def stated(self) -> Iterator[Run]:
        """Every run whose settings are known by now."""
        for cell in {(c.model, c.task): c for c in self.cells}.values():
            yield self.grid.untrained(cell)
        for cell in self.cells:
            yield from self.pilots(cell)
            yield from self.trials(cell)
            yield from self.finals(cell)

    def pilots(self, cell: Cell) -> list[Run]:
        if "seconds" not in self.grid.budget or self.grid.config(cell).train.max_steps == 0:
            return []
        return [self.grid.run(cell, "pilot", 0, _PILOT, {"lr": self.grid.centre(cell), **self._batch(cell)})]

    def trials(self, cell: Cell) -> list[Run]:
        """The trials of a cell that are known by now."""
        if not self._ready(cell) or not self.grid.searched(cell) or self.refusal(cell) is not None:
            return []
        settings = self.grid.search
        assert settings is not None
        steps = self._steps(cell, settings["share"])
        base = self.grid.run(cell, "trial", 0, steps, {"lr": self.grid.centre(cell), **self._batch(cell)})

        def run(number: int, values: Values) -> Run:
            return self.grid.run(cell, "trial", number, steps, {**values, **self._batch(cell)})

        if self._search is None:
            if not self._working and not (self.folder / DATABASE).exists():  # an outline makes no file
                return []
            self._search = Search(self.folder)
        with self._locked(f"{cell.name} search"):
            found = self._search.trials(
                f"{cell.name} {base.sha256[:12]}",
                settings,
                self.grid.centre(cell),
                self.grid.own(cell, "search", {}),
                lambda number, values: self.fresh(run(number, values)),
            )
        return [run(number, values) for number, values in found]

    def chosen(self, cell: Cell) -> Mapping[str, Any] | None:
        """What a cell's runs are given; None while its search is open, or where all its trials failed."""
        twin = self.grid.twin(cell)
        if twin is not None:
            return self.chosen(twin) if twin in self.cells else {"lr": self.grid.centre(cell)}
        if not self.grid.searched(cell):
            return {"lr": self.grid.centre(cell)} if self.grid.config(cell).train.max_steps != 0 else {"lr": None}
        settings = self.grid.search
        assert settings is not None
        found = [self.fresh(run) for run in self.trials(cell)]
        known = [record for record in found if record is not None]
        return select(known) if len(known) == settings["trials"] else None

    def finals(self, cell: Cell) -> list[Run]:
        """The seeds of a cell, once what they are given is known."""
        if not self._ready(cell):
            return []
        values = self.chosen(cell) if self.refusal(cell) is None else {"lr": self.grid.centre(cell)}
        if values is None:
            return []
        given = {**values, **self._batch(cell)}
        return [self.grid.run(cell, "seed", seed, self._steps(cell, 1.0), given) for seed in self.grid.seeds(cell)]

    def _ready(self, cell: Cell) -> bool:
        """Whether the number of steps is known: at once, or when a pilot has said how long one takes."""
        return all(self.fresh(run) is not None for run in self.pilots(cell))

    def _steps(self, cell: Cell, share: float) -> int:
        config = self.grid.config(cell, self._batch(cell))
        records = [record for run in self.pilots(cell) if (record := self.fresh(run)) is not None]
        done = [record for record in records if record["status"] == "done"]
        if "seconds" in self.grid.budget and not done:
            return 1
        return self.grid.steps(config, self.cost(cell), pace(done[0]) if done else None, share)

    # -- what a cell costs --------------------------------------------------------------------------------------------

    def cost(self, cell: Cell) -> float:
        """Forwards of a step, as the method itself asks for them."""
        return self._knowledge(cell)[0]

    def refusal(self, cell: Cell) -> str | None:
        """Why a cell does not keep to the budget's memory even with one row at a time; None where it does."""
        return self._knowledge(cell)[2]

    def _batch(self, cell: Cell) -> dict[str, Any]:
        rows = self._knowledge(cell)[1]
        whole = self.grid.config(cell).train.per_device_train_batch_size
        if rows == whole:
            return {}
        return {"train.per_device_train_batch_size": rows, "train.gradient_accumulation_steps": -(-whole // rows)}

    def _knowledge(self, cell: Cell) -> tuple[float, int, str | None]:
        """(forwards of a step, rows at once, why it does not fit)"""
        if cell not in self._known:
            config = self.grid.config(cell)
            rows = config.train.per_device_train_batch_size
            try:
                planner = self._planner(cell, config)
                cost, refusal = estimate.cost(planner, estimate.case_of(config)), None
                if "memory" in self.grid.budget:
                    rows, _ = estimate.fitting(planner, estimate.case_of(config), self.grid.budget["memory"])
            except estimate.TooLarge as error:
                refusal = str(error)
            except UserError as error:  # a run would say the same
                cost, refusal = 1.0, str(error)
            self._known[cell] = cost, rows, refusal
        return self._known[cell]

    def _planner(self, cell: Cell, config: RunConfig) -> Planner:
        """Shared by the cells of a model and task, so that their simulations are."""
        key = cell.model, cell.task, config.train.per_device_train_batch_size, config.quantise
        if key not in self._planners:
            corpus = data.open_corpus(config, notify=lambda line: None)
            self._planners[key] = estimate.planner_of(config, estimate.shape_of(config, corpus), device())
        return self._planners[key]

    # -- work ---------------------------------------------------------------------------------------------------------

    def work(
        self, workers: int, *, minutes: float | None = None, retry: bool = False, start: str | None = None
    ) -> Counter[str]:
        """Make every run that has no record, as soon as its settings are known; how many ended in which way."""
        how = start or ("spawn" if torch.cuda.is_available() else "fork")
        until = time.monotonic() + 60 * minutes if minutes else float("inf")
        ended: Counter[str] = Counter()
        running: dict[Any, tuple[Any, Run, float]] = {}
        settled: set[str] = set()  # failed ones that were made again
        self._open()
        self._working = True
        if how == "fork" and any(self.fresh(run) is None for run in self.stated()):
            isolated.rehearse(self.threads)
        with Signals() as signals:
            while True:
                self._reread()
                busy = {run.name for _, run, _ in running.values()}
                waiting = [run for run in self.stated() if run.name not in busy and self._open_run(run, retry, settled)]
                free = [run for run in waiting if not self._claimed(run)]
                while len(running) < workers and free and time.monotonic() < until and not signals.received:
                    run = free.pop(0)
                    settled.add(run.name)
                    process = isolated.start(
                        perform,
                        (run, self.folder, self.threads, self.refusal(run.cell) if run.cell in self.cells else None),
                        how,
                    )
                    running[process.sentinel] = process, run, time.monotonic()
                if not running:
                    if signals.received:
                        raise Interrupted(f"stopped by {signals.received}: the same command goes on with what is open")
                    if not waiting or time.monotonic() >= until:
                        return ended
                for sentinel in connection.wait(list(running), timeout=1.0):
                    process, run, began = running.pop(sentinel)
                    process.join()
                    record = self._collect(run, process.exitcode)
                    if record is not None:
                        ended[record["status"]] += 1
                        self.say(self._line(run, record, time.monotonic() - began, workers, len(running)))

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(
            {**self.grid.raw, "cells": [str(cell) for cell in self.cells]}, sort_keys=False, allow_unicode=True
        )
        folders.write_text(self.folder / "grid.yaml", text)

    def _open_run(self, run: Run, retry: bool, settled: set[str]) -> bool:
        record = self.fresh(run)
        return record is None or (retry and record["status"] in ("failed", "memory") and run.name not in settled)

    def _reread(self) -> None:
        """Take up records that another start has written."""
        for run in self.stated():
            path = self.folder / FOLDER / f"{run.name}.json"
            if self.fresh(run) is None and path.exists():
                with contextlib.suppress(ValueError):
                    self.records[run.name] = json.loads(path.read_text())

    def _collect(self, run: Run, code: int | None) -> Record | None:
        """The record that a process left; one that says how it died where it left none; None where it only waited."""
        path = self.folder / FOLDER / f"{run.name}.json"
        record = json.loads(path.read_text()) if path.exists() else None
        if record is None or record["settings_sha256"] != run.sha256:
            if code == 0:  # claimed by another start, or interrupted
                return None
            signal = f"killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            often = " (often: the system ran out of memory)" if code == -9 else ""
            record = opening(run, self.threads) | {"status": "failed", "error": signal + often}
            write(self.folder, run, record)
        self.records[run.name] = record
        return record

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with lock_file(self.folder, name).open("w") as file:
            lock(file, wait=True)
            yield

    def _claimed(self, run: Run) -> bool:
        """Whether another start is making a run."""
        with lock_file(self.folder, run.name).open("w") as file:
            return not lock(file, wait=False)

    def results(self) -> list[Record]:
        """The records that belong to the grid as it is, by name."""
        return [record for run in sorted(self.stated(), key=lambda r: r.name) if (record := self.fresh(run)) is not None]

    # -- what is said -------------------------------------------------------------------------------------------------

    def outline(self) -> str:
        """What there is to do, per model and task."""
        lines = [f"left out: {where}: {reason}" for where, reason in self.absent.items()]
        for model, task in dict.fromkeys((c.model, c.task) for c in self.cells):
            mine = [c for c in self.cells if (c.model, c.task) == (model, task)]
            made, total = self._counts(mine)
            lines.append(f"{model}, {task}: {len(mine)} cells, {total - made} of {total} runs to make")
        budget = ", ".join(f"{value:g} {key}" for key, value in self.grid.budget.items())
        return "\n".join(
            [*lines, f"budget of a run: {budget}" + (" (example-forwards)" if "forwards" in self.grid.budget else "")]
        )

    def _counts(self, cells: Sequence[Cell]) -> tuple[int, int]:
        """(runs that have a record, runs that there will be)"""
        made = total = 0
        for cell in cells:
            trials = self.grid.search["trials"] if self.grid.search is not None and self.grid.searched(cell) else 0
            pilots = "seconds" in self.grid.budget and self.grid.config(cell).train.max_steps != 0
            total += pilots + trials + len(self.grid.seeds(cell))
            if any(record.get("name", "").startswith(f"{cell.name}-") for record in self.records.values()):
                known = [*self.pilots(cell), *self.trials(cell), *self.finals(cell)]
                made += sum(self.fresh(run) is not None for run in known)
                total -= trials if self.refusal(cell) is not None else 0
        for cell in {(c.model, c.task): c for c in cells}.values():
            made, total = made + (self.fresh(self.grid.untrained(cell)) is not None), total + 1
        return made, total

    def left(self, workers: int) -> float | None:
        """Estimated seconds until the end, from what runs of the same model and task took for a like share of the budget."""
        paces: dict[tuple[str, str], list[float]] = {}
        shares = {"trial": (self.grid.search or {"share": 1.0})["share"], "seed": 1.0}
        for record in self.records.values():
            if record.get("role") in shares and record.get("wall_seconds"):
                place = record["model"], record["task"]
                paces.setdefault(place, []).append(record["wall_seconds"] / shares[record["role"]])
        if not paces:
            return None
        usual = statistics.mean(p for found in paces.values() for p in found)
        total = 0.0
        for cell in self.cells:
            whole = statistics.mean(paces.get((cell.model, cell.task), [usual]))
            made: Counter[str] = Counter(
                run.role for run in [*self.trials(cell), *self.finals(cell)] if self.fresh(run) is not None
            )
            trials = self.grid.search["trials"] if self.grid.search and self.grid.searched(cell) else 0
            wanted: dict[str, int] = {"trial": int(trials)}
            wanted["seed"] = len(self.grid.seeds(cell))
            if self.refusal(cell) is None:
                total += sum(whole * shares[role] * max(0, n - made[role]) for role, n in wanted.items())
        return total / workers

    def _line(self, run: Run, record: Record, seconds: float, workers: int, beside: int) -> str:
        made, total = self._counts(self.cells)
        left = self.left(workers)
        ahead = f"  [{made}/{total}" + ("" if left is None else f", about {left / 60:.0f} min left") + "]"
        if record["status"] != "done":
            return f"{run.name}: {record['status']}: {record['error']}{ahead}"
        metric = record["metric"]
        shown = "  ".join(f"{k} {record['dev'][k]:.4f}" for k in dict.fromkeys(("loss", metric)) if k in record["dev"])
        rate = "" if record["lr"] is None or run.role == "untrained" else f"  lr {record['lr']:g}"
        return f"{run.name}: dev {shown}{rate}  {seconds:.1f} s{ahead}"


def _sources(given: Any) -> list[Any]:
    return [] if given is None else [given] if isinstance(given, str) else list(given)
