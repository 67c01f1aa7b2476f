"""Searching the segments that are in memory: plain arithmetic, on the executor's threads. engine/cold.py searches the others.

    flat         every document, exactly
    quantised    the cascade of engine/scoring, over one segment or over small ones joined (a Body)
    decide       the shortlists of all bodies are cut together, by approximate score, before the exact stage
    finish       the exact stage, once for a body and those that keep it company

What shares an exact stage is decided by the manifest alone (`company`), so that any number of processes that divide a search give the answer that one gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import msgspec
import numpy as np

from engine.cold import ColdHits
from engine.config import MAX_SEGMENT_DOCUMENTS, SearchParams
from engine.format.manifest import CodecRef, SegmentRef
from engine.scoring.brute_force import maxsim
from engine.scoring.candidates import Probes, probe
from engine.scoring.cascade import SegmentArrays, Shortlist, StageStats, finish_together, needs_probing, shortlist
from engine.scoring.centroid_scores import CentroidScores, score_centroids
from engine.scoring.topk import top_k

SMALL_DOCUMENTS = 2_048
SMALL_SHARE = 0.5
"""Of the tokens of the largest segment: what has no more is small beside it."""
COMPANY_BYTES = 64 << 20
"""Joining copies: 30 ms for this much, each time that one of the small segments is new."""


class Segment(msgspec.Struct, frozen=True):
    """A segment on its way through a search. mask bool (N,): allowed and alive; None allows all.

    codec   None for a flat one
    arrays, rotation  of a quantised one in memory; tokens, offsets of a flat one; ids int64 (N,) of both
    """

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


class Body(msgspec.Struct, frozen=True):
    """What the cascade runs over: one quantised segment, or small ones of one codec end to end (scoring/joined.py).

    members  the segments; member i owns the ordinals starts[i]:starts[i + 1] of `arrays`, starts int64 (m + 1,)
    mask     bool over all ordinals, or None
    is_kept_company  whether its exact stage is shared (`company`)
    """

    members: tuple[Segment, ...]
    starts: np.ndarray
    arrays: SegmentArrays
    mask: np.ndarray | None
    is_kept_company: bool

    @property
    def codec(self) -> str:
        return self.members[0].ref.codec

    @property
    def n_allowed(self) -> int:
        return self.arrays.n_documents if self.mask is None else int(np.count_nonzero(self.mask))

    @property
    def is_small(self) -> bool:
        """Small ones share a thread: a hop to one would cost more than their arithmetic."""
        return self.arrays.n_documents <= SMALL_DOCUMENTS or len(self.members) > 1

    def hits(self, ordinals: np.ndarray, scores: np.ndarray) -> list[Hits]:
        """Hits of the body as hits of its members."""
        owners = np.searchsorted(self.starts, ordinals, side="right") - 1
        found = []
        for owner in np.unique(owners).tolist():
            segment, own = self.members[owner], ordinals[owners == owner] - self.starts[owner]
            assert segment.ids is not None
            found.append(Hits(segment, segment.ids[own], scores[owners == owner], own))
        return found


class Hits(msgspec.Struct, frozen=True):
    """Hits of one segment: ids int64, scores float32, ordinals int64, (n,) each; `cold` holds their records if they were read for this query."""

    segment: Segment
    ids: np.ndarray
    scores: np.ndarray
    ordinals: np.ndarray
    cold: ColdHits | None = None


class Table(msgspec.Struct, frozen=True):
    """What all bodies of a codec share. probes: None if none of them is so large that it is probed."""

    scores: CentroidScores
    probes: Probes | None


class Job(msgspec.Struct, frozen=True):
    """A body before the exact stage."""

    body: Body
    table: CentroidScores
    listed: Shortlist


class Ranked(msgspec.Struct, frozen=True):
    """Segments in memory before the exact stage: hits of the flat ones, a job for each body, and what that cost."""

    flat: list[Hits]
    jobs: list[Job]
    stats: StageStats


class Ranking(msgspec.Struct, frozen=True):
    """What a part of a search tells the others before the exact stage.

    approximate  float32 (n,), falling: centroid MaxSim of the best documents of its quantised segments, one more than can be reranked
    exact        float32 (m,): the best scores of its flat segments, at most k
    """

    approximate: np.ndarray
    exact: np.ndarray

    @classmethod
    def of(cls, ranked: Sequence[Ranked], params: SearchParams) -> Ranking:
        """One more than can be reranked: whether there are more is part of the decision."""
        approximate = _together([job.listed.approximate for one in ranked for job in one.jobs])
        exact = _together([hits.scores for one in ranked for hits in one.flat])
        return cls(-np.sort(-approximate)[: max(params.n_rerank, params.k) + 1], -np.sort(-exact)[: params.k])


class Bars(msgspec.Struct, frozen=True):
    """What all parts of a search decide together (`decide`), so that the work does not grow with their number.

    approximate  documents of quantised segments below it are not reranked
    exact        a score that k documents of flat segments reach
    """

    approximate: float = -np.inf
    exact: float = -np.inf


def company(segments: Sequence[SegmentRef]) -> tuple[int, ...]:
    """Positions of the segments that share one exact stage: the largest quantised one and the small ones beside it; none if there are no small ones.

    Small segments are what writing leaves until compaction merges them. By itself each would exactly score the best of its own, which the documents of the
    large one may leave far behind.
    """
    quantised = [n for n, ref in enumerate(segments) if ref.kind == "quantised"]
    if len(quantised) < 2:
        return ()
    largest = max(quantised, key=lambda n: (segments[n].n_tokens, -n))
    most_tokens, small = SMALL_SHARE * segments[largest].n_tokens, []
    bytes_left, documents_left = COMPANY_BYTES, MAX_SEGMENT_DOCUMENTS
    for n in quantised:
        ref = segments[n]
        is_small = n != largest and ref.n_documents <= SMALL_DOCUMENTS and ref.n_tokens <= most_tokens
        if is_small and ref.size_bytes <= bytes_left and ref.n_documents <= documents_left:
            small.append(n)
            bytes_left -= ref.size_bytes
            documents_left -= ref.n_documents
    return (largest, *small) if small else ()


def decide(rankings: Sequence[Ranking], params: SearchParams) -> Bars:
    """The bars of a search whose parts ranked their segments so: the n_rerank (or k) best documents of all shortlists are scored exactly."""
    n = max(params.n_rerank, params.k)
    approximate = _together([ranking.approximate for ranking in rankings])
    exact = _together([ranking.exact for ranking in rankings])
    return Bars(_nth_best(approximate, n) if len(approximate) > n else -np.inf, _nth_best(exact, params.k))


# What runs on a thread


def search_on_one_thread(
    flat: Sequence[Segment], bodies: Sequence[Body], query: np.ndarray, params: SearchParams
) -> tuple[list[Hits], StageStats]:
    """All stages of a whole search."""
    tables, stats = centroid_tables(bodies, query, params)
    ranked = rank(flat, bodies, tables, query, params)
    stats.merge(ranked.stats)
    bars = decide([Ranking.of([ranked], params)], params)
    found = list(ranked.flat)
    for jobs in sharing(ranked.jobs):
        hits, own = finish(jobs, params, bars)
        found += hits
        stats.merge(own)
    return found, stats


def centroid_tables(bodies: Sequence[Body], query: np.ndarray, params: SearchParams) -> tuple[dict[str, Table], StageStats]:
    """Stage 1, once per codec. (Probing sixteen segments each by itself took 15 of 84 ms.)"""
    stats, tables = StageStats(), {}
    for body in bodies:
        if body.codec not in tables:
            began, rotation = perf_counter(), body.members[0].rotation
            assert rotation is not None
            scores, probes = score_centroids(query @ rotation, body.arrays.centroids), None
            began = stats.add_time("centroids", began)
            if any(other.codec == body.codec and needs_probing(other.n_allowed, params) for other in bodies):
                probes = probe(scores, params.n_probe, params.centroid_score_threshold)
                stats.add_time("probe", began)
            tables[body.codec] = Table(scores, probes)
    return tables, stats


def rank(flat: Sequence[Segment], bodies: Sequence[Body], tables: dict[str, Table], query: np.ndarray, params: SearchParams) -> Ranked:
    """All stages but the exact one of the bodies."""
    stats = StageStats()
    hits = [_brute_force(segment, query, params.k, stats) for segment in flat]
    jobs = []
    for body in bodies:
        table = tables[body.codec]
        listed = shortlist(body.arrays, table.scores, params, body.mask, stats, table.probes)
        jobs.append(Job(body, table.scores, listed))
    return Ranked(hits, jobs, stats)


def sharing(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that share an exact stage together: those that keep company, and each other one by itself."""
    shared = [job for job in jobs if job.body.is_kept_company]
    return [group for group in [shared, *([job] for job in jobs if not job.body.is_kept_company)] if group]


