"""Trace context taken in, logged, handed on and answered; spans of a request as a collector gets them."""

from __future__ import annotations

import gzip
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from engine.store.objects import open_store
from handler import tracing
from handler.app import create_app
from handler.logs import make_logger
from handler.runtime import Runtime
from handler.settings import Settings

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{PARENT}-01"


def app_of(**settings: Any) -> tuple[httpx.AsyncClient, Runtime, io.StringIO]:
    runtime = Runtime(Settings(search_threads=1, **settings), store=open_store("memory://"))
    log = io.StringIO()
    runtime.__dict__["log"] = make_logger("info", stream=log)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(create_app(runtime=runtime)), base_url="http://server")  # type: ignore[arg-type]
    return client, runtime, log


def last(log: io.StringIO) -> dict[str, Any]:
    return json.loads(log.getvalue().splitlines()[-1])


# Context


async def test_a_trace_context_is_logged_and_answered_with_a_span_of_ours() -> None:
    api, _, log = app_of()
    answer = await api.get("/livez", headers={"traceparent": SAMPLED, "tracestate": "vendor=1"})
    line = last(log)
    assert (line["trace_id"], line["parent_id"]) == (TRACE, PARENT)
    assert re.fullmatch("[0-9a-f]{16}", line["span_id"])
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{line['span_id']}-01"


async def test_without_a_context_a_trace_begins_and_the_answer_has_no_new_header() -> None:
    api, _, log = app_of()
    answer = await api.get("/livez")
    assert re.fullmatch("[0-9a-f]{32}", last(log)["trace_id"])
    assert "parent_id" not in last(log)
    assert "traceresponse" not in answer.headers


@pytest.mark.parametrize(
    "header",
    [
        "", "nonsense", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01", f"00-{TRACE}-{PARENT}-01-more", f"00-{TRACE}-{PARENT}", f"00-{TRACE}-{PARENT}-01\n",
    ],
)  # fmt: skip
def test_a_header_that_breaks_the_standard_begins_a_new_trace(header: str) -> None:
    found = tracing.begin(header)
    assert found.trace_id != TRACE
    assert found.parent_id is None


def test_a_later_version_may_have_more_fields() -> None:
    assert tracing.begin(f"01-{TRACE}-{PARENT}-00-more").trace_id == TRACE


def test_a_caller_who_decided_on_sampling_is_followed() -> None:
    assert tracing.begin(SAMPLED, sample=0.0).is_sampled
    assert not tracing.begin(f"00-{TRACE}-{PARENT}-00", sample=1.0).is_sampled
    assert tracing.begin(None, sample=1.0).is_sampled
    assert not tracing.begin(None, sample=0.0).is_sampled


def test_a_call_made_within_a_request_carries_its_trace() -> None:
    assert tracing.outgoing_headers() == {}
    with tracing.continued({"traceparent": SAMPLED, "tracestate": "vendor=1", "x-request-id": "r1"}) as trace:
        sent = tracing.outgoing_headers()
    assert sent == {"traceparent": f"00-{TRACE}-{trace.span_id}-01", "tracestate": "vendor=1", "x-request-id": "r1"}
    with tracing.continued(sent) as inner:
        assert (inner.trace_id, inner.parent_id, inner.request_id) == (TRACE, trace.span_id, "r1")
    assert tracing.outgoing_headers() == {}


async def test_requests_side_by_side_keep_their_stages_apart() -> None:
    import asyncio

    async def work(name: str, n: int) -> dict[str, float]:
        with tracing.continued({}) as trace:
            for _ in range(n):
                with tracing.stage(name):
                    await asyncio.sleep(0.001)
            return trace.stages_ms

    one, other = await asyncio.gather(work("one", 3), work("other", 1))
    assert set(one) == {"one"}
    assert set(other) == {"other"}
    assert one["one"] >= 3.0


def test_a_stage_outside_a_request_is_just_run() -> None:
    with tracing.stage("nothing"):
        pass


# Spans, as a collector decodes them


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        self.n_refusals = 0
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        collector: Any = self.server
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        assert self.headers["content-type"] == "application/x-protobuf"
        message = ExportTraceServiceRequest.FromString(body)
        for resource in message.resource_spans:
            collector.resources.append({item.key: item.value.string_value for item in resource.resource.attributes})
            for scope in resource.scope_spans:
                collector.spans += scope.spans
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter", reason="needs the extra `otel`")
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


async def test_a_collector_gets_a_span_of_the_request_of_each_stage_and_of_each_call_to_the_store(collector: Collector) -> None:
    api, runtime, log = app_of(otlp_endpoint=collector.url)
    await api.post("/indices", json={"name": "a", "config": {}})
    await api.post("/indices/a/update", json={"documents": [{"embeddings": [[1.0, 0.0]]}], "metadata": [{"n": 1}]})
    began_ns = time.time_ns()
    body = {"queries": [{"embeddings": [[0.6, 0.8]]}]}
    assert (await api.post("/indices/a/search", json=body, headers={"traceparent": SAMPLED, "X-Request-ID": "r7"})).status_code == 200
    ended_ns = time.time_ns()
    runtime.close()
    line = last(log)
    spans = [span for span in collector.spans if span.trace_id.hex() == TRACE]
    (request,) = [span for span in spans if span.name == "search" and span.kind == 2]
    assert (request.span_id.hex(), request.parent_span_id.hex()) == (line["span_id"], PARENT)
    facts = {item.key: item.value for item in request.attributes}
    assert facts["request_id"].string_value == "r7"
    assert facts["status"].int_value == 200
    assert facts["index"].string_value == "a"
    parts = [span for span in spans if span is not request]
    assert {"open", "search", "flat", "store get_if_changed"} <= {span.name for span in parts}
    assert {span.parent_span_id for span in parts} == {request.span_id}
    for span in spans:
        slack_ns = 5_000_000  # two clocks
        assert began_ns - slack_ns <= span.start_time_unix_nano <= span.end_time_unix_nano <= ended_ns + slack_ns
    (call,) = [span for span in parts if span.name == "store get_if_changed"]
    assert call.kind == 3
    assert {item.key: item.value.string_value for item in call.attributes}["object"] == "a/CURRENT"
    assert collector.resources[0]["service.name"] == "tartan"


async def test_what_is_not_sampled_is_not_sent_and_a_failed_request_is_marked(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, runtime, _ = app_of(otlp_endpoint=collector.url, trace_sample=0.0)

    async def fail(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(runtime.reader, "snapshot", fail)
    await api.get("/livez")
    await api.get("/indices/a", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    await api.get("/indices/a", headers={"traceparent": SAMPLED})
    runtime.close()
    (span,) = [span for span in collector.spans if span.kind == 2]
    assert span.status.code == 2
    assert {item.key for item in span.attributes} >= {"error_code", "status"}
    assert "no" not in [item.value.string_value for item in span.attributes]


async def test_a_collector_that_is_away_disturbs_no_request() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter", reason="needs the extra `otel`")
    api, runtime, _ = app_of(otlp_endpoint="http://127.0.0.1:9")
    began_s = time.perf_counter()
    assert (await api.get("/livez")).status_code == 200
    runtime.close()
    assert time.perf_counter() - began_s < 8
