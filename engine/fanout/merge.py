"""What the shards found, together: the bars from their rankings, the answer from their hits.

Numbers of a shard are checked here (CorruptData), because here they are first used.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from engine.errors import CorruptData
from engine.fanout.messages import MAX_CAUSE, Failed, Job, Outcome, Plan, Ranked, Scored, WireBars
from engine.index.reader import Snapshot
from engine.near import Ranking, decide
from engine.scoring.topk import top_k
from engine.searcher import Answer, PartHits, Searcher, SearchStats

STAGES = frozenset(("centroids", "probe", "rank", "centroid_maxsim", "exact", "flat", "total"))
"""What a shard may have spent its time on."""


def bars_of(job: Job, rankings: Sequence[Ranked]) -> WireBars:
    """What the shards that ranked decide together. The ranking of a shard that failed is missing: the others then rerank a little more."""
    found = [Ranking(_array(one.approximate, "<f4"), _array(one.exact, "<f4")) for one in rankings]
    return WireBars.of(decide(found, job.params))


async def merged(
    searcher: Searcher,
    snapshot: Snapshot,
    plan: Plan,
    outcomes: Sequence[Outcome],
    *,
    query: np.ndarray | None = None,
    with_rows: bool = True,
    explain: bool = False,
) -> Answer:
    """The answer of all shards: the best k, rows and matches read here.

    Raises what the first failed shard failed with, unless the job allows partial answers; then Answer.failed names it. A search of which every
    shard failed is never an answer, nor one of which a shard says nothing.
    """
    failed = _failures(plan, outcomes)
    if failed and (not plan.job.allow_partial or len(failed) == len(plan.shards)):
        raise failed[0].as_error()
    scored = sorted((outcome for outcome in outcomes if isinstance(outcome, Scored)), key=lambda one: one.shard)
    found = _checked(best_of(scored, plan.job.params.k), snapshot)
    query = plan.job.vectors() if query is None else query
    answer = await searcher.complete(snapshot, found, query, with_rows=with_rows, explain=explain)
    facts = tuple({"shard": one.shard, "error": one.error, "cause": one.cause[:MAX_CAUSE]} for one in failed)
    return msgspec.structs.replace(answer, stats=_added([one.stats for one in scored]), failed=facts)


def _failures(plan: Plan, outcomes: Sequence[Outcome]) -> list[Failed]:
    """Failed shards, then those that nothing was heard of. A shard that answered twice (a repeated step) counts once in `best_of`."""
    scored = {outcome.shard for outcome in outcomes if isinstance(outcome, Scored)}
    failed = {outcome.shard: outcome for outcome in outcomes if isinstance(outcome, Failed)}
    lost = [shard for shard in plan.shards if shard.number not in scored]
    heard = [failed[shard.number] for shard in lost if shard.number in failed]
    why = "no answer came from this shard"
    silent = [shard for shard in lost if shard.number not in failed]
    return heard + [Failed(shard=shard.number, segments=shard.segments, error="shard-failed", cause=why) for shard in silent]


def best_of(scored: Sequence[Scored], k: int) -> PartHits:
    """The best k hits of all shards: score falling, then document id."""
    once = list({one.shard: one for one in scored}.values())
    nothing = (np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64))
    ids, scores, positions, ordinals = (np.concatenate(parts) for parts in zip(nothing, *map(_hits, once), strict=True))
    best = top_k(scores, k, ids)
    return PartHits(ids[best], scores[best], positions[best], ordinals[best])


def _hits(one: Scored) -> tuple[np.ndarray, ...]:
    """A shard's ids int64, scores float32, positions int64, ordinals int64, (n,) each."""
    found = _array(one.ids, "<i8"), _array(one.scores, "<f4"), _array(one.positions, "<u4"), _array(one.ordinals, "<u4")
    if len({len(array) for array in found}) > 1:
        raise CorruptData("a shard's hits differ in number", code="malformed", shard=one.shard, found=[len(array) for array in found])
    ids, scores, positions, ordinals = found
    return ids, scores, positions.astype(np.int64), ordinals.astype(np.int64)


def _checked(found: PartHits, snapshot: Snapshot) -> PartHits:
    """Hits that the generation can have, by whose places rows are then read; CorruptData for others."""
    if found.positions.max(initial=-1) >= len(snapshot.segments):
        raise CorruptData("a shard's hit in a segment that there is not", code="malformed", found=int(found.positions.max()))
    bounds = np.array([(ref.first_id, ref.last_id, ref.n_documents) for ref in snapshot.segments], np.int64).reshape(-1, 3)
    first, last, n_documents = bounds[found.positions].T
    sound = (first <= found.ids) & (found.ids <= last) & (found.ordinals < n_documents) & np.isfinite(found.scores)
    if not sound.all():
        at = int(np.argmin(sound))
        facts = {"document": int(found.ids[at]), "ordinal": int(found.ordinals[at]), "score": float(found.scores[at])}
        raise CorruptData("a shard's hit that its segment cannot have", code="malformed", position=int(found.positions[at]), **facts)
    return found


def _array(data: bytes, dtype: str) -> np.ndarray:
    """A shard's numbers; CorruptData if the bytes are none. A score may be minus infinity."""
    if len(data) % np.dtype(dtype).itemsize or (dtype == "<f4" and not (np.frombuffer(data, dtype) < np.inf).all()):
        raise CorruptData("numbers of a shard do not read", code="malformed", dtype=dtype, found=len(data))
    return np.frombuffer(data, dtype)


def _added(stats: Sequence[SearchStats]) -> SearchStats:
    """Work adds up; rounds and the time of each stage are those of the slowest shard.

    Metrics have a series for each stage and fail at a counter that falls: stages that this release does not know, and figures below zero, are left out.
    """
    total = SearchStats()
    for one in stats:
        for stage, ms in one.times_ms.items():
            if stage in STAGES:
                total.times_ms[stage] = max(total.times_ms.get(stage, 0.0), ms)
        for name in ("n_candidates", "n_reranked", "n_tokens_scored", "n_requests", "n_bytes", "n_cold_segments"):
            setattr(total, name, getattr(total, name) + max(0, getattr(one, name)))
        total.n_rounds = max(total.n_rounds, one.n_rounds)
    return total
