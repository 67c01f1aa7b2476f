"""The S3 of the tests in a process of its own, with moods. Its objects live as long as the process.

    PUT /_mood with {"kind": "well" | "slow" | "denied" | "read-only" | "expired" | "failing" | "gone", "delay_s": 0.2}

Run as `python -m crash.s3` (s3_process.py).
"""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from s3_process import S3Process, run
from s3_server import Environ, S3Server, answer

BUCKET = "crash"
REFUSALS = {
    "denied": ("403 Forbidden", "AccessDenied"),
    "read-only": ("403 Forbidden", "AccessDenied"),
    "expired": ("400 Bad Request", "ExpiredToken"),
    "failing": ("503 Slow Down", "SlowDown"),
}


@dataclass
class MoodyS3(S3Server):
    """As S3Server, in a mood that its clients may set."""

    mood: dict[str, Any] = field(default_factory=lambda: {"kind": "well"})

    def _serve(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/_mood":
            self.mood = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            start("200 OK", [("Content-Length", "0")])
            return []
        kind = self.mood["kind"]
        if kind == "slow":
            time.sleep(self.mood["delay_s"])
        elif kind == "gone":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError("gone on purpose")
        elif kind in REFUSALS and (kind != "read-only" or environ["REQUEST_METHOD"] not in ("GET", "HEAD")):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return answer(start, *REFUSALS[kind])
        return self._apply(environ, start)


class MoodyProcess(S3Process):
    """The process, seen from outside."""

    def __init__(self) -> None:
        super().__init__("crash.s3")

    def set_mood(self, kind: str, **more: Any) -> None:
        body = json.dumps({"kind": kind, **more}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/_mood", body, method="PUT"), timeout=30).close()

    @contextmanager
    def mood(self, kind: str, **more: Any) -> Iterator[None]:
        self.set_mood(kind, **more)
        try:
            yield
        finally:
            self.set_mood("well")


if __name__ == "__main__":
    run(MoodyS3(), BUCKET)
