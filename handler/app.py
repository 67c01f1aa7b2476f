"""The ASGI application: Litestar routes made from the table of endpoints, inside an edge that every request passes.

    edge      request id, path prefix, CORS, compression, one log line, metrics; also for paths and methods that do not exist
    Litestar  finds the route, calls `dispatch` (routes/endpoint.py)

server.py and lambda_http.py wrap the same application. The ASGI lifespan does nothing here: what lives as long as the process
is in Runtime, made when first needed. There are no redirects: clients take any 3xx for a failure.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from litestar import Litestar, Request, Response
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler

from handler import tracing
from handler.logs import RequestRecord
from handler.problems import Problem, problem_of
from handler.routes.endpoint import JSON, Endpoint, dispatch
from handler.routes.limits import Limits
from handler.routes.table import ENDPOINTS
from handler.runtime import Runtime
from handler.settings import Settings

_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]{1,200}")
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,1000}")
_GZIP_LEVEL = 1
"""Level 1: a search answer of 10 rows costs 0.05 ms and shrinks nearly as well as at 6."""
_Scope = Any
_Message = Any
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_NO_CORS = ("/", "/health")


def create_app(settings: Settings | None = None, *, runtime: Runtime | None = None) -> Application:
    """The application over a runtime; both come from the environment if not given."""
    return Application(runtime or Runtime(settings or Settings.from_environment()))


class Application:
    """An ASGI application. `runtime` is what it stands on, `routes` the Litestar application inside."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        runtime.gate  # noqa: B018  unreadable key records must fail now, not at the first request
        limits = Limits(runtime)
        self.routes = _Routes(
            route_handlers=_routes(ENDPOINTS, runtime, limits),
            exception_handlers={Problem: _problem_response, HTTPException: _http_response, Exception: _failure_response},
            openapi_config=None,
            request_max_body_size=None,
            logging_config=None,
        )
        self._edge = _Edge(self.routes, runtime)

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "http":
            await self._edge(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _no_lifespan(receive, send)


class _Routes(Litestar):
    """Litestar without the plugins that it adds by itself: where pydantic happens to be installed they import it, which takes longer than
    everything else that an application is made of, and no route here has a pydantic type."""

    @staticmethod
    def _get_default_plugins(plugins: list[Any]) -> list[Any]:
        return plugins


async def _no_lifespan(receive: _Receive, send: _Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def _routes(endpoints: Sequence[Endpoint], runtime: Runtime, limits: Limits) -> list[HTTPRouteHandler]:
    """One Litestar handler for all endpoints of a method and status: half the time of one each, for it looks at every signature."""
    groups: dict[tuple[str, int], dict[str, Endpoint]] = {}
    for endpoint in endpoints:
        groups.setdefault((endpoint.method, endpoint.status), {})[endpoint.path] = endpoint
    return [_route(method, status, by_path, runtime, limits) for (method, status), by_path in groups.items()]


def _route(method: Any, status: int, by_path: dict[str, Endpoint], runtime: Runtime, limits: Limits) -> HTTPRouteHandler:
    async def handle(request: Request[Any, Any, Any]) -> Response[Any]:
        return await dispatch(by_path[request.scope["path_template"]], runtime, limits, request)

    handle.__annotations__ = {"request": Request[Any, Any, Any], "return": Response[Any]}  # as text, Litestar compiles them anew for each path
    paths = [re.sub(r"{(\w+)}", r"{\1:str}", path) for path in by_path]
    return HTTPRouteHandler(paths, http_method=[method], status_code=status, include_in_schema=False)(handle)


# Errors


def _problem_response(request: Request[Any, Any, Any], problem: Problem) -> Response[bytes]:
    _record(request).error_code = problem.code
    return Response(problem.body(), status_code=problem.status, media_type=JSON, headers=problem.headers)


def _http_response(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """Litestar's own refusals: no such path, or no such method on it (its headers say which there are)."""
    codes = {404: "NO_SUCH_ROUTE", 405: "METHOD_NOT_ALLOWED", 413: "PAYLOAD_TOO_LARGE"}
    code = codes.get(error.status_code, "BAD_REQUEST" if error.status_code < 500 else "INTERNAL_ERROR")
    messages = {"NO_SUCH_ROUTE": "there is no such route", "METHOD_NOT_ALLOWED": "the route has no such method"}
    problem = Problem(code, messages.get(code, HTTPStatus(error.status_code).phrase), headers=error.headers)
    return _problem_response(request, problem)


def _failure_response(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """A programming mistake: its traceback goes to the log, nothing of it to the client."""
    record = _record(request)
    runtime: Runtime = request.scope["state"]["runtime"]
    runtime.log.error("failed", request_id=record.request_id, route=record.route, exc_info=error)
    return _problem_response(request, problem_of(error))


def _record(request: Request[Any, Any, Any]) -> RequestRecord:
    record: RequestRecord = request.scope["state"]["record"]
    return record


# The edge


class _Edge:
    """Around everything: what is true of all answers, the 404 of an unknown path included."""

    def __init__(self, inner: Any, runtime: Runtime) -> None:
        self._inner = inner
        self._runtime = runtime
        prefix = runtime.settings.path_prefix.strip("/")
        self._prefix = f"/{prefix}" if prefix else ""
        self._names = {endpoint.path: endpoint.name for endpoint in ENDPOINTS}
        self._names_of: dict[tuple[str, str], str] = {(endpoint.method, endpoint.path): endpoint.name for endpoint in ENDPOINTS}

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        began_s = time.perf_counter()
        headers = dict(scope["headers"])
        record = RequestRecord(request_id_of(headers), scope["method"])
        record.trace = self._runtime.begin_trace(_text(headers, b"traceparent"), _text(headers, b"tracestate"), record.request_id)
        token = tracing.current.set(record.trace)
        spelt = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
        scope["state"] = {"record": record, "runtime": self._runtime, "spelt": spelt.removeprefix(self._prefix)}
        self._strip_prefix(scope)
        if record.method == "HEAD":
            scope["method"] = "GET"  # the same answer without its body, on every route: balancers ask so
        outgoing = _Outgoing(send, scope, headers, record, self._runtime)
        try:
            if self._runtime.settings.cors and scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await _preflight(headers, outgoing)
            else:
                await self._inner(scope, receive, outgoing)
        except asyncio.CancelledError:
            record.status, record.error_code = record.status or 499, "CLIENT_GONE"
            raise
        except Exception as error:  # an answer that broke while it was sent, or a mistake outside the routes
            self._runtime.log.error("failed", request_id=record.request_id, route=record.route, exc_info=error)
            with suppress(Exception):
                await outgoing.fail()
        finally:
            self._finish(record, began_s, time.perf_counter())
            tracing.current.reset(token)

    def _strip_prefix(self, scope: _Scope) -> None:
        """Serve with the prefix and without: a gateway may or may not take it off. Joining URLs may double the first slash."""
        path = "/" + scope["path"].lstrip("/")
        if self._prefix and (path == self._prefix or path.startswith(self._prefix + "/")):
            path = "/" + path[len(self._prefix) :].lstrip("/")
        if path != scope["path"]:
            scope["path"], scope["raw_path"], scope["root_path"] = path, path.encode(), ""

    def _finish(self, record: RequestRecord, began_s: float, ended_s: float) -> None:
        runtime = self._runtime
        method = "GET" if record.method == "HEAD" else record.method
        name = self._names_of.get((method, record.route), "unmatched")
        took_s = ended_s - began_s
        if runtime.metrics is not None:
            runtime.metrics.answered(name, record.status, took_s, code=record.error_code, usd=record.usd)
        trace = record.trace
        if trace is not None and trace.conflicts:
            record.facts["conflicts"] = trace.conflicts
        line = record.line(took_s * 1000)
        if trace is not None and trace.spans is not None and runtime.exporter is not None:
            facts = {key: value for key, value in line.items() if isinstance(value, (str, int, float))}
            runtime.exporter.export(trace, name, began_s, ended_s, facts, is_failed=record.status >= 500)
        if runtime.emf is not None:
            line |= runtime.emf.fields(name, record, took_s)
        level = runtime.log.warning if record.status >= 500 else runtime.log.info
        level("request", **line)


def _text(headers: dict[bytes, bytes], name: bytes) -> str | None:
    value = headers.get(name)
    return None if value is None else value.decode("latin-1")


def request_id_of(headers: dict[bytes, bytes]) -> str:
    """The client's own id if it is visible ASCII, else a new one."""
    given = _text(headers, b"x-request-id")
    return given if given and _VISIBLE_ASCII.fullmatch(given) else str(uuid.uuid4())


async def _preflight(headers: dict[bytes, bytes], send: _Send) -> None:
    """Any origin, method and header may call. The origin's header is that of every answer; two of it are none to a browser."""
    asked = headers.get(b"access-control-request-headers", b"")
    allowed = [
        (b"access-control-allow-methods", b"GET, POST, PUT, DELETE, OPTIONS"),
        (b"access-control-allow-headers", asked if _HEADER_NAMES.fullmatch(asked) else b"*"),
        (b"access-control-max-age", b"600"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": allowed})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Outgoing:
    """The way out: adds headers, compresses a whole body, notes the status. A streamed body passes as it is."""

    def __init__(self, send: _Send, scope: _Scope, headers: dict[bytes, bytes], record: RequestRecord, runtime: Runtime) -> None:
        self._send = send
        self._record = record
        self._is_head = record.method == "HEAD"
        self._start: Any = None
        self._has_begun = False
        settings = runtime.settings
        self._with_cors = settings.cors and scope["path"] not in _NO_CORS
        accepts_gzip = b"gzip" in headers.get(b"accept-encoding", b"")
        self._min_bytes = settings.gzip_min_bytes if accepts_gzip and settings.gzip_min_bytes else None
        self._closes = runtime.is_draining()

    async def __call__(self, message: _Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] == HTTPStatus.NO_CONTENT:  # Litestar's answer to OPTIONS; clients know 200, 201 and 202 as successes
                message = {**message, "status": 200, "headers": [*message["headers"], (b"content-length", b"0")]}
            self._start = message
            self._record.status = message["status"]
            return
        if message["type"] == "http.response.body" and not self._has_begun:
            body = message.get("body", b"")
            is_whole = not message.get("more_body", False)
            if is_whole and self._min_bytes is not None and len(body) >= self._min_bytes:
                body = self._compressed(body)
            self._has_begun = True
            await self._send(self._with_headers(self._start))
            if self._is_head:
                message, body = {**message, "more_body": False}, b""
            await self._send({**message, "body": body})
            return
        if not self._is_head:
            await self._send(message)

    async def fail(self) -> None:
        """A plain 500 if nothing was sent yet."""
        if self._has_begun:
            return
        problem = problem_of(RuntimeError())
        headers = [(b"content-type", JSON.encode()), (b"content-length", str(len(problem.body())).encode())]
        await self({"type": "http.response.start", "status": problem.status, "headers": headers})
        await self({"type": "http.response.body", "body": problem.body(), "more_body": False})

    def _compressed(self, body: bytes) -> bytes:
        kind = next((value for key, value in self._start["headers"] if key == b"content-type"), b"")
        if kind.startswith(b"image/"):
            return body
        engine = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, 31)
        packed = engine.compress(body) + engine.flush()
        kept = [(key, value) for key, value in self._start["headers"] if key != b"content-length"]
        added = [(b"content-length", str(len(packed)).encode()), (b"content-encoding", b"gzip"), (b"vary", b"accept-encoding")]
        self._start = {**self._start, "headers": kept + added}
        return packed

    def _with_headers(self, start: Any) -> Any:
        added = [(b"x-request-id", self._record.request_id.encode()), (b"x-content-type-options", b"nosniff")]
        trace = self._record.trace
        if trace is not None and trace.parent_id is not None:
            added.append((b"traceresponse", trace.traceparent.encode()))
        if self._with_cors:
            added += [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", b"*")]
        if self._closes:
            added.append((b"connection", b"close"))
        return {**start, "headers": [*start["headers"], *added]}
