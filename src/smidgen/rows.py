"""Rows of any source: .jsonl, .json, .csv, .tsv, .parquet, .txt and .npz files, folders, hub ids, and lists of these.

A row is a dict that knows its place, such as ``reviews.jsonl:7``. A folder and a hub id have splits under our names:
train, validation, test. Folders of images by class, and arrays of images, have rows {image, label} (`pictures`). `datasets` is
imported for hub ids and streams only, `pyarrow` for parquet only.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smidgen import tasks
from smidgen.config import ConfigError, DataError, Source, nearest
from smidgen.pictures import Picture, by_class, from_arrays, has_classes, is_picture
from smidgen.tasks import Row
from smidgen.tasks._example import read_jsonl

__all__ = ["DataSpec", "canonical_split", "has_split", "read_rows", "stream_splits"]

DataSpec = str | Path | Source | Sequence["str | Source"]

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "validation_matched"),
    "test": ("test",),
}
_EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".npz")


def read_rows(source: DataSpec, split: str | None = None) -> list[Row]:
    """All rows of a file, a folder, a hub id, or of several one after another.

    split names a split of a folder or hub id ('dev' and 'val' mean 'validation'); a lone file is a train split.
    Raises DataError: missing, empty, malformed (with file and line), no such split.
    """
    if not isinstance(source, str | Path | Source):
        return [row for part in source for row in read_rows(part, split)]
    name = _name(source)
    wanted = canonical_split(split) if split is not None else None
    path = _local(name)
    found: Mapping[str, Any] = _split_files(path) if path is not None else _hub_splits(name)
    if wanted is None:
        wanted = "train" if "train" in found else next(iter(found))
    if wanted not in found:
        raise DataError(f"'{name}' has no {wanted} split: it has {', '.join(found)}")
    if path is not None:
        rows = [row for file in found[wanted] for row in _read_file(file)]
    else:
        rows = [Row(record, f"{name} {wanted} row {number}") for number, record in enumerate(found[wanted], 1)]
    if not rows:
        raise DataError(f"'{name}' is empty: at least one row is needed")
    return rows


def has_split(source: DataSpec, split: str) -> bool:
    """Whether every part of a source has this split."""
    if not isinstance(source, str | Path | Source):
        return all(has_split(part, split) for part in source)
    path = _local(_name(source))
    return canonical_split(split) in (_split_files(path) if path is not None else _hub_splits(_name(source)))


def _name(source: str | Path | Source) -> str:
    return str(source.path if isinstance(source, Source) else source)


def _local(name: str) -> Path | None:
    """The file or folder of this name; None for a hub id. DataError for a name that can only be a missing file."""
    path = Path(name).expanduser()
    if name.strip() and path.exists():
        return path
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name)
    if hub_id and path.suffix.lower() not in _EXTENSIONS and name[0] not in ".~/" and not Path(path.parts[0]).is_dir():
        return None
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, [*beside, *tasks.names()])
    hint = f"did you mean '{path.parent / close if close in beside else close}'?" if close else "check the path"
    raise DataError(f"there is no file, folder or task '{name}': {hint} (a hub id is owner/name)")


def canonical_split(split: str) -> str:
    """'train', 'validation' or 'test'. Raises ConfigError for any other name."""
    for name, spellings in _SPLIT_NAMES.items():
        if split.lower() in spellings:
            return name
    raise ConfigError(f"unknown split '{split}': there are train, validation (dev) and test")


def _split_files(path: Path) -> dict[str, list[Path]]:
    """Files of each split. A file whose name starts with no split's name makes the whole folder a train split."""
    if path.is_file():
        return {"train": [path]}
    files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in _EXTENSIONS)
    if not files:
        return _split_folders(path)
    found: dict[str, list[Path]] = {}
    for split, spellings in _SPLIT_NAMES.items():
        pattern = re.compile(rf"(?:{'|'.join(spellings)})(?:[-_.]?\d.*)?$", re.IGNORECASE)  # shards are numbered
        if chosen := [file for file in files if pattern.match(file.stem)]:
            found[split] = chosen
    return found or {"train": files}


def _split_folders(path: Path) -> dict[str, list[Path]]:
    """Folders of images by class, of each split; a folder without splits is a train split."""
    parts = {part.name.lower(): part for part in path.iterdir() if part.is_dir() and has_classes(part)}
    found = {
        split: [parts[name] for name in spellings if name in parts][:1]
        for split, spellings in _SPLIT_NAMES.items()
        if parts.keys() & set(spellings)
    }
    if not found and has_classes(path):
        return {"train": [path]}
    if not found:
        raise DataError(
            f"the folder '{path}' holds no data file: it may hold {' '.join(_EXTENSIONS)}, or a folder of images for each class"
        )
    return found


