"""The cascade over one quantised segment in memory, whole or stage by stage.

    stage 1   score_centroids, probe             once per query and codec
    stage 2   rank_documents, choose_candidates  per segment; left out where every document is a candidate anyway
    stage 3   centroid_maxsim                    per segment
    stage 4   rerank over exact_maxsim           per segment, or over the best of many segments

`cascade` runs all of it on one segment. A search over many segments calls `shortlist` on each, cuts the lists globally by approximate score, and `finish`es
what is left of each. No I/O, no threads of its own: any number of threads may score the same SegmentArrays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from engine.config import EVERY_DOCUMENT, SearchParams
from engine.scoring.arrays import Decoder, Postings, Records
from engine.scoring.candidates import Probes, choose_candidates, distinct, probe, rank_documents
from engine.scoring.centroid_scores import CentroidScores, score_centroids
from engine.scoring.forward import Forward, centroid_maxsim
from engine.scoring.maxsim import ExactScorer
from engine.scoring.rerank import rerank
from engine.scoring.topk import best_set, top_k

SECOND_LOOK_SPREADS = 2.5
"""The second look takes a token if its centroid plus this many of its residual's spreads reaches the document's exact best for some query token."""
FIRST_LOOK_MISSES, SECOND_LOOK_MISSES = 0.06, 0.002
"""Expected share of 100 hits lost by not looking further (rerank.py); README.md has what other values cost and lose."""
COARSE_BITS, COARSE_CAUTION = 2, 1 / 3
"""With this many bits or fewer the scores that say when to stop are themselves poor, and stop too early: there the allowed misses are multiplied by this.
SciFact at 2 bits: recall@100 0.951 instead of 0.946, of 0.953 that the codec leaves, for 7 % more time."""
EXACT_CAUTION = 0.01
"""Of the misses above, for who asks that every document may be scored."""
STAGE_2_PAYS = 2.0
"""Stages 1 and 2 cost about as much as stage 3 for n_candidates more documents, so up to this many times n_candidates stage 3 simply takes all."""


class SegmentArrays(msgspec.Struct, frozen=True):
    """One quantised segment ready to be searched.

    centroids  float32 (K, D), of the codec, shared by its segments
    """

    centroids: np.ndarray
    postings: Postings
    forward: Forward
    records: Records
    decoder: Decoder

    @classmethod
    def of(
        cls, centroids: np.ndarray, postings: Postings, records: Records, decoder: Decoder, forward: Forward | None = None
    ) -> SegmentArrays:
        """Put a segment together, inverting the postings unless their inverse is at hand."""
        n_documents = len(records.n_tokens)
        forward = Forward.from_postings(postings, n_documents) if forward is None else forward
        return cls(centroids, postings, forward, records, decoder)

    @property
    def n_documents(self) -> int:
        return len(self.records.n_tokens)


class StageStats(msgspec.Struct):
    """What one cascade cost. times: seconds by stage name ("centroids", "probe", "rank", "centroid_maxsim", "exact").

    intervals  each piece of such a stage as (name, began, ended), time.perf_counter; pieces of several segments may overlap
    """

    times: dict[str, float] = msgspec.field(default_factory=dict)
    intervals: list[tuple[str, float, float]] = msgspec.field(default_factory=list)
    n_candidates: int = 0
    n_reranked: int = 0
    n_tokens_scored: int = 0

    def add_time(self, stage: str, begin: float) -> float:
        """Book the time since `begin` (time.perf_counter) to a stage; returns now."""
        now = time.perf_counter()
        self.times[stage] = self.times.get(stage, 0.0) + now - begin
        self.intervals.append((stage, begin, now))
        return now

    def merge(self, other: StageStats) -> None:
        """Add what another segment cost."""
        for stage, seconds in other.times.items():
            self.times[stage] = self.times.get(stage, 0.0) + seconds
        self.intervals += other.intervals
        self.n_candidates += other.n_candidates
        self.n_reranked += other.n_reranked
        self.n_tokens_scored += other.n_tokens_scored


class Shortlist(msgspec.Struct, frozen=True):
    """Documents of one segment after stage 3, best first.

    ordinals     int64 (n,)
    approximate  float32 (n,), falling, ties by ordinal
    lanes        uint8 (G, n, width), see centroid_maxsim
    """

    ordinals: np.ndarray
    approximate: np.ndarray
    lanes: np.ndarray

    def cut(self, n: int) -> Shortlist:
        """The first n."""
        return Shortlist(self.ordinals[:n], self.approximate[:n], self.lanes[:, :n])


def cascade(
    segment: SegmentArrays, query: np.ndarray, params: SearchParams, mask: np.ndarray | None = None, scores: CentroidScores | None = None
) -> tuple[np.ndarray, np.ndarray, StageStats]:
    """Search one segment.

    query    float32 (Q, D), rotated, Q at least 1
    mask     bool (N,), documents allowed: None allows all, all False gives no hits
    scores   the query x centroid table if another segment of the codec has it already
    returns  ordinals int64 (m,), scores float32 (m,), best first, m <= params.k; what it cost
    """
    stats = StageStats()
    begin = time.perf_counter()
    if scores is None:
        scores = score_centroids(query, segment.centroids)
    stats.add_time("centroids", begin)
    listed = shortlist(segment, scores, params, mask, stats)
    ordinals, exact = finish(segment, scores, listed, params, stats)
    return ordinals, exact, stats


def needs_probing(n_allowed: int, params: SearchParams) -> bool:
    """Whether stages 1 and 2 are worth their while: far more documents than stage 3 should see, or a threshold that excludes some."""
    return n_allowed > STAGE_2_PAYS * params.n_candidates or params.centroid_score_threshold is not None


def shortlist(
    segment: SegmentArrays,
    scores: CentroidScores,
    params: SearchParams,
    mask: np.ndarray | None,
    stats: StageStats,
    probes: Probes | None = None,
) -> Shortlist:
    """Stages 1 to 3: the best max(n_rerank, k) documents by centroid MaxSim. Probes are made here unless given."""
    begin = time.perf_counter()
    candidates = _candidates(segment, scores, params, mask, stats, probes)
    begin = time.perf_counter()
    if candidates is not None and not len(candidates):
        return Shortlist(candidates, np.empty(0, dtype=np.float32), np.empty((len(scores.lanes), 0, scores.width), dtype=np.uint8))
    approximate, lanes = centroid_maxsim(scores, segment.forward, candidates)
    has_tokens = segment.records.n_tokens if candidates is None else segment.records.n_tokens[candidates]
    approximate[has_tokens == 0] = -np.inf
    best = best_set(approximate, max(params.n_rerank, params.k))
    best = best[np.argsort(-approximate[best], kind="stable")]
    best = best[: np.count_nonzero(approximate[best] > -np.inf)]  # a document without tokens is no hit
    stats.n_candidates += len(approximate)
    stats.add_time("centroid_maxsim", begin)
    return Shortlist(best if candidates is None else candidates[best], approximate[best], lanes[:, best])


def _candidates(
    segment: SegmentArrays, scores: CentroidScores, params: SearchParams, mask: np.ndarray | None, stats: StageStats, probes: Probes | None
) -> np.ndarray | None:
    """Ordinals that go into stage 3, int64 rising; None means all documents."""
    n_allowed = segment.n_documents if mask is None else int(np.count_nonzero(mask))
    if n_allowed == 0:
        return np.empty(0, dtype=np.int64)
    if not needs_probing(n_allowed, params):
        return None if mask is None else np.flatnonzero(mask)
    begin = time.perf_counter()
    if probes is None:
        probes = probe(scores, params.n_probe, params.centroid_score_threshold)
    begin = stats.add_time("probe", begin)
    sums = rank_documents(probes, segment.postings, segment.n_documents)
    candidates = choose_candidates(sums, params.n_candidates, mask)
    stats.add_time("rank", begin)
    return candidates


def finish(
    segment: SegmentArrays, scores: CentroidScores, listed: Shortlist, params: SearchParams, stats: StageStats, floor: float = -np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Stage 4 for one segment: the best k of a shortlist by exact score, ordinals int64 and scores float32, best first.

    floor  an exact score that k documents elsewhere are known to reach; documents below it may be missing
    """
    return finish_together([(segment, scores, listed)], params, stats, floor)[0]


