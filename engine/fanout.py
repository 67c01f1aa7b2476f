"""One search by many processes: plan, rank, score, merge. Answers are those of one process, bit for bit.

    plan     pin one generation, cut its segments into shards by bytes
    rank     per shard: all stages but the exact one; the shards' rankings together decide the bars (engine/searcher.py)
    score    per shard: the exact stage under these bars; the best k hits
    merge    score falling, then document id; rows of the hits are read by who merges

Ranking is one more round between the processes. It is needed where segments are in memory ("warm"), because their shortlists are cut together; a
search that reads cold decides segment by segment and goes straight to `score`. What travels is small JSON (the structures below), so that a state
machine can carry it; whoever carries it is a Transport. A shard that fails fails the search, or is named in the answer if the caller allows that.

Not here: who calls whom, retries, HTTP, AWS. Retrying a step is safe: steps only read.
"""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec
import numpy as np

from engine.config import SearchParams
from engine.errors import CorruptData, EngineError, InvalidRequest, LimitExceeded, NotFound, Unavailable, UnsupportedFormat
from engine.index.reader import Reader, Snapshot
from engine.near import Bars, Ranking, company, decide
from engine.scoring.topk import top_k
from engine.searcher import Answer, PartHits, Searcher, SearchStats

Mode = Literal["warm", "cold"]
STATE_BYTES = 256 << 10
"""Most that a Step Functions execution carries from state to state (and accepts as input), in bytes of UTF-8."""
_FIXED_BYTES = 5 << 10
"""Of a state: field names, bars, whose trace it is, what the machine adds."""
_SHARD_BYTES = 2 << 10
"""Of one shard in a state: its place in the plan, its figures, or its failure (errors are cut to MAX_CAUSE)."""
MAX_CAUSE = 600
PINNED_AGE_S = 600.0
"""A generation known for so long still opens without a request: it is pinned by number and life, so it cannot be another."""
MAX_QUERIES_AT_ONCE = 8


class _Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what travels."""


class Job(_Wire, frozen=True, kw_only=True):
    """One query over one generation of an index, for any number of shards.

    life       index_id of the manifest: an index that was deleted and made again is another one
    query      float16 or float32 (Q, dim) little-endian; float16 only if nothing is lost by it
    mode       "warm" loads segments into memory, "cold" reads of them what the query needs
    subset     ids that may be hits (packed by `pack_ids`); None allows all
    condition  what documents must meet, with its parameters; each shard asks its own segments. Not together with subset
    trace      on whose behalf, for the log lines of whoever does a step; nothing here reads it
    """

    index: str
    life: str
    generation: int
    query: bytes
    query_type: Literal["f2", "f4"]
    dim: int
    params: SearchParams
    mode: Mode
    subset: bytes | None = None
    condition: str | None = None
    parameters: list[Any] = []
    allow_partial: bool = False
    trace: dict[str, str] = {}

    def vectors(self) -> np.ndarray:
        """float32 (Q, dim)."""
        dtype = np.dtype("<" + self.query_type)
        if self.dim < 1 or len(self.query) % (self.dim * dtype.itemsize):
            raise InvalidRequest("a job's query does not have its dimension", expected=self.dim, found_bytes=len(self.query))
        query = np.frombuffer(self.query, dtype).reshape(-1, self.dim).astype(np.float32)
        if not np.isfinite(query).all():
            raise InvalidRequest("a job's query has a value that is not finite")
        return query


class Shard(_Wire, frozen=True, kw_only=True):
    """Segments that one process searches, by their positions in the manifest."""

    number: int
    segments: tuple[int, ...]
    size_bytes: int


class Plan(_Wire, frozen=True, kw_only=True):
    """A job and how it is cut. needs_ranking: whether `rank` comes before `score`."""

    job: Job
    shards: tuple[Shard, ...]
    needs_ranking: bool


class WireBars(_Wire, frozen=True, kw_only=True):
    """Bars; None is minus infinity, which JSON cannot say."""

    approximate: float | None = None
    exact: float | None = None

    @classmethod
    def of(cls, bars: Bars) -> WireBars:
        return cls(approximate=_finite(bars.approximate), exact=_finite(bars.exact))

    def bars(self) -> Bars:
        return Bars(
            -np.inf if self.approximate is None else self.approximate,
            -np.inf if self.exact is None else self.exact,
        )


class Ranked(_Wire, frozen=True, kw_only=True):
    """A shard's Ranking: float32 little-endian both."""

    shard: int
    approximate: bytes
    exact: bytes
    stats: SearchStats


