"""A comparison at work: records, resuming, staleness, two starts on one folder. One small grid is run; the rest is made up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from smidgen import compared, isolated
from smidgen.cli import app
from smidgen.compare import Comparison
from smidgen.config import ConfigError
from smidgen.grid import Grid

RAW = {
    "tasks": {"reviews": {"train_rows": 32, "dev_rows": 16, "test_rows": 16}},
    "methods": {"zo_sgd": {"lr": 1e-3, "method_args": {"normalise": "rms"}}},
    "common": {"max_length": 24, "train": {"per_device_train_batch_size": 4}},
    "seeds": [0],
    "budget": {"forwards": 40},
    "search": {"trials": 2},
    "points": 2,
}


def comparison(folder: Path, **changes) -> Comparison:
    found = Comparison(Grid.of({**RAW, **changes}), folder, say=lambda line: None)
    found.prepare()
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    made = comparison(folder)
    ended = made.work(1)
    return folder, made, ended


def test_every_run_has_one_record_with_all_that_is_promised(finished):
    folder, _, ended = finished
    assert ended == {"done": 1 + 2 * (2 + 1)}  # the model as it is; two contestants of two trials and a seed
    record = json.loads((folder / "records/embedded-reviews/full-zo_sgd-seed-0.json").read_text())
    for key in ("config", "versions", "seed", "interval", "forwards", "tokens", "seconds", "peak_bytes", "planned", "curve"):
        assert record[key] is not None, key
    assert record["forwards"] == 10 and record["steps"] == 5 and record["status"] == "done"
    assert [p["step"] for p in record["curve"]] == [0, 3, 5] and record["config"]["method_args"] == {"normalise": "rms"}
    trial = json.loads((folder / "records/embedded-reviews/full-zo_sgd-trial-1.json").read_text())
    assert "test" not in trial and trial["values"]["lr"] == 2.5e-4
    backward = json.loads((folder / "records/embedded-reviews/full-adamw_checkpointed-seed-0.json").read_text())
    assert backward["backwards"] == backward["steps"] == 2  # four forwards a step: recomputation is one of them
    assert 0.5 < record["planned"]["total"] / record["peak_bytes"] < 2  # so small that the heap of the parent holds some of it


def test_a_second_start_makes_nothing(finished):
    folder, _, _ = finished
    again = comparison(folder)
    assert not again.work(1)
    made, total = again._counts(again.cells)
    assert made == total == 7 and len(again.results()) == 7


def test_only_what_is_stale_is_open(finished):
    folder, _, _ = finished
    changed = comparison(folder, methods={"zo_sgd": {"lr": 1e-3, "method_args": {"normalise": "rms", "eps": 0.01}}})
    changed._working = True
    stale = {run.name.rpartition("/")[2] for run in changed.stated() if changed.fresh(run) is None}
    assert stale == {"full-zo_sgd-trial-0", "full-zo_sgd-trial-1"}


def test_the_report_follows(finished, capsys):
    folder, _, _ = finished
    with pytest.raises(SystemExit) as end:
        app(["report", str(folder), "--json"])
    assert not end.value.code
    found = json.loads(capsys.readouterr().out)
    (table,) = found["tables"]
    assert {line["method"] for line in table["lines"]} == {"zo_sgd", "adamw_checkpointed"}
    assert {Path(p).name for p in found["pages"]} == {"report.html", "report.md", "report.csv"}


HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
)


def test_a_run_that_another_start_holds_is_left_to_it(tmp_path):
    made = comparison(tmp_path, search=None)
    run = next(made.stated())
    path = str(compared.lock_file(tmp_path, run.name))
    other = subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with other:
        assert other.stdout.readline() == b"held\n"
        assert made._claimed(run)
        compared.perform(run, tmp_path, 1, None)  # does nothing
        assert not (tmp_path / "records").exists()
        other.stdin.close()
    assert not made._claimed(run)


def test_a_killed_process_leaves_a_record_that_says_so(tmp_path):
    made = comparison(tmp_path, search=None)
    run = next(made.stated())
    record = made._collect(run, -9)
    assert record["status"] == "failed" and "signal 9" in record["error"]
    assert not made._open_run(run, False, set()) and made._open_run(run, True, set())


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on_where_it_was(tmp_path):
    """SIGKILL to the whole comparison, two workers at work: records are whole or not there, and none is made twice."""
    grid, folder = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text(yaml.safe_dump(RAW))
    command = [sys.executable, "-m", "smidgen", "compare", str(grid), "-o", str(folder), "--workers", "2"]

    def records() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.glob("records/**/*.json")}

    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        until = time.monotonic() + 240
        while len(records()) < 2 and started.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    before = records()
    assert 2 <= len(before) < 7
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    after = records()
    assert len(after) == 7 and all(json.loads(path.read_text())["status"] == "done" for path in after)
    assert {path: after[path] for path in before} == before
    assert not list(folder.glob("**/*.tmp*"))


def test_a_cell_that_does_not_keep_to_the_memory_is_a_refusal_not_a_run(tmp_path):
    made = comparison(tmp_path, search=None, budget={"forwards": 40, "memory": "1MB"})
    cell = made.cells[0]
    assert "even for one row at a time" in made.refusal(cell)
    assert compared.refused(made.refusal(cell))["status"] == "refused"
    roomy = comparison(tmp_path / "b", search=None, budget={"forwards": 40, "memory": "1GB"})
    assert roomy.refusal(cell) is None and roomy._batch(cell) == {}


def test_what_is_not_here_is_left_out_and_said(tmp_path):
    found = comparison(tmp_path, models={"gone": {"model": "./nowhere"}})
    assert not found.cells and "./nowhere is not here" in found.outline()


def test_the_line_of_a_run_names_only_what_is_not_default(tmp_path):
    run = comparison(tmp_path, search=None).finals(comparison(tmp_path).cells[0])[0]
    words = compared.command(run).split()
    assert "task=reviews" in words and not any(w.startswith(("train.extra", "model=", "dtype=")) for w in words)


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    (tmp_path / "g.yaml").write_text(json.dumps(RAW))
    with pytest.raises(SystemExit) as end:
        app(["compare", str(tmp_path / "g.yaml"), "--dry-run", "-o", str(tmp_path / "out")])
    assert not end.value.code and not (tmp_path / "out").exists()
    assert "2 cells, 7 of 7 runs to make" in capsys.readouterr().out


def test_a_grid_and_a_folder_are_not_mixed(tmp_path):
    from smidgen.compare_command import compare as command

    with pytest.raises(ConfigError, match="beside a grid"):
        command(["a.yaml", "b"])
    with pytest.raises(ConfigError, match="there is no grid"):
        command([str(tmp_path / "a.yaml")])


def test_pages_of_libraries_are_mapped_without_harm():
    isolated.populate()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_a_process_that_rehearsed_ends_without_a_word():
    """What the collector may not look at during the runs is looked at again at the end: nanobind reports leaks otherwise."""
    code = "import triton\nfrom smidgen import isolated\nisolated.rehearse(1, [])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "", done.stderr[:500]
