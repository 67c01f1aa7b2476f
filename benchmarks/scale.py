"""Ingest at size: a synthetic collection through the bulk build of many inputs, searched, a third of it deleted, compacted, swept, verified, searched again.

    python -m benchmarks.scale --documents 1000000 --work DIR [--nbits 4] [--queries 60] [--processes 2] [--json FILE]
    python -m benchmarks.scale --documents 20000 --work DIR            the same in about a minute
    python -m benchmarks.scale --work DIR ... --again warm             one step once more, on a quieter machine

The index is a directory under DIR. Every step is a process of its own, as the tasks of a state machine are, so that its peak memory is its own; what it
found is kept in DIR/steps, and a step that is there is not done again: a run that was killed goes on. The build keeps its own records besides. Steps after
`delete` change the index, so `--again` of an earlier one wants a new DIR. docs/scale.md has the figures of a million documents.

Each step says wall_s, cpu_s (all threads), peak_mib (VmHWM, mapped files that were touched included), anonymous_mib (the most private memory, sampled).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.run import machine
from benchmarks.shards import FIRST_YEAR, N_YEARS, QUERY_TOKENS, Sampled, ShardSource, Synthetic
from benchmarks.sizing import DELAYS, RemoteStore, memory_mib
from engine.config import PRESETS, IndexConfig, MaintenanceParams, Preset, SearchParams
from engine.errors import Conflict
from engine.evaluate import ABSENT, Exhaustive, percentiles, recall_at_k
from engine.index import joint
from engine.index.commit import create, load_head
from engine.index.compact import compact
from engine.index.reader import Reader
from engine.index.sweep import sweep
from engine.index.verify import verify
from engine.searcher import Answer, Searcher
from engine.store.objects import open_store
from engine.store.wrappers import AroundStore, Call, CountingStore, DelayStore

T = TypeVar("T")
Figures = dict[str, Any]
INDEX = "scale"
SAMPLED_SHARDS = 8
"""As many inputs as the build tasks sample (engine/transfer/inputs.py)."""
MAINTENANCE_MEMORY = 128 << 20
SEARCH_MEMORY = 8 << 30
TRUTH_K = 250
"""Deep enough that a hundred of them are left when a third of all documents is gone."""
BY_ID, BY_YEAR = 1 / 6, 1 / 5
"""Shares deleted by id and by condition: together 1/6 + 1/5 - 1/30, a third."""
BATCH = 10_000
"""Ids a delete call brings."""
N_COLD = 20
WarmLine = tuple[Preset, int, int, int | None]
WARM: list[WarmLine] = [
    ("balanced", 10, 1, None),
    ("balanced", 10, 2, None),
    ("balanced", 100, 1, None),
    ("balanced", 100, 2, None),
    ("fast", 100, 1, None),
    ("exact", 100, 1, 10),
]
"""Preset, k, search threads, queries: those of `exact` take seconds each."""


@dataclass(frozen=True)
class Bench:
    """What every step knows."""

    work: Path
    documents: int
    nbits: int
    n_queries: int

    @property
    def collection(self) -> Synthetic:
        return Synthetic(self.documents)

    @property
    def store(self) -> AroundStore:
        return AroundStore(open_store(str(self.work / "store")))

    def reader(self, memory_bytes: int = MAINTENANCE_MEMORY) -> Reader:
        return Reader(self.store, memory_bytes=memory_bytes, executor=ThreadPoolExecutor(1))

    def queries(self) -> np.ndarray:
        """float32 (n_queries, 16, 128); kept, because each wants a block of documents made."""
        path = self.work / "queries.npy"
        if not path.exists():
            np.save(path, self.collection.queries(self.n_queries))
        found: np.ndarray = np.load(path)
        return found

    def figures(self, step: str) -> Path:
        return self.work / "steps" / f"{step}.json"

    def found(self, step: str) -> Figures:
        read: Figures = json.loads(self.figures(step).read_text())
        return read

    def stored(self) -> Figures:
        """Bytes and objects by kind: what the object's name ends in, or the folder it lies in."""
        n_bytes: Counter[str] = Counter()
        n_objects: Counter[str] = Counter()
        root = self.work / "store" / INDEX
        for path in root.rglob("*"):
            if path.is_file():
                parts = path.relative_to(root).parts
                kind = f"{parts[0]}/{parts[-1]}" if parts[0] == "segments" else parts[0]
                n_bytes[kind] += path.stat().st_size
                n_objects[kind] += 1
        return {"stored_bytes": sum(n_bytes.values()), "bytes_by_kind": dict(n_bytes), "objects_by_kind": dict(n_objects)}


