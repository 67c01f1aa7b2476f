"""What does not fit an invocation goes by the store: documents by a presigned PUT and a commit by reference, answers by a presigned GET.

    POST /indices/{name}/uploads                    an address; the client PUTs the documents there, straight to S3
    POST /indices/{name}/uploads/{upload}/commit    adds them, once however often it is asked
    X-Tartan-Answer: download (or auto)             on any request: the answer is put into the store and its address is answered

What is uploaded is the JSON body of an add (vectors or texts), or what `tartan index` takes as vectors: JSON lines, such as an export, or
an .npz with tokens and doclens. Committing is checked like a plain add; the address alone lets nobody change an index.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np

from engine.format import names
from engine.format.markers import Upload
from engine.index import uploads
from engine.index.operations import Add
from engine.index.reader import Snapshot
from engine.store.base import Buffer, Range
from engine.store.objects import signed_address
from handler.problems import Problem, bad_request, read_only
from handler.routes.documents import IDS_HEADER, checked_rows, declared
from handler.routes.encoding import encode_documents
from handler.routes.endpoint import ANSWER_HEADER, JSON, Call, Endpoint, Reply
from handler.wire.answers import DownloadAddress, Row, UploadAddress
from handler.wire.bodies import encode, read_body
from handler.wire.matrices import check_dimensions, document_arrays, joined
from handler.wire.requests import UpdateRequest, UpdateTextsRequest

ADDRESS_LIFE_S = 3600.0
"""How long an address is good for. What was put there stays for a day."""
AUTO_BYTES = 4 << 20
"""With "auto", answers from this size go by the store: 4 MiB fit Lambda's 6 MB even in base64."""


