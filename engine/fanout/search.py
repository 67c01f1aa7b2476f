"""One search by many processes: plan, rank, score, merge. Answers are those of one process, bit for bit.

    plan     pin one generation, cut its segments into shards by bytes (plan.py)
    rank     per shard: all stages but the exact one; the shards' rankings together decide the bars (shard.py; engine/searcher.py)
    score    per shard: the exact stage under these bars; the best k hits (shard.py)
    merge    score falling, then document id; rows of the hits are read by who merges (merge.py)

Ranking is one more round between the processes. It is needed where segments are in memory ("warm"), because their shortlists are cut together; a
search that reads cold decides segment by segment and goes straight to `score`. What travels is small JSON (messages.py), so that a state
machine can carry it; whoever carries it is a Transport. A shard that fails fails the search, or is named in the answer if the caller allows that.

Not here: who calls whom, retries, HTTP, AWS. Retrying a step is safe: steps only read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.config import SearchParams
from engine.fanout.merge import merged
from engine.fanout.messages import Plan
from engine.fanout.plan import make_plan
from engine.fanout.transport import Transport
from engine.index.reader import Snapshot
from engine.searcher import Answer, Searcher

MAX_QUERIES_AT_ONCE = 8


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
