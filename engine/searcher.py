"""One search, stage by stage: plan, fetch, compute, merge. Returns hits and what they cost.

    masks      documents that are allowed and not deleted, per segment
    near       flat segments, and quantised ones in memory: engine/near.py
    cold       quantised segments that are not in memory: engine/cold.py
    merge      score falling, then document id

Scoring never waits for the network: whatever is fetched is fetched before the arithmetic on it starts, and the arithmetic runs on the
executor's threads, one BLAS thread each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from engine.cold import CodecCells, cells_to_read, read_codec_cells, search_segment
from engine.config import MAX_QUERY_TOKENS, MAX_QUERY_VALUE, ColdParams, SearchParams
from engine.errors import InvalidRequest
from engine.explain import Match, best_matches
from engine.format.fields import decode_fields
from engine.format.manifest import CodecRef
from engine.index.parts import apply_patches
from engine.index.reader import Reader, Snapshot
from engine.near import Bars, Hits, Ranked, Ranking, Segment, centroid_tables, decide, finish, rank, search_on_one_thread, sharing
from engine.opening import Mode, Opened, Opener, together
from engine.scoring.cascade import StageStats
from engine.scoring.topk import top_k
from engine.store.wrappers import Cost


class SearchStats(msgspec.Struct):
    """What an answer cost. times_ms by stage; requests, bytes and rounds are those of the store, for the whole call."""

    times_ms: dict[str, float] = msgspec.field(default_factory=dict)
    n_candidates: int = 0
    n_reranked: int = 0
    n_tokens_scored: int = 0
    n_requests: int = 0
    n_bytes: int = 0
    n_rounds: int = 0
    n_cold_segments: int = 0


class Answer(msgspec.Struct, frozen=True):
    """The hits of one query, best first.

    ids      int64 (n,) document ids, n <= k
    scores   float32 (n,), MaxSim
    rows     metadata of each hit, every column and `_subset_`; empty if not asked for
    keys     external id of each hit, or None; empty if rows were not asked for
    matches  per hit and query token the document token that answered it, if asked for
    failed   parts of the index that were not searched, where the caller allowed that (engine/fanout/): shard, error, cause
    intervals  when the stages ran in this process (StageStats), for traces
    """

    ids: np.ndarray
    scores: np.ndarray
    rows: list[dict[str, Any]]
    keys: list[str | None]
    stats: SearchStats
    matches: list[list[Match]] | None = None
    failed: tuple[dict[str, Any], ...] = ()
    intervals: list[tuple[str, float, float]] = msgspec.field(default_factory=list)


class PartHits(msgspec.Struct, frozen=True):
    """Hits of a part of a search, best first: ids int64, scores float32, positions int64 (of the segment in the manifest), ordinals
    int64, (n,) each."""

    ids: np.ndarray
    scores: np.ndarray
    positions: np.ndarray
    ordinals: np.ndarray


class Searcher:
    """Searches snapshots of one Reader.

    cold_params  how segments that are not in memory are read
    """

    def __init__(self, reader: Reader, *, cold_params: ColdParams | None = None) -> None:
        self.reader, self.parts = reader, reader.parts
        self.cold_params = cold_params or ColdParams()
        self._opener = Opener(self.parts, self.cold_params)

    async def search(
        self,
        snapshot: Snapshot,
        queries: Sequence[np.ndarray],
        params: SearchParams | None = None,
        *,
        subset: np.ndarray | None = None,
        with_rows: bool = True,
        explain: bool = False,
        mode: Mode = "auto",
    ) -> list[Answer]:
        """Answer each query, in order.

        queries  float (Q, D) each, used as given (not normalised)
        subset   document ids that may be hits: None allows all, an empty one none; unknown ids are ignored
        mode     "warm" loads what is missing into memory first, "cold" never does; "auto" reads cold what is not in memory, unless
                 the store has it as a local file, the segment is small, or the batch is large

        Raises InvalidRequest (`dimension-mismatch` among others), and whatever the store raises. Cost: at most three dependent rounds.
        """
        params = params or SearchParams()
        arrays = [_checked_query(query, snapshot.dim) for query in queries]
        began = time.perf_counter()
        with self.reader.counted() as cost:
            everything = range(len(snapshot.segments)) if params.k else []
            opened = await self._opener.open(snapshot, everything, subset, mode, len(arrays))
            answers = await together([self._search_one(snapshot, opened, query, params, with_rows, explain, began) for query in arrays])
        for answer in answers:
            answer.stats.n_requests, answer.stats.n_bytes, answer.stats.n_rounds = cost.n_requests, cost.bytes_read, cost.rounds
        return answers

    async def warm(self, snapshot: Snapshot) -> None:
        """Bring everything that a search of this snapshot needs into memory, as far as the budget goes."""
        await self._opener.open(snapshot, range(len(snapshot.segments)), None, "warm", 0)

    # Parts of a search: some segments here, others elsewhere (engine/fanout/)

    async def rank_part(
        self,
        snapshot: Snapshot,
        positions: Sequence[int],
        query: np.ndarray,
        params: SearchParams,
        *,
        subset: np.ndarray | None,
        mode: Mode,
    ) -> tuple[Ranking, SearchStats]:
        """What the segments at these positions of the manifest bring to the decision of `decide`. Arguments as for `search`."""
        query, began, stats = _checked_query(query, snapshot.dim), time.perf_counter(), StageStats()
        with self.reader.counted() as cost:
            opened = await self._opener.open(snapshot, positions, subset, mode, 1)
            ranked = await self._rank_near(opened, query, params, stats)
        return Ranking.of(ranked, params), _reported(stats, 0, began, cost)

    async def score_part(
        self,
        snapshot: Snapshot,
        positions: Sequence[int],
        query: np.ndarray,
        params: SearchParams,
        bars: Bars,
        *,
        subset: np.ndarray | None,
        mode: Mode,
    ) -> tuple[PartHits, SearchStats]:
        """The best k hits of the segments at these positions, given what all parts decided. Arguments as for `search`."""
        query, began, stats = _checked_query(query, snapshot.dim), time.perf_counter(), StageStats()
        with self.reader.counted() as cost:
            opened = await self._opener.open(snapshot, positions, subset, mode, 1)
            groups = await self._score(snapshot, opened, query, params, stats, bars)
        hits = _merge(groups, params.k)
        places = {ref.id: position for position, ref in enumerate(snapshot.segments)}
        found = PartHits(
            np.array([group.ids[n] for group, n in hits], np.int64),
            np.array([group.scores[n] for group, n in hits], np.float32),
            np.array([places[group.segment.ref.id] for group, _ in hits], np.int64),
            np.array([group.ordinals[n] for group, n in hits], np.int64),
        )
        return found, _reported(stats, len(opened.cold), began, cost)

    async def complete(
        self, snapshot: Snapshot, found: PartHits, query: np.ndarray, *, with_rows: bool = True, explain: bool = False
    ) -> Answer:
        """Hits that parts have found, as an answer: rows, keys and matches are read here."""
        groups: dict[int, Hits] = {}
        hits = []
        for place, position in enumerate(found.positions.tolist()):
            if position not in groups:
                ref = snapshot.segments[position]
                segment = Segment(ref, snapshot.manifest.codec_of(ref) if ref.codec else None, None)
                groups[position] = Hits(segment, found.ids, found.scores, found.ordinals)
            hits.append((groups[position], place))
        return await self._answer(snapshot, hits, _checked_query(query, snapshot.dim), with_rows, explain)

    # One query

    async def _search_one(
        self,
        snapshot: Snapshot,
        opened: Opened,
        query: np.ndarray,
        params: SearchParams,
        with_rows: bool,
        explain: bool,
        began: float,
    ) -> Answer:
        stats = StageStats()
        hits = _merge(await self._score(snapshot, opened, query, params, stats, None), params.k)
        answer = await self._answer(snapshot, hits, query, with_rows, explain)
        _report(answer.stats, stats, len(opened.cold), began)
        answer.intervals.extend(stats.intervals)
        return answer

    async def _score(
        self,
        snapshot: Snapshot,
        opened: Opened,
        query: np.ndarray,
        params: SearchParams,
        stats: StageStats,
        bars: Bars | None,
    ) -> list[Hits]:
        """Hits of each segment. bars: what this and other parts of a search decided; None if these are all segments."""
        found = await together(
            [self._search_near(opened, query, params, stats, bars), *self._search_cold(snapshot, opened.cold, query, params, stats)]
        )
        return [hit for group in found for hit in (group if isinstance(group, list) else [group])]

    async def _search_near(
        self, opened: Opened, query: np.ndarray, params: SearchParams, stats: StageStats, bars: Bars | None
    ) -> list[Hits]:
        """Segments in memory. One hop to a thread if at most one body is large, else a hop per large one and stage."""
        if bars is None and sum(not body.is_small for body in opened.bodies) <= 1:
            hits, own = await self.parts.compute(search_on_one_thread, opened.flat, opened.bodies, query, params)
            stats.merge(own)
            return hits
        ranked = await self._rank_near(opened, query, params, stats)
        bars = bars or decide([Ranking.of(ranked, params)], params)
        jobs = [job for one in ranked for job in one.jobs]
        finished = await together([self.parts.compute(finish, shared, params, bars) for shared in sharing(jobs)])
        for _, own in finished:
            stats.merge(own)
        return [hits for one in ranked for hits in one.flat] + [hit for hits, _ in finished for hit in hits]

    async def _rank_near(self, opened: Opened, query: np.ndarray, params: SearchParams, stats: StageStats) -> list[Ranked]:
        """All stages of segments in memory but the exact one of quantised ones: each large body on a thread, and all that is small on one."""
        tables, own = await self.parts.compute(centroid_tables, opened.bodies, query, params)
        stats.merge(own)
        large = [body for body in opened.bodies if not body.is_small]
        small = [body for body in opened.bodies if body.is_small]
        work = [self.parts.compute(rank, [], [body], tables, query, params) for body in large]
        if small or opened.flat:
            work.append(self.parts.compute(rank, opened.flat, small, tables, query, params))
        ranked = await together(work)
        for one in ranked:
            stats.merge(one.stats)
        return ranked

    def _search_cold(
        self, snapshot: Snapshot, segments: Sequence[Segment], query: np.ndarray, params: SearchParams, stats: StageStats
    ) -> list[Any]:
        """One job per segment; segments of one codec share the reading of its cells."""
        reading: dict[str, tuple[np.ndarray, asyncio.Task[CodecCells]]] = {}
        jobs = []
        for segment in segments:
            assert segment.codec is not None
            if segment.codec.id not in reading:
                reading[segment.codec.id] = self._read_cells(snapshot, segment.codec, query)
            cells, task = reading[segment.codec.id]
            jobs.append(self._search_cold_segment(snapshot.index, segment, query, params, cells, task, stats))
        return jobs

    def _read_cells(self, snapshot: Snapshot, codec: CodecRef, query: np.ndarray) -> tuple[np.ndarray, asyncio.Task[CodecCells]]:
        """Choose the cells that a query reads of one codec and its segments, and begin to read the codec's part.

        All segments of the codec count, whether they are searched here and now or not: so the choice does not depend on who searches them.
        """
        own = [ref for ref in snapshot.segments if ref.codec == codec.id]
        cold = self.cold_params
        cells = cells_to_read(query, codec, own, cold)
        return cells, asyncio.create_task(read_codec_cells(self.parts, snapshot.index, codec, cells, cold))

    async def _search_cold_segment(
        self,
        index: str,
        segment: Segment,
        query: np.ndarray,
        params: SearchParams,
        cells: np.ndarray,
        codec: asyncio.Task[CodecCells],
        stats: StageStats,
    ) -> Hits:
        assert segment.codec is not None
        own = StageStats()
        hits = await search_segment(
            self.parts, index, segment.ref, codec, segment.codec, cells, query, params, self.cold_params, segment.mask, own
        )
        stats.merge(own)
        return Hits(segment, hits.ids, hits.scores, hits.ordinals, hits)

    # The answer

    async def _answer(
        self, snapshot: Snapshot, hits: Sequence[tuple[Hits, int]], query: np.ndarray, with_rows: bool, explain: bool
    ) -> Answer:
        ids = np.array([hit.ids[n] for hit, n in hits], np.int64)
        scores = np.array([hit.scores[n] for hit, n in hits], np.float32)
        rows: list[dict[str, Any]] = []
        keys: list[str | None] = []
        if with_rows:
            stored = await self._stored_fields(snapshot, hits)
            rows = [snapshot.full_row(document_id, fields) for document_id, (_, fields) in zip(ids.tolist(), stored, strict=True)]
            keys = [key for key, _ in stored]
        matches = await self._explain(snapshot, hits, query) if explain else None
        return Answer(ids, scores, rows, keys, SearchStats(), matches)

    async def _stored_fields(self, snapshot: Snapshot, hits: Sequence[tuple[Hits, int]]) -> list[tuple[str | None, dict[str, Any] | None]]:
        """Key and fields of each hit, a segment's hits together; those of cold segments came with their records."""
        stored: list[tuple[str | None, dict[str, Any] | None]] = [(None, None)] * len(hits)
        for group, places in _by_segment(hits):
            positions = np.array([hits[place][1] for place in places])
            ordinals = group.ordinals[positions]
            if group.cold is None:
                found = await self.parts.fields(snapshot.index, group.segment.ref, ordinals, group.segment.codec)
            else:
                blobs = [group.cold.records.blobs[n] for n in group.cold.rows[positions].tolist()]
                found = [decode_fields(blob, name=group.segment.ref.id, section=0) for blob in blobs]
                found = apply_patches(found, ordinals, await self.parts.patches(snapshot.index, group.segment.ref))
            for place, item in zip(places, found, strict=True):
                stored[place] = item
        return stored

    async def _explain(self, snapshot: Snapshot, hits: Sequence[tuple[Hits, int]], query: np.ndarray) -> list[list[Match]]:
        matches: list[list[Match]] = [[]] * len(hits)
        for group, places in _by_segment(hits):
            ordinals = group.ordinals[[hits[place][1] for place in places]]
            tokens, offsets = await self.parts.tokens(snapshot.index, group.segment.ref, ordinals, group.segment.codec)
            found = await self.parts.compute(best_matches, query, tokens, offsets)
            for place, item in zip(places, found, strict=True):
                matches[place] = item
        return matches


