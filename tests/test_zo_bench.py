"""The zeroth-order study: what a run may spend, which rates are tried and chosen, which runs follow from which records,
what the pages say of a record. On a small grid and made-up records; no model is run."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def module(folder: str, name: str) -> ModuleType:
    """A script's module, with its folder on the path while it is imported."""
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / folder))


grids = module("benchmarks", "_zo_grid")
runs = module("benchmarks", "_zo_run")
study = module("benchmarks", "_study")
tables = module("scripts", "zo_tables")

PLACE = {
    "model": "embedded",
    "task": "reviews",
    "metric": "accuracy",
    "chance": 0.5,
    "data": {"folder": "f", "train": "train.jsonl", "dev": None, "test": None},
    "rows": {"train": 4, "dev": 2, "test": 3},
    "schemes": ["full", "lora"],
    "max_length": 32,
    "budget": 960,
    "speed": 100,
    "evaluation": 2.0,
}
RAW: dict[str, Any] = {
    "seeds": [0, 1],
    "search": {"trials": 3, "more": 2, "spacing": 4, "share": 0.3333, "seed": 0},
    "batch": 16,
    "train": {},
    "schemes": {"full": {"lr": 3e-4, "eps": 1e-3}, "lora": {"lr": 1e-3, "eps": 1e-2}},
    "methods": {
        "zo_sgd": {"forwards": 2, "options": {"normalise": "rms"}},
        "zo_momentum": {"forwards": 2, "lr_factor": 0.1},
        "zo_block": {"forwards": {"here": {"full": 12, "lora": 8}, "there": {"full": 12}}},
        "forward_grad": {"forwards": 2, "eps": False},
        "hybrid": {"forwards": 3.5, "scaled": {"top_lr": "adamw"}, "schemes": ["full"]},
        "adamw": {"forwards": 3, "eps": False, "lr": {"full": 1e-4, "lora": 3e-3}},
        "adamw_checkpointed": {"method": "adamw", "forwards": 3, "eps": False, "rates_of": "adamw", "seeds": [0]},
    },
    "places": {"here": PLACE, "there": {**PLACE, "schemes": ["full"], "methods": ["zo_sgd"], "lr": {"full": 1e-3}}},
    "variants": [{"method": "forward_grad", "reference": "zo_sgd", "places": ["here"], "schemes": ["full"]}],
}
GRID = grids.Grid(RAW)


def record(run: Any, loss: float = 0.5, score: float = 0.8, **more: Any) -> dict[str, Any]:
    """A made-up record of a run that ended well."""
    s = run.settings
    made = {"place": run.place, "scheme": run.scheme, "method": run.method, "role": run.role, "seed": run.seed}
    made |= {"settings_sha256": run.sha256, "status": "done", "lr": s["lr"], "batch": s["batch"], "steps": s["steps"]}
    made |= {"dev": {"loss": loss, "accuracy": score}, "metric": "accuracy", "chance": 0.5, "majority": 0.5}
    made |= {"rows": {"train": 1000, "validation": 300, "test": 400}, "budget": 960, "cost": GRID.cost(run)}
    made |= {
        "steps_made": s["steps"],
        "forwards": 2 * s["steps"],
        "backwards": 0,
        "seconds": 5.0,
        "cpu_seconds": 4.0,
        "peak_bytes": 30 << 20,
    }
    made |= {"state_bytes": 0, "weights_bytes": 10 << 20, "tuned_weights": 7, "model": s["model"], "task": s["task"]}
    return made | ({"test": {"loss": loss, "accuracy": score}} if s["test"] else {}) | more


def finished(*cells: tuple[str, str, str], **more: Any) -> dict[str, dict[str, Any]]:
    """Records of everything that the grid states for some cells, and for the untrained model."""
    records: dict[str, dict[str, Any]] = {}
    while waiting := [r for r in GRID.stated(records, cells) if grids.fresh(r, records) is None]:
        records |= {run.name: record(run, **(more if run.role != "zero_shot" else {"score": 0.6})) for run in waiting}
    return records


