"""One query over one generation, cut into shards: as many as the transport wants and its messages hold. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from engine.config import SearchParams
from engine.errors import InvalidRequest, LimitExceeded
from engine.fanout.messages import Job, Plan, Shard, encode, pack_ids
from engine.fanout.transport import Transport
from engine.index.reader import Snapshot
from engine.near import company

_FIXED_BYTES = 5 << 10
"""Of a state: field names, bars, whose trace it is, what the machine adds."""
_SHARD_BYTES = 2 << 10
"""Of one shard in a state: its place in the plan, its figures, or its failure (errors are cut to MAX_CAUSE)."""


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
