"""What keeps one process from being overrun: places to work in, bytes of bodies held at once, and requests per client.

Excess requests wait for a bounded time and then get 503 with Retry-After; a client that is too fast gets 429. State belongs to one process
and one event loop at a time.
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
from handler.runtime import Settings

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
                raise unavailable("the server is busy: too many requests are at work", 2.0) from None
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


class Limits:
    """The limits of one process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._places: dict[str, Budget] = {}
        self._bodies = Budget(settings.max_bodies_bytes)
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    @asynccontextmanager
    async def place(self, group: str | None) -> AsyncIterator[None]:
        """Hold one of the group's places while the block runs."""
        if group is None:
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
    async def body(self, request: Request[Any, Any, Any], max_bytes: int) -> AsyncIterator[bytes]:
        """The request's body, counted against the bytes held at once while the block runs. Problem PAYLOAD_TOO_LARGE beyond `max_bytes`."""
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > max_bytes:
            raise _too_large(max_bytes)
        n_reserved = min(int(declared) if declared.isdigit() else max_bytes, self._bodies.n_units)
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
