"""Adding and deleting documents. Every 202 is sent after the commit: durable, and seen by every search that starts later.

The body of a 202 is one JSON string; clients look for the words "queued", "update" and "No documents match" in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.errors import NotFound
from engine.index.reader import Snapshot
from handler import tracing
from handler.problems import Problem, bad_request, index_not_declared, index_not_found
from handler.routes.encoding import encode_documents
from handler.routes.endpoint import Call, Endpoint, Reply
from handler.routes.search import selected
from handler.wire.answers import Row
from handler.wire.matrices import check_dimensions, document_arrays, joined, matrix
from handler.wire.requests import DeleteRequest, UpdateRequest, UpdateTextsRequest
from handler.wire.translation import metadata_rows

IDS_HEADER = "X-Tartan-Document-Ids"


async def update(call: Call) -> Reply:
    """Add documents given as vectors to a declared index."""
    body: UpdateRequest = call.body
    snapshot = await declared(call)
    matrices = await call.compute(lambda: document_arrays(body.documents))
    rows = checked_rows(body.metadata, body.ids, len(matrices))
    snapshot = await _fitting(call, snapshot, matrices)
    tokens, offsets = await call.compute(lambda: joined(matrices))
    return await _add(call, snapshot, tokens, offsets, rows, body.ids)


async def update_texts(call: Call) -> Reply:
    """Add documents given as texts; they are encoded before anything is written."""
    body: UpdateTextsRequest = call.body
    snapshot = await declared(call)
    rows = checked_rows(body.metadata, body.ids, len(body.documents))
    tokens, offsets = await encode_documents(call, body.documents, body.pool_factor)
    return await _add(call, snapshot, tokens, offsets, rows, body.ids)


async def add_documents(call: Call) -> Reply:
    """The older way to add: the index must hold documents already."""
    body: UpdateRequest = call.body
    rows = checked_rows(body.metadata, body.ids, len(body.documents))
    snapshot = await call.checked_snapshot(lambda found: found.dim is not None)
    if snapshot.dim is None:
        raise index_not_found(call.name)
    first = matrix(body.documents[0], "document 0")
    snapshot = await _fitting(call, snapshot, [first])
    matrices = await call.compute(lambda: document_arrays(body.documents))
    check_dimensions(matrices, snapshot.dim)
    tokens, offsets = await call.compute(lambda: joined(matrices))
    return await _add(call, snapshot, tokens, offsets, rows, body.ids)


async def declared(call: Call) -> Snapshot:
    try:
        return await call.checked_snapshot(lambda found: True)
    except Problem as problem:
        if problem.code == "INDEX_NOT_FOUND":
            raise index_not_declared(call.name) from problem
        raise


def checked_rows(metadata: Any, ids: Sequence[str] | None, n_documents: int) -> list[Row] | None:
    if not n_documents:
        raise bad_request("documents is empty")
    if ids is not None and len(ids) != n_documents:
        raise bad_request(f"ids has {len(ids)} entries for {n_documents} documents")
    return metadata_rows(metadata, n_documents)


async def _fitting(call: Call, snapshot: Snapshot, matrices: Sequence[np.ndarray]) -> Snapshot:
    """The snapshot that the vectors fit; what seems not to fit an older one is held against CURRENT before it is refused."""
    try:
        check_dimensions(matrices, snapshot.dim)
        return snapshot
    except Problem:
        snapshot = await call.snapshot()
        check_dimensions(matrices, snapshot.dim)
        return snapshot


async def _add(
    call: Call, snapshot: Snapshot, tokens: np.ndarray, offsets: np.ndarray, rows: list[Row] | None, keys: Sequence[str] | None
) -> Reply:
    try:
        with tracing.stage("commit"):
            added = await call.runtime.reader.writer(snapshot.index).add(tokens, offsets, fields=rows, keys=keys)
    except NotFound as error:
        if error.code == "index-not-found":
            raise index_not_declared(call.name) from error
        raise
    n_documents = len(added.ids)
    call.record.facts |= {"documents": n_documents, "tokens": len(tokens), "evicted": added.n_evicted, "replaced": added.n_replaced}
    _note_head(call, snapshot.index)
    if call.runtime.metrics is not None:
        call.runtime.metrics.added.labels(call.runtime.metrics.index_label(snapshot.index)).inc(n_documents)
    text = f"update committed: {n_documents} documents added, nothing is left queued"
    return Reply(text, headers={IDS_HEADER: f"{int(added.ids[0])}-{int(added.ids[-1])}"})


def _note_head(call: Call, index: str) -> None:
    head = call.runtime.reader.known_head(index)
    if head is not None:
        call.runtime.on_write(index, head.manifest)
        call.saw(Snapshot(call.runtime.reader, index, head.manifest))


async def delete_documents(call: Call) -> Reply:
    body: DeleteRequest = call.body
    if not body.condition:
        raise bad_request("condition is empty")
    snapshot = await call.filled_snapshot()
    ids = await selected(snapshot, body.condition, body.parameters)
    if not len(ids):
        return Reply("No documents match the condition; nothing was deleted")
    with tracing.stage("commit"):
        n_deleted = await call.runtime.reader.writer(snapshot.index).delete(ids)
    call.record.facts["documents"] = n_deleted
    _note_head(call, snapshot.index)
    if call.runtime.metrics is not None:
        call.runtime.metrics.deleted.labels(call.runtime.metrics.index_label(snapshot.index)).inc(n_deleted)
    return Reply(f"delete committed: {n_deleted} documents deleted, nothing is left queued")


_DOCUMENTS = [{"embeddings": [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]}]
_ADDED = "update committed: 1 documents added, nothing is left queued"
_ADD_NOTE = (
    "Committed before the answer. Extensions: float16 vectors (`dtype`), and `ids`: one string per document, "
    f"where a document with the same id is replaced. The header {IDS_HEADER} names the first and last document id given."
)
_COMMON: dict[str, Any] = {"tag": "documents", "scope": "write", "group": "documents", "status": 202, "answer": str}

ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/indices/{name}/update",
        name="update",
        handle=update,
        summary="Add documents as vectors",
        body=UpdateRequest,
        request_example={"documents": _DOCUMENTS, "metadata": [{"title": "weft"}]},
        answer_example=_ADDED,
        errors=("INDEX_NOT_DECLARED", "DIMENSION_MISMATCH", "CONFLICT"),
        description=_ADD_NOTE,
        **_COMMON,
    ),
    Endpoint(
        method="POST",
        path="/indices/{name}/update_with_encoding",
        name="update_with_encoding",
        handle=update_texts,
        summary="Add documents as texts, which the server encodes",
        body=UpdateTextsRequest,
        request_example={"documents": ["a plain weave"], "metadata": [{"title": "weft"}]},
        answer_example=_ADDED,
        errors=("INDEX_NOT_DECLARED", "DIMENSION_MISMATCH", "MODEL_NOT_LOADED", "MODEL_ERROR", "CONFLICT"),
        description=_ADD_NOTE,
        **_COMMON,
    ),
    Endpoint(
        method="POST",
        path="/indices/{name}/documents",
        name="add_documents",
        handle=add_documents,
        summary="Add documents as vectors to an index that holds some",
        body=UpdateRequest,
        request_example={"documents": _DOCUMENTS, "metadata": [{"title": "weft"}]},
        answer_example=_ADDED,
        errors=("INDEX_NOT_FOUND", "DIMENSION_MISMATCH", "CONFLICT"),
        is_rate_limited=True,
        description=_ADD_NOTE,
        **_COMMON,
    ),
    Endpoint(
        method="DELETE",
        path="/indices/{name}/documents",
        name="delete_documents",
        handle=delete_documents,
        summary="Delete the documents that meet a condition",
        body=DeleteRequest,
        request_example={"condition": "year < ?", "parameters": [1990]},
        answer_example="delete committed: 3 documents deleted, nothing is left queued",
        errors=("INDEX_NOT_FOUND", "METADATA_NOT_FOUND", "CONFLICT"),
        **_COMMON,
    ),
)
