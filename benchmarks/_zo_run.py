"""One run of the zeroth-order study, in a process of its own: its data, the call of smidgen.finetune, its record.

The process is forked from one that has imported everything, so a run starts in no time, inherits no tensor, thread or
generator state of another, and its peak memory is its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from _zo_grid import FORMAT, Run

Measure = Callable[[Run, Path, Path, int], dict[str, Any]]  # a run, shared folder, its data, threads -> its record

SPLITS = ("train", "validation", "test")


def locate(name: str, shared: Path) -> str:
    """A model or folder as the grid names it: `shared:PATH`, `package:NAME/PATH`, or any name that smidgen takes."""
    kind, colon, rest = name.partition(":")
    if colon and kind == "shared":
        return str(shared / rest)
    if colon and kind == "package":
        package, _, inside = rest.partition("/")
        spec = importlib.util.find_spec(package)
        return "" if spec is None or spec.origin is None else str(Path(spec.origin).parent / inside)
    return name


def absent(name: str, shared: Path) -> str | None:
    """Why a model or folder of the grid cannot be used here, or None."""
    if not name.startswith(("shared:", "package:")):
        return None
    found = locate(name, shared)
    return None if found and Path(found).exists() else f"{name} is not here"


def divide(place: Mapping[str, Any], shared: Path, to: Path) -> None:
    """Write the splits of a place: `to`/search without test rows, `to`/seeds with them; nothing for a task's own source.

    Rows are taken by hash: the same on every machine. dev and test are carved from the training file where they have no
    file of their own, first of all, so that the sizes of the others do not move them.
    """
    from smidgen.splits import take

    data, sizes = place["data"], place["rows"]
    if data is None:
        return
    folder = Path(locate(data["folder"], shared))

    def read(name: str) -> list[str]:
        return [line for line in (folder / name).read_text(encoding="utf-8").splitlines() if line.strip()]

    pool = read(data["train"])
    parts: dict[str, list[str]] = {}
    for split, key in (("test", "test"), ("validation", "dev")):
        parts[split] = take(read(data[key]) if data[key] else pool, sizes[key])
        if not data[key]:
            taken = set(parts[split])
            pool = [row for row in pool if row not in taken]
    parts["train"] = take(pool, sizes["train"])
    for kind, splits in (("search", SPLITS[:2]), ("seeds", SPLITS)):
        (to / kind).mkdir(parents=True)
        for split in splits:
            (to / kind / f"{split}.jsonl").write_text("\n".join(parts[split]) + "\n", encoding="utf-8")


def majority(file: Path) -> float | None:
    """Share of the commonest label among the rows of a file; None where rows have no label."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    counts = Counter(str(row["label"]) for row in rows if "label" in row)
    return max(counts.values()) / len(rows) if counts else None


def configuration(run: Run, shared: Path, data: Path, output: Path, threads: int) -> Any:
    """The RunConfig of a run."""
    from smidgen.config import RunConfig

    s = run.settings
    never = s["steps"] + 1
    values: dict[str, Any] = {
        "model": locate(s["model"], shared),
        "task": s["task"],
        "data": s["data"] and str(data / ("seeds" if s["test"] else "search")),
        "max_length": s["max_length"],
        "method": s["method"],
        "method_args": {**s["options"], "lr": s["lr"]},
        "scheme": s["scheme"],
        "scheme_args": s["scheme_args"],
        "train": {
            "max_steps": s["steps"],
            "per_device_train_batch_size": s["batch"],
            "eval_steps": never,
            "logging_steps": never,
            "save_steps": never,
            **s["train"],
        },
        "seed": s["seed"],
        "threads": threads,
        "output": str(output),
        **s["run"],
    }
    if s["task_args"]:
        values["task_args"] = s["task_args"]
    return RunConfig.model_validate(values)


