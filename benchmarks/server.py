"""The HTTP server against the engine alone, on one machine in one run: throughput, overhead, adds, writing beside reading, memory.

    python -m benchmarks.server --vectors FOLDER [--nbits 4] [--clients 8] [--seconds 8] [--parts throughput,overhead,...]
                                [--work FOLDER] [--json FILE] [--label TEXT]

Parts, each on a real server process (granian, one worker, directory store, default settings, log lines thrown away):

    throughput   searches a second of the engine in this process with two threads, and of a closed loop of clients through the server, in turns
    overhead     one client: a request's time less the engine's time for the same query, query by query
    adds         64 documents of 150 tokens, against the same object-store writes without anything else, for small and large indices
    ingest       search latency while 50 documents a second are added, against the same without
    compaction   search latency while a backlog of such documents is compacted as the server does it, against the same without
    memory       resident memory of the server: idle, and with the index in memory

A search is 32 tokens x D in base64 (a collection's query repeated or cut to 32), strong consistency, top 10 with metadata.

The load generator shares the cores with what it measures. Its CPU is counted out: of `cores x wall` seconds it used `cpu` (its process's user
and system time, measured over the loop), so the server is credited with `searches / (wall - cpu / cores)`. Latencies are as they were seen.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.collections import Vectors, load
from benchmarks.tartan_engine import VectorsSource
from engine.config import IndexConfig, SearchParams
from engine.errors import NotFound
from engine.format import names
from engine.index.bulk import Block, BulkBuild
from engine.index.commit import create
from engine.index.reader import Reader
from engine.searcher import Searcher
from engine.store.base import ObjectStore
from engine.store.objects import StoreOptions, open_store
from handler.settings import Settings, child_environment

INDEX = "benchmark"
TOP_K = 10
QUERY_TOKENS = 32
N_THREADS = 2
ADD_DOCUMENTS, ADD_TOKENS = 64, 150
SMALL, LARGE, SHORT_TOKENS = 1_000, 100_000, 8
INGEST_PER_S, INGEST_BATCH = 50, 10
TURNS = 3
S3_MS = (20, 60)
"""A PUT to S3 takes about as long."""
_WORDS = [
    "warp",
    "weft",
    "loom",
    "shuttle",
    "heddle",
    "selvage",
    "bobbin",
    "twill",
    "tartan",
    "sett",
    "yarn",
    "wool",
    "dye",
    "spool",
    "reed",
    "treadle",
]


# The index


class WithFields(VectorsSource):
    """A source whose documents have a title, a year and an abstract of about 300 characters."""

    def blocks(self, first_document: int) -> Iterator[Block]:
        start = first_document
        for block in super().blocks(first_document):
            yield Block(block.tokens, block.offsets, [fields_of(start + n) for n in range(len(block))])
            start += len(block)


def fields_of(number: int) -> dict[str, Any]:
    words = np.random.default_rng(number).choice(_WORDS, 50).tolist()
    return {"title": f"document {number} of {words[0]} and {words[1]}", "year": 1990 + number % 35, "abstract": " ".join(words)}


async def build(folder: Path, source: Any, nbits: int) -> None:
    """Build `INDEX` in a folder unless it is there."""
    store = open_store(str(folder))
    reader = Reader(store)
    with contextlib.suppress(NotFound):
        if (await reader.snapshot(INDEX)).n_documents:
            return
    await create(store, INDEX, IndexConfig(nbits=nbits))
    await BulkBuild(reader, INDEX, source).run()


class ShortDocuments:
    """A source of random documents of SHORT_TOKENS tokens: only their number matters."""

    def __init__(self, n_documents: int, dim: int) -> None:
        self.n_documents, self.n_tokens = n_documents, n_documents * SHORT_TOKENS
        self.fingerprint, self._dim = f"short-{n_documents}-{dim}", dim

    def sample(self, n_tokens: int) -> np.ndarray:
        return self._tokens(min(n_tokens, self.n_tokens, 100_000) // SHORT_TOKENS, 1)

    def blocks(self, first_document: int) -> Iterator[Block]:
        for start in range(first_document, self.n_documents, 2000):
            n = min(2000, self.n_documents - start)
            yield Block(
                self._tokens(n, start + 2), np.arange(n + 1) * SHORT_TOKENS, [{"title": f"t{start + i}", "year": i} for i in range(n)]
            )

    def _tokens(self, n: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((n * SHORT_TOKENS, self._dim), dtype=np.float32)


@contextlib.contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """A copy of an index folder on the same file system, so that parts that write leave the built one alone."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        copy = Path(temporary) / "indices"
        shutil.copytree(folder, copy)
        yield copy


