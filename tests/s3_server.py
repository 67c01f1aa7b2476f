"""Servers that stand for S3 in the tests: moto made atomic, with faults on demand, and a slow one for ranges. Loopback only.

moto checks If-Match and writes without a lock between, so two racing writers can both win (seen with 1 MB bodies);
`S3Server` lets one changing request in at a time. moto never throttles, resets or forgets to answer; a `Fault` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

Environ = dict[str, Any]
Application = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]
Action = Literal["refuse", "forget", "hang-up", "truncate", "unconditional"]
REGION = "us-east-1"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of `method` whose path contains `part`.

    refuse         answer `status` and `code`; the request has no effect
    forget         let the request take effect, then answer 500: a lost answer
    hang-up        let the request take effect if `effect`, then close the connection without a byte
    truncate       promise the whole body, send half of it, close the connection
    unconditional  strip If-Match and If-None-Match: a store that ignores conditions
    """

    method: str
    action: Action
    part: str = ""
    times: int = 1
    status: str = "503 Slow Down"
    code: str = "SlowDown"
    effect: bool = True
    seen: int = 0

    def takes(self, environ: Environ) -> bool:
        wanted = environ["REQUEST_METHOD"] == self.method and self.part in environ["PATH_INFO"]
        if not wanted or self.seen >= self.times:
            return False
        self.seen += 1
        return True


class _KeepAlive(MotoRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        """Silence: the tests read `S3Server.requests` instead."""


@dataclass
class S3Server:
    """One moto server on a free port of 127.0.0.1, in threads of this process."""

    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range header) of everything that arrived."""

    def __post_init__(self) -> None:
        self._app: Application = DomainDispatcherApplication(create_backend_app)
        self._faults: list[Fault] = []
        self._changes = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=_KeepAlive)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @contextlib.contextmanager
    def fault(self, method: str, action: Action, **more: Any) -> Iterator[Fault]:
        """The fault is armed inside the block and gone after it."""
        armed = Fault(method, action, **more)
        self._faults.append(armed)
        try:
            yield armed
        finally:
            self._faults.remove(armed)

    def _serve(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        self.requests.append((method, environ["PATH_INFO"], environ.get("HTTP_RANGE")))
        fault = next((fault for fault in self._faults if fault.takes(environ)), None)
        if fault is None:
            return self._apply(environ, start)
        if fault.action == "refuse":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return answer(start, fault.status, fault.code)
        if fault.action == "unconditional":
            environ = {key: value for key, value in environ.items() if key not in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH")}
            return self._apply(environ, start)
        if fault.action == "truncate":
            return _first_half(self._apply(environ, start), environ["werkzeug.socket"])
        if fault.effect:
            self._apply(environ, lambda *ignored: None)
        if fault.action == "hang-up":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError("hung up on purpose")
        return answer(start, "500 Internal Server Error", "InternalError")

    def _apply(self, environ: Environ, start: Callable[..., Any]) -> list[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return list(self._app(environ, start))
        with self._changes:
            return list(self._app(environ, start))


def answer(start: Callable[..., Any], status: str, code: str) -> list[bytes]:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def _first_half(chunks: list[bytes], connection: socket.socket) -> Iterator[bytes]:
    body = b"".join(chunks)
    yield body[: len(body) // 2]
    connection.shutdown(socket.SHUT_RDWR)
    raise ConnectionError("cut on purpose")


@dataclass
class SlowServer:
    """Answers every range GET with zeros after `first_byte_s`, and remembers how many were waiting at once."""

    first_byte_s: float
    waiting: int = 0
    peak: int = 0
    served: int = 0
    url: str = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[SlowServer]:
        self._connections: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.ensure_future(self._connection(reader, writer)))

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(await self._answer(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client is done
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, head: bytes) -> bytes:
        self.waiting += 1
        self.peak = max(self.peak, self.waiting)
        await asyncio.sleep(self.first_byte_s)
        self.waiting -= 1
        self.served += 1
        return _zeros(head.decode("latin-1"))


def _zeros(head: str) -> bytes:
    wanted = re.search(r"(?i)range: bytes=(\d+)-(\d+)", head)
    assert wanted is not None, head
    first, last = int(wanted[1]), int(wanted[2])
    lines = (
        "HTTP/1.1 206 Partial Content",
        f"Content-Length: {last + 1 - first}",
        f"Content-Range: bytes {first}-{last}/1000000000",
        'ETag: "zeros"',
        "Last-Modified: Mon, 23 Nov 2026 00:00:00 GMT",
        "\r\n",
    )
    return "\r\n".join(lines).encode() + bytes(last + 1 - first)
