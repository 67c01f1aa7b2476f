"""Reading all documents of an index, block by block, in bounded memory; for export and recall."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from engine.index import snapshots

if TYPE_CHECKING:
    from engine.format.manifest import CodecRef, SegmentRef
    from engine.index.bulk import Progress
    from engine.index.reader import Snapshot
    from handler.cli.session import Session

BLOCK_TOKENS = 65_536
"""Decoded at once: 32 MB of float32 at 128 dimensions."""


@dataclass(frozen=True)
class Documents:
    """Some live documents of a segment: ordinals and ids int64 (n,), tokens float32 (T, D), offsets int64 (n + 1,)."""

    segment: SegmentRef
    codec: CodecRef | None
    ordinals: np.ndarray
    ids: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray


async def blocks(snapshot: Snapshot, wanted: np.ndarray | None = None) -> AsyncIterator[Documents]:
    """The live documents, or those wanted (ids, int64), about BLOCK_TOKENS at a time; a segment without any is not read."""
    for segment in snapshot.segments:
        ids = await snapshot.parts.live_ids(snapshot.index, segment)
        ids = ids if wanted is None else ids[np.isin(ids, wanted)]
        if not len(ids):
            continue
        ordinals = np.sort(await snapshot.parts.live_ordinals_of(snapshot.index, segment, ids))
        own_ids = await snapshot.parts.ids(snapshot.index, segment)
        codec = snapshot.manifest.codec_of(segment) if segment.codec else None
        step = max(1, BLOCK_TOKENS * segment.n_documents // max(segment.n_tokens, 1))
        for start in range(0, len(ordinals), step):
            some = ordinals[start : start + step]
            tokens, offsets = await snapshot.parts.tokens(snapshot.index, segment, some, codec)
            yield Documents(segment, codec, some, own_ids[some], tokens, offsets)


async def write_lines(
    session: Session, index: str, generation: int | None, file: BinaryIO, with_vectors: bool, progress: Progress
) -> tuple[int, int]:
    """Write the documents of a generation as JSON lines, in the form of the HTTP export. Returns (lines, generation)."""
    reader, n_lines = session.runtime.reader, 0
    async with snapshots.held(session.runtime.store, index, generation, "export") as manifest:
        snapshot = await reader.snapshot(index, generation=manifest.generation)
        async for block in blocks(snapshot):
            stored = await snapshot.parts.fields(index, block.segment, block.ordinals, block.codec)
            for n, (key, fields) in enumerate(stored):
                tokens = block.tokens[block.offsets[n] : block.offsets[n + 1]] if with_vectors else None
                file.write(_line(snapshot, int(block.ids[n]), key, fields, tokens))
            n_lines += len(stored)
            progress("export", n_lines, snapshot.n_documents)
        file.flush()
    return n_lines, manifest.generation


def _line(snapshot: Snapshot, document_id: int, key: str | None, fields: dict[str, Any] | None, tokens: np.ndarray | None) -> bytes:
    import msgspec

    line: dict[str, Any] = {"document_id": document_id}
    if key is not None:
        line["id"] = key
    line["metadata"] = snapshot.full_row(document_id, fields) if snapshot.has_metadata else None
    if tokens is not None:
        line["embeddings_b64"] = base64.b64encode(np.ascontiguousarray(tokens, "<f4").data).decode()
        line["shape"] = list(tokens.shape)
    return msgspec.json.encode(line) + b"\n"