def queries_of(vectors: Vectors) -> list[np.ndarray]:
    """float32 (QUERY_TOKENS, D) each, tokens repeated or cut."""
    return [np.ascontiguousarray(np.resize(vectors.query(i), (QUERY_TOKENS, vectors.dim))) for i in range(vectors.n_queries)]


# The server


_SERVE = """
import sys
from handler.settings import Settings
from handler.server import serve

settings = Settings.from_environment()
sys.exit(serve(settings.host, settings.port, settings, settings.workers))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server process over a folder."""

    def __init__(self, folder: Path | str, *, environment: dict[str, str] | None = None, **settings: Any) -> None:
        self.settings = Settings(
            **{"index_dir": str(folder), "host": "127.0.0.1", "port": free_port(), "compact": False, "drain_s": 0.0, **settings}
        )
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TARTAN_", "AWS_"))}
        environment = {**kept, **self.settings.to_environment(), **(environment or {})}
        command = [sys.executable, "-c", _SERVE]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server did not start")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            return Connection(self.settings.port).ask(request("GET", "/readyz"))[0] == 200
        except OSError:
            return False

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def memory(self) -> dict[str, float]:
        """MiB of the process and its workers together: resident, of it anonymous and mapped files, and proportional (shared pages once)."""
        total = dict.fromkeys(("Rss", "Pss", "RssAnon", "RssFile"), 0.0)
        for pid in [self.process.pid, *_children(self.process.pid)]:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text() + Path(f"/proc/{pid}/status").read_text()
            for line in lines.splitlines():
                name, _, value = line.partition(":")
                if name in total:
                    total[name] += int(value.split()[0]) / 1024
        return {name: round(value, 1) for name, value in total.items()}

    def cpu_s(self) -> float:
        """User and system seconds of the process and its workers."""
        ticks = 0
        for pid in [self.process.pid, *_children(self.process.pid)]:
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found + [grandchild for child in found for grandchild in _children(child)]


# The client: a socket and bytes made beforehand, so that little CPU goes into asking


