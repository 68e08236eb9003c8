"""The journal: a header, then one checksummed record a step with the numbers that the step was made of.

File `journal.bin`, little-endian:

    header  8 bytes magic "SMIDGEN" + format version | u32 length | JSON | u32 CRC-32 of the JSON
    record  u32 step | u16 count of values | u8 flags | u8 check of these 7 bytes
            | float64 learning rate of each parameter group | float64 values | u32 CRC-32 of all before

A record of a two-sided step with one direction and one group takes 36 bytes. A step with more values than a record has
room for is several records of one step number; all but the last have the flag MORE. Records are written with one system call
each, so a killed process leaves at most one torn record at the end, which is cut when the file is opened for writing.
The file is synced to disk every 5 seconds and when it is closed: a power failure loses at most that.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from smidgen.config import UserError

MAGIC = b"SMIDGEN"
VERSION = 1
BAD = 1  # flag: nothing was written in this step
END = 2  # flag of a record without values: the run ended by itself
MORE = 4  # flag: the step's values go on in the next record

ROOM = (1 << 16) - 1  # values of a record
_GROUPS = 1 << 16  # parameter groups, at most; chosen: no journal comes near

_PREFIX = struct.Struct("<IHB")
_SYNC_SECONDS = 5.0


class JournalError(UserError):
    """A journal that cannot be trusted."""

    exit_code = 1


@dataclass(frozen=True)
class Record:
    """One step."""

    step: int
    lrs: tuple[float, ...]  # learning rate of each parameter group
    values: tuple[float, ...]  # the objective's answers, in order
    flags: int = 0

    def encode(self) -> bytes:
        """The bytes of its record, or records."""
        if len(self.values) > ROOM:
            head = Record(self.step, self.lrs, self.values[:ROOM], self.flags | MORE)
            return head.encode() + Record(self.step, self.lrs, self.values[ROOM:], self.flags).encode()
        prefix = _PREFIX.pack(self.step, len(self.values), self.flags)
        body = prefix + bytes([zlib.crc32(prefix) & 0xFF])
        body += struct.pack(f"<{len(self.lrs) + len(self.values)}d", *self.lrs, *self.values)
        return body + struct.pack("<I", zlib.crc32(body))


def record_bytes(values: int, groups: int = 1) -> int:
    """Size of a record."""
    return 8 + 8 * (values + groups) + 4


def encode_header(header: dict[str, Any]) -> bytes:
    """The file's first bytes."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    return MAGIC + bytes([VERSION]) + struct.pack("<I", len(text)) + text + struct.pack("<I", zlib.crc32(text))


