"""Indices: declare, list, describe, configure, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.config import INDEX_NAME, IndexConfig
from engine.errors import NotFound
from engine.format.manifest import Manifest, SegmentRef
from engine.index.commit import create
from engine.index.indices import drop, survey
from engine.index.plan import newest_codec
from engine.index.reader import Snapshot
from handler.problems import Problem, bad_request
from handler.routes.endpoint import Call, Endpoint, Reply
from handler.runtime import Runtime
from handler.wire.answers import Configured, Deleted, IndexInfo, IndexSummary
from handler.wire.requests import ConfigRequest, CreateRequest
from handler.wire.translation import config_answer, index_config


async def declare(call: Call) -> Reply:
    body: CreateRequest = call.body
    if not INDEX_NAME.fullmatch(body.name):
        raise bad_request("an index name is 1 to 128 letters, digits, dots, dashes or underscores, the first a letter or digit")
    call.runtime.gate.admit_index(call.caller, body.name)
    config = index_config(body.config, call.runtime.settings.start_from_scratch)
    if await _is_alias(call.runtime, body.name):
        raise Problem("INDEX_ALREADY_EXISTS", body.name)
    head = await create(call.runtime.store, body.name, config)
    call.runtime.reader.remember_head(body.name, head)
    call.record.index, call.record.generation = body.name, head.manifest.generation
    return Reply(Configured(body.name, config_answer(config), f"index '{body.name}' declared; add documents to it"))


async def _is_alias(runtime: Runtime, name: str) -> bool:
    try:
        await runtime.aliases.resolve(name)
    except NotFound:
        return False
    return True


async def listed(call: Call) -> Reply:
    found = await survey(call.runtime.store)
    names = [name for name, head in found.heads.items() if head.manifest.dim is not None]
    return Reply(call.runtime.gate.visible(call.caller, sorted([*names, *found.unreadable])))


async def describe(call: Call) -> Reply:
    snapshot = await call.filled_snapshot()
    numbers = numbers_of(snapshot.manifest, await deleted_tokens(snapshot))
    info = IndexInfo(
        name=call.name,
        has_metadata=snapshot.has_metadata,
        metadata_count=snapshot.n_documents if snapshot.has_metadata else None,
        **numbers,
    )
    if snapshot.manifest.config.max_documents is not None:
        info.max_documents = snapshot.manifest.config.max_documents
    return Reply(info)


async def deleted_tokens(snapshot: Snapshot) -> dict[str, int]:
    """Tokens of deleted documents that are still stored, by segment: exact. Segments without deletions cost nothing; of others the lengths
    of documents are read (a range; a flat segment whole) unless they are in memory."""
    touched = [segment for segment in snapshot.segments if segment.tombstones is not None]
    counts = await asyncio.gather(*(_deleted_tokens_in(snapshot, segment) for segment in touched))
    return {segment.id: count for segment, count in zip(touched, counts, strict=True)}


async def _deleted_tokens_in(snapshot: Snapshot, segment: SegmentRef) -> int:
    parts, index = snapshot.parts, snapshot.index
    if segment.kind == "flat":
        lengths = np.diff((await parts.flat(index, segment)).offsets)
    else:
        lengths = (await parts.sizes(index, segment, snapshot.manifest.codec_of(segment))).n_tokens
    return int(lengths[await parts.tombstones(index, segment)].sum())


def numbers_of(manifest: Manifest, deleted: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What answers say of an index's size.

    deleted  tokens of deleted documents by segment. They stay stored until compaction, and a manifest does not say how long they were; without
             this they are estimated by the segment's mean, which is exact where documents are of one length
    """
    n_tokens = 0
    for segment in manifest.segments:
        n_deleted = segment.tombstones.n_deleted if segment.tombstones is not None else 0
        estimate = round(segment.n_tokens * n_deleted / max(segment.n_documents, 1))
        n_tokens += segment.n_tokens - (estimate if deleted is None else deleted.get(segment.id, 0))
    newest = newest_codec(manifest)
    return {
        "num_documents": manifest.n_documents,
        "num_embeddings": n_tokens,
        "num_partitions": newest.n_centroids if newest is not None else 0,
        "avg_doclen": n_tokens / manifest.n_documents if manifest.n_documents else 0.0,
        "dimension": manifest.dim or 0,
    }