def request(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Connection:
    """One connection, kept alive."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, message: bytes) -> tuple[int, bytes]:
        """Status and body."""
        self._socket.sendall(message)
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._receive()
        head = data[:end].lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        chunks, missing = [data[end + 4 :]], length - (len(data) - end - 4)
        while missing > 0:
            chunks.append(self._receive())
            missing -= len(chunks[-1])
        return int(head[9:12]), b"".join(chunks)

    def _receive(self) -> bytes:
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server hung up")
        return data


def vectors_body(matrix: np.ndarray) -> dict[str, Any]:
    return {"embeddings_b64": base64.b64encode(np.ascontiguousarray(matrix, "<f4").tobytes()).decode(), "shape": list(matrix.shape)}


def search_request(query: np.ndarray) -> bytes:
    body = {"queries": [vectors_body(query)], "params": {"top_k": TOP_K}}
    return request("POST", f"/indices/{INDEX}/search", json.dumps(body).encode())


def add_request(vectors: Vectors, first: int, n_documents: int) -> bytes:
    """Documents of ADD_TOKENS tokens each, cut out of the collection, with metadata."""
    start = first * ADD_TOKENS % (vectors.n_tokens - n_documents * ADD_TOKENS)
    tokens = np.asarray(vectors.tokens[start : start + n_documents * ADD_TOKENS], np.float32).reshape(n_documents, ADD_TOKENS, -1)
    body = {"documents": [vectors_body(matrix) for matrix in tokens], "metadata": [fields_of(first + n) for n in range(n_documents)]}
    return request("POST", f"/indices/{INDEX}/update", json.dumps(body).encode())


@dataclass
class Load:
    """What a closed loop saw: latencies in ms, the wall and the generator's CPU seconds, errors, and the first answer to each query."""

    latencies_ms: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    cpu_s: float = 0.0
    n_errors: int = 0
    answers: dict[int, bytes] = field(default_factory=dict)

    def merge(self, other: Load) -> None:
        self.latencies_ms += other.latencies_ms
        self.wall_s += other.wall_s
        self.cpu_s += other.cpu_s
        self.n_errors += other.n_errors
        self.answers |= other.answers

    @property
    def per_s(self) -> float:
        return len(self.latencies_ms) / self.wall_s

    @property
    def per_s_counted_out(self) -> float:
        return len(self.latencies_ms) / (self.wall_s - self.cpu_s / n_cores())

    def percentiles(self) -> dict[str, float]:
        return {f"p{n}_ms": round(float(np.percentile(self.latencies_ms, n)), 2) for n in (50, 95, 99)}


def n_cores() -> int:
    return len(os.sched_getaffinity(0))


def closed_loop(port: int, requests: Sequence[bytes], n_clients: int, is_over: Callable[[float], bool]) -> Load:
    """Each client asks its next query as soon as the last is answered, until `is_over(seconds since the start)`."""
    loads = [Load() for _ in range(n_clients)]
    began, cpu = time.perf_counter(), time.process_time()

    def client(number: int) -> None:
        connection, own, turn = Connection(port), loads[number], 0
        while not is_over(time.perf_counter() - began):
            query = (number + turn * n_clients) % len(requests)
            asked = time.perf_counter()
            status, body = connection.ask(requests[query])
            own.latencies_ms.append((time.perf_counter() - asked) * 1000)
            own.n_errors += status != 200
            own.answers.setdefault(query, body)
            turn += 1

    with ThreadPoolExecutor(n_clients) as pool:
        list(pool.map(client, range(n_clients)))
    total = Load()
    for own in loads:
        total.merge(own)
    total.wall_s, total.cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return total


def for_seconds(seconds: float) -> Callable[[float], bool]:
    return lambda elapsed: elapsed >= seconds


# The engine alone


class Alone:
    """The engine in this process: one event loop, N_THREADS threads for arithmetic, everything in memory, one snapshot held."""

    def __init__(self, folder: Path, memory_bytes: int) -> None:
        self._executor = ThreadPoolExecutor(N_THREADS)
        self._reader = Reader(open_store(str(folder)), memory_bytes=memory_bytes, executor=self._executor)
        self._loop = asyncio.new_event_loop()
        self._searcher = Searcher(self._reader)
        self._params = SearchParams(k=TOP_K)
        self._snapshot = self._loop.run_until_complete(self._open())

    async def _open(self) -> Any:
        snapshot = await self._reader.snapshot(INDEX)
        await self._searcher.warm(snapshot)
        return snapshot

    def search_ms(self, query: np.ndarray) -> tuple[list[int], float]:
        """(ids, milliseconds) of one search, nothing else going on."""
        return self._loop.run_until_complete(self._search_ms(query))

    async def _search_ms(self, query: np.ndarray) -> tuple[list[int], float]:
        began = time.perf_counter()
        answers = await self._searcher.search(self._snapshot, [query], self._params)
        return answers[0].ids.tolist(), (time.perf_counter() - began) * 1000

    def closed_loop(self, queries: Sequence[np.ndarray], n_tasks: int, seconds: float) -> Load:
        """As many searches in flight as there are clients, so that both threads always have one."""
        return self._loop.run_until_complete(self._closed_loop(queries, n_tasks, seconds))

    async def _closed_loop(self, queries: Sequence[np.ndarray], n_tasks: int, seconds: float) -> Load:
        found = Load()
        began = time.perf_counter()

        async def task(number: int) -> None:
            turn = 0
            while time.perf_counter() - began < seconds:
                _, ms = await self._search_ms(queries[(number + turn * n_tasks) % len(queries)])
                found.latencies_ms.append(ms)
                turn += 1

        await asyncio.gather(*(task(number) for number in range(n_tasks)))
        found.wall_s = time.perf_counter() - began
        return found


# Parts


@dataclass
class Bench:
    """What the parts share."""

    vectors: Vectors
    work: Path
    nbits: int
    n_clients: int
    seconds: float

    def __post_init__(self) -> None:
        self.queries = queries_of(self.vectors)
        self.requests = [search_request(query) for query in self.queries]
        self.folder = self.work / f"{self.vectors.name}-{self.vectors.n_documents}-{self.nbits}bit"

    def build(self) -> None:
        asyncio.run(build(self.folder, WithFields(self.vectors), self.nbits))

    def build_short(self, n_documents: int) -> Path:
        folder = self.work / f"short-{n_documents}"
        asyncio.run(build(folder, ShortDocuments(n_documents, self.vectors.dim), self.nbits))
        return folder

    def warmed(self, server: Server) -> None:
        """Bring the index into the server's memory, and its code into its caches."""
        connection = Connection(server.settings.port)
        connection.ask(request("POST", f"/indices/{INDEX}/warm"))
        for message in self.requests[:20]:
            connection.ask(message)


def measure_throughput(bench: Bench) -> dict[str, Any]:
    with Server(bench.folder) as server:
        bench.warmed(server)
        alone = Alone(bench.folder, server.settings.memory_bytes)
        expected = [alone.search_ms(query)[0] for query in bench.queries]
        engine, http, served_cpu_s = Load(), Load(), 0.0
        for _ in range(TURNS):
            engine.merge(alone.closed_loop(bench.queries, bench.n_clients, bench.seconds / TURNS))
            cpu = server.cpu_s()
            http.merge(closed_loop(server.settings.port, bench.requests, bench.n_clients, for_seconds(bench.seconds / TURNS)))
            served_cpu_s += server.cpu_s() - cpu
    found = {query: json.loads(body)["results"][0] for query, body in http.answers.items()}
    figures = http.percentiles()
    return {
        "engine searches/s": round(engine.per_s, 1),
        "server searches/s": round(http.per_s, 1),
        "server searches/s, generator counted out": round(http.per_s_counted_out, 1),
        "share of the engine's": round(http.per_s_counted_out / engine.per_s, 3),
        "share without counting out": round(http.per_s / engine.per_s, 3),
        "generator CPU, share of a core": round(http.cpu_s / http.wall_s, 3),
        "server CPU ms a search": round(served_cpu_s * 1000 / len(http.latencies_ms), 2),
        "errors": http.n_errors,
        **figures,
        "p99 / p50": round(figures["p99_ms"] / figures["p50_ms"], 2),
        "engine, same tasks": engine.percentiles(),
        "queries compared": len(found),
        "queries with the engine's ids": sum(result["document_ids"] == expected[query] for query, result in found.items()),
        "hits with metadata": all(row["title"] for result in found.values() for row in result["metadata"]),
    }


def measure_overhead(bench: Bench) -> dict[str, Any]:
    with Server(bench.folder) as server:
        bench.warmed(server)
        alone = Alone(bench.folder, server.settings.memory_bytes)
        connection = Connection(server.settings.port)
        n_queries = min(len(bench.queries), 100)
        engine_ms, http_ms = np.full(n_queries, np.inf), np.full(n_queries, np.inf)
        for _ in range(TURNS):
            for i in range(n_queries):
                engine_ms[i] = min(engine_ms[i], alone.search_ms(bench.queries[i])[1])
                asked = time.perf_counter()
                connection.ask(bench.requests[i])
                http_ms[i] = min(http_ms[i], (time.perf_counter() - asked) * 1000)
    return {
        "engine p50 ms": round(float(np.median(engine_ms)), 2),
        "through HTTP p50 ms": round(float(np.median(http_ms)), 2),
        "median overhead ms": round(float(np.median(http_ms - engine_ms)), 2),
        "request bytes": len(bench.requests[0]),
        "queries": n_queries,
        "rounds, the least counts": TURNS,
    }


def measure_adds(bench: Bench) -> dict[str, Any]:
    """Adds to both sizes and bare writes take turns, on a directory and on S3 over HTTP."""
    folders = {size: bench.build_short(size) for size in (SMALL, LARGE)}
    return {"directory": _adds(bench, folders, None), f"S3 over HTTP, {S3_MS[0]} to {S3_MS[1]} ms a request": _adds(bench, folders, S3_MS)}


@contextlib.contextmanager
def _slow_s3(folder: Path, delay_ms: tuple[int, int]) -> Iterator[str]:
    """The URL of a stand-in for S3 over a folder, in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.slow_s3", str(folder), str(port), *map(str, delay_ms)]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _adds(bench: Bench, folders: dict[int, Path], delay_ms: tuple[int, int] | None) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        copies = {size: stack.enter_context(copied(folder)) for size, folder in folders.items()}
        servers, stores = {}, {}
        for size, copy in copies.items():
            where, environment, options = str(copy), {}, StoreOptions()
            if delay_ms is not None:
                endpoint, where = stack.enter_context(_slow_s3(copy, delay_ms)), "s3://benchmark"
                environment = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "TARTAN_S3_ENDPOINT": endpoint}
                options = StoreOptions(endpoint=endpoint, region="us-east-1", access_key_id="key", secret_access_key="secret")
            servers[size] = stack.enter_context(Server(where, environment=environment))
            stores[size] = open_store(where, options)
        return _timed_adds(bench, servers, stores[SMALL])


def _timed_adds(bench: Bench, servers: dict[int, Server], store: ObjectStore) -> dict[str, Any]:
    connections = {size: Connection(server.settings.port) for size, server in servers.items()}
    taken: dict[int, list[float]] = {size: [] for size in servers}
    bare: list[float] = []
    rounds = 16
    loop = asyncio.new_event_loop()
    for turn in range(rounds + 2):
        message = add_request(bench.vectors, turn * ADD_DOCUMENTS, ADD_DOCUMENTS)
        for size, connection in connections.items():
            asked = time.perf_counter()
            status, body = connection.ask(message)
            taken[size].append((time.perf_counter() - asked) * 1000)
            if status != 202:
                raise SystemExit(f"an add was answered with {status}: {body[:200]!r}")
        bare.append(loop.run_until_complete(_bare_writes_ms(store)))
    medians = {size: statistics.median(times[2:]) for size, times in taken.items()}
    writes_ms = statistics.median(bare[2:])
    line: dict[str, Any] = {f"add to {size} documents, ms": round(ms, 2) for size, ms in medians.items()}
    return line | {
        "its object-store writes alone, ms": round(writes_ms, 2),
        "add / writes": round(medians[SMALL] / writes_ms, 2),
        "add less writes, ms": round(medians[SMALL] - writes_ms, 2),
        f"{LARGE} / {SMALL}": round(medians[LARGE] / medians[SMALL], 3),
        "request bytes": len(message),
        "rounds": rounds,
    }


async def _bare_writes_ms(store: ObjectStore) -> float:
    """What the newest generation of the small index wrote, written again under another name: all objects together, then CURRENT."""
    head = await store.get(names.current(INDEX))
    manifest = (await Reader(store).snapshot(INDEX)).manifest
    newest = manifest.segments[-1]
    parts = [(await store.get(names.segment(INDEX, newest.id))).data]
    if newest.metadata is not None:
        parts.append((await store.get(names.metadata(INDEX, newest.id))).data)
    parts.append(head.data)
    fresh = f"bare/{names.fresh_id()}"
    etag = await store.put_if_absent(f"{fresh}/CURRENT", head.data)
    began = time.perf_counter()
    await asyncio.gather(*(store.put_if_absent(f"{fresh}/{n}", data) for n, data in enumerate(parts)))
    await store.replace_if_unchanged(f"{fresh}/CURRENT", head.data, etag)
    return (time.perf_counter() - began) * 1000


def measure_ingest(bench: Bench) -> dict[str, Any]:
    """The same server and clients, first without writing, then with; the server compacts as it does by default."""
    found: dict[str, Any] = {}
    adds = [add_request(bench.vectors, n * INGEST_BATCH, INGEST_BATCH) for n in range(40)]
    for n_clients in (2, bench.n_clients):
        with copied(bench.folder) as folder, Server(folder, compact=True) as server:
            bench.warmed(server)
            port = server.settings.port
            before = closed_loop(port, bench.requests, n_clients, for_seconds(bench.seconds))
            with _ingest(port, adds) as ingested:
                during = closed_loop(port, bench.requests, n_clients, for_seconds(2 * bench.seconds))
        found[f"{n_clients} clients"] = _compared(before, during) | {
            "documents/s added": round(ingested["documents"] / ingested["seconds"], 1),
            "add p50 ms": round(statistics.median(ingested["ms"]), 1),
        }
    return found


@contextlib.contextmanager
def _ingest(port: int, messages: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """Batches at a steady pace from another thread, each when it is due or as soon as the last is acknowledged."""
    done: dict[str, Any] = {"documents": 0, "ms": [], "seconds": 0.0}
    stopping = threading.Event()

    def run() -> None:
        connection, began, sent = Connection(port), time.perf_counter(), 0
        while not stopping.wait(max(0.0, began + sent * INGEST_BATCH / INGEST_PER_S - time.perf_counter())):
            asked = time.perf_counter()
            if connection.ask(messages[sent % len(messages)])[0] != 202:
                raise SystemExit("an add failed")
            done["ms"].append((time.perf_counter() - asked) * 1000)
            sent += 1
            done["documents"], done["seconds"] = sent * INGEST_BATCH, time.perf_counter() - began

    writer = threading.Thread(target=run)
    writer.start()
    try:
        yield done
    finally:
        stopping.set()
        writer.join()


def _compared(before: Load, during: Load) -> dict[str, Any]:
    first, second = before.percentiles(), during.percentiles()
    return {
        "without": first,
        "with": second,
        "p95 ratio": round(second["p95_ms"] / first["p95_ms"], 2),
        "searches": len(during.latencies_ms),
        "errors": before.n_errors + during.n_errors,
    }


def measure_compaction(bench: Bench) -> dict[str, Any]:
    """A backlog is added; latency over the index with its backlog, then while a child compacts it as handler/maintenance.py has it done."""
    found: dict[str, Any] = {}
    adds = [add_request(bench.vectors, n * ADD_DOCUMENTS, ADD_DOCUMENTS) for n in range(16)]
    for n_clients in (2, bench.n_clients):
        with copied(bench.folder) as folder, Server(folder) as server:
            bench.warmed(server)
            connection = Connection(server.settings.port)
            for message in adds:
                connection.ask(message)
            bench.warmed(server)
            port = server.settings.port
            before = closed_loop(port, bench.requests, n_clients, for_seconds(bench.seconds))
            command = [sys.executable, "-m", "handler.maintenance"]
            environment = child_environment(server.settings)
            child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            assert child.stdin is not None
            child.stdin.write(f"compact {INDEX}\n".encode())
            child.stdin.close()
            began = time.perf_counter()
            during = closed_loop(port, bench.requests, n_clients, lambda _, child=child: child.poll() is not None)  # type: ignore[misc]
            took_s = time.perf_counter() - began
            after = closed_loop(port, bench.requests, n_clients, for_seconds(2.0))
        found[f"{n_clients} clients"] = _compared(before, during) | {
            "compaction s": round(took_s, 1),
            "compaction succeeded": child.returncode == 0,
            "afterwards": after.percentiles(),
        }
    return found


def measure_memory(bench: Bench) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as empty, Server(Path(empty)) as server:
        Connection(server.settings.port).ask(request("GET", "/health"))
        time.sleep(1)
        idle = server.memory()
    with Server(bench.folder) as server:
        bench.warmed(server)
        warm = server.memory()
        closed_loop(server.settings.port, bench.requests, bench.n_clients, for_seconds(3.0))
        loaded = server.memory()
        used = json.loads(Connection(server.settings.port).ask(request("GET", "/health"))[1])["memory_usage_bytes"] / 2**20
        limit = server.settings.memory_bytes / 2**20
    size = sum(path.stat().st_size for path in bench.folder.rglob("*") if path.is_file()) / 2**20
    return {
        "idle MiB": idle,
        "with the index MiB": warm,
        "after searches MiB": loaded,
        "growth MiB": round(loaded["Rss"] - idle["Rss"], 1),
        "growth of anonymous memory MiB": round(loaded["RssAnon"] - idle["RssAnon"], 1),
        "counted by the cache MiB": round(used, 1),
        "cache setting MiB": limit,
        "index on disk MiB": round(size, 1),
    }


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "throughput": measure_throughput,
    "overhead": measure_overhead,
    "adds": measure_adds,
    "ingest": measure_ingest,
    "compaction": measure_compaction,
    "memory": measure_memory,
}


# The report


def machine() -> dict[str, Any]:
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    )
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    return {"cpu": model, "cores": n_cores(), "load_before": [round(value, 2) for value in os.getloadavg()], **versions}


def _rows(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{name}: ")
        else:
            yield f"{prefix}{name}", str(value)


def show(report: dict[str, Any]) -> None:
    console = Console(width=120)
    console.print(json.dumps(report["machine"]))
    for part, figures in report["parts"].items():
        table = Table(title=part, title_justify="left")
        table.add_column("figure")
        table.add_column("value", justify="right")
        for row in _rows(figures):
            table.add_row(*row)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--documents", type=int)
    parser.add_argument("--nbits", type=int, default=4)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tartan-benchmark-server")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(load(given.vectors, n_documents=given.documents), given.work, given.nbits, given.clients, given.seconds)
    bench.build()
    report: dict[str, Any] = {"machine": machine(), "collection": bench.vectors.name, "documents": bench.vectors.n_documents, "parts": {}}
    for part in given.parts.split(","):
        report["parts"][part] = PARTS[part](bench)
    report["machine"]["load_after"] = [round(value, 2) for value in os.getloadavg()]
    if given.json:
        given.json.write_text(json.dumps(report, indent=2))
    show(report)


if __name__ == "__main__":
    main()
