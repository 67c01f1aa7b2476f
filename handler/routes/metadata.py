"""Metadata: read, look up, change. Rows carry every column and `_subset_`, the document id."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.errors import InvalidRequest
from engine.index.reader import Snapshot
from handler.problems import bad_request, metadata_not_found
from handler.routes.endpoint import Call, Endpoint, Reply
from handler.routes.search import selected
from handler.wire.answers import MetadataChecked, MetadataCount, MetadataIds, MetadataRows, MetadataUpdated, Row
from handler.wire.requests import MetadataCheckRequest, MetadataGetRequest, MetadataQueryRequest, MetadataUpdateRequest


async def _described(call: Call) -> Snapshot:
    """A snapshot that has metadata. Problems INDEX_NOT_FOUND, METADATA_NOT_FOUND."""
    snapshot = await call.filled_snapshot()
    if not snapshot.has_metadata:
        raise metadata_not_found(call.name)
    return snapshot


async def _rows(snapshot: Snapshot, ids: np.ndarray) -> list[Row]:
    return [row for row in await snapshot.rows(ids) if row is not None]


async def all_rows(call: Call) -> Reply:
    snapshot = await _described(call)
    rows = await _rows(snapshot, await snapshot.live_ids())
    return Reply(MetadataRows(rows, len(rows)))


async def count(call: Call) -> Reply:
    snapshot = await call.filled_snapshot()
    return Reply(MetadataCount(snapshot.n_documents if snapshot.has_metadata else 0, snapshot.has_metadata))


async def check(call: Call) -> Reply:
    body: MetadataCheckRequest = call.body
    snapshot = await _described(call)
    wanted = np.array(body.document_ids, np.int64)
    is_there = np.isin(wanted, await snapshot.live_ids()) if len(wanted) else np.zeros(0, bool)
    existing, missing = wanted[is_there].tolist(), wanted[~is_there].tolist()
    return Reply(MetadataChecked(existing, missing, len(existing), len(missing)))


async def query(call: Call) -> Reply:
    body: MetadataQueryRequest = call.body
    snapshot = await _described(call)
    ids = await selected(snapshot, body.condition, body.parameters)
    return Reply(MetadataIds(ids.tolist(), len(ids)))


async def get(call: Call) -> Reply:
    body: MetadataGetRequest = call.body
    if body.document_ids is not None and body.condition is not None:
        raise bad_request("either document_ids or condition, not both")
    snapshot = await _described(call)
    if body.document_ids is not None:
        ids = np.array(list(dict.fromkeys(body.document_ids)), np.int64)
    elif body.condition is not None:
        ids = await selected(snapshot, body.condition, body.parameters)
    else:
        ids = await snapshot.live_ids()
    if body.limit is not None and body.document_ids is None:
        ids = ids[: body.limit]
    rows = (await _rows(snapshot, ids))[: body.limit]
    return Reply(MetadataRows(rows, len(rows)))


async def update(call: Call) -> Reply:
    body: MetadataUpdateRequest = call.body
    if not isinstance(body.updates, dict):
        raise bad_request("updates is an object of columns and new values")
    snapshot = await _described(call)
    if not body.updates:
        return Reply(MetadataUpdated(0))
    known = {column.name.lower() for column in snapshot.columns}
    for name in body.updates:
        if name.lower() not in known:
            raise bad_request(f"unknown column '{name}': an update changes columns that exist")
    ids = await selected(snapshot, body.condition, body.parameters)
    if not len(ids):
        return Reply(MetadataUpdated(0))
    try:
        n_updated = await call.runtime.reader.writer(snapshot.index).update(ids, body.updates)
    except InvalidRequest as error:
        raise bad_request(str(error)) from error
    call.record.facts["documents"] = n_updated
    return Reply(MetadataUpdated(n_updated))


_ROW = {"_subset_": 0, "title": "weft", "year": 2021}
_BASE = "/indices/{name}/metadata"
_COMMON: dict[str, Any] = {"tag": "metadata", "group": "metadata", "is_rate_limited": True}
_ERRORS = ("INDEX_NOT_FOUND", "METADATA_NOT_FOUND")

ENDPOINTS = (
    Endpoint(
        method="GET",
        path=_BASE,
        name="get_all_metadata",
        handle=all_rows,
        summary="Every row, by document id",
        answer=MetadataRows,
        answer_example={"metadata": [_ROW], "count": 1},
        errors=_ERRORS,
        scope="search",
        **_COMMON,
    ),
    Endpoint(
        method="GET",
        path=_BASE + "/count",
        name="count_metadata",
        handle=count,
        summary="How many documents have a row",
        answer=MetadataCount,
        answer_example={"count": 1, "has_metadata": True},
        errors=("INDEX_NOT_FOUND",),
        scope="search",
        **_COMMON,
    ),
    Endpoint(
        method="POST",
        path=_BASE + "/check",
        name="check_metadata",
        handle=check,
        summary="Which document ids exist",
        body=MetadataCheckRequest,
        answer=MetadataChecked,
        request_example={"document_ids": [0, 7]},
        answer_example={"existing_ids": [0], "missing_ids": [7], "existing_count": 1, "missing_count": 1},
        errors=_ERRORS,
        scope="search",
        **_COMMON,
    ),
    Endpoint(
        method="POST",
        path=_BASE + "/query",
        name="query_metadata",
        handle=query,
        summary="Ids of the documents that meet a condition",
        body=MetadataQueryRequest,
        answer=MetadataIds,
        request_example={"condition": "year > ? AND title LIKE ?", "parameters": [2020, "w%"]},
        answer_example={"document_ids": [0], "count": 1},
        errors=_ERRORS,
        scope="search",
        **_COMMON,
    ),
    Endpoint(
        method="POST",
        path=_BASE + "/get",
        name="get_metadata",
        handle=get,
        summary="Rows by ids, by a condition, or all",
        body=MetadataGetRequest,
        answer=MetadataRows,
        request_example={"document_ids": [0], "limit": 10},
        answer_example={"metadata": [_ROW], "count": 1},
        errors=_ERRORS,
        scope="search",
        **_COMMON,
    ),
    Endpoint(
        method="POST",
        path=_BASE + "/update",
        name="update_metadata",
        handle=update,
        summary="Change columns of the documents that meet a condition",
        body=MetadataUpdateRequest,
        answer=MetadataUpdated,
        request_example={"condition": "title = ?", "parameters": ["weft"], "updates": {"year": 2022}},
        answer_example={"updated": 1},
        errors=(*_ERRORS, "CONFLICT"),
        scope="write",
        **_COMMON,
    ),
)