def searched(cell: tuple[str, str, str], best: float = 3e-4) -> dict[str, dict[str, Any]]:
    """Records of a cell's whole search, in its order, whose loss grows with the distance of the rate from the best."""
    records: dict[str, dict[str, Any]] = {}
    while waiting := [r for r in GRID.search(cell, records) if grids.fresh(r, records) is None]:
        records |= {run.name: record(run, loss=abs(math.log(run.settings["lr"] / best))) for run in waiting}
    return records


# ---------------------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    ("cell", "steps"),
    [
        (("here", "full", "zo_sgd"), 30),
        (("here", "full", "adamw"), 20),
        (("here", "full", "zo_block"), 5),
        (("here", "lora", "zo_block"), 7),
        (("here", "full", "hybrid"), 17),
    ],
)
def test_no_method_spends_more_than_the_budget_nor_leaves_a_step_of_it(cell, steps):
    assert GRID.steps(cell) == steps
    step = GRID.forwards(cell) * 16
    assert steps * step <= 960 < (steps + 1) * step


def test_a_trial_gets_its_share_and_a_smaller_batch_more_steps():
    assert GRID.steps(("here", "full", "zo_sgd"), 1 / 3) == 10
    assert GRID.steps(("here", "full", "zo_sgd"), batch=8) == 60
    assert grids.Grid(RAW, scale=2).steps(("here", "full", "zo_sgd")) == 60
    assert grids.Grid(RAW, scale=0.001).steps(("here", "full", "zo_sgd")) == 1


def test_every_method_gets_as_many_trials_around_its_centre():
    assert GRID.rates(("here", "full", "zo_sgd")) == [7.5e-5, 3e-4, 1.2e-3]
    assert GRID.rates(("here", "full", "zo_momentum")) == [7.5e-6, 3e-5, 1.2e-4]
    assert GRID.rates(("here", "lora", "adamw")) == [7.5e-4, 3e-3, 1.2e-2]
    assert GRID.rates(("there", "full", "zo_sgd")) == [2.5e-4, 1e-3, 4e-3]
    for cell in GRID.cells():
        assert len(searched(cell)) == (0 if cell[2] == "adamw_checkpointed" else 5)
        assert len(GRID.search(cell, {})) == (0 if cell[2] == "adamw_checkpointed" else 3)


@pytest.mark.parametrize(
    ("best", "tried"),
    [(1.0, [7.5e-5, 3e-4, 1.2e-3, 4.8e-3, 1.92e-2]), (1e-9, [4.68e-6, 1.87e-5, 7.5e-5, 3e-4, 1.2e-3])],
    ids=["above", "below"],
)
def test_a_search_goes_on_beyond_an_edge(best, tried):
    assert sorted(r["lr"] for r in searched(("here", "full", "zo_sgd"), best).values()) == tried


def test_a_search_between_its_edges_grows_finer():
    tried = [r["lr"] for r in searched(("here", "full", "zo_sgd"), best=4e-4).values()]
    assert tried == [7.5e-5, 3e-4, 1.2e-3, 6e-4, 4.24e-4]


def test_a_search_whose_trials_fail_goes_down():
    cell = ("here", "full", "zo_sgd")
    failed = [record(run, status="diverged") for run in GRID.search(cell, {})]
    assert GRID.next_rate(failed) == 1.87e-5
    assert GRID.next_rate([*failed[:1], record(GRID.search(cell, {})[1])]) == 1.2e-3


def test_a_second_rate_keeps_its_distance_from_its_centre():
    tried = [run.settings["options"]["top_lr"] for run in GRID.search(("here", "full", "hybrid"), {})]
    assert tried == GRID.rates(("here", "full", "adamw"))


def test_eps_goes_to_methods_that_probe_alone():
    assert GRID.search(("here", "lora", "zo_sgd"), {})[0].settings["options"] == {"normalise": "rms", "eps": 1e-2}
    assert GRID.search(("here", "lora", "adamw"), {})[0].settings["options"] == {}


def test_places_and_methods_restrict_the_cells():
    cells = GRID.cells()
    assert ("here", "full", "hybrid") in cells and ("here", "lora", "hybrid") not in cells
    assert [cell for cell in cells if cell[0] == "there"] == [("there", "full", "zo_sgd")]


def test_the_trials_never_see_the_test_rows():
    assert not any(run.settings["test"] for run in GRID.search(("here", "full", "zo_sgd"), {}))
    assert all(run.settings["test"] for run in GRID.finals(("here", "full", "zo_sgd"), 1e-3))


