"""Records of runs: one JSON object a run, what it must hold, and where it is read from.

Format 2 is what `smidgen compare` writes (`of_run`). A finished run's folder is read as a record of its own; format 1, that of
the committed studies (results/zo_bench), is brought to format 2; any other is refused by name.

Bytes are bytes, seconds are of training without its evaluations (`spent` says which), metrics lie between 0 and 1, losses
are in nats.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smidgen import config_file as configuration
from smidgen import folder as folders
from smidgen.config import ConfigError, RunConfig
from smidgen.intervals import interval

FORMAT = 2
FOLDER = "records"  # below the folder of a comparison

Record = dict[str, Any]

_COUNTS = ("steps", "bad_steps", "forwards", "backwards", "tokens", "peak_bytes", "tuned_weights", "weights", "kind")
_KEPT = (*_COUNTS, "metric", "objective", "before", "dev", "data", "weights_sha256", "config_sha256", "versions")
_NEEDED = {"format", "name", "model", "task", "scheme", "method", "role", "seed", "status"}
_OF_DONE = {"metric", "before", "dev", "data", "steps", "forwards", "backwards", "seconds", "peak_bytes", "curve"}


def of_run(config: RunConfig, result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Record:
    """What a finished run says of itself: from its resolved configuration, result.json and the lines of metrics.jsonl."""
    found: Record = {"status": result["status"], "error": result.get("reason")}
    found |= {"seed": config.seed, "lr": config.train.learning_rate, "batch": config.train.per_device_train_batch_size}
    found |= {"max_length": config.max_length, "config": json.loads(config.model_dump_json())}
    if result["status"] != "done":
        return found
    found |= {key: result[key] for key in _KEPT if key in result}
    found["curve"] = curve(result, lines)
    found |= {"seconds": found["curve"][-1]["seconds"], "cpu_seconds": found["curve"][-1]["cpu_seconds"]}
    if "test" in result:
        found["test"] = result["test"]
    split = final(found)
    found["interval"] = interval(found["metric"], found[split][found["metric"]], found["data"].get(split, {}).get("rows"))
    return found


def curve(result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Dev measures along a run, from its start to its end: step, forwards, backwards, seconds, cpu_seconds, measures."""
    steps = result["steps"]

    def point(step: int, spent: Mapping[str, Any], measures: Mapping[str, Any]) -> dict[str, Any]:
        share = step / steps if steps else 1.0
        counted = {key: round(share * result[key]) for key in ("forwards", "backwards")}
        times = {key: spent.get(key, 0.0) for key in ("seconds", "cpu_seconds")}
        return {"step": step, **counted, **times, **measures}

    points = [point(0, {}, result.get("start", result["before"]))] if steps else []
    last: Mapping[str, Any] = {key: result[key] for key in ("seconds", "cpu_seconds") if key in result}
    for line in lines:
        last = line if "seconds" in line else last
        measures = {k.removeprefix("eval_"): v for k, v in line.items() if k.startswith("eval_") and k[5:] in result["dev"]}
        if measures and line["step"] < steps:
            points.append(point(line["step"], line, measures))
    return [*points, point(steps, last, result["dev"])]


def spent(record: Mapping[str, Any], point: Mapping[str, Any] | None = None) -> float:
    """Seconds of training, of a whole run or up to a point of its curve: on a CPU its processor time over its threads, which
    other work on the machine changes little; on another device wall time."""
    at = record if point is None else point
    if record.get("device") == "cpu" and record.get("threads") and at.get("cpu_seconds"):
        return at["cpu_seconds"] / record["threads"]
    return at["seconds"]


def final(record: Mapping[str, Any]) -> str:
    """The split on which a record is judged: test where it was read, else dev."""
    return "test" if "test" in record else "dev"


# ---------------------------------------------------------------------------------------------------- reading


def read(paths: Iterable[str | Path]) -> list[Record]:
    """The records below some folders: of comparisons, of studies, and of runs. Raises ConfigError where there is none."""
    found: list[Record] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise ConfigError(f"{path} is no folder: give a run's, a comparison's, or one of records")
        found += _of_folder(path)
    names = [record["name"] for record in found]
    for k, record in enumerate(found):
        if names.count(record["name"]) > 1:
            record["name"] = f"{record['name']} #{names[: k + 1].count(names[k])}"
    return found


def _of_folder(path: Path) -> list[Record]:
    if (path / folders.RESOLVED).exists():
        return [_of_run_folder(path)]
    below = path / FOLDER if (path / FOLDER).is_dir() else path
    files = [file for pattern in ("*.json", "*/*.json") for file in sorted(below.glob(pattern))]
    made = [file for file in files if not (file.parent / folders.RESOLVED).exists()]
    records = [record for file in made if (record := _of_file(file)) is not None]
    runs = sorted({file.parent for file in path.glob("*/" + folders.RESOLVED)})
    records += [_of_run_folder(run) for run in runs]
    if not records:
        raise ConfigError(f"{path} holds no record and no run: give the folder of a run, a comparison or a study")
    return records


