"""Records of runs: what is read, what is migrated, what is refused by name, and when data count as equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smidgen import intervals, records
from smidgen.config import ConfigError

ROOT = Path(__file__).parents[1]


def record(method: str = "adamw", seed: int = 0, value: float = 0.8, **more: Any) -> dict[str, Any]:
    """A made-up record of a run that ended well."""
    found: dict[str, Any] = {"format": 2, "name": f"m-t/full-{method}-seed-{seed}", "model": "m", "task": "t", "scheme": "full"}
    found |= {"method": method, "role": "seed", "seed": seed, "status": "done", "error": None, "metric": "accuracy", "lr": 1e-3}
    found |= {"before": {"loss": 0.7, "accuracy": 0.5}, "dev": {"loss": 0.5, "accuracy": value}}
    found |= {"test": {"loss": 0.5, "accuracy": value}, "steps": 10, "batch": 4, "forwards": 10, "backwards": 10, "tokens": 99}
    found |= {"seconds": 2.0, "cpu_seconds": 1.9, "peak_bytes": 50 << 20, "tuned_weights": 5, "weights": 10, "threads": 1}
    rows = {name: {"rows": n, "sha256": f"{name}-{seed}"} for name, n in (("train", 100), ("dev", 50), ("test", 400))}
    found |= {"data": rows, "versions": {"smidgen": "0.1.0"}, "budget": {"forwards": 120}, "command": "smidgen train x=1"}
    found["curve"] = [
        {"step": 0, "forwards": 0, "backwards": 0, "seconds": 0.0, "cpu_seconds": 0.0, "loss": 0.7, "accuracy": 0.5},
        {"step": 10, "forwards": 10, "backwards": 10, "seconds": 2.0, "cpu_seconds": 1.9, "loss": 0.5, "accuracy": value},
    ]
    found["planned"] = {"weights": 10 << 20, "gradients": 10 << 20, "optimizer": 20 << 20, "activations": 5 << 20, "logits": 0}
    found["planned"] |= {"scratch": 0, "total": 45 << 20}
    return found | {"interval": [value - 0.04, value + 0.04]} | more


def written(folder: Path, values: Any, name: str = "a/b.json") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return folder


def test_what_is_written_is_read(tmp_path):
    found = record()
    assert records.read([written(tmp_path, found, "records/m-t/full-adamw-seed-0.json")]) == [found]


def test_records_of_the_first_format_are_brought_to_the_second():
    found = records.read([ROOT / "results" / "zo_bench" / "stories-sst2"])
    assert {r["role"] for r in found} >= {"untrained", "search", "seed"} and {r["format"] for r in found} == {2}
    one = next(r for r in found if r["method"] == "adamw" and r["scheme"] == "full" and r["role"] == "seed")
    assert one["interval"][0] < one["test"]["accuracy"] < one["interval"][1]
    assert [p["step"] for p in one["curve"]] == [0, one["steps"]] and one["data"]["test"]["rows"] == 872
    records.refuse_unequal(found)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (record(format=3), "format 3.*take a newer smidgen"),
        (record(format=None), "format None.*make the run again"),
        ({k: v for k, v in record().items() if k != "peak_bytes"}, "lacks peak_bytes"),
    ],
)
def test_another_format_is_refused_by_name(tmp_path, values, says):
    with pytest.raises(ConfigError, match=says):
        records.read([written(tmp_path, values)])


def test_what_holds_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no record and no run"):
        records.read([written(tmp_path, {"x": 1})])
    with pytest.raises(ConfigError, match="is no folder"):
        records.read([tmp_path / "nowhere"])
    (tmp_path / "a" / "b.json").write_text("{")
    with pytest.raises(ConfigError, match=r"b\.json is no JSON"):
        records.read([tmp_path])


def test_unequal_rows_are_not_ranked():
    first, other = record(), record("zo_sgd")
    records.refuse_unequal([first, other, record(seed=1), record("zo_sgd", 1)])
    for split in ("train", "test"):
        changed = {**other, "data": {**other["data"], split: {"rows": 7, "sha256": "else"}}}
        with pytest.raises(ConfigError, match=f"different {split} rows .* 7"):
            records.refuse_unequal([first, changed])


def test_trials_and_the_model_as_it_is_are_not_ranked():
    trial = {k: v for k, v in record(name="trial", role="trial").items() if k != "test"}
    trial["data"] = {"train": record()["data"]["train"]}
    records.refuse_unequal([record(), trial, record(seed=1), {**record(seed=2), "role": "untrained", "data": {}}])


def test_draws_of_different_seeds_are_compared_only_where_a_seed_is_shared():
    with pytest.raises(ConfigError, match="different train rows"):
        records.refuse_unequal([record(seed=0), record("zo_sgd", seed=1)])


def test_a_failed_run_asks_for_no_data():
    records.refuse_unequal([record(), {**record("zo_sgd"), "status": "failed", "data": {}}])


@pytest.mark.parametrize(("value", "rows"), [(0.0, 10), (1.0, 10), (0.73, 872)])
def test_an_interval_holds_its_value_and_stays_in_bounds(value, rows):
    low, high = intervals.interval("accuracy", value, rows)
    assert 0 <= low <= value <= high <= 1
    assert intervals.interval("loss", value, rows) is None


def test_a_curve_runs_from_the_start_to_the_end():
    result = {"steps": 4, "forwards": 8, "backwards": 0, "before": {"loss": 1.0}, "dev": {"loss": 0.4}, "seconds": 9.0}
    lines = [
        {"step": 0, "before": {"loss": 1.0}},
        {"step": 2, "eval_loss": 0.7, "eval_runtime": 3.0, "seconds": 1.0, "cpu_seconds": 0.9},
        {"step": 4, "loss": 0.4, "seconds": 2.0, "cpu_seconds": 1.8},
    ]
    assert records.curve(result, lines) == [
        {"step": 0, "forwards": 0, "backwards": 0, "seconds": 0.0, "cpu_seconds": 0.0, "loss": 1.0},
        {"step": 2, "forwards": 4, "backwards": 0, "seconds": 1.0, "cpu_seconds": 0.9, "loss": 0.7},
        {"step": 4, "forwards": 8, "backwards": 0, "seconds": 2.0, "cpu_seconds": 1.8, "loss": 0.4},
    ]
