"""Cold queries in a warm process: what each round asks for and takes, and what is found, beside the warm search.

    python -m benchmarks.cold_query --vectors FOLDER [--work FOLDER] [--nbits 4] [--queries 100] [--k 10,100] [--gets 8,16,24 --mb 6,8,10] [--json FILE]

The index is that of benchmarks/run.py under --work (built if it is not there). Every query has a Reader of its own, so nothing is known of
the index, not even CURRENT; the process is warm. The store is a directory behind DelayStore: requests, bytes and rounds are counts,
milliseconds are of the model (first byte p50 and p99, bandwidth of a connection) plus this machine's arithmetic.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.collections import Vectors, load
from benchmarks.run import build_apart, machine, true_answers
from engine.config import ColdParams, SearchParams
from engine.cost import Usage, prices
from engine.evaluate import ABSENT, percentiles, recall_at_k
from engine.index.reader import Reader
from engine.searcher import Searcher
from engine.store.base import ObjectStore
from engine.store.objects import open_store
from engine.store.wrappers import AroundStore, Call, DelayStore

T = TypeVar("T")
INDEX = "benchmark"
TRUTH_K = 100
ROUNDS = ("CURRENT", "cells", "records")


@dataclass(frozen=True)
class Asked:
    """One call of the store: when it began and ended, requests and bytes."""

    began_s: float
    ended_s: float
    n_requests: int
    n_bytes: int


class WatchedStore(AroundStore):
    """Remembers what it was asked, and when."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.asked: list[Asked] = []

    async def _around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        began_s = time.perf_counter()
        answer = await run()
        if call.n_requests:
            parts = answer if isinstance(answer, list) else [getattr(answer, "data", b"")]
            self.asked.append(Asked(began_s, time.perf_counter(), call.n_requests, sum(map(len, parts))))
        return answer

    def rounds(self) -> list[Asked]:
        """Calls that overlap in time, together."""
        found: list[Asked] = []
        for one in sorted(self.asked, key=lambda one: one.began_s):
            if found and one.began_s < found[-1].ended_s:
                last = found.pop()
                ended_s = max(last.ended_s, one.ended_s)
                one = Asked(last.began_s, ended_s, last.n_requests + one.n_requests, last.n_bytes + one.n_bytes)
            found.append(one)
        return found


@dataclass(frozen=True)
class Line:
    """Means over queries, milliseconds p50. round_ms and round_gets: by round. cpu_ms: CPU time of the process, which holds the arithmetic
    and this benchmark's own reading of files. usd_per_million: at 2 GB arm64 (engine/cost.py), duration p50."""

    k: int
    max_gets: int
    max_mb: float
    rounds: float
    gets: float
    mb: float
    p50_ms: float
    p95_ms: float
    round_ms: list[float]
    round_gets: list[float]
    round_mb: list[float]
    between_ms: float
    cpu_ms: float
    recall_10: float
    recall_100: float | None
    warm_recall_10: float
    warm_recall_100: float | None
    usd_per_million: float


async def ask(store: ObjectStore, query: np.ndarray, k: int, cold: ColdParams, delays: dict[str, float], seed: int) -> dict[str, Any]:
    """One query that knows nothing."""
    watched = WatchedStore(DelayStore(store, **delays, seed=seed))  # type: ignore[arg-type]
    reader = Reader(watched)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    snapshot = await reader.snapshot(INDEX)
    [answer] = await Searcher(reader, cold_params=cold).search(snapshot, [query], SearchParams(k=k), mode="cold")
    seconds, cpu = time.perf_counter() - began_s, time.process_time() - cpu_s
    return {"ids": answer.ids, "seconds": seconds, "cpu_s": cpu, "rounds": watched.rounds()}


async def measure(
    store: ObjectStore, vectors: Vectors, truth: np.ndarray, k: int, cold: ColdParams, delays: dict[str, float], warm: Sequence[np.ndarray]
) -> Line:
    """One line: all queries one after another. warm: the ids that the warm search finds."""
    answers = [await ask(store, vectors.query(i), k, cold, delays, seed=i) for i in range(vectors.n_queries)]
    n_rounds = max(len(answer["rounds"]) for answer in answers)
    by_round = [[answer["rounds"][n] for answer in answers if len(answer["rounds"]) > n] for n in range(n_rounds)]
    seconds = np.array([answer["seconds"] for answer in answers])
    spans = [[one.ended_s - one.began_s for one in asked] for asked in by_round]
    waited = np.array([sum(one.ended_s - one.began_s for one in answer["rounds"]) for answer in answers])
    p50_ms, p95_ms = (1e3 * percentiles(seconds, (50, 95))).tolist()
    gets = float(np.mean([sum(one.n_requests for one in answer["rounds"]) for answer in answers]))
    recalls = [recalls_of(truth, [answer["ids"] for answer in answers], k), recalls_of(truth, warm, k)]
    usage = Usage(n_gets=gets, seconds=p50_ms / 1e3, memory_mb=2048, invocations=1)
    return Line(
        k=k,
        max_gets=cold.max_gets + 1,
        max_mb=cold.max_bytes / 1e6,
        rounds=float(np.mean([len(answer["rounds"]) for answer in answers])),
        gets=gets,
        mb=float(np.mean([sum(one.n_bytes for one in answer["rounds"]) for answer in answers])) / 1e6,
        p50_ms=p50_ms,
        p95_ms=p95_ms,
        round_ms=[float(1e3 * np.median(span)) for span in spans],
        round_gets=[float(np.mean([one.n_requests for one in asked])) for asked in by_round],
        round_mb=[float(np.mean([one.n_bytes for one in asked])) / 1e6 for asked in by_round],
        between_ms=float(1e3 * np.median(seconds - waited)),
        cpu_ms=float(1e3 * np.median([answer["cpu_s"] for answer in answers])),
        recall_10=recalls[0][0],
        recall_100=recalls[0][1],
        warm_recall_10=recalls[1][0],
        warm_recall_100=recalls[1][1],
        usd_per_million=1e6 * usage.usd(prices("us-east-1")),
    )


