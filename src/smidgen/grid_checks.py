"""What may stand in a grid: each section is checked, and refused with the place, the value and the nearest name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from smidgen import adapt, advice, optim
from smidgen import config_file as configuration
from smidgen.config import ConfigError, RunConfig, nearest

_FIELD = {"models": "model", "tasks": "task", "schemes": "scheme", "methods": "method"}
_BUDGET = {"forwards", "seconds", "memory"}
_SEARCH = {"trials": 5, "share": 1 / 3, "spacing": 4.0, "seed": 0, "sampler": "walk"}
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]*")


def section(axis: str, label: str, entry: Any) -> dict[str, Any]:
    entry = {} if entry is None else entry
    if not _LABEL.fullmatch(label):
        raise ConfigError(f"{axis}: {label!r} is no label: letters, digits, '_', '+', '.' and '-'")
    if not isinstance(entry, dict):
        raise ConfigError(f"{axis}.{label} = {entry!r}: expected a section of 'key: value' lines")
    entry = dict(entry)
    known = {"schemes": adapt.names(), "methods": optim.names()}.get(axis)
    name = entry.get(_FIELD[axis], label)
    if known is not None and name not in known:
        raise ConfigError(unknown(f"{axis}.{label}", name, known))
    return entry


def known(place: str, given: Mapping[str, Any], keys: Iterable[str]) -> None:
    for key in given:
        if key not in keys:
            raise ConfigError(unknown(place, key, keys))


def unknown(place: str, name: str, known: Iterable[str]) -> str:
    close = nearest(name, known)
    return f"{place}: there is no '{name}'; " + (f"did you mean '{close}'?" if close else f"known: {', '.join(sorted(known))}")


def flattened(entry: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Sections as dotted keys, so that a later entry replaces single keys of a section."""
    found: dict[str, Any] = {}
    for key, value in entry.items():
        if key in ("seed", "output", "resume", "force"):
            raise ConfigError(f"{place}.{key} is set by the comparison: leave it out")
        if key in ("train", "method_args", "scheme_args", "task_args") and isinstance(value, dict):
            found |= {f"{key}.{name}": v for name, v in value.items()}
        else:
            found[key] = value
    return found


def load(values: Mapping[str, Any], place: str) -> RunConfig:
    try:
        return configuration.load(None, (), values, notify=lambda line: None)
    except ConfigError as error:
        raise ConfigError(f"{place}: {str(error).replace('--', '')}") from None


def seeds(given: Any) -> list[int]:
    if not isinstance(given, list) or not given or not all(isinstance(s, int) and s >= 0 for s in given):
        raise ConfigError(f"seeds = {given!r}: give a list of whole numbers, such as [0, 1, 2]")
    if len(set(given)) < len(given):
        raise ConfigError(f"seeds = {given!r}: a seed stands twice")
    return given


def budget(given: Any) -> dict[str, Any]:
    how = "give budget: {forwards: N} or {seconds: S}, either with memory: 500MB"
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"budget = {given!r}: {how}")
    known("budget", given, _BUDGET)
    if {"forwards", "seconds"} <= given.keys():
        raise ConfigError(f"budget has both forwards and seconds, and a run cannot keep to two: {how}")
    if not {"forwards", "seconds"} & given.keys():
        raise ConfigError(f"budget has only memory, which does not say how long a run takes: {how}")
    found = dict(given)
    for key in ("forwards", "seconds"):
        if key in given and (isinstance(given[key], bool) or not isinstance(given[key], int | float) or given[key] <= 0):
            raise ConfigError(f"budget.{key} = {given[key]!r}: give a number above 0")
    if "memory" in given:
        found["memory"] = advice.memory_of(str(given["memory"]))
    return found


def search(given: Any) -> dict[str, Any] | None:
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ConfigError(f"search = {given!r}: give a section such as {{trials: 5}}")
    known("search", given, _SEARCH)
    found = {**_SEARCH, **given}
    if not isinstance(found["trials"], int) or found["trials"] < 1:
        raise ConfigError(f"search.trials = {found['trials']!r}: give a whole number above 0")
    if not 0 < found["share"] <= 1:
        raise ConfigError(
            f"search.share = {found['share']!r}: the part of the budget that a trial spends, above 0 and at most 1"
        )
    if not found["spacing"] > 1:
        raise ConfigError(f"search.spacing = {found['spacing']!r}: the ratio of neighbouring rates, above 1")
    if found["sampler"] not in ("walk", "tpe"):
        raise ConfigError(f"search.sampler = {found['sampler']!r}: one of walk, tpe")
    return found


def is_checkpointed(label: str, entry: Mapping[str, Any]) -> bool:
    recomputes = dict(entry.get("train") or {}).get("gradient_checkpointing")
    return bool(recomputes) and "backward" in optim.get(entry.get("method", label)).build.uses
