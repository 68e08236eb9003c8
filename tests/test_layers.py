"""Imports go down the layers only, and what must start fast imports nothing heavy. Read from the source with `ast`."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "smidgen"

# Lowest first; modules of one layer do not import each other. A name that is no file yet is a reserved place.
LAYERS = [
    "config embedded fingerprint intervals",
    "user_code sandbox world untrusted",
    "config_file",
    "noise tasks folder signals presets auto shelves near",
    "pictures",
    "memory blank stored forwards quantising environment directions modes kinds linear rows chat convex formats",
    "pretraining",
    "addend quantised placed",
    "params splits streaming drafts",
    "data encode collate loss lowrank pixels stream",
    "activations models questions population subspace space",
    "adapt",
    "lookup readers per_example last_layer gathered",
    "forward_mode reuse scratch trunk",
    "offload graphs",
    "probing",
    "inputs batched hidden outputs simulate",
    "perturbed layerwise depths",
    "objective scoring",
    "optim called generation pairs packing",
    "ranks",
    "asked",
    "journal method_options evaluate planner provenance rewards moving head_start",
    "parallel goal measure advice",
    "trainer residence",
    "estimate",
    "settings card progress best exhausted",
    "endings",
    "run",
    "rebuild inference listing",
    "export harness isolated grid_checks records",
    "grid",
    "summary charts page search compared",
    "compare report",
    "demo tables",
    "plan_command compare_command",
    "cli",
    "__main__",
]
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}
FAMILIES = ("activations", "adapt", "optim", "tasks")  # a public module in these is a method of its own
HEAVY = {"accelerate", "datasets", "matplotlib", "numba", "pandas", "peft", "torch", "transformers", "triton", "trl"}

MODULES = {
    ".".join(["smidgen", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def statements(tree: ast.AST, later: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements of a module; `later` includes those inside functions and under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif later or not (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            yield from statements(node, later)


def imported(module: str, later: bool = True) -> set[str]:
    """Names of the modules that `module` imports; ours in full, as far as they are files here."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in statements(ast.parse(MODULES[module].read_text()), later):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        below = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
        found |= below
        if len(below) < len(node.names):
            found.add(base)
    return found


def reached(module: str) -> set[str]:
    """Everything that importing `module` imports by our own statements, packages on the way included."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            waiting += imported(name, later=False)
            waiting += [name.rpartition(".")[0]] if "." in name else []
    return seen


def top(module: str) -> str:
    return module.split(".")[1]


def heavy(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} & HEAVY


OURS = [m for m in MODULES if m != "smidgen"]


@pytest.mark.parametrize("module", OURS)
def test_imports_go_down(module):
    assert top(module) in LAYER, f"{module} has no layer: give {top(module)!r} its place in LAYERS"
    for name in imported(module):
        if not name.startswith("smidgen.") or top(name) == top(module):
            continue
        assert top(name) in LAYER and LAYER[top(name)] < LAYER[top(module)], f"{module} imports {name}, which is not below it"


@pytest.mark.parametrize("module", [m for m in OURS if top(m) in FAMILIES and m.count(".") == 2])
def test_siblings_meet_through_an_underscore_module(module):
    for name in imported(module):
        if name.startswith(f"smidgen.{top(module)}."):
            assert name.rpartition(".")[2].startswith("_"), f"{module} imports its sibling {name}"


@pytest.mark.parametrize("module", [m for m in OURS if top(m) == "optim"])
def test_an_optimizer_sees_no_model_task_or_tokenizer(module):
    names = imported(module)
    seen = {top(name) for name in names if name.startswith("smidgen.")}
    assert not seen & {"models", "kinds", "tasks", "rows", "splits", "chat", "data", "drafts", "encode", "collate"}
    assert not heavy(names) & {"transformers", "peft", "datasets"}


LIGHT = [m for m in MODULES if m == "smidgen" or top(m) in ("__main__", "config", "config_file", "cli", "tasks")]


@pytest.mark.parametrize("module", LIGHT)
def test_nothing_heavy_is_imported_at_the_start(module):
    assert not heavy(reached(module)), f"import {module} loads {heavy(reached(module))}"


def test_noise_imports_its_compilers_on_use():
    if "smidgen.noise" in MODULES:
        assert not heavy(reached("smidgen.noise")) & {"numba", "triton"}


def test_python_agrees_that_the_start_is_light():
    """The same, from sys.modules of a fresh interpreter: what our imports import is counted as well."""
    light = [m for m in ("smidgen", "smidgen.config_file", "smidgen.tasks", "smidgen.cli") if m in MODULES]
    code = f"import sys, {', '.join(light)}; print(*sorted(set({sorted(HEAVY)}) & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []


def test_the_reader_of_imports_reads():
    """The checks above can fail: a module is seen to import what it does."""
    assert "smidgen.config" in imported("smidgen.tasks") and "smidgen.tasks._example" in reached("smidgen.tasks")
    assert {"torch", "smidgen.config"} <= reached("smidgen.optim.adamw")
    assert heavy(reached("smidgen.params")) == {"torch"}
