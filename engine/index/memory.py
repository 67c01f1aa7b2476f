"""What a process keeps decoded in memory: immutable things by name, within a budget, each loaded once at a time.

Keys name immutable objects (a segment's arrays, a codec, a bitmap), so an entry can be evicted but never be wrong. Not for CURRENT.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

import msgspec
from cachetools import LRUCache

T = TypeVar("T")


class _Entry(msgspec.Struct, frozen=True):
    value: Any
    size_bytes: int


class Memory:
    """Least-recently-used cache of decoded immutable things.

    budget_bytes bounds what is kept, not what is in use: a value larger than the budget is returned and not kept.
    One event loop at a time; concurrent loads of one key share one call.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._entries: LRUCache[Hashable, _Entry] = LRUCache(max(budget_bytes, 1), getsizeof=lambda entry: entry.size_bytes)
        self._loading: dict[Hashable, asyncio.Future[_Entry]] = {}

    @property
    def used_bytes(self) -> int:
        return int(self._entries.currsize)

    def peek(self, key: Hashable) -> Any | None:
        """The value if it is here, without loading it."""
        entry = self._entries.get(key)
        return None if entry is None else entry.value

    async def get(self, key: Hashable, load: Callable[[], Awaitable[tuple[T, int]]]) -> T:
        """The value of `key`; if absent, `load` gives it with its size in bytes. A failed load is not remembered."""
        entry = self._entries.get(key)
        if entry is not None:
            return entry.value
        while (running := self._loading.get(key)) is not None:
            try:
                return (await asyncio.shield(running)).value
            except asyncio.CancelledError:
                if not running.cancelled():
                    raise  # we were cancelled ourselves; otherwise the one who loaded was, and it is our turn
        return await self._load(key, load)

    async def _load(self, key: Hashable, load: Callable[[], Awaitable[tuple[T, int]]]) -> T:
        promise: asyncio.Future[_Entry] = asyncio.get_running_loop().create_future()
        self._loading[key] = promise
        try:
            value, size_bytes = await load()
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                promise.cancel()
            else:
                promise.set_exception(error)
                promise.exception()  # nobody may be waiting; that is no fault
            raise
        finally:
            del self._loading[key]
        entry = _Entry(value, size_bytes)
        promise.set_result(entry)
        if size_bytes <= self.budget_bytes:
            self._entries[key] = entry
        return value

    def keys(self) -> list[Hashable]:
        """What is here."""
        return list(self._entries)

    def forget(self, key: Hashable) -> None:
        self._entries.pop(key, None)
