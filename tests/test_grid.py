"""The grid of a comparison: its cells and settings, the contestant that is always there, and everything that is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from smidgen.config import ConfigError
from smidgen.grid import CHECKPOINTED, Cell, Grid, select

ROOT = Path(__file__).parents[1]
RAW = {
    "tasks": {"reviews": {"train_rows": 64}},
    "schemes": {"full": {}, "lora": {"scheme_args": {"rank": 4}}},
    "methods": {"zo_sgd": {"lr": {"full": 1e-3, "lora": 3e-3}, "method_args": {"normalise": "rms"}}, "adamw": {"lr": 1e-4}},
    "common": {"max_length": 32, "train": {"per_device_train_batch_size": 8}},
    "budget": {"forwards": 960},
    "search": {"trials": 5},
}


def grid(**changes):
    return Grid.of({**copy.deepcopy(RAW), **changes})


def cell(method, scheme="full"):
    return Cell("embedded", "reviews", scheme, method)


def test_a_cell_is_configured_by_all_its_sections():
    config = grid().config(cell("zo_sgd", "lora"))
    assert (config.method, config.scheme, config.scheme_args, config.train_rows) == ("zo_sgd", "lora", {"rank": 4}, 64)
    assert config.method_args == {"normalise": "rms"} and config.max_length == 32
    assert config.train.per_device_eval_batch_size == 8  # evaluation does not decide the peak
    assert grid().centre(cell("zo_sgd", "lora")) == 3e-3 and grid().centre(cell("zo_sgd")) == 1e-3


def test_adamw_with_checkpointing_is_always_among_the_contestants():
    found = grid()
    assert {c.method for c in found.cells()} == {"zo_sgd", "adamw", CHECKPOINTED}
    twin = cell(CHECKPOINTED, "lora")
    assert found.config(twin).train.extra["gradient_checkpointing"] is True
    assert found.twin(twin) == cell("adamw", "lora") and not found.searched(twin)
    alone = grid(methods={"zo_sgd": {}})
    assert alone.twin(cell(CHECKPOINTED)) is None and alone.searched(cell(CHECKPOINTED))
    own = {"mine": {"method": "sgd", "lr": 1e-2, "train": {"gradient_checkpointing": True}}}
    assert {c.method for c in grid(methods=own).cells()} == {"mine"}


def test_steps_spend_the_budget_and_no_more():
    found = grid()
    assert found.steps(found.config(cell("zo_sgd")), 2.0, None) == 60
    assert found.steps(found.config(cell("adamw")), 3.0, None, share=1 / 3) == 13
    timed = grid(budget={"seconds": 10})
    assert timed.steps(timed.config(cell("zo_sgd")), 2.0, 0.25) == 40


def test_runs_of_equal_settings_have_equal_digests():
    first, second = (grid().run(cell("zo_sgd"), "seed", 1, 60, {"lr": 1e-3}) for _ in range(2))
    other = grid().run(cell("zo_sgd"), "seed", 1, 60, {"lr": 2e-3})
    assert first.sha256 == second.sha256 != other.sha256
    assert first.name == "embedded-reviews/full-zo_sgd-seed-1" and first.config.seed == 1 and first.tested
    trial = grid().run(cell("zo_sgd"), "trial", 3, 20, {"lr": 1e-3, "method_args.eps": 1e-2})
    assert trial.config.seed == 0 and not trial.tested and trial.config.method_args == {"normalise": "rms", "eps": 1e-2}


def test_restrictions_leave_cells_out():
    only = grid(methods={"zo_sgd": {}, "lozo": {"schemes": ["full"]}})
    assert cell("lozo", "lora") not in only.cells() and cell("lozo") in only.cells()
    assert {c.method for c in only.cells(["lozo"])} == {"lozo"}
    with pytest.raises(ConfigError, match="did you mean 'lozo'"):
        only.cells(["lzo"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": {}}, "zero cells: methods is empty"),
        (
            {
                "methods": {
                    "adamw": {"schemes": []},
                    "x": {"method": "sgd", "schemes": [], "train": {"gradient_checkpointing": True}},
                }
            },
            "zero cells",
        ),
        ({"methods": {"zo_sdg": {}}}, r"methods\.zo_sdg.*did you mean 'zo_sgd'"),
        ({"schemes": {"lroa": {}}}, "did you mean 'lora'"),
        ({"tasks": {"sst": {"task": "sst3"}}}, "did you mean 'sst"),
        ({"method": {}}, "did you mean 'methods'"),
        ({"methods": {"zo_sgd": {"method_args": {"normalize": "rms"}}}}, "normali"),
        ({"methods": {"zo_sgd": {"schemes": ["ful"]}}}, "did you mean 'full'"),
        ({"methods": {"zo_sgd": {"rates_of": "adam"}}}, "rates_of"),
        ({"methods": {"zo_sgd": {"maxlength": 3}}}, "max_length"),
        ({"methods": {"a b": {"method": "zo_sgd"}}}, "is no label"),
        ({"methods": {"zo_sgd": {"train": {"learning_rate": 1.0}}}}, "give `lr` of the method"),
        ({"common": {"train": {"max_steps": 9}}}, "steps follow from the budget"),
        ({"common": {"seed": 3}}, "set by the comparison"),
        ({"budget": {}}, "give budget"),
        ({"budget": {"forwards": 10, "seconds": 10}}, "both forwards and seconds"),
        ({"budget": {"memory": "1GB"}}, "only memory"),
        ({"budget": {"forwards": 0}}, "a number above 0"),
        ({"budget": {"forwards": 9, "memory": "lots"}}, "is not a size"),
        ({"budget": {"steps": 9}}, "budget: there is no 'steps'"),
        ({"search": {"trials": 0}}, "whole number above 0"),
        ({"search": {"share": 2}}, "at most 1"),
        ({"search": {"spacing": 1}}, "above 1"),
        ({"search": {"sampler": "grid"}}, "one of walk, tpe"),
        ({"seeds": []}, "give a list of whole numbers"),
        ({"seeds": [1, 1]}, "stands twice"),
    ],
)
def test_what_is_wrong_is_refused_by_name(changes, says):
    with pytest.raises(ConfigError, match=says):
        grid(**changes)


def test_what_is_no_grid_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("model: embedded\n")
    with pytest.raises(ConfigError, match="is no grid"):
        Grid.read(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="is no file"):
        Grid.read(tmp_path / "b.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_are_grids(path):
    found = Grid.read(path)
    assert found.cells() and any(found.config(c).train.extra.get("gradient_checkpointing") for c in found.cells())


def trial(lr, loss, status="done"):
    return {"status": status, "metric": "accuracy", "dev": {"loss": loss, "accuracy": 0.5}, "values": {"lr": lr}}


def test_the_lowest_loss_is_chosen_the_smaller_rate_of_equals():
    assert select([trial(3, 0.5), trial(1, 0.4), trial(2, 0.4), trial(9, 0.1, "diverged")]) == {"lr": 1}
    assert select([trial(1, float("nan")), trial(2, 0.1, "failed")]) is None
