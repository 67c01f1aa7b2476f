"""The log: JSON lines on standard output, one for each request and a few for the life of the process.

A line carries only what is named in RequestRecord: never a body, vector, text, header, cookie or key. Callers: app.py, server.py.
docs/logging.md lists the fields; a test compares.
"""

from __future__ import annotations

import logging
import sys
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from engine.errors import EngineError
from handler.tracing import Trace

if TYPE_CHECKING:
    from handler.index_facts import IndexFacts

LEVELS = {"trace": logging.DEBUG, "debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "warning": logging.WARNING}
LEVELS |= {"error": logging.ERROR, "critical": logging.CRITICAL, "off": logging.CRITICAL}


@dataclass(slots=True)
class RequestRecord:
    """What is known of one request, filled in on its way; times in milliseconds."""

    request_id: str
    method: str
    route: str = ""
    status: int = 0
    index: str | None = None
    generation: int | None = None
    key_id: str | None = None
    error_code: str | None = None
    facts: dict[str, int] = field(default_factory=dict)
    """Counts of the search or write: queries, documents, candidates, rounds, requests, bytes."""
    usd: float = 0.0
    """List price of what was asked of the store."""
    trace: Trace | None = None
    news: IndexFacts | None = None
    """A generation that this process had not seen before; for emf.py, not for the line."""

    @property
    def stages_ms(self) -> dict[str, float]:
        """Time by stage; the trace keeps it."""
        return self.trace.stages_ms if self.trace is not None else {}

    def line(self, ms: float) -> dict[str, Any]:
        """The event's fields; what is not known is left out."""
        named = ("request_id", "method", "route", "status", "index", "generation", "key_id", "error_code")
        fields: dict[str, Any] = {name: value for name in named if (value := getattr(self, name)) not in (None, "")}
        fields["ms"] = round(ms, 3)
        fields.update(self.facts)
        if self.usd:
            fields["usd"] = float(f"{self.usd:.3g}")
        if self.trace is not None:
            ids = {"trace_id": self.trace.trace_id, "span_id": self.trace.span_id, "parent_id": self.trace.parent_id}
            fields.update((name, value) for name, value in ids.items() if value)
        if self.stages_ms:
            fields["stages_ms"] = {name: round(value, 3) for name, value in self.stages_ms.items()}
        return fields


class Logger:
    """Writes one JSON line per event: its fields, then event, level and timestamp. Below its threshold it does nothing.

    Our own thirty lines because importing structlog brings rich and pygments: a third of what numpy and litestar take together, in every cold start.
    """

    def __init__(self, threshold: int, stream: Any) -> None:
        self._threshold, self._stream = threshold, stream

    def debug(self, event: str, **fields: Any) -> None:
        self._write(logging.DEBUG, "debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._write(logging.INFO, "info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write(logging.WARNING, "warning", event, fields)

    def error(self, event: str, *, exc_info: BaseException | None = None, **fields: Any) -> None:
        """exc_info: a failure whose traceback belongs to the event. Its message does only if it is ours, or at level debug: what other
        libraries say of a value they cannot take often quotes it."""
        if exc_info is not None:
            fields["exception"] = _described(exc_info, with_message=self._threshold <= logging.DEBUG)
        self._write(logging.ERROR, "error", event, fields)

    def critical(self, event: str, **fields: Any) -> None:
        self._write(logging.CRITICAL, "critical", event, fields)

    def _write(self, rank: int, level: str, event: str, fields: dict[str, Any]) -> None:
        if rank < self._threshold:
            return
        stamp = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        line = msgspec.json.encode({**fields, "event": event, "level": level, "timestamp": stamp}, enc_hook=str).decode()
        print(line, file=self._stream, flush=True)


def _described(error: BaseException, *, with_message: bool) -> str:
    """The places that the failure and its causes passed, innermost last."""
    if with_message:
        return "".join(traceback.format_exception(error)).rstrip()
    parts = []
    seen: BaseException | None = error
    while seen is not None:
        lines = [f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}' for frame in traceback.extract_tb(seen.__traceback__)]
        kind = type(seen)
        said = f"{kind.__module__}.{kind.__qualname__}" + (f": {seen}" if isinstance(seen, EngineError) else "")
        parts.append("\n".join([*lines, said]))
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return "\n\nwhich was caused by\n\n".join(parts)


def make_logger(level: str, *, stream: Any = None) -> Logger:
    """A logger for one process; independent of logging's global configuration, so tests and Lambda may have their own."""
    threshold = LEVELS.get(level.strip().lower().partition(",")[0].partition("=")[2] or level.strip().lower(), logging.INFO)
    return Logger(threshold, stream or sys.stdout)
