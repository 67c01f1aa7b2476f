"""Pieces of immutable objects in files of a directory, under a budget: the disk half of the cache. Synchronous, thread-safe.

CachedStore calls it from threads; it knows no store. Several processes may share one directory: files appear by rename
under fresh names, are never changed, and may vanish at any time; whoever misses one asks the store again.

    {folder}/objects/{name}/~{unique}      extents of an object (extent_file.py)
    {folder}/stage/                        files being written
    {folder}/sweep.lock                    held by the process that evicts (eviction.py)

'~' occurs in no object name (base.check_name).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.store.base import Buffer, Range
from engine.store.eviction import ON_PROBATION, PROTECTED, Ghosts, demote, files_of, survey, try_lock
from engine.store.extent_file import ExtentRow, Table, checksums_of, read_table, read_verified, remove, runs_of, write_file
from engine.store.known_extents import Extent, File, Known

_LOW_WATER = 0.9
"""A sweep empties down to this share of the budget, so that sweeps are rare."""
_SWEEP_SHARE = 1 / 16
"""A process looks at the whole directory after writing this share of the budget: the others write, too."""
_OFF_S = 60.0
"""How long writing is off after the disk refused a write."""


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
        self._known: dict[str, Known] = {}
        self._lock = threading.Lock()  # over _known, _ghosts, stats and the two sums; never held while a file is read or written
        self._ghosts = Ghosts(budget_bytes)
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
        runs = runs_of(pieces)
        n_bytes = sum(end - start for start, end, _ in runs)
        if not runs or n_bytes > self.max_file_bytes or self.is_off:
            with self._lock:
                self.stats.skipped += bool(runs)
            return
        rows = [ExtentRow(start, end, checksums_of(parts)) for start, end, parts in runs]
        try:
            file = self._write(name, Table(etag, rows), [part for _, _, parts in runs for part in parts])
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
            for path in files_of(os.path.join(self._objects, name)):
                remove(path)
        if folder is not None:
            shutil.rmtree(os.path.join(self._objects, folder), ignore_errors=True)
        self._held_bytes = None

    def sweep(self) -> None:
        """Evict down to nine tenths of the budget if it is exceeded, and remove what killed writers left. One process at a time."""
        with contextlib.suppress(OSError), try_lock(os.path.join(self._folder, "sweep.lock")) as is_mine:
            if not is_mine:
                return
            files = sorted(survey(self._objects, self._stage))
            held_bytes = sum(cost_bytes for _, _, cost_bytes, _ in files)
            if held_bytes > self._budget_bytes:
                held_bytes = self._evict(files, held_bytes)
            with self._lock:
                self._held_bytes = held_bytes
                self._since_sweep_bytes = 0

    def _evict(self, files: list[tuple[bool, int, int, str]], held_bytes: int) -> int:
        goal_bytes = int(self._budget_bytes * _LOW_WATER)
        gone: set[str] = set()
        for _, _, cost_bytes, path in files:
            if held_bytes <= goal_bytes:
                break
            remove(path)
            gone.add(path)
            held_bytes -= cost_bytes
            with self._lock:
                self.stats.evicted_bytes += cost_bytes
        demote([file for file in files if file[0] and file[3] not in gone], self._budget_bytes)
        with self._lock:
            for name, known in self._known.items():
                for file in [file for path, file in known.files.items() if path in gone]:
                    self._ghosts.remember(name, [extent for extent in known.extents if extent.file is file])
                    known.drop(file)
        return held_bytes

    def _read_known(self, name: str, ranges: Sequence[Range], answers: list[bytes | None]) -> None:
        """Fill the answers that known extents hold, one open file for all ranges that lie in it."""
        groups: dict[str, list[tuple[int, Extent]]] = {}
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

    def _read_group(self, name: str, wanted: Sequence[tuple[Extent, int, int]]) -> list[bytes] | None:
        """The bytes of ranges that lie in extents of one file. None, and the file is dropped, if it is gone or bad."""
        file = wanted[0][0].file
        try:
            descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._drop(name, file, unlink=False)
            return None
        try:
            found = [read_verified(descriptor, *one) for one in wanted]
        except (OSError, ValueError):
            with self._lock:
                self.stats.bad_files += 1
            self._drop(name, file, unlink=True)
            return None
        finally:
            os.close(descriptor)
        self._note_hit(file)
        return found

    def _note_hit(self, file: File) -> None:
        """Protect the file and move it to the end of the queue. A sweep of another process may have undone the first."""
        now_s = time.monotonic()
        if now_s < file.touched_s + self._touch_interval_s:
            return
        file.touched_s = now_s
        with contextlib.suppress(OSError):
            os.chmod(file.path, PROTECTED)
            os.utime(file.path)

    def _whole(self, name: str) -> Extent | None:
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
            known = self._known.setdefault(name, Known())
            if known.folder_modified_ns == modified_ns:
                return False
            known.folder_modified_ns = modified_ns
            strangers = [path for path in files_of(folder) if path not in known.files]
        for path in strangers:
            try:
                table, file = read_table(path)
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                with self._lock:
                    self.stats.bad_files += 1
                remove(path)
                continue
            self._enter(name, file, table.extents, is_verified=False)
        return bool(strangers)

    def _enter(self, name: str, file: File, rows: Sequence[ExtentRow], *, is_verified: bool) -> None:
        with self._lock:
            known = self._known.setdefault(name, Known())
            known.files[file.path] = file
            offset = 0
            for row in rows:
                verified = bytearray([is_verified]) * len(row.checksums)
                known.add(Extent(row.start, row.end, offset, row.checksums, verified, file))
                offset += row.end - row.start
            superfluous = known.pop_superfluous()
            if self._held_bytes is not None:
                self._held_bytes -= sum(old.cost_bytes for old in superfluous)
        for old in superfluous:
            remove(old.path)

    def _drop(self, name: str, file: File, *, unlink: bool) -> None:
        with self._lock:
            if name in self._known:
                self._known[name].drop(file)
        if unlink:
            remove(file.path)

    def _write(self, name: str, table: Table, parts: Sequence[Buffer]) -> File:
        """A new file of an object; protected from the start if what it holds was evicted too soon."""
        with self._lock:
            mode = PROTECTED if self._ghosts.were_evicted_too_soon(name, table.extents) else ON_PROBATION
        unique = f"{os.getpid():x}-{time.time_ns():x}-{next(self._serial):x}"
        return write_file(os.path.join(self._stage, unique), os.path.join(self._objects, name, f"~{unique}"), table, parts, mode)

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
