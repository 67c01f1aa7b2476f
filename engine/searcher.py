"""One search, stage by stage: plan, fetch, compute, merge. Returns hits and what they cost.

    masks      documents that are allowed and not deleted, per segment
    flat       every document, exactly
    warm       quantised segments in memory: the cascade of engine/scoring; the shortlists of all segments are cut together, by approximate
               score, before the exact stage, so that the work does not grow with the number of segments
    cold       quantised segments that are not in memory: engine/cold.py
    merge      score falling, then document id

Scoring never waits for the network: whatever is fetched is fetched before the arithmetic on it starts, and the arithmetic runs on the
executor's threads, one BLAS thread each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from engine.cold import CodecCells, ColdHits, affordable_cells, choose_cells, read_codec_cells, search_segment
from engine.config import MAX_QUERY_TOKENS, ColdParams, SearchParams
from engine.errors import InvalidRequest
from engine.explain import Match, best_matches
from engine.format.fields import decode_fields
from engine.format.manifest import CodecRef, SegmentRef
from engine.index.parts import Hot, apply_patches, decoder_of, scoring_records
from engine.index.reader import Reader, Snapshot
from engine.scoring.cascade import SegmentArrays, Shortlist, StageStats, finish, shortlist
from engine.scoring.centroid_scores import CentroidScores, score_centroids
from engine.scoring.maxsim import maxsim
from engine.scoring.topk import top_k

Mode = Literal["auto", "warm", "cold"]
MAX_COLD_QUERIES = 4
"""A batch of more queries than this loads segments whole: their cells would add up to most of the segment."""


@dataclass
class SearchStats:
    """What an answer cost. times_ms by stage; requests, bytes and rounds are those of the store, for the whole call."""

    times_ms: dict[str, float] = field(default_factory=dict)
    n_candidates: int = 0
    n_reranked: int = 0
    n_tokens_scored: int = 0
    n_requests: int = 0
    n_bytes: int = 0
    n_rounds: int = 0
    n_cold_segments: int = 0


@dataclass(frozen=True)
class Answer:
    """The hits of one query, best first.

    ids      int64 (n,) document ids, n <= k
    scores   float32 (n,), MaxSim
    rows     metadata of each hit, every column and `_subset_`; empty if not asked for
    keys     external id of each hit, or None; empty if rows were not asked for
    matches  per hit and query token the document token that answered it, if asked for
    """

    ids: np.ndarray
    scores: np.ndarray
    rows: list[dict[str, Any]]
    keys: list[str | None]
    stats: SearchStats
    matches: list[list[Match]] | None = None


@dataclass(frozen=True)
class _Segment:
    """A segment on its way through a search. mask bool (N,): allowed and alive; None allows all."""

    ref: SegmentRef
    codec: CodecRef | None
    mask: np.ndarray | None
    arrays: SegmentArrays | None = None
    rotation: np.ndarray | None = None
    ids: np.ndarray | None = None
    tokens: np.ndarray | None = None
    offsets: np.ndarray | None = None


@dataclass(frozen=True)
class _Hits:
    """Hits of one segment: ids int64, scores float32, ordinals int64, (n,) each; `cold` holds their records if they were read for this query."""

    segment: _Segment
    ids: np.ndarray
    scores: np.ndarray
    ordinals: np.ndarray
    cold: ColdHits | None = None


class Searcher:
    """Searches snapshots of one Reader.

    cold_params  how segments that are not in memory are read
    """

    def __init__(self, reader: Reader, *, cold_params: ColdParams | None = None) -> None:
        self.reader, self.parts = reader, reader.parts
        self.cold_params = cold_params or ColdParams()

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
                 the store has it as a local file or the batch is large

        Raises InvalidRequest (`dimension-mismatch` among others), and whatever the store raises. Cost: at most three dependent rounds.
        """
        params = params or SearchParams()
        arrays = [_checked_query(query, snapshot.dim) for query in queries]
        began = time.perf_counter()
        with self.reader.counted() as cost:
            segments = await self._open(snapshot, subset, mode, len(arrays)) if params.k else []
            answers = await asyncio.gather(
                *(self._search_one(snapshot, segments, query, params, with_rows, explain, began) for query in arrays)
            )
        for answer in answers:
            answer.stats.n_requests, answer.stats.n_bytes, answer.stats.n_rounds = cost.n_requests, cost.bytes_read, cost.rounds
        return list(answers)

    async def warm(self, snapshot: Snapshot) -> None:
        """Bring everything that a search of this snapshot needs into memory, as far as the budget goes."""
        await self._open(snapshot, None, "warm", 0)

    # Opening segments

    async def _open(self, snapshot: Snapshot, subset: np.ndarray | None, mode: Mode, n_queries: int) -> list[_Segment]:
        wanted = None if subset is None else np.unique(np.asarray(subset, np.int64))
        opened = await asyncio.gather(*(self._open_segment(snapshot, ref, wanted, mode, n_queries) for ref in snapshot.segments))
        return [segment for segment in opened if segment.mask is None or segment.mask.any()]

    async def _open_segment(self, snapshot: Snapshot, ref: SegmentRef, wanted: np.ndarray | None, mode: Mode, n_queries: int) -> _Segment:
        mask = await self._mask(snapshot.index, ref, wanted)
        if mask is not None and not mask.any():
            return _Segment(ref, None, mask)
        if ref.kind == "flat":
            flat = await self.parts.flat(snapshot.index, ref)
            return _Segment(ref, None, mask, ids=flat.ids, tokens=flat.tokens, offsets=flat.offsets)
        codec = snapshot.manifest.codec_of(ref)
        if not await self._should_load(snapshot.index, ref, mode, n_queries):
            return _Segment(ref, codec, mask)
        (hot, arrays), whole_codec = await asyncio.gather(self._arrays(snapshot.index, ref, codec), self.parts.codec(snapshot.index, codec))
        return _Segment(ref, codec, mask, arrays=arrays, rotation=whole_codec.rotation, ids=hot.ids)

    async def _mask(self, index: str, ref: SegmentRef, wanted: np.ndarray | None) -> np.ndarray | None:
        if wanted is None:
            return await self.parts.alive(index, ref)
        mask = np.zeros(ref.n_documents, bool)
        mask[await self.parts.live_ordinals_of(index, ref, wanted)] = True
        return mask

    async def _should_load(self, index: str, ref: SegmentRef, mode: Mode, n_queries: int) -> bool:
        if mode != "auto":
            return mode == "warm"
        if n_queries > MAX_COLD_QUERIES or (self.parts.known_hot(ref) and self.parts.known_records(ref)):
            return True
        return await self.parts.local_path(index, ref) is not None

    async def _arrays(self, index: str, ref: SegmentRef, codec_ref: CodecRef) -> tuple[Hot, SegmentArrays]:
        """A segment as the cascade wants it; each piece is kept in memory by itself, so the budget sees all of them."""
        codec, hot, records = await asyncio.gather(
            self.parts.codec(index, codec_ref), self.parts.hot(index, ref, codec_ref), self.parts.records(index, ref, codec_ref)
        )
        return hot, SegmentArrays(codec.centroids, hot.postings, hot.forward, scoring_records(records), decoder_of(codec))

    # One query

    async def _search_one(
        self,
        snapshot: Snapshot,
        segments: Sequence[_Segment],
        query: np.ndarray,
        params: SearchParams,
        with_rows: bool,
        explain: bool,
        began: float,
    ) -> Answer:
        stats = StageStats()
        cold = [segment for segment in segments if segment.codec is not None and segment.arrays is None]
        near = [segment for segment in segments if segment not in cold]
        found = await asyncio.gather(
            self._search_near(near, query, params, stats), *self._search_cold(snapshot.index, cold, query, params, stats)
        )
        hits = _merge([hit for group in found for hit in (group if isinstance(group, list) else [group])], params.k)
        answer = await self._answer(snapshot, hits, query, with_rows, explain)
        _report(answer.stats, stats, len(cold), began)
        return answer

    async def _search_near(self, segments: Sequence[_Segment], query: np.ndarray, params: SearchParams, stats: StageStats) -> list[_Hits]:
        """Segments in memory. One hop to a thread if there is one segment, else a hop per segment and stage."""
        flat = [segment for segment in segments if segment.tokens is not None]
        quantised = [segment for segment in segments if segment.arrays is not None]
        if len(segments) == 1 and quantised:
            return [await self.parts.compute(_cascade, quantised[0], query, params, stats)]
        hits = list(await asyncio.gather(*(self.parts.compute(_brute_force, segment, query, params.k, stats) for segment in flat)))
        floor = _kth_score(hits, params.k)
        tables = await self._centroid_tables(quantised, query, stats)
        jobs = [(segment, tables[segment.ref.codec], StageStats()) for segment in quantised]
        lists = await asyncio.gather(
            *(self.parts.compute(shortlist, seg.arrays, table, params, seg.mask, own) for seg, table, own in jobs)  # type: ignore[arg-type]
        )
        lists = _cut_together(lists, max(params.n_rerank, params.k))
        hits += await asyncio.gather(
            *(
                self.parts.compute(_finish, seg, table, listed, params, own, floor)
                for (seg, table, own), listed in zip(jobs, lists, strict=True)
            )
        )
        for _, _, own in jobs:
            stats.merge(own)
        return hits

    async def _centroid_tables(self, segments: Sequence[_Segment], query: np.ndarray, stats: StageStats) -> dict[str, CentroidScores]:
        """Query x centroids, once per codec."""
        by_codec = {segment.ref.codec: segment for segment in segments}
        tables = await asyncio.gather(*(self.parts.compute(_score_centroids, segment, query, stats) for segment in by_codec.values()))
        return dict(zip(by_codec, tables, strict=True))

    def _search_cold(
        self, index: str, segments: Sequence[_Segment], query: np.ndarray, params: SearchParams, stats: StageStats
    ) -> list[Any]:
        """One job per segment; segments of one codec share the reading of its cells."""
        reading: dict[str, tuple[np.ndarray, asyncio.Task[CodecCells]]] = {}
        jobs = []
        for segment in segments:
            assert segment.codec is not None
            if segment.codec.id not in reading:
                reading[segment.codec.id] = self._read_cells(index, segments, segment.codec, query)
            cells, task = reading[segment.codec.id]
            jobs.append(self._search_cold_segment(index, segment, query, params, cells, task, stats))
        return jobs

    def _read_cells(
        self, index: str, segments: Sequence[_Segment], codec: CodecRef, query: np.ndarray
    ) -> tuple[np.ndarray, asyncio.Task[CodecCells]]:
        """Choose the cells that a query reads of one codec and its segments, and begin to read the codec's part."""
        own = [segment.ref for segment in segments if segment.ref.codec == codec.id]
        cold = self.cold_params
        cells = choose_cells(query, codec, affordable_cells(codec, own, cold.max_cell_bytes))
        return cells, asyncio.create_task(read_codec_cells(self.parts, index, codec, cells, cold.max_cell_gets))

    async def _search_cold_segment(
        self,
        index: str,
        segment: _Segment,
        query: np.ndarray,
        params: SearchParams,
        cells: np.ndarray,
        codec: asyncio.Task[CodecCells],
        stats: StageStats,
    ) -> _Hits:
        assert segment.codec is not None
        own = StageStats()
        hits = await search_segment(
            self.parts, index, segment.ref, codec, segment.codec, cells, query, params, self.cold_params, segment.mask, own
        )
        stats.merge(own)
        return _Hits(segment, hits.ids, hits.scores, hits.ordinals, hits)

    # The answer

    async def _answer(
        self, snapshot: Snapshot, hits: Sequence[tuple[_Hits, int]], query: np.ndarray, with_rows: bool, explain: bool
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

    async def _stored_fields(self, snapshot: Snapshot, hits: Sequence[tuple[_Hits, int]]) -> list[tuple[str | None, dict[str, Any] | None]]:
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

    async def _explain(self, snapshot: Snapshot, hits: Sequence[tuple[_Hits, int]], query: np.ndarray) -> list[list[Match]]:
        matches: list[list[Match]] = [[]] * len(hits)
        for group, places in _by_segment(hits):
            ordinals = group.ordinals[[hits[place][1] for place in places]]
            tokens, offsets = await self.parts.tokens(snapshot.index, group.segment.ref, ordinals, group.segment.codec)
            found = await self.parts.compute(best_matches, query, tokens, offsets)
            for place, item in zip(places, found, strict=True):
                matches[place] = item
        return matches


# Arithmetic on one segment; each runs on a thread


def _score_centroids(segment: _Segment, query: np.ndarray, stats: StageStats) -> CentroidScores:
    assert segment.arrays is not None and segment.rotation is not None
    began = time.perf_counter()
    table = score_centroids(query @ segment.rotation, segment.arrays.centroids)
    stats.add_time("centroids", began)
    return table


def _cascade(segment: _Segment, query: np.ndarray, params: SearchParams, stats: StageStats) -> _Hits:
    assert segment.arrays is not None
    table = _score_centroids(segment, query, stats)
    return _finish(segment, table, shortlist(segment.arrays, table, params, segment.mask, stats), params, stats, -np.inf)


def _finish(segment: _Segment, table: CentroidScores, listed: Shortlist, params: SearchParams, stats: StageStats, floor: float) -> _Hits:
    assert segment.arrays is not None and segment.ids is not None
    ordinals, scores = finish(segment.arrays, table, listed, params, stats, floor)
    return _Hits(segment, segment.ids[ordinals], scores, ordinals)


def _brute_force(segment: _Segment, query: np.ndarray, k: int, stats: StageStats) -> _Hits:
    assert segment.tokens is not None and segment.offsets is not None and segment.ids is not None
    began = time.perf_counter()
    scores = maxsim(query, segment.tokens, segment.offsets)
    if segment.mask is not None:
        scores = np.where(segment.mask, scores, -np.inf).astype(np.float32)
    best = top_k(scores, k, segment.ids)
    best = best[np.isfinite(scores[best])]
    stats.add_time("flat", began)
    stats.n_reranked += len(scores)
    stats.n_tokens_scored += len(segment.tokens)
    return _Hits(segment, segment.ids[best], scores[best], best)


# Small steps


def _checked_query(query: np.ndarray, dim: int | None) -> np.ndarray:
    """float32 (Q, D), finite, or InvalidRequest."""
    array = np.asarray(query, np.float32)
    if array.ndim != 2 or not 1 <= len(array) <= MAX_QUERY_TOKENS:
        raise InvalidRequest(f"a query has 1 to {MAX_QUERY_TOKENS} token vectors", found=array.shape)
    if dim is not None and array.shape[1] != dim:
        raise InvalidRequest(
            "the query has another dimension than the index", code="dimension-mismatch", expected=dim, found=array.shape[1]
        )
    if not np.isfinite(array).all():
        raise InvalidRequest("a query vector has a value that is not finite")
    return np.ascontiguousarray(array)


def _cut_together(lists: Sequence[Shortlist], n: int) -> list[Shortlist]:
    """Keep the n best documents of all shortlists, by approximate score."""
    joined = np.concatenate([np.empty(0, np.float32), *(listed.approximate for listed in lists)])
    if len(joined) <= n:
        return list(lists)
    bar = np.partition(joined, len(joined) - n)[len(joined) - n]
    return [listed.cut(int(np.searchsorted(-listed.approximate, -bar, side="right"))) for listed in lists]


def _kth_score(hits: Sequence[_Hits], k: int) -> float:
    """The k-th best exact score found so far, or minus infinity."""
    scores = np.concatenate([np.empty(0, np.float32), *(hit.scores for hit in hits)])
    return float(np.partition(scores, len(scores) - k)[len(scores) - k]) if 0 < k <= len(scores) else -np.inf


def _merge(groups: Sequence[_Hits], k: int) -> list[tuple[_Hits, int]]:
    """(group, place in it) of the best k hits of all segments: score falling, then id."""
    if not groups:
        return []
    scores = np.concatenate([group.scores for group in groups])
    ids = np.concatenate([group.ids for group in groups])
    starts = np.cumsum([0, *(len(group.ids) for group in groups)])
    best = top_k(scores, k, ids)
    owners = np.searchsorted(starts, best, side="right") - 1
    return [(groups[owner], int(place - starts[owner])) for owner, place in zip(owners.tolist(), best.tolist(), strict=True)]


def _by_segment(hits: Sequence[tuple[_Hits, int]]) -> list[tuple[_Hits, list[int]]]:
    """Hits of one segment together: (group, their places among all hits)."""
    groups: dict[str, tuple[_Hits, list[int]]] = {}
    for place, (group, _) in enumerate(hits):
        groups.setdefault(group.segment.ref.id, (group, []))[1].append(place)
    return list(groups.values())


def _report(stats: SearchStats, stages: StageStats, n_cold: int, began: float) -> None:
    stats.times_ms = {stage: round(seconds * 1000, 3) for stage, seconds in stages.times.items()}
    stats.times_ms["total"] = round((time.perf_counter() - began) * 1000, 3)
    stats.n_candidates, stats.n_reranked, stats.n_tokens_scored = stages.n_candidates, stages.n_reranked, stages.n_tokens_scored
    stats.n_cold_segments = n_cold
