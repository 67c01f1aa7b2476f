"""What a commit costs as the index grows: adds of ten documents to an index of 1,000 and of 100,000 documents, in turn.

    python -m benchmarks.commits [--sizes 1000,100000] [--rounds 40] [--json FILE]

The store is a directory (fsync on) and, for the arithmetic of a real object store, the same behind a fixed delay for each request, so that
the dependent rounds show. Prints median milliseconds per size, their ratio, and the requests that follow one another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from engine.config import IndexConfig
from engine.index.bulk import Block, BulkBuild
from engine.index.commit import create
from engine.index.reader import Reader
from engine.store.base import ObjectStore
from engine.store.objects import open_store
from engine.store.wrappers import CountingStore, DelayStore

TOKENS_PER_DOCUMENT = 8
DIM = 64
DELAY_S = 0.02


class _Source:
    """Short random documents: only their number matters here."""

    def __init__(self, n_documents: int) -> None:
        self.n_documents, self.n_tokens = n_documents, n_documents * TOKENS_PER_DOCUMENT
        self.fingerprint = f"random-{n_documents}"

    def sample(self, n_tokens: int) -> np.ndarray:
        return _tokens(min(n_tokens, self.n_tokens, 200_000) // TOKENS_PER_DOCUMENT + 1, 1)

    def blocks(self, first_document: int):  # type: ignore[no-untyped-def]
        for start in range(first_document, self.n_documents, 2000):
            n = min(2000, self.n_documents - start)
            yield Block(_tokens(n, start + 2), np.arange(n + 1) * TOKENS_PER_DOCUMENT)


def _tokens(n_documents: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n_documents * TOKENS_PER_DOCUMENT, DIM), dtype=np.float32)


async def _add_ms(store: ObjectStore, index: str, n_rounds: int) -> list[tuple[float, int]]:
    """(milliseconds, dependent rounds) of adds of ten documents, the process knowing the generation in force."""
    counted = CountingStore(store)
    writer = Reader(counted).writer(index)
    offsets = np.arange(11) * TOKENS_PER_DOCUMENT
    fields = [{"title": f"document {n}", "year": 2000 + n} for n in range(10)]
    await writer.add(_tokens(10, 0), offsets, fields=fields)
    taken = []
    for n in range(n_rounds):
        began = time.perf_counter()
        with counted.window() as cost:
            await writer.add(_tokens(10, n), offsets, fields=fields)
        taken.append(((time.perf_counter() - began) * 1000, cost.rounds))
    return taken


async def measure(sizes: list[int], n_rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds and rounds by store and size; sizes take turns, round by round."""
    with tempfile.TemporaryDirectory() as folder:
        directory = open_store(folder)
        for size in sizes:
            await create(directory, f"n{size}", IndexConfig())
            await BulkBuild(Reader(directory), f"n{size}", _Source(size)).run()
        slow = DelayStore(directory, p50_s=DELAY_S, p99_s=DELAY_S)
        results: dict[str, dict[str, float]] = {}
        for name, store in (("directory", directory), (f"directory, {DELAY_S * 1000:.0f} ms a request", slow)):
            taken: dict[int, list[tuple[float, int]]] = {size: [] for size in sizes}
            for _ in range(4):
                for size in sizes:
                    taken[size] += await _add_ms(store, f"n{size}", n_rounds // 4)
            line = {f"{size} documents, ms": round(statistics.median(ms for ms, _ in taken[size]), 2) for size in sizes}
            line["ratio"] = round(line[f"{sizes[-1]} documents, ms"] / line[f"{sizes[0]} documents, ms"], 3)
            line["rounds"] = max(rounds for size in sizes for _, rounds in taken[size])
            results[name] = line
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1000,100000")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = asyncio.run(measure([int(size) for size in arguments.sizes.split(",")], arguments.rounds))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))
    for name, line in results.items():
        print(name, *(f"{key} {value}" for key, value in line.items()), sep="\n    ")


if __name__ == "__main__":
    main()
