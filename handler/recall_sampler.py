"""Recall while serving: now and then a search is repeated with much greater effort, and compared. Off unless TARTAN_RECALL_SAMPLE is set.

The repetition reranks up to EFFORT documents: in an index of no more than that it is what the preset `exact` finds. It runs after the
answer is out, one at a time, on the threads that searches use; what comes meanwhile is not sampled. Nothing of a query is kept or logged.
What it sees is the search's own loss, not the codec's (engine/evaluate.py, `tartan recall`).
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from engine.config import SearchParams
from engine.errors import EngineError
from engine.evaluate import ABSENT, recall_at_k
from engine.index.reader import Snapshot
from engine.searcher import Answer, Searcher

if TYPE_CHECKING:
    from handler.metrics import Metrics

EFFORT = 16_384
"""Documents reranked in the repetition. Over 20,000 abstracts (3.1 million tokens) it takes 28 ms of CPU, a usual search 18 (benchmarks/observing.py)."""
EFFORT_PROBE = 64


class RecallSampler:
    """`share` of the searches offered are repeated; their recall goes to `metrics.recall`."""

    def __init__(self, searcher: Searcher, metrics: Metrics, share: float, *, rng: random.Random | None = None) -> None:
        self._searcher, self._metrics, self._share = searcher, metrics, share
        self._rng = rng or random.Random()
        self._running: asyncio.Task[None] | None = None

    def offer(self, snapshot: Snapshot, query: np.ndarray, params: SearchParams, subset: np.ndarray | None, answer: Answer) -> None:
        """A search that was answered. One that read cold is left alone: repeating it would cost the store many requests."""
        is_busy = self._running is not None and not self._running.done()
        if is_busy or not params.k or answer.stats.n_cold_segments or self._rng.random() >= self._share:
            return
        work = self._measure(snapshot, query, params, subset, answer.ids)
        self._running = asyncio.get_running_loop().create_task(work, context=contextvars.Context())

    async def settle(self) -> None:
        """Wait for the repetition under way."""
        if self._running is not None:
            await self._running

    async def _measure(
        self, snapshot: Snapshot, query: np.ndarray, params: SearchParams, subset: np.ndarray | None, ids: np.ndarray
    ) -> None:
        hard = msgspec.structs.replace(params, n_probe=EFFORT_PROBE, n_candidates=EFFORT, n_rerank=EFFORT, centroid_score_threshold=None)
        try:
            true = (await self._searcher.search(snapshot, [query], hard, subset=subset, with_rows=False))[0].ids
        except EngineError:
            return  # the store failed, and has said so elsewhere
        rows = [np.pad(found[: params.k], (0, params.k - len(found[: params.k])), constant_values=ABSENT) for found in (true, ids)]
        share = float(recall_at_k(rows[0][None], rows[1][None], params.k)[0])
        self._metrics.recall.labels(self._metrics.index_label(snapshot.index)).observe(share)