async def warm_answers(store: ObjectStore, vectors: Vectors, k: int) -> list[np.ndarray]:
    """What a process that has the index in memory finds."""
    reader = Reader(store, memory_bytes=16 << 30)
    searcher, snapshot = Searcher(reader), await reader.snapshot(INDEX)
    found = []
    for i in range(vectors.n_queries):
        [answer] = await searcher.search(snapshot, [vectors.query(i)], SearchParams(k=k), with_rows=False, mode="warm")
        found.append(answer.ids)
    return found


def recalls_of(truth: np.ndarray, answers: Sequence[np.ndarray], k: int) -> tuple[float, float | None]:
    """recall@10, and recall@100 if so many were asked for."""
    found = np.full((len(answers), max(k, 10)), ABSENT, np.int64)
    for i, ids in enumerate(answers):
        found[i, : len(ids)] = ids
    return float(recall_at_k(truth, found, 10).mean()), float(recall_at_k(truth, found, 100).mean()) if k >= TRUTH_K else None


def table(lines: Sequence[Line], title: str) -> Table:
    drawn = Table(title=title)
    heads = "k|GETs allowed|MB allowed|rounds|GETs|MB|p50 ms|p95|rounds ms|between ms|CPU ms|R@10 cold/warm|R@100 cold/warm|$ per million"
    for head in heads.split("|"):
        drawn.add_column(head, justify="right")
    for n in lines:
        hundred = "" if n.recall_100 is None else f"{n.recall_100:.3f} / {n.warm_recall_100:.3f}"
        counts = [f"{n.rounds:.2f}", f"{n.gets:.1f}", f"{n.mb:.2f}", f"{n.p50_ms:.0f}", f"{n.p95_ms:.0f}"]
        waits = " + ".join(f"{ms:.0f}" for ms in n.round_ms)
        found = [f"{n.recall_10:.3f} / {n.warm_recall_10:.3f}", hundred, f"{n.usd_per_million:.1f}"]
        drawn.add_row(str(n.k), str(n.max_gets), f"{n.max_mb:.1f}", *counts, waits, f"{n.between_ms:.0f}", f"{n.cpu_ms:.0f}", *found)
    return drawn


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_query", description="cold queries in a warm process")
    parser.add_argument("--vectors", type=Path, required=True, help="folder of token vectors (benchmarks/collections.py)")
    parser.add_argument("--work", type=Path, default=Path("data/benchmarks"), help="indexes and truths of benchmarks/run.py")
    parser.add_argument("--nbits", type=int, default=4)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--k", default="10,100")
    parser.add_argument("--gets", help="requests allowed, CURRENT included; comma-separated; the engine's default if absent")
    parser.add_argument("--mb", help="megabytes allowed, one for each of --gets")
    parser.add_argument("--first-byte-ms", type=float, default=63.0)
    parser.add_argument("--p99-ms", type=float, default=200.0)
    parser.add_argument("--mb-per-s", type=float, default=80.0, help="of one connection")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def settings_of(a: argparse.Namespace) -> list[ColdParams]:
    if not a.gets:
        return [ColdParams()]
    gets = [int(n) for n in a.gets.split(",")]
    megabytes = [float(n) for n in a.mb.split(",")] if a.mb else [ColdParams().max_bytes / 1e6] * len(gets)
    pairs = zip(gets, megabytes, strict=True)
    return [msgspec.structs.replace(ColdParams(), max_gets=n - 1, max_bytes=int(1e6 * mb)) for n, mb in pairs]


def main(arguments: Sequence[str] | None = None) -> None:
    a = parse(arguments)
    a.documents = None
    vectors = load(a.vectors, n_queries=a.queries)
    work = a.work / f"{vectors.name}-{vectors.n_documents}"
    work.mkdir(parents=True, exist_ok=True)
    build_apart(f"tartan-{a.nbits}", work, a)
    truth = true_answers(vectors, TRUTH_K, work)
    store = open_store(str(work / f"tartan-{a.nbits}"))
    delays = {"p50_s": a.first_byte_ms / 1e3, "p99_s": a.p99_ms / 1e3, "bytes_per_s": 1e6 * a.mb_per_s}
    before = machine()
    ks = [int(k) for k in a.k.split(",")]
    warm = {k: asyncio.run(warm_answers(store, vectors, k)) for k in ks}
    lines = [asyncio.run(measure(store, vectors, truth, k, cold, delays, warm[k])) for cold in settings_of(a) for k in ks]
    title = f"{vectors.name}: {vectors.n_documents:,} documents, {vectors.n_tokens:,} tokens, {a.nbits} bits, {vectors.n_queries} queries; "
    title += f"first byte {a.first_byte_ms:.0f} ms (p99 {a.p99_ms:.0f}), {a.mb_per_s:.0f} MB/s a connection"
    Console(width=max(170, Console().width)).print(table(lines, title), {"before": before, "after": machine()}, sep="\n")
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"collection": title, "before": before, "after": machine(), "lines": [asdict(line) for line in lines]}
        a.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
