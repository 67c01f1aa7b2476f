"""A server of ours in a process of its own, for tests that need real sockets, signals or two of them."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from engine.store.base import ObjectStore
from engine.store.objects import open_store
from handler.app import create_app
from handler.runtime import Runtime
from handler.settings import Settings
from s3_server import REGION, S3Server

ROOT = Path(__file__).resolve().parent.parent
_CODE = """
import sys
from handler.settings import Settings
from handler.server import serve

settings = Settings.from_environment()
sys.exit(serve(settings.host, settings.port, settings, settings.workers))
"""
START_S = 40.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """A running server."""

    def __init__(self, environment: dict[str, str], **settings: Any) -> None:
        self.settings = Settings(**{"host": "127.0.0.1", "port": free_port(), "drain_s": 0.0, "compact": False, "fsync": False, **settings})
        self.url = f"http://127.0.0.1:{self.settings.port}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TARTAN_"))}
        own = {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **self.settings.to_environment(), **environment}
        command = [sys.executable, "-W", "error", "-c", _CODE]
        self._log = ""
        self._output = tempfile.NamedTemporaryFile(prefix="tartan-test-server-", suffix=".log")  # noqa: SIM115  # lives as long as the server
        self.process = subprocess.Popen(
            command,
            env={**inherited, **own},
            cwd=ROOT,
            stdout=self._output,  # a file: into a pipe that nobody reads a server writes until it is full, and then stands still
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that tests can signal the whole group
        )

    @property
    def log(self) -> str:
        """What the server has written so far."""
        if not self._output.closed:
            self._log = Path(self._output.name).read_text(errors="replace")
        return self._log

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if self._is_ready():
                return
            time.sleep(0.05)
        self.end(signal.SIGKILL)
        raise AssertionError(f"the server did not start:\n{self.log}")

    def _is_ready(self) -> bool:
        """Asked without httpx, whose set-up for each call would take the cores from the server that starts."""
        connection = http.client.HTTPConnection("127.0.0.1", self.settings.port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def end(self, how: signal.Signals = signal.SIGTERM, timeout_s: float = 20.0) -> int:
        """Send a signal, wait, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            _ = self.log
            self._output.close()


def s3_environment(server: S3Server) -> dict[str, str]:
    """What a server process needs to reach the S3 of the tests."""
    return {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": REGION, "TARTAN_S3_ENDPOINT": server.url}


def client_of(store: ObjectStore | None = None, **settings: Any) -> httpx.AsyncClient:
    """A client of an application in this process; its runtime is the attribute `runtime`."""
    runtime = Runtime(Settings(**{"log_level": "off", "search_threads": 1, **settings}), store=store or open_store("memory://"))
    transport = httpx.ASGITransport(create_app(runtime=runtime))  # type: ignore[arg-type]
    client = httpx.AsyncClient(transport=transport, base_url="http://server")
    client.runtime = runtime  # type: ignore[attr-defined]
    return client


@contextlib.contextmanager
def all_serving(*settings: dict[str, Any], environment: dict[str, str] | None = None) -> Iterator[list[Served]]:
    """Several servers, which start side by side."""
    servers = [Served(environment or {}, **own) for own in settings]
    try:
        for server in servers:
            server.wait_until_ready()
        yield servers
    finally:
        for server in servers:
            server.end()


@contextlib.contextmanager
def serving(environment: dict[str, str] | None = None, **settings: Any) -> Iterator[Served]:
    """A server for the time of the block."""
    server = Served(environment or {}, **settings)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.end()
