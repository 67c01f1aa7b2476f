"""The function behind API Gateway (REST v1, HTTP API v2), a function URL or an ALB: Mangum around the same application.

    module import     settings; CURRENT of the indices in TARTAN_WARM is asked for (a thread); numpy and the engine are imported; what every
                      search of those indices reads is asked for (the same thread), into the cache in /tmp; litestar and the routes are imported
    first invocation  store, reader and caches are made; they live as long as the process, through every freeze
    invocation        the event's size is checked, the application answers, the answer's size is checked

Lambda refuses an event or an answer above 6 MB (a load balancer: 1 MB) with an error that says little, so we refuse a little earlier, in the
contract's form, and name the way round. Between two invocations the process is frozen: nothing here runs in the background, and what is
remembered may be old. A strong read therefore always asks the store after its invocation began. What was read before is only presumed:
routes/search.py searches it while the store is asked, and searches again if it is not in force any more.

There is no ASGI lifespan (Mangum would run it at every invocation). Step Functions tasks have a handler of their own.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from engine.errors import EngineError
from engine.format import names
from engine.store.base import Object
from handler.problems import Problem
from handler.runtime import Runtime
from handler.settings import Settings, is_started_ahead

MAX_EVENT_BYTES = 6_291_456
"""Lambda's limit on the JSON of an invocation, and on that of its answer."""
MAX_ALB_EVENT_BYTES = 1 << 20
"""The same where a load balancer invokes."""
ENVELOPE_BYTES = 64 << 10
"""Left for headers and context around a body."""
ANSWER_RESERVE_S = 0.5
"""Before the function's time is up: enough to answer 408, which a killed function cannot."""
EARLY_READ_WAIT_S = 2.0
EARLY_READ_BYTES = 16 << 20
"""For each index: the cells of three full segments. A process that answers no search has paid for a few requests in vain."""
CLOCK_JUMP_S = 1.0
TEXT_TYPES = ["text/", "application/json", "application/x-ndjson", "application/vnd.oai.openapi"]
"""Answers of these types travel as text if they are UTF-8 (compressed ones are not); all others in base64."""

_Message = MutableMapping[str, Any]
_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class LambdaHandler:
    """What Lambda calls. One event loop for all invocations, made here; not for several threads."""

    def __init__(self, settings: Settings, *, runtime: Runtime | None = None) -> None:
        self.runtime = runtime or Runtime(settings)
        self._early = _EarlyReads(self.runtime)
        import engine.cold  # noqa: F401  what the thread wants next; it imports nothing itself, so that two threads never wait for one module

        self._early.engine_is_there()
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        from mangum import Mangum

        from handler.app import create_app

        app: Any = _Bounded(create_app(runtime=self.runtime), self.runtime)
        self._mangum = Mangum(app, lifespan="off", text_mime_types=TEXT_TYPES)
        self._uncounted_s = time.time() - time.monotonic()

    def warm_up(self) -> None:
        """Bring the indices of TARTAN_WARM and the model into memory."""
        self._early.hand_over()
        self._loop.run_until_complete(self.runtime.warm_up())

    def __call__(self, event: dict[str, Any], context: Any) -> dict[str, Any]:
        """Answer one event. RuntimeError for an event that is no HTTP request."""
        asyncio.set_event_loop(self._loop)
        try:
            gateway, cycle = self._read(event, context)
        except ValueError:
            return _unreadable()  # a Host with two colons, a port that is no number, no base64: the client's, passed on by its gateway
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise RuntimeError(f"this is no event of an HTTP request: {type(error).__name__} {error}"[:200]) from error
        self._early.hand_over()
        self._notice_freeze()
        answer: dict[str, Any] = gateway(cycle(self._mangum.app))
        return answer

    def _read(self, event: Any, context: Any) -> tuple[Any, Any]:
        """What Mangum does first of all, here, where what it raises can be told apart: the gateway, and the request ready to be run."""
        from mangum.protocols import HTTPCycle

        gateway = self._mangum.infer(event, context)
        scope = gateway.scope
        if not isinstance(scope["method"], str) or not isinstance(scope["path"], str) or not isinstance(event["requestContext"], dict):
            raise TypeError("method, path or context")
        scope["path"].encode()
        return gateway, HTTPCycle(scope, gateway.body)

    def _notice_freeze(self) -> None:
        """A machine may be stopped without its monotonic clock noticing; then ages by that clock are too small."""
        uncounted_s = time.time() - time.monotonic()
        if abs(uncounted_s - self._uncounted_s) > CLOCK_JUMP_S:
            self.runtime.reader.doubt_heads()
        self._uncounted_s = uncounted_s

    def close(self) -> None:
        """For tests: Lambda never ends a process politely."""
        if not self._loop.is_closed():  # by a test runner that thought the current loop its own
            self._loop.run_until_complete(self.runtime.aclose())
            self._loop.close()


