"""Opening an index: the manifest in force (or an older one) and, through Parts, everything it names.

A Snapshot is one generation, held; it never changes and never mixes with another. Opening costs one request (a conditional one when a
generation is known already) and reads nothing else. Nothing here writes to the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from engine.errors import NotFound
from engine.format.manifest import Column, Manifest, SegmentRef
from engine.index.clock import Clock, SystemClock
from engine.index.commit import Head, load_head, refresh_head
from engine.index.memory import Memory
from engine.index.parts import Parts
from engine.index.plan import newest_codec
from engine.index.snapshots import manifest_at
from engine.index.writer import Writer
from engine.store.base import ObjectStore
from engine.store.ranges import DEFAULT_POLICY, ReadPolicy
from engine.store.wrappers import Cost, CountingStore

MAX_KNOWN_HEADS = 4096
MAX_HEAD_AGE_S = 600.0
"""Well under MaintenanceParams.grace_s, with CommitParams.max_upload_age_s on top."""


class Reader:
    """Everything of a process that reads and writes indices of one store: what is known, what is in memory, who computes.

    memory_bytes  budget for decoded segments and codecs (memory.py)
    executor      threads for arithmetic; one per core, each with a single BLAS thread
    counter       the store, or a layer of it, whose requests are the cost of a search (beneath the cache); by default `store` if it counts
    policy        which ranges share a request: what one costs against bytes that nobody wants
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        memory_bytes: int = 1 << 30,
        executor: ThreadPoolExecutor | None = None,
        counter: CountingStore | None = None,
        clock: Clock | None = None,
        policy: ReadPolicy = DEFAULT_POLICY,
    ) -> None:
        self.store = store
        self._counter = counter or (store if isinstance(store, CountingStore) else None)
        self.parts = Parts(store, Memory(memory_bytes), executor, policy)
        self.clock = clock or SystemClock()
        self._heads: dict[str, tuple[Head, float]] = {}
        self._writers: dict[str, Writer] = {}

    async def snapshot(self, index: str, *, max_age_s: float = 0.0, generation: int | None = None) -> Snapshot:
        """Open a generation (None: the one in force).

        max_age_s  0 asks the store, so that every commit that ended before the call is seen; more allows a known generation that
                   was in force at most so long ago, without a request
        Raises NotFound (`index-not-found`, `generation-not-found`).
        """
        head = await self.head(index, max_age_s=max_age_s)
        manifest = head.manifest
        if generation is not None and generation != manifest.generation:
            manifest = await manifest_at(self.store, index, generation, head=head)
        return Snapshot(self, index, manifest)

    async def head(self, index: str, *, max_age_s: float = 0.0) -> Head:
        """CURRENT. Concurrent strong reads do not share an answer that was asked for before they came."""
        known = self._heads.get(index)
        started_s = self.clock.monotonic_s()
        if known is not None and max_age_s > 0 and started_s - known[1] <= max_age_s:
            return known[0]
        try:
            head = await (load_head(self.store, index) if known is None else refresh_head(self.store, index, known[0]))
        except NotFound:
            self.forget_head(index)
            raise
        self._remember(index, head, started_s)
        return head

    def known_head(self, index: str) -> Head | None:
        """The newest generation seen lately, without asking; for writers, who find out if it is stale. Never one that may have been
        collected by now: whoever builds on it would put its archive back."""
        known = self._heads.get(index)
        return known[0] if known is not None and self.clock.monotonic_s() - known[1] <= MAX_HEAD_AGE_S else None

    def presumed_head(self, index: str) -> Head | None:
        """The newest generation ever seen, however long ago: only to begin work that is thrown away unless it proves to be in force."""
        known = self._heads.get(index)
        return known[0] if known is not None else None

    def doubt_heads(self) -> None:
        """Take what is known for older than any `max_age_s`: time may have passed that the clock did not count (a frozen process)."""
        self._heads = {index: (head, float("-inf")) for index, (head, _) in self._heads.items()}

    def remember_head(self, index: str, head: Head, *, asked_s: float | None = None) -> None:
        """asked_s: when the commit that made it began (monotonic; None: now). When its answer came, others may have followed."""
        self._remember(index, head, self.clock.monotonic_s() if asked_s is None else asked_s)

    def forget_head(self, index: str) -> None:
        self._heads.pop(index, None)

    def _remember(self, index: str, head: Head, asked_s: float) -> None:
        """Keep the newer of two answers that may have arrived out of order."""
        known = self._heads.get(index)
        if known is not None:
            before = known[0].manifest
            if before.index_id == head.manifest.index_id and before.generation > head.manifest.generation:
                return
            self._heads.pop(index)
        elif len(self._heads) >= MAX_KNOWN_HEADS:
            self._heads.pop(next(iter(self._heads)))
        self._heads[index] = (head, asked_s)

    def counted(self) -> AbstractContextManager[Cost]:
        """Counts the requests of what runs inside; zeros if no store counts."""
        return nullcontext(Cost()) if self._counter is None else self._counter.window()

    def writer(self, index: str) -> Writer:
        """The process's writer of an index; calls through it share commits."""
        writer = self._writers.get(index)
        if writer is None:
            writer = self._writers[index] = Writer(self.store, index, self.parts, self, clock=self.clock)
        return writer


