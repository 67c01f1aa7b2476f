"""Answers of shards: what other servers and the state machine hand back to who merges a search.

The other side is a process of ours of perhaps another release, or something in its place, or a proxy's page. Its answer is merged, or the
search fails by a fault of the machinery (503, 500), never of the caller's making unless the shard said so, never with hits that the
index cannot have.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np

from engine.config import SearchParams
from engine.errors import CorruptData, EngineError, InvalidRequest, LimitExceeded, NotFound, Unavailable, UnsupportedFormat
from engine.fanout.merge import STAGES
from engine.fanout.messages import Plan, Step, encode, read
from engine.fanout.search import FanOut
from engine.fanout.shard import take
from engine.index.reader import Reader, Snapshot
from engine.searcher import Answer, Searcher
from handler import fanout as transports
from handler.fanout import Peers, StateMachine

from .arena import check_answer, query
from .mutation import dumped, mutated, mutated_json
from .service import DIM, filled_store
from .target import Target, Wrong, closed_later

PARAMS = SearchParams(k=5, n_rerank=6)
RANKED, SCORED, REFUSED, OUTPUT, EXECUTION = range(5)
PARTIAL = 5
"""The first byte: a peer's answer to `rank`, to `score`, its refusal; the results of an execution, an execution's end. PARTIAL is added where
an answer of some shards will do."""
_STATUSES = (400, 404, 413, 429, 500, 502, 503)


@dataclass(frozen=True)
class _Cluster:
    """A searcher of a small index, whose shards are scored here too, but for the answer that is the fuzzer's."""

    runner: asyncio.Runner
    searcher: Searcher
    snapshot: Snapshot

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    async def honest(self, step: Step) -> bytes:
        done = await take(self.searcher, step)
        return encode({"ranked" if step.do == "rank" else "scored": done})


@cache
def cluster() -> _Cluster:
    runner = asyncio.Runner()
    closed_later(runner.close)
    reader = Reader(runner.run(filled_store()))
    return _Cluster(runner, Searcher(reader), runner.run(reader.snapshot("papers")))


# The two transports, with the fuzzer on their other end


class _Network(httpx.AsyncBaseTransport):
    """Two peers: the first answers as the input says, to the step that it is about; everything else is answered rightly."""

    def __init__(self, kind: int, body: bytes) -> None:
        self._kind, self._body = kind, body

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        step: Step = read(await request.aread(), Step)
        if request.url.host == "a" and self._kind == REFUSED and self._body:
            return httpx.Response(_STATUSES[self._body[0] % len(_STATUSES)], content=self._body[1:])
        if step.shard.number == 0 and self._kind == (RANKED if step.do == "rank" else SCORED):
            return httpx.Response(200, content=self._body)
        return httpx.Response(200, content=await cluster().honest(step))


class _Machine:
    """The SDK's client of a state machine whose execution ends as the input says."""

    def __init__(self, kind: int, body: bytes) -> None:
        self._kind, self._text = kind, body.decode(errors="replace")

    async def start_sync_execution(self, **_: Any) -> dict[str, Any]:
        if self._kind == OUTPUT:
            return {"status": "SUCCEEDED", "output": self._text}
        try:
            ended = json.loads(self._text)
        except (ValueError, RecursionError):
            ended = None
        texts = {name: str(value) for name, value in ended.items()} if isinstance(ended, dict) else {}
        return {"status": "FAILED", **texts}  # the SDK has checked the types


class _TwoShards(StateMachine):
    def shard_count(self, size_bytes: int) -> int:
        return 2


async def _asked(kind: int, body: bytes, allow_partial: bool) -> Answer:
    found, asked = cluster(), query(DIM, 3)
    if kind in (OUTPUT, EXECUTION):
        machine = _TwoShards("", 1)
        machine._client = _Machine(kind, body)
        transport: Peers | StateMachine = machine
    else:
        peers = Peers(["http://a", "http://b"])
        peers._clients.append(httpx.AsyncClient(transport=_Network(kind, body)))
        transport = peers
    fan = FanOut(found.searcher, transport, min_bytes=0)
    [answer] = await fan.search(found.snapshot, [asked], PARAMS, allow_partial=allow_partial, explain=True)
    if isinstance(transport, Peers):
        await transport.close()
    return answer


# Judging


