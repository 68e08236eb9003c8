"""Studies on data and models that they make themselves: where these lie, and what a run of such a study records.

A grid writes `{made}` for the folder; a record keeps that word, so records are the same wherever the folder stands.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _zo_run as one
from _study import ROOT, kept
from _zo_grid import Cell, Grid, Run

MADE = ROOT / "runs" / "velora_study"


def cells(grid: Grid, shared: Path, only: Sequence[str]) -> tuple[list[Cell], list[str]]:
    """All cells of a grid that `only` lets pass: what they need is made first."""
    return [cell for cell in grid.cells() if kept(grid, cell, only)], []


def placed(values: Any, made: Path) -> Any:
    """Settings with the folder in the place of its word."""
    return json.loads(json.dumps(values).replace("{made}", str(made)))


def recorded(made: Path, count: Callable[[Any, Run], int], run: Run, shared: Path, data: Path, threads: int) -> dict[str, Any]:
    """A run's record with the bytes that one batch saves for the backward pass; count: them, of a configuration."""
    here = dataclasses.replace(run, settings=placed(run.settings, made))
    record = one.measure(here, shared, data, threads)
    record |= {"model": run.settings["model"], "run": run.settings["run"], "settings_sha256": run.sha256}
    if record["status"] == "done" and run.role != "zero_shot":
        record["saved_bytes"] = count(one.configuration(here, shared, data, made / "none", threads), run)
    return record


def measure(made: Path, count: Callable[[Any, Run], int]) -> one.Measure:
    """`recorded` as a study wants it."""
    return functools.partial(recorded, made, count)


def saved_bytes(config: Any, batch: dict[str, Any], classes: int | None) -> int:
    """Bytes that a training forward of a batch keeps, parameters and the batch left out, each storage once."""
    import torch

    from smidgen import activations
    from smidgen import run as runs
    from smidgen.probing import Engine

    loaded = runs.load(config, classes)
    model, view = loaded.adapted.model, loaded.adapted.view
    if config.activations is not None:
        policy = activations.get(config.activations)
        policy.build(model, policy.Config(**config.activations_args), view=view, seed=config.seed)
    engine = Engine(model, view, loaded.kind)
    engine.prepare(batch)
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *batch.values()]}
    found: dict[int, int] = {}
    held = []  # so that no storage is freed and its address used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    model.train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.differentiable(batch).nll.sum()
    return sum(found.values())
