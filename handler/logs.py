"""The log: JSON lines on standard output, one for each request and a few for the life of the process.

A line carries only what is named in RequestRecord: never a body, vector, text, header, cookie or key. Callers: app.py, server.py.
"""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
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
    trace_id: str | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)
    facts: dict[str, int] = field(default_factory=dict)
    """Counts of the search or write: queries, documents, candidates, rounds, requests, bytes."""

    def line(self, ms: float) -> dict[str, Any]:
        """The event's fields; what is not known is left out."""
        named = ("request_id", "method", "route", "status", "index", "generation", "key_id", "error_code", "trace_id")
        fields: dict[str, Any] = {name: value for name in named if (value := getattr(self, name)) not in (None, "")}
        fields["ms"] = round(ms, 3)
        fields.update(self.facts)
        if self.stages_ms:
            fields["stages_ms"] = {name: round(value, 3) for name, value in self.stages_ms.items()}
        return fields


def trace_id_of(traceparent: str | None) -> str | None:
    """The trace id of a W3C traceparent header, None if it is not one."""
    matched = _TRACEPARENT.fullmatch(traceparent or "")
    return matched[1] if matched else None


def make_logger(level: str, *, stream: Any = None) -> Any:
    """A structlog logger for one process; independent of logging's global configuration, so tests and Lambda may have their own."""
    threshold = LEVELS.get(level.strip().lower().partition(",")[0].partition("=")[2] or level.strip().lower(), logging.INFO)
    return structlog.wrap_logger(
        structlog.PrintLogger(stream or sys.stdout),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_to_json),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        cache_logger_on_first_use=True,
    )


def _to_json(event: Any, **_: Any) -> str:
    return msgspec.json.encode(event, enc_hook=str).decode()
