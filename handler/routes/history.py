"""Extensions: generations, pins, rollback, branches, aliases, warming, the self test, export. NextPlaid's clients know none of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np

from engine.config import INDEX_NAME
from engine.errors import NotFound, Unavailable
from engine.evaluate import Exhaustive, recall_at_k
from engine.index import snapshots
from engine.index.reader import Snapshot
from engine.transfer.export import blocks, json_lines
from handler.problems import Problem, bad_request, index_not_found
from handler.routes.endpoint import Call, Endpoint, Reply
from handler.wire.answers import AliasLine, AliasLines, Deleted, GenerationLine, Generations, MovedTo, PinLine, Pins, RecallAnswer, Warmed
from handler.wire.matrices import joined
from handler.wire.requests import AliasRequest, BranchRequest, Params, PinRequest, RecallRequest, RollbackRequest
from handler.wire.translation import search_params

RECALL_QUERY_TOKENS = 32
MAX_RECALL_TOKENS = 20_000_000
"""A self test is exhaustive; an index larger than this is refused rather than a worker blocked for minutes."""
EXPORT_LINES = 64
ABSENT = -1


def _rfc3339(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _check_name(name: str, what: str) -> str:
    if not INDEX_NAME.fullmatch(name):
        raise bad_request(f"{what} is 1 to 128 letters, digits, dots, dashes or underscores, the first a letter or digit")
    return name


# Time


async def generations(call: Call) -> Reply:
    index = (await call.snapshot()).index
    lines = await snapshots.generations(call.runtime.store, index)
    return Reply(
        Generations(
            [
                GenerationLine(
                    generation=line.generation,
                    created_at=_rfc3339(line.created_s),
                    cause=line.cause,
                    num_documents=line.n_documents,
                    num_segments=line.n_segments,
                    pins=list(line.pins),
                    current=line.is_current,
                )
                for line in lines
            ]
        )
    )


async def list_pins(call: Call) -> Reply:
    index = (await call.snapshot()).index
    pins = await snapshots.pins(call.runtime.store, index)
    lines = [PinLine(name, pin.generation, _rfc3339(pin.created_s), pin.note) for name, pin in sorted(pins.items()) if not pin.temporary]
    return Reply(Pins(lines))


async def add_pin(call: Call) -> Reply:
    body: PinRequest = call.body
    _check_name(body.pin, "a pin's name")
    index = (await call.snapshot()).index
    pin = await snapshots.pin(call.runtime.store, index, body.pin, generation=body.generation, note=body.note)
    return Reply(PinLine(body.pin, pin.generation, _rfc3339(pin.created_s), pin.note))


async def remove_pin(call: Call) -> Reply:
    index = (await call.snapshot()).index
    name = call.path["pin"]
    if not INDEX_NAME.fullmatch(name):
        raise Problem("PIN_NOT_FOUND", f"no pin named '{name}'")
    await snapshots.unpin(call.runtime.store, index, name)
    return Reply(Deleted(True, name))


async def rollback(call: Call) -> Reply:
    body: RollbackRequest = call.body
    if (body.generation is None) == (body.pin is None):
        raise bad_request("exactly one of generation and pin is needed")
    index = (await call.snapshot()).index
    generation = body.generation
    if body.pin is not None:
        pin = (await snapshots.pins(call.runtime.store, index)).get(body.pin)
        if pin is None:
            raise Problem("PIN_NOT_FOUND", f"no pin named '{body.pin}'")
        generation = pin.generation
    assert generation is not None
    head = await snapshots.rollback(call.runtime.store, index, generation)
    call.runtime.reader.remember_head(index, head)
    call.saw(Snapshot(call.runtime.reader, index, head.manifest))
    return Reply(MovedTo(index, head.manifest.generation, head.manifest.n_documents))


async def branch(call: Call) -> Reply:
    body: BranchRequest = call.body
    _check_name(body.name, "an index name")
    call.runtime.gate.admit_index(call.caller, body.name)
    index = (await call.snapshot()).index
    if await _alias_target(call, body.name) is not None:
        raise Problem("INDEX_ALREADY_EXISTS", body.name)
    head = await snapshots.branch(call.runtime.store, index, body.name, generation=body.generation)
    return Reply(MovedTo(body.name, head.manifest.generation, head.manifest.n_documents))


# Aliases


async def _alias_target(call: Call, alias: str) -> str | None:
    if not INDEX_NAME.fullmatch(alias):
        return None
    try:
        return await call.runtime.aliases.resolve(alias)
    except NotFound:
        return None


async def list_aliases(call: Call) -> Reply:
    found = await call.runtime.aliases.all()
    visible = set(call.runtime.gate.visible(call.caller, list(found.values())))
    return Reply(AliasLines([AliasLine(alias, index) for alias, index in sorted(found.items()) if index in visible]))


async def get_alias(call: Call) -> Reply:
    alias = call.path["alias"]
    index = await _alias_target(call, alias)
    if index is None:
        call.runtime.gate.admit_index(call.caller, alias)  # whether a name outside the key's reach exists is not said
        raise Problem("ALIAS_NOT_FOUND", f"no alias named '{alias}'")
    call.runtime.gate.admit_index(call.caller, index)
    return Reply(AliasLine(alias, index))


async def put_alias(call: Call) -> Reply:
    body: AliasRequest = call.body
    alias = _check_name(call.path["alias"], "an alias")
    for name in (alias, body.index):
        call.runtime.gate.admit_index(call.caller, name)
    if (current := await _alias_target(call, alias)) is not None:
        call.runtime.gate.admit_index(call.caller, current)
    if not INDEX_NAME.fullmatch(body.index):
        raise index_not_found(body.index)
    await call.runtime.aliases.point(alias, body.index)
    return Reply(AliasLine(alias, body.index))


async def delete_alias(call: Call) -> Reply:
    alias = call.path["alias"]
    index = await _alias_target(call, alias)
    if index is None:
        call.runtime.gate.admit_index(call.caller, alias)  # whether a name outside the key's reach exists is not said
        raise Problem("ALIAS_NOT_FOUND", f"no alias named '{alias}'")
    call.runtime.gate.admit_index(call.caller, index)
    await call.runtime.aliases.drop(alias)
    return Reply(Deleted(True, alias))


# Warming, self test, export


async def warm(call: Call) -> Reply:
    snapshot = await call.filled_snapshot()
    await call.runtime.searcher.warm(snapshot)
    return Reply(Warmed(call.name, snapshot.manifest.generation, call.runtime.reader.parts.memory.used_bytes))


async def recall(call: Call) -> Reply:
    """Recall of the search against exhaustive search over the stored (decoded) vectors: the search's own loss, not the codec's."""
    body: RecallRequest = call.body
    snapshot = await call.filled_snapshot()
    if snapshot.n_tokens > MAX_RECALL_TOKENS:
        raise Problem("PAYLOAD_TOO_LARGE", f"the self test reads every token: at most {MAX_RECALL_TOKENS}, found {snapshot.n_tokens}")
    ids = await snapshot.live_ids()
    if not len(ids):
        return Reply(RecallAnswer(0, body.top_k, 1.0, 1.0, snapshot.manifest.generation))
    top_k = min(body.top_k, len(ids))
    rng = np.random.default_rng(snapshot.manifest.generation)
    chosen = np.sort(rng.choice(ids, size=min(body.n_queries, len(ids)), replace=False))
    queries = [tokens[:RECALL_QUERY_TOKENS] async for _, tokens in _documents(snapshot, chosen)]
    query_tokens, offsets = joined(queries)
    truth = Exhaustive(query_tokens, offsets, top_k)
    async for documents in blocks(snapshot):
        tokens, own_offsets = await documents.tokens()
        await call.runtime.reader.parts.compute(truth.add, tokens, own_offsets, documents.ids)
    true_ids, _ = truth.result()
    params = search_params(Params(top_k, *_effort(body.params)), snapshot.n_documents)
    answers = await call.runtime.searcher.search(snapshot, queries, params, with_rows=False)
    found = np.full((len(queries), top_k), ABSENT, np.int64)
    for line, answer in zip(found, answers, strict=True):
        line[: len(answer.ids)] = answer.ids
    shares = recall_at_k(true_ids, found, top_k)
    return Reply(RecallAnswer(len(queries), top_k, float(shares.mean()), float(shares.min()), snapshot.manifest.generation))


def _effort(params: Params) -> tuple[int | None, int | None, float | None]:
    return params.n_ivf_probe, params.n_full_scores, params.centroid_score_threshold


async def _documents(snapshot: Snapshot, wanted: np.ndarray) -> AsyncIterator[tuple[int, np.ndarray]]:
    async for documents in blocks(snapshot, wanted):
        tokens, offsets = await documents.tokens()
        for n, document_id in enumerate(documents.ids.tolist()):
            yield document_id, tokens[offsets[n] : offsets[n + 1]]


async def export(call: Call) -> Reply:
    """One JSON object per line and document. The generation is held by a temporary pin while lines are sent, if this server may write."""
    snapshot = await call.filled_snapshot()
    with_vectors = call.query.get("vectors", "true").lower() not in ("false", "0", "no")
    lines = _lines(call, snapshot, with_vectors)
    first = await anext(lines, b"")  # so that a generation that is gone is still an error answer and no broken stream
    headers = {"X-Tartan-Generation": str(snapshot.manifest.generation)}
    return Reply(_chained(first, lines), media_type="application/x-ndjson", headers=headers)


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


async def _lines(call: Call, snapshot: Snapshot, with_vectors: bool) -> AsyncIterator[bytes]:
    """Chunks of EXPORT_LINES lines; between two of them other requests have their turn."""
    async with _held_if_writable(call, snapshot):
        chunk: list[bytes] = []
        async for line in json_lines(snapshot, with_vectors=with_vectors):
            chunk.append(line)
            if len(chunk) == EXPORT_LINES:
                yield b"".join(chunk)
                chunk.clear()
                await asyncio.sleep(0)
        if chunk:
            yield b"".join(chunk)


@asynccontextmanager
async def _held_if_writable(call: Call, snapshot: Snapshot) -> AsyncIterator[None]:
    """A server that only reads has no pin: garbage collection leaves what was in force within the hour."""
    async with AsyncExitStack() as holding:
        if not call.runtime.settings.read_only:
            try:
                await holding.enter_async_context(
                    snapshots.held(call.runtime.store, snapshot.index, snapshot.manifest.generation, "export")
                )
            except Unavailable as error:
                if error.code != "store-denied":
                    raise
        yield


_ADMIN: dict[str, Any] = {"tag": "history", "scope": "admin", "group": "history"}
_READ: dict[str, Any] = {"tag": "history", "scope": "search", "group": "history"}
_ALIASES: dict[str, Any] = {"tag": "aliases", "group": "history"}
_MOVED = {"name": "papers", "generation": 7, "num_documents": 120}

ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/indices/{name}/generations",
        name="list_generations",
        handle=generations,
        summary="Kept generations, newest first",
        answer=Generations,
        answer_example={
            "generations": [
                {
                    "generation": 1,
                    "created_at": "2026-11-23T08:00:00Z",
                    "cause": "add 2 documents",
                    "num_documents": 2,
                    "num_segments": 1,
                    "pins": [],
                    "current": True,
                }
            ]
        },
        errors=("INDEX_NOT_FOUND",),
        **_READ,
    ),
    Endpoint(
        method="GET",
        path="/indices/{name}/pins",
        name="list_pins",
        handle=list_pins,
        summary="Named generations that garbage collection keeps",
        answer=Pins,
        answer_example={"pins": [{"pin": "before-import", "generation": 3, "created_at": "2026-11-23T08:00:00Z", "note": ""}]},
        errors=("INDEX_NOT_FOUND",),
        **_READ,
    ),
    Endpoint(
        method="POST",
        path="/indices/{name}/pins",
        name="add_pin",
        handle=add_pin,
        summary="Keep a generation under a name",
        body=PinRequest,
        answer=PinLine,
        request_example={"pin": "before-import", "note": "nightly"},
        answer_example={"pin": "before-import", "generation": 3, "created_at": "2026-11-23T08:00:00Z", "note": "nightly"},
        errors=("INDEX_NOT_FOUND", "GENERATION_NOT_FOUND", "CONFLICT"),
        **_ADMIN,
    ),
    Endpoint(
        method="DELETE",
        path="/indices/{name}/pins/{pin}",
        name="remove_pin",
        handle=remove_pin,
        summary="Forget a pin",
        answer=Deleted,
        answer_example={"deleted": True, "name": "before-import"},
        errors=("INDEX_NOT_FOUND", "PIN_NOT_FOUND"),
        **_ADMIN,
    ),
    Endpoint(
        method="POST",
        path="/indices/{name}/rollback",
        name="rollback",
        handle=rollback,
        summary="Make an old generation current again, as a new one",
        body=RollbackRequest,
        answer=MovedTo,
        request_example={"pin": "before-import"},
        answer_example=_MOVED,
        errors=("INDEX_NOT_FOUND", "GENERATION_NOT_FOUND", "PIN_NOT_FOUND", "CONFLICT"),
        **_ADMIN,
    ),
    Endpoint(
        method="POST",
        path="/indices/{name}/branch",
        name="branch",
        handle=branch,
        summary="A new index over the same documents, without copying them",
        body=BranchRequest,
        answer=MovedTo,
        request_example={"name": "papers-test"},
        answer_example=_MOVED,
        errors=("INDEX_NOT_FOUND", "GENERATION_NOT_FOUND", "INDEX_ALREADY_EXISTS", "CONFLICT"),
        **_ADMIN,
    ),
    Endpoint(
        method="GET",
        path="/aliases",
        name="list_aliases",
        handle=list_aliases,
        summary="Every alias and the index that it stands for",
        answer=AliasLines,
        answer_example={"aliases": [{"alias": "live", "index": "papers-7"}]},
        scope="search",
        **_ALIASES,
    ),
    Endpoint(
        method="GET",
        path="/aliases/{alias}",
        name="get_alias",
        handle=get_alias,
        summary="The index that an alias stands for",
        answer=AliasLine,
        answer_example={"alias": "live", "index": "papers-7"},
        errors=("ALIAS_NOT_FOUND",),
        scope="search",
        **_ALIASES,
    ),
    Endpoint(
        method="PUT",
        path="/aliases/{alias}",
        name="put_alias",
        handle=put_alias,
        summary="Point an alias at an index, in one step for everybody",
        body=AliasRequest,
        answer=AliasLine,
        request_example={"index": "papers-8"},
        answer_example={"alias": "live", "index": "papers-8"},
        errors=("INDEX_NOT_FOUND", "INDEX_ALREADY_EXISTS", "CONFLICT"),
        scope="admin",
        **_ALIASES,
    ),
    Endpoint(
        method="DELETE",
        path="/aliases/{alias}",
        name="delete_alias",
        handle=delete_alias,
        summary="Forget an alias; its index stays",
        answer=Deleted,
        answer_example={"deleted": True, "name": "live"},
        errors=("ALIAS_NOT_FOUND",),
        scope="admin",
        **_ALIASES,
    ),
    Endpoint(
        method="POST",
        path="/indices/{name}/warm",
        name="warm",
        handle=warm,
        summary="Bring an index into this process's memory, as far as its budget goes",
        answer=Warmed,
        answer_example={"name": "papers", "generation": 7, "memory_usage_bytes": 1048576},
        errors=("INDEX_NOT_FOUND",),
        **_READ,
    ),
    Endpoint(
        method="POST",
        path="/indices/{name}/recall",
        name="recall",
        handle=recall,
        summary="Self test: recall of the search against exhaustive search over the stored vectors",
        body=RecallRequest,
        is_body_optional=True,
        answer=RecallAnswer,
        request_example={"n_queries": 16, "top_k": 10},
        answer_example={"num_queries": 16, "top_k": 10, "recall": 0.99, "worst": 0.9, "generation": 7},
        errors=("INDEX_NOT_FOUND", "PAYLOAD_TOO_LARGE"),
        **{**_ADMIN, "group": "selftest"},
    ),
    Endpoint(
        method="GET",
        path="/indices/{name}/export",
        name="export",
        handle=export,
        summary="Every document as one line of JSON; ?vectors=false leaves the vectors out",
        answer="application/x-ndjson",
        answer_example='{"document_id":0,"metadata":{"_subset_":0},"embeddings_b64":"...","shape":[12,128]}\n',
        errors=("INDEX_NOT_FOUND", "GENERATION_NOT_FOUND"),
        description="The generation in force when the request came is exported, whatever is written meanwhile.",
        **_READ,
    ),
)
