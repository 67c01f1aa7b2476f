"""What a size of index needs: memory, ephemeral storage, milliseconds, queries per second. The table of docs/sizing.md.

    python -m benchmarks.sizing [--work FOLDER] [--sizes 1000,10000,100000:60] [--vectors FOLDER ...] [--nbits 4,2,1] [--json FILE] [--blas]

A size is documents, or documents:tokens a document (160 if not given), of a synthetic collection (collections.py); --vectors adds real
ones. Indexes are built once, each in a process of its own, and kept under --work. Every line is measured in a fresh process: memory is that of
a process that read the index from a store that is not a local disk (nothing is mapped), through a disk cache; queries come from one client, then from
one or two threads without pause; cold is a Reader that knows nothing, behind a model of S3. --blas measures OPENBLAS_NUM_THREADS instead.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.cold_query import INDEX, ask
from benchmarks.collections import Geometry, load, synthetic
from benchmarks.run import build_apart, machine
from engine.config import ColdParams, SearchParams
from engine.index.reader import Reader
from engine.searcher import Searcher
from engine.store.cache import CachedStore
from engine.store.objects import open_store
from engine.store.wrappers import AroundStore

DELAYS = {"p50_s": 0.063, "p99_s": 0.2, "bytes_per_s": 80e6}
N_COLD = 15
K = 10


@dataclass(frozen=True)
class Line:
    """One index. Bytes are MiB. base: the process before it opens the index; peak: the most it ever had, queries included."""

    collection: str
    documents: int
    tokens: int
    nbits: int
    stored_mib: float
    bytes_per_token: float
    base_mib: float
    rss_mib: float
    peak_mib: float
    cache_mib: float
    load_s: float
    warm_p50_ms: float
    warm_p95_ms: float
    qps_1: float
    qps_2: float
    cold_p50_ms: float
    cold_gets: float
    cold_mb: float
    build_s: float
    build_tokens_per_s: float
    build_peak_mib: float


class RemoteStore(AroundStore):
    """A store whose objects are not files of this machine."""

    async def local_path(self, name: str) -> str | None:
        return None


def memory_mib(name: str) -> float:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    return 0.0


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / INDEX).rglob("*") if path.is_file())


class Warm:
    """An index in memory, and its event loop in a thread of its own."""

    def __init__(self, folder: Path, cache: Path | None, n_threads: int) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.executor = ThreadPoolExecutor(n_threads)
        self._folder, self._cache = folder, cache

    def open(self) -> float:
        """Seconds until everything is in memory."""
        started = time.perf_counter()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return time.perf_counter() - started

    async def _open(self) -> None:
        store: AroundStore = RemoteStore(open_store(str(self._folder)))
        cached = None
        if self._cache is not None:
            store = cached = CachedStore(store, str(self._cache), budget_bytes=8 << 30, cacheable=lambda name: "CURRENT" not in name)
        reader = Reader(store, memory_bytes=16 << 30, executor=self.executor)
        self._searcher, self._snapshot = Searcher(reader), await reader.snapshot(INDEX)
        await self._searcher.warm(self._snapshot)
        if cached is not None:
            await cached.settle()

    def search(self, query: np.ndarray) -> None:
        work = self._searcher.search(self._snapshot, [query], SearchParams(k=K), mode="warm")
        asyncio.run_coroutine_threadsafe(work, self._loop).result()


def queries_per_s(warm: Warm, queries: Sequence[np.ndarray], n_threads: int, seconds: float) -> tuple[float, float]:
    """Closed loop of so many clients: queries per second, p50 in ms."""
    spent: list[list[float]] = [[] for _ in range(n_threads)]
    deadline = time.perf_counter() + seconds

    def client(number: int) -> None:
        i = 31 * number
        while time.perf_counter() < deadline:
            began = time.perf_counter()
            warm.search(queries[i % len(queries)])
            spent[number].append(time.perf_counter() - began)
            i += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(n_threads)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [value for values in spent for value in values]
    return len(everything) / (time.perf_counter() - started), 1e3 * float(np.median(everything))


def measure(folder: Path, vectors_folder: Path, nbits: int, build: dict[str, float], seconds: float) -> Line:
    """One line, in this process."""
    vectors = load(vectors_folder, n_queries=200)
    queries = [vectors.query(i) for i in range(vectors.n_queries)]
    size = stored_bytes(folder)
    base = memory_mib("VmRSS")
    with tempfile.TemporaryDirectory() as cache:
        warm = Warm(folder, Path(cache), 2)
        load_s = warm.open()
        cache_mib = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file()) / 2**20
    rss = memory_mib("VmRSS")
    for query in queries[:10]:
        warm.search(query)
    spent = []
    for query in queries:
        began = time.perf_counter()
        warm.search(query)
        spent.append(time.perf_counter() - began)
    qps = [queries_per_s(warm, queries, n, seconds)[0] for n in (1, 2)]
    peak = memory_mib("VmHWM")
    store = open_store(str(folder))

    async def cold() -> list[dict[str, Any]]:
        return [await ask(store, queries[i], K, ColdParams(), DELAYS, seed=i) for i in range(N_COLD)]

    asked = asyncio.run(cold())
    rounds = [answer["rounds"] for answer in asked]
    return Line(
        collection=vectors.name,
        documents=vectors.n_documents,
        tokens=vectors.n_tokens,
        nbits=nbits,
        stored_mib=size / 2**20,
        bytes_per_token=size / vectors.n_tokens,
        base_mib=base,
        rss_mib=rss,
        peak_mib=peak,
        cache_mib=cache_mib,
        load_s=load_s,
        warm_p50_ms=1e3 * float(np.median(spent)),
        warm_p95_ms=1e3 * float(np.quantile(spent, 0.95)),
        qps_1=qps[0],
        qps_2=qps[1],
        cold_p50_ms=1e3 * float(np.median([answer["seconds"] for answer in asked])),
        cold_gets=float(np.mean([sum(one.n_requests for one in found) for found in rounds])),
        cold_mb=float(np.mean([sum(one.n_bytes for one in found) for found in rounds])) / 1e6,
        build_s=build["build_s"],
        build_tokens_per_s=build["tokens_per_s"],
        build_peak_mib=build["peak_mib"],
    )


def blas_line(folder: Path, vectors_folder: Path, seconds: float) -> dict[str, float]:
    """p50 and queries per second with 1 and 2 searches at a time, under the BLAS threads that the environment gave this process."""
    vectors = load(vectors_folder, n_queries=100)
    queries = [vectors.query(i) for i in range(vectors.n_queries)]
    warm = Warm(folder, None, 2)
    warm.open()
    queries_per_s(warm, queries, 2, 1.0)
    found = {"blas_threads": float(os.environ["OPENBLAS_NUM_THREADS"])}
    for n in (1, 2):
        found[f"qps_{n}"], found[f"p50_{n}_ms"] = queries_per_s(warm, queries, n, seconds)
    return found


# The parent


def vectors_of(size: str, work: Path) -> Path:
    """The folder of a synthetic collection, made if it is not there."""
    documents, _, tokens = size.partition(":")
    folder = work / f"synthetic-{documents}" if not tokens else work / f"synthetic-{documents}x{tokens}"
    if not (folder / "query_ids.json").exists():
        geometry = Geometry() if not tokens else replace(Geometry(), mean_length=float(tokens), longest=int(1.3 * float(tokens)))
        synthetic(int(documents), geometry=geometry, out=folder)
    return folder


def child(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "benchmarks.sizing", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment}).stdout


def table(lines: Sequence[Line]) -> Table:
    drawn = Table()
    heads = "collection|documents|tokens|bits|stored MiB|B/token|memory MiB|peak|cache MiB|load s|warm p50 ms|p95|QPS 1 / 2|cold p50 ms|GETs|MB|build s|build MiB"
    for head in heads.split("|"):
        drawn.add_column(head, justify="right")
    for n in lines:
        counts = [n.collection, f"{n.documents:,}", f"{n.tokens:,}", str(n.nbits), f"{n.stored_mib:.0f}", f"{n.bytes_per_token:.1f}"]
        memory = [f"{n.rss_mib:.0f}", f"{n.peak_mib:.0f}", f"{n.cache_mib:.0f}", f"{n.load_s:.1f}"]
        times = [f"{n.warm_p50_ms:.1f}", f"{n.warm_p95_ms:.1f}", f"{n.qps_1:.0f} / {n.qps_2:.0f}"]
        cold = [f"{n.cold_p50_ms:.0f}", f"{n.cold_gets:.1f}", f"{n.cold_mb:.1f}", f"{n.build_s:.0f}", f"{n.build_peak_mib:.0f}"]
        drawn.add_row(*counts, *memory, *times, *cold)
    return drawn


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizing", description="memory, storage and time by size of index")
    parser.add_argument("--work", type=Path, default=Path("data/benchmarks"), help="collections and indexes are kept here")
    parser.add_argument("--sizes", default="1000,10000", help="synthetic collections: documents, or documents:tokens a document")
    parser.add_argument("--vectors", type=Path, action="append", default=[], help="a folder of real vectors; may be given again")
    parser.add_argument("--nbits", default="4,2,1")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each throughput figure")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--blas", action="store_true", help="OPENBLAS_NUM_THREADS 1 and 2, with 1 and 2 searches at a time")
    parser.add_argument("--build-only", action="store_true", help="make collections and indexes, measure nothing")
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "VECTORS", "NBITS"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    a = parse(arguments)
    if a.child:
        folder, vectors, nbits = Path(a.child[0]), Path(a.child[1]), int(a.child[2])
        if a.blas:
            print(json.dumps(blas_line(folder, vectors, a.seconds)))
            return
        build = json.loads((folder.parent / f"{folder.name}.build.json").read_text())
        print(json.dumps(asdict(measure(folder, vectors, nbits, build, a.seconds))))
        return
    folders = [vectors_of(size, a.work) for size in a.sizes.split(",") if size] + a.vectors
    console, before = Console(width=max(220, Console().width)), machine()
    lines, blas = [], []
    for vectors in folders:
        for nbits in [int(n) for n in a.nbits.split(",")]:
            n_documents = len(np.load(vectors / "doclens.npy"))
            work = a.work / f"{vectors.name}-{n_documents}"
            work.mkdir(parents=True, exist_ok=True)
            build_apart(f"tartan-{nbits}", work, argparse.Namespace(vectors=vectors, work=a.work, documents=None))
            if a.build_only:
                continue
            task = ["--child", str(work / f"tartan-{nbits}"), str(vectors), str(nbits), "--seconds", str(a.seconds)]
            if a.blas:
                blas += [json.loads(child(*task, "--blas", OPENBLAS_NUM_THREADS=n, OMP_NUM_THREADS=n)) for n in ("1", "2")]
                console.print(blas[-2:])
            else:
                lines.append(Line(**json.loads(child(*task))))
                console.print(table(lines[-1:]))
    if a.build_only:
        return
    console.print(table(lines) if lines else blas, {"before": before, "after": machine()})
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(line) for line in lines] or blas
        a.json.write_text(json.dumps({"before": before, "after": machine(), "lines": rows}, indent=1))


if __name__ == "__main__":
    main()
