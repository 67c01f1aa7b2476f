"""Tartan and its peers side by side, in one process, on one collection: recall, relevance, time, throughput, bytes, building.

    python -m benchmarks.run --vectors FOLDER [--beir FOLDER] [--documents N] [--queries N] [--nbits 4,2] [--k 100]
                             [--peers exhaustive,plaid,lancedb] [--work FOLDER] [--json FILE] [--plot FILE] [--sweep]

What is timed: query vectors in, k document ids out. Engines take turns of TURN queries, round after round, so that whatever else the
machine does falls on all of them; a query's time is the least of its rounds, and p50 and p95 are over queries. Beside it stands the CPU
time of the whole process, which counts threads an engine starts on its own. Recall is against exhaustive float32 MaxSim (engine.evaluate).
Built indexes, and the truth, are kept under --work and used again; builds run in a process of their own, whose peak memory is recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.collections import Vectors, load
from engine.evaluate import ABSENT, exhaustive, ndcg_at_k, percentiles, recall_at_k, relevant_recall_at_k

RECALL_RANKS = (10, 100)
SWEEP_QUERIES = 60
TURN = 10


class Engine(Protocol):
    """What run.py asks of an adapter. An adapter may also have `sweep`, `configure` and `cold` (see below); they are looked for."""

    name: str

    def build(self, vectors: Vectors) -> dict[str, float] | None:
        """Build what is not built yet, and load it. Returns what it spent, `build_s` at least, also of an earlier build."""

    def search(self, query: np.ndarray, k: int) -> np.ndarray:
        """query float32 (Q, D) -> document numbers int64 (<= k,), best first."""

    @property
    def stored_bytes(self) -> int: ...


@dataclass
class Result:
    """One line of the table. Times in milliseconds, `None` where a figure does not apply."""

    name: str
    recall: dict[int, float] = field(default_factory=dict)
    ndcg_10: float | None = None
    relevant_recall_100: float | None = None
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    cpu_p50_ms: float = 0.0
    qps: dict[int, float] = field(default_factory=dict)
    bytes_per_token: float = 0.0
    build: dict[str, float] = field(default_factory=dict)
    cold: dict[str, float] | None = None
    sweep: list[dict[str, Any]] = field(default_factory=list)


def make(name: str, work: Path) -> Engine:
    """An adapter by its name: exhaustive, lancedb, plaid-4, tartan-4 (the number is nbits)."""
    kind, _, nbits = name.partition("-")
    if kind == "exhaustive":
        from benchmarks.exhaustive import ExhaustiveEngine

        return ExhaustiveEngine()
    if kind == "plaid":
        from benchmarks.plaid_numpy import PlaidEngine

        return PlaidEngine(work / name, int(nbits))
    if kind == "lancedb":
        from benchmarks.lancedb_peer import LanceEngine

        return LanceEngine(work / name)
    if kind == "tartan":
        from benchmarks import tartan_engine

        return tartan_engine.TartanEngine(work / name, int(nbits))
    raise SystemExit(f"no engine named {name}")


def names(peers: Sequence[str], nbits: Sequence[int]) -> list[str]:
    return [name for peer in peers for name in ([f"{peer}-{n}" for n in nbits] if peer in ("plaid", "tartan") else [peer])]


def build_apart(name: str, work: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Build in a child process unless it was done before; returns seconds, tokens per second and peak memory of that build."""
    record = work / f"{name}.build.json"
    if not record.exists():
        command = [sys.executable, "-m", "benchmarks.run", "--build-only", name, "--vectors", str(arguments.vectors)]
        command += ["--work", str(arguments.work)]
        command += ["--documents", str(arguments.documents)] if arguments.documents else []
        subprocess.run(command, check=True)
    found: dict[str, float] = json.loads(record.read_text())
    return found


def build_here(name: str, work: Path, vectors: Vectors) -> None:
    """The child's part: build, and write down what it took."""
    cpu = time.process_time()
    started = time.perf_counter()
    spent = make(name, work).build(vectors) or {}
    spent = {"build_s": time.perf_counter() - started, **spent, "cpu_s": time.process_time() - cpu}
    spent["tokens_per_s"] = vectors.n_tokens / spent["build_s"]
    spent["peak_mib"] = _peak_mib()
    (work / f"{name}.build.json").write_text(json.dumps(spent))