# Small steps


def _checked_query(query: np.ndarray, dim: int | None) -> np.ndarray:
    """float32 (Q, D), of values whose scores are finite, or InvalidRequest."""
    array = np.asarray(query, np.float32)
    if array.ndim != 2 or not 1 <= len(array) <= MAX_QUERY_TOKENS:
        raise InvalidRequest(f"a query has 1 to {MAX_QUERY_TOKENS} token vectors", found=array.shape)
    if dim is not None and array.shape[1] != dim:
        raise InvalidRequest(
            "the query has another dimension than the index", code="dimension-mismatch", expected=dim, found=array.shape[1]
        )
    if not np.isfinite(array).all():
        raise InvalidRequest("a query vector has a value that is not finite")
    if np.abs(array).max(initial=0) > MAX_QUERY_VALUE:
        raise InvalidRequest("a query vector has a value so large that scores would overflow", limit=MAX_QUERY_VALUE)
    return np.ascontiguousarray(array)


def _merge(groups: Sequence[Hits], k: int) -> list[tuple[Hits, int]]:
    """(group, place in it) of the best k hits of all segments: score falling, then id."""
    if not groups:
        return []
    scores = np.concatenate([group.scores for group in groups])
    ids = np.concatenate([group.ids for group in groups])
    starts = np.cumsum([0, *(len(group.ids) for group in groups)])
    best = top_k(scores, k, ids)
    owners = np.searchsorted(starts, best, side="right") - 1
    return [(groups[owner], int(place - starts[owner])) for owner, place in zip(owners.tolist(), best.tolist(), strict=True)]


def _by_segment(hits: Sequence[tuple[Hits, int]]) -> list[tuple[Hits, list[int]]]:
    """Hits of one segment together: (group, their places among all hits)."""
    groups: dict[str, tuple[Hits, list[int]]] = {}
    for place, (group, _) in enumerate(hits):
        groups.setdefault(group.segment.ref.id, (group, []))[1].append(place)
    return list(groups.values())


def _reported(stages: StageStats, n_cold: int, began: float, cost: Cost) -> SearchStats:
    """What a part of a search cost."""
    stats = SearchStats(n_requests=cost.n_requests, n_bytes=cost.bytes_read, n_rounds=cost.rounds)
    _report(stats, stages, n_cold, began)
    return stats


def _report(stats: SearchStats, stages: StageStats, n_cold: int, began: float) -> None:
    stats.times_ms = {stage: round(seconds * 1000, 3) for stage, seconds in stages.times.items()}
    stats.times_ms["total"] = round((time.perf_counter() - began) * 1000, 3)
    stats.n_candidates, stats.n_reranked, stats.n_tokens_scored = stages.n_candidates, stages.n_reranked, stages.n_tokens_scored
    stats.n_cold_segments = n_cold
