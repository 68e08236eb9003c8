"""CONTRIBUTING's example method is whole: as printed there it passes its own test and the contract suite."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
# The two-rank test starts processes that find methods by name in the installed package.
OPTIONS = ["-p", "no:cacheprovider", "-k", "not two_ranks"]

ADD_FOLDER = "import smidgen.optim\n\nsmidgen.optim.__path__.append({folder!r})\n"


def run_tests(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, on one thread."""
    command = [sys.executable, "-m", "pytest", *OPTIONS, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True)


def contract(folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    """The contract suite over a folder that holds `source` as its only method."""
    folder.mkdir()
    (folder / "zo_unit.py").write_text(source)
    return run_tests(ROOT / "tests" / "contract" / "test_contract.py", SMIDGEN_CONTRACT_METHODS=str(folder))


@pytest.fixture(scope="module")
def example() -> tuple[str, str]:
    """(the method's file, its test)"""
    method, test = BLOCKS
    return method, test


def test_the_example_is_short(example):
    method, _ = example
    assert len(method.splitlines()) < 60


def test_the_example_passes_the_contract(example, tmp_path):
    done = contract(tmp_path / "methods", example[0])
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) >= 15, done.stdout[-4000:]


def test_a_step_along_other_noise_fails_the_contract(example, tmp_path):
    """The same file, but its update takes the noise of the next step."""
    right, wrong = "apply_([(z, ", "apply_([(Dense(cfg.seed, self.t + 1, 0, self.view.ids), "
    assert example[0].count(right) == 1
    done = contract(tmp_path / "methods", example[0].replace(right, wrong))
    assert done.returncode == 1, done.stdout[-4000:]
    assert "FAILED" in done.stdout and "test_update_lies_along_the_probed_directions[zo_unit]" in done.stdout


def test_the_example_passes_its_own_test(example, tmp_path):
    """With the method's file in the folder of methods, where the package finds it by listing."""
    method, test = example
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "zo_unit.py").write_text(method)
    (tmp_path / "conftest.py").write_text(ADD_FOLDER.format(folder=str(tmp_path / "methods")))
    (tmp_path / "test_zo_unit.py").write_text(test)
    done = run_tests("--rootdir", tmp_path, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout
