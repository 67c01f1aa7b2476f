"""A simulated S3 bucket, and the wire to it in the shape of an obstore store, so that engine/store/objects.py runs above it as it is.

The bucket is strongly consistent, like S3: each request takes effect at one moment, whole. The wire is not: requests and answers take
time, overtake each other, get lost; a request whose caller gave up may still take effect later; bulk deletes take effect name by name.
Every served request is one *step* of the simulation.

Faults (probabilities per request, see Weather): throttled (503), failed (500, nothing happened), lost (it happened, the answer did not
come), busy (409 to a conditional write, nothing happened), slow (slower than the client's patience), torn (the body breaks off).
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from obstore.exceptions import AlreadyExistsError, GenericError, NotModifiedError, PreconditionError

from .scheduler import EMPTY, EPOCH_S, Loop, Process, ProcessDied

OPERATIONS: ContextVar[Any] = ContextVar("operations", default=())
"""The operations on whose behalf the running task acts, or a function that gives them: what the model needs to explain a write."""


def asked_for() -> tuple[Any, ...]:
    operations = OPERATIONS.get()
    found: tuple[Any, ...] = operations() if callable(operations) else operations
    return found


@dataclass(frozen=True)
class Weather:
    """Probabilities of each fault, per request."""

    throttled: float = 0.0
    failed: float = 0.0
    lost: float = 0.0
    busy: float = 0.0
    slow: float = 0.0
    torn: float = 0.0

    def without(self, fault: str) -> Weather:
        return replace(self, **{fault: 0.0})


CALM = Weather()


@dataclass(frozen=True)
class Stored:
    """An object in the bucket. modified_s is unix time, whole seconds, as S3 lists it."""

    data: bytes
    etag: str
    modified_s: float


class Witness(Protocol):
    """Is told of each write before it takes effect; raises to end the simulation."""

    def put(self, name: str, before: Stored | None, after: Stored, operations: tuple[Any, ...]) -> None: ...

    def delete(self, name: str, before: Stored, operations: tuple[Any, ...]) -> None: ...

    def step(self, process: Process, kind: str, name: str, outcome: str) -> None: ...


class Bucket:
    """What is stored. Conditional writes as S3 does them."""

    def __init__(self, loop: Loop, rng: random.Random, lag_s: float = 0.0) -> None:
        self.loop, self.rng, self.lag_s = loop, rng, lag_s
        self.objects: dict[str, Stored] = {}
        self.witness: Witness | None = None
        self._changes: deque[tuple[float, str, Stored | None]] = deque()

    def stored(self, data: bytes) -> Stored:
        return Stored(data, hashlib.md5(data).hexdigest(), float(int(EPOCH_S + self.loop.now)))

    def put(self, name: str, data: bytes, operations: tuple[Any, ...]) -> None:
        after = self.stored(data)
        if self.witness is not None:
            self.witness.put(name, self.objects.get(name), after, operations)
        self._remember(name)
        self.objects[name] = after

    def _remember(self, name: str) -> None:
        """What is there before a change, for listings that lag."""
        if self.lag_s:
            self._changes.append((self.loop.now, name, self.objects.get(name)))
            while self._changes[0][0] < self.loop.now - self.lag_s:
                self._changes.popleft()

    def listed(self) -> dict[str, Stored]:
        """What a listing shows: what is there, or, if listings lag, what was there at some moment not too long ago."""
        if not self.lag_s:
            return self.objects
        shown, as_of = dict(self.objects), self.loop.now - self.rng.uniform(0, self.lag_s)
        for at, name, before in reversed(self._changes):
            if at <= as_of:
                break
            if before is None:
                shown.pop(name, None)
            else:
                shown[name] = before
        return shown

    def delete(self, name: str, operations: tuple[Any, ...]) -> None:
        before = self.objects.get(name)
        if before is None:
            return
        if self.witness is not None:
            self.witness.delete(name, before, operations)
        self._remember(name)
        del self.objects[name]


class _Body:
    """The answer to a GET, as obstore gives it."""

    def __init__(self, wire: Wire, name: str, stored: Stored, torn: bool) -> None:
        self._wire, self._stored, self._torn = wire, stored, torn
        self.meta = {"size": len(stored.data), "e_tag": stored.etag, "path": name}

    async def bytes_async(self) -> bytes:
        if self._torn:
            await asyncio.sleep(0.01)
            if self._wire.rng.random() < 0.3:
                return self._stored.data[: len(self._stored.data) // 2]  # some proxies do not tell
            raise GenericError("error decoding response body: connection closed before message completed")
        return self._stored.data


class Wire:
    """One process's connection to the bucket: the methods of obstore's store that objects.py calls."""

    def __init__(self, bucket: Bucket, process: Process, rng: random.Random, weather: Callable[[], Weather]) -> None:
        self.bucket, self.process, self.rng, self.weather = bucket, process, rng, weather
        self.slowness = rng.choice((0.5, 1.0, 1.0, 6.0))

    async def _request(self, kind: str, name: str, effect: Callable[[tuple[Any, ...]], Any], *, conditional: bool = False) -> Any:
        if self.process.dead:
            raise ProcessDied
        loop, weather, chance = self.bucket.loop, self.weather(), self.rng.random()
        answer = loop.create_future()
        operations = asked_for()
        fate = _fate(weather, chance, conditional)
        there_s, back_s = self._latency_s(), self._latency_s()
        if self.rng.random() < weather.slow:
            if self.rng.random() < 0.5:
                there_s += self.rng.uniform(5, 30)
            else:
                back_s += self.rng.uniform(5, 30)
        if fate == "lost":
            back_s += self.rng.uniform(0, 1.5)  # a broken connection shows late
        if fate == "busy":
            fate_error: Exception | None = AlreadyExistsError("status code: 409 Conflict ConditionalRequestConflict")
        else:
            fate_error = None if fate == "ok" else GenericError(f"simulated {fate}, status code: {503 if fate == 'throttled' else 500}")

        def serve() -> None:
            if self.process.dead and chance * 1000 % 1 < 0.3:
                return  # it never left the machine
            result: Any = None
            error = fate_error
            outcome = fate
            if fate in ("ok", "lost"):
                try:
                    result = effect(operations)
                except (AlreadyExistsError, PreconditionError, NotModifiedError, FileNotFoundError) as refusal:
                    error = error or refusal
                    outcome = f"{fate} {type(refusal).__name__}"
            assert self.bucket.witness is not None
            self.bucket.witness.step(self.process, kind, name, outcome)
            loop.call_later(back_s, deliver, result, error, context=EMPTY)

        def deliver(result: Any, error: Exception | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)

        loop.call_later(there_s, serve, context=EMPTY)
        return await answer

    def _latency_s(self) -> float:
        """Mostly about 15 ms one way; now and then a straggler."""
        return self.slowness * self.rng.lognormvariate(-4.2, 0.7) if self.rng.random() > 0.03 else self.rng.uniform(0.1, 2.0)

    def _found(self, name: str) -> Stored:
        stored = self.bucket.objects.get(name)
        if stored is None:
            raise FileNotFoundError(f"Object at location {name} not found")
        return stored

    async def get_async(self, name: str, *, options: Any = None) -> _Body:
        def effect(_: tuple[Any, ...]) -> Stored:
            stored = self._found(name)
            if options and options.get("if_none_match") == stored.etag:
                raise NotModifiedError("304")
            return stored

        stored = await self._request("get", name, effect)
        return _Body(self, name, stored, self.rng.random() < self.weather().torn)

    async def get_range_async(self, name: str, *, start: int, end: int) -> bytes:
        stored = await self._request("range", name, lambda _: self._found(name))
        if self.rng.random() < self.weather().torn:
            raise GenericError("error decoding response body: connection closed before message completed")
        if start >= len(stored.data):
            raise GenericError("status code: 416 Invalid range")
        data: bytes = stored.data[start:end]
        return data

    async def put_async(self, name: str, data: memoryview, *, mode: Any, use_multipart: bool) -> dict[str, str]:
        body = bytes(data)

        def effect(operations: tuple[Any, ...]) -> dict[str, str]:
            before = self.bucket.objects.get(name)
            if mode == "create":
                if before is not None:
                    raise AlreadyExistsError("status code: 412 PreconditionFailed")
            elif before is None:
                raise FileNotFoundError(f"Object at location {name} not found")
            elif before.etag != mode["e_tag"]:
                raise PreconditionError("status code: 412 PreconditionFailed")
            self.bucket.put(name, body, operations)
            return {"e_tag": self.bucket.objects[name].etag}

        answer: dict[str, str] = await self._request("put", name, effect, conditional=True)
        return answer

    async def delete_async(self, wanted: Sequence[str]) -> None:
        """S3's bulk delete: each name at its own moment, and an error may leave some undone."""
        left = list(wanted)
        self.rng.shuffle(left)
        while left:
            n = self.rng.randint(1, len(left))
            batch, left = left[:n], left[n:]

            def effect(operations: tuple[Any, ...], batch: list[str] = batch) -> None:
                for name in batch:
                    self.bucket.delete(name, operations)

            await self._request("delete", ",".join(sorted(batch)), effect)

    def list(self, prefix: str | None, *, offset: str | None = None, chunk_size: int = 1000) -> AsyncIterator[list[dict[str, Any]]]:
        return self._pages(prefix or "", offset or "")

    async def _pages(self, prefix: str, after: str) -> AsyncIterator[list[dict[str, Any]]]:
        """Pages of a few names, so that the bucket changes between two of them as it would between pages of 1000."""
        while True:
            n = self.rng.randint(3, 40)

            def effect(_: tuple[Any, ...], after: str = after, n: int = n) -> tuple[list[dict[str, Any]], bool]:
                listed = self.bucket.listed()
                found = sorted(name for name in listed if name.startswith(prefix) and name > after)
                return [_line(name, listed[name]) for name in found[:n]], len(found) > n

            page, more = await self._request("list", prefix, effect)
            if page:
                yield page
                after = page[-1]["path"]
            if not more:
                return

    async def list_with_delimiter_async(self, prefix: str | None) -> dict[str, list[str]]:
        def effect(_: tuple[Any, ...]) -> dict[str, list[str]]:
            start = prefix or ""
            rest = [name[len(start) :] for name in self.bucket.listed() if name.startswith(start)]
            return {"common_prefixes": sorted({start + name.partition("/")[0] for name in rest if "/" in name})}

        answer: dict[str, list[str]] = await self._request("list", prefix or "", effect)
        return answer


def _line(name: str, stored: Stored) -> dict[str, Any]:
    return {"path": name, "size": len(stored.data), "last_modified": datetime.fromtimestamp(stored.modified_s, UTC)}


def _fate(weather: Weather, chance: float, conditional: bool) -> str:
    for name in ("throttled", "failed", "lost", "busy"):
        p = getattr(weather, name) if name != "busy" or conditional else 0.0
        if chance < p:
            return name
        chance -= p
    return "ok"