class Scored(_Wire, frozen=True, kw_only=True):
    """A shard's best k: ids int64, scores float32, positions uint32 of segments, ordinals uint32, little-endian."""

    shard: int
    ids: bytes
    scores: bytes
    positions: bytes
    ordinals: bytes
    stats: SearchStats


class Failed(_Wire, frozen=True, kw_only=True):
    """A shard that gave no answer: `error` is the kind (a class of engine.errors, or whatever the platform calls it), `cause` says why."""

    shard: int
    segments: tuple[int, ...] = ()
    error: str
    cause: str

    def as_error(self) -> EngineError:
        """What fails the search: the shard's own kind of failure where it is one of ours, else Unavailable (`shard-failed`)."""
        kind, code, why = heard(self.error, self.cause)
        return kind("a shard of the search failed", code=code, **{"shard": self.shard, "error": self.error, "why": why})


_KINDS: dict[str, type[EngineError]] = {
    kind.__name__: kind for kind in (InvalidRequest, NotFound, LimitExceeded, Unavailable, UnsupportedFormat, CorruptData)
}


def heard(error: str, cause: str) -> tuple[type[EngineError], str, str]:
    """What a failure that travelled (`told`) was: its kind, code and text. What is none of ours is Unavailable (`shard-failed`)."""
    found = re.match(r"\[([a-z-]+)\] (.*)", cause, re.DOTALL)
    kind = _KINDS.get(error)
    if kind is None:
        return Unavailable, "shard-failed", f"{error}: {cause}"[:MAX_CAUSE]
    return (kind, found[1], found[2][:MAX_CAUSE]) if found else (kind, kind.default_code, cause[:MAX_CAUSE])


Outcome = Scored | Failed


class Transport(Protocol):
    """Has the shards of a plan scored somewhere.

    max_state_bytes  what one message may hold; None for no limit
    mode             how those who score hold their segments
    """

    max_state_bytes: int | None
    mode: Mode

    def shard_count(self, size_bytes: int) -> int:
        """How many shards an index of this size is cut into."""
        ...

    async def run(self, plan: Plan) -> list[Outcome]:
        """One outcome per shard, in any order. Raises Unavailable if the machinery itself fails."""
        ...


class FanOut:
    """Searches through a transport what is too large for one process."""

    def __init__(self, searcher: Searcher, transport: Transport, *, min_bytes: int) -> None:
        self.searcher, self.transport, self.min_bytes = searcher, transport, min_bytes

    def wants(self, snapshot: Snapshot) -> bool:
        """Whether an index is so large that it is worth it."""
        return len(snapshot.segments) > 1 and sum(ref.size_bytes for ref in snapshot.segments) >= self.min_bytes

    async def search(
        self,
        snapshot: Snapshot,
        queries: Sequence[np.ndarray],
        params: SearchParams,
        *,
        subset: np.ndarray | None = None,
        condition: str | None = None,
        parameters: Sequence[Any] = (),
        allow_partial: bool = False,
        with_rows: bool = True,
        explain: bool = False,
    ) -> list[Answer]:
        """As Searcher.search; a condition is evaluated by the shards, and shards that failed are named in the answer if allow_partial.

        Raises LimitExceeded if a query does not fit the transport's messages, before anything is sent; Unavailable (`shard-failed`) and what else a
        shard fails with. Cost here: a request per hit's segment for the rows; the shards' own costs are in the answer's stats.
        """
        plans = [
            make_plan(
                snapshot,
                query,
                params,
                self.transport,
                subset=subset,
                condition=condition,
                parameters=parameters,
                allow_partial=allow_partial,
            )
            for query in queries
        ]
        places = asyncio.Semaphore(MAX_QUERIES_AT_ONCE)

        async def one(query: np.ndarray, plan: Plan) -> Answer:
            async with places:
                began = time.perf_counter()
                outcomes = await self.transport.run(plan)
                answer = await merged(self.searcher, snapshot, plan, outcomes, query=query, with_rows=with_rows, explain=explain)
                answer.stats.times_ms["total"] = round((time.perf_counter() - began) * 1000, 3)
                return answer

        return list(await asyncio.gather(*(one(query, plan) for query, plan in zip(queries, plans, strict=True))))


# Planning