def test_selection_is_by_dev_loss_alone():
    trials = GRID.search(("here", "full", "zo_sgd"), {})
    low, mid, high = (
        record(run, loss=loss, score=score) for run, loss, score in zip(trials, (0.6, 0.4, 0.5), (0.7, 0.5, 0.9), strict=True)
    )
    assert grids.select([low, mid, high]) == mid["lr"]
    assert grids.select([low, {**mid, "status": "diverged"}, high]) == high["lr"]
    assert grids.select([low, {**mid, "dev": {"loss": math.nan}}]) == low["lr"]
    assert grids.select([{**low, "dev": {"loss": 0.4}}, mid]) == low["lr"], "the smaller rate of equals"
    assert grids.select([{**low, "status": "refused"}]) is None


def test_seeds_follow_the_whole_search_and_variants_follow_the_seeds():
    cells = [("here", "full", "zo_sgd"), ("here", "full", "forward_grad")]
    trials = searched(cells[0])
    roles = [run.role for run in GRID.stated(trials, cells)]
    assert roles.count("zero_shot") == 1 and roles.count("seed") == 2 and "equal_time" not in roles
    partial = dict(list(trials.items())[:4])
    assert "seed" not in [run.role for run in GRID.stated(partial, cells)]
    records = finished(*cells)
    for r in records.values():
        if r["method"] == "forward_grad":
            r |= {"cpu_seconds": 8.0, "peak_bytes": 50 << 20}
    last = [run for run in GRID.stated(records, cells) if run.role.startswith("equal")]
    steps, batch = (
        {run.settings[key] for run in last if run.role == role}
        for key, role in (("steps", "equal_time"), ("batch", "equal_memory"))
    )
    assert steps == {15}, "half of the 30 steps, since each takes twice as long"
    assert batch == {8}, "20 MiB over the weights instead of 40"
    assert {run.settings["steps"] for run in last if run.role == "equal_memory"} == {60}, "the budget stays"


def test_checkpointing_takes_the_rate_of_the_other_and_one_seed():
    records = searched(("here", "full", "adamw"), best=4e-4)
    stated = [run for run in GRID.stated(records, [("here", "full", "adamw_checkpointed")]) if run.role == "seed"]
    assert [(run.seed, run.settings["lr"], run.settings["method"]) for run in stated] == [(0, 4e-4, "adamw")]


def test_a_record_of_other_settings_is_made_again():
    run = GRID.search(("here", "full", "zo_sgd"), {})[0]
    records = {run.name: record(run)}
    assert grids.fresh(run, records) is not None
    again = next(r for r in grids.Grid(RAW, scale=3).search(run.cell, {}) if r.name == run.name)
    assert grids.fresh(again, records) is None


def test_splits_are_disjoint_and_sized(tmp_path):
    rows = [json.dumps({"text": str(i), "label": i % 2}) for i in range(12)]
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "train.jsonl").write_text("\n".join(rows))
    runs.divide({**PLACE, "data": {**PLACE["data"], "folder": str(tmp_path / "from")}}, tmp_path, tmp_path / "to")
    parts = {f.stem: f.read_text().split("\n")[:-1] for f in (tmp_path / "to" / "seeds").iterdir()}
    assert {name: len(part) for name, part in parts.items()} == {"train": 4, "validation": 2, "test": 3}
    assert len({row for part in parts.values() for row in part}) == 9
    assert {f.name for f in (tmp_path / "to" / "search").iterdir()} == {"train.jsonl", "validation.jsonl"}
    assert runs.majority(tmp_path / "to" / "seeds" / "test.jsonl") in (2 / 3, 1.0)


@pytest.mark.parametrize("name", ["zo_bench.yaml", "zo_bench_gpu.yaml"])
def test_the_committed_grids_state_their_trials(name):
    grid = grids.Grid.read(ROOT / "benchmarks" / name)
    stated = list(grid.stated({}))
    assert len({run.name for run in stated}) == len(stated)
    searched = [cell for cell in grid.cells() if "rates_of" not in grid.methods[cell[2]]]
    assert sum(run.role == "search" for run in stated) == 3 * len(searched)
    assert len(grid.raw["seeds"]) >= 3
    text = yaml.safe_dump(grid.raw)
    assert " /" not in text and "~" not in text, "a path of one machine"