def _rfc3339(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


async def begin(call: Call) -> Reply:
    snapshot = await declared(call)
    upload_id = names.fresh_id()
    url = await signed_address(call.runtime.store, "PUT", names.upload(snapshot.index, upload_id, "data"), ADDRESS_LIFE_S)
    expires_at = _rfc3339(time.time() + ADDRESS_LIFE_S)
    return Reply(UploadAddress(upload_id, url, "PUT", expires_at, call.runtime.settings.max_upload_bytes))


async def commit(call: Call) -> Reply:
    snapshot = await declared(call)
    upload_id = call.path["upload"]
    if not names.is_id(upload_id):
        raise _not_found(upload_id)
    store = call.runtime.store
    found = await uploads.find(store, snapshot.index, upload_id)
    receipt = found.receipt
    if receipt is not None and receipt.index_id != snapshot.manifest.index_id:
        snapshot = await call.snapshot()
        if receipt.index_id != snapshot.manifest.index_id:
            raise _not_found(upload_id)
    if receipt is None:
        if found.size_bytes is None:
            raise _not_found(upload_id)
        if found.size_bytes > call.runtime.settings.max_upload_bytes:
            limit = call.runtime.settings.max_upload_bytes
            raise Problem("PAYLOAD_TOO_LARGE", f"the upload is {found.size_bytes} bytes and this server takes {limit}: put it up in parts")
        data = (await store.get(names.upload(snapshot.index, upload_id, "data"))).data
        receipt = await _commit(call, snapshot, upload_id, data)
    return _committed(receipt)


def _committed(receipt: Upload) -> Reply:
    assert receipt.first_id is not None and receipt.last_id is not None
    n_documents = receipt.last_id - receipt.first_id + 1
    text = f"update committed: {n_documents} documents added, nothing is left queued"
    return Reply(text, headers={IDS_HEADER: f"{receipt.first_id}-{receipt.last_id}"})


def _not_found(upload_id: str) -> Problem:
    return Problem("UPLOAD_NOT_FOUND", f"nothing was put up under '{upload_id}', or more than a day ago")


async def _commit(call: Call, snapshot: Snapshot, upload_id: str, data: Buffer) -> Upload:
    call.is_large = True
    add = await _read(call, bytes(data))
    snapshot = snapshot if snapshot.dim in (None, add.tokens.shape[1]) else await call.snapshot()
    check_dimensions([add.tokens], snapshot.dim)
    receipt = await uploads.commit_upload(call.runtime.reader, snapshot.index, upload_id, add)
    call.record.facts |= {"documents": len(add), "tokens": len(add.tokens)}
    head = call.runtime.reader.known_head(snapshot.index)
    if head is not None:
        call.runtime.on_write(snapshot.index, head.manifest)
        call.saw(Snapshot(call.runtime.reader, snapshot.index, head.manifest))
    return receipt


async def _read(call: Call, data: bytes) -> Add:
    """The documents of an upload, checked as those of a plain add are."""
    if data.startswith(b"PK\x03\x04"):
        return await call.compute(lambda: _from_source(data, call.runtime.settings.max_upload_bytes))
    try:
        body = await call.compute(lambda: read_body(data, UpdateRequest))
    except Problem as no_vectors:
        try:
            texts = await call.compute(lambda: read_body(data, UpdateTextsRequest))
        except Problem:
            if no_vectors.code == "UNPROCESSABLE" and data.lstrip().startswith(b'{"documents"'):
                raise no_vectors from None
            return await call.compute(lambda: _from_source(data, call.runtime.settings.max_upload_bytes))
        rows = checked_rows(texts.metadata, texts.ids, len(texts.documents))
        tokens, offsets = await encode_documents(call, texts.documents, texts.pool_factor)
        return await call.compute(lambda: Add.of(tokens, offsets, rows, texts.ids))
    rows = checked_rows(body.metadata, body.ids, len(body.documents))
    return await call.compute(lambda: _from_body(body, rows))


def _from_body(body: UpdateRequest, rows: list[Row] | None) -> Add:
    matrices = document_arrays(body.documents)
    check_dimensions(matrices, None)
    return Add.of(*joined(matrices), rows, body.ids)


class _Bytes:
    """An upload as a Content of engine/transfer."""

    label = "the upload"

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self.size_bytes = len(data)

    def read(self, ranges: Sequence[Range]) -> list[Buffer]:
        return [self._data[start:end] for start, end in ranges]


def _from_source(data: bytes, max_bytes: int) -> Add:
    from engine.transfer.input_kind import kind_of
    from engine.transfer.npz import open_npz
    from engine.transfer.vector_lines import VectorLines

    content = _Bytes(data)
    kind = kind_of(content)
    if kind not in ("npz", "vectors"):
        raise bad_request("an upload is the JSON body of an add, JSON lines with embeddings, or an .npz with tokens and doclens")
    source: Any = open_npz(content, max_member_bytes=max_bytes) if kind == "npz" else VectorLines(content)
    blocks = list(source.blocks(0))
    tokens = np.concatenate([block.tokens for block in blocks])
    lengths = np.concatenate([np.diff(block.offsets) for block in blocks])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    fields = [row for block in blocks for row in block.fields or [{}] * len(block)] if any(block.fields for block in blocks) else None
    keys: list[Any] | None = [key for block in blocks for key in block.keys or [None] * len(block)]
    if keys is not None and not any(key is not None for key in keys):
        keys = None
    if keys is not None and any(key is None for key in keys):
        raise bad_request("either every document of an upload has an id, or none")
    return Add.of(tokens, offsets, fields, keys)


async def by_the_store(call: Call, reply: Reply) -> Reply:
    """The answer itself, or where it lies, as the request asks. Only answers that are about an index, and successes, go by the store."""
    wanted = call.headers.get(ANSWER_HEADER)
    index = call.record.index
    if wanted is None or index is None:
        return reply
    if call.runtime.settings.read_only:
        raise read_only()
    if wanted not in ("download", "auto"):
        raise bad_request("X-Tartan-Answer is download or auto")
    body = await _whole(reply.content, call.runtime.settings.max_upload_bytes)
    if wanted == "auto" and len(body) < AUTO_BYTES:
        return Reply(body, reply.status, reply.headers, reply.media_type)
    name = names.download(index, names.fresh_id())
    url = await signed_address(call.runtime.store, "GET", name, ADDRESS_LIFE_S)
    await call.runtime.store.put_if_absent(name, body)
    address = DownloadAddress(url, len(body), reply.media_type, _rfc3339(time.time() + ADDRESS_LIFE_S))
    return Reply(msgspec.json.encode(address), reply.status, reply.headers, JSON)


async def _whole(content: object, max_bytes: int) -> bytes:
    if not isinstance(content, AsyncIterator):
        return content if isinstance(content, bytes) else encode(content)
    chunks: list[bytes] = []
    n_bytes = 0
    async for chunk in content:
        chunks.append(chunk)
        n_bytes += len(chunk)
        if n_bytes > max_bytes:
            await content.aclose()  # type: ignore[attr-defined]
            raise Problem("PAYLOAD_TOO_LARGE", f"the answer is larger than {max_bytes} bytes: `tartan export` reads the store itself")
    return b"".join(chunks)


_COMMON: dict[str, Any] = {"method": "POST", "tag": "documents", "scope": "write", "group": "documents"}

ENDPOINTS = (
    Endpoint(
        path="/indices/{name}/uploads",
        name="begin_upload",
        handle=begin,
        summary="An address to put many documents at, straight into the store",
        answer=UploadAddress,
        answer_example={
            "upload_id": "01KATR0000000000000000000A",
            "url": "https://bucket.s3.eu-central-1.amazonaws.com/papers/uploads/01KATR0000000000000000000A/data?X-Amz-Signature=...",
            "method": "PUT",
            "expires_at": "2026-11-23T12:00:00Z",
            "max_bytes": 268435456,
        },
        errors=("INDEX_NOT_DECLARED", "BAD_REQUEST"),
        description="PUT there: the JSON body of an add (vectors or texts), JSON lines with embeddings, or an .npz with tokens and doclens. "
        "Then commit. S3 only. What is not committed is forgotten after a day.",
        **_COMMON,
    ),
    Endpoint(
        path="/indices/{name}/uploads/{upload}/commit",
        name="commit_upload",
        handle=commit,
        summary="Add the documents that were put at an address",
        answer=str,
        answer_example="update committed: 1 documents added, nothing is left queued",
        status=202,
        errors=(
            "INDEX_NOT_DECLARED",
            "UPLOAD_NOT_FOUND",
            "DIMENSION_MISMATCH",
            "BAD_REQUEST",
            "UNPROCESSABLE",
            "PAYLOAD_TOO_LARGE",
            "CONFLICT",
            "MODEL_NOT_LOADED",
            "MODEL_ERROR",
        ),
        description="Asking again changes nothing and has the same answer, for a day. "
        f"The header {IDS_HEADER} names the first and last document id given.",
        **_COMMON,
    ),
)