def finish(jobs: Sequence[Job], params: SearchParams, bars: Bars) -> tuple[list[Hits], StageStats]:
    """The exact stage of jobs that share one."""
    stats = StageStats()
    parts = [(job.body.arrays, job.table, _cut(job.listed, bars.approximate)) for job in jobs]
    found = finish_together(parts, params, stats, bars.exact)
    return [hits for job, (ordinals, scores) in zip(jobs, found, strict=True) for hits in job.body.hits(ordinals, scores)], stats


def _brute_force(segment: Segment, query: np.ndarray, k: int, stats: StageStats) -> Hits:
    assert segment.tokens is not None and segment.offsets is not None and segment.ids is not None
    began = perf_counter()
    scores = maxsim(query, segment.tokens, segment.offsets)
    if segment.mask is not None:
        scores = np.where(segment.mask, scores, -np.inf).astype(np.float32)
    best = top_k(scores, k, segment.ids)
    best = best[np.isfinite(scores[best])]
    stats.add_time("flat", began)
    stats.n_reranked += len(scores)
    stats.n_tokens_scored += len(segment.tokens)
    return Hits(segment, segment.ids[best], scores[best], best)


# Small steps


def _together(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.float32), *arrays])


def _nth_best(scores: np.ndarray, n: int) -> float:
    """The n-th best score, or minus infinity."""
    return float(np.partition(scores, len(scores) - n)[len(scores) - n]) if 0 < n <= len(scores) else -np.inf


def _cut(listed: Shortlist, bar: float) -> Shortlist:
    """The documents of a shortlist that reach the bar."""
    return listed.cut(int(np.searchsorted(-listed.approximate, -bar, side="right")))