# ---------------------------------------------------------------------------------------------------- the pages


@pytest.mark.parametrize(("score", "heard"), [(0.60, False), (0.64, False), (0.66, True)])
def test_a_cell_within_two_errors_of_the_untrained_model_has_no_signal(score, heard):
    untrained = record(GRID.zero_shot("here", "full"), score=0.60)  # 400 rows: two errors are 4.8 points
    tuned = [record(run, score=score) for run in GRID.finals(("here", "full", "zo_sgd"), 1e-3)]
    assert tables.signal(tuned, untrained) is heard
    assert not tables.signal([{**r, "majority": 0.7} for r in tuned], untrained), "the commonest label is better"


def test_the_error_is_that_of_a_share():
    assert tables.error(0.5, 400) == 0.025
    assert tables.reference(None, 0.25, None) == 0.25


def written(folder: Path, records: dict[str, dict[str, Any]]) -> Path:
    for name, made in records.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made))
    return folder


def test_the_table_ranks_signals_and_names_the_rest(tmp_path):
    records = finished(("here", "full", "zo_sgd"), score=0.61)
    records |= finished(("here", "full", "adamw"), ("here", "full", "adamw_checkpointed"), score=0.9)
    refused = {run.name: record(run, status="refused") for run in GRID.search(("here", "full", "zo_block"), {})}
    text = tables.pages(written(tmp_path, records | refused))["zo_bench.md"]
    assert "| untrained | 60.0 [0.500] |" in text
    assert "| adamw | 90.0 ± 0.0 [0.500] (1) |" in text
    assert "| adamw_checkpointed | 90.0 [0.500] |" in text, "its rate was not searched"
    assert "| zo_sgd | no signal: 61.0 ± 0.0 [0.500] |" in text
    assert "| zo_block | refused |" in text
    assert "| full | adamw | 1.56e-06* |" in text, "equal losses: the smallest rate, at the edge"


def test_pages_are_the_same_again_and_keep_the_conclusions(tmp_path):
    folder, docs = (
        written(tmp_path / "records", finished(("here", "full", "zo_sgd"), ("here", "full", "forward_grad"))),
        tmp_path,
    )
    (folder / "memory.json").write_text(json.dumps({"figures": {"zo_sgd_64_mib": 12.0, "adamw_1024_mib": 99.5}, "setting": {}}))
    options = ["--records", str(folder), "--docs", str(docs)]
    assert tables.main([*options, "--check"]) == 1
    assert tables.main(options) == 0 and tables.main([*options, "--check"]) == 0
    page = docs / "forward_grad.md"
    page.write_text(page.read_text().replace(tables.OPEN + "\n", tables.OPEN + "\nForward gradients cost memory.\n"))
    assert tables.main([*options, "--check"]) == 0, "conclusions are written by hand"
    assert tables.main(options) == 0 and "Forward gradients cost memory." in page.read_text()
    assert "| forward_grad, equal memory | 16 | 30 |" in page.read_text()
    assert "| zo_sgd | 12.0 | - |" in (docs / "zo_bench.md").read_text()
    page.write_text(page.read_text().replace("equal time", "same time"))
    assert tables.main([*options, "--check"]) == 1


def test_a_difference_needs_two_errors_over_seeds():
    assert tables.compared([0.50, 0.51, 0.52], [0.60, 0.61, 0.62]) == "below"
    assert tables.compared([0.50, 0.60, 0.70], [0.61, 0.62, 0.63]) == "not told apart from"
    assert tables.compared([0.9, 0.91], [0.1, 0.12]) == "above"
    assert "one seed" in tables.compared([0.5], [0.6, 0.7])


def test_no_records_no_pages(tmp_path):
    assert tables.pages(tmp_path) == {}


def test_a_record_that_its_study_has_not_completed_is_not_there(tmp_path):
    """A run writes its record, the study adds what the grid knows: killed in between, the run is made again."""
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "whole.json").write_text(json.dumps({"status": "done", "budget": 960.0}))
    (folder / "torn.json").write_text(json.dumps({"status": "done"}))
    assert set(study.read_records(tmp_path)) == {"place/whole"}
