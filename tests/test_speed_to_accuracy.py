"""Speed to accuracy: what a run may spend and is priced at, where a curve reaches a target, the ratio of auto to MeZO. On
made-up records; no model is run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _speed_run as speed
import speed_to_accuracy as bench
from _zo_grid import fresh
from smidgen import auto
from smidgen.planner import passes

GRID = speed.SpeedGrid.read(Path(bench.__file__).with_suffix(".yaml"))
COLD, FITTED = "minilm-sst2", "minilm-sst2-fitted"


def record(run, losses, **more):
    """A made-up record with a loss at evenly spaced steps."""
    s = run.settings
    points = [
        {"step": k * s["steps"] // max(1, len(losses) - 1), "seconds": 2.0 * k, "cpu_seconds": 1.0 * k, "loss": loss}
        for k, loss in enumerate(losses)
    ]
    made = {"status": "done", "lr": s["lr"], "settings_sha256": run.sha256, "dev": {"loss": losses[-1]}, "curve": points}
    return bench.priced(GRID, run, made | {"forwards": 1, "fit_forwards": 0, "backwards": 0, "steps_made": s["steps"]} | more)


def finished(cells, losses):
    """Records of everything that the grid states for some cells; losses: by method."""
    records = {}
    while waiting := [r for r in GRID.stated(records, cells) if fresh(r, records) is None]:
        records |= {run.name: record(run, losses[run.method]) for run in waiting}
    return records


def test_every_method_spends_the_budget_and_searches_as_often_and_some_not_at_all():
    for place in (COLD, FITTED):
        budget = GRID.budget(place)
        for method in ("zo_sgd", "auto", "adamw"):
            cell = (place, "full", method)
            spent = GRID.steps(cell) * GRID.forwards(cell) * 16
            assert spent <= budget < spent + GRID.forwards(cell) * 16
    records = finished(
        [(COLD, "full", "zo_sgd"), (COLD, "full", "auto"), (COLD, "readout", "fit")],
        {method: [1, 0.5] for method in GRID.methods},
    )
    roles = [name.rpartition("/")[2].split("-")[:3] for name in records]
    assert roles.count(["full", "zo_sgd", "search"]) == 4 and roles.count(["full", "zo_sgd", "seed"]) == 5
    assert roles.count(["full", "auto", "search"]) == 0 and roles.count(["full", "auto", "seed"]) == 5
    fit = records[f"{COLD}/readout-fit-seed-0"]
    assert fit["curve"][-1] == {"step": 0, "seconds": 2.0, "cpu_seconds": 1.0, "loss": 0.5, "forwards": 500}


def test_only_final_runs_are_evaluated_on_the_way_and_no_test_row_is_read():
    cell = (COLD, "full", "zo_sgd")
    trial, final = GRID.search(cell, {})[0], GRID.finals(cell, 1e-3)[0]
    assert "eval_steps" not in trial.settings["train"] and not trial.settings["test"]
    assert final.settings["train"]["eval_steps"] == final.settings["steps"] // GRID.raw["points"] and not final.settings["test"]


def test_auto_costs_what_the_grid_says():
    """The grid prices a step of auto by hand: it has to follow `smidgen.auto`."""
    name, lr, options = auto.CHOICES["full"]
    found = passes(name, {"lr": lr, **options}, {"weight": (4, 3)})  # of a second step: the first may measure the model
    assert found.forwards == GRID.methods["auto"]["forwards"] and not found.backwards and not found.slopes


def test_where_a_curve_reaches_a_target():
    points = [{"forwards": f, "loss": loss, "accuracy": a} for f, loss, a in ((0, 1.0, 0.5), (10, 0.5, 0.75), (20, 0.6, 0.7))]
    assert speed.reached(points, "forwards", "loss", 0.75) == 5.0
    assert speed.reached(points, "forwards", "loss", 1.5) == 0.0
    assert speed.reached(points, "forwards", "accuracy", 0.6) == pytest.approx(4.0)
    assert speed.reached(points, "forwards", "loss", 0.4) is None
    assert speed.penalised(points, "forwards", "loss", 0.4) == 40.0


def test_the_ratio_to_mezo_counts_from_the_same_start():
    losses = {"zo_sgd": [1.0, 0.9, 0.8], "auto": [1.0, 0.6, 0.5]}
    for place, start in ((COLD, "cold"), (FITTED, "same_start")):  # the fitted head's forwards are in neither side
        cells = [(place, "full", method) for method in losses]
        records = finished(cells, losses)
        found = bench.comparison(GRID, cells, records)
        ours, theirs = (bench.finals(GRID, cell, records)[0]["curve"] for cell in (cells[1], cells[0]))
        half = (ours[1]["forwards"] - ours[0]["forwards"]) / 2  # where auto is at 0.8
        ratio = half / (theirs[2]["forwards"] - theirs[0]["forwards"])
        assert found[f"auto_over_mezo_{start}_{COLD}"] == pytest.approx(ratio)
        assert found[f"auto_over_mezo_{start}_{COLD}_seeds"] == 5 and found[f"auto_over_mezo_{start}"] == pytest.approx(ratio)
        assert found[f"auto_over_mezo_{start}_worst_high"] == pytest.approx(ratio)


def test_seeds_in_which_mezo_rose_say_nothing_and_auto_may_be_late():
    run = GRID.finals((COLD, "full", "zo_sgd"), 1e-3)[0]
    fell, rose = (record(run, losses) for losses in ([1.0, 0.5], [1.0, 1.1]))
    assert speed.ratios({0: fell, 1: fell}, {0: fell, 1: rose}) == [1.0]
    assert speed.ratios({0: record(run, [1.0, 0.9])}, {0: fell}) == [speed.LATE]


def test_the_interval_is_that_of_resampled_means():
    """Of 0 and 1 a quarter of the resampled means is 0, a quarter 1; equal values have no spread."""
    assert speed.interval([0.0, 1.0]) == (0.5, 0.0, 1.0) and speed.interval([0.3, 0.3])[1:] == (0.3, 0.3)
    mean, low, high = speed.interval([0.1, 0.2, 0.3, 0.4, 0.5])
    assert 0.1 < low < 0.2 < mean < 0.4 < high < 0.5


def test_prices_leave_out_what_most_seeds_do_not_reach():
    cells = [(COLD, "full", "zo_sgd")]
    records = finished(cells, {"zo_sgd": [0.7, 0.55]})
    for made in records.values():
        for point in made["curve"]:
            point["accuracy"] = 0.5
    found = bench.prices(GRID, cells, records)
    name = f"{COLD}_full_zo_sgd"
    assert found[f"{name}_loss"] == 0.55 and found[f"{name}_forwards_to_loss_0.6"] > 0
    assert f"{name}_forwards_to_loss_0.5" not in found


def test_a_clock_leaves_evaluations_out(monkeypatch):
    now = iter([0, 1, 10, 15, 20, 22, 29])  # made, before, loss at 1, evaluated, loss at 2, evaluated, ...
    monkeypatch.setattr(speed.Clock, "_now", staticmethod(lambda: (value := float(next(now)), value / 2)))
    clock = speed.Clock()
    for line in ("before  eval_loss 1", "step 1/2  loss 1", "step 1/2  eval_loss 1", "step 2/2  loss 1", "after   eval_loss"):
        clock(line)
    assert clock.at == {1: (9.0, 4.5), 2: (14.0, 7.0)}
