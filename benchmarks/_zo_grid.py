"""The grid of the zeroth-order study: which runs it consists of, what each may spend, and which rate a search chooses.

Pure functions of a grid (benchmarks/zo_bench.yaml explains its keys) and of the records that exist. `stated` lists every
run whose settings are known by now: trials of the search at once, the seeds of a cell when its search is complete, the
variants when the seeds of both their methods are.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

FORMAT = 1  # of a record
ZERO_SHOT = "zero_shot"  # the method label of the untrained model's record
_NOTHING = 1e-30  # a rate that moves no weight: the untrained model's record is a run of one such step

Role = Literal["zero_shot", "search", "seed", "equal_time", "equal_memory"]
Record = Mapping[str, Any]
Cell = tuple[str, str, str]  # place, scheme, method label


@dataclass(frozen=True)
class Run:
    """One run: where its record lies, and everything that decides its outcome."""

    place: str
    scheme: str
    method: str  # the grid's label; settings["method"] is the module
    role: Role
    seed: int
    settings: dict[str, Any] = field(hash=False)

    @property
    def cell(self) -> Cell:
        return self.place, self.scheme, self.method

    @property
    def name(self) -> str:
        """Its record's path below the folder of records, without suffix."""
        tail = f"lr{self.settings['lr']:g}" if self.role == "search" else f"{self.seed}"
        stem = f"{self.scheme}-{self.method}-{self.role}"
        return f"{self.place}/{stem}" if self.role == "zero_shot" else f"{self.place}/{stem}-{tail}"

    @property
    def sha256(self) -> str:
        """Identifies the settings: a record made with others is stale."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()


@dataclass
class Grid:
    """A grid file, with `scale` times its budgets."""

    raw: dict[str, Any]
    scale: float = 1.0

    @classmethod
    def read(cls, path: Path, scale: float = 1.0) -> Grid:
        return cls(yaml.safe_load(path.read_text()), scale)

    @property
    def places(self) -> dict[str, dict[str, Any]]:
        return self.raw["places"]

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        return self.raw["methods"]

    def cells(self) -> list[Cell]:
        """Every (place, scheme, method) that the grid asks for."""
        found = []
        for place, p in self.places.items():
            for scheme in p["schemes"]:
                for method in p.get("methods", self.methods):
                    m = self.methods[method]
                    if scheme in m.get("schemes", p["schemes"]) and place in m.get("places", self.places):
                        found.append((place, scheme, method))
        return found

    def budget(self, place: str) -> float:
        """Example-forwards that one run may spend."""
        return self.scale * self.places[place]["budget"]

    def forwards(self, cell: Cell) -> float:
        """Cost of a step, in forwards of its batch, as the grid states it: a number, or one for each place, or scheme too."""
        place, scheme, method = cell
        cost = self.methods[method]["forwards"]
        for key in (place, scheme):
            cost = cost[key] if isinstance(cost, Mapping) else cost
        return cost

    def batch(self, place: str) -> int:
        return self.places[place].get("batch", self.raw["batch"])

    def steps(self, cell: Cell, share: float = 1.0, batch: int | None = None) -> int:
        """Steps that a share of the budget pays for, at least one."""
        rows = batch or self.batch(cell[0])
        return max(1, int(share * self.budget(cell[0]) / (self.forwards(cell) * rows) + 1e-9))

    def centre(self, cell: Cell) -> float:
        """Middle of the search: the method's own, else the place's or the grid's for the scheme, times the method's factor."""
        place, scheme, method = cell
        m = self.methods[method]
        if "lr" in m:
            return m["lr"][scheme]
        return m.get("lr_factor", 1.0) * self.places[place].get("lr", {}).get(scheme, self.raw["schemes"][scheme]["lr"])

    def rates(self, cell: Cell) -> list[float]:
        """Learning rates that the search begins with, ascending, spaced evenly in the logarithm around the centre."""
        search = self.raw["search"]
        middle = (search["trials"] - 1) / 2
        return [_short(self.centre(cell) * search["spacing"] ** (k - middle)) for k in range(search["trials"])]

    def next_rate(self, trials: Sequence[Record]) -> float:
        """The rate that a search tries next: beyond the best where that lies at an edge, else between the two best around it.

        A search in which nothing ended with a loss goes down.
        """
        spacing = self.raw["search"]["spacing"]
        ranked = sorted(trials, key=lambda t: t["lr"])
        best = select(ranked)
        at = 0 if best is None else next(k for k, t in enumerate(ranked) if t["lr"] == best)
        if at == 0:
            return _short(ranked[0]["lr"] / spacing)
        if at == len(ranked) - 1:
            return _short(ranked[at]["lr"] * spacing)
        beside = min((ranked[at - 1], ranked[at + 1]), key=_loss)
        return _short(math.sqrt(ranked[at]["lr"] * beside["lr"]))

    def seeds(self, method: str) -> list[int]:
        return self.methods[method].get("seeds", self.raw["seeds"])

    # -- runs ---------------------------------------------------------------------------------------------------------

    def run(self, cell: Cell, role: Role, seed: int, lr: float, steps: int, batch: int | None = None) -> Run:
        """One run with all its settings."""
        place, scheme, method = cell
        p, m = self.places[place], self.methods[method]
        options = dict(m.get("options", {}))
        if m.get("eps", True):
            options["eps"] = self.raw["schemes"][scheme]["eps"]
        for option, other in m.get("scaled", {}).items():  # a second rate, at the same distance from its own centre
            options[option] = _short(lr / self.centre(cell) * self.centre((place, scheme, other)))
        settings = {
            "model": p["model"],
            "task": p["task"],
            "task_args": p.get("task_args", {}),
            "data": p["data"],
            "rows": p["rows"],
            "max_length": p["max_length"],
            "run": {**p.get("run", {}), **m.get("run", {})},
            "scheme": scheme,
            "scheme_args": {**p.get("scheme_args", {}).get(scheme, {}), **m.get("scheme_args", {})},
            "method": m.get("method", method),
            "options": options,
            "lr": lr,
            "steps": steps,
            "batch": batch or self.batch(place),
            "train": {**self.raw["train"], **p.get("train", {}), **m.get("train", {})},
            "test": role != "search",
            "seed": seed,
        }
        return Run(place, scheme, ZERO_SHOT if role == "zero_shot" else method, role, seed, settings)

    def zero_shot(self, place: str, scheme: str) -> Run:
        """The model as it is under a scheme, or under the grid's `untrained` for all: one step of zo_sgd too small to move a
        weight."""
        return self.run((place, self.raw.get("untrained", scheme), "zo_sgd"), "zero_shot", self.raw["seeds"][0], _NOTHING, 1)

    def search(self, cell: Cell, records: Mapping[str, Record]) -> list[Run]:
        """The trials of a cell whose rates are known by now; none where it takes the rate of another method."""
        if "rates_of" in self.methods[cell[2]]:
            return []
        search = self.raw["search"]
        steps = self.steps(cell, search["share"])
        trials = [self.run(cell, "search", search["seed"], lr, steps) for lr in self.rates(cell)]
        for _ in range(search["more"]):
            known = [r for trial in trials if (r := fresh(trial, records)) is not None]
            if len(known) < len(trials):
                break
            trials.append(self.run(cell, "search", search["seed"], self.next_rate(known), steps))
        return trials

    def finals(self, cell: Cell, lr: float) -> list[Run]:
        """The seeds of a cell at the chosen rate."""
        return [self.run(cell, "seed", seed, lr, self.steps(cell)) for seed in self.seeds(cell[2])]

    def variants(self, cell: Cell, own: Sequence[Record], reference: Sequence[Record]) -> list[Run]:
        """The seeds of a cell again, at the time and at the memory that the reference needed."""
        seeds = self.seeds(cell[2])
        lr, steps, batch = own[0]["lr"], own[0]["steps"], own[0]["batch"]
        ratio = _median(reference, "cpu_seconds") / _median(own, "cpu_seconds")
        held = reference[0]["weights_bytes"]
        room, need = (max(1.0, _median(r, "peak_bytes") - held) for r in (reference, own))
        smaller = max(1, min(batch, int(batch * room / need)))
        timed = [self.run(cell, "equal_time", s, lr, max(1, round(steps * ratio))) for s in seeds]
        more = self.steps(cell, batch=smaller)
        return timed + [self.run(cell, "equal_memory", s, lr, more, smaller) for s in seeds]

    # -- what is known by now -----------------------------------------------------------------------------------------

    def chosen(self, cell: Cell, records: Mapping[str, Record]) -> float | None:
        """The rate of a cell, once every trial has a record; None before, or when all failed."""
        place, scheme, method = cell
        other = self.methods[method].get("rates_of")
        if other is not None:
            return self.chosen((place, scheme, other), records)
        trials = [fresh(run, records) for run in self.search(cell, records)]
        known = [t for t in trials if t is not None]
        return select(known) if len(known) == self.raw["search"]["trials"] + self.raw["search"]["more"] else None

    def stated(self, records: Mapping[str, Record], cells: Sequence[Cell] | None = None) -> Iterator[Run]:
        """Every run whose settings are known; records: by `Run.name`."""
        cells = self.cells() if cells is None else cells
        untrained = [self.zero_shot(place, scheme) for place, scheme in dict.fromkeys(cell[:2] for cell in cells)]
        yield from {run.name: run for run in untrained}.values()
        for cell in cells:
            yield from self.search(cell, records)
            lr = self.chosen(cell, records)
            if lr is not None:
                yield from self.finals(cell, lr)
        for variant in self.raw.get("variants", ()):
            for place, scheme, method in cells:
                if method == variant["method"] and place in variant["places"] and scheme in variant["schemes"]:
                    pair = [self._done((place, scheme, m), records) for m in (method, variant["reference"])]
                    if all(pair):
                        yield from self.variants((place, scheme, method), *pair)

    def _done(self, cell: Cell, records: Mapping[str, Record]) -> list[Record]:
        """Records of a cell's seeds, or nothing while one is missing or failed."""
        lr = self.chosen(cell, records)
        found = [] if lr is None else [fresh(run, records) for run in self.finals(cell, lr)]
        done = [r for r in found if r is not None and r["status"] == "done"]
        return done if len(done) == len(found) else []

    def cost(self, run: Run) -> float:
        """Forwards of a step of a run, as the grid states them."""
        return self.forwards((run.place, run.scheme, "zo_sgd" if run.role == "zero_shot" else run.method))

    def seconds(self, run: Run) -> float:
        """Estimated time of a run on one core, from the place's measured speed."""
        p = self.places[run.place]
        spent = run.settings["steps"] * run.settings["batch"] * self.cost(run)
        return spent / p["speed"] + p["evaluation"] * (1.0 if run.settings["test"] else 0.6)


def fresh(run: Run, records: Mapping[str, Record]) -> Record | None:
    """The record of a run, unless it was made with other settings."""
    record = records.get(run.name)
    return record if record is not None and record["settings_sha256"] == run.sha256 else None


def select(trials: Sequence[Record]) -> float | None:
    """The rate with the lowest loss on the dev rows, the smaller one of equals; None where no trial ended with a loss."""
    scored = [(loss, t["lr"]) for t in trials if math.isfinite(loss := _loss(t))]
    return min(scored)[1] if scored else None


def _loss(trial: Record) -> float:
    """Loss on the dev rows; infinite where the trial failed."""
    loss = trial["dev"]["loss"] if trial["status"] == "done" else math.inf
    return loss if math.isfinite(loss) else math.inf


def _short(value: float) -> float:
    """Three digits: what a person would write."""
    return float(f"{value:.3g}")


def _median(records: Sequence[Record], key: str) -> float:
    return statistics.median(r[key] for r in records)