class Stopwatch:
    """Seconds by stage; a stage lasts until the next one is named."""

    def __init__(self, stage: str) -> None:
        self.spent: Counter[str] = Counter()
        self._stage, self._began = stage, time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.spent[self._stage] += now - self._began  # type: ignore[assignment]
        self._stage, self._began = stage, now

    def seconds(self) -> dict[str, float]:
        self("")
        return {stage: round(seconds, 3) for stage, seconds in self.spent.items()}


class TimedStore(AroundStore):
    """Tells a stopwatch when it writes."""

    def __init__(self, inner: AroundStore, watch: Stopwatch) -> None:
        super().__init__(inner)
        self._watch = watch

    async def _around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        if call.kind != "put":
            return await run()
        self._watch("upload")
        answer = await run()
        self._watch("write")
        return answer


# Building


async def prepare(bench: Bench) -> Figures:
    """The index, and a codec trained on a sample of some shards."""
    store = bench.store
    try:
        await create(store, INDEX, IndexConfig(nbits=bench.nbits))
    except Conflict:
        pass
    sampled = Sampled(bench.collection, SAMPLED_SHARDS)
    plan = json.dumps({"documents": bench.documents, "nbits": bench.nbits})
    made = await joint.prepare(bench.reader(), INDEX, plan, sampled, rows=[{"year": FIRST_YEAR, "topic": 0}])
    codec = made.codec
    bench.queries()
    return {"build": made.build, "n_centroids": codec.n_centroids, "n_cells": codec.n_cells, "codec_bytes": codec.size_bytes}


async def build_shard(bench: Bench, shard: int) -> Figures:
    """One input to segments."""
    watch = Stopwatch("start")

    def progress(what: str, done: int, total: int) -> None:
        watch("write" if what == "write" else "encode")

    source = ShardSource(bench.collection, shard, watch)
    reader = Reader(TimedStore(bench.store, watch), memory_bytes=MAINTENANCE_MEMORY, executor=ThreadPoolExecutor(1))
    report = await joint.build_share(reader, INDEX, bench.found("prepare")["build"], shard, source, progress=progress)
    return {**msgspec.to_builtins(report), "stages_s": watch.seconds()}


async def finish(bench: Bench) -> Figures:
    """One commit of all."""
    report = await joint.finish(bench.reader(), INDEX, bench.found("prepare")["build"], bench.collection.n_shards)
    return {**msgspec.to_builtins(report), **await manifest_figures(bench), **bench.stored()}


async def manifest_figures(bench: Bench) -> Figures:
    head = await load_head(bench.store, INDEX)
    segments = head.manifest.segments
    return {
        "generation": head.manifest.generation,
        "current_bytes": len(head.data),
        "segments": len(segments),
        "documents_live": head.manifest.n_documents,
        "tokens": sum(segment.n_tokens for segment in segments),
        "segment_bytes": [segment.size_bytes for segment in segments],
    }


# Searching


async def exact_shard(bench: Bench, shard: int) -> Figures:
    """The best documents of one shard for every query: exhaustive float32 search over the tokens as they are generated."""
    queries = bench.queries()
    search = Exhaustive(queries.reshape(-1, queries.shape[2]), np.arange(bench.n_queries + 1) * QUERY_TOKENS, TRUTH_K)
    first, years = bench.collection.span(shard)[0], []
    for made in bench.collection.blocks(shard):
        search.add(made.tokens, made.offsets, np.arange(first, first + len(made)))
        years.append(made.years)
        first += len(made)
    ids, scores = search.result()
    np.savez(bench.work / f"exact-{shard}.npz", ids=ids, scores=scores, years=np.concatenate(years))
    return {"documents": first - bench.collection.span(shard)[0]}


async def truth(bench: Bench) -> Figures:
    """The best documents of all shards; and which documents the deletion will leave."""
    files = [np.load(bench.work / f"exact-{shard}.npz") for shard in range(bench.collection.n_shards)]
    ids, scores = (np.concatenate([file[name] for file in files], axis=1) for name in ("ids", "scores"))
    order = np.lexsort((ids, -scores), axis=1)[:, :TRUTH_K]
    ids, scores = np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
    alive = np.concatenate([file["years"] for file in files]) >= doomed_year()
    alive[bench.collection.doomed(BY_ID)] = False
    np.savez(bench.work / "truth.npz", ids=ids, scores=scores, left=_survivors(ids, alive), alive=alive)
    return {"queries": bench.n_queries, "alive": int(alive.sum())}


