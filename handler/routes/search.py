"""The four searches: semantic, keyword, hybrid, by vectors or by texts, filtered or not. All go through `_search`.

The order of the checks is API.md's (11, a to g), so that a client that expects a certain refusal gets that one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from engine.config import SearchParams
from engine.errors import InvalidRequest, LimitExceeded
from engine.index.reader import Snapshot
from engine.index.snapshots import generation_at_time
from engine.opening import Mode
from engine.scoring.fusion import fuse
from engine.searcher import Answer, SearchStats
from handler import tracing
from handler.problems import Problem, bad_request, index_not_found, metadata_not_found, outward
from handler.routes.encoding import encode_queries
from handler.routes.endpoint import Call, Endpoint, Reply
from handler.runtime import architecture
from handler.wire.answers import Explanation, FailedShard, QueryCost, QueryResult, Row, SearchAnswer
from handler.wire.matrices import check_dimensions, query_matrices
from handler.wire.requests import (
    FilteredSearchRequest,
    FilteredTextSearchRequest,
    Params,
    SearchExtensions,
    SearchRequest,
    TextSearchRequest,
)
from handler.wire.translation import parse_time, search_params, subset_ids

if TYPE_CHECKING:
    from engine.fanout.search import FanOut

_FILTER = "invalid filter condition: "
FUSIONS = ("relative_score", "rrf")
DEFAULT_ALPHA = 0.75
HYBRID_OVERFETCH = 3
"""Each side of a hybrid search gives this many times top_k (NextPlaid's)."""


class _Query(msgspec.Struct):
    """A search request of any of the four kinds. `vectors` gives float32 (Q, D) each; it is called where API.md converts embeddings."""

    n_vectors: int
    vectors: Callable[[], list[np.ndarray]]
    texts: Sequence[str]
    params: Params
    subset: Sequence[int] | None
    condition: str | None
    parameters: Sequence[Any]
    alpha: float | None
    fusion: str | None
    options: SearchExtensions
    leaves_condition_to_shards: bool = False

    @property
    def is_hybrid(self) -> bool:
        return bool(self.n_vectors and self.texts)


async def search(call: Call) -> Reply:
    body: SearchRequest = call.body
    queries = body.queries or []
    query = _Query(
        len(queries),
        lambda: query_matrices(queries),
        body.text_query or [],
        body.params,
        body.subset,
        body.filter_condition,
        body.filter_parameters or [],
        body.alpha,
        body.fusion,
        body,
    )
    return await _search(call, query)


async def search_filtered(call: Call) -> Reply:
    body: FilteredSearchRequest = call.body
    if not body.queries:
        raise bad_request("queries is empty")
    query = _Query(
        len(body.queries),
        lambda: query_matrices(body.queries),
        [],
        body.params,
        None,
        body.filter_condition,
        body.filter_parameters,
        None,
        None,
        body,
    )
    return await _search(call, query)


async def search_texts(call: Call) -> Reply:
    body: TextSearchRequest | FilteredTextSearchRequest = call.body
    if not body.queries:
        raise bad_request("queries is empty")
    _check_n_queries(call, len(body.queries))
    vectors = await encode_queries(call, body.queries)
    query = _Query(
        len(vectors),
        lambda: vectors,
        body.text_query or [],
        body.params,
        body.subset if isinstance(body, TextSearchRequest) else None,
        body.filter_condition if isinstance(body, FilteredTextSearchRequest) else None,
        body.filter_parameters if isinstance(body, FilteredTextSearchRequest) else [],
        body.alpha,
        body.fusion,
        body,
    )
    return await _search(call, query)


async def _search(call: Call, query: _Query) -> Reply:
    _check_shape(call, query)
    presumed = _presumed(call, query)
    if presumed is None:
        return await _search_in(call, query, await _snapshot(call, query))
    early = asyncio.ensure_future(_search_in(call, query, presumed))
    try:
        snapshot = await _snapshot(call, query)
        if snapshot is not None and _is_same(snapshot, presumed):
            return await early
        return await _search_in(call, query, snapshot)
    finally:
        early.cancel()
        await asyncio.gather(early, return_exceptions=True)


def _presumed(call: Call, query: _Query) -> Snapshot | None:
    """The generation to begin with while the store is asked which one is in force: one round less where nothing has changed, which is
    the usual case. None where an old answer would do anyway, or where the work is too dear to be done twice."""
    options = query.options
    if not call.runtime.settings.presume or options.as_of is not None or options.consistency != "strong":
        return None
    head = call.runtime.reader.presumed_head(call.name)
    if head is None:
        return None
    snapshot = Snapshot(call.runtime.reader, call.name, head.manifest)
    return snapshot if _fan_out(call, snapshot) is None else None


def _is_same(one: Snapshot, other: Snapshot) -> bool:
    return (one.manifest.index_id, one.manifest.generation) == (other.manifest.index_id, other.manifest.generation)


async def _search_in(call: Call, query: _Query, snapshot: Snapshot | None) -> Reply:
    is_filled = snapshot is not None and snapshot.dim is not None
    subset: np.ndarray | None = None
    if query.condition is not None:
        if snapshot is None or not is_filled:
            raise metadata_not_found(call.name)
        query.leaves_condition_to_shards = not query.texts and _fan_out(call, snapshot) is not None
        if query.leaves_condition_to_shards:
            _check_condition(snapshot, query.condition, query.parameters)
        else:
            subset = await _selected(snapshot, query)
    elif query.subset is not None:
        subset = subset_ids(query.subset)
    vectors = await call.compute(query.vectors)
    if vectors and not is_filled:
        raise index_not_found(call.name)
    if vectors:
        assert snapshot is not None
        check_dimensions(vectors, snapshot.dim)
    if query.is_hybrid and len(query.texts) != 1:
        raise bad_request(f"hybrid search takes one query and one text query, found {len(query.texts)} text queries")
    call.record.facts["queries"] = len(vectors) or len(query.texts)
    if snapshot is None or not is_filled:
        return _reply([QueryResult(i, [], [], []) for i in range(len(query.texts))])
    return await _run(call, snapshot, query, vectors, subset)


def _check_shape(call: Call, query: _Query) -> None:
    """Checks (a) to (d)."""
    if not query.n_vectors and not query.texts:
        raise bad_request("at least one of queries and text_query is needed")
    if query.alpha is not None and not 0.0 <= query.alpha <= 1.0:
        raise bad_request(f"alpha is between 0 and 1, found {query.alpha}")
    if query.fusion is not None and query.fusion not in FUSIONS:
        raise bad_request("fusion is relative_score or rrf")
    if query.is_hybrid and query.n_vectors != 1:
        raise bad_request(f"hybrid search takes one query and one text query, found {query.n_vectors} queries")
    _check_n_queries(call, max(query.n_vectors, len(query.texts)))


def _check_n_queries(call: Call, n_queries: int) -> None:
    if n_queries > call.runtime.settings.max_queries:
        raise Problem("PAYLOAD_TOO_LARGE", f"{n_queries} queries in one request, at most {call.runtime.settings.max_queries} are served")


async def _snapshot(call: Call, query: _Query) -> Snapshot | None:
    """The generation to search; None if there is no such index, which is not an error to every search."""
    options = query.options
    max_age_s = options.max_age_s if options.consistency == "eventual" else 0.0
    try:
        return await call.snapshot(max_age_s=max_age_s, generation=await _generation(call, options.as_of))
    except Problem as problem:
        if problem.code == "INDEX_NOT_FOUND":
            return None
        raise


async def _generation(call: Call, as_of: int | str | None) -> int | None:
    if not isinstance(as_of, str):
        return as_of
    time_s = parse_time(as_of)
    return await generation_at_time(call.runtime.store, (await call.snapshot()).index, time_s)


async def selected(snapshot: Snapshot, condition: str, parameters: Sequence[Any], *, prefix: str = "") -> np.ndarray:
    """Ids that meet a condition, int64 ascending. In an index without columns only conditions on `_subset_` mean anything;
    for any other there is no metadata to look at: Problem METADATA_NOT_FOUND."""
    with _condition_refused(snapshot, prefix), tracing.stage("filter"):
        return await snapshot.select(condition, parameters)


async def _selected(snapshot: Snapshot, query: _Query) -> np.ndarray:
    assert query.condition is not None
    return await selected(snapshot, query.condition, query.parameters, prefix=_FILTER)


def _check_condition(snapshot: Snapshot, condition: str, parameters: Sequence[Any]) -> None:
    """Refuse what `selected` would refuse, without looking at a document: the shards will."""
    from engine.index.build import column_pairs
    from engine.metadata.condition import parse

    with _condition_refused(snapshot, _FILTER):
        parse(condition, list(parameters), column_pairs(snapshot.columns))


@contextmanager
def _condition_refused(snapshot: Snapshot, prefix: str) -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        if not snapshot.has_metadata:
            raise metadata_not_found(snapshot.index) from error
        raise bad_request(f"{prefix}{error}") from error


async def _run(call: Call, snapshot: Snapshot, query: _Query, vectors: list[np.ndarray], subset: np.ndarray | None) -> Reply:
    top_k = search_params(query.params, snapshot.n_documents).k
    if top_k == 0:
        return _reply([QueryResult(i, [], [], []) for i in range(len(vectors) or len(query.texts))])
    if query.is_hybrid:
        kind, results = "hybrid", [await _hybrid(call, snapshot, query, vectors[0], subset)]
    elif vectors:
        kind, results = "semantic", await _semantic(call, snapshot, query, vectors, subset)
    else:
        kind, found = "keyword", await _keyword(snapshot, query.texts, top_k, subset)
        results = [await _from_ids(call, snapshot, query, i, ids, scores) for i, (ids, scores) in enumerate(found)]
    metrics = call.runtime.metrics
    if metrics is not None:
        cost = {"rounds": call.cost.rounds, "requests": call.cost.n_requests, "bytes": call.cost.bytes_read}
        metrics.searched(snapshot.index, kind, len(results), call.record.stages_ms, call.record.facts | cost)
    return _reply(results)


async def _semantic(
    call: Call, snapshot: Snapshot, query: _Query, vectors: list[np.ndarray], subset: np.ndarray | None
) -> list[QueryResult]:
    params = search_params(query.params, snapshot.n_documents)
    answers = await _answers(call, snapshot, query, vectors, params, subset)
    _note(call, answers)
    if (sampler := call.runtime.recall_sampler) is not None:
        sampler.offer(snapshot, vectors[0], params, subset, answers[0])
    return [_result(call, snapshot, query, i, answer) for i, answer in enumerate(answers)]


async def _answers(
    call: Call,
    snapshot: Snapshot,
    query: _Query,
    vectors: list[np.ndarray],
    params: SearchParams,
    subset: np.ndarray | None,
    *,
    with_rows: bool = True,
) -> list[Answer]:
    """The semantic side: by many processes where the index is so large, else, or if the query does not fit their messages, by this one."""
    explain = query.options.explain
    fan = _fan_out(call, snapshot)
    if fan is not None:
        condition = query.condition if query.leaves_condition_to_shards else None
        options: dict[str, Any] = {"condition": condition, "parameters": query.parameters, "allow_partial": query.options.allow_partial}
        try:
            with tracing.stage("fan_out"):
                return await fan.search(snapshot, vectors, params, subset=subset, with_rows=with_rows, explain=explain, **options)
        except LimitExceeded as error:
            call.runtime.log.info("searched by one process", index=snapshot.index, reason=str(error))
        if query.leaves_condition_to_shards:
            subset = await _selected(snapshot, query)
    mode: Mode = "warm" if query.params.preset == "exact" else "auto"
    with tracing.stage("search"):
        return await call.runtime.searcher.search(snapshot, vectors, params, subset=subset, with_rows=with_rows, explain=explain, mode=mode)


def _fan_out(call: Call, snapshot: Snapshot) -> FanOut | None:
    fan = call.runtime.fan_out(call.headers)
    return fan if fan is not None and fan.wants(snapshot) else None


def _result(call: Call, snapshot: Snapshot, query: _Query, query_id: int, answer: Answer) -> QueryResult:
    rows: list[Row | None] = list(answer.rows) if snapshot.has_metadata else [None] * len(answer.ids)
    result = QueryResult(query_id, answer.ids.tolist(), answer.scores.tolist(), rows)
    if query.options.with_ids:
        result.ids = list(answer.keys)
    if query.options.explain:
        result.explain = _explanation(call, snapshot, answer.stats, list(answer.matches or []))
    return _with_failed(result, answer)


def _with_failed(result: QueryResult, answer: Answer) -> QueryResult:
    if answer.failed:
        result.failed_shards = [FailedShard(**shard | {"cause": outward(shard["cause"])}) for shard in answer.failed]
    return result


def _explanation(call: Call, snapshot: Snapshot, stats: SearchStats, matches: list[list[tuple[int, float]] | None]) -> Explanation:
    """Stage figures are the query's; what the store was asked is the whole request's, opening the index included."""
    cost = QueryCost(
        stages_ms=stats.times_ms,
        candidates=stats.n_candidates,
        reranked=stats.n_reranked,
        tokens_scored=stats.n_tokens_scored,
        rounds=call.cost.rounds,
        requests=call.cost.n_requests,
        bytes=call.cost.bytes_read,
        cold=stats.n_cold_segments > 0,
        estimated_usd=_dollars(call, stats),
    )
    return Explanation(snapshot.manifest.generation, cost, matches)


def _dollars(call: Call, stats: SearchStats) -> float:
    """What the request has cost so far: its requests of the store, and in a function the time since the search began."""
    from engine.cost import Usage, prices_near  # only explanations want it

    settings, asked = call.runtime.settings, call.cost.requests
    seconds = stats.times_ms.get("total", 0.0) / 1000 if settings.function_mb else 0.0
    usage = Usage(
        n_gets=asked.total() - asked["list"],
        n_lists=asked["list"],
        seconds=seconds,
        memory_mb=settings.function_mb,
        invocations=1 if settings.function_mb else 0,
    )
    return usage.usd(prices_near(settings.region), architecture())


async def _keyword(snapshot: Snapshot, texts: Sequence[str], k: int, subset: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """The keyword side. An index without columns has no text to search: no hits."""
    if not snapshot.has_metadata:
        return [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(texts)
    with tracing.stage("keyword"):
        return await snapshot.keyword(texts, k, subset)


async def _from_ids(call: Call, snapshot: Snapshot, query: _Query, query_id: int, ids: np.ndarray, scores: np.ndarray) -> QueryResult:
    """A result whose rows are still to be read."""
    with tracing.stage("rows"):
        rows: list[Row | None] = await snapshot.rows(ids) if snapshot.has_metadata else [None] * len(ids)
    result = QueryResult(query_id, ids.tolist(), scores.tolist(), rows)
    if query.options.with_ids:
        result.ids = await _keys(snapshot, ids)
    if query.options.explain:
        result.explain = _explanation(call, snapshot, SearchStats(), [None] * len(ids))
    return result


async def _keys(snapshot: Snapshot, ids: np.ndarray) -> list[str | None]:
    """External ids of documents."""
    found: dict[int, str | None] = {}
    for ref in snapshot.segments:
        ordinals = await snapshot.parts.live_ordinals_of(snapshot.index, ref, np.sort(ids))
        if len(ordinals):
            own_ids = (await snapshot.parts.ids(snapshot.index, ref))[ordinals]
            stored = await snapshot.parts.fields(snapshot.index, ref, ordinals)
            found.update((document_id, key) for document_id, (key, _) in zip(own_ids.tolist(), stored, strict=True))
    return [found.get(document_id) for document_id in ids.tolist()]


async def _hybrid(call: Call, snapshot: Snapshot, query: _Query, vectors: np.ndarray, subset: np.ndarray | None) -> QueryResult:
    """Both sides over-fetched, fused. Without columns there is no keyword side and the semantic scores stay as they are."""
    top_k = search_params(query.params, snapshot.n_documents).k
    if not snapshot.has_metadata:
        return (await _semantic(call, snapshot, query, [vectors], subset))[0]
    wide = msgspec.structs.replace(query.params, top_k=HYBRID_OVERFETCH * top_k)
    params = search_params(wide, snapshot.n_documents)
    semantic, keyword = await asyncio.gather(
        _answers(call, snapshot, query, [vectors], params, subset, with_rows=False),
        _keyword(snapshot, query.texts, HYBRID_OVERFETCH * top_k, subset),
    )
    _note(call, semantic)
    answer, (keyword_ids, keyword_scores) = semantic[0], keyword[0]
    alpha = DEFAULT_ALPHA if query.alpha is None else query.alpha
    method: Any = query.fusion or FUSIONS[0]
    ids, scores = fuse(method, answer.ids, answer.scores, keyword_ids, keyword_scores, alpha, top_k)
    result = await _from_ids(call, snapshot, query, 0, ids, scores)
    if query.options.explain:
        known = dict(zip(answer.ids.tolist(), answer.matches or [], strict=False))
        result.explain = _explanation(call, snapshot, answer.stats, [known.get(document_id) for document_id in ids.tolist()])
    return _with_failed(result, answer)


def _note(call: Call, answers: Sequence[Answer]) -> None:
    """What the queries cost, for the log and the metrics."""
    facts, stages, trace = call.record.facts, call.record.stages_ms, call.record.trace
    for answer in answers:
        stats = answer.stats
        for stage, ms in stats.times_ms.items():
            stages[stage] = stages.get(stage, 0.0) + ms
        counts = {"candidates": stats.n_candidates, "reranked": stats.n_reranked, "tokens": stats.n_tokens_scored}
        counts["cold_segments"] = stats.n_cold_segments
        if trace is not None and trace.spans is not None:
            for stage, began_s, ended_s in answer.intervals:
                trace.add(tracing.Span(stage, began_s, ended_s))
        for name, count in counts.items():
            facts[name] = facts.get(name, 0) + count


def _reply(results: list[QueryResult]) -> Reply:
    return Reply(SearchAnswer(results, len(results)))


_VECTORS = {"embeddings": [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]}
_PARAMS = {"top_k": 10, "n_ivf_probe": 8, "n_full_scores": 4096, "centroid_score_threshold": None}
_ANSWER = {
    "results": [
        {
            "query_id": 0,
            "document_ids": [3, 0],
            "scores": [1.87, 1.2],
            "metadata": [{"_subset_": 3, "title": "warp"}, {"_subset_": 0, "title": "weft"}],
        }
    ],
    "num_queries": 1,
}
_COMMON: dict[str, Any] = {
    "method": "POST",
    "answer": SearchAnswer,
    "answer_example": _ANSWER,
    "tag": "search",
    "scope": "search",
    "group": "search",
    "is_rate_limited": True,
}

ENDPOINTS = (
    Endpoint(
        path="/indices/{name}/search",
        name="search",
        handle=search,
        summary="Search by vectors, by keywords, or by both",
        body=SearchRequest,
        request_example={"queries": [_VECTORS], "params": _PARAMS},
        errors=("INDEX_NOT_FOUND", "METADATA_NOT_FOUND", "DIMENSION_MISMATCH", "GENERATION_NOT_FOUND"),
        description="Hybrid search takes exactly one query and one text query. filter_condition replaces subset. "
        "consistency, max_age_s, as_of, explain and with_ids are extensions.",
        **_COMMON,
    ),
    Endpoint(
        path="/indices/{name}/search/filtered",
        name="search_filtered",
        handle=search_filtered,
        summary="Search by vectors among the documents that meet a condition",
        body=FilteredSearchRequest,
        request_example={"queries": [_VECTORS], "filter_condition": "year > ?", "filter_parameters": [2020]},
        errors=("INDEX_NOT_FOUND", "METADATA_NOT_FOUND", "DIMENSION_MISMATCH", "GENERATION_NOT_FOUND"),
        **_COMMON,
    ),
    Endpoint(
        path="/indices/{name}/search_with_encoding",
        name="search_with_encoding",
        handle=search_texts,
        summary="Search by texts, which the server encodes",
        body=TextSearchRequest,
        request_example={"queries": ["what is a tartan"]},
        errors=("INDEX_NOT_FOUND", "DIMENSION_MISMATCH", "MODEL_NOT_LOADED", "MODEL_ERROR", "GENERATION_NOT_FOUND"),
        **_COMMON,
    ),
    Endpoint(
        path="/indices/{name}/search/filtered_with_encoding",
        name="search_filtered_with_encoding",
        handle=search_texts,
        summary="Search by texts among the documents that meet a condition",
        body=FilteredTextSearchRequest,
        request_example={"queries": ["what is a tartan"], "filter_condition": "year > ?", "filter_parameters": [2020]},
        errors=("INDEX_NOT_FOUND", "METADATA_NOT_FOUND", "DIMENSION_MISMATCH", "MODEL_NOT_LOADED", "MODEL_ERROR", "GENERATION_NOT_FOUND"),
        **_COMMON,
    ),
)
