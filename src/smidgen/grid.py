"""The grid of `smidgen compare`: which runs it consists of, with all their settings. Pure functions of the file and of what
is known of costs.

    title: what is compared              # one line
    models:  {stories: {model: FOLDER}}  # label -> keys of a run's configuration; an empty entry means `model: label`
    tasks:   {sst2: {data: FOLDER, benchmark_split: true, train_rows: 1000}}
    schemes: {full: {}, lora: {scheme_args: {rank: 8}}}
    methods: {zo_sgd: {lr: {full: 3e-4, lora: 3e-3}, method_args: {normalise: rms}}, adamw: {lr: 1e-4}}
    common:  {max_length: 48}            # keys of every run
    seeds:   [0, 1, 2]
    budget:  {forwards: 3200}            # or {seconds: 60}; either with {memory: 500MB}
    search:  {trials: 5}                 # of the rate, on the dev rows; without it `lr` is taken as it is

A cell is a model, a task, a scheme and a method. Later sections win: common, model, task, scheme, method. An entry may also
hold, besides keys of the configuration:

    lr         centre of the search, or the rate; a number, or one for each scheme. Default: what the method suggests
    search     further keys to search, {method_args.eps: [low, high]}, between two values, evenly in the logarithm
    rates_of   another method, whose rate it takes
    models, tasks, schemes     labels to which a method (or scheme, or task) is restricted
    seeds      its own
    batch      rows of a step, where not the same for all (train.per_device_train_batch_size)

AdamW with activation checkpointing is added to every scheme if no method of the grid is that (`CHECKPOINTED`): no comparison
of memory leaves it out.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from smidgen import config_file as configuration
from smidgen import optim, tasks
from smidgen.config import ConfigError, RunConfig
from smidgen.grid_checks import _FIELD, budget, flattened, is_checkpointed, known, load, search, section, seeds, unknown
from smidgen.settings import activations_config, scheme_config
from smidgen.trainer import method_config

CHECKPOINTED = "adamw_checkpointed"
POINTS = 5  # evaluations on the dev rows along a run, the last at its end; chosen
UNTRAINED = "untrained"  # the method label of a model as it is

Role = Literal["untrained", "pilot", "trial", "seed"]

_AXES = ("models", "tasks", "schemes", "methods")
_KEYS = {"title", *_AXES, "common", "seeds", "budget", "search", "points"}
_OWN = {"lr", "search", "rates_of", "models", "tasks", "schemes", "seeds", "batch"}


@dataclass(frozen=True)
class Cell:
    """A model, a task, a scheme and a method, by their labels."""

    model: str
    task: str
    scheme: str
    method: str

    @property
    def name(self) -> str:
        return f"{self.model}-{self.task}/{self.scheme}-{self.method}"

    def __str__(self) -> str:
        return f"{self.model}, {self.task}, {self.scheme}, {self.method}"


@dataclass(frozen=True)
class Run:
    """One run: where its record lies, and everything that decides its outcome."""

    cell: Cell
    role: Role
    number: int  # of the seed, or of the trial
    config: RunConfig = field(hash=False, compare=False)
    budget: Mapping[str, Any] = field(hash=False, compare=False)

    @property
    def name(self) -> str:
        """Its record's path below the folder of records, without suffix."""
        return self.cell.name if self.role == "untrained" else f"{self.cell.name}-{self.role}-{self.number}"

    @functools.cached_property
    def sha256(self) -> str:
        """Identifies the settings: a record made with others is stale."""
        settings = [configuration.config_sha256(self.config), self.role, self.tested]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    @property
    def tested(self) -> bool:
        """Whether the test rows are read."""
        return self.role in ("seed", "untrained")