def make_plan(
    snapshot: Snapshot,
    query: np.ndarray,
    params: SearchParams,
    transport: Transport,
    *,
    subset: np.ndarray | None = None,
    condition: str | None = None,
    parameters: Sequence[Any] = (),
    allow_partial: bool = False,
) -> Plan:
    """Cut one query over a snapshot into shards, as many as the transport wants and its messages hold. No I/O.

    query  float32 (Q, D); subset int64 ids or None for all
    Raises LimitExceeded if not even two shards' answers fit beside the query: ask for fewer hits, shorter queries, or one process.
    """
    if subset is not None and condition is not None:
        raise InvalidRequest("a search has a subset or a condition, not both")
    data, kind = _packed_query(query)
    job = Job(
        index=snapshot.index,
        life=snapshot.manifest.index_id,
        generation=snapshot.manifest.generation,
        query=data,
        query_type=kind,
        dim=query.shape[1],
        params=params,
        mode=transport.mode,
        subset=None if subset is None else pack_ids(subset),
        condition=condition,
        parameters=list(parameters),
        allow_partial=allow_partial,
    )
    sizes = [ref.size_bytes for ref in snapshot.segments]
    needs_ranking = transport.mode == "warm" and any(ref.kind == "quantised" for ref in snapshot.segments)
    together = company(snapshot.segments)
    n_shards = max(1, min(transport.shard_count(sum(sizes)), len(sizes) - max(0, len(together) - 1)))
    if transport.max_state_bytes is not None:
        n_shards = _fitting(job, n_shards, len(sizes), needs_ranking, transport.max_state_bytes)
    return Plan(job=job, shards=cut(sizes, n_shards, together), needs_ranking=needs_ranking)


def cut(sizes: Sequence[int], n_shards: int, together: Sequence[int] = ()) -> tuple[Shard, ...]:
    """Segments (bytes each) into at most n_shards of about one size: the largest first, each to the shard with the least.

    together  positions that stay in one shard, because they share an exact stage (near.py, company)

    A small new segment does not move the larger ones, so processes that keep a shard's segments in memory keep most of them.
    """
    loads, members = [0] * n_shards, [[] for _ in range(n_shards)]  # type: tuple[list[int], list[list[int]]]
    groups = [[n] for n in range(len(sizes)) if n not in together]
    if together:
        groups.append(list(together))
    for group in sorted(groups, key=lambda group: (-sum(sizes[n] for n in group), group)):
        lightest = min(range(n_shards), key=loads.__getitem__)
        loads[lightest] += sum(sizes[n] for n in group)
        members[lightest] += group
    return tuple(
        Shard(number=number, segments=tuple(sorted(positions)), size_bytes=loads[number])
        for number, positions in enumerate(members)
        if positions
    )


def result_bytes(params: SearchParams, needs_ranking: bool) -> int:
    """Most bytes of JSON that one shard adds to a state: base64 of 20 bytes a hit, or of its ranking."""
    hits = 20 * params.k
    ranking = 4 * (max(params.n_rerank, params.k) + 1 + params.k) if needs_ranking else 0
    return _SHARD_BYTES + max(hits, ranking) * 4 // 3


def _fitting(job: Job, wanted: int, n_segments: int, needs_ranking: bool, max_state_bytes: int) -> int:
    fixed = len(encode(job)) + 8 * n_segments + _FIXED_BYTES
    each = result_bytes(job.params, needs_ranking)
    most = (max_state_bytes - fixed) // each
    if most < min(wanted, 2):
        facts: dict[str, Any] = {"limit_bytes": max_state_bytes, "query_bytes": fixed, "hits_bytes_per_shard": each}
        raise LimitExceeded("the query and its hits do not fit into the messages of a fan-out: fewer hits or query tokens do", **facts)
    return max(1, min(wanted, most))


def _packed_query(query: np.ndarray) -> tuple[bytes, Literal["f2", "f4"]]:
    query = np.asarray(query, np.float32)
    with np.errstate(over="ignore"):
        half = query.astype("<f2")
    if np.array_equal(half.astype(np.float32), query):
        return half.tobytes(), "f2"
    return query.astype("<f4").tobytes(), "f4"


def pack_ids(ids: np.ndarray) -> bytes:
    """Document ids, any order, as few bytes: differences of the sorted ids, deflated."""
    rising = np.unique(np.asarray(ids, np.int64))
    return zlib.compress(np.diff(rising, prepend=np.int64(0)).astype("<i8").tobytes(), 6)


def unpack_ids(data: bytes) -> np.ndarray:
    """int64, ascending."""
    try:
        return np.cumsum(np.frombuffer(zlib.decompress(data), "<i8"), dtype=np.int64)
    except (zlib.error, ValueError) as error:
        raise InvalidRequest("a job's subset cannot be read", found=str(error)) from error


# One shard


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