def _peak_mib() -> float:
    """The most memory this process ever had, MiB. Not ru_maxrss, in which Linux counts the parent's memory before exec."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def true_answers(vectors: Vectors, k: int, work: Path) -> np.ndarray:
    """int64 (queries, k); kept under a name that changes with the vectors and k."""
    key = hashlib.sha256(vectors.queries.tobytes() + vectors.doclens.tobytes() + str(k).encode()).hexdigest()[:16]
    path = work / f"truth-{key}.npy"
    if not path.exists():
        np.save(path, exhaustive(vectors.queries, vectors.query_offsets, vectors.tokens, vectors.offsets, k)[0])
    truth: np.ndarray = np.load(path)
    return truth


def interleaved(engines: Sequence[Engine], vectors: Vectors, k: int, rounds: int, queries: Sequence[int]) -> dict[str, Any]:
    """Each engine's found ids (queries, k), and float64 (queries,) least wall and CPU seconds of all rounds."""
    found = {engine.name: np.full((len(queries), k), ABSENT, np.int64) for engine in engines}
    wall = {engine.name: np.full(len(queries), np.inf) for engine in engines}
    cpu = {engine.name: np.full(len(queries), np.inf) for engine in engines}
    for engine in engines:
        engine.search(vectors.query(queries[0]), k)  # the first call pays for lazy imports and page faults
    blocks = [range(first, min(first + TURN, len(queries))) for first in range(0, len(queries), TURN)]
    for turn in range(rounds):
        for n, block in enumerate(blocks):
            shift = (turn + n) % len(engines)
            for engine in [*engines[shift:], *engines[:shift]]:
                for i in block:
                    started, cpu_started = time.perf_counter(), time.process_time()
                    ids = engine.search(vectors.query(queries[i]), k)
                    cpu_spent, spent = time.process_time() - cpu_started, time.perf_counter() - started
                    wall[engine.name][i] = min(wall[engine.name][i], spent)
                    cpu[engine.name][i] = min(cpu[engine.name][i], cpu_spent)
                    found[engine.name][i, : len(ids)] = ids[:k]
    return {"found": found, "wall": wall, "cpu": cpu}


def throughput(engine: Engine, vectors: Vectors, k: int, n_threads: int, seconds: float) -> float:
    """Queries per second, closed loop: each thread asks its next query as soon as the last is answered."""
    counts = [0] * n_threads
    deadline = time.perf_counter() + seconds

    def ask(thread: int) -> None:
        i = thread * 7919
        while time.perf_counter() < deadline:
            engine.search(vectors.query(i % vectors.n_queries), k)
            counts[thread] += 1
            i += 1

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(n_threads)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


def measure(engines: Sequence[Engine], builds: dict[str, dict[str, float]], vectors: Vectors, truth: np.ndarray, a: Any) -> list[Result]:
    """One Result per engine, all from one interleaved run."""
    queries = range(vectors.n_queries)
    runs = interleaved(engines, vectors, a.k, a.rounds, queries)
    results = []
    for engine in engines:
        found, wall, cpu = (runs[what][engine.name] for what in ("found", "wall", "cpu"))
        result = Result(engine.name, build=builds[engine.name], bytes_per_token=engine.stored_bytes / vectors.n_tokens)
        result.recall = {rank: float(recall_at_k(truth, found, rank).mean()) for rank in RECALL_RANKS if rank <= a.k}
        if vectors.qrels is not None:
            result.ndcg_10 = float(np.nanmean(ndcg_at_k(vectors.qrels, found, 10)))
            result.relevant_recall_100 = float(np.nanmean(relevant_recall_at_k(vectors.qrels, found, 100)))
        result.p50_ms, result.p95_ms = (1e3 * percentiles(wall, (50, 95))).tolist()
        result.cpu_p50_ms = float(1e3 * percentiles(cpu, (50,))[0])
        result.qps = {n: throughput(engine, vectors, a.k, n, a.qps_seconds) for n in (1, 2)} if a.qps_seconds > 0 else {}
        if hasattr(engine, "cold"):
            result.cold = cold(engine, vectors, a.k, truth, min(30, vectors.n_queries))
        results.append(result)
    return results


def cold(engine: Any, vectors: Vectors, k: int, truth: np.ndarray, n_queries: int) -> dict[str, float]:
    """Means over queries that each start with nothing in memory. engine.cold(query, k) -> (ids, {seconds, requests, bytes, rounds})."""
    found, facts = np.full((n_queries, k), ABSENT, np.int64), []
    for i in range(n_queries):
        ids, spent = engine.cold(vectors.query(i), k)
        found[i, : len(ids)] = ids
        facts.append(spent)
    means = {key: float(np.mean([fact[key] for fact in facts])) for key in facts[0] if key != "seconds"}
    p50, p95 = percentiles(np.array([fact["seconds"] for fact in facts]), (50, 95))
    recall = {f"recall_{rank}": float(recall_at_k(truth[:n_queries], found, rank).mean()) for rank in RECALL_RANKS if rank <= k}
    return {**recall, "p50_ms": 1e3 * p50, "p95_ms": 1e3 * p95, **means}


def sweep(engines: Sequence[Any], results: list[Result], vectors: Vectors, truth: np.ndarray, k: int) -> None:
    """Recall against time over each engine's own list of settings: sweep() -> [settings], configure(**settings)."""
    queries = range(min(SWEEP_QUERIES, vectors.n_queries))
    for engine, result in zip(engines, results, strict=True):
        if not hasattr(engine, "sweep"):
            continue
        usual, points = engine.sweep()
        for settings in points:
            engine.configure(**settings)
            run = interleaved([engine], vectors, k, 2, queries)
            point = {
                f"recall_{rank}": float(recall_at_k(truth[: len(queries)], run["found"][engine.name], rank).mean()) for rank in RECALL_RANKS
            }
            result.sweep.append({**settings, **point, "p50_ms": float(1e3 * percentiles(run["wall"][engine.name], (50,))[0])})
        engine.configure(**usual)