def finish_together(
    parts: Sequence[tuple[SegmentArrays, CentroidScores, Shortlist]], params: SearchParams, stats: StageStats, floor: float = -np.inf
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Stage 4 over the shortlists of many segments as if they were one list; at most n_rerank (or k) documents are scored in all.

    returns per segment its documents among the best k of all: ordinals int64 and scores float32, best first

    One look by one over the whole list, so that a segment whose documents are hopeless costs nothing (rerank.py).
    """
    begin = time.perf_counter()
    lists = [listed for _, _, listed in parts]
    approximate = np.concatenate([np.empty(0, dtype=np.float32), *(listed.approximate for listed in lists)])
    if params.k == 0 or not len(approximate):
        return [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)) for _ in parts]
    owner = np.repeat(np.arange(len(parts)), [len(listed.ordinals) for listed in lists])
    ordinals = np.concatenate([listed.ordinals for listed in lists])
    local = np.concatenate([np.arange(len(listed.ordinals)) for listed in lists])
    order = np.argsort(-approximate, kind="stable")
    caution = min(1.0, params.k / 100)  # the fewer hits, the less each may be missed, and the less it costs to make sure
    if params.n_rerank >= EVERY_DOCUMENT:
        caution *= EXACT_CAUTION
    if min(segment.decoder.nbits for segment, _, _ in parts) <= COARSE_BITS:
        caution *= COARSE_CAUTION
    looks = [_Looks(segment, scores, listed) for segment, scores, listed in parts]

    def first_look(positions: np.ndarray) -> np.ndarray:
        return _by_owner(owner, local, order[positions], [look.first for look in looks])

    first = rerank(approximate[order], first_look, params.k, params.n_rerank, misses_per_hit=FIRST_LOOK_MISSES * caution)
    order = order[: len(first)]
    again = np.argsort(-first, kind="stable")
    order, first = order[again], first[again]

    def second_look(positions: np.ndarray) -> np.ndarray:
        return _by_owner(owner, local, order[positions], [look.second for look in looks])

    exact = rerank(first, second_look, params.k, params.n_rerank, floor, SECOND_LOOK_MISSES * caution)
    order = order[: len(exact)]
    best = top_k(exact, params.k, order)
    chosen, exact = order[best], exact[best]
    stats.n_reranked += len(first)
    stats.n_tokens_scored += sum(look.scorer.n_tokens_scored for look in looks)
    stats.add_time("exact", begin)
    return [(ordinals[chosen[mine]], exact[mine]) for mine in (owner[chosen] == part for part in range(len(parts)))]


class _Looks:
    """The two looks of ExactScorer at the documents of one shortlist, remembering the first for the second."""

    def __init__(self, segment: SegmentArrays, scores: CentroidScores, listed: Shortlist) -> None:
        self.scorer = ExactScorer(scores, segment.records, segment.decoder)
        self.listed = listed
        self.best = np.empty((len(listed.ordinals), scores.n_tokens), dtype=np.float32)

    def first(self, places: np.ndarray) -> np.ndarray:
        """Scores of places int64 (m,) of the shortlist over their most promising tokens: float32 (m,)."""
        best = self.best[places] = self.scorer.first_look(self.listed.ordinals[places], self.listed.lanes[:, places])
        return np.asarray(best.sum(axis=1))

    def second(self, places: np.ndarray) -> np.ndarray:
        """Scores over all tokens that may matter: float32 (m,)."""
        lanes = self.listed.lanes[:, places]
        best = self.scorer.second_look(self.listed.ordinals[places], lanes, self.best[places], SECOND_LOOK_SPREADS)
        return np.asarray(best.sum(axis=1))


def _by_owner(
    owner: np.ndarray, local: np.ndarray, documents: np.ndarray, score: Sequence[Callable[[np.ndarray], np.ndarray]]
) -> np.ndarray:
    """Score documents of several segments: each segment's own in one call, answers in the order asked for. float32 (m,)."""
    if len(score) == 1:
        return score[0](local[documents])
    out = np.empty(len(documents), dtype=np.float32)
    owners = owner[documents]
    for part in distinct(owners).tolist():
        mine = owners == part
        out[mine] = score[part](local[documents[mine]])
    return out
