"""What the knobs do: recall against latency and bytes on a real collection, one knob at a time. docs/tuning.md shows the plots.

    python -m benchmarks.tuning --vectors FOLDER [--beir FOLDER] --json results/tuning.json [--parts search,probe,...] [--plot docs/img]

    search     n_full_scores from hasty to thorough, at 1, 2 and 4 bits; and the presets
    presets    the presets at 4 bits alone: with --held-out 80 on queries that nothing was chosen on
    probe      n_ivf_probe, and centroid_score_threshold, where only a tenth of the documents may be candidates
    pooling    one token vector kept in 1, 2, 3; with relevance where there are judgements
    top_k      hits asked for
    threads    queries per second of 1 to 4 callers on 1 and 2 search threads
    cache      a disk cache of part of the index, behind a model of S3 (store/wrappers.DelayStore)

Parts are measured one by one and kept in the JSON file, so that a short quiet moment is enough for each; --plot draws what is there. A query's
time is the least of its rounds; p50 is over queries; one search thread unless said otherwise. Recall is against exhaustive float32 MaxSim over the
vectors as they came (before pooling).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.collections import Vectors, load
from benchmarks.run import machine, true_answers
from benchmarks.tartan_engine import TartanEngine
from engine.config import PRESETS, IndexConfig, MaintenanceParams, SearchParams
from engine.encoding.pooling import pool_tokens
from engine.errors import NotFound
from engine.evaluate import ABSENT, ndcg_at_k, percentiles, recall_at_k
from engine.format import names
from engine.index.bulk import BulkBuild
from engine.index.commit import create
from engine.index.reader import Reader
from engine.searcher import Searcher
from engine.store.cache import CachedStore
from engine.store.objects import open_store
from engine.store.wrappers import CountingStore, DelayStore

K = 100
NBITS = (1, 2, 4)
RERANKED = (16, 32, 64, 128, 256, 512, 1024, 2048)
Line = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all parts share. truth int64 (queries, K)."""

    vectors: Vectors
    truth: np.ndarray
    work: Path
    rounds: int


def measured(ask: Callable[[np.ndarray, int], np.ndarray], s: Setting, k: int = K, ranks: Sequence[int] = (10, 100)) -> Line:
    """Recall and time of one way of asking: ask(query, k) gives ids."""
    n = s.vectors.n_queries
    found = np.full((n, k), ABSENT, np.int64)
    best_s = np.full(n, np.inf)
    ask(s.vectors.query(0), k)
    for _ in range(s.rounds):
        for i in range(n):
            began = time.perf_counter()
            ids = ask(s.vectors.query(i), k)
            best_s[i] = min(best_s[i], time.perf_counter() - began)
            found[i, : len(ids)] = ids
    p50, p95 = percentiles(best_s * 1e3, (50, 95)).tolist()
    line: Line = {f"recall_{rank}": round(float(recall_at_k(s.truth, found, rank).mean()), 4) for rank in ranks if rank <= k}
    if s.vectors.qrels is not None and k >= 10:
        line["ndcg_10"] = round(float(np.nanmean(ndcg_at_k(s.vectors.qrels, found, 10))), 4)
    return {**line, "p50_ms": round(p50, 2), "p95_ms": round(p95, 2)}


def opened(s: Setting, nbits: int, *, vectors: Vectors | None = None, name: str = "") -> TartanEngine:
    engine = TartanEngine(s.work / (name or f"tartan-{nbits}"), nbits)
    engine.build(vectors or s.vectors)
    return engine


def _bytes_per_token(engine: TartanEngine, s: Setting) -> float:
    """Of a token as it came, whatever pooling made of it."""
    return round(engine.stored_bytes / s.vectors.n_tokens, 1)


# Parts


def search(s: Setting) -> list[Line]:
    lines = []
    for nbits in NBITS:
        engine = opened(s, nbits)
        size = _bytes_per_token(engine, s)
        for n in RERANKED:
            engine.configure(n_probe=8, n_candidates=max(1024, 4 * n), n_rerank=n)
            lines.append({"nbits": nbits, "bytes_per_token": size, "n_full_scores": 4 * n, "n_rerank": n, **measured(engine.search, s)})
        lines += [{"nbits": nbits, "bytes_per_token": size, **line} for line in _presets(engine, s)]
    return lines


def presets(s: Setting) -> list[Line]:
    return _presets(opened(s, 4), s)


