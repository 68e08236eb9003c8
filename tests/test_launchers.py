"""The launchers of docs/scale.md start several ranks: accelerate, torchrun on two nodes, the SLURM script with stand-ins."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
RUN = ["train", "--task", "reviews", "--steps", "4", "--batch", "4", "--threads", "1", "--train-rows", "16", "--dev-rows", "8"]
RUN += ["test_rows=8", "train.eval_steps=1000", "probe_ranks=2"]
# Stand-ins: one host, and two nodes that are two shells.
SCONTROL = "#!/bin/bash\necho localhost\n"
SRUN = """#!/bin/bash
for node in 0 1; do "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait $pid || exit 1; done
"""


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **more}


def weights(folder: Path, ranks: int) -> bytes:
    """The tuned weights of a run that has ended, made by so many ranks."""
    assert json.loads((folder / "env.json").read_text())["ranks"] == ranks
    assert json.loads((folder / "result.json").read_text())["status"] == "done"
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, whose bits ranks that share the probes have."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "smidgen", *RUN[:-1], "-o", str(folder)]
    subprocess.run(command, check=True, env=environment(), capture_output=True, timeout=240)
    return weights(folder, 1)


def test_accelerate_launch(tmp_path, alone):
    """`--multi_gpu` is accelerate's word for several processes of one machine, CPUs included."""
    options = [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    launch = [str(BIN / "accelerate"), "launch", *options, "--main_process_port", free_port(), "-m", "smidgen", *RUN]
    done = subprocess.run(
        [*launch, "-o", str(tmp_path / "run")], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "run", 2) == alone


def test_two_nodes_by_environment(tmp_path, alone):
    port = free_port()
    nodes = []
    for node in "01":
        launch = [str(BIN / "torchrun"), "--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1"]
        launch += ["--master-addr", "127.0.0.1", "--master-port", port, "-m", "smidgen", *RUN, "-o", str(tmp_path / "run")]
        nodes.append(subprocess.Popen(launch, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for node in nodes:
        out, _ = node.communicate(timeout=240)
        assert node.returncode == 0, out
    assert weights(tmp_path / "run", 2) == alone


def test_the_slurm_script(tmp_path, alone):
    """The script of the page, with the run's options and one process a node."""
    script = re.search(r"SLURM:\n\n```\n(.*?)```", (ROOT / "docs/scale.md").read_text(), re.S)
    assert script is not None
    text = script[1].replace("--nproc-per-node 8", "--nproc-per-node 1").replace("29500", free_port())
    text = text.replace("/shared/runs", str(tmp_path)).replace("run.yaml", " ".join(RUN[1:]))
    for name, stand_in in {"scontrol": SCONTROL, "srun": SRUN, "job": text}.items():
        (tmp_path / name).write_text(stand_in)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NAME": "big", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "7"}
    env = environment(**slurm, PATH=f"{tmp_path}:{BIN}:{os.environ['PATH']}")
    done = subprocess.run([str(tmp_path / "job")], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "big", 2) == alone
