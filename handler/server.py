"""The container's entry: granian around the application, warm-up, graceful drain, background compaction.

    main process    listens, starts workers, owns the signals; imports no more than it must
    worker          one event loop over one Application; each has caches of its own. One of a host's workers looks after maintenance
    maintenance     a child process per piece of work, at the lowest priority and with one thread, so that searches keep their cores;
                    its memory is gone when it is done. Commits decide between hosts that do the same work: the loser's is rubbish

SIGTERM: health and readiness say 503 at once, everything else is still served for `drain_s` so that balancers can look elsewhere, then
the server stops listening, finishes what it has and exits with 0. SIGINT, or a second SIGTERM, skips the wait.

granian was chosen over uvicorn because it finishes requests in flight on SIGTERM and then exits with 0 (uvicorn 0.54 finishes them too, but
dies of the signal afterwards), and because its HTTP parsing runs outside the interpreter lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import EngineError, NotFound
from engine.index.compact import compact
from engine.index.indices import list_indices
from engine.index.plan import next_step
from engine.index.sweep import sweep
from handler.app import Application, create_app
from handler.runtime import Runtime, Settings, child_environment, share_metrics

SWEEP_INTERVAL_S = 3600.0
MAINTENANCE_MEMORY_BYTES = 128 << 20
_LOWEST_PRIORITY = 19
_Scope = Mapping[str, Any]
_Receive = Callable[[], Awaitable[Any]]
_Send = Callable[[Any], Awaitable[None]]


def serve(host: str, port: int, settings: Settings, workers: int = 1) -> int:
    """Serve until a signal ends it; returns the exit code. Raises ValueError for settings that cannot work, OSError for an address that is taken."""
    from granian.constants import HTTPModes, Interfaces
    from granian.log import LogLevels

    Runtime(settings).gate  # noqa: B018  unreadable keys must stop the server here, not its workers one by one
    _check_free(host, port)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tartan-"))
        if workers > 1 and settings.metrics:
            share_metrics(folder)
        draining = multiprocessing.Value("b", 0, lock=False)
        loader = _Loader(settings, draining, str(Path(folder) / "maintenance.lock"))
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
    lock_path: str

    def __call__(self) -> Worker:
        runtime = Runtime(self.settings)
        runtime.is_draining = lambda: bool(self.draining.value)
        return Worker(create_app(runtime=runtime), Maintenance(runtime, self.lock_path))


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
        if settings.warm or self.runtime.has_model:
            self._tasks.append(asyncio.create_task(self.runtime.warm_up()))
        if settings.compact:
            self._tasks.append(asyncio.create_task(self._maintenance.run()))
        self.runtime.log.info("serving", pid=os.getpid(), index_dir=settings.index_dir, model=settings.model or None)

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.runtime.close()


@dataclass
class Maintenance:
    """Looks for indices that want compaction or garbage collection, and starts a child for each, one at a time.

    lock_path  a file that the workers of a host share: who holds its lock maintains. The lock goes with the process that held it
    """

    runtime: Runtime
    lock_path: str
    _lock: int | None = None
    _swept_s: dict[str, float] = field(default_factory=dict)

    async def run(self) -> None:
        """Until cancelled."""
        interval_s = self.runtime.settings.maintenance_interval_s
        while True:
            await asyncio.sleep(interval_s * random.uniform(0.8, 1.2))
            if self.runtime.is_draining() or not self._holds_lock():
                continue
            try:
                await self._look_once()
            except EngineError as error:
                self._count("failed")
                self.runtime.log.warning("maintenance failed", error=str(error))

    def _holds_lock(self) -> bool:
        if self._lock is None:
            lock = os.open(self.lock_path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                return False
            self._lock = lock
        return True

    async def _look_once(self) -> None:
        for name, head in (await list_indices(self.runtime.store)).items():
            due_s = self._swept_s.setdefault(name, time.monotonic()) + SWEEP_INTERVAL_S
            wants_sweep = time.monotonic() >= due_s
            if next_step(head.manifest, self.runtime.maintenance) is None and not wants_sweep:
                continue
            if wants_sweep:
                self._swept_s[name] = time.monotonic()
            await self._work_on(name, "sweep" if wants_sweep else "compact")

    async def _work_on(self, name: str, verb: str) -> None:
        """One child, waited for. It ends with the server: killed anywhere, it leaves rubbish and no damage."""
        environment = child_environment(self.runtime.settings)
        child = await asyncio.create_subprocess_exec(sys.executable, "-m", "handler.server", verb, name, env=environment)
        try:
            code = await child.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
            await child.wait()
            raise
        self._count("done" if code == 0 else "failed")

    def _count(self, outcome: str) -> None:
        if self.runtime.metrics is not None:
            self.runtime.metrics.maintenance.labels(outcome).inc()


async def maintain(runtime: Runtime, name: str, verb: str) -> None:
    """Compact an index until it is in good order, and collect its garbage if `verb` is "sweep"."""
    began_s = time.monotonic()
    facts: dict[str, object] = {}
    try:
        report = await compact(runtime.reader, name, params=runtime.maintenance)
        facts |= {"steps": report.steps, "documents": report.n_documents, "given_up": report.n_given_up}
        if verb == "sweep":
            swept = await sweep(runtime.store, name, params=runtime.maintenance)
            facts |= {"objects_deleted": swept.n_deleted, "objects_kept": swept.n_kept}
    except NotFound as error:
        if error.code != "index-not-found":
            raise
        return  # deleted meanwhile
    runtime.log.info("maintained", index=name, verb=verb, s=round(time.monotonic() - began_s, 3), **facts)


def main(arguments: list[str]) -> int:
    """The maintenance child: `python -m handler.server compact|sweep INDEX`."""
    verb, name = arguments
    os.nice(_LOWEST_PRIORITY)
    runtime = Runtime(Settings.from_environment(memory_bytes=MAINTENANCE_MEMORY_BYTES, search_threads=1))
    try:
        asyncio.run(maintain(runtime, name, verb))
    except EngineError as error:
        runtime.log.error("maintenance failed", index=name, verb=verb, code=error.code, error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
