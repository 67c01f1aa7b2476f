"""What an endpoint is, and the one way through which every request reaches one.

Each module of this folder lists its Endpoints; app.py makes Litestar routes of them, openapi.py describes them, tests walk over them. So
scope, body, statuses, limits and documentation of an endpoint stand in one place. The order of checks is that of `dispatch`: key, rate,
size and type of the body, a place to work in, shape of the body, then the endpoint's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Literal, TypeVar

import msgspec
from litestar import Request, Response
from litestar.response import Stream

from engine.config import INDEX_NAME
from engine.errors import EngineError, NotFound
from engine.index.reader import Snapshot
from engine.store.wrappers import Cost
from handler import tracing
from handler.auth import KeyRecord, Scope
from handler.logs import RequestRecord
from handler.observed import store_usd
from handler.problems import Problem, index_not_found, problem_of, read_only
from handler.routes.limits import Limits
from handler.runtime import Runtime
from handler.wire.bodies import encode, read_body

T = TypeVar("T")
JSON = "application/json"
DELETE_BODY_BYTES = 2 << 20
"""NextPlaid's limit on bodies of DELETE."""
ANSWER_HEADER = "x-tartan-answer"
"""Asks for an answer by way of the store (uploads.py)."""
STALE_S = 3600.0
"""How old a generation a write may be checked against first; what fails against an old one is checked again against CURRENT."""
INLINE_BYTES = 64 << 10
"""Bodies up to this size are read on the event loop: a thread would cost more than it frees."""

Timeout = Literal["short", "long"]


class Reply(msgspec.Struct):
    """An answer: `content` is a structure, or bytes as they are, or an iterator of chunks."""

    content: object
    status: int | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    media_type: str = JSON


class Call(msgspec.Struct):
    """One request on its way: what it carries and what it may use."""

    runtime: Runtime
    headers: Mapping[str, str]
    path: Mapping[str, str]
    query: Mapping[str, str]
    record: RequestRecord
    caller: KeyRecord | None = None
    body: Any = None
    is_large: bool = False
    cost: Cost = msgspec.field(default_factory=Cost)
    """What the request has asked of the store so far, opening the index included."""

    @property
    def name(self) -> str:
        """The index that the path names."""
        return self.path["name"]

    async def compute(self, work: Callable[[], T]) -> T:
        """Run arithmetic on the request's body: on a thread if the body is large."""
        if not self.is_large:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.runtime.executor, work)

    async def snapshot(self, *, max_age_s: float = 0.0, generation: int | None = None) -> Snapshot:
        """The index (or alias) of the path. Problem INDEX_NOT_FOUND with the name as it was asked for."""
        with tracing.stage("open"):
            snapshot = await open_snapshot(self.runtime, self.name, max_age_s=max_age_s, generation=generation)
        if snapshot.index != self.name:
            self.runtime.gate.admit_index(self.caller, snapshot.index)
        self.saw(snapshot)
        return snapshot

    async def checked_snapshot(self, is_fine: Callable[[Snapshot], bool]) -> Snapshot:
        """A generation known already if it will do, else the one in force: a write is checked without a request in the usual case,
        and what changed meanwhile is found by its commit."""
        snapshot = await self.snapshot(max_age_s=STALE_S)
        return snapshot if is_fine(snapshot) else await self.snapshot()

    async def filled_snapshot(self, *, max_age_s: float = 0.0, generation: int | None = None) -> Snapshot:
        """As `snapshot`; an index that is declared but never held a document is not found either."""
        snapshot = await self.snapshot(max_age_s=max_age_s, generation=generation)
        if snapshot.dim is None:
            raise index_not_found(self.name)
        return snapshot

    def saw(self, snapshot: Snapshot) -> None:
        """Remember a generation for the log and the metrics."""
        self.record.index, self.record.generation = snapshot.index, snapshot.manifest.generation
        self.record.news = self.runtime.saw(snapshot.index, snapshot.manifest) or self.record.news


async def open_snapshot(runtime: Runtime, name: str, *, max_age_s: float, generation: int | None) -> Snapshot:
    """An index by name, or by alias if no index has the name. One round: a known alias is confirmed while its index is read."""
    if not INDEX_NAME.fullmatch(name):
        raise index_not_found(name)
    supposed = runtime.aliases.known(name)
    try:
        if supposed is None:
            try:
                return await runtime.reader.snapshot(name, max_age_s=max_age_s, generation=generation)
            except NotFound as error:
                if error.code != "index-not-found":
                    raise
            return await runtime.reader.snapshot(await runtime.aliases.resolve(name), max_age_s=max_age_s, generation=generation)
        target, snapshot = await asyncio.gather(
            runtime.aliases.resolve(name),
            runtime.reader.snapshot(supposed, max_age_s=max_age_s, generation=generation),
            return_exceptions=True,
        )
        if isinstance(target, BaseException):
            raise target
        if target != supposed:
            return await runtime.reader.snapshot(target, max_age_s=max_age_s, generation=generation)
        if isinstance(snapshot, BaseException):
            raise snapshot
        return snapshot
    except NotFound as error:
        if error.code == "index-not-found":
            raise index_not_found(name) from error
        raise