class _EarlyReads:
    """CURRENT of the indices that the settings name, then what every search of them reads, asked for while modules are still being imported.

    It also opens connections that the first request will use. What comes of CURRENT is no proof of anything when the first invocation begins,
    which may be hours later: it is remembered as known, never as fresh. The other objects never change; they go to the cache of the store's bytes,
    or, if there is none, are not read.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._found: dict[str, Object] = {}
        self._engine = threading.Event()
        self._thread: threading.Thread | None = None
        if runtime.settings.warm:
            runtime.store  # noqa: B018  made by one thread
            self._thread = threading.Thread(target=lambda: asyncio.run(self._read()), daemon=True)
            self._thread.start()

    def engine_is_there(self) -> None:
        """The modules that plan reads are imported."""
        self._engine.set()

    async def _read(self) -> None:
        await asyncio.gather(*(self._read_one(index) for index in self._runtime.settings.warm))

    async def _read_one(self, index: str) -> None:
        try:
            found = self._found[index] = await self._runtime.counting.get(names.current(index))
            if self._runtime.settings.cache_dir and not is_started_ahead():  # else whole indices are brought into memory
                await asyncio.to_thread(self._engine.wait)
                await self._fill_cache(index, found)
        except EngineError:
            pass  # the request that needs it will meet the same failure, and report it

    async def _fill_cache(self, index: str, current: Object) -> None:
        from engine.cold import reads_ahead
        from engine.config import ColdParams
        from engine.format.manifest import decode_manifest
        from engine.store.cache import CachedStore

        store = self._runtime.store
        assert isinstance(store, CachedStore)
        manifest = decode_manifest(current.data, name=names.current(index))
        reads = reads_ahead(manifest, index, ColdParams(), EARLY_READ_BYTES)
        await asyncio.gather(*(store.get_ranges(name, ranges) if ranges else store.get(name) for name, ranges in reads))
        await store.settle()

    def hand_over(self) -> None:
        """Give the reader what was found; at the first invocation, which may have to wait for it."""
        if self._thread is None:
            return
        from engine.format.manifest import decode_manifest
        from engine.index.commit import Head

        self._thread.join(EARLY_READ_WAIT_S)
        self._thread = None
        for index, found in dict(self._found).items():
            try:
                manifest = decode_manifest(found.data, name=names.current(index))
            except EngineError:
                continue
            self._runtime.reader.remember_head(index, Head(manifest, found.data, found.etag), asked_s=float("-inf"))


class _Bounded:
    """The application within what one invocation can carry and how long it may take."""

    def __init__(self, app: Any, runtime: Runtime) -> None:
        self._app = app
        self._runtime = runtime

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        event, context = scope.get("aws.event") or {}, scope.get("aws.context")
        limit = (MAX_ALB_EVENT_BYTES if "elb" in event.get("requestContext", {}) else MAX_EVENT_BYTES) - ENVELOPE_BYTES
        n_bytes = json_bytes(event.get("body") or "")
        if n_bytes > limit:
            await self._refuse(scope, send, _request_too_large(n_bytes, limit))
            return
        answer = _Answer(limit)
        try:
            async with asyncio.timeout(_time_left_s(context)):
                await self._app(scope, answer.receiving(receive), answer)
        except TimeoutError:
            await _end_other_tasks()
            await self._refuse(scope, send, Problem("TIMEOUT", "the function's time is up; a change that was under way may have been made"))
        else:
            if answer.is_too_large:
                await self._refuse(scope, send, _answer_too_large(limit), answer.start)
            else:
                await answer.pass_on(send)

    async def _refuse(self, scope: _Scope, send: _Send, problem: Problem, start: _Message | None = None) -> None:
        from handler.app import request_id_of

        answered = dict((start or {}).get("headers", []))  # the application's own id, if it came so far
        request_id = request_id_of(answered or dict(scope["headers"]))
        self._runtime.log.warning("refused", request_id=request_id, status=problem.status, error_code=problem.code)
        body = problem.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
        if self._runtime.settings.cors:
            headers += [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", b"*")]
        await send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


class _Answer:
    """Collects an answer. When it has become too large to travel, the rest is not kept, and one that is streamed hears that its client left."""

    def __init__(self, limit: int) -> None:
        self.start: _Message | None = None
        self._limit = limit
        self._chunks: list[bytes] = []
        self._n_bytes = 0
        self.is_too_large = False
        self._is_over = asyncio.Event()

    def receiving(self, receive: _Receive) -> _Receive:
        """The request's body, then, once the answer is whole, the end of the connection: a streamed answer waits for it."""
        has_body = False

        async def receive_once() -> _Message:
            nonlocal has_body
            if not has_body:
                has_body = True
                return await receive()
            await self._is_over.wait()
            return {"type": "http.disconnect"}

        return receive_once

    async def __call__(self, message: _Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            return
        chunk = message.get("body", b"")
        self._n_bytes += self._travelling_bytes(chunk)
        self.is_too_large = self._n_bytes > self._limit
        if self.is_too_large:
            self._chunks.clear()
        else:
            self._chunks.append(chunk)
        if self.is_too_large or not message.get("more_body", False):
            self._is_over.set()

    def _travelling_bytes(self, chunk: bytes) -> int:
        assert self.start is not None
        headers = dict(self.start["headers"])
        kind = headers.get(b"content-type", b"").decode("latin-1")
        if b"content-encoding" in headers or not any(text in kind for text in TEXT_TYPES):
            return 4 * (len(chunk) + 2) // 3
        return json_bytes(chunk)

    async def pass_on(self, send: _Send) -> None:
        assert self.start is not None
        await send(self.start)
        await send({"type": "http.response.body", "body": b"".join(self._chunks), "more_body": False})


def _unreadable() -> dict[str, Any]:
    """The answer to a request whose headers, path or body do not decode, in the form of every gateway at once."""
    problem = Problem("BAD_REQUEST", "the request's headers, path or body cannot be read")
    headers = {"content-type": "application/json"}
    many = {name: [value] for name, value in headers.items()}
    return {
        "statusCode": problem.status,
        "headers": headers,
        "multiValueHeaders": many,
        "body": problem.body().decode(),
        "isBase64Encoded": False,
    }


def json_bytes(text: str | bytes) -> int:
    """How long a body is as a JSON string, a little overestimated: quotes, backslashes and line ends are escaped."""
    data = text.encode() if isinstance(text, str) else text
    return len(data) + data.count(b'"') + data.count(b"\\") + data.count(b"\n") + data.count(b"\r") + data.count(b"\t") + 2


async def _end_other_tasks() -> None:
    """What a request that ran out of time left behind, a commit above all, may not thaw with a later invocation: garbage collection
    protects its uploads by their age only."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _time_left_s(context: Any) -> float | None:
    remaining = getattr(context, "get_remaining_time_in_millis", None)
    return max(0.1, remaining() / 1000 - ANSWER_RESERVE_S) if remaining is not None else None


def _request_too_large(n_bytes: int, limit: int) -> Problem:
    return Problem(
        "PAYLOAD_TOO_LARGE",
        f"the request is {n_bytes} bytes as an event and Lambda takes {limit}: send fewer documents at once, vectors as embeddings_b64 with "
        "dtype float16, or put the same body into the store with POST /indices/{name}/uploads",
    )


def _answer_too_large(limit: int) -> Problem:
    return Problem(
        "PAYLOAD_TOO_LARGE",
        f"the answer is larger than the {limit} bytes that Lambda lets through: ask for less, accept gzip, or send the header "
        "X-Tartan-Answer: download to get an address where the answer lies",
    )


def _made() -> LambdaHandler:
    """The handler of this process. What is imported stays for good: the collector need not look at it, neither now nor later."""
    gc.disable()
    try:
        made = LambdaHandler(Settings.for_lambda())
        if is_started_ahead():
            made.warm_up()
        return made
    finally:
        gc.freeze()
        gc.enable()


handler = _made()
