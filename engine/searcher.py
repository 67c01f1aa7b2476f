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
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from engine.cold import CodecCells, ColdHits, cells_to_read, read_codec_cells, search_segment
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
from engine.store.wrappers import Cost

T = TypeVar("T")
Mode = Literal["auto", "warm", "cold"]
SMALL_DOCUMENTS = 2_048
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
    failed   parts of the index that were not searched, where the caller allowed that (engine/fanout.py): shard, error, cause
    intervals  when the stages ran in this process (StageStats), for traces
    """

    ids: np.ndarray
    scores: np.ndarray
    rows: list[dict[str, Any]]
    keys: list[str | None]
    stats: SearchStats
    matches: list[list[Match]] | None = None
    failed: tuple[dict[str, Any], ...] = ()
    intervals: list[tuple[str, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Ranking:
    """What a part of a search tells the others before the exact stage.

    approximate  float32 (n,), falling: centroid MaxSim of the best documents of its quantised segments, one more than can be reranked
    exact        float32 (m,): the best scores of its flat segments, at most k
    """

    approximate: np.ndarray
    exact: np.ndarray


@dataclass(frozen=True)
class Bars:
    """What all parts of a search decide together (`decide`), so that the work does not grow with their number.

    approximate  documents of quantised segments below it are not reranked
    exact        a score that k documents of flat segments reach
    """

    approximate: float = -np.inf
    exact: float = -np.inf


@dataclass(frozen=True)
class PartHits:
    """Hits of a part of a search, best first: ids int64, scores float32, positions int64 (of the segment in the manifest), ordinals
    int64, (n,) each."""

    ids: np.ndarray
    scores: np.ndarray
    positions: np.ndarray
    ordinals: np.ndarray


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

    @property
    def is_cold(self) -> bool:
        """Quantised and not in memory."""
        return self.codec is not None and self.arrays is None


@dataclass(frozen=True)
class _Hits:
    """Hits of one segment: ids int64, scores float32, ordinals int64, (n,) each; `cold` holds their records if they were read for this query."""

    segment: _Segment
    ids: np.ndarray
    scores: np.ndarray
    ordinals: np.ndarray
    cold: ColdHits | None = None


@dataclass(frozen=True)
class _Job:
    """A quantised segment in memory before the exact stage."""

    segment: _Segment
    table: CentroidScores
    listed: Shortlist
    stats: StageStats


@dataclass(frozen=True)
class _Near:
    """Segments in memory before the exact stage: hits of the flat ones, and a job for each quantised one."""

    flat: list[_Hits]
    jobs: list[_Job]


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
                 the store has it as a local file, the segment is small, or the batch is large

        Raises InvalidRequest (`dimension-mismatch` among others), and whatever the store raises. Cost: at most three dependent rounds.
        """
        params = params or SearchParams()
        arrays = [_checked_query(query, snapshot.dim) for query in queries]
        began = time.perf_counter()
        with self.reader.counted() as cost:
            segments = await self._open(snapshot, snapshot.segments, subset, mode, len(arrays)) if params.k else []
            answers = await _together([self._search_one(snapshot, segments, query, params, with_rows, explain, began) for query in arrays])
        for answer in answers:
            answer.stats.n_requests, answer.stats.n_bytes, answer.stats.n_rounds = cost.n_requests, cost.bytes_read, cost.rounds
        return answers

    async def warm(self, snapshot: Snapshot) -> None:
        """Bring everything that a search of this snapshot needs into memory, as far as the budget goes."""
        await self._open(snapshot, snapshot.segments, None, "warm", 0)

    # Parts of a search: some segments here, others elsewhere (engine/fanout.py)

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
            segments = await self._open(snapshot, [snapshot.segments[n] for n in positions], subset, mode, 1)
            near = await self._rank_near([segment for segment in segments if not segment.is_cold], query, params, stats)
        return _ranking(near, params), _reported(stats, 0, began, cost)

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
            segments = await self._open(snapshot, [snapshot.segments[n] for n in positions], subset, mode, 1)
            groups = await self._score(snapshot, segments, query, params, stats, bars)
        hits = _merge(groups, params.k)
        places = {ref.id: position for position, ref in enumerate(snapshot.segments)}
        found = PartHits(
            np.array([group.ids[n] for group, n in hits], np.int64),
            np.array([group.scores[n] for group, n in hits], np.float32),
            np.array([places[group.segment.ref.id] for group, _ in hits], np.int64),
            np.array([group.ordinals[n] for group, n in hits], np.int64),
        )
        return found, _reported(stats, sum(segment.is_cold for segment in segments), began, cost)

    async def complete(
        self, snapshot: Snapshot, found: PartHits, query: np.ndarray, *, with_rows: bool = True, explain: bool = False
    ) -> Answer:
        """Hits that parts have found, as an answer: rows, keys and matches are read here."""
        groups: dict[int, _Hits] = {}
        hits = []
        for place, position in enumerate(found.positions.tolist()):
            if position not in groups:
                ref = snapshot.segments[position]
                segment = _Segment(ref, snapshot.manifest.codec_of(ref) if ref.codec else None, None)
                groups[position] = _Hits(segment, found.ids, found.scores, found.ordinals)
            hits.append((groups[position], place))
        return await self._answer(snapshot, hits, _checked_query(query, snapshot.dim), with_rows, explain)

    # Opening segments

    async def _open(
        self, snapshot: Snapshot, refs: Sequence[SegmentRef], subset: np.ndarray | None, mode: Mode, n_queries: int
    ) -> list[_Segment]:
        wanted = None if subset is None else np.unique(np.asarray(subset, np.int64))
        opened = await _together([self._open_segment(snapshot, ref, wanted, mode, n_queries) for ref in refs])
        return [segment for segment in opened if segment.mask is None or segment.mask.any()]

    async def _open_segment(self, snapshot: Snapshot, ref: SegmentRef, wanted: np.ndarray | None, mode: Mode, n_queries: int) -> _Segment:
        mask = await self._mask(snapshot.index, ref, wanted)
        if mask is not None and not mask.any():
            return _Segment(ref, None, mask)
        if ref.kind == "flat":
            flat = await self.parts.flat(snapshot.index, ref)
            return _Segment(ref, None, mask, ids=flat.ids, tokens=flat.tokens, offsets=flat.offsets)
        codec = snapshot.manifest.codec_of(ref)
        if not await self._should_load(snapshot.index, ref, codec, mode, n_queries):
            return _Segment(ref, codec, mask)
        hot, arrays, rotation = await self._arrays(snapshot.index, ref, codec)
        return _Segment(ref, codec, mask, arrays=arrays, rotation=rotation, ids=hot.ids)

    async def _mask(self, index: str, ref: SegmentRef, wanted: np.ndarray | None) -> np.ndarray | None:
        if wanted is None:
            return await self.parts.alive(index, ref)
        mask = np.zeros(ref.n_documents, bool)
        mask[await self.parts.live_ordinals_of(index, ref, wanted)] = True
        return mask

    async def _should_load(self, index: str, ref: SegmentRef, codec: CodecRef, mode: Mode, n_queries: int) -> bool:
        if mode != "auto":
            return mode == "warm"
        if n_queries > MAX_COLD_QUERIES or (self.parts.known_hot(ref) and self.parts.known_records(ref)):
            return True
        if ref.size_bytes + codec.size_bytes <= self.cold_params.max_bytes:
            return True  # a cold search would read as much, in more requests, and keep nothing
        return await self.parts.local_path(index, ref) is not None

    async def _arrays(self, index: str, ref: SegmentRef, codec_ref: CodecRef) -> tuple[Hot, SegmentArrays, np.ndarray]:
        """A segment as the cascade wants it, and its codec's rotation; each piece is kept in memory by itself, so the budget sees all of them."""
        parts = self.parts
        if not (parts.known_hot(ref) and parts.known_records(ref)):
            await asyncio.gather(parts.codec(index, codec_ref), parts.hot(index, ref, codec_ref), parts.records(index, ref, codec_ref))
        codec = await parts.codec(index, codec_ref)
        hot, records = await parts.hot(index, ref, codec_ref), await parts.records(index, ref, codec_ref)
        arrays = SegmentArrays(codec.centroids, hot.postings, hot.forward, scoring_records(records), decoder_of(codec))
        return hot, arrays, codec.rotation

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
        hits = _merge(await self._score(snapshot, segments, query, params, stats, None), params.k)
        answer = await self._answer(snapshot, hits, query, with_rows, explain)
        _report(answer.stats, stats, sum(segment.is_cold for segment in segments), began)
        answer.intervals.extend(stats.intervals)
        return answer

    async def _score(
        self,
        snapshot: Snapshot,
        segments: Sequence[_Segment],
        query: np.ndarray,
        params: SearchParams,
        stats: StageStats,
        bars: Bars | None,
    ) -> list[_Hits]:
        """Hits of each segment. bars: what this and other parts of a search decided; None if these are all segments."""
        cold = [segment for segment in segments if segment.is_cold]
        near = [segment for segment in segments if not segment.is_cold]
        found = await _together(
            [self._search_near(near, query, params, stats, bars), *self._search_cold(snapshot, cold, query, params, stats)]
        )
        return [hit for group in found for hit in (group if isinstance(group, list) else [group])]

    async def _search_near(
        self, segments: Sequence[_Segment], query: np.ndarray, params: SearchParams, stats: StageStats, bars: Bars | None
    ) -> list[_Hits]:
        """Segments in memory. One hop to a thread if at most one of them is large, else a hop per large one and stage."""
        if bars is None and sum(not _is_small(segment.ref) for segment in segments) <= 1:
            return await self.parts.compute(_near_on_one_thread, segments, query, params, stats)
        near = await self._rank_near(segments, query, params, stats)
        bars = bars or decide([_ranking(near, params)], params)
        batches = _batches(near.jobs, lambda job: job.segment.ref)
        found = await _together([self.parts.compute(_finish, jobs, params, bars) for jobs in batches])
        for job in near.jobs:
            stats.merge(job.stats)
        return [*near.flat, *(hits for group in found for hits in group)]

    async def _rank_near(self, segments: Sequence[_Segment], query: np.ndarray, params: SearchParams, stats: StageStats) -> _Near:
        """All stages of segments in memory but the last of the quantised ones."""
        by_codec = {segment.ref.codec: segment for segment in segments if segment.arrays is not None}
        made = await _together([self.parts.compute(_score_centroids, segment, query, stats) for segment in by_codec.values()])
        tables = dict(zip(by_codec, made, strict=True))
        batches = _batches(segments, lambda segment: segment.ref)
        ranked = await _together([self.parts.compute(_rank, batch, tables, query, params, stats) for batch in batches])
        return _Near([hits for near in ranked for hits in near.flat], [job for near in ranked for job in near.jobs])

    def _search_cold(
        self, snapshot: Snapshot, segments: Sequence[_Segment], query: np.ndarray, params: SearchParams, stats: StageStats
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


def _near_on_one_thread(segments: Sequence[_Segment], query: np.ndarray, params: SearchParams, stats: StageStats) -> list[_Hits]:
    by_codec = {segment.ref.codec: segment for segment in segments if segment.arrays is not None}
    tables = {codec: _score_centroids(segment, query, stats) for codec, segment in by_codec.items()}
    near = _rank(segments, tables, query, params, stats)
    bars = decide([_ranking(near, params)], params)
    found = _finish(near.jobs, params, bars)
    for job in near.jobs:
        stats.merge(job.stats)
    return [*near.flat, *found]


def _rank(
    segments: Sequence[_Segment], tables: dict[str, CentroidScores], query: np.ndarray, params: SearchParams, stats: StageStats
) -> _Near:
    flat = [_brute_force(segment, query, params.k, stats) for segment in segments if segment.tokens is not None]
    jobs = []
    for segment in segments:
        if segment.arrays is not None:
            own, table = StageStats(), tables[segment.ref.codec]
            jobs.append(_Job(segment, table, shortlist(segment.arrays, table, params, segment.mask, own), own))
    return _Near(flat, jobs)


def _finish(jobs: Sequence[_Job], params: SearchParams, bars: Bars) -> list[_Hits]:
    """The exact stage of one segment after the other. Each by itself, so that it makes no difference which of them are here (engine/fanout.py)."""
    found = []
    for job in jobs:
        assert job.segment.arrays is not None and job.segment.ids is not None
        listed = _cut(job.listed, bars.approximate)
        ordinals, scores = finish(job.segment.arrays, job.table, listed, params, job.stats, bars.exact)
        found.append(_Hits(job.segment, job.segment.ids[ordinals], scores, ordinals))
    return found


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


def _batches(items: Sequence[T], ref_of: Callable[[T], SegmentRef]) -> list[list[T]]:
    """What goes to a thread together: each large segment by itself, and all small ones, if there are any."""
    large = [[item] for item in items if not _is_small(ref_of(item))]
    small = [item for item in items if _is_small(ref_of(item))]
    return [*large, small] if small else large


def _is_small(ref: SegmentRef) -> bool:
    """Flat, or quantised of few documents: such segments share a thread, since a hop to one would cost more than their arithmetic."""
    return ref.kind == "flat" or ref.n_documents <= SMALL_DOCUMENTS


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """As asyncio.gather, but work that is alone is simply awaited: most indices have one segment, and tasks were half of a search's overhead."""
    return [await work[0]] if len(work) == 1 else list(await asyncio.gather(*work))


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


def decide(rankings: Sequence[Ranking], params: SearchParams) -> Bars:
    """The bars of a search whose parts ranked their segments so: the n_rerank (or k) best documents of all shortlists are scored exactly."""
    n = max(params.n_rerank, params.k)
    approximate = np.concatenate([np.empty(0, np.float32), *(ranking.approximate for ranking in rankings)])
    exact = np.concatenate([np.empty(0, np.float32), *(ranking.exact for ranking in rankings)])
    return Bars(_nth_best(approximate, n) if len(approximate) > n else -np.inf, _nth_best(exact, params.k))


def _nth_best(scores: np.ndarray, n: int) -> float:
    """The n-th best score, or minus infinity."""
    return float(np.partition(scores, len(scores) - n)[len(scores) - n]) if 0 < n <= len(scores) else -np.inf


def _ranking(near: _Near, params: SearchParams) -> Ranking:
    """One more than can be reranked: whether there are more is part of the decision."""
    approximate = np.concatenate([np.empty(0, np.float32), *(job.listed.approximate for job in near.jobs)])
    exact = np.concatenate([np.empty(0, np.float32), *(hit.scores for hit in near.flat)])
    return Ranking(-np.sort(-approximate)[: max(params.n_rerank, params.k) + 1], -np.sort(-exact)[: params.k])


def _cut(listed: Shortlist, bar: float) -> Shortlist:
    """The documents of a shortlist that reach the bar."""
    return listed.cut(int(np.searchsorted(-listed.approximate, -bar, side="right")))


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
