"""A store with a cache on local disk before it, for objects that never change. extents.py keeps the bytes; this asks for them.

What may be kept is decided by name: `cacheable` says yes only to names that never come back with other bytes. In Tartan
those are the names that contain a ULID; CURRENT changes, pins and markers come and go, and manifests/{generation} comes
back when an index is deleted and made again. One directory belongs to one store: names do not say which bucket they are of.

A hit is one call into a thread and one file opened, no request and no directory scan. A miss goes to the inner store;
requests of one event loop for the same missing range share one GET. What was fetched is written to the directory in the
background, and until it lies there it is answered from memory. If the directory cannot be written (full, read-only),
everything still works from the inner store.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from engine.store.base import Buffer, Object, ObjectStore, Range, check_folder, check_name
from engine.store.extents import CacheStats, ExtentCache
from engine.store.wrappers import AroundStore

T = TypeVar("T")
_N_THREADS = 8
_Part = tuple["asyncio.Task[list[Buffer]]", int]
"""A request under way for several ranges of an object, and which of its answers is meant."""


class _Flights:
    """Requests under way on one event loop."""

    def __init__(self) -> None:
        self.ranges: dict[tuple[str, int, int], _Part] = {}
        self.wholes: dict[str, asyncio.Task[Object]] = {}
        self.tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task of its own: if the caller is cancelled, others that wait for the same bytes still get them."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even if every caller has been cancelled


class CachedStore(AroundStore):
    """`inner` with a cache of at most about `budget_bytes` in `folder` before it.

    `stats` counts hits and misses; `is_off` tells that the directory cannot be written at present. Writes and deletes pass
    through; deleting also forgets. A deleted object may still be answered elsewhere: that is why only immutable names are kept.
    """

    def __init__(
        self,
        inner: ObjectStore,
        folder: str,
        *,
        budget_bytes: int,
        cacheable: Callable[[str], bool],
        max_pending_bytes: int = 64 << 20,
        touch_interval_s: float = 30.0,
    ) -> None:
        super().__init__(inner)
        self._extents = ExtentCache(folder, budget_bytes, touch_interval_s=touch_interval_s)
        self._cacheable = cacheable
        self._max_pending_bytes = max_pending_bytes
        self._pending_bytes = 0
        self._threads = ThreadPoolExecutor(_N_THREADS, thread_name_prefix="tartan-cache")
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Flights] = weakref.WeakKeyDictionary()

    @property
    def stats(self) -> CacheStats:
        return self._extents.stats

    @property
    def held_bytes(self) -> int | None:
        """Bytes in the folder as this process knows; None before it has looked."""
        return self._extents.held_bytes

    @property
    def is_off(self) -> bool:
        return self._extents.is_off

    async def get(self, name: str) -> Object:
        if not self._cacheable(name):
            return await self.inner.get(name)
        kept = await self._run(partial(self._extents.read_whole, check_name(name)))
        if kept is not None:
            return Object(*kept)
        flights = self._flights()
        task = flights.wholes.get(name)
        if task is None:
            task = flights.wholes[name] = flights.start(self._fetch_whole(name, flights))
        else:
            self._extents.count_shared(1)
        found = await asyncio.shield(task)
        self._extents.count_miss(len(found.data))
        return found

    async def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[Buffer]:
        """Of several ranges only the missing ones are asked for, in one call of the inner store."""
        if not self._cacheable(name):
            return await self.inner.get_ranges(name, ranges)
        kept = await self._run(partial(self._extents.read, check_name(name), ranges))
        missing = list(dict.fromkeys(wanted for wanted, data in zip(ranges, kept, strict=True) if data is None))
        if not missing:
            return [data for data in kept if data is not None]
        fetched = dict(zip(missing, await self._fetch(name, missing), strict=True))
        return [fetched[wanted] if data is None else data for wanted, data in zip(ranges, kept, strict=True)]

    async def delete(self, names: Sequence[str]) -> None:
        await self.inner.delete(names)
        await self.forget(names)

    async def forget(self, names: Sequence[str] = (), *, folder: str | None = None) -> None:
        """Drop what is kept of these objects, or of all objects of a folder ('' or ending in a slash); no request."""
        checked = [check_name(name) for name in names]
        await self._run(partial(self._extents.forget, checked, folder=None if folder is None else check_folder(folder)))

    async def local_path(self, name: str) -> str | None:
        """The inner store's own file if it has one, else the cache's if the whole object is here (after `get`); the file is longer."""
        path = await self.inner.local_path(name)
        if path is None and self._cacheable(name):
            path = await self._run(partial(self._extents.path_of, check_name(name)))
        return path

    async def settle(self) -> None:
        """Wait until what was fetched on this event loop has been written: before the process ends, and in tests."""
        flights = self._flights()
        while flights.tasks:
            await asyncio.wait(set(flights.tasks))

    async def _fetch(self, name: str, missing: Sequence[Range]) -> list[Buffer]:
        flights = self._flights()
        mine = [wanted for wanted in missing if (name, *wanted) not in flights.ranges]
        self._extents.count_shared(len(missing) - len(mine))
        if mine:
            task = flights.start(self._fetch_ranges(name, mine, flights))
            for at, wanted in enumerate(mine):
                flights.ranges[name, *wanted] = (task, at)
        parts = [flights.ranges[name, *wanted] for wanted in missing]
        return [(await asyncio.shield(task))[at] for task, at in parts]

    async def _fetch_ranges(self, name: str, ranges: Sequence[Range], flights: _Flights) -> list[Buffer]:
        def land() -> None:
            for wanted in ranges:
                del flights.ranges[name, *wanted]

        try:
            found = await self.inner.get_ranges(name, ranges)
        except BaseException:
            land()
            raise
        pieces = [(start, data) for (start, _), data in zip(ranges, found, strict=True)]
        self._keep(name, pieces, None, flights, land)
        return found

    async def _fetch_whole(self, name: str, flights: _Flights) -> Object:
        def land() -> None:
            del flights.wholes[name]

        try:
            found = await self.inner.get(name)
        except BaseException:
            land()
            raise
        self._keep(name, [(0, found.data)], found.etag, flights, land)
        return found

    def _keep(self, name: str, pieces: Sequence[tuple[int, Buffer]], etag: str | None, flights: _Flights, land: Callable[[], None]) -> None:
        """Write in the background; `land` takes the flight off the board once the bytes can be found in the directory."""
        n_bytes = sum(len(data) for _, data in pieces)
        if self._pending_bytes + n_bytes > max(self._max_pending_bytes, n_bytes):
            self._extents.count_skipped()
            land()
            return
        self._pending_bytes += n_bytes

        def written(task: asyncio.Task[None]) -> None:
            self._pending_bytes -= n_bytes
            land()

        flights.start(self._run(partial(self._extents.write, name, pieces, etag))).add_done_callback(written)

    def _flights(self) -> _Flights:
        loop = asyncio.get_running_loop()
        flights = self._loops.get(loop)
        if flights is None:
            flights = self._loops[loop] = _Flights()
        return flights

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
