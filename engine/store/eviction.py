"""Which files of the cache go first, kept in the file system, so that all processes see it.

A segmented LRU: a file enters on probation; the first hit protects it (permission bit u+x) and every later one moves it to the end of the
queue (modification time, at most every `touch_interval_s`). Probation goes first, in order of arrival, so that a scan washes through it
and leaves what is hot; protected files beyond 80 % of the budget go back on probation. What a process evicted lately and fetches again was
evicted too soon and enters protected (the ghosts of 2Q and S3-FIFO); without them a new hot set larger than the probation queue would never
be let in. A file is evicted whole: one hot extent keeps its neighbours, and what is read twice in one scan counts as hot.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from engine.store.extent_file import ExtentRow, cost_of
from engine.store.known_extents import Extent

ON_PROBATION, PROTECTED = 0o600, 0o700
"""Permission bits of a file."""
_PROTECTED_SHARE = 0.8
_STALE_S = 3600.0
"""Age of a staged file whose writer must have died, and of an empty folder."""


class Ghosts:
    """What this process evicted lately, of as many bytes as the budget: a scan larger than the budget never meets its own.

    The caller holds a lock over it.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._ghosts: OrderedDict[int, int] = OrderedDict()  # hash of (name, start, end) -> bytes
        self._ghost_bytes = 0

    def remember(self, name: str, evicted: Iterable[Extent]) -> None:
        for extent in evicted:
            n_bytes = extent.end - extent.start
            self._ghost_bytes += n_bytes - self._ghosts.pop(hash((name, extent.start, extent.end)), 0)
            self._ghosts[hash((name, extent.start, extent.end))] = n_bytes
        while self._ghost_bytes > self._budget_bytes:
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]

    def were_evicted_too_soon(self, name: str, rows: Sequence[ExtentRow]) -> bool:
        """Whether at least half of these bytes were evicted lately. They are ghosts no more."""
        found_bytes = sum(self._ghosts.pop(hash((name, row.start, row.end)), 0) for row in rows)
        self._ghost_bytes -= found_bytes
        return 2 * found_bytes >= sum(row.end - row.start for row in rows)


def survey(objects: str, stage: str) -> Iterator[tuple[bool, int, int, str]]:
    """(protected, modified, cost, path) of every file below `objects`. Empty folders and what killed writers left in `stage` go, an hour old."""
    oldest_s = time.time() - _STALE_S
    for folder, _, names in os.walk(objects, topdown=False):
        with contextlib.suppress(OSError):  # rmdir fails unless the folder is empty
            if os.stat(folder).st_mtime < oldest_s:
                os.rmdir(folder)
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(path)
                yield bool(status.st_mode & stat.S_IXUSR), status.st_mtime_ns, cost_of(status.st_size), path
    for path in files_of(stage, mark=""):
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_mtime < oldest_s:
                os.unlink(path)


def demote(protected: list[tuple[bool, int, int, str]], budget_bytes: int) -> None:
    """Put the longest unused protected files back on probation, where their age makes them the next to go."""
    surplus_bytes = sum(file[2] for file in protected) - budget_bytes * _PROTECTED_SHARE
    for _, _, cost_bytes, path in protected:
        if surplus_bytes <= 0:
            return
        surplus_bytes -= cost_bytes
        with contextlib.suppress(OSError):
            os.chmod(path, ON_PROBATION)


def files_of(folder: str, mark: str = "~") -> list[str]:
    """Paths in a folder whose names begin with the mark; none if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.name.startswith(mark)]
    except OSError:
        return []


@contextlib.contextmanager
def try_lock(path: str) -> Iterator[bool]:
    """Whether this process holds the lock, until the end of the block. Does not wait."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
