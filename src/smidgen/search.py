"""The search of a comparison: which rate (and which further options) the trials of a cell try, kept by optuna in SQLite.

One optuna study for each cell and its settings, in `search.db`. A trial is asked for once and keeps its number and its values
whatever is killed in between; its outcome is told from the run's record. `walk`, the default, needs few trials: a rate on
each side of the centre, then beyond the best while that lies at an edge, else between it and its better neighbour. `tpe` is
optuna's sampler, and is taken where further keys are searched as well.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smidgen.config import ConfigError
from smidgen.grid import loss_of

FILE = "search.db"
_FIRST = 3  # trials that are known before any has ended: the centre and a rate on each side of it
_REACH = 8  # spacings between the centre and the ends of the range; no search of so few trials gets there

Values = dict[str, Any]


def require() -> Any:
    """optuna. Raises ConfigError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "the grid asks for a search, which needs optuna: pip install 'smidgen[sweep]', or give each method its `lr` and "
            "leave `search` out"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return optuna


class Search:
    """The studies of one comparison."""

    def __init__(self, folder: Path):
        self.optuna = require()
        folder.mkdir(parents=True, exist_ok=True)
        self._storage = self.optuna.storages.RDBStorage(
            f"sqlite:///{folder / FILE}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
        self._studies: dict[str, Any] = {}

    def trials(
        self,
        name: str,
        settings: Mapping[str, Any],
        centre: float,
        more: Mapping[str, Sequence[float]],
        record_of: Callable[[int, Values], Mapping[str, Any] | None],
    ) -> list[tuple[int, Values]]:
        """(number, values) of a cell's trials that are known by now; to be called by one process at a time.

        settings: the grid's `search`; more: key -> (low, high); record_of: a trial's record, None while it has none.
        """
        study = self._study(name, settings)
        records: dict[int, Mapping[str, Any]] = {}
        known = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
        values = {number: _values(trial) for number, trial in known.items()}
        for number, trial in known.items():
            record = record_of(number, values[number])
            if record is not None:
                records[number] = record
                if not trial.state.is_finished():
                    self._tell(study, number, loss_of(record))
        wanted = settings["trials"]
        first = _first(centre, settings["spacing"])[: min(_FIRST, wanted)]
        while len(values) < wanted and (len(values) < len(first) or len(records) == len(values)):
            if len(values) < len(first):
                study.enqueue_trial({"lr": first[len(values)]})
            elif settings["sampler"] == "walk" and not more:
                study.enqueue_trial(
                    {"lr": next_rate([{**records[n], "values": values[n]} for n in records], settings["spacing"])}
                )
            study.sampler = self.optuna.samplers.TPESampler(n_startup_trials=_FIRST, seed=_seed(name, len(values)))
            trial = study.ask(self._ranges(centre, settings["spacing"], more))
            values[trial.number] = _values(trial)
        return sorted(values.items())

    def _study(self, name: str, settings: Mapping[str, Any]) -> Any:
        if name not in self._studies:
            self._studies[name] = self.optuna.create_study(
                storage=self._storage, study_name=name, direction="minimize", load_if_exists=True
            )
        return self._studies[name]

    def _ranges(self, centre: float, spacing: float, more: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        width = spacing**_REACH
        ranges = {"lr": (centre / width, centre * width), **more}
        return {
            key: self.optuna.distributions.FloatDistribution(float(low), float(high), log=True)
            for key, (low, high) in ranges.items()
        }

    def _tell(self, study: Any, number: int, loss: float) -> None:
        if math.isfinite(loss):
            study.tell(number, loss, skip_if_finished=True)
        else:
            study.tell(number, state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)


def _values(trial: Any) -> Values:
    return {key: short(value) for key, value in trial.params.items()}


def _first(centre: float, spacing: float) -> list[float]:
    return [short(centre), short(centre / spacing), short(centre * spacing)]


def next_rate(trials: Sequence[Mapping[str, Any]], spacing: float) -> float:
    """The rate that a walk tries next: beyond the best where that lies at an edge, else between the two best around it. Where
    nothing ended with a loss it goes down."""
    ranked = sorted(trials, key=lambda t: t["values"]["lr"])
    rates = [t["values"]["lr"] for t in ranked]
    losses = [loss_of(t) for t in ranked]
    at = losses.index(min(losses)) if math.isfinite(min(losses)) else 0
    if at == 0:
        return short(rates[0] / spacing)
    if at == len(rates) - 1:
        return short(rates[at] * spacing)
    beside = min((at - 1, at + 1), key=lambda k: losses[k])
    return short(math.sqrt(rates[at] * rates[beside]))


def short(value: float) -> float:
    """Three digits: what a person would write.

    >>> short(0.00123456)
    0.00123
    """
    return float(f"{value:.3g}")


def _seed(name: str, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{name} {number}".encode()).digest()[:4], "little")