def _survivors(ids: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """The best 100 of each query that are left."""
    rows = []
    for row in ids:
        left = row[(row != ABSENT) & alive[row]]
        rows.append(np.pad(left[:100], (0, max(0, 100 - len(left))), constant_values=ABSENT))
    return np.stack(rows)


def doomed_year() -> int:
    """Documents of earlier years are deleted."""
    return FIRST_YEAR + round(BY_YEAR * N_YEARS)


def true_ids(bench: Bench, left: bool) -> np.ndarray:
    with np.load(bench.work / "truth.npz") as file:
        found: np.ndarray = file["left" if left else "ids"]
        return found[:, :100]


def recalls(true: np.ndarray, answers: Sequence[Answer]) -> dict[str, float]:
    found = np.stack([np.pad(a.ids[:100], (0, 100 - len(a.ids[:100])), constant_values=ABSENT) for a in answers])
    ranks = (10, 100) if len(answers[0].ids) > 10 else (10,)
    return {f"recall_{k}": round(float(recall_at_k(true[: len(found)], found, k).mean()), 4) for k in ranks}


async def warm(bench: Bench, left: bool = False, lines: Sequence[WarmLine] = ()) -> Figures:
    """All segments in memory: recall by preset, milliseconds by number of search threads."""
    reader = bench.reader(SEARCH_MEMORY)
    searcher, queries = Searcher(reader), list(bench.queries())
    began = time.perf_counter()
    snapshot = await reader.snapshot(INDEX)
    opened = time.perf_counter()
    [first] = await searcher.search(snapshot, queries[:1])
    answered = time.perf_counter()
    await searcher.warm(snapshot)
    figures: Figures = {
        "open_s": opened - began,
        "first_search_s": answered - opened,
        "load_s": time.perf_counter() - began,
        "first_was_cold": first.stats.n_cold_segments,
    }
    for preset, k, n_threads, n_queries in lines or WARM:
        reader.parts.executor = ThreadPoolExecutor(n_threads)
        params = SearchParams(k=k, **PRESETS[preset])
        line = f"{preset} k={k} threads={n_threads}"
        figures[line] = await _timed(bench, searcher, snapshot, queries[:n_queries], params, left)
        show(f"{line}: {figures[line]}")
    return figures


async def _timed(
    bench: Bench, searcher: Searcher, snapshot: Any, queries: Sequence[np.ndarray], params: SearchParams, left: bool
) -> Figures:
    answers, spent = [], []
    cpu_s = time.process_time()
    for query in queries:
        began = time.perf_counter()
        answers += await searcher.search(snapshot, [query], params, with_rows=False, mode="warm")
        spent.append(1000 * (time.perf_counter() - began))
    cpu_ms = 1000 * (time.process_time() - cpu_s) / len(queries)
    p50, p95 = percentiles(np.array(spent), (50, 95)).round(1).tolist()
    counts = {name: round(float(np.mean([getattr(answer.stats, name) for answer in answers]))) for name in ("n_candidates", "n_reranked")}
    times: Counter[str] = Counter()
    for answer in answers:
        times.update(answer.stats.times_ms)
    stages = {stage: round(spent_ms / len(answers), 1) for stage, spent_ms in times.items()}
    found = recalls(true_ids(bench, left), answers)
    return {**found, "p50_ms": p50, "p95_ms": p95, "cpu_ms": round(cpu_ms, 1), **counts, "stages_ms": stages}


async def cold(bench: Bench, left: bool = False) -> Figures:
    """A reader that knows nothing for each query, behind a model of S3; the process is warm."""
    queries = list(bench.queries()[:N_COLD])
    figures: Figures = {}
    for k in (10, 100):
        answers, spent, costs = [], [], []
        cpu_s = time.process_time()
        for number, query in enumerate(queries):
            store = CountingStore(DelayStore(RemoteStore(bench.store), **DELAYS, seed=number))  # type: ignore[arg-type]
            reader = Reader(store, executor=ThreadPoolExecutor(1))
            began = time.perf_counter()
            with store.window() as cost:
                snapshot = await reader.snapshot(INDEX)
                answers += await Searcher(reader).search(snapshot, [query], SearchParams(k=k), mode="cold")
            spent.append(1000 * (time.perf_counter() - began))
            costs.append((cost.n_requests, cost.bytes_read / 1e6, cost.rounds))
        p50, p95 = percentiles(np.array(spent), (50, 95)).round(1).tolist()
        gets, megabytes, rounds = np.mean(costs, axis=0).round(1).tolist()
        figures[f"k={k}"] = {
            **recalls(true_ids(bench, left), answers),
            "p50_ms": p50,
            "p95_ms": p95,
            "cpu_ms": round(1000 * (time.process_time() - cpu_s) / len(queries), 1),
            "gets": gets,
            "mb": megabytes,
            "rounds": rounds,
        }
    return figures


# Deleting and what follows


async def delete(bench: Bench) -> Figures:
    """A third of the documents: some by condition in one commit, some by id in batches, each batch a commit."""
    reader = bench.reader()
    writer = reader.writer(INDEX)
    snapshot = await reader.snapshot(INDEX)
    began = time.perf_counter()
    selected = await snapshot.select("year < ?", [doomed_year()])
    chosen = time.perf_counter()
    n_by_condition = await writer.delete(selected)
    figures: Figures = {"select_s": chosen - began, "by_condition": n_by_condition, "condition_s": time.perf_counter() - chosen}
    doomed, spent, n_deleted = bench.collection.doomed(BY_ID), [], 0
    for start in range(0, len(doomed), BATCH):
        began = time.perf_counter()
        n_deleted += await writer.delete(doomed[start : start + BATCH])
        spent.append(time.perf_counter() - began)
        show(f"delete: {start + BATCH:,} of {len(doomed):,} ids, {spent[-1]:.2f} s")
    figures |= {
        "by_id": n_deleted,
        "batches": len(spent),
        "batch_ids": BATCH,
        "batch_p50_s": float(np.median(spent)),
        "batch_max_s": max(spent),
    }
    live = await reader.snapshot(INDEX)
    with np.load(bench.work / "truth.npz") as file:
        assert np.array_equal(await live.live_ids(), np.flatnonzero(file["alive"])), "what is left is not what should be"
    return {**figures, **await manifest_figures(bench), **bench.stored()}


async def compacted(bench: Bench) -> Figures:
    """Everything that compaction finds to do."""

    def progress(what: str, done: int, total: int) -> None:
        show(f"compact: {what} {done:,} of {total:,} documents")

    report = await compact(bench.reader(), INDEX, progress=progress)
    return {**msgspec.to_builtins(report), **await manifest_figures(bench), **bench.stored()}


async def swept(bench: Bench) -> Figures:
    """Garbage collection without a grace period: nobody else uses this store."""
    params = msgspec.structs.replace(MaintenanceParams(), grace_s=0.0)
    report = msgspec.to_builtins(await sweep(bench.store, INDEX, params=params))
    del report["deleted"]
    return {**report, **bench.stored()}


async def verified(bench: Bench) -> Figures:
    """Every byte that the generation in force names."""
    report: Figures = msgspec.to_builtins(await verify(bench.reader(), INDEX))
    assert not report["problems"], report["problems"]
    return report


STEPS: dict[str, Callable[[Bench], Awaitable[Figures]]] = {
    "prepare": prepare,
    "finish": finish,
    "truth": truth,
    "warm": warm,
    "cold": cold,
    "verify": verified,
    "delete": delete,
    "warm-deleted": lambda bench: warm(bench, left=True, lines=WARM[:3:2]),
    "compact": compacted,
    "gc": swept,
    "verify-left": verified,
    "warm-left": lambda bench: warm(bench, left=True),
    "cold-left": lambda bench: cold(bench, left=True),
}
"""In this order; behind `prepare` come those of PER_SHARD."""
PER_SHARD: dict[str, Callable[[Bench, int], Awaitable[Figures]]] = {"shard": build_shard, "exact": exact_shard}


# The parent, and what it starts


def show(line: str) -> None:
    """Progress, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


class _Anonymous(threading.Thread):
    """The most private memory that this process had, MiB, looked at twenty times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.is_over = 0.0, threading.Event()

    def run(self) -> None:
        while not self.is_over.wait(0.05):
            self.most = max(self.most, memory_mib("RssAnon"))


async def child(bench: Bench, step: str) -> None:
    """One step in this process; its figures go to its file."""
    watcher = _Anonymous()
    watcher.start()
    began, cpu = time.perf_counter(), time.process_time()
    name, _, shard = step.partition(":")
    figures = await PER_SHARD[name](bench, int(shard)) if shard else await STEPS[name](bench)
    watcher.is_over.set()
    figures |= {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu, "peak_mib": memory_mib("VmHWM")}
    figures |= {"anonymous_mib": watcher.most, "load": os.getloadavg()[0]}
    path = bench.figures(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(figures, indent=1, default=float))
    path.with_suffix(".tmp").replace(path)


def start(bench: Bench, step: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.scale", "--documents", str(bench.documents), "--work", str(bench.work)]
    return subprocess.Popen([*command, "--nbits", str(bench.nbits), "--queries", str(bench.n_queries), "--step", step])


def run_all(bench: Bench, steps: Sequence[str], n_processes: int) -> None:
    """Those that are not done yet, so many at the same time. Raises SystemExit if one fails."""
    waiting = [step for step in steps if not bench.figures(step).exists()]
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    while waiting or running:
        while waiting and len(running) < n_processes:
            running.append((waiting[0], start(bench, waiting.pop(0))))
        step, process = running.pop(0)
        if process.wait():
            for _, other in running:
                other.terminate()
            raise SystemExit(f"step {step} failed; the same command goes on there")
        figures = bench.found(step)
        show(f"{step}: {figures['wall_s']:.1f} s, cpu {figures['cpu_s']:.1f} s, peak {figures['peak_mib']:.0f} MiB")


def summary(bench: Bench) -> Figures:
    """All figures; those of the shards together."""
    shards, exact = ([bench.found(f"{name}:{shard}") for shard in range(bench.collection.n_shards)] for name in PER_SHARD)
    stages = {stage: float(np.median([shard["stages_s"].get(stage, 0.0) for shard in shards])) for stage in shards[0]["stages_s"]}
    own = _together(shards) | {name: sum(shard[name] for shard in shards) for name in ("n_documents", "n_tokens", "n_segments")}
    own |= {"tasks": len(shards), "median_stages_s": stages, "tokens_per_cpu_s": own["n_tokens"] / own["cpu_s"]}
    found = {step: bench.found(step) for step in STEPS}
    return {
        "documents": bench.documents,
        "nbits": bench.nbits,
        "machine": machine(),
        "steps": {"prepare": found.pop("prepare"), "shards": own, "exact": _together(exact), **found},
    }


def _together(tasks: Sequence[Figures]) -> Figures:
    """Of several processes: seconds in all, memory of the largest."""
    times: Figures = {name: sum(task[name] for task in tasks) for name in ("wall_s", "cpu_s")}
    most = {name: max(task[name] for task in tasks) for name in ("peak_mib", "anonymous_mib", "load")}
    return {**times, **most, "longest_s": max(task["wall_s"] for task in tasks)}


def table(figures: Figures) -> Table:
    drawn = Table("step", "wall s", "CPU s", "peak MiB", "private MiB", "load")
    for step, one in figures["steps"].items():
        drawn.add_row(step, *(f"{one[name]:,.1f}" for name in ("wall_s", "cpu_s", "peak_mib", "anonymous_mib", "load")))
    return drawn


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description="ingest at size, step by step")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument(
        "--work", type=Path, required=True, help="the index and the figures; about 1.6 GB for a million documents of 4 bits"
    )
    parser.add_argument("--nbits", type=int, default=4)
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--processes", type=int, default=2, help="shards built at the same time")
    parser.add_argument("--again", default="", metavar="STEP", help="forget what this step found, and do it once more")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    a = parse(arguments)
    bench = Bench(a.work, a.documents, a.nbits, a.queries)
    if a.step:
        asyncio.run(child(bench, a.step))
        return
    a.work.mkdir(parents=True, exist_ok=True)
    wanted, mark = {"documents": a.documents, "nbits": a.nbits, "queries": a.queries}, a.work / "scale.json"
    if mark.exists() and json.loads(mark.read_text()) != wanted:
        raise SystemExit(f"{a.work} holds another run: {mark.read_text()}")
    mark.write_text(json.dumps(wanted))
    if a.again:
        bench.figures(a.again).unlink(missing_ok=True)
    run_all(bench, ["prepare"], 1)
    run_all(bench, [f"{name}:{shard}" for name in PER_SHARD for shard in range(bench.collection.n_shards)], a.processes)
    run_all(bench, [step for step in STEPS if step != "prepare"], 1)
    figures = summary(bench)
    Console().print(table(figures))
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
