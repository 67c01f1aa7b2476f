"""Reading all documents of a snapshot, block by block, in bounded memory; and writing them as JSON lines that `tartan index` reads again."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np

from engine.format.manifest import CodecRef, SegmentRef
from engine.index.reader import Snapshot

BLOCK_TOKENS = 65_536
"""Decoded at once: 32 MB of float32 at 128 dimensions."""


class Documents(msgspec.Struct, frozen=True):
    """Some live documents of one segment: ordinals and ids int64 (n,)."""

    snapshot: Snapshot
    segment: SegmentRef
    codec: CodecRef | None
    ordinals: np.ndarray
    ids: np.ndarray

    async def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Their decoded vectors: float32 (T, D), offsets int64 (n + 1,)."""
        return await self.snapshot.parts.tokens(self.snapshot.index, self.segment, self.ordinals, self.codec)

    async def fields(self) -> list[tuple[str | None, dict[str, Any] | None]]:
        """Their external ids and fields."""
        return await self.snapshot.parts.fields(self.snapshot.index, self.segment, self.ordinals, self.codec)


async def blocks(snapshot: Snapshot, wanted: np.ndarray | None = None) -> AsyncIterator[Documents]:
    """The live documents, or those wanted (ids, int64), about BLOCK_TOKENS at a time; a segment without any is not read further."""
    parts, index = snapshot.parts, snapshot.index
    for segment in snapshot.segments:
        ids = await parts.live_ids(index, segment)
        ids = ids if wanted is None else ids[np.isin(ids, wanted)]
        if not len(ids):
            continue
        ordinals = np.sort(await parts.live_ordinals_of(index, segment, ids))
        own_ids = await parts.ids(index, segment)
        codec = snapshot.manifest.codec_of(segment) if segment.codec else None
        step = max(1, BLOCK_TOKENS * segment.n_documents // max(segment.n_tokens, 1))
        for start in range(0, len(ordinals), step):
            some = ordinals[start : start + step]
            yield Documents(snapshot, segment, codec, some, own_ids[some])


async def json_lines(snapshot: Snapshot, *, with_vectors: bool) -> AsyncIterator[bytes]:
    """One line for each document: {"document_id", "id" if it has one, "metadata", and with vectors "embeddings_b64" and "shape"}.

    The caller holds the generation (snapshots.held), so that it is not collected while lines are written.
    """
    async for documents in blocks(snapshot):
        stored = await documents.fields()
        matrices: list[np.ndarray | None] = [None] * len(stored)
        if with_vectors:
            tokens, offsets = await documents.tokens()
            matrices = [tokens[start:end] for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
        for document_id, (key, fields), matrix in zip(documents.ids.tolist(), stored, matrices, strict=True):
            yield _line(snapshot, document_id, key, fields, matrix)


def _line(snapshot: Snapshot, document_id: int, key: str | None, fields: dict[str, Any] | None, matrix: np.ndarray | None) -> bytes:
    line: dict[str, Any] = {"document_id": document_id}
    if key is not None:
        line["id"] = key
    line["metadata"] = snapshot.full_row(document_id, fields) if snapshot.has_metadata else None
    if matrix is not None:
        line["embeddings_b64"] = base64.b64encode(np.ascontiguousarray(matrix, "<f4").data).decode()
        line["shape"] = list(matrix.shape)
    return msgspec.json.encode(line) + b"\n"
