"""One shard's share of a search: what a process is asked to do, whoever asks. Safe to repeat, because it only reads."""

from __future__ import annotations

import msgspec
import numpy as np

from engine.errors import InvalidRequest, NotFound
from engine.fanout.messages import Job, Ranked, Scored, Shard, Step, WireBars, unpack_ids
from engine.index.reader import Reader, Snapshot
from engine.searcher import Searcher

PINNED_AGE_S = 600.0
"""A generation known for so long still opens without a request: it is pinned by number and life, so it cannot be another."""


async def take(searcher: Searcher, step: Step) -> Ranked | Scored:
    """Do a step."""
    if step.do == "rank":
        return await rank(searcher, step.job, step.shard)
    return await score(searcher, step.job, step.shard, step.bars)


async def rank(searcher: Searcher, job: Job, shard: Shard) -> Ranked:
    """All stages but the exact one, for a shard. Safe to repeat."""
    snapshot, subset = await _opened(searcher.reader, job, shard)
    ranking, stats = await searcher.rank_part(snapshot, shard.segments, job.vectors(), job.params, subset=subset, mode=job.mode)
    approximate, exact = ranking.approximate.astype("<f4").tobytes(), ranking.exact.astype("<f4").tobytes()
    return Ranked(shard=shard.number, approximate=approximate, exact=exact, stats=stats)


async def score(searcher: Searcher, job: Job, shard: Shard, bars: WireBars | None) -> Scored:
    """The best k hits of a shard. Safe to repeat."""
    snapshot, subset = await _opened(searcher.reader, job, shard)
    given = (bars or WireBars()).bars()
    found, stats = await searcher.score_part(snapshot, shard.segments, job.vectors(), job.params, given, subset=subset, mode=job.mode)
    return Scored(
        shard=shard.number,
        ids=found.ids.astype("<i8").tobytes(),
        scores=found.scores.astype("<f4").tobytes(),
        positions=found.positions.astype("<u4").tobytes(),
        ordinals=found.ordinals.astype("<u4").tobytes(),
        stats=stats,
    )


async def open_pinned(reader: Reader, job: Job) -> Snapshot:
    """The generation of a job: without a request if it is known. NotFound (`generation-not-found`) if it, or that life of the index, is gone."""
    known = reader.known_head(job.index)
    is_it = known is not None and known.manifest.index_id == job.life and known.manifest.generation == job.generation
    if is_it:
        return await reader.snapshot(job.index, max_age_s=PINNED_AGE_S, generation=job.generation)
    snapshot = await reader.snapshot(job.index, generation=job.generation)
    if snapshot.manifest.index_id != job.life:
        facts = {"index": job.index, "generation": job.generation}
        raise NotFound("the index was deleted and made again meanwhile", code="generation-not-found", **facts)
    return snapshot


async def _opened(reader: Reader, job: Job, shard: Shard) -> tuple[Snapshot, np.ndarray | None]:
    """The generation, and the ids that a shard may give: all (None), those of the subset, or those of its documents that meet the condition."""
    snapshot = await open_pinned(reader, job)
    if not all(0 <= position < len(snapshot.segments) for position in shard.segments):
        raise InvalidRequest("a shard names a segment that its generation does not have", segments=shard.segments)
    if job.condition is None:
        return snapshot, None if job.subset is None else unpack_ids(job.subset)
    own = tuple(snapshot.segments[position] for position in shard.segments)
    part = Snapshot(reader, job.index, msgspec.structs.replace(snapshot.manifest, segments=own))
    return snapshot, await part.select(job.condition, job.parameters)