def measure(run: Run, shared: Path, data: Path, threads: int) -> dict[str, Any]:
    """The record of a run: that of a run refused or diverged says why. Other exceptions are bugs and pass through."""
    from smidgen import models
    from smidgen import run as runs
    from smidgen.config import Interrupted, UserError
    from smidgen.folder import metrics
    from smidgen.trainer import method_config

    s = run.settings
    options = method_config(s["method"], None, {**s["options"], "seed": s["seed"], "lr": s["lr"]})
    record: dict[str, Any] = {"format": FORMAT, "place": run.place, "scheme": run.scheme, "method": run.method}
    record |= {"role": run.role, **{k: v for k, v in s.items() if k not in ("method", "options", "test")}}
    record |= {"module": s["method"], "options": options.model_dump(), "settings_sha256": run.sha256, "threads": threads}
    record["eps"] = record["options"].get("eps")
    record["majority"] = None
    if s["data"]:
        record["rows"] = {f.stem: len(f.read_text(encoding="utf-8").splitlines()) for f in (data / "seeds").glob("*.jsonl")}
        record["majority"] = majority(data / "seeds" / "test.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(run, shared, data, Path(folder) / "run", threads)
        try:
            result = runs.finetune(config, say=lambda line: None)
        except Interrupted:
            raise  # not an outcome: the next start makes the run again
        except UserError as error:
            status = "diverged" if error.exit_code == 4 else "refused"
            return record | {"status": status, "reason": str(error).replace(str(folder), "OUTPUT")}
        looks = [(line["step"], line["eval_loss"]) for line in metrics(Path(folder) / "run") if "eval_loss" in line]
    if looks:  # evaluations on the way
        record["curve"] = looks
    counts = ("bad_steps", "forwards", "backwards", "tokens", "seconds", "cpu_seconds", "peak_bytes")
    kept = (*counts, "tuned_weights", "weights", "kind")
    record |= {key: result[key] for key in ("status", "before", "dev", "weights_sha256", "versions", *kept)}
    if s["test"]:
        record["test"] = result["test"]
    record["steps_made"] = result["steps"]
    record["weights_bytes"] = models.weights_bytes(config.model, own_tokenizer=config.tokenizer)
    record["state_bytes"] = state_bytes(config, result["classes"], options)
    return record


def state_bytes(config: Any, classes: int | None, options: Any) -> int:
    """What the method declares to hold for the tensors that this run tunes."""
    from smidgen import activations, optim
    from smidgen import run as runs
    from smidgen.params import shapes

    adapted = runs.load(config, classes).adapted
    held = shapes(adapted.view)
    if config.activations is not None:
        policy = activations.get(config.activations)
        made = policy.build(adapted.model, policy.Config(**config.activations_args), view=adapted.view)
        if optim.get(config.method).build.compressed:
            held = made.gradient_shapes(held)
    return optim.get(config.method).build.state_bytes(held, options)


def perform(run: Run, shared: Path, data: Path, to: Path, threads: int, measure: Measure) -> None:
    """Make a run and write its record, or print what broke and where; to be the whole life of a process."""
    from smidgen.isolated import populate

    said = io.StringIO()
    path = to / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            populate()
            record = measure(run, shared, data, threads)
    except Exception as error:
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[:-6:-1])
        print(f"{run.name}: {type(error).__name__}: {error} ({where})", flush=True)
        os._exit(1)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    part.replace(path)


def prepare(threads: int) -> None:
    """Import, compile and rehearse what every run needs, in the process that forks."""
    from smidgen import isolated

    isolated.rehearse(threads)


def start(
    run: Run, shared: Path, data: Path, to: Path, threads: int, method: str, measure: Measure = measure
) -> multiprocessing.Process:
    """Begin a run in a process of its own; method: fork, or spawn where the parent must not touch the device."""
    process = multiprocessing.get_context(method).Process(target=perform, args=(run, shared, data, to, threads, measure))
    process.start()
    return process  # type: ignore[return-value]
