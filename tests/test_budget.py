"""Budget: what a search and a commit may ask of the store. Ceilings only go down without a reason in the commit."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np

from corpus import make_corpus
from engine.config import IndexConfig, SearchParams
from engine.index.commit import create
from engine.index.compact import compact
from engine.index.reader import Reader
from engine.searcher import Searcher
from engine.store.objects import open_store
from engine.store.wrappers import CountingStore

CORPUS = make_corpus(3000, dim=64, n_topics=60, n_queries=6, seed=11)
MAX_CURRENT_BYTES = 80_000
MAX_IMPORT_RATIO = 1.4
ROOT = Path(__file__).resolve().parent.parent


async def _quantised() -> CountingStore:
    store = CountingStore(open_store("memory://"))
    reader = Reader(store)
    await create(store, "x", IndexConfig())
    await reader.writer("x").add(*CORPUS.part(0, 3000), fields=[{"n": n} for n in range(3000)])
    await compact(reader, "x", force=True)
    return store


async def test_a_cold_search_takes_three_rounds_and_few_requests() -> None:
    store = await _quantised()
    for query in CORPUS.queries:
        reader = Reader(store)
        with store.window() as cost:
            snapshot = await reader.snapshot("x")
            await Searcher(reader).search(snapshot, [query], SearchParams(k=10), mode="cold")
        assert cost.rounds == 3
        assert cost.n_requests <= 24
        assert cost.bytes_read <= 10_000_000


async def test_a_warm_search_takes_one_conditional_request() -> None:
    store = await _quantised()
    reader = Reader(store)
    searcher = Searcher(reader)
    await searcher.warm(await reader.snapshot("x"))
    with store.window() as cost:
        await searcher.search(await reader.snapshot("x"), CORPUS.queries, SearchParams(k=10))
    assert dict(cost.requests) == {"get_if_changed": 1}
    assert cost.bytes_read == 0


async def test_a_search_that_may_be_a_little_old_takes_no_request() -> None:
    store = await _quantised()
    reader = Reader(store)
    searcher = Searcher(reader)
    await searcher.warm(await reader.snapshot("x"))
    with store.window() as cost:
        await searcher.search(await reader.snapshot("x", max_age_s=60), CORPUS.queries[:1])
    assert cost.n_requests == 0


async def test_opening_an_index_is_one_request_of_bounded_size() -> None:
    store = await _quantised()
    with store.window() as cost:
        await Reader(store).snapshot("x")
    assert cost.n_requests == 1
    assert cost.bytes_read <= MAX_CURRENT_BYTES


async def test_what_a_commit_costs_does_not_grow_with_the_index() -> None:
    store = await _quantised()
    small = CountingStore(open_store("memory://"))
    await create(small, "x", IndexConfig())
    costs = []
    for counted in (small, store):
        writer = Reader(counted).writer("x")
        await writer.add(*CORPUS.part(0, 10))
        with counted.window() as cost:
            await writer.add(*CORPUS.part(0, 10))
        costs.append((cost.rounds, cost.n_requests))
    assert costs[0] == costs[1] == (2, 3)


async def test_deleting_ten_documents_reads_ids_once_and_commits_in_two_rounds() -> None:
    store = await _quantised()
    reader = Reader(store)
    writer = reader.writer("x")
    await writer.delete(np.arange(5))
    with store.window() as cost:
        await writer.delete(np.arange(5, 15))
    assert cost.rounds <= 3
    assert cost.n_requests <= 4


def test_importing_the_search_path_costs_little_more_than_numpy() -> None:
    """CPU seconds, the best of three taken in turns, at the third try if others work hard; ratio, not absolute time."""

    def cpu_s(code: str) -> float:
        timed = f"import time; {code}; print(time.process_time())"
        return float(subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True, cwd=ROOT).stdout)

    ratios: list[float] = []
    while not ratios or (ratios[-1] >= 2.0 and len(ratios) < 3):
        runs = [(cpu_s("import numpy, msgspec, asyncio"), cpu_s("import engine.searcher, engine.store.objects")) for _ in range(3)]
        alone, ours = (min(times) for times in zip(*runs, strict=True))
        ratios.append(ours / alone)
    assert min(ratios) < 2.0


def test_importing_the_function_costs_little_more_than_numpy_and_litestar() -> None:
    """CPU seconds with modules compiled, the best of three taken in turns, at the third try if others work hard; the application is made in it."""
    from benchmarks.cold_start import measure_imports

    ratios: list[float] = []
    while not ratios or (ratios[-1] >= MAX_IMPORT_RATIO and len(ratios) < 3):
        ratios.append(measure_imports(3)["ratio_cpu"])
    assert min(ratios) < MAX_IMPORT_RATIO


def test_the_function_imports_nothing_heavy_before_it_is_needed() -> None:
    code = "import sys, handler.lambda_http; print(' '.join(sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split())
    heavy = {"boto3", "botocore", "aioboto3", "onnxruntime", "tokenizers", "sqlite3", "numexpr", "scipy", "structlog", "prometheus_client"}
    assert not loaded & (heavy | {"pydantic", "granian", "huggingface_hub"})


async def _quantised_in(folder: Path) -> None:
    reader = Reader(open_store(str(folder)))
    await create(reader.store, "x", IndexConfig())
    await reader.writer("x").add(*CORPUS.part(0, 200))
    await compact(reader, "x", force=True)


def test_a_first_cold_search_imports_nothing_late(tmp_path: Path) -> None:
    """numpy.ma takes 20 to 40 ms, and np.unique asks for it."""
    asyncio.run(_quantised_in(tmp_path))
    code = """
import asyncio, sys
import numpy as np
from engine.index.reader import Reader
from engine.searcher import Searcher
from engine.store.objects import open_store

async def run():
    reader = Reader(open_store(sys.argv[1]))
    before = set(sys.modules)
    [answer] = await Searcher(reader).search(await reader.snapshot("x"), [np.ones((4, 64), np.float32)], mode="cold")
    assert answer.stats.n_cold_segments == 1
    print(sorted(set(sys.modules) - before))

asyncio.run(run())
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "[]"


def test_the_settings_of_a_function_are_read_before_numpy_is_imported() -> None:
    code = "import sys, handler.runtime, engine.store.objects; print(' '.join(sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split())
    assert not loaded & {"numpy", "litestar", "mangum"}