# Together


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
    found = best_of(scored, plan.job.params.k)
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
    ids = np.concatenate([np.empty(0, np.int64), *(_array(one.ids, "<i8") for one in once)])
    scores = np.concatenate([np.empty(0, np.float32), *(_array(one.scores, "<f4") for one in once)])
    positions = np.concatenate([np.empty(0, np.int64), *(_array(one.positions, "<u4").astype(np.int64) for one in once)])
    ordinals = np.concatenate([np.empty(0, np.int64), *(_array(one.ordinals, "<u4").astype(np.int64) for one in once)])
    if not len(ids) == len(scores) == len(positions) == len(ordinals):
        raise CorruptData("a shard's hits differ in number", code="malformed", found=[len(ids), len(scores), len(positions), len(ordinals)])
    best = top_k(scores, k, ids)
    return PartHits(ids[best], scores[best], positions[best], ordinals[best])


def _array(data: bytes, dtype: str) -> np.ndarray:
    """A shard's numbers; CorruptData if the bytes are none. A score may be minus infinity."""
    if len(data) % np.dtype(dtype).itemsize or (dtype == "<f4" and np.isnan(np.frombuffer(data, dtype)).any()):
        raise CorruptData("numbers of a shard do not read", code="malformed", dtype=dtype, found=len(data))
    return np.frombuffer(data, dtype)


def _added(stats: Sequence[SearchStats]) -> SearchStats:
    """Work adds up; rounds and the time of each stage are those of the slowest shard."""
    total = SearchStats()
    for one in stats:
        for stage, ms in one.times_ms.items():
            total.times_ms[stage] = max(total.times_ms.get(stage, 0.0), ms)
        for name in ("n_candidates", "n_reranked", "n_tokens_scored", "n_requests", "n_bytes", "n_cold_segments"):
            setattr(total, name, getattr(total, name) + getattr(one, name))
        total.n_rounds = max(total.n_rounds, one.n_rounds)
    return total


# Steps: what a process is asked to do, whoever asks


class Step(_Wire, frozen=True, kw_only=True):
    """One shard's share of a job. bars: with `score`, what `rank` decided."""

    do: Literal["rank", "score"]
    job: Job
    shard: Shard
    bars: WireBars | None = None


async def take(searcher: Searcher, step: Step) -> Ranked | Scored:
    """Do a step."""
    if step.do == "rank":
        return await rank(searcher, step.job, step.shard)
    return await score(searcher, step.job, step.shard, step.bars)


async def run_steps(plan: Plan, ask: Callable[[Step], Awaitable[Ranked | Scored]]) -> list[Outcome]:
    """A plan step by step; `ask` has a step done, with the retries it sees fit. For transports that talk to each process themselves."""
    bars, lost = None, {}
    if plan.needs_ranking:
        rankings = await _all([Step(do="rank", job=plan.job, shard=shard) for shard in plan.shards], ask)
        lost = {one.shard: one for one in rankings if isinstance(one, Failed)}
        if lost and not plan.job.allow_partial:
            return list(lost.values())
        bars = bars_of(plan.job, [one for one in rankings if isinstance(one, Ranked)])
    steps = [Step(do="score", job=plan.job, shard=shard, bars=bars) for shard in plan.shards if shard.number not in lost]
    return [*lost.values(), *(one for one in await _all(steps, ask) if not isinstance(one, Ranked))]


async def _all(steps: Sequence[Step], ask: Callable[[Step], Awaitable[Ranked | Scored]]) -> list[Ranked | Scored | Failed]:
    found = await asyncio.gather(*(ask(step) for step in steps), return_exceptions=True)
    outcomes: list[Ranked | Scored | Failed] = []
    for step, one in zip(steps, found, strict=True):
        if isinstance(one, BaseException) and not isinstance(one, (EngineError, TimeoutError)):
            raise one
        outcomes.append(failure(step.shard, one) if isinstance(one, BaseException) else one)
    return outcomes


def failure(shard: Shard, error: BaseException) -> Failed:
    """A failure as it travels."""
    return Failed(shard=shard.number, segments=shard.segments, error=type(error).__name__, cause=told(error))


def told(error: BaseException) -> str:
    """An error in one short line, its code in front, as Failed.as_error reads it."""
    code = f"[{error.code}] " if isinstance(error, EngineError) else ""
    return f"{code}{str(error) or type(error).__name__}"[:MAX_CAUSE]


# JSON


def encode(item: object) -> bytes:
    """JSON of a structure of this file; bytes as base64."""
    return msgspec.json.encode(item)


def plain(item: object) -> Any:
    """The same as dicts, lists, strings and numbers."""
    return msgspec.json.decode(encode(item))


def read(data: bytes | Any, kind: Any) -> Any:
    """A structure from its JSON, or from what a JSON decoder made of it. InvalidRequest if it is none."""
    try:
        return msgspec.json.decode(data, type=kind) if isinstance(data, bytes) else msgspec.convert(data, kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidRequest("not a message of a fan-out", expected=getattr(kind, "__name__", str(kind)), found=str(error)[:200]) from error


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