def merge(data: bytes) -> bool:
    """The first byte says who answers and when."""
    if not data:
        return False
    kind, body = data[0] % 5, data[1:]
    try:
        with patch.object(transports, "PEER_PAUSE_S", 0.0):
            answer = cluster().run(_asked(kind, body, data[0] // PARTIAL % 2 == 1))
    except (CorruptData, Unavailable, UnsupportedFormat) as error:
        _check_told(error)
        return False
    except (InvalidRequest, NotFound, LimitExceeded) as error:
        if not (kind in (REFUSED, EXECUTION) or b'"error"' in body):
            raise Wrong(f"the caller is blamed for a shard's answer: {type(error).__name__} {error}") from error
        _check_told(error)
        return False
    _check_merged(answer)
    return True


def _check_told(error: EngineError) -> None:
    if len(str(error)) > 4000:
        raise Wrong(f"an error of {len(str(error))} characters")


def _check_merged(answer: Answer) -> None:
    manifest, stats = cluster().snapshot.manifest, answer.stats
    check_answer(answer, manifest, PARAMS)
    if len(answer.rows) != len(answer.ids):
        raise Wrong("rows of other hits")
    if not stats.times_ms.keys() <= STAGES or not all(np.isfinite(ms) and ms >= 0 for ms in stats.times_ms.values()):
        raise Wrong(f"times of stages that metrics cannot hold: {stats.times_ms}")
    if min(stats.n_candidates, stats.n_reranked, stats.n_tokens_scored, stats.n_requests, stats.n_bytes, stats.n_rounds) < 0:
        raise Wrong(f"negative figures: {stats}")
    encode({"ids": answer.ids.tolist(), "scores": answer.scores.tolist(), "rows": answer.rows, "failed": answer.failed})


# Seeds and mutations


class _Noting(Peers):
    """Keeps the plan and every answer of an honest search."""

    def __init__(self) -> None:
        super().__init__(["http://a", "http://b"])
        self.plan: Plan | None = None
        self.answers: dict[tuple[str, int], bytes] = {}

    async def run(self, plan: Plan) -> Any:
        self.plan = plan
        return await super().run(plan)

    async def ask(self, step: Step) -> Any:
        done = await take(cluster().searcher, step)
        self.answers[step.do, step.shard.number] = await cluster().honest(step)
        return done


def _seeds() -> list[bytes]:
    found, noting = cluster(), _Noting()
    found.run(FanOut(found.searcher, noting, min_bytes=0).search(found.snapshot, [query(DIM, 3)], PARAMS))
    answers = {key: _TIMES.sub(b'"times_ms":{"exact":0.5}', answer) for key, answer in noting.answers.items()}
    results = [json.loads(answers["score", number])["scored"] for number in (0, 1)]
    lambda_failed = {"shard": 0, "segments": [0], "error": "CorruptData", "cause": json.dumps({"errorMessage": "[malformed] a page"})}
    refused = json.dumps({"code": "GENERATION_NOT_FOUND", "message": "gone"}).encode()
    ended = {"error": "InvalidRequest", "cause": json.dumps({"errorMessage": "[dimension-mismatch] other", "errorType": "x"})}
    return [
        bytes([RANKED]) + answers["rank", 0],
        bytes([SCORED + PARTIAL]) + answers["score", 0],
        bytes([REFUSED, 1]) + refused,
        bytes([REFUSED + PARTIAL, 5]) + b"<html>bad gateway</html>",
        bytes([OUTPUT]) + json.dumps({"results": results}).encode(),
        bytes([OUTPUT + PARTIAL]) + json.dumps({"results": [lambda_failed, results[1]]}).encode(),
        bytes([EXECUTION]) + json.dumps(ended).encode(),
    ]


_TIMES = re.compile(rb'"times_ms":\{[^}]*\}')
"""Of an honest answer: another each time, and seeds are to be the same."""
_PACKED = ("approximate", "exact", "ids", "scores", "positions", "ordinals")
_WORDS = {
    "<f4": (0.0, -0.0, 1e-45, 3e38, -3e38, float("inf"), -float("inf"), float("nan")),
    "<u4": (0, 1, 2, 47, 48, 0x7FFFFFFF, 0xFFFFFFFF),
    "<i8": (0, 1, 48, -1, (1 << 62), -(1 << 63), (1 << 63) - 1),
}


def _mutate(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """A node of the JSON; or numbers within a packed array of it, which are base64."""
    head, body = data[:1], data[1:]
    if head and head[0] % 5 in (RANKED, SCORED, OUTPUT) and rng.random() < 0.6:
        try:
            tree = json.loads(body)
            packed = [(holder, name) for holder in _objects(tree) for name in _PACKED if isinstance(holder.get(name), str)]
            holder, name = rng.choice(packed)
            holder[name] = _repacked(holder[name], name, rng)
            return head + dumped(tree)
        except (ValueError, IndexError, RecursionError):
            pass
    if head and head[0] % 5 == REFUSED and len(body) > 1:
        return head + bytes([rng.randrange(7)]) + mutated_json(body[1:], rng, (), tokens)
    if rng.random() < 0.05:
        return mutated(data, rng, others, tokens)
    return head + mutated_json(body, rng, [other[1:] for other in others], tokens)


def _objects(tree: Any) -> list[dict[str, Any]]:
    if isinstance(tree, dict):
        return [tree, *(found for value in tree.values() for found in _objects(value))]
    return [found for value in tree for found in _objects(value)] if isinstance(tree, list) else []


def _repacked(text: str, name: str, rng: Random) -> str:
    data = base64.b64decode(text)
    dtype = "<i8" if name == "ids" else "<u4" if name in ("positions", "ordinals") else "<f4"
    width = np.dtype(dtype).itemsize
    kind = rng.randrange(6)
    if kind == 0:
        data = mutated(data, rng)
    elif kind == 1:
        data = data + data[-width:] * rng.choice((1, 2, 300))
    elif kind == 2:
        data = data[: -rng.choice((1, width, 2 * width))]
    else:
        values = np.frombuffer(data, dtype).copy()
        if len(values):
            at = rng.randrange(len(values))
            values[at] = rng.choice(_WORDS[dtype])
            if kind == 3:
                values[:] = values[at]
        data = values.tobytes()
    return base64.b64encode(data).decode()


SHARDS = Target("shards", "answers of other servers and of the state machine to who merges", merge, _seeds, mutate=_mutate)