def summary_of(name: str, manifest: Manifest) -> IndexSummary:
    """An index's line in /health; one that is declared only shows zeros."""
    summary = IndexSummary(name=name, nbits=manifest.config.nbits, has_metadata=bool(manifest.columns), **numbers_of(manifest))
    if manifest.config.max_documents is not None:
        summary.max_documents = manifest.config.max_documents
    return summary


async def delete(call: Call) -> Reply:
    """Idempotent: also 200 for a name that nothing has. An alias is not taken for its index."""
    name, runtime = call.name, call.runtime
    if INDEX_NAME.fullmatch(name):
        existed = await drop(runtime.store, name)
        runtime.reader.forget_head(name)
        if existed and runtime.metrics is not None:
            runtime.metrics.forgot_index(name)
        if not existed and await _is_alias(runtime, name):
            raise bad_request("this is an alias; forget it with DELETE /aliases/{alias}, or delete the index that it stands for")
    return Reply(Deleted(True, name))


async def configure(call: Call) -> Reply:
    body: ConfigRequest = call.body
    if body.max_documents == 0:
        raise bad_request("max_documents is at least 1; null or nothing removes the limit")
    snapshot = await call.snapshot()
    head = await call.runtime.reader.writer(snapshot.index).configure(max_documents=body.max_documents)
    config: IndexConfig = head.manifest.config
    limit = "no limit" if config.max_documents is None else f"at most {config.max_documents}"
    call.record.generation = head.manifest.generation
    return Reply(Configured(call.name, config_answer(config), f"config updated: {limit} documents, effective at the next add"))


_CONFIG = {
    "nbits": 4,
    "batch_size": 50000,
    "seed": None,
    "start_from_scratch": 999,
    "max_documents": None,
    "fts_tokenizer": "unicode61",
    "binary": False,
}

ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/indices",
        name="list_indices",
        handle=listed,
        summary="Names of the indices that hold or held documents, sorted",
        answer=list[str],
        answer_example=["papers", "products"],
        tag="indices",
        scope="search",
        timeout="short",
        group="indices",
    ),
    Endpoint(
        method="POST",
        path="/indices",
        name="create_index",
        handle=declare,
        summary="Declare an index",
        body=CreateRequest,
        answer=Configured,
        request_example={"name": "papers", "config": {"nbits": 4}},
        answer_example={"name": "papers", "config": _CONFIG, "message": "index 'papers' declared; add documents to it"},
        errors=("INDEX_ALREADY_EXISTS",),
        tag="indices",
        scope="admin",
        group="indices",
        is_rate_limited=True,
        description="batch_size, start_from_scratch and binary are accepted for compatibility; binary is always answered as false.",
    ),
    Endpoint(
        method="GET",
        path="/indices/{name}",
        name="get_index",
        handle=describe,
        summary="Describe an index",
        answer=IndexInfo,
        answer_example={
            "name": "papers",
            "num_documents": 2,
            "num_embeddings": 40,
            "num_partitions": 0,
            "avg_doclen": 20.0,
            "dimension": 128,
            "has_metadata": True,
            "metadata_count": 2,
        },
        errors=("INDEX_NOT_FOUND",),
        tag="indices",
        scope="search",
        timeout="short",
        group="indices",
        description="An index that was declared and never held a document is not found.",
    ),
    Endpoint(
        method="DELETE",
        path="/indices/{name}",
        name="delete_index",
        handle=delete,
        summary="Delete an index",
        answer=Deleted,
        answer_example={"deleted": True, "name": "papers"},
        errors=("BAD_REQUEST",),
        tag="indices",
        scope="admin",
        group="indices",
    ),
    Endpoint(
        method="PUT",
        path="/indices/{name}/config",
        name="update_config",
        handle=configure,
        summary="Set or remove the limit on documents",
        body=ConfigRequest,
        answer=Configured,
        request_example={"max_documents": 1000},
        answer_example={"name": "papers", "config": _CONFIG, "message": "config updated: no limit documents, effective at the next add"},
        errors=("INDEX_NOT_FOUND", "CONFLICT"),
        tag="indices",
        scope="admin",
        group="indices",
        is_rate_limited=True,
    ),
)
