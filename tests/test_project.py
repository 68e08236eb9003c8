"""The repository as a project: version, licence, file sizes, names, paths, README, records of what is recommended."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import smidgen

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
METHODS = sorted(
    path for family in ("optim", "adapt", "activations", "tasks") for path in (ROOT / "src/smidgen" / family).glob("[!_]*.py")
)

LONGEST = 400  # lines; a longer file probably holds two concepts
# path below src/smidgen -> why it holds one concept all the same
LONGER: dict[str, str] = {
    "noise/cpu.py": "one kernel: its stages, its threads, its call",
}

DRAWERS = {"utils", "util", "helpers", "common", "misc", "tools", "v2", "new", "final"}  # names of no concept


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked() -> list[Path]:
    """Files under version control that are there."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: no list of tracked files")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / entry for entry in listed.split("\0") if entry and (ROOT / entry).is_file()]


def constants(path: Path) -> dict[str, object]:
    """Module-level `NAME = literal` of a file, read without importing it."""
    found: dict[str, object] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant):
            found[node.targets[0].id] = node.value.value
    return found


def test_the_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == smidgen.__version__
    assert f"## [{smidgen.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_constraints_pin_every_requirement_exactly():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "one exact version a line, no local suffix"
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = settings["project"]["dependencies"] + settings["dependency-groups"]["dev"]
    names = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in needed}
    assert names <= pinned, f"constraints.txt lacks {sorted(names - pinned)}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_file_says_what_it_is(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{name(path)} has no module docstring"


def test_no_file_holds_two_concepts():
    lengths = {path.relative_to(ROOT / "src/smidgen").as_posix(): len(path.read_text().splitlines()) for path in SOURCES}
    long = {path: lines for path, lines in lengths.items() if lines > LONGEST and path not in LONGER}
    assert not long, f"over {LONGEST} lines: {long}; split by concept, or say in LONGER why there is only one"
    stale = [path for path in LONGER if lengths.get(path, 0) <= LONGEST]
    assert not stale, f"no longer over {LONGEST} lines, take it out of LONGER: {stale}"


def test_no_file_is_a_drawer():
    drawers = [name(path) for path in tracked() if path.suffix == ".py" and path.stem.strip("_") in DRAWERS]
    assert not drawers, f"name the concept: {drawers}"


def test_every_to_do_names_the_event_that_ends_it():
    word = "TO" + "DO"
    rule = re.compile(rf"\b{word}\b(?!\((when|once|after|until) [^)]+\):)|\b(FIX" + "ME|X" + "XX)\\b")
    for path in tracked():
        if path.suffix != ".py":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not rule.search(line), f"{name(path)}:{number}: write {word}(when ...): {line.strip()}"


def test_no_path_or_registry_of_one_machine():
    folders = "|".join(["work", "root", "home", "Users", "opt/pypi"])
    hosts = "|".join(["pypi" + r"\.org", "python" + r"hosted\.org", "download" + r"\.pytorch\.org", "conda" + r"\.anaconda"])
    rule = re.compile(rf"(?<![\w.~*}}-])/({folders})/|{hosts}")
    for path in tracked():
        if path.suffix in (".safetensors", ".bin", ".png", ".parquet") or name(path) == "LICENSE":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = rule.search(line)
            assert not found, f"{name(path)}:{number} names {found.group()!r}, which only one machine has"


def readme_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_the_python_of_the_readme_runs(tmp_path):
    if not (ROOT / "README.md").read_text().strip():
        pytest.skip("README.md is empty")
    blocks = readme_blocks()
    assert blocks, "README.md shows no Python"
    for code in blocks:
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_what_is_recommended_has_a_record(path):
    """`status = "recommended"` goes with `RECORD = "results/....json"`, committed."""
    said = constants(path)
    assert said.get("status") in ("recommended", "reproduction", "experimental"), f"{name(path)} states no status"
    if said["status"] == "recommended":
        record = ROOT / str(said.get("RECORD", ""))
        assert record.is_file() and record.is_relative_to(ROOT / "results"), f"{name(path)} names no record under results/"
        json.loads(record.read_text())
