"""Tartan through its engine, without HTTP: a bulk build into a local directory, warm and cold searches.

Warm is what a container does: everything in memory, one snapshot. Cold is what a fresh Lambda does: nothing in memory, a new Reader,
CURRENT first; the store is the same directory behind DelayStore, whose first-byte times are those of S3 (engine/store/wrappers.py), so
times are of a model of S3, and requests, bytes and rounds are counts. The engine is asynchronous: one event loop in a thread of its own
serves all callers.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.collections import Vectors
from engine.config import IndexConfig, SearchParams
from engine.errors import NotFound
from engine.index.bulk import Block, BulkBuild
from engine.index.commit import create
from engine.index.reader import Reader, Snapshot
from engine.searcher import Searcher
from engine.store.objects import open_store
from engine.store.wrappers import CountingStore, DelayStore

T = TypeVar("T")
_INDEX = "benchmark"
_BLOCK_DOCUMENTS = 1024
_USUAL = {"n_probe": 8, "n_candidates": 4096, "n_rerank": 1024}


class VectorsSource:
    """Vectors as a source of a bulk build."""

    def __init__(self, vectors: Vectors) -> None:
        self._vectors = vectors
        self.fingerprint = f"{vectors.name}-{vectors.n_documents}-{vectors.n_tokens}"
        self.n_documents, self.n_tokens = vectors.n_documents, vectors.n_tokens

    def sample(self, n_tokens: int) -> np.ndarray:
        rows = np.random.default_rng(0).choice(self.n_tokens, min(n_tokens, self.n_tokens), replace=False)
        return np.asarray(self._vectors.tokens[np.sort(rows)])

    def blocks(self, first_document: int) -> Iterator[Block]:
        for start in range(first_document, self.n_documents, _BLOCK_DOCUMENTS):
            offsets = self._vectors.offsets[start : start + _BLOCK_DOCUMENTS + 1]
            yield Block(np.asarray(self._vectors.tokens[offsets[0] : offsets[-1]]), offsets - offsets[0])


class TartanEngine:
    """Peer `tartan`. n_build_threads 1, as the baselines build on one."""

    def __init__(self, folder: Path, nbits: int = 4, *, memory_bytes: int = 16 << 30) -> None:
        self.folder, self.nbits, self.name = folder, nbits, f"tartan-{nbits}bit"
        self._memory_bytes = memory_bytes
        self._params = dict(_USUAL)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def build(self, vectors: Vectors) -> dict[str, float]:
        """Build the index if it is not there, and bring it into memory."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return {"build_s": self._await(self._build(vectors))}

    async def _build(self, vectors: Vectors) -> float:
        """Seconds of the build, without the loading behind it."""
        started = time.perf_counter()
        self._store = open_store(str(self.folder))
        reader = Reader(self._store, memory_bytes=self._memory_bytes)
        try:
            snapshot = await reader.snapshot(_INDEX)
        except NotFound:
            await create(self._store, _INDEX, IndexConfig(nbits=self.nbits))
            snapshot = await reader.snapshot(_INDEX)
        if snapshot.n_documents == 0:
            await BulkBuild(reader, _INDEX, VectorsSource(vectors)).run()
            snapshot = await reader.snapshot(_INDEX)
        spent = time.perf_counter() - started
        self._snapshot: Snapshot = snapshot
        self._searcher = Searcher(reader)
        await self._searcher.warm(snapshot)
        return spent

    def search(self, query: np.ndarray, k: int) -> np.ndarray:
        """query float32 (Q, D) -> int64 (<= k,), best first."""
        params = SearchParams(k=k, **self._params)
        answers = self._await(self._searcher.search(self._snapshot, [query], params, with_rows=False, mode="warm"))
        return answers[0].ids

    def cold(self, query: np.ndarray, k: int) -> tuple[np.ndarray, dict[str, float]]:
        """A search by a process that knows nothing: ids, and what it took."""
        return self._await(self._cold(query, k))

    async def _cold(self, query: np.ndarray, k: int) -> tuple[np.ndarray, dict[str, float]]:
        store = CountingStore(DelayStore(self._store))
        reader = Reader(store)
        started = time.perf_counter()
        with store.window() as cost:
            snapshot = await reader.snapshot(_INDEX)
            answers = await Searcher(reader).search(snapshot, [query], SearchParams(k=k), mode="cold")
        seconds = time.perf_counter() - started
        return answers[0].ids, {"seconds": seconds, "requests": cost.n_requests, "bytes": cost.bytes_read, "rounds": cost.rounds}

    def sweep(self) -> tuple[dict[str, int], list[dict[str, int]]]:
        """The default, and settings from hasty to thorough."""
        reranked = [16, 32, 64, 128, 256, 512, 1024, 2048]
        return dict(_USUAL), [{**_USUAL, "n_candidates": max(1024, 4 * n), "n_rerank": n} for n in reranked]

    def configure(self, **params: int) -> None:
        self._params = params

    @property
    def stored_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