def _of_file(file: Path) -> Record | None:
    """A record file's content in format 2; None for a JSON file that is no record."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no JSON ({error}): remove it, and the run is made again") from None
    if not isinstance(values, dict) or "status" not in values or not {"method", "scheme"} <= values.keys():
        return None
    form = values.get("format")
    if form == 1 and "place" in values:
        return migrated(values, file.parent.name + "/" + file.stem)
    if form != FORMAT:
        raise ConfigError(
            f"{file} has format {form!r}, and this smidgen reads {FORMAT} and 1: "
            + ("take a newer smidgen" if isinstance(form, int) and form > FORMAT else "make the run again")
        )
    missing = _NEEDED - values.keys() | (_OF_DONE - values.keys() if values["status"] == "done" else set())
    if missing:
        raise ConfigError(f"{file} lacks {', '.join(sorted(missing))}: remove it, and the run is made again")
    return values


def migrated(old: Mapping[str, Any], name: str) -> Record:
    """A record of format 1 in format 2. Its curve has two ends only, and its data no digest: rows are identified by their
    source and numbers, which the studies fix."""
    place, _, _ = name.partition("/")
    model = Path(old["model"]).name if ":" in old["model"] else old["model"]
    found: Record = {"format": FORMAT, "name": name, "model": model, "task": f"{old['task']} ({place})"}
    found |= {key: old.get(key) for key in ("scheme", "method", "role", "seed", "status", "lr", "batch", "max_length")}
    found |= {"error": old.get("reason"), "steps": old.get("steps_made", old["steps"]), "chance": old.get("chance")}
    found["config"] = {key: old.get(key) for key in ("model", "task", "task_args", "scheme_args", "train", "options", "run")}
    if found["role"] == "zero_shot":
        found |= {"role": "untrained", "method": "untrained"}
    if old["status"] != "done":
        return found
    found |= {key: old[key] for key in (*_COUNTS, "before", "dev", "versions", "weights_sha256") if key in old}
    found |= {"device": "cpu", "threads": old["threads"]}
    found |= {"metric": old.get("metric", "accuracy"), "seconds": old["seconds"], "cpu_seconds": old["cpu_seconds"]}
    source = json.dumps([old["data"], old["task"], old["task_args"]], sort_keys=True)
    splits = {"train": "train", "validation": "dev", "test": "test"}
    rows = {splits[k]: v for k, v in old["rows"].items() if k in splits}
    found["data"] = {split: {"rows": n, "sha256": f"{source} {split} {n}"} for split, n in rows.items()}
    if "test" in old:
        found["test"] = old["test"]
        found["data"].setdefault("test", {})["majority"] = old.get("majority")
    result = {**found, "forwards": old["forwards"], "backwards": old["backwards"]}
    found["curve"] = curve(result, [])
    split = final(found)
    found["interval"] = interval(found["metric"], found[split][found["metric"]], found["data"].get(split, {}).get("rows"))
    return found


def _of_run_folder(folder: Path) -> Record:
    """A run's folder as a record. Raises ConfigError for a run that has no result yet."""
    if not (folder / folders.RESULT).exists():
        raise ConfigError(f"{folder} has no {folders.RESULT}: finish the run (smidgen train --resume --output {folder}) first")
    result = json.loads((folder / folders.RESULT).read_text(encoding="utf-8"))
    config = configuration.load(folder / folders.RESOLVED, notify=lambda line: None)
    found = of_run(config, result, folders.metrics(folder))
    if result["status"] == "done" and "data" not in result:
        raise ConfigError(f"{folder} was made before results named their rows: run it again to compare it with others")
    task = config.task or (config.data if isinstance(config.data, str) else "data")
    found |= {"format": FORMAT, "name": folder.name, "model": Path(config.model).name, "task": Path(str(task)).stem}
    found |= {"scheme": config.scheme, "method": label(config), "role": "seed"}
    if (folder / folders.ENVIRONMENT).exists():
        machine = json.loads((folder / folders.ENVIRONMENT).read_text(encoding="utf-8"))
        found |= {key: machine.get(key) for key in ("device", "threads")}
    return found | {"command": f"smidgen train {folder / folders.RESOLVED} output=NEW_FOLDER", "folder": str(folder)}


def label(config: RunConfig) -> str:
    """What tells a run's method from others of the same name on a page."""
    parts = [config.method]
    parts += ["checkpointing"] if config.train.extra.get("gradient_checkpointing") else []
    parts += [part for part in (config.activations, config.quantise, config.preset) if part]
    return " + ".join(parts)


# ---------------------------------------------------------------------------------------------------- equal data


def refuse_unequal(records: Sequence[Record]) -> None:
    """Raise ConfigError unless all finished runs of a task that are ranked were made and judged on the same rows.

    Rows may follow the seed (a benchmark's draw), so they have to be equal among runs of one seed; the split that judges has
    the same size in all. Runs of different seeds with different rows are compared as draws only where they share a seed.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["status"] == "done" and record["role"] == "seed":
            groups.setdefault((record["task"], record["metric"]), []).append(record)
    for members in groups.values():
        for split in ("train", final(members[0])):
            known: dict[Any, tuple[Record, Any]] = {}
            for record in members:
                first, wanted = known.setdefault(record["seed"], (record, _rows(record, split)))
                if _rows(record, split) != wanted:
                    raise ConfigError(_unequal(first, record, split))
            every = {seed: digest for seed, (_, digest) in known.items()}
            if len(set(every.values())) > 1 and not _share_a_seed(members):
                first, other = (next(r for r in members if r["seed"] == seed) for seed in list(every)[:2])
                raise ConfigError(_unequal(first, other, split))


def _share_a_seed(members: Sequence[Record]) -> bool:
    seeds: dict[tuple[str, str, str], set[int]] = {}
    for record in members:
        seeds.setdefault((record["model"], record["scheme"], record["method"]), set()).add(record["seed"])
    return bool(set.intersection(*seeds.values()))


def _rows(record: Record, split: str) -> Any:
    return record["data"].get(split, {}).get("sha256")


def _unequal(first: Record, second: Record, split: str) -> str:
    one, two = (r["data"].get(split, {}).get("rows", "no") for r in (first, second))
    return (
        f"{first['name']} and {second['name']} have different {split} rows ({one} and {two}): runs are ranked on equal data "
        "only; give both the same data, numbers of rows and seed, or look at them apart"
    )
