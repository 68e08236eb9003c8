"""A run's folder: its files, its lock, what may be overwritten, and how results are published into it.

Files are written under a temporary name and renamed, so that a crash leaves no half-written one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smidgen import config_file as configuration
from smidgen.config import ConfigError, RunConfig, UserError, notice

RESOLVED = "config.resolved.yaml"
RESULT = "result.json"
METRICS = "metrics.jsonl"
ENVIRONMENT = "env.json"
CARD = "README.md"
JOURNAL = "journal.bin"
INIT = "init.safetensors"
BEST = "best.safetensors"


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, values: Any) -> None:
    """Write values as indented JSON, atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, made if need be. Raises UserError when it cannot be written, ConfigError when it is in use."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder with --output") from None
    with file:
        try:
            import fcntl
        except ImportError:  # Windows: the exclusive creation of the journal is the guard
            pass
        else:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: data-loader workers would inherit it
            except OSError:
                raise ConfigError(f"{folder} is in use by another run: wait for it, or choose another --output") from None
        yield


def default_output(config: RunConfig) -> Path:
    """runs/MODEL-DATA-METHOD-SCHEME-N, with the first N that is free."""
    source = config.task or (config.data if isinstance(config.data, str) else None) or "data"
    parts = (Path(config.model.removeprefix("config:")).name, Path(source).stem, config.method, config.scheme)
    stem = "-".join(part.replace("_", "-") for part in parts)
    number = 1
    while (Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return Path("runs") / f"{stem}-{number}"


def refuse_occupied(folder: Path, force: bool) -> None:
    """Raise ConfigError when a run or another file stands where a new run would be written."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: choose a folder with --output")
    if force:
        return
    for name in (RESOLVED, RESULT, JOURNAL):
        if (folder / name).exists():
            raise ConfigError(f"{folder} holds a run: go on with --resume, replace it with --force, or choose another --output")


def clear(folder: Path) -> None:
    """Remove an earlier run's files, and only those."""
    for name in (RESOLVED, RESULT, METRICS, JOURNAL, INIT, BEST, ENVIRONMENT, "trainer_state.json", CARD):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


def withdraw(folder: Path) -> None:
    """Leave a folder as it was before a start that was refused: without its lock, and gone where nothing else is in it."""
    (folder / ".lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in it
        folder.rmdir()


def done(folder: Path) -> dict[str, Any] | None:
    """The result of a run that is done, else None."""
    found = json.loads((folder / RESULT).read_text()) if (folder / RESULT).exists() else {}
    return found if found.get("status") == "done" else None


def resumed(config: RunConfig) -> RunConfig:
    """The configuration of the run that `config` asks to resume. Raises ConfigError where there is none, or it is done."""
    if config.output is None:
        raise ConfigError("--resume needs --output DIR, the folder of the run")
    folder = Path(config.output)
    if not (folder / RESOLVED).exists():
        raise ConfigError(f"nothing to resume in {folder}: it has no {RESOLVED}")
    if done(folder) is not None:
        raise ConfigError(f"the run in {folder} is done: nothing to resume")
    saved = configuration.load(folder / RESOLVED)
    return configuration.with_values(saved, {"resume": True, "output": str(folder)})


def left_by(config: RunConfig) -> bool:
    """Whether the output folder holds a run that is not done and that `config` may have started: all it says stands there."""
    if config.output is None or not (Path(config.output) / RESOLVED).exists():
        return False
    asked = config.model_dump(exclude_defaults=True, exclude={"resume", "force", "output"})
    return _within(asked, configuration.load(Path(config.output) / RESOLVED).model_dump())


def _within(asked: Any, held: Any) -> bool:
    """Whether every value that was asked for is held; what is held beside was chosen."""
    if isinstance(asked, dict) and isinstance(held, dict):
        return all(value is None or (key in held and _within(value, held[key])) for key, value in asked.items())
    return bool(asked == held)


def opened(folder: Path) -> RunConfig:
    """The configuration of a run that is looked at, not gone on with. Code that its model brings was asked for by whoever
    trained it, so it has to be asked for again. Raises ConfigError."""
    config = configuration.load(folder / RESOLVED)
    if config.trust_remote_code and not os.environ.get("SMIDGEN_TRUST_REMOTE_CODE"):
        raise ConfigError(
            f"the run in {folder} says trust_remote_code: its model brings code of its own; read it, then say so yourself: "
            "smidgen --trust-remote-code COMMAND ..."
        )
    return config


def explain_last_end(folder: Path) -> None:
    """One line when the run's last start left no word; forget its recorded end."""
    path = folder / RESULT
    if path.exists():
        path.unlink()
    else:
        notice("the last start of this run left no word: it was killed (often: the system ran out of memory) or lost power")


def append_metrics(folder: Path, values: dict[str, Any]) -> None:
    """Add one line to metrics.jsonl."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a torn last line is left out."""
    path = folder / METRICS
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def rewind_metrics(folder: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run writes them again."""
    if (folder / METRICS).exists():
        kept = [v for v in metrics(folder) if v["step"] < step or v["step"] == step > 0 or "before" in v]
        write_text(folder / METRICS, "".join(json.dumps(values) + "\n" for values in kept))


def publish(adapted: Any, tokenizer: Any, folder: Path) -> None:
    """The tuned model or adapter in the top folder: written aside and moved file by file."""
    aside = folder / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    adapted.save(aside)
    tokenizer.save_pretrained(aside)
    (aside / CARD).unlink(missing_ok=True)  # PEFT's card; the run writes its own
    for path in aside.iterdir():
        path.replace(folder / path.name)
    aside.rmdir()