def _decode_header(data: memoryview, path: Path) -> tuple[dict[str, Any], int]:
    if data[:7] != MAGIC:
        raise JournalError(f"{path} is not a smidgen journal")
    if data[7] != VERSION:
        raise JournalError(f"{path} has journal format {data[7]}, this version reads {VERSION}: use the smidgen that wrote it")
    (length,) = struct.unpack_from("<I", data, 8)
    text, end = data[12 : 12 + length], 12 + length + 4
    if len(data) < end or struct.unpack_from("<I", data, 12 + length)[0] != zlib.crc32(text):
        raise JournalError(f"the header of {path} is damaged: start the run again, or restore the file from a copy")
    try:
        header = json.loads(bytes(text))
        fits = type(header["groups"]) is int and 1 <= header["groups"] <= _GROUPS
    except (ValueError, KeyError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise JournalError(f"the header of {path} is none that smidgen writes: restore the file from a copy")
    return header, end


@dataclass
class Transcript:
    """A journal that was read."""

    path: Path
    header: dict[str, Any]
    records: list[Record]
    good_bytes: int  # length of the file up to the last whole record
    torn_bytes: int  # bytes of a torn record after it

    def steps(self) -> list[Record]:
        """The records of steps, in order."""
        return [r for r in self.records if not r.flags & END]

    @property
    def ended(self) -> bool:
        """Whether the run ended by itself."""
        return any(r.flags & END for r in self.records)

    def cut_notice(self) -> str | None:
        """One line about a torn tail, or None."""
        if not self.torn_bytes:
            return None
        return f"{self.path.name}: cut {self.torn_bytes} bytes of a torn record after step {len(self.steps())}"


def read(path: Path, *, stop: int | None = None) -> Transcript:
    """Read and verify a journal, up to `stop` steps. A torn tail is left out; a damaged record raises JournalError."""
    data = memoryview(path.read_bytes())  # slices of it are no copies
    if len(data) < 12:
        raise JournalError(f"{path} is not a smidgen journal: only {len(data)} bytes")
    header, at = _decode_header(data, path)
    groups = int(header["groups"])
    records: list[Record] = []
    parts: list[Record] = []  # of a step that is not whole yet
    good = at
    while at < len(data) and len(records) != stop:
        tail = data[at:]
        if len(tail) < 8 or not any(tail):  # a prefix of a record, or blocks that never reached the disk
            break
        step, count, flags = _PREFIX.unpack_from(tail)
        if tail[7] != zlib.crc32(tail[:7]) & 0xFF:
            raise _damaged(path, len(records))
        size = record_bytes(count, groups)
        if len(tail) < size:
            break
        body, (crc,) = tail[: size - 4], struct.unpack_from("<I", tail, size - 4)
        expected = len(records)
        if crc != zlib.crc32(body) or (step != expected and not flags & END):
            raise _damaged(path, expected)
        numbers = struct.unpack_from(f"<{groups + count}d", body, 8)
        parts.append(Record(step, numbers[:groups], numbers[groups:], flags))
        at += size
        if flags & MORE:
            continue
        values = tuple(value for part in parts for value in part.values)
        records.append(Record(step, numbers[:groups], values, flags))
        parts, good = [], at
        if flags & END:
            break
    return Transcript(path, header, records, good, len(data) - good)


def _damaged(path: Path, step: int) -> JournalError:
    return JournalError(
        f"{path}: the record of step {step} is damaged (checksum); "
        f"`smidgen replay` with --at {step} rebuilds the weights up to there"
    )


class Witness:
    """A rank that writes nothing: it takes the same records and keeps their hash, to compare it with the writer's."""

    def __init__(self, records: Sequence[Record] = ()):
        self.records, self._digest = 0, hashlib.sha256()
        for record in records:
            self._take(record.encode())

    @property
    def sha256(self) -> str:
        """Hash of all records so far."""
        return self._digest.hexdigest()

    def _take(self, data: bytes) -> None:
        self._digest.update(data)
        self.records += 1

    def append(self, lrs: Sequence[float], values: Sequence[float], flags: int = 0) -> None:
        """One more record."""
        self._take(Record(self.records, tuple(lrs), tuple(values), flags).encode())

    def sync(self) -> None:
        """Nothing is to be written."""

    def close(self) -> None:
        """Nothing is open."""


class Writer(Witness):
    """Appends records. Use as a context manager; close() syncs."""

    def __init__(self, path: Path, groups: int, records: Sequence[Record] = ()):
        super().__init__(records)
        self.path, self.groups = path, groups
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._synced = time.monotonic()

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Writer:
        """A new journal; its header is on disk when this returns. Refuses to overwrite."""
        temporary = path.with_name(path.name + ".part")
        with temporary.open("wb") as file:
            file.write(encode_header(header))
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            temporary.unlink()
            raise JournalError(f"{path} exists: continue that run with --resume, or choose another --output")
        temporary.rename(path)
        return cls(path, int(header["groups"]))

    @classmethod
    def resume(cls, transcript: Transcript) -> Writer:
        """Go on after the last whole record; a torn tail and an end mark are cut off."""
        end = transcript.good_bytes
        if transcript.ended:
            end -= record_bytes(0, int(transcript.header["groups"]))
        os.truncate(transcript.path, end)
        return cls(transcript.path, int(transcript.header["groups"]), transcript.steps())

    def append(self, lrs: Sequence[float], values: Sequence[float], flags: int = 0) -> None:
        """Write one record with one system call."""
        data = Record(self.records, tuple(lrs), tuple(values), flags).encode()
        written = os.write(self._file, data)
        if written != len(data):  # disk full: leave no torn record behind
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(28, "No space left on device", str(self.path))
        self._take(data)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def end(self) -> None:
        """Mark that the run ended by itself."""
        self.append([0.0] * self.groups, [], END)

    def sync(self) -> None:
        """Force the records to disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close; may be called twice."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
