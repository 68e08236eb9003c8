"""Rows: every format and place, splits of folders and of the hub, and the errors of bad files."""

from __future__ import annotations

import json
from typing import Any

import pytest

from smidgen.config import ConfigError, DataError
from smidgen.rows import has_split, read_rows
from texts import write


def test_formats_give_the_same_rows(tmp_path):
    records = [{"text": "a, b", "label": "x"}, {"text": 'say "c"\nd', "label": "y"}]
    write(tmp_path / "a.jsonl", *records)
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": records}))
    (tmp_path / "lines.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "a.csv").write_text('\ufefftext,label\n"a, b",x\n"say ""c""\nd",y\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text('text\tlabel\na, b\tx\n"say ""c""\nd"\ty\n')
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "wrapped.json", "lines.json", "a.csv", "a.tsv", "a.parquet"):
        assert read_rows(tmp_path / name) == records, name
    assert [row.place for row in read_rows(tmp_path / "a.csv")] == [f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:4"]


def test_text_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\nthree\n")
    assert [row["text"] for row in read_rows(path)] == ["one", "two", "three"]
    path.write_text("\none\ntwo\n\n\nthree\n")
    assert [(row["text"], row.place) for row in read_rows(path)] == [("one\ntwo", f"{path}:2"), ("three", f"{path}:6")]


def test_long_csv_field_and_its_global_limit(tmp_path):
    import csv

    limit = csv.field_size_limit(131_072)
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_rows(tmp_path / "a.csv")[0]["text"]) == 200_000
    assert csv.field_size_limit(limit) == 131_072


def test_folders_and_splits(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", {"text": "a"})
    write(tmp_path / "train-00001-of-00002.jsonl", {"text": "b"})
    write(tmp_path / "train_short.jsonl", {"text": "not this"})
    write(tmp_path / "dev.jsonl", {"text": "c"})
    (tmp_path / "README.md").write_text("x")
    assert [row["text"] for row in read_rows(tmp_path)] == ["a", "b"]
    assert (
        [row["text"] for row in read_rows(tmp_path, "validation")]
        == ["c"]
        == [row["text"] for row in read_rows(tmp_path, "val")]
    )
    with pytest.raises(DataError, match="has no test split: it has train, validation"):
        read_rows(tmp_path, "test")
    with pytest.raises(ConfigError, match="unknown split 'tets'"):
        read_rows(tmp_path, "tets")
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "x.jsonl", {"text": "x"})
    write(tmp_path / "parts" / "y.jsonl", {"text": "y"})
    assert [row["text"] for row in read_rows(tmp_path / "parts")] == ["x", "y"]


def test_bad_files(tmp_path):
    def refuse(name: str, content: str | bytes | None, message: str) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError) as caught:
            read_rows(str(tmp_path / name))
        assert message in str(caught.value) and caught.value.exit_code == 5

    refuse("empty.jsonl", "", "is empty")
    refuse("empty.txt", "\n \n", "is empty")
    refuse("empty.csv", "text,label\n", "is empty")
    refuse("bad.jsonl", '{"a": 1}\n{"a": \n', "bad.jsonl:2: not a line of JSON")
    refuse("bad.json", "{", "not JSON")
    refuse("list.json", "[1]", "entry 1 is not an object")
    refuse("number.json", "3", "holds one int")
    refuse("bad.csv", "a,b\n1,2,3\n", "bad.csv:2: 1 field(s) more than the header's 2")
    refuse("latin.csv", b"text\ncaf\xe9\n", "UTF-8")
    refuse("bad.parquet", "x", "not a parquet file")
    refuse("data.xlsx", "x", "is no data file")
    refuse("bda.jsonl", None, f"did you mean '{tmp_path}/bad.jsonl'")
    refuse("nofolder/x.jsonl", None, "check the path")
    (tmp_path / "none").mkdir()
    refuse("none", None, "holds no data file")
    for missing in ("", "no_such_thing", "tests/no_such_file", "./a/b", "~/nothing-here"):
        with pytest.raises(DataError, match="there is no file, folder or task"):
            read_rows(missing)
    with pytest.raises(DataError, match="did you mean 'reviews'"):
        read_rows("review")


def test_hub_errors_are_one_sentence(monkeypatch):
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"data set 'owner/name:part' cannot be read \(ConnectionError: no network at all\)"):
        read_rows("owner/name:part")


def test_hub_rows_and_splits(monkeypatch):
    import datasets

    def load(hub_id: str, configuration: str | None) -> dict[str, Any]:
        names = ["train_sft"] if configuration is None else ["train", "dev", "extra"]
        return {name: [{"text": f"{hub_id} {configuration} {name}", "label": 0}] for name in names}

    monkeypatch.setattr(datasets, "load_dataset", load)
    (row,) = read_rows("nyu-mll/glue:sst2", "validation")
    assert row["text"] == "nyu-mll/glue sst2 dev" and row.place == "nyu-mll/glue:sst2 validation row 1"
    assert has_split("nyu-mll/glue:sst2", "dev") and not has_split("nyu-mll/glue:sst2", "test")
    with pytest.raises(DataError, match="has no test split: it has train, validation"):
        read_rows("nyu-mll/glue:sst2", "test")
    with pytest.raises(DataError, match="has the splits train_sft"):
        read_rows("owner/name")
