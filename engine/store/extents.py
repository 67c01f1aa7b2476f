"""Pieces of immutable objects in files of a directory, under a budget: the disk half of the cache. Synchronous, thread-safe.

CachedStore calls it from threads; it knows no store. Several processes may share one directory: files appear by rename
under fresh names, are never changed, and may vanish at any time; whoever misses one asks the store again.

An *extent* is a run of bytes of one object. The extents that were fetched together lie in one file, so that a query writes
one file per object and not one per posting list:

    {folder}/objects/{name}/~{unique}      extents end to end | table, msgpack | footer, 24 bytes
    {folder}/stage/                        files being written
    {folder}/sweep.lock                    held by the process that evicts

    footer   magic 8 bytes | table length u64 | xxh3 of the table u64, little-endian
    table    the object's etag if this is all of it, else nil; of each extent start, end and the xxh3 of each MiB

A whole object is one extent from 0, so the file begins with exactly the object's bytes and can be given to mmap or SQLite.
Each MiB is verified when this process reads it for the first time. '~' occurs in no object name (base.check_name).

Eviction is a segmented LRU kept in the file system, so that all processes see it: a file enters on probation; the first hit
protects it (permission bit u+x) and every later one moves it to the end of the queue (modification time, at most every
`touch_interval_s`). Probation goes first, in order of arrival, so that a scan washes through it and leaves what is hot;
protected files beyond 80 % of the budget go back on probation. What a process evicted lately and fetches again was evicted
too soon and enters protected (the ghosts of 2Q and S3-FIFO); without them a new hot set larger than the probation queue
would never be let in. A file is evicted whole: one hot extent keeps its
neighbours, and what is read twice in one scan counts as hot.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import math
import os
import shutil
import stat
import struct
import threading
import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import xxhash

from engine.store.base import Buffer, Range

_MAGIC = b"TARTANX1"
_FOOTER = struct.Struct("<8sQQ")
BLOCK_BYTES = 1 << 20
_CLUSTER_BYTES = 4096
"""What a file costs is rounded up to this: file systems do."""
_ON_PROBATION, _PROTECTED = 0o600, 0o700
_PROTECTED_SHARE = 0.8
_LOW_WATER = 0.9
"""A sweep empties down to this share of the budget, so that sweeps are rare."""
_SWEEP_SHARE = 1 / 16
"""A process looks at the whole directory after writing this share of the budget: the others write, too."""
_STALE_S = 3600.0
_OFF_S = 60.0
"""How long writing is off after the disk refused a write."""


class _ExtentRow(msgspec.Struct, array_like=True, frozen=True):
    start: int
    end: int
    checksums: list[int]


class _Table(msgspec.Struct, array_like=True, frozen=True):
    etag: str | None
    extents: list[_ExtentRow]


@dataclass(slots=True)
class CacheStats:
    """Counters since the process began. Hits and misses count ranges and whole objects, bytes are what callers asked for."""

    hits: int = 0
    misses: int = 0
    hit_bytes: int = 0
    miss_bytes: int = 0
    shared: int = 0
    """Misses that waited for a request already under way."""
    written_bytes: int = 0
    evicted_bytes: int = 0
    bad_files: int = 0
    """Files dropped because their bytes were not what was written."""
    skipped: int = 0
    """Answers not kept: too large, too many waiting to be written, or writing is off."""
    write_errors: int = 0


@dataclass(slots=True, eq=False)
class _File:
    path: str
    cost_bytes: int
    etag: str | None
    touched_s: float = -math.inf
    n_extents: int = 0


@dataclass(slots=True, eq=False)
class _Extent:
    start: int
    end: int
    offset: int
    checksums: Sequence[int]
    verified: bytearray
    file: _File


@dataclass(slots=True)
class _Known:
    """What this process knows of one object: extents of which none contains another, so starts and ends both ascend."""

    extents: list[_Extent] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    files: dict[str, _File] = field(default_factory=dict)
    folder_modified_ns: int = -1

    def covering(self, start: int, end: int) -> _Extent | None:
        """Of the extents that begin early enough, the last reaches farthest."""
        at = bisect_right(self.starts, start) - 1
        return self.extents[at] if at >= 0 and end <= self.extents[at].end else None

    def whole(self) -> _Extent | None:
        first = self.extents[0] if self.extents else None
        return first if first and first.file.etag is not None else None

    def add(self, extent: _Extent) -> None:
        """Take it in and let go what it contains, or leave it out if another contains it (a whole object comes before a part)."""
        covered = self.covering(extent.start, extent.end) is not None
        if covered and (extent.file.etag is None or self.whole() is not None):
            return
        first = bisect_left(self.starts, extent.start)
        last = first
        while last < len(self.extents) and self.extents[last].end <= extent.end:
            last += 1
        contained = self.extents[first:last]
        self.extents[first:last] = [extent]
        self.starts[first:last] = [extent.start]
        extent.file.n_extents += 1
        for old in contained:
            old.file.n_extents -= 1

    def pop_superfluous(self) -> list[_File]:
        """Files none of whose extents is in use any more."""
        superfluous = [file for file in self.files.values() if file.n_extents == 0]
        for file in superfluous:
            del self.files[file.path]
        return superfluous

    def drop(self, file: _File) -> None:
        self.files.pop(file.path, None)
        self.extents = [extent for extent in self.extents if extent.file is not file]
        self.starts = [extent.start for extent in self.extents]


class ExtentCache:
    """Extents of objects below `folder`, at most about `budget_bytes` of them.

    With P processes the directory may exceed the budget by P/16 of it for a moment. `stats.write_errors` and `is_off` tell
    of a full or read-only disk: then nothing is written for a minute at a time, and reading goes on.
    """

    def __init__(self, folder: str, budget_bytes: int, *, touch_interval_s: float = 30.0) -> None:
        self.stats = CacheStats()
        self.max_file_bytes = budget_bytes // 2
        self._folder = os.path.abspath(folder)
        self._objects = os.path.join(self._folder, "objects")
        self._stage = os.path.join(self._folder, "stage")
        self._budget_bytes = budget_bytes
        self._touch_interval_s = touch_interval_s
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()  # over _known, stats and the two sums; never held while a file is read or written
        self._ghosts: OrderedDict[int, int] = OrderedDict()  # hash of (name, start, end) -> bytes, evicted lately
        self._ghost_bytes = 0
        self._serial = itertools.count()
        self._held_bytes: int | None = None
        self._since_sweep_bytes = 0
        self._off_until_s = 0.0

    @property
    def held_bytes(self) -> int | None:
        """Bytes in the folder, those of other processes as of the last sweep; None before the first and after `forget`."""
        return self._held_bytes

    @property
    def is_off(self) -> bool:
        return time.monotonic() < self._off_until_s

    def read(self, name: str, ranges: Sequence[Range]) -> list[bytes | None]:
        """The bytes of each range that one extent contains, None for the others."""
        answers: list[bytes | None] = [b"" if start == end else None for start, end in ranges]
        self._read_known(name, ranges, answers)
        if None in answers and self._load(name):
            self._read_known(name, ranges, answers)
        with self._lock:
            for (start, end), data in zip(ranges, answers, strict=True):
                if start != end:
                    self._count(end - start, data is not None)
        return answers

    def read_whole(self, name: str) -> tuple[bytes, str] | None:
        """(bytes, etag) of an object that is here as a whole, else None."""
        for _ in range(2):
            extent = self._whole(name)
            if extent is None:
                break
            data = self._read_group(name, [(extent, extent.start, extent.end)])
            if data is not None:
                with self._lock:
                    self._count(len(data[0]), True)
                return data[0], extent.file.etag or ""
        return None

    def path_of(self, name: str) -> str | None:
        """The file that begins with the whole object, verified, or None."""
        extent = self._whole(name)
        if extent is None or (0 in extent.verified and self._read_group(name, [(extent, extent.start, extent.end)]) is None):
            return None
        if not os.path.exists(extent.file.path):
            self._drop(name, extent.file, unlink=False)
            return None
        self._note_hit(extent.file)
        return extent.file.path

    def write(self, name: str, pieces: Iterable[tuple[int, Buffer]], etag: str | None = None) -> None:
        """Keep (start, bytes) pieces of an object; with an etag the one piece is the whole object. Never raises OSError."""
        runs = _runs(pieces)
        n_bytes = sum(end - start for start, end, _ in runs)
        if not runs or n_bytes > self.max_file_bytes or self.is_off:
            with self._lock:
                self.stats.skipped += bool(runs)
            return
        rows = [_ExtentRow(start, end, _checksums(parts)) for start, end, parts in runs]
        try:
            file = self._write_file(name, _Table(etag, rows), [part for _, _, parts in runs for part in parts])
        except OSError:
            with self._lock:
                self.stats.write_errors += 1
                self._off_until_s = time.monotonic() + _OFF_S
            return
        self._enter(name, file, rows, is_verified=True)
        with self._lock:
            self.stats.written_bytes += file.cost_bytes
            self._since_sweep_bytes += file.cost_bytes
            if self._held_bytes is not None:
                self._held_bytes += file.cost_bytes
            held = self._held_bytes
            must_sweep = held is None or held > self._budget_bytes or self._since_sweep_bytes > self._budget_bytes * _SWEEP_SHARE
        if must_sweep:
            self.sweep()

    def forget(self, names: Iterable[str] = (), *, folder: str | None = None) -> None:
        """Drop objects by name, or all of a folder ('' is everything): generations that are dead."""
        with self._lock:
            names = list(names)
            dead = [name for name in self._known if folder is not None and name.startswith(folder)]
            for name in [*dead, *names]:
                self._known.pop(name, None)
        for name in names:
            for path in _files_of(os.path.join(self._objects, name)):
                _unlink(path)
        if folder is not None:
            shutil.rmtree(os.path.join(self._objects, folder), ignore_errors=True)
        self._held_bytes = None

    def sweep(self) -> None:
        """Evict down to nine tenths of the budget if it is exceeded, and remove what killed writers left. One process at a time."""
        with contextlib.suppress(OSError), _try_lock(os.path.join(self._folder, "sweep.lock")) as is_mine:
            if not is_mine:
                return
            files = sorted(self._survey())
            held_bytes = sum(cost_bytes for _, _, cost_bytes, _ in files)
            if held_bytes > self._budget_bytes:
                held_bytes = self._evict(files, held_bytes)
            with self._lock:
                self._held_bytes = held_bytes
                self._since_sweep_bytes = 0

    def _survey(self) -> Iterator[tuple[bool, int, int, str]]:
        """(protected, modified, cost, path) of every file."""
        oldest_s = time.time() - _STALE_S
        for folder, _, names in os.walk(self._objects, topdown=False):
            with contextlib.suppress(OSError):  # rmdir fails unless the folder is empty
                if os.stat(folder).st_mtime < oldest_s:
                    os.rmdir(folder)
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path)
                    yield bool(status.st_mode & stat.S_IXUSR), status.st_mtime_ns, _cost(status.st_size), path
        for path in _files_of(self._stage, mark=""):
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_mtime < oldest_s:
                    os.unlink(path)

    def _evict(self, files: list[tuple[bool, int, int, str]], held_bytes: int) -> int:
        goal_bytes = int(self._budget_bytes * _LOW_WATER)
        gone: set[str] = set()
        for _, _, cost_bytes, path in files:
            if held_bytes <= goal_bytes:
                break
            _unlink(path)
            gone.add(path)
            held_bytes -= cost_bytes
            with self._lock:
                self.stats.evicted_bytes += cost_bytes
        self._demote([file for file in files if file[0] and file[3] not in gone])
        with self._lock:
            for name, known in self._known.items():
                for file in [file for path, file in known.files.items() if path in gone]:
                    self._remember(name, [extent for extent in known.extents if extent.file is file])
                    known.drop(file)
        return held_bytes

    def _remember(self, name: str, evicted: Iterable[_Extent]) -> None:
        """Ghosts of as many bytes as the budget, the latest: a scan larger than the budget never meets its own."""
        for extent in evicted:
            n_bytes = extent.end - extent.start
            self._ghost_bytes += n_bytes - self._ghosts.pop(hash((name, extent.start, extent.end)), 0)
            self._ghosts[hash((name, extent.start, extent.end))] = n_bytes
        while self._ghost_bytes > self._budget_bytes:
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]

    def _was_evicted_too_soon(self, name: str, rows: Sequence[_ExtentRow]) -> bool:
        """Whether at least half of these bytes were evicted lately. They are ghosts no more."""
        with self._lock:
            found_bytes = sum(self._ghosts.pop(hash((name, row.start, row.end)), 0) for row in rows)
            self._ghost_bytes -= found_bytes
        return 2 * found_bytes >= sum(row.end - row.start for row in rows)

    def _demote(self, protected: list[tuple[bool, int, int, str]]) -> None:
        """Put the longest unused protected files back on probation, where their age makes them the next to go."""
        surplus_bytes = sum(file[2] for file in protected) - self._budget_bytes * _PROTECTED_SHARE
        for _, _, cost_bytes, path in protected:
            if surplus_bytes <= 0:
                return
            surplus_bytes -= cost_bytes
            with contextlib.suppress(OSError):
                os.chmod(path, _ON_PROBATION)

    def _read_known(self, name: str, ranges: Sequence[Range], answers: list[bytes | None]) -> None:
        """Fill the answers that known extents hold, one open file for all ranges that lie in it."""
        groups: dict[str, list[tuple[int, _Extent]]] = {}
        with self._lock:
            known = self._known.get(name)
            if known is None:
                return
            for at, (start, end) in enumerate(ranges):
                extent = known.covering(start, end) if answers[at] is None else None
                if extent is not None:
                    groups.setdefault(extent.file.path, []).append((at, extent))
        for group in groups.values():
            found = self._read_group(name, [(extent, *ranges[at]) for at, extent in group])
            for (at, _), data in zip(group, found or [], strict=False):
                answers[at] = data

    def _read_group(self, name: str, wanted: Sequence[tuple[_Extent, int, int]]) -> list[bytes] | None:
        """The bytes of ranges that lie in extents of one file. None, and the file is dropped, if it is gone or bad."""
        file = wanted[0][0].file
        try:
            descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._drop(name, file, unlink=False)
            return None
        try:
            found = [_read_verified(descriptor, *one) for one in wanted]
        except (OSError, ValueError):
            with self._lock:
                self.stats.bad_files += 1
            self._drop(name, file, unlink=True)
            return None
        finally:
            os.close(descriptor)
        self._note_hit(file)
        return found

    def _note_hit(self, file: _File) -> None:
        """Protect the file and move it to the end of the queue. A sweep of another process may have undone the first."""
        now_s = time.monotonic()
        if now_s < file.touched_s + self._touch_interval_s:
            return
        file.touched_s = now_s
        with contextlib.suppress(OSError):
            os.chmod(file.path, _PROTECTED)
            os.utime(file.path)

    def _whole(self, name: str) -> _Extent | None:
        with self._lock:
            known = self._known.get(name)
            extent = known.whole() if known else None
        if extent is None and self._load(name):
            with self._lock:
                extent = self._known[name].whole() if name in self._known else None
        return extent

    def _load(self, name: str) -> bool:
        """Take in the files of an object that other processes, or earlier ones, wrote. True if there was anything new."""
        folder = os.path.join(self._objects, name)
        try:
            modified_ns = os.stat(folder).st_mtime_ns
        except OSError:
            return False
        with self._lock:
            known = self._known.setdefault(name, _Known())
            if known.folder_modified_ns == modified_ns:
                return False
            known.folder_modified_ns = modified_ns
            strangers = [path for path in _files_of(folder) if path not in known.files]
        for path in strangers:
            try:
                table, file = _read_table(path)
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                with self._lock:
                    self.stats.bad_files += 1
                _unlink(path)
                continue
            self._enter(name, file, table.extents, is_verified=False)
        return bool(strangers)

    def _enter(self, name: str, file: _File, rows: Sequence[_ExtentRow], *, is_verified: bool) -> None:
        with self._lock:
            known = self._known.setdefault(name, _Known())
            known.files[file.path] = file
            offset = 0
            for row in rows:
                verified = bytearray([is_verified]) * len(row.checksums)
                known.add(_Extent(row.start, row.end, offset, row.checksums, verified, file))
                offset += row.end - row.start
            superfluous = known.pop_superfluous()
            if self._held_bytes is not None:
                self._held_bytes -= sum(old.cost_bytes for old in superfluous)
        for old in superfluous:
            _unlink(old.path)

    def _drop(self, name: str, file: _File, *, unlink: bool) -> None:
        with self._lock:
            if name in self._known:
                self._known[name].drop(file)
        if unlink:
            _unlink(file.path)

    def _write_file(self, name: str, table: _Table, parts: Sequence[Buffer]) -> _File:
        mode = _PROTECTED if self._was_evicted_too_soon(name, table.extents) else _ON_PROBATION
        tail = msgspec.msgpack.encode(table)
        footer = _FOOTER.pack(_MAGIC, len(tail), xxhash.xxh3_64_intdigest(tail))
        unique = f"{os.getpid():x}-{time.time_ns():x}-{next(self._serial):x}"
        staged = os.path.join(self._stage, unique)
        folder = os.path.join(self._objects, name)
        path = os.path.join(folder, f"~{unique}")
        os.makedirs(self._stage, exist_ok=True)
        try:
            with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb", buffering=0) as out:
                for part in (*parts, tail, footer):
                    rest = memoryview(part)
                    while len(rest):
                        rest = rest[out.write(rest) :]
                n_bytes = out.tell()
            _rename_into(staged, path)
        except BaseException:
            _unlink(staged)
            raise
        return _File(path, _cost(n_bytes), table.etag)

    def count_miss(self, n_bytes: int) -> None:
        """A whole object that was not here; its size is known only after it was fetched."""
        with self._lock:
            self._count(n_bytes, False)

    def count_shared(self, n_ranges: int) -> None:
        with self._lock:
            self.stats.shared += n_ranges

    def count_skipped(self) -> None:
        with self._lock:
            self.stats.skipped += 1

    def _count(self, n_bytes: int, is_hit: bool) -> None:
        if is_hit:
            self.stats.hits += 1
            self.stats.hit_bytes += n_bytes
        else:
            self.stats.misses += 1
            self.stats.miss_bytes += n_bytes


def _rename_into(staged: str, path: str) -> None:
    """The folder may vanish under us, when somebody forgets the object or sweeps: make it again."""
    for n_left in (2, 1, 0):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return os.rename(staged, path)
        except FileNotFoundError:
            if n_left == 0:
                raise


def _runs(pieces: Iterable[tuple[int, Buffer]]) -> list[tuple[int, int, list[Buffer]]]:
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


def _checksums(parts: Sequence[Buffer]) -> list[int]:
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


def _read_verified(descriptor: int, extent: _Extent, start: int, end: int) -> bytes:
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


def _read_table(path: str) -> tuple[_Table, _File]:
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
        table = msgspec.msgpack.decode(tail, type=_Table)
    except msgspec.MsgspecError as error:
        raise ValueError("table does not parse") from error
    if sum(row.end - row.start for row in table.extents) != data_bytes:
        raise ValueError("table and file differ in size")
    return table, _File(path, _cost(status.st_size), table.etag)


def _files_of(folder: str, mark: str = "~") -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.name.startswith(mark)]
    except OSError:
        return []


@contextlib.contextmanager
def _try_lock(path: str) -> Iterator[bool]:
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _cost(n_bytes: int) -> int:
    return -(-n_bytes // _CLUSTER_BYTES) * _CLUSTER_BYTES


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