class Endpoint(msgspec.Struct, frozen=True):
    """One row of the API.

    name         operation id and metrics label
    scope        what a key must have; None: any valid key, or none at all where `area` is open
    body         the structure of the request's JSON; None: a body is not read
    answer       the structure of the answer, or a media type for anything that is not JSON
    errors       codes beyond those that follow from the other fields
    group        requests of a group share CONCURRENCY_LIMIT places; None never waits
    """

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    name: str
    handle: Callable[[Call], Awaitable[Reply]]
    summary: str
    answer: Any
    tag: str
    scope: Scope | None
    area: str = ""
    status: int = 200
    body: Any = None
    is_body_optional: bool = False
    errors: tuple[str, ...] = ()
    request_example: Any = None
    answer_example: Any = None
    timeout: Timeout = "long"
    group: str | None = None
    is_rate_limited: bool = False
    description: str = ""

    @property
    def is_change(self) -> bool:
        """Whether it writes to the store. The self test asks for an admin's key only because it costs much."""
        return self.scope in ("write", "admin") and self.group != "selftest"

    @property
    def is_behind_balancers(self) -> bool:
        """Whether balancers close it, by its path: then only one spelling is served. Another (a second slash, %69) may pass their rules."""
        return self.area == "metrics" or self.path.startswith("/internal/")


async def dispatch(endpoint: Endpoint, runtime: Runtime, limits: Limits, request: Request[Any, Any, Any]) -> Response[Any] | Stream:
    """Take one request through its endpoint, counted as active. Raises Problem, or what a programming mistake raises."""
    if runtime.metrics is None:
        return await _dispatch(endpoint, runtime, limits, request)
    with runtime.metrics.active.labels(endpoint.name).track_inprogress():
        return await _dispatch(endpoint, runtime, limits, request)


async def _dispatch(endpoint: Endpoint, runtime: Runtime, limits: Limits, request: Request[Any, Any, Any]) -> Response[Any] | Stream:
    record: RequestRecord = request.scope["state"]["record"]
    record.route = endpoint.path
    headers = request.headers
    call = Call(runtime, headers, request.path_params, request.query_params, record)
    settings = runtime.settings
    try:
        if endpoint.is_behind_balancers and request.scope["state"]["spelt"] != endpoint.path:
            raise Problem("NO_SUCH_ROUTE", "there is no such route")
        index = call.path.get("name")
        call.caller = runtime.gate.admit(headers, endpoint.scope, area=endpoint.area, index=index)
        record.key_id = call.caller.id if call.caller else None
        if settings.read_only and endpoint.is_change:
            raise read_only()
        if endpoint.is_rate_limited:
            limits.spend(_client(request, trusts_proxy=settings.trust_proxy))
        limits.refuse_in_overrun(endpoint.group)
        async with asyncio.timeout(settings.short_timeout_s if endpoint.timeout == "short" else settings.timeout_s):
            if endpoint.body is None:
                async with limits.place(endpoint.group):
                    return await _answer(endpoint, call)
            max_bytes = DELETE_BODY_BYTES if endpoint.method == "DELETE" else settings.max_body_bytes
            # The body first: a client that sends slowly holds no place, and one that is refused can send its next request on the same connection.
            async with limits.body(request, min(max_bytes, settings.max_body_bytes)) as raw, limits.place(endpoint.group):
                call.is_large = len(raw) > INLINE_BYTES
                if raw or not endpoint.is_body_optional:
                    _check_content_type(headers.get("content-type"))
                    _check_encoding(headers.get("content-encoding"))
                    call.body = await call.compute(lambda: read_body(raw, endpoint.body))
                else:
                    call.body = endpoint.body()
                return await _answer(endpoint, call)
    except Problem as problem:
        record.error_code = problem.code
        raise
    except (EngineError, TimeoutError) as error:
        failure = problem_of(error, index=call.path.get("name"))
        record.error_code = failure.code
        if failure.status >= 500:
            runtime.log.error(
                "failed", request_id=record.request_id, route=endpoint.path, code=getattr(error, "code", "timeout"), error=str(error)
            )
        raise failure from error


async def _answer(endpoint: Endpoint, call: Call) -> Response[Any] | Stream:
    with call.runtime.counting.window() as call.cost:
        try:
            reply = await endpoint.handle(call)
            if ANSWER_HEADER in call.headers:
                from handler.routes.uploads import by_the_store

                reply = await by_the_store(call, reply)
        finally:
            cost = call.cost
            if cost.n_requests:
                call.record.facts |= {"rounds": cost.rounds, "requests": cost.n_requests, "bytes": cost.bytes_read}
                call.record.usd = store_usd(cost.requests)
    status = reply.status or endpoint.status
    if isinstance(reply.content, AsyncIterator):
        return Stream(reply.content, status_code=status, headers=reply.headers, media_type=reply.media_type)
    content = reply.content if isinstance(reply.content, bytes) else encode(reply.content)
    return Response(content, status_code=status, headers=reply.headers, media_type=reply.media_type)


def _check_content_type(content_type: str | None) -> None:
    """application/json or anything +json, whatever its parameters."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind != JSON and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Problem("UNSUPPORTED_MEDIA_TYPE", "the body must be sent as Content-Type: application/json")


def _check_encoding(encoding: str | None) -> None:
    """A compressed body is refused by its header: unpacked it could be a thousand times what was counted, and as it is it is no JSON."""
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        raise Problem("UNSUPPORTED_MEDIA_TYPE", "the body must be sent as it is, without Content-Encoding")


def _client(request: Request[Any, Any, Any], *, trusts_proxy: bool) -> str:
    """The address that a rate limit counts. Behind a trusted proxy: the last address that the proxy itself wrote."""
    if trusts_proxy and (forwarded := request.headers.get("x-forwarded-for")):
        return forwarded.rpartition(",")[2].strip()
    return request.client.host if request.client else ""
