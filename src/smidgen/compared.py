"""One run of a comparison: claimed by a lock, made in a process of its own, written as a record."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smidgen import config_file as configuration
from smidgen import data, estimate
from smidgen import folder as folders
from smidgen.config import ConfigError, Interrupted, RunConfig, UserError
from smidgen.grid import UNTRAINED, Run
from smidgen.records import FOLDER, FORMAT, Record, of_run, spent
from smidgen.run import device, environment, finetune

_ENDED = {3: "memory", 4: "diverged"}  # exit codes that are outcomes of a run; any other of UserError: refused
_SCRATCH, _LOCKS = "runs", "locks"


def pace(record: Record) -> float:
    """Seconds a step of a run (`spent`)."""
    return max(1e-6, spent(record) / max(1, record["steps"]))


def perform(run: Run, folder: Path, threads: int, refusal: str | None) -> None:
    """Make a run and write its record; the whole life of a process. Nothing is done where another start holds the run."""
    with lock_file(folder, run.name).open("w") as file:
        if not lock(file, wait=False):
            return
        path = folder / FOLDER / f"{run.name}.json"
        if path.exists() and json.loads(path.read_text()).get("settings_sha256") == run.sha256:
            with contextlib.suppress(KeyError):
                if json.loads(path.read_text())["status"] not in ("failed", "memory"):
                    return
        began = time.monotonic()
        try:
            record = opening(run, threads) | (_made(run, folder, threads) if refusal is None else refused(refusal))
        except Interrupted:
            return  # not an outcome: the next start makes the run again
        write(folder, run, record | {"wall_seconds": time.monotonic() - began})


def opening(run: Run, threads: int) -> Record:
    c = run.cell
    found: Record = {
        "format": FORMAT,
        "name": run.name,
        "model": c.model,
        "task": c.task,
        "scheme": c.scheme,
        "method": c.method,
    }
    found |= {"role": run.role, "number": run.number, "settings_sha256": run.sha256, "budget": dict(run.budget)}
    found |= {"seed": run.config.seed, "threads": threads, "lr": run.config.train.learning_rate}
    return found | {"command": command(run), "config": json.loads(run.config.model_dump_json())}


def command(run: Run) -> str:
    """The line that makes a run again by itself."""
    plain = type(run.config)()
    mine, default = (json.loads(c.model_dump_json()) for c in (run.config, plain))
    words = []
    for key, value in mine.items():
        if key == "train":
            extra = value.pop("extra")
            flat = {**value, **extra}
            words += [f"train.{k}={_word(v)}" for k, v in flat.items() if v != default["train"].get(k)]
        elif value != default[key]:
            words.append(f"{key}={_word(value)}")
    return "smidgen train " + " ".join(words)


def _word(value: Any) -> str:
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))


def refused(reason: str) -> Record:
    return {"status": "refused", "error": reason}


def _made(run: Run, folder: Path, threads: int) -> Record:
    output = folder / _SCRATCH / run.name
    config = configuration.with_values(run.config, {"output": str(output), "threads": threads, "force": True})
    try:
        result = finetune(config, test=run.tested, say=lambda line: None)
    except Interrupted:
        raise
    except UserError as error:
        return {"status": _ENDED.get(error.exit_code, "refused"), "error": str(error).replace(str(output), "OUTPUT")}
    except Exception as error:
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[:-6:-1])
        return {"status": "failed", "error": f"{type(error).__name__}: {error} ({where})"}
    try:
        lines = folders.metrics(output)
        resolved = configuration.load(output / folders.RESOLVED, notify=lambda line: None)
    finally:
        _remove(output)
    found = of_run(resolved, result, lines)
    found.pop("config")
    searched = {"lr": found["lr"]}
    searched |= {f"method_args.{k}": v for k, v in run.config.method_args.items()}
    return found | {"values": searched, "device": environment()["device"], "planned": _planned(run, resolved)}


def _planned(run: Run, resolved: RunConfig) -> Mapping[str, int] | None:
    """The plan of a run, by term: made after it, so that it is in nobody's peak. None where there is none."""
    if run.cell.method == UNTRAINED:
        return None
    try:
        shape = estimate.shape_of(resolved, data.open_corpus(resolved, notify=lambda line: None))
        return estimate.as_terms(estimate.planned(resolved, shape, device()))
    except ConfigError:
        return None


def _remove(output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)


def write(folder: Path, run: Run, record: Record) -> None:
    path = folder / FOLDER / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    folders.write_text(path, json.dumps(record, indent=1, default=str) + "\n")


def lock_file(folder: Path, name: str) -> Path:
    path = folder / _LOCKS / name.replace("/", " ")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def lock(file: Any, *, wait: bool) -> bool:
    """Take the lock of an open file; it ends with the process. Windows has no such lock: one start at a time there."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