@dataclass(frozen=True)
class Grid:
    """A grid, checked. Raises ConfigError for whatever is wrong with it, by name."""

    raw: Mapping[str, Any]
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # configurations that were asked for

    @classmethod
    def read(cls, path: Path) -> Grid:
        """The grid of a YAML file."""
        if not path.is_file():
            raise ConfigError(
                f"{path} is no file: give a grid such as recipes/zo_bench-small.yaml, or folders of finished runs"
            )
        raw = configuration.parse_value(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or not set(_AXES) & raw.keys():
            raise ConfigError(f"{path} is no grid: it needs models, tasks, schemes and methods")
        return cls.of(raw)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Grid:
        """A grid from its content, its defaults filled in and the checkpointed contestant added."""
        known("the grid", raw, _KEYS)
        found = dict(raw)
        for axis in _AXES:
            given = raw.get(axis, {"full": {}} if axis == "schemes" else {"embedded": {}} if axis == "models" else {})
            if isinstance(given, list):
                given = {str(label): {} for label in given}
            if not isinstance(given, dict) or not given:
                raise ConfigError(f"the grid has zero cells: {axis} is empty; name at least one")
            found[axis] = {label: section(axis, label, entry) for label, entry in given.items()}
        found["seeds"] = seeds(raw.get("seeds", [0, 1, 2]))
        found["budget"] = budget(raw.get("budget"))
        found["search"] = search(raw.get("search"))
        found["points"] = raw.get("points", POINTS)
        methods = found["methods"]
        if not any(is_checkpointed(label, entry) for label, entry in methods.items()):
            added = {"method": "adamw", "train": {"gradient_checkpointing": True}}
            own = methods.get("adamw")
            twin = {**own, "rates_of": "adamw"} if own is not None and own.get("method", "adamw") == "adamw" else {}
            methods[CHECKPOINTED] = {**twin, **added}
        grid = cls(found)
        grid._check()
        return grid

    def _check(self) -> None:
        for axis in _AXES:
            for label, entry in self.raw[axis].items():
                for other in _AXES[:3]:
                    for name in entry.get(other, ()):
                        if name not in self.raw[other]:
                            raise ConfigError(unknown(f"{axis}.{label}.{other}", name, self.raw[other]))
                twin = entry.get("rates_of")
                if twin is not None and twin not in self.raw["methods"]:
                    raise ConfigError(unknown(f"{axis}.{label}.rates_of", twin, self.raw["methods"]))
        if not self.cells():
            raise ConfigError("the grid has zero cells: its restrictions (models, tasks, schemes of an entry) leave none")
        for cell in self.cells():
            self.config(cell)

    # -- cells --------------------------------------------------------------------------------------------------------

    def cells(self, only: Sequence[str] = ()) -> list[Cell]:
        """Every cell. only: labels to keep; it restricts the axes of which it names one."""
        known = {label for axis in _AXES for label in self.raw[axis]}
        for name in only:
            if name not in known:
                raise ConfigError(unknown("--only", name, known))
        found = []
        for labels in itertools.product(*(self.raw[axis] for axis in _AXES)):
            by_axis = dict(zip(_AXES, labels, strict=True))
            entries = [self.raw[axis][label] for axis, label in by_axis.items()]
            allowed = all(by_axis[axis] in entry[axis] for entry in entries for axis in _AXES[:3] if axis in entry)
            kept = all(label in only or not set(only) & set(self.raw[axis]) for axis, label in by_axis.items())
            if allowed and kept:
                found.append(Cell(*labels))
        return found

    def entries(self, cell: Cell) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The sections that a cell's configuration is made of, the later winning, each with its name."""
        yield "common", self.raw.get("common", {})
        for axis in _AXES:
            label = getattr(cell, _FIELD[axis])
            yield f"{axis}.{label}", {_FIELD[axis]: label, **self.raw[axis][label]}

    def own(self, cell: Cell, key: str, default: Any = None) -> Any:
        """A grid's key of the cell's method, such as lr or seeds; one number, or one for each scheme."""
        value = self.raw["methods"][cell.method].get(key, default)
        if key == "lr" and isinstance(value, Mapping):
            return value.get(cell.scheme, default)
        return value

    def config(self, cell: Cell, values: Mapping[str, Any] | None = None) -> RunConfig:
        """The configuration of a cell's runs before seed, rate and steps are known, with dotted keys replaced."""
        key = cell, json.dumps(values or {}, sort_keys=True)
        if key not in self._made:
            self._made[key] = self._config(cell, values)
        return self._made[key]

    def _config(self, cell: Cell, values: Mapping[str, Any] | None) -> RunConfig:
        merged: dict[str, Any] = {}
        for place, entry in self.entries(cell):
            flat = flattened({k: v for k, v in entry.items() if k not in _OWN}, place)
            if "batch" in entry:
                flat["train.per_device_train_batch_size"] = entry["batch"]
            load(flat, place)
            merged |= flat
        for key in ("train.learning_rate", "method_args.lr"):
            if key in merged:
                raise ConfigError(f"{cell}: {key} is the grid's: give `lr` of the method")
        if merged.get("train.max_steps") not in (None, 0) or "train.num_train_epochs" in merged:
            raise ConfigError(f"{cell}: steps follow from the budget: leave train.max_steps and train.num_train_epochs out")
        if merged.get("task") is not None and merged["task"] not in tasks.names():
            raise ConfigError(unknown(f"tasks.{cell.task}", str(merged["task"]), tasks.names()))
        batch = merged.get("train.per_device_train_batch_size", RunConfig().train.per_device_train_batch_size)
        merged.setdefault("train.per_device_eval_batch_size", batch)  # evaluation must not decide the peak memory
        config = load(merged | dict(values or {}), str(cell))
        scheme_config(config)
        activations_config(config)
        method_config(config.method, None, {k: v for k, v in config.method_args.items() if k != "lr"})
        return config

    # -- what a run may spend -----------------------------------------------------------------------------------------

    @property
    def budget(self) -> Mapping[str, Any]:
        return self.raw["budget"]

    @property
    def search(self) -> Mapping[str, Any] | None:
        return self.raw["search"]

    def searched(self, cell: Cell) -> bool:
        """Whether trials choose the cell's rate: where there are steps, a search and no other method to take it from."""
        fitted = self.config(cell).train.max_steps == 0
        return self.search is not None and not fitted and self.own(cell, "rates_of") is None

    def twin(self, cell: Cell) -> Cell | None:
        """The cell whose rate this one takes, where the grid has it."""
        other = self.own(cell, "rates_of")
        found = None if other is None else replace(cell, method=other)
        return found if found in self.cells() else None

    def centre(self, cell: Cell) -> float:
        """The rate of a cell, or the middle of its search: given, suggested by the method for the scheme, or its default."""
        lr = self.own(cell, "lr")
        if lr is None:
            config = self.config(cell)
            module = optim.get(config.method)
            lr = getattr(module, "SUGGESTED", {}).get(config.scheme, {}).get("lr")
            lr = module.Config(**config.method_args).lr if lr is None else lr
        return float(lr)

    def seeds(self, cell: Cell) -> list[int]:
        return self.own(cell, "seeds") or self.raw["seeds"]

    def steps(self, config: RunConfig, cost: float, pace: float | None, share: float = 1.0) -> int:
        """Steps that a share of the budget pays for, at least one. cost: forwards of a step's batch; pace: seconds a step."""
        if config.train.max_steps == 0:
            return 0
        if "seconds" in self.budget:
            assert pace is not None
            return max(1, int(share * self.budget["seconds"] / pace))
        rows = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
        return max(1, int(share * self.budget["forwards"] / (cost * rows) + 1e-9))

    # -- runs ---------------------------------------------------------------------------------------------------------

    def run(self, cell: Cell, role: Role, number: int, steps: int, values: Mapping[str, Any]) -> Run:
        """One run with all its settings. values: `lr`, other searched keys, and what memory leaves of the batch."""
        changed: dict[str, Any] = {k: v for k, v in values.items() if k != "lr"}
        changed |= {"train.max_steps": steps, "seed": number if role == "seed" else self._first_seed}
        if values.get("lr") is not None and steps:
            changed["train.learning_rate"] = values["lr"]
        key = cell, role, number, steps, json.dumps(values, sort_keys=True)
        if key in self._made:
            return self._made[key]
        points = self.raw["points"] if role == "seed" else 1
        every = max(1, -(-steps // points))
        config = self.config(
            cell, {"train.logging_steps": every, "train.eval_steps": every, "train.save_strategy": "no", **changed}
        )
        if role != "seed" or steps <= every:
            config = configuration.with_values(config, {"train.eval_strategy": "no"})
        self._made[key] = Run(cell, role, number, config, self.budget)
        return self._made[key]

    @property
    def _first_seed(self) -> int:
        return self.search["seed"] if self.search is not None else self.raw["seeds"][0]

    def untrained(self, cell: Cell) -> Run:
        """The model as it is: one step of zo_sgd on all weights, too small to move one."""
        plain = {"method_args": {}, "scheme_args": {}, "method": "zo_sgd", "scheme": "full", "train.eval_strategy": "no"}
        config = configuration.with_values(self.config(cell), plain)
        still = {"train.max_steps": 1, "train.learning_rate": 1e-30, "seed": self.raw["seeds"][0], "train.save_strategy": "no"}
        still |= {"activations": None, "activations_args": {}, "train.gradient_checkpointing": False, "head_start": "model"}
        config = configuration.with_values(config, still)
        return Run(replace(cell, scheme="-", method=UNTRAINED), "untrained", 0, config, {})


def select(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """What the trial with the lowest loss on the dev rows was given, the smaller rate of equals; None where none has a loss."""
    scored = [(loss_of(t), t["values"]["lr"], k) for k, t in enumerate(trials) if math.isfinite(loss_of(t))]
    return trials[min(scored)[2]]["values"] if scored else None


def loss_of(trial: Mapping[str, Any]) -> float:
    """What a search minimises: loss on the dev rows, or minus the measure where there is none; infinite after a failure."""
    if trial["status"] != "done":
        return math.inf
    loss = trial["dev"].get("loss")
    loss = -trial["dev"][trial["metric"]] if loss is None else loss
    return loss if math.isfinite(loss) else math.inf