class Snapshot:
    """One generation of an index, opened for reading."""

    def __init__(self, reader: Reader, index: str, manifest: Manifest) -> None:
        self.reader, self.index, self.manifest = reader, index, manifest
        self.parts = reader.parts

    @property
    def n_documents(self) -> int:
        """Live documents."""
        return self.manifest.n_documents

    @property
    def n_tokens(self) -> int:
        """Tokens stored, those of deleted documents included until compaction drops them."""
        return sum(segment.n_tokens for segment in self.manifest.segments)

    @property
    def n_centroids(self) -> int:
        """Of the newest codec; 0 while everything is flat."""
        newest = newest_codec(self.manifest)
        return 0 if newest is None else newest.n_centroids

    @property
    def dim(self) -> int | None:
        return self.manifest.dim

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.manifest.columns

    @property
    def has_metadata(self) -> bool:
        return bool(self.manifest.columns)

    @property
    def segments(self) -> tuple[SegmentRef, ...]:
        return self.manifest.segments

    async def live_ids(self) -> np.ndarray:
        """Every document id, int64 ascending."""
        found = await asyncio.gather(*(self.parts.live_ids(self.index, segment) for segment in self.segments))
        return np.sort(np.concatenate([np.empty(0, np.int64), *found]))

    async def rows(self, ids: Sequence[int] | np.ndarray) -> list[dict[str, object] | None]:
        """Metadata of documents by id: every column, null where absent, and `_subset_`; None for an id that is not there."""
        ids = np.asarray(ids, np.int64)
        found: dict[int, dict[str, object]] = {}
        per_segment = await asyncio.gather(*(self._rows_in(segment, ids) for segment in self.segments))
        for rows in per_segment:
            found.update(rows)
        return [found.get(document_id) for document_id in ids.tolist()]

    async def _rows_in(self, segment: SegmentRef, ids: np.ndarray) -> dict[int, dict[str, object]]:
        if not len(ids) or ids.max() < segment.first_id or ids.min() > segment.last_id:
            return {}
        ordinals = await self.parts.live_ordinals_of(self.index, segment, ids)
        if not len(ordinals):
            return {}
        codec = self.manifest.codec_of(segment) if segment.codec else None
        stored = await self.parts.fields(self.index, segment, ordinals, codec)
        own_ids = (await self.parts.ids(self.index, segment))[ordinals]
        return {document_id: self.full_row(document_id, fields) for document_id, (_, fields) in zip(own_ids.tolist(), stored, strict=True)}

    def full_row(self, document_id: int, fields: dict[str, object] | None) -> dict[str, object]:
        """A row as answers carry it."""
        fields = fields or {}
        row: dict[str, object] = {"_subset_": document_id}
        row.update((column.name, fields.get(column.name)) for column in self.columns)
        return row

    async def select(self, condition: str, parameters: Sequence[object] = ()) -> np.ndarray:
        """Ids of the documents that meet a condition, int64 ascending. InvalidRequest (`invalid-condition`) if it does not parse."""
        from engine.index.filters import select

        return await select(self, condition, parameters)

    async def keyword(self, queries: Sequence[str], k: int, subset: np.ndarray | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """The best k documents of each keyword query: (ids int64, scores float32), best first; only those of `subset` if given."""
        from engine.index.filters import keyword

        return await keyword(self, queries, k, subset)