def _presets(engine: TartanEngine, s: Setting) -> list[Line]:
    lines = []
    for name, preset in PRESETS.items():
        for k in (10, K):
            engine.configure(**preset)
            lines.append({"preset": name, "k": k, **measured(engine.search, s, k)})
    return lines


def probe(s: Setting) -> list[Line]:
    """Where probing happens: a segment with more than twice as many documents as may be candidates."""
    engine = opened(s, 4)
    few = {"n_candidates": max(K, s.vectors.n_documents // 10), "n_rerank": 256}
    lines = []
    for n_probe in (1, 2, 4, 8, 16, 32, 64):
        engine.configure(n_probe=n_probe, **few)
        lines.append({"n_probe": n_probe, "threshold": None, **few, **measured(engine.search, s)})
    for threshold in (0.2, 0.3, 0.4, 0.5, 0.6):
        engine.configure(n_probe=8, **few, centroid_score_threshold=threshold)  # type: ignore[arg-type]
        lines.append({"n_probe": 8, "threshold": threshold, **few, **measured(engine.search, s)})
    return lines


def pooling(s: Setting) -> list[Line]:
    lines = []
    for factor in (1, 2, 3):
        vectors = _pooled(s, factor)
        engine = opened(s, 4, vectors=vectors, name="tartan-4" if factor == 1 else f"pooled-{factor}")
        engine.configure(**PRESETS["balanced"])
        facts = {"pool_factor": factor, "tokens": vectors.n_tokens, "bytes_per_token": _bytes_per_token(engine, s)}
        lines.append({**facts, **measured(engine.search, s)})
    return lines


def _pooled(s: Setting, factor: int) -> Vectors:
    """The collection with pooled documents, kept under the work folder."""
    if factor == 1:
        return s.vectors
    path = s.work / f"pooled-{factor}.npz"
    if not path.exists():
        blocks, lengths = [], []
        for n in range(s.vectors.n_documents):
            start, end = s.vectors.offsets[n], s.vectors.offsets[n + 1]
            tokens, _ = pool_tokens(s.vectors.tokens[start:end].astype(np.float32), np.array([0, end - start]), factor)
            blocks.append(tokens.astype(np.float16))
            lengths.append(len(tokens))
        np.savez(path, tokens=np.concatenate(blocks), lengths=np.array(lengths))
    with np.load(path) as kept:
        return replace(s.vectors, tokens=kept["tokens"], offsets=np.cumsum([0, *kept["lengths"]]).astype(np.int64))


def top_k(s: Setting) -> list[Line]:
    engine = opened(s, 4)
    lines = []
    for k in (1, 10, 50, 100, 300, 1000):
        engine.configure(**{**PRESETS["balanced"], "n_candidates": max(4096, 4 * k)})
        lines.append({"top_k": k, **measured(engine.search, s, k)})
    return lines


def threads(s: Setting) -> list[Line]:
    return [_throughput(s, n_threads, n_callers) for n_threads in (1, 2) for n_callers in (1, 2, 4)]


def _throughput(s: Setting, n_threads: int, n_callers: int, seconds: float = 4.0) -> Line:
    """Closed loop: each caller asks again when it is answered."""
    loop = asyncio.new_event_loop()
    runner = threading.Thread(target=loop.run_forever)
    runner.start()
    reader = Reader(open_store(str(s.work / "tartan-4")), memory_bytes=4 << 30, executor=ThreadPoolExecutor(n_threads))
    searcher = Searcher(reader)
    times: list[float] = []

    async def load() -> None:
        snapshot = await reader.snapshot("benchmark")
        await searcher.warm(snapshot)
        end = time.perf_counter() + seconds

        async def caller(i: int) -> None:
            while time.perf_counter() < end:
                began = time.perf_counter()
                await searcher.search(
                    snapshot, [s.vectors.query(i % s.vectors.n_queries)], SearchParams(k=10), with_rows=False, mode="warm"
                )
                times.append(time.perf_counter() - began)
                i += 1

        await asyncio.gather(*(caller(7919 * n) for n in range(n_callers)))

    asyncio.run_coroutine_threadsafe(load(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    runner.join()
    p50, p95 = (percentiles(np.array(times) * 1e3, (50, 95))).tolist()
    qps = len(times) / seconds
    return {"search_threads": n_threads, "callers": n_callers, "qps": round(qps, 1), "p50_ms": round(p50, 2), "p95_ms": round(p95, 2)}


def cache(s: Setting) -> list[Line]:
    """The same queries twice, on an index of some segments, nothing decoded kept in memory; the second time is counted."""
    folder = s.work / "segmented"
    asyncio.run(_segmented(s, folder))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return [asyncio.run(_cached(s, folder, size, share)) for share in (0.0, 0.5, 1.0, 2.0)]


async def _segmented(s: Setting, folder: Path) -> None:
    from benchmarks.tartan_engine import VectorsSource

    store = open_store(str(folder))
    reader = Reader(store)
    try:
        await reader.snapshot("benchmark")
    except NotFound:
        await create(store, "benchmark", IndexConfig(nbits=4))
        params = MaintenanceParams(max_segment_documents=-(-s.vectors.n_documents // 8))
        await BulkBuild(reader, "benchmark", VectorsSource(s.vectors), params=params).run()


async def _cached(s: Setting, folder: Path, size: int, share: float) -> Line:
    n_queries = min(16, s.vectors.n_queries)
    counting = CountingStore(DelayStore(open_store(str(folder))))
    where = tempfile.mkdtemp(prefix="tartan-tuning-")
    try:
        store = CachedStore(counting, where, budget_bytes=int(1.2 * share * size), cacheable=_never_changes) if share else counting
        reader = Reader(store, memory_bytes=0, counter=counting)
        searcher, spent, n_requests, n_bytes = Searcher(reader), [], 0, 0
        for turn in range(2):
            for i in range(n_queries):
                began = time.perf_counter()
                with counting.window() as cost:
                    snapshot = await reader.snapshot("benchmark")
                    await searcher.search(snapshot, [s.vectors.query(i)], SearchParams(k=10), mode="cold")
                if turn:
                    spent.append(time.perf_counter() - began)
                    n_requests, n_bytes = n_requests + cost.n_requests, n_bytes + cost.bytes_read
    finally:
        shutil.rmtree(where)
    p50 = float(percentiles(np.array(spent) * 1e3, (50,))[0])
    per_query = {"requests": round(n_requests / n_queries, 1), "mb": round(n_bytes / n_queries / 1e6, 2)}
    return {"share": share, "cache_mb": round(share * size / 1e6), "p50_ms": round(p50, 1), **per_query}


def _never_changes(name: str) -> bool:
    return not name.endswith(names.CURRENT)


PARTS: dict[str, Callable[[Setting], list[Line]]] = {
    part.__name__: part for part in (search, presets, probe, pooling, top_k, threads, cache)
}


# Plots


def draw(parts: dict[str, list[Line]], folder: Path, name: str) -> None:
    """One picture a part. SVG, so that the text can be read at any size and a change shows in a review."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "tartan"  # the same picture from the same figures
    folder.mkdir(parents=True, exist_ok=True)
    for part, plot in {"search": _draw_search, "probe": _draw_probe, "pooling": _draw_pooling, "cache": _draw_cache}.items():
        if part not in parts:
            continue
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
        plot(axes, parts[part])
        for one in axes:
            one.grid(alpha=0.3)
            if one.get_legend_handles_labels()[0]:
                one.legend(fontsize=8)
        figure.suptitle(name, fontsize=9)
        figure.tight_layout()
        figure.savefig(folder / f"tuning-{part}.svg", metadata={"Date": None})
        pyplot.close(figure)


def _draw_search(axes: Any, lines: list[Line]) -> None:
    for one, rank in zip(axes, (10, 100), strict=True):
        for nbits in NBITS:
            own = [line for line in lines if line["nbits"] == nbits and "preset" not in line]
            label = f"{nbits} bit, {own[0]['bytes_per_token']:.0f} bytes a token"
            one.plot([line["p50_ms"] for line in own], [line[f"recall_{rank}"] for line in own], marker="o", markersize=3, label=label)
        for line in lines:
            if line.get("preset") and line["nbits"] == 4 and line["k"] == K:
                place = (line["p50_ms"], line[f"recall_{rank}"])
                one.plot(*place, marker="x", color="black", markersize=5)
                one.annotate(line["preset"], place, fontsize=7, xytext=(3, -9), textcoords="offset points")
        one.set(xlabel="p50, ms, one thread, top 100", ylabel=f"recall@{rank}", xlim=(0, None))


def _draw_probe(axes: Any, lines: list[Line]) -> None:
    for one, key, label in ((axes[0], "n_probe", "n_ivf_probe"), (axes[1], "threshold", "centroid_score_threshold")):
        own = [line for line in lines if (line["threshold"] is None) == (key == "n_probe")]
        for rank in (10, 100):
            one.plot(
                [line[key] for line in own], [line[f"recall_{rank}"] for line in own], marker="o", markersize=3, label=f"recall@{rank}"
            )
        other = one.twinx()
        other.plot([line[key] for line in own], [line["p50_ms"] for line in own], color="gray", linestyle=":", label="p50 ms")
        other.set(ylabel="p50, ms (dotted)", ylim=(0, None))
        one.set(xlabel=label, ylabel="recall", xscale="log" if key == "n_probe" else "linear")


def _draw_pooling(axes: Any, lines: list[Line]) -> None:
    factors = [line["pool_factor"] for line in lines]
    for key in ("recall_10", "recall_100", "ndcg_10"):
        if key in lines[0]:
            axes[0].plot(factors, [line[key] for line in lines], marker="o", markersize=3, label=key.replace("_", "@"))
    axes[0].set(xlabel="pool_factor", ylabel="against what is not pooled", xticks=factors, ylim=(0, 1.02))
    axes[1].plot(factors, [line["bytes_per_token"] for line in lines], marker="o", markersize=3, label="bytes stored per original token")
    axes[1].plot(factors, [line["p50_ms"] for line in lines], marker="o", markersize=3, label="p50, ms")
    axes[1].set(xlabel="pool_factor", xticks=factors, ylim=(0, None))


def _draw_cache(axes: Any, lines: list[Line]) -> None:
    shares = [100 * line["share"] for line in lines]
    for one, key, label in ((axes[0], "requests", "requests a query"), (axes[1], "mb", "MB read a query")):
        one.plot(shares, [line[key] for line in lines], marker="o", markersize=3)
        one.set(xlabel="disk cache, % of the index", ylabel=label, ylim=(0, None))


def _after(vectors: Vectors, n: int) -> Vectors:
    """Without the first n queries. Judgements are not carried over."""
    if n == 0:
        return vectors
    first = vectors.query_offsets[n]
    return replace(vectors, queries=vectors.queries[first:], query_offsets=vectors.query_offsets[n:] - first, qrels=None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description="what the knobs do, one at a time")
    parser.add_argument("--vectors", type=Path, required=True, help="folder of token vectors (benchmarks/collections.py)")
    parser.add_argument("--beir", type=Path, help="folder with qrels.tsv, if it is not in --vectors")
    parser.add_argument("--documents", type=int)
    parser.add_argument("--queries", type=int, default=80)
    parser.add_argument("--held-out", type=int, default=0, metavar="N", help="the first N queries are left out, and the next ones asked")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--parts", default="", help=f"of {', '.join(PARTS)}; none only draws, or builds")
    parser.add_argument("--build", action="store_true", help="only build what the parts need")
    parser.add_argument("--work", type=Path, default=Path("data/benchmarks"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path, metavar="FOLDER")
    a = parser.parse_args(arguments)
    vectors = _after(load(a.vectors, n_documents=a.documents, n_queries=a.held_out + a.queries, beir=a.beir), a.held_out)
    work = a.work / f"{vectors.name}-{vectors.n_documents}"
    work.mkdir(parents=True, exist_ok=True)
    s = Setting(vectors, true_answers(vectors, K, work), work, a.rounds)
    document = json.loads(a.json.read_text()) if a.json.exists() else {"parts": {}, "machine": {}}
    document |= {"collection": vectors.name, "documents": vectors.n_documents, "tokens": vectors.n_tokens, "queries": vectors.n_queries}
    if a.build:
        for nbits in NBITS:
            opened(s, nbits)
        for factor in (2, 3):
            opened(s, 4, vectors=_pooled(s, factor), name=f"pooled-{factor}")
        asyncio.run(_segmented(s, work / "segmented"))
    for part in filter(None, a.parts.split(",")):
        document["parts"][part] = PARTS[part](s)
        document["machine"][part] = machine()
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(document, indent=1))
        for line in document["parts"][part]:
            print(part, " ".join(f"{key}={value}" for key, value in line.items()))
    if a.plot:
        name = f"{vectors.name}: {vectors.n_documents:,} documents, {vectors.n_tokens:,} tokens, {vectors.n_queries} queries"
        draw(document["parts"], a.plot, name)


if __name__ == "__main__":
    main()
