"""What watching costs: a log line, a metric, a span, a look at the host, a repetition for measured recall, the start of a maintenance child.

    python -m benchmarks.observing [--vectors FOLDER] [--work FOLDER] [--parts imports,calls,recall,child]

Prints one line a figure. imports are each of a new interpreter that has loaded the HTTP application, the least of five; calls are the median of five
runs of many; recall is of a collection's own queries (benchmarks/README.md says what FOLDER holds), and left out without one.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.collections import load
from benchmarks.tartan_engine import TartanEngine
from engine.store.base import Range
from handler import tracing
from handler.emf import Emf
from handler.host import look
from handler.logs import RequestRecord, make_logger
from handler.metrics import Metrics
from handler.observed import ObservedStore
from handler.recall_sampler import EFFORT, EFFORT_PROBE

_IMPORT = """
import sys, time
import handler.app
began = time.process_time()
{}
print(time.process_time() - began)
"""
_IMPORTS = {
    "structlog as the first log line imports it": "from handler.logs import _import_structlog; _import_structlog()",
    "structlog with rich": "import structlog",
    "prometheus_client": "import prometheus_client",
    "OpenTelemetry's SDK and exporter": "import opentelemetry.sdk.trace.export, opentelemetry.exporter.otlp.proto.http.trace_exporter",
}


def say(what: str, value: float, unit: str) -> None:
    print(f"{what:<64} {value:8.1f} {unit}", flush=True)


def imports() -> None:
    for what, code in _IMPORTS.items():
        runs = [subprocess.run([sys.executable, "-c", _IMPORT.format(code)], capture_output=True, text=True, check=True) for _ in range(5)]
        say(f"import of {what}", min(float(run.stdout) for run in runs) * 1e3, "ms of CPU")


def each_us(work: Callable[[], object], n: int) -> float:
    """Microseconds of one call."""
    runs = []
    for _ in range(5):
        began_s = time.perf_counter()
        for _ in range(n):
            work()
        runs.append((time.perf_counter() - began_s) / n * 1e6)
    return statistics.median(runs)


def calls() -> None:
    record = _record()
    line = record.line(14.2)
    say("a request's line put together", each_us(lambda: record.line(14.2), 2000), "µs")
    say("embedded metrics of it", each_us(lambda: Emf("Tartan").fields("search", record, 0.0142), 2000), "µs")
    logger = make_logger("info", stream=io.StringIO())
    say("written as JSON", each_us(lambda: logger.info("request", **line), 2000), "µs")
    quiet = make_logger("warning", stream=io.StringIO())
    say("not written (level warning)", each_us(lambda: quiet.info("request", **line), 2000), "µs")
    metrics = Metrics(release="r")
    say("metrics of an answer", each_us(lambda: metrics.answered("search", 200, 0.0142, usd=4e-7), 2000), "µs")
    stages = record.stages_ms
    say("metrics of a search", each_us(lambda: metrics.searched("x", "vectors", 1, stages, record.facts), 1000), "µs")
    say("a scrape", each_us(metrics.render, 20) / 1000, "ms")
    say("a look at the host", each_us(look, 200), "µs")
    _spans(record, line)
    asyncio.run(_store_calls())


def _record() -> RequestRecord:
    facts = {"queries": 1, "candidates": 4096, "reranked": 256, "tokens": 31040, "cold_segments": 0, "rounds": 1, "requests": 1, "bytes": 0}
    record = RequestRecord(
        "5b0d0c1e-54d7-4d9b-a4d1-1f4f0a3f7d55", "POST", "/indices/{name}/search", 200, "papers", 7, facts=facts, usd=4e-7
    )
    record.trace = tracing.begin(None, sample=1.0)
    record.trace.stages_ms.update(open=1.9, centroids=0.7, rank=1.6, exact=8.8, total=11.4, search=11.5)
    return record


def _spans(record: RequestRecord, line: dict[str, object]) -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    trace, n = record.trace, 16
    assert trace is not None
    trace.spans = [tracing.Span("store range", 0.0, 0.1, is_call=True, facts={"object": "x", "requests": 1}) for _ in range(n - 1)]
    exporter = tracing.Exporter("http://127.0.0.1:1", exporter=InMemorySpanExporter())
    facts = {key: value for key, value in line.items() if isinstance(value, (str, int, float))}
    say("a span", each_us(lambda: exporter.export(trace, "search", 0.0, 1.0, facts, is_failed=False), 50) / n, "µs")
    exporter.close()


class _Instant:
    """A store that answers at once."""

    async def get_ranges(self, name: str, ranges: list[Range]) -> list[bytes]:
        return []


async def _store_calls() -> None:
    inner = _Instant()
    names = ("neither metrics nor spans", "metrics", "metrics and a span")
    bare = await _each_us(lambda: inner.get_ranges("x", []))
    for what, metrics, is_traced in zip(names, (None, Metrics(), Metrics()), (False, False, True), strict=True):
        store = ObservedStore(inner, metrics)  # type: ignore[arg-type]
        trace = tracing.begin(None, sample=1.0)
        trace.spans = [] if is_traced else None
        token = tracing.current.set(trace)
        say(f"a store call observed, {what}", await _each_us(lambda store=store: store.get_ranges("x", [])) - bare, "µs")  # type: ignore[misc]
        tracing.current.reset(token)


async def _each_us(work: Callable[[], Awaitable[object]], n: int = 400) -> float:
    runs = []
    for _ in range(5):
        began_s = time.perf_counter()
        for _ in range(n):
            await work()
        runs.append((time.perf_counter() - began_s) / n * 1e6)
    return statistics.median(runs)


def recall(folder: Path, work: Path | None) -> None:
    """CPU of the repeated search, as recall_sampler.py makes it."""
    vectors = load(folder, n_queries=50)
    with tempfile.TemporaryDirectory() as made:
        engine = TartanEngine(work or Path(made))
        engine.build(vectors)
        for what, params in (("a search", {}), ("its repetition", {"n_probe": EFFORT_PROBE, "n_candidates": EFFORT, "n_rerank": EFFORT})):
            if params:
                engine.configure(**params)
            spent = []
            for query in map(vectors.query, range(vectors.n_queries)):
                began_s = time.process_time()
                engine.search(query, 10)
                spent.append(time.process_time() - began_s)
            say(f"{what}, {vectors.n_documents:,} documents, {vectors.n_tokens:,} tokens", statistics.median(spent) * 1e3, "ms of CPU")


def child() -> None:
    """A maintenance child that is given nothing to do."""
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for _ in range(5):
            before = os.times()
            environment = {**os.environ, "TARTAN_INDEX_DIR": folder}
            subprocess.run([sys.executable, "-m", "handler.maintenance"], stdin=subprocess.DEVNULL, env=environment, check=True)
            after = os.times()
            runs.append(after.children_user + after.children_system - before.children_user - before.children_system)
    say("start and end of a maintenance child", min(runs) * 1e3, "ms of CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vectors", type=Path, help="collection for the part recall")
    parser.add_argument("--work", type=Path, help="folder that keeps its index")
    parser.add_argument("--parts", default="imports,calls,recall,child")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if "imports" in parts:
        imports()
    if "calls" in parts:
        calls()
    if "recall" in parts and options.vectors is not None:
        recall(options.vectors, options.work)
    if "child" in parts:
        child()


if __name__ == "__main__":
    main()
