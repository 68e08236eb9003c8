"""The journal: format, torn tails, damage, size."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smidgen import journal

HEADER = {"groups": 1, "method": "zo_sgd"}
GOLDEN = Path(__file__).parent / "golden" / "journal-v1.bin"


def written(path: Path, steps: int) -> Path:
    with journal.Writer.create(path, HEADER) as writer:
        for t in range(steps):
            writer.append([1e-3 / (t + 1)], [0.5 + t, 0.25 - t])
    return path


def test_round_trip_and_size(tmp_path):
    path = written(tmp_path / "journal.bin", 5)
    found = journal.read(path)
    assert found.header == HEADER and found.torn_bytes == 0 and not found.ended
    assert [r.step for r in found.steps()] == list(range(5))
    assert found.steps()[3].values == (3.5, -2.75) and found.steps()[3].lrs == (2.5e-4,)
    assert journal.record_bytes(2) == 36 <= 64
    assert path.stat().st_size == len(journal.encode_header(HEADER)) + 5 * 36


@given(st.integers(0, 2**32 - 1), st.lists(st.floats(width=64), max_size=40), st.integers(0, 3))
def test_records_decode_to_what_was_encoded(step, values, flags):
    record = journal.Record(step, (0.5,), tuple(values), flags)
    data = record.encode()
    assert len(data) == journal.record_bytes(len(values))
    numbers = struct.unpack_from(f"<{1 + len(values)}d", data, 8)
    assert struct.pack(f"<{len(values)}d", *numbers[1:]) == struct.pack(f"<{len(values)}d", *values)


@pytest.mark.parametrize("lost", range(1, 36))
def test_a_torn_tail_is_cut_with_one_line(tmp_path, lost):
    path = written(tmp_path / "journal.bin", 3)
    os.truncate(path, path.stat().st_size - lost)
    found = journal.read(path)
    assert len(found.steps()) == 2 and found.torn_bytes == 36 - lost
    assert found.cut_notice() == f"journal.bin: cut {36 - lost} bytes of a torn record after step 2"
    with journal.Writer.resume(found) as writer:
        writer.append([1.0], [2.0, 3.0])
    assert [r.step for r in journal.read(path).steps()] == [0, 1, 2]
    assert journal.read(path).steps()[2].values == (2.0, 3.0)


def test_blocks_that_never_reached_the_disk_are_a_torn_tail(tmp_path):
    path = written(tmp_path / "journal.bin", 3)
    os.truncate(path, path.stat().st_size + 500)
    assert len(journal.read(path).steps()) == 3


@pytest.mark.parametrize("offset", range(36))
def test_a_damaged_record_is_refused(tmp_path, offset):
    path = written(tmp_path / "journal.bin", 4)
    data = bytearray(path.read_bytes())
    data[len(data) - 2 * 36 + offset] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(journal.JournalError, match="step 2 is damaged") as error:
        journal.read(path)
    assert "--at 2" in str(error.value)
    assert len(journal.read(path, stop=2).steps()) == 2


def test_damaged_header_other_files_and_versions_are_refused(tmp_path):
    path = written(tmp_path / "journal.bin", 1)
    data = bytearray(path.read_bytes())
    for position, text in ((0, "not a smidgen journal"), (7, "journal format"), (14, "header")):
        broken = bytearray(data)
        broken[position] ^= 0xFF
        path.write_bytes(broken)
        with pytest.raises(journal.JournalError, match=text):
            journal.read(path)
    path.write_bytes(b"")
    with pytest.raises(journal.JournalError):
        journal.read(path)


def test_nothing_is_overwritten(tmp_path):
    path = written(tmp_path / "journal.bin", 2)
    with pytest.raises(journal.JournalError, match="--resume"):
        journal.Writer.create(path, HEADER)
    assert len(journal.read(path).steps()) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["journal.bin"]


def test_end_mark_is_read_and_removed_when_the_run_goes_on(tmp_path):
    path = written(tmp_path / "journal.bin", 2)
    with journal.Writer.resume(journal.read(path)) as writer:
        writer.end()
    assert journal.read(path).ended
    with journal.Writer.resume(journal.read(path)) as writer:
        writer.append([1.0], [1.0, 1.0])
    found = journal.read(path)
    assert not found.ended and len(found.steps()) == 3


def test_a_full_disk_leaves_no_torn_record(tmp_path, monkeypatch):
    path = written(tmp_path / "journal.bin", 2)
    writer = journal.Writer.resume(journal.read(path))
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:10]))
    with pytest.raises(OSError, match="No space"):
        writer.append([1.0], [1.0, 1.0])
    monkeypatch.undo()
    writer.close()
    assert len(journal.read(path).steps()) == 2 and journal.read(path).torn_bytes == 0


def test_golden_file_of_this_version():
    found = journal.read(GOLDEN)
    assert found.header["method"] == "zo_sgd" and found.ended
    assert [(r.step, r.lrs, r.values, r.flags) for r in found.steps()] == [
        (0, (0.001,), (0.5, 0.25), 0),
        (1, (0.0005,), (float("inf"), 0.125), journal.BAD),
    ]


def test_a_step_with_more_values_than_a_record_has_room_for(tmp_path):
    path, many = tmp_path / "journal.bin", [float(i) for i in range(2 * journal.ROOM + 3)]
    with journal.Writer.create(path, {"groups": 1}) as writer:
        writer.append([0.5], many)
        whole = path.stat().st_size
        writer.append([0.25], [1.0, 2.0])
        writer.append([0.125], many)
    found = journal.read(path)
    assert [r.values for r in found.steps()] == [tuple(many), (1.0, 2.0), tuple(many)]
    assert [r.lrs for r in found.steps()] == [(0.5,), (0.25,), (0.125,)]
    assert [r.step for r in found.steps()] == [0, 1, 2] and all(r.flags == 0 for r in found.steps())
    data = path.read_bytes()
    for cut in (whole - 1, whole - 8 * 3 - 20, whole // 2):  # a torn step is cut from its first record on
        path.write_bytes(data[:cut])
        torn = journal.read(path)
        assert not torn.records and torn.good_bytes + torn.torn_bytes == cut
    path.write_bytes(data[: whole + 5])
    with journal.Writer.resume(journal.read(path)) as writer:
        writer.append([0.5], [7.0])
    assert [len(r.values) for r in journal.read(path).steps()] == [len(many), 1]