def table(results: list[Result], title: str) -> Table:
    base = {result.name: result.p50_ms for result in results}
    plaid = next((p50 for name, p50 in base.items() if name.startswith("plaid")), None)
    drawn = Table(title=title)
    heads = (
        "engine",
        "R@10",
        "R@100",
        "nDCG@10",
        "p50 ms",
        "p95",
        "CPU p50",
        "x exhaustive",
        "x PLAID",
        "QPS 1/2",
        "B/token",
        "build tok/s",
        "MiB",
    )
    for head in heads:
        drawn.add_column(head, justify="left" if head == "engine" else "right")
    for r in results:
        ratios = [f"{other / r.p50_ms:.1f}" if other else "" for other in (base.get("exhaustive"), plaid)]
        recalls = [f"{r.recall[rank]:.4f}" if rank in r.recall else "" for rank in RECALL_RANKS]
        ndcg = "" if r.ndcg_10 is None else f"{r.ndcg_10:.4f}"
        qps = " / ".join(f"{value:.1f}" for value in r.qps.values())
        built = [f"{r.build[key]:,.0f}" if key in r.build else "" for key in ("tokens_per_s", "peak_mib")]
        times = [f"{value:.1f}" for value in (r.p50_ms, r.p95_ms, r.cpu_p50_ms)]
        drawn.add_row(r.name, *recalls, ndcg, *times, *ratios, qps, f"{r.bytes_per_token:.1f}", *built)
    return drawn


def machine() -> dict[str, Any]:
    """What a reader needs to place the figures."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    repository = Path(__file__).resolve().parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=repository, capture_output=True, text=True, check=False
    ).stdout.strip()
    threads = {name: os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}
    versions = {"python": platform.python_version(), "numpy": np.__version__, "commit": commit}
    return {"cpu": model, "cores": os.cpu_count(), "load": os.getloadavg(), "time": time.strftime("%Y-%m-%d %H:%M"), **versions, **threads}


def plot(results: list[Result], path: Path, title: str, rank: int) -> None:
    """Recall@rank against p50, a line per engine over its sweep."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for r in results:
        points = [(point["p50_ms"], point[f"recall_{rank}"]) for point in r.sweep] or [(r.p50_ms, r.recall[rank])]
        axes.plot(*zip(*points, strict=True), marker="o", label=r.name)
    axes.set(xscale="log", xlabel="p50 per query, ms, one thread", ylabel=f"recall@{rank} against exhaustive MaxSim", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Tartan and its peers side by side")
    parser.add_argument("--vectors", type=Path, required=True, help="folder of token vectors (benchmarks/collections.py)")
    parser.add_argument("--beir", type=Path, help="folder with qrels.tsv, if it is not in --vectors")
    parser.add_argument("--documents", type=int, help="take the first N documents")
    parser.add_argument("--queries", type=int, help="take the first N queries")
    parser.add_argument("--nbits", default="4", help="comma-separated, for tartan and plaid")
    parser.add_argument("--peers", default="exhaustive,plaid,tartan", help="of exhaustive, plaid, tartan, lancedb")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--qps-seconds", type=float, default=5.0, help="0 leaves throughput out")
    parser.add_argument("--work", type=Path, default=Path("data/benchmarks"), help="built indexes and truths are kept here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="implies --sweep")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--build-only", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    a = parse(arguments)
    vectors = load(a.vectors, n_documents=a.documents, n_queries=a.queries, beir=a.beir)
    work = a.work / f"{vectors.name}-{vectors.n_documents}"
    work.mkdir(parents=True, exist_ok=True)
    if a.build_only:
        build_here(a.build_only, work, vectors)
        return
    before = machine()
    wanted = names(a.peers.split(","), [int(n) for n in a.nbits.split(",")])
    builds = {name: build_apart(name, work, a) for name in wanted}
    truth = true_answers(vectors, a.k, work)
    engines = [make(name, work) for name in wanted]
    for engine, name in zip(engines, wanted, strict=True):
        engine.name = name
        engine.build(vectors)
    results = measure(engines, builds, vectors, truth, a)
    if a.sweep or a.plot:
        sweep(engines, results, vectors, truth, a.k)
    title = f"{vectors.name}: {vectors.n_documents:,} documents, {vectors.n_tokens:,} tokens, {vectors.n_queries} queries, k={a.k}"
    console = Console(width=max(160, Console().width))
    console.print(table(results, title), machine(), sep="\n")
    for r in results:
        if r.cold:
            console.print(f"{r.name} cold:", " ".join(f"{key}={value:,.4g}" for key, value in r.cold.items()))
    if a.json:
        parameters = {key: str(value) for key, value in vars(a).items() if key not in ("vectors", "beir", "work", "json", "plot")}
        report = {
            "collection": title,
            "before": before,
            "after": machine(),
            "parameters": parameters,
            "results": [asdict(r) for r in results],
        }
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(report, indent=1))
    if a.plot:
        plot(results, a.plot, title, max(rank for rank in RECALL_RANKS if rank <= a.k))


if __name__ == "__main__":
    main()
