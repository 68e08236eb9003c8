"""Two ranks of torch.distributed in a trainer and in a run: the same end as one process, refusals, a rank that dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import parallel_ranks
from smidgen import config_file, folder, world
from smidgen.config import ConfigError, RunConfig
from smidgen.parallel import Parallel, rows_sha256
from smidgen.settings import same_rows

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found."""
    home = tmp_path_factory.mktemp("ranks")
    port = str(22000 + os.getpid() % 18000)
    runs = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        runs.append(subprocess.Popen([sys.executable, parallel_ranks.__file__, str(home)], env=env))
    assert [run.wait(timeout=600) for run in runs] == [0, -signal.SIGKILL]
    return [torch.load(home / f"{rank}.pt") for rank in range(2)], torch.load(home / "lost.pt")


def test_answers_are_those_of_one_process(ranks):
    """Three probes on two ranks, ragged micro-batches, a direction for each example: in global row order."""
    both, _ = ranks
    alone = parallel_ranks.questions(None, 1)
    for found in both:
        rows, probes = found["questions"]
        assert all(torch.equal(a, b) for a, b in zip(probes, alone, strict=True))
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(rows, alone, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(both[0]["questions"][0], both[1]["questions"][0], strict=True))


@pytest.mark.parametrize("name", parallel_ranks.RUNS)
def test_a_trainer_ends_where_one_process_does(ranks, name, tmp_path):
    both, _ = ranks
    one, other = (found["ends"][name] for found in both)
    alone, _ = parallel_ranks.train(name, tmp_path, alone=True)
    assert all(torch.equal(one[n], other[n]) for n in alone)
    if name in ("probes", "population"):
        assert all(torch.equal(one[n], alone[n]) for n in alone)
    assert all(torch.allclose(one[n], alone[n], atol=2e-6) for n in alone)


def test_only_floats_travel(ranks):
    """Bytes that rank 1 sends a step: a sum, a weight and a flag for each of its probes; gradients are DDP's business."""
    both, _ = ranks
    sent, exchanges, wrapper = both[1]["probes"]
    hashes = 3 * 64 + 96 * 9  # three comparisons of two hashes, one agreement at the start
    assert exchanges == 6 and sent <= 6 * (16 * 2 + 8) + hashes
    assert wrapper == "NoneType" and both[1]["ddp"][2] == "DistributedDataParallel" and both[1]["hybrid"][2] == "NoneType"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("seed", "ranks 0 and 1 differ in their seed ('0' and '1'): start all ranks with the same code, model, data"),
        ("data", "ranks 0 and 1 differ in their data"),
        ("code", "ranks 0 and 1 differ in their code ('smidgen 0.0' and 'smidgen 0.1')"),
        ("grid", "probe_ranks = 3 does not divide the 2 ranks: one of 1, 2"),
        ("weights", "ranks 0 and 1 hold different weights after step 2, and were equal after step 1"),
    ],
)
def test_ranks_that_differ_stop_on_both_sides(ranks, what, words):
    both, _ = ranks
    assert all(words in found["refusals"][what] for found in both)


def test_a_dead_rank_ends_the_other_at_once(ranks):
    _, (message, seconds) = ranks
    assert "rank 0 of 2 lost another rank" in message and "--resume" in message
    assert seconds < 30


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT are not set: start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' is no whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "ranks count from 0 to 1"),
    ],
)
def test_an_environment_that_is_not_whole_is_refused(monkeypatch, values, words):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(words)):
        world.join()


def test_sums_do_not_depend_on_the_order_of_ranks():
    parts = torch.tensor([[1e16], [1.0], [-1e16], [3.0]], dtype=torch.float64)
    assert all(torch.equal(world.add(parts[order]), world.add(parts)) for order in ([3, 1, 0, 2], [2, 0, 1, 3]))


def test_rows_are_hashed_whole():
    rows = [{"input_ids": [1, 2], "labels": [[1], [2]]}, {"input_ids": [3], "labels": [[4]]}]
    assert rows_sha256(rows) == rows_sha256([dict(reversed(row.items())) for row in rows])
    assert rows_sha256(rows) != rows_sha256([rows[0], {"input_ids": [3], "labels": [[5]]}])
    assert rows_sha256(torch.utils.data.TensorDataset(torch.ones(3))) == rows_sha256(
        torch.utils.data.TensorDataset(torch.zeros(3))
    )


