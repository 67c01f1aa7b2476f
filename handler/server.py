"""The container's entry: granian around the application, warm-up, graceful drain, background compaction.

    main process    listens, starts workers, owns the signals; imports no more than it must
    worker          one event loop over one Application; each has caches of its own. One of a host's workers looks after maintenance
    maintenance     a child process while there is something to compact (maintenance.py)

SIGTERM: health and readiness say 503 at once, everything else is still served for `drain_s` so that balancers can look elsewhere, then
the server stops listening, finishes what it has and exits with 0. SIGINT, or a second SIGTERM, skips the wait.

granian was chosen over uvicorn because it finishes requests in flight on SIGTERM and then exits with 0 (uvicorn 0.54 finishes them too, but
dies of the signal afterwards), and because its HTTP parsing runs outside the interpreter lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import ssl
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handler.app import Application, create_app
from handler.maintenance import Maintenance
from handler.runtime import Runtime
from handler.settings import Settings, share_metrics

if TYPE_CHECKING:
    from granian.http import HTTP1Settings

IDLE_SPARE_S = 60.0
SWITCH_S = 0.0005
"""How long a thread may keep the interpreter from others that want it. A search is many short numpy calls, each of which gives the interpreter
away and wants it back; at Python's 5 ms it waits for long. On two cores 8 clients got 161 searches a second instead of 131."""
_Scope = Mapping[str, Any]
_Receive = Callable[[], Awaitable[Any]]
_PR_SET_PDEATHSIG = 1
_Send = Callable[[Any], Awaitable[None]]


def serve(host: str, port: int, settings: Settings, workers: int = 1) -> int:
    """Serve until a signal ends it; returns the exit code. Raises ValueError for settings that cannot work, OSError for an address that is taken."""
    from granian.constants import HTTPModes, Interfaces
    from granian.log import LogLevels

    Runtime(settings).gate  # noqa: B018  unreadable keys must stop the server here, not its workers one by one
    tls = _tls(settings)
    _check_free(host, port)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tartan-"))
        if workers > 1 and settings.metrics:
            share_metrics(folder)
        draining = multiprocessing.Value("b", 0, lock=False)
        loader = _Loader(settings, draining, folder)
        server = _granian(draining, settings.drain_s)(
            "tartan",
            address=host,
            port=port,
            interface=Interfaces.ASGI,
            workers=workers,
            http=HTTPModes.http1,
            websockets=False,
            backlog=1024,
            respawn_failed_workers=True,
            **tls,
            http1_settings=http_settings(settings),
            workers_kill_timeout=max(1, int(settings.timeout_s)),
            log_level=LogLevels.warning,
        )
        try:
            server.serve(target_loader=loader, wrap_loader=False)
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def _check_free(host: str, port: int) -> None:
    """OSError if somebody listens there already: granian would share the port with another server of ours without a word."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _tls(settings: Settings) -> dict[str, Any]:
    """granian's arguments for TLS; none for plain HTTP. ValueError for a certificate that cannot serve."""
    from granian.constants import SSLProtocols

    if not settings.tls_cert and not settings.tls_key:
        return {}
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key or None)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(f"the TLS certificate {settings.tls_cert!r} and key {settings.tls_key!r} cannot be used: {error}") from error
    # TLS 1.2 as well: granian alone would take 1.3 only, and some balancers speak 1.2 to their targets.
    return {"ssl_cert": Path(settings.tls_cert), "ssl_key": Path(settings.tls_key), "ssl_protocol_min": SSLProtocols.tls12}


def http_settings(settings: Settings) -> HTTP1Settings:
    """granian's settings of connections. Its limit on the time to read a request's head, 30 s by itself, counts for idle connections too, and a
    server must keep those for longer than any balancer in front of it: one that closes first loses the request that is just on its way, and the
    balancer answers 502. A balancer waits for as long as a request may take and a little more (infra/ecs.yaml)."""
    from granian.http import HTTP1Settings

    return HTTP1Settings(header_read_timeout=int((settings.timeout_s + IDLE_SPARE_S) * 1000))


def _granian(draining: Any, drain_s: float) -> Any:
    """granian's server, which on SIGTERM first says that it drains and stops only after `drain_s`."""
    from granian import Granian

    class Server(Granian):  # type: ignore[misc, valid-type]
        def signal_handler_interrupt(self, *args: Any, **kwargs: Any) -> None:
            if os.getpid() != self.pid:  # a worker just forked, that has no handlers of its own yet
                os._exit(0)
            is_first_term = args and args[0] == signal.SIGTERM and not draining.value
            draining.value = 1
            stop = super().signal_handler_interrupt
            if not is_first_term or drain_s <= 0:
                stop(*args, **kwargs)
                return
            timer = threading.Timer(drain_s, stop, args, kwargs)
            timer.daemon = True
            timer.start()

    return Server


@dataclass(frozen=True)
class _Loader:
    """Makes a worker's application, in the worker. Can be pickled, for platforms that do not fork."""

    settings: Settings
    draining: Any
    folder: str

    def __call__(self) -> Worker:
        os.setpgid(0, 0)  # a SIGTERM to the whole group (a service manager, a terminal) is for the main process, which drains first
        _die_with_parent()
        sys.setswitchinterval(SWITCH_S)
        runtime = Runtime(self.settings)
        runtime.is_draining = lambda: bool(self.draining.value)
        return Worker(create_app(runtime=runtime), Maintenance(runtime, Path(self.folder)))


def _die_with_parent() -> None:
    """A worker whose main process was killed would go on listening where the next server wants to, with nobody to stop it. Linux ends it with the
    parent; elsewhere it stays."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died just before
            os._exit(1)


class Worker:
    """The application with what only a server has: tasks that begin and end with the process."""

    def __init__(self, app: Application, maintenance: Maintenance) -> None:
        self.app, self.runtime = app, app.runtime
        self._maintenance = maintenance
        self._tasks: list[asyncio.Task[None]] = []

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.startup":
                self._start()
            else:
                await self._stop()
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    def _start(self) -> None:
        settings = self.runtime.settings
        self.runtime.exporter  # noqa: B018  its import must neither hold up a request nor fail there
        if settings.metrics:
            self._tasks.append(asyncio.create_task(self.runtime.keep_counting()))
        if settings.warm or self.runtime.has_model:
            self._tasks.append(asyncio.create_task(self.runtime.warm_up()))
        if settings.compact and not settings.read_only:
            self.runtime.on_write = self._maintenance.saw
            self._tasks.append(asyncio.create_task(self._maintenance.run()))
        self.runtime.log.info("serving", pid=os.getpid(), index_dir=settings.index_dir, model=settings.model or None)

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.runtime.aclose()
