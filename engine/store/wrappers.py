"""Stores around stores: one counts, one is slow, one fails. Each is an ObjectStore and keeps the promises of base.py.

CountingStore stands around the real store in production too (a search reports its requests, bytes and rounds);
DelayStore and FaultyStore are for tests and benchmarks. None of them changes a byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Literal, TypeVar

import msgspec

from engine.errors import Unavailable
from engine.store.base import Buffer, Listed, Object, ObjectStore, Range

T = TypeVar("T")
Kind = Literal["get", "get_if_changed", "range", "put", "replace", "list", "delete"]
_PAGE = 1000
"""Names per page of an S3 listing, and per bulk delete."""


class Call(msgspec.Struct, frozen=True):
    """One call of a store method. A call of get_ranges is `n_requests` requests, all in flight together."""

    kind: Kind
    name: str
    n_requests: int = 1
    bytes_written: int = 0


class AroundStore:
    """Every method passes to `inner` through one funnel, `_around`, which subclasses override."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner

    async def _around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        return await run()

    async def get(self, name: str) -> Object:
        return await self._around(Call("get", name), lambda: self.inner.get(name))

    async def get_if_changed(self, name: str, etag: str) -> Object | None:
        return await self._around(Call("get_if_changed", name), lambda: self.inner.get_if_changed(name, etag))

    async def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[Buffer]:
        n_requests = sum(start != end for start, end in ranges)
        return await self._around(Call("range", name, n_requests), lambda: self.inner.get_ranges(name, ranges))

    async def put_if_absent(self, name: str, data: Buffer) -> str:
        return await self._around(Call("put", name, bytes_written=len(data)), lambda: self.inner.put_if_absent(name, data))

    async def replace_if_unchanged(self, name: str, data: Buffer, etag: str) -> str:
        call = Call("replace", name, bytes_written=len(data))
        return await self._around(call, lambda: self.inner.replace_if_unchanged(name, data, etag))

    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[Listed]:
        async for line in self._pages(prefix, self.inner.list(prefix, after=after)):
            yield line

    async def list_folders(self, prefix: str) -> AsyncIterator[str]:
        async for folder in self._pages(prefix, self.inner.list_folders(prefix)):
            yield folder

    async def _pages(self, prefix: str, lines: AsyncIterator[T]) -> AsyncIterator[T]:
        """One pass through the funnel per page, before the page's first line."""
        await self._around(Call("list", prefix), _nothing)
        n_lines = 0
        async for line in lines:
            if n_lines and n_lines % _PAGE == 0:
                await self._around(Call("list", prefix), _nothing)
            n_lines += 1
            yield line

    async def delete(self, names: Sequence[str]) -> None:
        call = Call("delete", names[0] if names else "", -(-len(names) // _PAGE))
        await self._around(call, lambda: self.inner.delete(names))

    async def local_path(self, name: str) -> str | None:
        return await self.inner.local_path(name)


async def _nothing() -> None:
    return None


def _bytes_in(answer: object) -> int:
    if isinstance(answer, Object):
        return len(answer.data)
    if isinstance(answer, list):
        return sum(map(len, answer))
    return 0


class Cost(msgspec.Struct):
    """What was asked of a store during a window. Plain numbers once the window is closed.

    `rounds` is the length of the longest chain of calls in which each began after the one before had ended; it is the
    fewest sets that the calls can be put into so that no call of a set began after another of the same set had ended.
    A clock cannot see dependence: two independent searches one after another in a window make two rounds, so the number is
    never below the dependent rounds, and equals them where the window is one search over one segment.
    """

    requests: Counter[str] = msgspec.field(default_factory=Counter)
    bytes_read: int = 0
    bytes_written: int = 0
    rounds: int = 0
    _ended_rounds: int = 0

    @property
    def n_requests(self) -> int:
        return self.requests.total()

    def _begin(self, call: Call) -> int:
        self.requests[call.kind] += call.n_requests
        self.bytes_written += call.bytes_written
        chain = self._ended_rounds + 1
        self.rounds = max(self.rounds, chain)
        return chain

    def _end(self, chain: int, bytes_read: int) -> None:
        self.bytes_read += bytes_read
        self._ended_rounds = max(self._ended_rounds, chain)


_windows: ContextVar[tuple[tuple[CountingStore, Cost], ...]] = ContextVar("counting_windows", default=())


class CountingStore(AroundStore):
    """Counts requests, bytes and rounds, in total and per window.

    Put it beneath the cache to count what is paid for. Requests that failed count as well; retries inside the store do not
    show. Windows follow the context: tasks and threads started inside a window add to it, other searches do not.
    """

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.total = Cost()

    @contextlib.contextmanager
    def window(self) -> Iterator[Cost]:
        """Counts what this context and the tasks born in it ask from here on; windows may nest."""
        cost = Cost()
        token = _windows.set((*_windows.get(), (self, cost)))
        try:
            yield cost
        finally:
            _windows.reset(token)

    async def _around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        if call.n_requests == 0:
            return await run()
        costs = [self.total, *(cost for store, cost in _windows.get() if store is self)]
        chains = [cost._begin(call) for cost in costs]
        # One turn of the loop, so that calls gathered together have all begun before a store that never waits ends the first.
        await asyncio.sleep(0)
        bytes_read = 0
        try:
            answer = await run()
            bytes_read = _bytes_in(answer)
            return answer
        finally:
            for cost, chain in zip(costs, chains, strict=True):
                cost._end(chain, bytes_read)


class DelayStore(AroundStore):
    """As slow as an object store: each request waits for its first byte, then for its bytes, on one of `max_in_flight` connections.

    First-byte latencies are lognormal through p50 and p99 (defaults: S3 standard from within the region, as published
    measurements put it), drawn from `seed`; equal p50 and p99 make every request equally slow.
    """

    def __init__(
        self,
        inner: ObjectStore,
        *,
        p50_s: float = 0.025,
        p99_s: float = 0.1,
        bytes_per_s: float = 80e6,
        max_in_flight: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(inner)
        self._mu = math.log(p50_s)
        self._sigma = math.log(p99_s / p50_s) / 2.3263478740408408  # the normal distribution's 99 % quantile
        self._bytes_per_s = bytes_per_s
        self._max_in_flight = max_in_flight
        self._random = random.Random(seed)

    def first_byte_s(self) -> float:
        return self._random.lognormvariate(self._mu, self._sigma)

    async def _around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        answer = await run()
        sizes = [len(part) for part in answer if len(part)] if isinstance(answer, list) else [_bytes_in(answer) + call.bytes_written]
        if call.n_requests:
            waits = [self.first_byte_s() + size / self._bytes_per_s for size in sizes]
            await asyncio.sleep(_makespan(waits, self._max_in_flight))
        return answer


def _makespan(durations_s: Iterable[float], n_slots: int) -> float:
    """Seconds until all are done if each takes the slot that is free first."""
    free_at: list[float] = []
    for duration_s in durations_s:
        begin = heapq.heappop(free_at) if len(free_at) == n_slots else 0.0
        heapq.heappush(free_at, begin + duration_s)
    return max(free_at, default=0.0)


Fault = Literal["unavailable", "throttled", "lost", "stop", "stop-after", "hang"]


class WorldStopped(BaseException):
    """The process was killed here. Not an Exception, so that no handler mistakes it for something to recover from."""


class FaultyStore(AroundStore):
    """Fails on schedule.

    `schedule` gives the fault of the n-th call, counted from 1, or decides by the call itself:

    unavailable  raises Unavailable; nothing happened
    throttled    the same, as a store that asks for less
    lost         takes effect, then raises Unavailable: a lost answer that the store's own read-back did not settle
    stop         raises WorldStopped, now and at every later call: killed before the call
    stop-after   takes effect, then the same: killed before the answer came
    hang         never answers

    `calls` is the log, for 'stop the world at each call in turn': run once without faults, then once for each length.
    """

    def __init__(self, inner: ObjectStore, schedule: Mapping[int, Fault] | Callable[[Call], Fault | None] | None = None) -> None:
        super().__init__(inner)
        self._schedule = schedule or {}
        self.calls: list[Call] = []
        self.stopped = False

    def _fault_of(self, call: Call) -> Fault | None:
        if isinstance(self._schedule, Mapping):
            return self._schedule.get(len(self.calls))
        return self._schedule(call)

    async def _around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        if self.stopped:
            raise WorldStopped
        self.calls.append(call)
        fault = self._fault_of(call)
        if fault is None:
            return await run()
        if fault == "hang":
            await asyncio.Event().wait()
        if fault in ("lost", "stop-after"):
            await run()
        if fault in ("stop", "stop-after"):
            self.stopped = True
            raise WorldStopped
        message = "the store asks for less" if fault == "throttled" else "the store does not answer"
        raise Unavailable(message, name=call.name, call=len(self.calls), fault=fault)
