"""The log: JSON lines on standard output, one for each request and a few for the life of the process.

A line carries only what is named in RequestRecord: never a body, vector, text, header, cookie or key. Callers: app.py, server.py.
docs/logging.md lists the fields; a test compares.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import msgspec

from engine.errors import EngineError
from handler import tracing

if TYPE_CHECKING:
    from handler.index_facts import IndexFacts

_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029]")
LEVELS = {"trace": logging.DEBUG, "debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "warning": logging.WARNING}
LEVELS |= {"error": logging.ERROR, "critical": logging.CRITICAL, "off": logging.CRITICAL}


class RequestRecord(msgspec.Struct):
    """What is known of one request, filled in on its way; times in milliseconds."""

    request_id: str
    method: str
    route: str = ""
    status: int = 0
    index: str | None = None
    generation: int | None = None
    key_id: str | None = None
    error_code: str | None = None
    facts: dict[str, int] = msgspec.field(default_factory=dict)
    """Counts of the search or write: queries, documents, candidates, rounds, requests, bytes."""
    usd: float = 0.0
    """List price of what was asked of the store."""
    trace: tracing.Trace | None = None
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
    """Lines at or above a threshold, written by structlog: the event's fields, then event, level and timestamp; inside a request, whose.

    structlog is imported with the first line that is written, not with the process: a function's cold start does without it.
    """

    def __init__(self, threshold: int, stream: Any) -> None:
        self._threshold, self._stream = threshold, stream

    def debug(self, event: str, **fields: Any) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """exc_info, an exception: a failure whose traceback belongs to the event. Its message does only if it is ours, or at level debug: what
        other libraries say of a value they cannot take often quotes it."""
        self._write(logging.ERROR, event, fields)

    def critical(self, event: str, **fields: Any) -> None:
        self._write(logging.CRITICAL, event, fields)

    def _write(self, rank: int, event: str, fields: dict[str, Any]) -> None:
        if rank >= self._threshold:
            self._lines.log(rank, event, **fields)

    @cached_property
    def _lines(self) -> Any:
        structlog = _import_structlog()
        processors = structlog.processors
        return structlog.wrap_logger(
            structlog.PrintLogger(self._stream),
            wrapper_class=structlog.make_filtering_bound_logger(self._threshold),
            processors=[
                _of_its_request,
                processors.add_log_level,
                processors.TimeStamper(fmt="iso", utc=True),
                processors.ExceptionRenderer(partial(_described, with_message=self._threshold <= logging.DEBUG)),
                processors.JSONRenderer(serializer=_json),
            ],
        ).bind()


def _import_structlog() -> Any:
    """structlog without the pretty printers that it would import as well if they are there, and which write no JSON: 10 ms instead of 70
    (benchmarks/observing.py), as litestar brings rich."""
    absent = [name for name in ("rich", "better_exceptions") if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails, which structlog takes
    try:
        import structlog
    finally:
        for name in absent:
            del sys.modules[name]
    return structlog


def _of_its_request(logger: Any, method: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A line that is written while a request is served says of which, whoever writes it."""
    trace = tracing.current.get()
    if trace is not None:
        for name, value in (("request_id", trace.request_id), ("trace_id", trace.trace_id)):
            if value:
                fields.setdefault(name, value)
    return fields


def _json(fields: dict[str, Any], **ignored: Any) -> str:
    return one_line(msgspec.json.encode(fields, enc_hook=str).decode())


def one_line(text: str) -> str:
    """JSON with those characters escaped as well that end a line or command a terminal: it asks for the ones below U+0020 only."""
    return text if text.isascii() and "\x7f" not in text else _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _described(failure: tuple[Any, BaseException, Any], *, with_message: bool) -> str:
    """The places that the failure and its causes passed, innermost last."""
    error = failure[1]
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