def _read_file(path: Path) -> list[Row]:
    if path.is_dir():
        return [Row({"image": picture, "label": label}, picture.place) for picture, label in by_class(path)]
    rows = _read_table(path)
    for row in rows:
        name = row.get("image")
        if "label" in row and isinstance(name, str) and is_picture(Path(name)):
            row["image"] = Picture(path.parent / name, name, row.place)
    return rows


def _read_table(path: Path) -> list[Row]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            return read_jsonl(path)
        if suffix == ".json":
            return _read_json(path)
        if suffix in (".csv", ".tsv"):
            return _read_csv(path, "\t" if suffix == ".tsv" else ",")
        if suffix == ".txt":
            return _read_text(path)
        if suffix == ".parquet":
            return _read_parquet(path)
        if suffix == ".npz":
            return [Row({"image": picture, "label": label}, picture.place) for picture, label in from_arrays(path)]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}): save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    raise DataError(f"'{path}' is no data file: it may be {' '.join(_EXTENSIONS)}")


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        values = json.loads(text)
    except ValueError as error:
        first = next((line for line in text.splitlines() if line.strip()), "")
        try:
            json.loads(first)
        except ValueError:
            raise DataError(f"{path}: not JSON ({error}): a list of objects, or one object a line") from None
        return read_jsonl(path)  # JSON Lines under the other name
    if isinstance(values, dict):
        values = values["data"] if isinstance(values.get("data"), list) else [values]
    if not isinstance(values, list):
        raise DataError(f"{path}: holds one {type(values).__name__}: write a list of objects")
    for number, row in enumerate(values, 1):
        if not isinstance(row, dict):
            raise DataError(f'{path}: entry {number} is not an object: write {{"column": value}}')
    return [Row(row, f"{path}: entry {number}") for number, row in enumerate(values, 1)]


def _read_csv(path: Path, delimiter: str) -> list[Row]:
    rows = []
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KB is shorter than a long document
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter=delimiter)
            for values in reader:
                if None in values:
                    extra = values[None]  # type: ignore[index]
                    raise DataError(
                        f"{path}:{reader.line_num}: {len(extra)} field(s) more than the header's "
                        f"{len(reader.fieldnames or ())}: quote a field that holds a '{delimiter}'"
                    )
                rows.append(Row(values, f"{path}:{reader.line_num}"))
    except csv.Error as error:
        raise DataError(f"{path}: not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _read_text(path: Path) -> list[Row]:
    """Documents: paragraphs where blank lines separate them, else lines."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    content = [number for number, line in enumerate(lines, 1) if line.strip()]
    if not content:
        return []
    if len(content) == content[-1] - content[0] + 1:
        return [Row({"text": lines[number - 1]}, f"{path}:{number}") for number in content]
    rows: list[Row] = []
    for number in content:
        if rows and lines[number - 2].strip():
            rows[-1]["text"] += "\n" + lines[number - 1]
        else:
            rows.append(Row({"text": lines[number - 1]}, f"{path}:{number}"))
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        records = pyarrow.parquet.read_table(path).to_pylist()  # `datasets` would leave a copy in its cache
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file: {error}") from None
    return [Row(record, f"{path}: row {number}") for number, record in enumerate(records, 1)]


def stream_splits(source: DataSpec) -> dict[str, Any]:
    """The splits of one source as `datasets` reads them while they are needed. Raises DataError."""
    name = _name(source)  # type: ignore[arg-type]
    path = _local(name)
    if path is None:
        return _hub_splits(name, streaming=True)
    if path.is_file():
        return _hub_splits(str(path.parent), streaming=True, data_files=path.name)
    return _hub_splits(str(path), streaming=True)


def _hub_splits(name: str, **options: Any) -> dict[str, Any]:
    """The splits of a hub id (``owner/name`` or ``owner/name:configuration``) that are ours, under our names."""
    import datasets

    hub_id, _, configuration = (name, "", "") if Path(name).is_dir() else name.partition(":")
    try:
        found = datasets.load_dataset(hub_id, configuration or None, **options)
    except Exception as error:  # the hub's clients raise their own, the HTTP library's and built-in errors
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"the hub's data set '{name}' cannot be read ({type(error).__name__}: {reason}): check the name "
            "(owner/name or owner/name:configuration) and the network, or give a local file or folder"
        ) from None
    ours = {split: key for split, spellings in _SPLIT_NAMES.items() for key in found if key in spellings}
    if not ours:
        raise DataError(f"the hub's data set '{name}' has the splits {', '.join(found)}: one must be called train")
    return {split: found[key] for split, key in ours.items()}
