"""Where a request belongs: W3C trace context taken in, logged, handed on and answered; its stages timed; and spans of them, if wanted.

    Trace             who called, and the ids under which we work; the log's trace_id, span_id and parent_id
    current           the Trace of the request that runs in this context (tasks born in it inherit it)
    stage(name)       times a piece of the current request: for its log line, the metrics, and as a span
    outgoing_headers  what a call to another server or function carries on, so that its log lines and spans join ours
    Exporter          sends spans as OTLP over HTTP; needs the extra `otel`

Without an exporter no spans are kept, and without a request `stage` does nothing. The object store is not told: obstore sends the same
headers with every request, so a trace ends with our span of the call. Source: https://www.w3.org/TR/trace-context-2/.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_TRACESTATE = re.compile(r"[\x20-\x7e]{1,512}")
MAX_SPANS = 512
"""Spans kept of one request; a search of many segments, cold, makes about ten for each."""


class Span(msgspec.Struct):
    """A finished piece of work. Times are time.perf_counter's; `is_call` says that somebody else worked meanwhile."""

    name: str
    began_s: float
    ended_s: float
    is_call: bool = False
    facts: dict[str, str | int | float] = msgspec.field(default_factory=dict)


class Trace(msgspec.Struct):
    """One request as part of a trace. Ids are lower-case hexadecimal, 32 and 16 digits.

    parent_id    the caller's span; None if the trace begins here
    is_sampled   somebody keeps this trace
    state        the caller's `tracestate`, handed on as it is
    stages_ms    time by stage, summed up; the request's log line has it
    spans        None if nobody wants them
    conflicts    commits of ours that lost a race and were repeated
    """

    trace_id: str
    span_id: str
    parent_id: str | None = None
    is_sampled: bool = False
    state: str | None = None
    request_id: str | None = None
    stages_ms: dict[str, float] = msgspec.field(default_factory=dict)
    spans: list[Span] | None = None
    conflicts: int = 0

    @property
    def traceparent(self) -> str:
        """The header that names our span as parent."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"

    def add(self, span: Span) -> None:
        if self.spans is not None and len(self.spans) < MAX_SPANS:
            self.spans.append(span)


current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def begin(traceparent: str | None, tracestate: str | None = None, *, request_id: str | None = None, sample: float = 0.0) -> Trace:
    """The Trace of a request that came with these headers: a new one if there are none or they cannot be read.

    sample  share of the traces that begin here which are kept; a caller who decided is followed
    """
    matched = _TRACEPARENT.fullmatch(traceparent or "")
    if matched is None or not _is_valid(matched):
        return Trace(os.urandom(16).hex(), os.urandom(8).hex(), is_sampled=random.random() < sample, request_id=request_id)
    state = tracestate if tracestate and _TRACESTATE.fullmatch(tracestate) else None
    is_sampled = bool(int(matched[4], 16) & 1)
    return Trace(matched[2], os.urandom(8).hex(), matched[3], is_sampled, state, request_id)


def _is_valid(matched: re.Match[str]) -> bool:
    """Not the forbidden version, no id of zeros; more fields only in versions that may have them."""
    return matched[1] != "ff" and set(matched[2]) != {"0"} and set(matched[3]) != {"0"} and (matched[1] != "00" or not matched[5])


def outgoing_headers() -> dict[str, str]:
    """Headers for a call made on behalf of the current request: traceparent, tracestate, X-Request-ID; none outside a request."""
    trace = current.get()
    if trace is None:
        return {}
    given = {"traceparent": trace.traceparent, "tracestate": trace.state, "x-request-id": trace.request_id}
    return {name: value for name, value in given.items() if value}


@contextlib.contextmanager
def continued(headers: Mapping[str, str]) -> Iterator[Trace]:
    """Work in the trace that `headers` (of outgoing_headers, lower-case names) name: for workers that are called otherwise than by HTTP."""
    trace = begin(headers.get("traceparent"), headers.get("tracestate"), request_id=headers.get("x-request-id"))
    token = current.set(trace)
    try:
        yield trace
    finally:
        current.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Time a piece of the current request. Names come from code, never from a client: they are metrics labels."""
    trace = current.get()
    if trace is None:
        yield
        return
    began_s = time.perf_counter()
    try:
        yield
    finally:
        ended_s = time.perf_counter()
        trace.stages_ms[name] = trace.stages_ms.get(name, 0.0) + (ended_s - began_s) * 1000
        trace.add(Span(name, began_s, ended_s))


class Exporter:
    """Sends the spans of sampled requests as OTLP over HTTP, from a thread of its own, in batches.

    `exporter` replaces the one that OTEL_* variables and `endpoint` describe. Raises ImportError without the extra `otel`.
    What cannot be sent is dropped after the SDK's own retries; requests never wait. Importing the SDK takes a quarter of a second: make it before serving.
    """

    def __init__(self, endpoint: str, *, release: str = "", exporter: SpanExporter | None = None) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces")
        self._resource = Resource.create({"service.name": "tartan", "service.version": release})
        self._exporter = exporter
        self._processor = BatchSpanProcessor(exporter)

    def export(self, trace: Trace, name: str, began_s: float, ended_s: float, facts: Mapping[str, Any], *, is_failed: bool) -> None:
        """A finished request: its own span and one for each of its pieces. `facts` become attributes. Cost: 11 µs a span."""
        epoch_s = time.time() - time.perf_counter()
        own = Span(name, began_s, ended_s, facts=dict(facts))
        self._processor.on_end(self._span(trace, own, epoch_s, is_failed=is_failed, is_request=True))
        for span in trace.spans or []:
            self._processor.on_end(self._span(trace, span, epoch_s))

    def _span(self, trace: Trace, span: Span, epoch_s: float, *, is_failed: bool = False, is_request: bool = False) -> Any:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        def context(span_id: str, is_remote: bool) -> SpanContext:
            return SpanContext(int(trace.trace_id, 16), int(span_id, 16), is_remote, TraceFlags(TraceFlags.SAMPLED))

        if is_request:
            own, parent = context(trace.span_id, False), context(trace.parent_id, True) if trace.parent_id else None
        else:
            own, parent = context(os.urandom(8).hex(), False), context(trace.span_id, False)
        return ReadableSpan(
            span.name,
            context=own,
            parent=parent,
            resource=self._resource,
            attributes=span.facts,
            kind=SpanKind.SERVER if is_request else SpanKind.CLIENT if span.is_call else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR if is_failed else StatusCode.UNSET),
            start_time=round((span.began_s + epoch_s) * 1e9),
            end_time=round((span.ended_s + epoch_s) * 1e9),
            instrumentation_scope=InstrumentationScope("tartan"),
        )

    def flush(self) -> None:
        """Send what waits."""
        self._processor.force_flush()

    def close(self, wait_s: float = 2.0) -> None:
        """Send what waits, and end the thread. What a collector that is away would keep waiting for longer is dropped."""
        closing = threading.Thread(target=self._processor.shutdown, daemon=True)
        closing.start()
        closing.join(wait_s)
        self._exporter.shutdown()  # ends the pause before another try
        closing.join(wait_s)
