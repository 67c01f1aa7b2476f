"""What keeps one process from being overrun: places to work in, bytes of bodies held at once, and requests per client.

Excess requests wait for a bounded time, in a bounded number, and then get 503 with Retry-After; a client that is too fast gets 429. State
belongs to one process and one event loop at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from litestar import Request

from handler.problems import RATE_LIMIT_RETRY_S, Problem, unavailable
from handler.runtime import Runtime
from handler.threads import Threads

BUSY = "the server is busy: too many requests are at work"
RETRY_S = 2.0
COMPUTING = frozenset(("search", "metadata", "shard"))
"""Groups whose requests are arithmetic on the threads, so that more of them at once are not faster, only later. The others wait for the store."""
FIRST_PER_THREAD = 4
"""Places of such a group for each thread, to begin with."""
QUEUE_PER_THREAD = 12
"""Requests of such a group that may wait, for each thread, by default: on two cores 32 clients wait for each other, and nobody is refused."""
MAX_WAITING_SHARE = 0.25
"""Of the threads: with more tasks than that waiting, on average, there is no room for more, and in an overrun a place too many."""
LOOK_S = 0.05
GROW, LEAST_GROWTH, SHRINK = 1.1, 0.25, 0.75
FORGET_S = 1.0
"""How long after the last wait the number of places is forgotten."""
MAX_CLIENTS = 10_000
"""Clients whose tokens are remembered; the one not seen for longest is forgotten, which can only be in its favour."""


class Budget:
    """A number of units that requests take and give back, first come first served, so a large request is never starved."""

    def __init__(self, n_units: int) -> None:
        self.n_units = n_units
        self.n_free = n_units
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, n: int, wait_s: float) -> None:
        """Take `n` units (at most all there are). Problem SERVICE_UNAVAILABLE if they do not come free within `wait_s`."""
        if not self._waiting and self.n_free >= n:
            self.n_free -= n
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (n, turn)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(wait_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.give(n)  # the units came in the moment that we gave up
            else:
                self._waiting.remove(entry)
                self._serve()
            if isinstance(error, TimeoutError):
                raise unavailable(BUSY, RETRY_S) from None
            raise

    def give(self, n: int) -> None:
        self.n_free += n
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self.n_free >= self._waiting[0][0]:
            n, turn = self._waiting.popleft()
            self.n_free -= n
            if turn.cancelled():
                self.n_free += n
            else:
                turn.set_result(None)


class Places:
    """Places for requests that compute: at first a few for each thread, more while requests wait and threads are free, because those at work wait
    for the store. Who waits is served in order.

    A full queue is an overrun: to go on would make everybody late. So all who wait are refused, and nobody waits any more: who finds no place is
    refused at once. Places become as few as it takes for what has one to be served nearly as fast as alone: fewer while work waits for a thread,
    for the interpreter or for a core, more while it does not. It is over when the requests that would be waiting, had none been refused, would
    have been served.
    """

    def __init__(self, threads: Threads, n_most: int, max_waiting: int) -> None:
        self.n_most, self._threads, self._max_waiting = n_most, threads, max_waiting
        self.n_places = self._n_first = float(min(FIRST_PER_THREAD * threads.n_threads, n_most))
        self.n_taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._backlog = 0
        """In an overrun: how many would be waiting if nobody had been refused, up to a full queue. 0 when there is none."""
        self._has_waited, self._waited_s = False, float("-inf")
        self._looked = (0.0, 0.0)
        self._looking: asyncio.AbstractEventLoop | None = None
        """The loop in which `_look` is due; one of the past may have been closed before."""

    async def take(self, wait_s: float) -> None:
        """Take a place. Problem SERVICE_UNAVAILABLE if there is no place within `wait_s`, or too many came later."""
        if not self._waiting and self.n_taken < int(self.n_places):
            self.n_taken += 1
            return
        self.refuse_in_overrun()
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        if self._looking is not loop:
            self._begin_to_look(loop)
        self._waiting.append(turn)
        self._has_waited = True
        if len(self._waiting) > self._max_waiting:
            self._overrun()
        try:
            async with asyncio.timeout(wait_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give()  # the place came in the moment that we gave up
            elif turn in self._waiting:
                self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise unavailable(BUSY, RETRY_S) from None
            raise

    def refuse_in_overrun(self) -> None:
        """Problem SERVICE_UNAVAILABLE if nobody may wait and there is no place now."""
        if self._backlog and self.n_taken >= int(self.n_places):
            self._backlog = min(self._backlog + 1, self._max_waiting)
            self._has_waited = True
            raise unavailable(BUSY, RETRY_S)

    def give(self) -> None:
        self.n_taken -= 1
        if self._backlog:
            self._backlog -= 1
            if not self._backlog:
                self.n_places = max(self.n_places, self._n_first)
        self._serve()

    def _overrun(self) -> None:
        self._backlog = self._max_waiting
        self.n_places = min(self.n_places, float(self._threads.n_threads))
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(unavailable(BUSY, RETRY_S))

    def _serve(self) -> None:
        while self._waiting and self.n_taken < int(self.n_places):
            turn = self._waiting.popleft()
            if not turn.done():
                self.n_taken += 1
                turn.set_result(None)

    def _begin_to_look(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = time.monotonic()
        if now_s > self._waited_s + FORGET_S:
            self.n_places = self._n_first
        self._looked, self._looking = (now_s, self._threads.waited_s()), loop
        loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        """More places or fewer; again and again while anybody waits."""
        if not self._has_waited:
            self._looking = None
            return
        then_s, before_s = self._looked
        self._looked = now_s, waited_s = time.monotonic(), self._threads.waited_s()
        self._waited_s, self._has_waited = now_s, bool(self._waiting)
        n_waiting_tasks = (waited_s - before_s) / (now_s - then_s)
        if n_waiting_tasks > MAX_WAITING_SHARE * self._threads.n_threads:
            self.n_places = max(1.0, self.n_places * SHRINK) if self._backlog else self.n_places
        else:
            self.n_places = min(float(self.n_most), max(self.n_places * GROW, self.n_places + LEAST_GROWTH))
        self._serve()
        asyncio.get_running_loop().call_later(LOOK_S, self._look)


class Limits:
    """The limits of one process."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._settings = runtime, runtime.settings
        self._places: dict[str, Budget] = {}
        self._computing: dict[str, Places] = {}
        self._bodies = Budget(runtime.settings.max_bodies_bytes)
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def refuse_in_overrun(self, group: str | None) -> None:
        """Problem SERVICE_UNAVAILABLE if `place` would raise it at once: before anything is done for the request, its body read included."""
        if group in self._computing:
            self._computing[group].refuse_in_overrun()

    @asynccontextmanager
    async def place(self, group: str | None) -> AsyncIterator[None]:
        """Hold one of the group's places while the block runs."""
        if group is None:
            yield
            return
        if group in COMPUTING:
            async with self._place_to_compute(group):
                yield
            return
        places = self._places.get(group)
        if places is None:
            places = self._places[group] = Budget(self._settings.concurrency_limit)
        await places.take(1, self._settings.queue_wait_s)
        try:
            yield
        finally:
            places.give(1)

    @asynccontextmanager
    async def _place_to_compute(self, group: str) -> AsyncIterator[None]:
        places = self._computing.get(group)
        if places is None:
            threads, settings = self._runtime.executor, self._settings
            max_waiting = settings.queue_limit or QUEUE_PER_THREAD * threads.n_threads
            places = self._computing[group] = Places(threads, settings.concurrency_limit, max_waiting)
        await places.take(self._settings.queue_wait_s)
        try:
            yield
        finally:
            places.give()

    @asynccontextmanager
    async def body(self, request: Request[Any, Any, Any], max_bytes: int) -> AsyncIterator[bytes]:
        """The request's body, counted against the bytes held at once while the block runs. Problem PAYLOAD_TOO_LARGE beyond `max_bytes`."""
        declared = _declared_bytes(request.headers.get("content-length", ""))
        if declared is not None and declared > max_bytes:
            raise _too_large(max_bytes)
        n_reserved = min(max_bytes if declared is None else declared, self._bodies.n_units)
        await self._bodies.take(n_reserved, self._settings.queue_wait_s)
        try:
            yield await _read(request, max_bytes)
        finally:
            self._bodies.give(n_reserved)

    def spend(self, client: str) -> None:
        """One request of a client. Problem RATE_LIMITED if it has none left."""
        if not self._settings.rate_limit_enabled:
            return
        now_s = time.monotonic()
        tokens, then_s = self._clients.pop(client, (float(self._settings.rate_limit_burst), now_s))
        tokens = min(self._settings.rate_limit_burst, tokens + (now_s - then_s) * self._settings.rate_limit_per_second)
        if tokens < 1:
            self._clients[client] = (tokens, now_s)
            raise Problem("RATE_LIMITED", "too many requests; wait and repeat", headers={"Retry-After": str(RATE_LIMIT_RETRY_S)})
        self._clients[client] = (tokens - 1, now_s)
        if len(self._clients) > MAX_CLIENTS:
            self._clients.popitem(last=False)


def _declared_bytes(header: str) -> int | None:
    """What Content-Length says; None if it says nothing that a server would let through (digits of other scripts, thousands of digits)."""
    return int(header) if header.isascii() and header.isdigit() and len(header) <= 18 else None


async def _read(request: Request[Any, Any, Any], max_bytes: int) -> bytes:
    """All of the body; one chunk is passed on without a copy."""
    chunks: list[bytes] = []
    n_bytes = 0
    while True:
        message: Any = await request.receive()
        if message["type"] == "http.disconnect":
            raise Problem("BAD_REQUEST", "the client went away before its body was complete")
        chunk = message.get("body", b"")
        n_bytes += len(chunk)
        if n_bytes > max_bytes:
            raise _too_large(max_bytes)
        if chunk:
            chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(max_bytes: int) -> Problem:
    return Problem("PAYLOAD_TOO_LARGE", f"the body is larger than {max_bytes} bytes")
