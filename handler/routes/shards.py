"""One shard of a search, for another server of ours: see handler/fanout.py. Not for users; its body may change with every release."""

from __future__ import annotations

from engine.config import INDEX_NAME
from engine.fanout.messages import Ranked, Step
from engine.fanout.shard import take
from handler.fanout import SHARD_PATH, ShardAnswer
from handler.problems import index_not_found
from handler.routes.endpoint import Call, Endpoint, Reply


async def shard(call: Call) -> Reply:
    step: Step = call.body
    call.runtime.gate.admit_index(call.caller, step.job.index)
    if not INDEX_NAME.fullmatch(step.job.index):
        raise index_not_found(step.job.index)
    done = await take(call.runtime.searcher, step)
    call.record.index, call.record.generation = step.job.index, step.job.generation
    return Reply(ShardAnswer(ranked=done) if isinstance(done, Ranked) else ShardAnswer(scored=done))


_JOB = {
    "index": "papers",
    "life": "01M841TDV5EPRHCYSP0YSZ0JRV",
    "generation": 3,
    "query": "zczMPc3MTD6amZk+zczMPg==",
    "query_type": "f4",
    "dim": 4,
    "params": {"k": 10, "n_probe": 8, "n_candidates": 4096, "n_rerank": 1024, "centroid_score_threshold": None},
    "mode": "warm",
}

ENDPOINTS = (
    Endpoint(
        method="POST",
        path=SHARD_PATH,
        name="shard",
        handle=shard,
        summary="Score a share of an index's segments for another server",
        body=Step,
        request_example={"do": "score", "job": _JOB, "shard": {"number": 0, "segments": [0, 2], "size_bytes": 1000}},
        answer=ShardAnswer,
        errors=("INDEX_NOT_FOUND", "GENERATION_NOT_FOUND", "DIMENSION_MISMATCH"),
        tag="internal",
        scope="search",
        group="shard",
        description="Between servers of one deployment (TARTAN_FANOUT_PEERS). The body may change with every release.",
    ),
)