def test_one_process_is_no_team():
    parallel, inner = Parallel(), object()
    assert parallel.objective(inner) is inner
    with pytest.raises(ConfigError, match="does not divide the 1 ranks"):
        Parallel(probe_ranks=2)


@pytest.mark.parametrize(
    ("before", "probe_ranks", "now", "method", "found"),
    [
        (2, 1, 2, "zo_sgd", (8, 1, 1)),  # as it was
        (2, 2, 1, "zo_sgd", (8, 1, 1)),  # probes are shared among fewer
        (2, 1, 4, "zo_sgd", (8, 1, 2)),  # or among more: the rows of each group stay
        (2, 1, 1, "zo_sgd", (8, 2, 1)),  # one process takes both ranks' micro-batches
        (2, 1, 1, "adamw", (8, 2, 1)),
        (1, 1, 2, "adamw", (4, 1, 1)),
        (4, 2, 1, "zo_sgd", (8, 2, 1)),
    ],
)
def test_a_run_goes_on_with_the_same_rows_on_other_ranks(tmp_path, monkeypatch, before, probe_ranks, now, method, found):
    monkeypatch.setattr(world, "count", lambda: now)
    (tmp_path / "env.json").write_text(json.dumps({"ranks": before}))
    config = RunConfig(method=method, probe_ranks=probe_ranks, train={"per_device_train_batch_size": 8})
    config = same_rows(config, tmp_path)
    train = config.train
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps, config.probe_ranks) == found


def test_rows_that_cannot_be_shared_out_are_refused_with_what_can(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "count", lambda: 3)
    (tmp_path / "env.json").write_text(json.dumps({"ranks": 2}))
    with pytest.raises(ConfigError, match=re.escape("3 ranks cannot share out evenly: resume with 1, 2, 4, 8, 16 ranks")):
        same_rows(RunConfig(train={"per_device_train_batch_size": 8}), tmp_path)


def test_a_restart_goes_on_only_with_a_run_of_the_same_command(tmp_path):
    asked = RunConfig(model="embedded", seed=3, output=str(tmp_path), train={"max_steps": 5})
    assert not folder.left_by(asked)
    chosen = config_file.with_values(asked, {"train.learning_rate": 1e-3, "max_length": 32})
    (tmp_path / folder.RESOLVED).write_text(config_file.dump(chosen))
    assert folder.left_by(asked) and folder.done(tmp_path) is None
    assert not folder.left_by(config_file.with_values(asked, {"seed": 4}))
    assert not folder.left_by(config_file.with_values(asked, {"train.max_steps": 6}))
    (tmp_path / folder.RESULT).write_text('{"status": "done", "steps": 5}')
    assert folder.done(tmp_path) == {"status": "done", "steps": 5}


# -- runs under torchrun ----------------------------------------------------------------------------------------------

TRAIN = ["-m", "smidgen", "train", "--task", "reviews", "--steps", "60", "--batch", "4", "--threads", "1", "--train-rows", "64"]
TRAIN += ["--dev-rows", "16", "test_rows=16", "method_args.queries=2", "train.eval_steps=1000", "check_ranks=10"]


def hash_of(run: Path) -> str:
    return json.loads((run / "result.json").read_text())["weights_sha256"]


def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_nothing_had_happened(tmp_path):
    """SIGKILL of rank 1 in mid-run under torchrun --max-restarts; then one process, to the same hash."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    process = subprocess.Popen(
        [*launch, *TRAIN, "probe_ranks=2", "-o", str(run)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    journal, deadline = run / "journal.bin", time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and (data := journal.read_bytes()) and len(data) - 16 - int.from_bytes(data[8:12], "little") > 500:
            break
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "smidgen (rank 0): rank 0 of 2 lost another rank" in output
    subprocess.run([sys.executable, *TRAIN, "-o", str(alone)], check=True, capture_output=True)
    assert hash_of(run) == hash_of(alone)
    assert json.loads((run / "env.json").read_text())["ranks"] == 2


def rank_of(launcher: int, rank: int) -> int:
    """The process of a rank."""
    import psutil

    return next(p.pid for p in psutil.Process(launcher).children(recursive=True) if p.environ().get("RANK") == str(rank))
