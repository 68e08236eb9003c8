"""Write docs/methods.md from the modules themselves: what each method and scheme says, its options, its status.

`python scripts/docs.py` writes the page, `--check` compares it with the committed one and ends with 1 if it differs.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
STATUS = ("recommended", "reproduction", "experimental")  # the order of the page

HEAD = """\
<!-- Written by scripts/docs.py (`make docs`) from the modules in src/smidgen; edit those. -->

# Methods and schemes

A *method* decides how weights move, a *scheme* which weights there are to move; any method runs with any scheme.
`smidgen methods NAME` prints one entry of this page. Status: *recommended*, a committed record shows where it wins;
*reproduction*, faithful to its paper and tested against it; *experimental*, neither yet.
"""


def cell(text: str) -> str:
    """Text that stays in its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines) + "\n"


def shown(value: Any) -> str:
    """A default as it is written in YAML."""
    return "required" if value is PydanticUndefined else f"`{json.dumps(value, default=str)}`"


def options(config: type[BaseModel]) -> str:
    """The table of a Config's fields."""
    rows = [
        (f"`{name}`", shown(field.get_default(call_default_factory=True)), field.description or "")
        for name, field in config.model_fields.items()
    ]
    return table(("option", "default", "what it is"), rows)


def section(name: str, module: ModuleType) -> str:
    """One method or scheme: its docstring as it stands, options, presets."""
    parts = [f"### {name}\n", f"*{module.status}*\n", inspect.cleandoc(module.__doc__ or "") + "\n", options(module.Config)]
    for preset, values in vars(module).get("PRESETS", {}).items():
        parts.append(f"Preset `{preset}`: " + ", ".join(f"`{k}: {json.dumps(v)}`" for k, v in values.items()) + "\n")
    return "\n".join(parts)


def family(title: str, package: ModuleType) -> str:
    """All public modules of a folder: a summary table, then one section each."""
    modules = {name: package.get(name) for name in package.names()}
    order = sorted(modules, key=lambda name: (STATUS.index(modules[name].status), name))
    rows = [(f"[{n}](#{n})", modules[n].status, (modules[n].__doc__ or "").partition("\n\n")[0]) for n in order]
    return "\n".join(
        [f"## {title}\n", table(("name", "status", "in one line"), rows), *(section(n, modules[n]) for n in order)]
    )


def policies() -> str:
    """What the forward keeps for back-propagation: one section a policy."""
    from smidgen import activations

    head = """## Activations

What back-propagation keeps of the forward: `activations: NAME`, with options under `activations_args`, for methods that use it.
"""
    return "\n".join([head, *(section(name, activations.get(name)) for name in activations.names())])


def formats(package: ModuleType) -> str:
    """Scheme by export format, from each scheme's EXPORTS."""
    exports = {name: package.get(name).EXPORTS for name in package.names()}
    columns = sorted({form for written in exports.values() for form in written})
    rows = [(name, *(written.get(form, "-") for form in columns)) for name, written in exports.items()]
    head = "## Export\n\nWhat `smidgen export --format` writes for each scheme.\n"
    return head + "\n" + table(("scheme", *(f"`{form}`" for form in columns)), rows)


def grid(values: Sequence[float]) -> str:
    """A published grid, with the values in its order."""
    return ", ".join(f"{value:g}" for value in values)


def length_of(preset: Any) -> str:
    """How long a preset runs: steps, epochs, or the method's budget of forwards."""
    run = preset.keys
    if "train.max_steps" in run:
        return f"{run['train.max_steps']:,}"
    epochs = run.get("train.num_train_epochs")
    return f"{preset.options['budget']:,} forwards" if epochs is None else f"{epochs} epochs"


def published() -> str:
    """Published presets, one row for the tasks (of MeZO), or the schemes, that share everything; the sources below."""
    from smidgen import presets

    rows: dict[tuple[str, ...], list[str]] = {}
    for preset in presets.of_method():
        parts = preset.name.split("/")
        shared = 2 if len(parts) == 4 else 4  # the part of the name that is listed with commas
        run = preset.keys
        row = (
            "/".join([*parts[:shared], "{}", *parts[shared + 1 :]]),
            preset.method,
            *(f"{preset.options[key]:g}" if key in preset.options else "-" for key in ("lr", "eps")),
            str(run.get("train.per_device_train_batch_size", "-")),
            length_of(preset),
            *(grid(preset.grid.get(key, ())) for key in ("lr", "eps")),
        )
        rows.setdefault(row, []).append(parts[shared])
    lines = [(f"`{name.format(','.join(words))}`", *cells) for (name, *cells), words in rows.items()]
    sources = sorted({(preset.name.partition("/")[0], preset.source) for preset in presets.of_method()})
    head = """## Published presets

Settings that papers and their code publish, by name: `smidgen train --preset mezo/opt-13b/sst2/full` fills in method, scheme,
task, learning rate, eps, batch, steps and rows where you do not give them. Parts listed with commas stand for one name each.
Where a grid was published, a preset takes one of its values; `smidgen.presets` says which.
"""
    columns = ("name", "method", "lr", "eps", "batch", "steps", "grid of lr", "grid of eps")
    return "\n".join([head, table(columns, lines), *(f"- `{study}`: {source}" for study, source in sources), ""])


def page() -> str:
    """The whole of docs/methods.md."""
    from smidgen import adapt, optim

    return "\n".join([HEAD, family("Methods", optim), family("Schemes", adapt), policies(), formats(adapt), published()])


def main() -> int:
    """0 if the page is written or current, 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; show how the committed page differs")
    check = parser.parse_args().check
    new = page()
    if not check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(new)
        return 0
    old = PAGE.read_text() if PAGE.exists() else ""
    if old == new:
        return 0
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "docs/methods.md", "generated", lineterm="", n=1)
    print("docs/methods.md is not what the modules say; `make docs` writes it again", *lines, sep="\n", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
