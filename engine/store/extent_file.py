"""A file of extents: its bytes, writing it and reading it with its checksums. extents.py decides which and when.

    extents end to end | table, msgpack | footer, 24 bytes

    footer   magic 8 bytes | table length u64 | xxh3 of the table u64, little-endian
    table    the object's etag if this is all of it, else nil; of each extent start, end and the xxh3 of each MiB

A whole object is one extent from 0, so the file begins with exactly the object's bytes and can be given to mmap or SQLite.
Each MiB is verified when this process reads it for the first time.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Sequence

import msgspec
import xxhash

from engine.store.base import Buffer
from engine.store.known_extents import Extent, File

_MAGIC = b"TARTANX1"
_FOOTER = struct.Struct("<8sQQ")
BLOCK_BYTES = 1 << 20
"""One checksum covers so much."""
_CLUSTER_BYTES = 4096
"""What a file costs is rounded up to this: file systems do."""


class ExtentRow(msgspec.Struct, array_like=True, frozen=True):
    start: int
    end: int
    checksums: list[int]


class Table(msgspec.Struct, array_like=True, frozen=True):
    etag: str | None
    extents: list[ExtentRow]


def runs_of(pieces: Iterable[tuple[int, Buffer]]) -> list[tuple[int, int, list[Buffer]]]:
    """(start, end, parts): pieces in order, those that touch made one run, so that a range across a cut is a hit. No overlaps."""
    runs: list[tuple[int, int, list[Buffer]]] = []
    for start, data in sorted(((start, data) for start, data in pieces if len(data)), key=lambda piece: piece[0]):
        if runs and start < runs[-1][1]:
            parts: list[Buffer] = [data]
            if start + len(data) > runs[-1][1]:
                runs.append((start, start + len(data), parts))
        elif runs and start == runs[-1][1]:
            first, end, parts = runs[-1]
            runs[-1] = (first, end + len(data), [*parts, data])
        else:
            runs.append((start, start + len(data), [data]))
    return runs


def checksums_of(parts: Sequence[Buffer]) -> list[int]:
    """xxh3 of each MiB of the parts end to end."""
    checksums: list[int] = []
    hasher = xxhash.xxh3_64()
    room = BLOCK_BYTES
    for part in parts:
        rest = memoryview(part)
        while len(rest):
            taken = rest[:room]
            hasher.update(taken)
            rest = rest[len(taken) :]
            room -= len(taken)
            if room == 0:
                checksums.append(hasher.intdigest())
                hasher.reset()
                room = BLOCK_BYTES
    return checksums if room == BLOCK_BYTES else [*checksums, hasher.intdigest()]


def write_file(staged: str, path: str, table: Table, parts: Sequence[Buffer], mode: int) -> File:
    """Write extents (`parts` end to end, as `table` says) under a name of its own in the stage, and rename it. Raises OSError, with nothing left."""
    tail = msgspec.msgpack.encode(table)
    footer = _FOOTER.pack(_MAGIC, len(tail), xxhash.xxh3_64_intdigest(tail))
    os.makedirs(os.path.dirname(staged), exist_ok=True)
    try:
        with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb", buffering=0) as out:
            for part in (*parts, tail, footer):
                rest = memoryview(part)
                while len(rest):
                    rest = rest[out.write(rest) :]
            n_bytes = out.tell()
        _rename_into(staged, path)
    except BaseException:
        remove(staged)
        raise
    return File(path, cost_of(n_bytes), table.etag)


def _rename_into(staged: str, path: str) -> None:
    """The folder may vanish under us, when somebody forgets the object or sweeps: make it again."""
    for n_left in (2, 1, 0):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return os.rename(staged, path)
        except FileNotFoundError:
            if n_left == 0:
                raise


def read_table(path: str) -> tuple[Table, File]:
    """Raises ValueError if the file is not one of ours or was cut short."""
    with open(path, "rb") as source:
        status = os.fstat(source.fileno())
        source.seek(max(0, status.st_size - _FOOTER.size))
        footer = source.read()
        if len(footer) != _FOOTER.size or not footer.startswith(_MAGIC):
            raise ValueError("no footer")
        _, length, checksum = _FOOTER.unpack(footer)
        data_bytes = status.st_size - _FOOTER.size - length
        if data_bytes < 0:
            raise ValueError("table is longer than the file")
        source.seek(data_bytes)
        tail = source.read(length)
    if xxhash.xxh3_64_intdigest(tail) != checksum:
        raise ValueError("checksum of the table differs")
    try:
        table = msgspec.msgpack.decode(tail, type=Table)
    except msgspec.MsgspecError as error:
        raise ValueError("table does not parse") from error
    if sum(row.end - row.start for row in table.extents) != data_bytes:
        raise ValueError("table and file differ in size")
    return table, File(path, cost_of(status.st_size), table.etag)


def read_verified(descriptor: int, extent: Extent, start: int, end: int) -> bytes:
    """Bytes start to end of the object. The first time a MiB is touched, all of it is read and compared; ValueError if it differs."""
    first, last = (start - extent.start) // BLOCK_BYTES, (end - 1 - extent.start) // BLOCK_BYTES
    if all(extent.verified[first : last + 1]):
        return _pread(descriptor, end - start, extent.offset + start - extent.start)
    low = extent.start + first * BLOCK_BYTES
    high = min(extent.start + (last + 1) * BLOCK_BYTES, extent.end)
    data = _pread(descriptor, high - low, extent.offset + low - extent.start)
    view = memoryview(data)
    for block in range(first, last + 1):
        at = (block - first) * BLOCK_BYTES
        if xxhash.xxh3_64_intdigest(view[at : at + BLOCK_BYTES]) != extent.checksums[block]:
            raise ValueError("checksum differs")
        extent.verified[block] = 1
    return data if (low, high) == (start, end) else data[start - low : end - low]


def _pread(descriptor: int, n_bytes: int, offset: int) -> bytes:
    data = os.pread(descriptor, n_bytes, offset)
    while len(data) < n_bytes:  # more than 2 GiB, or cut short
        more = os.pread(descriptor, n_bytes - len(data), offset + len(data))
        if not more:
            raise ValueError("file is too short")
        data += more
    return data


def cost_of(n_bytes: int) -> int:
    """What a file of this size takes of the disk."""
    return -(-n_bytes // _CLUSTER_BYTES) * _CLUSTER_BYTES


def remove(path: str) -> None:
    """Remove a file; that it is gone already, or cannot be removed, is no error."""
    with contextlib.suppress(OSError):
        os.unlink(path)
