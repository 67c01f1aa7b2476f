"""Segments from documents: flat ones from vectors, quantised ones from encoded tokens. Arithmetic and bytes only; callers upload.

A quantised segment orders its documents by topic, so that what a query wants lies close together and few range reads bring it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import msgspec
import numpy as np

from engine.codec.order import topical_order
from engine.codec.residual import Codec, encode
from engine.config import IndexConfig
from engine.format import names
from engine.format.envelope import Buffer, checksum
from engine.format.fields import encode_fields
from engine.format.manifest import CodecRef, Column, ObjectRef, SegmentRef
from engine.format.records import Records, records_of_tokens
from engine.format.segment import Written, write_flat, write_quantised

if TYPE_CHECKING:
    from engine.metadata.schema import Value

_BLOCK_DOCUMENTS = 1024


class NewSegment(msgspec.Struct, frozen=True):
    """A segment's reference and the bytes of its objects; the caller puts them under the names that the reference implies.

    ids  int64 (N,) by ordinal, without the base
    """

    segment: SegmentRef
    data: Buffer
    metadata: bytes | None
    ids: np.ndarray

    def uploads(self, index: str) -> dict[str, Buffer]:
        objects: dict[str, Buffer] = {names.segment(index, self.segment.id): self.data}
        if self.metadata is not None:
            objects[names.metadata(index, self.segment.id)] = self.metadata
        return objects


class Part(msgspec.Struct, frozen=True):
    """n documents on their way into a segment: ids int64 (n,), encoded tokens, and per document its row, key and keyword text.

    rows and texts are None where no document has fields; their items are None for a document without.
    alive  int64, the documents (0..n-1) that go into the segment; None for all
    """

    ids: np.ndarray
    records: Records
    keys: Sequence[str | None] | None = None
    rows: Sequence[Mapping[str, object] | None] | None = None
    texts: Sequence[str | None] | None = None
    alive: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


def flat_segment(
    tokens: np.ndarray,
    offsets: np.ndarray,
    *,
    rows: Sequence[Mapping[str, object]] | None,
    texts: Sequence[str] | None,
    keys: Sequence[str | None] | None,
    columns: Sequence[Column],
    config: IndexConfig,
    ids: np.ndarray | None = None,
) -> NewSegment:
    """A flat segment with a fresh id and base 0.

    tokens   float16 (T, D), unit rows; offsets int64 (N + 1,)
    rows     normalised fields, or None; texts: what keyword search sees, one per row
    ids      int64 (N,), without the base; None counts from 0
    """
    n_documents = len(offsets) - 1
    blobs = blobs_of(n_documents, keys, rows)
    written = write_flat(names.fresh_id(), tokens, offsets, ids=ids, blobs=blobs, keys=keys)
    return _with_metadata(written, rows, texts, columns, config, np.arange(n_documents) if ids is None else ids)


def encode_part(
    codec: Codec,
    tokens: np.ndarray,
    offsets: np.ndarray,
    ids: np.ndarray,
    *,
    keys: Sequence[str | None] | None = None,
    rows: Sequence[Mapping[str, object] | None] | None = None,
    texts: Sequence[str | None] | None = None,
    alive: np.ndarray | None = None,
    n_threads: int = 1,
) -> Part:
    """Documents given as unit vectors (float16 or float32), encoded."""
    encoded = encode(codec, tokens, n_threads=n_threads)
    blobs = blobs_of(len(ids), keys, rows)
    records = records_of_tokens(encoded.codes, encoded.scalars, encoded.residuals, offsets, blobs)
    return Part(np.asarray(ids, np.int64), records, keys, rows, texts, alive)


def quantised_segment(
    parts: Sequence[Part], codec: Codec, codec_ref: CodecRef, *, columns: Sequence[Column], config: IndexConfig
) -> NewSegment:
    """One quantised segment, with a fresh id and base 0, from parts encoded by `codec`; documents are ordered by topic.

    Memory: the parts, and the segment's bytes once more.
    """
    starts = np.cumsum([0, *(len(part) for part in parts)])
    alive = [np.arange(len(part)) if part.alive is None else part.alive for part in parts]
    vectors = np.concatenate([_document_vectors(codec, part.records, which) for part, which in zip(parts, alive, strict=True)])
    living = np.concatenate([which + start for which, start in zip(alive, starts[:-1], strict=True)])
    order = living[topical_order(vectors)]
    written = write_quantised(
        names.fresh_id(),
        [(part.ids, part.records) for part in parts],
        dim=codec.dim,
        nbits=codec.nbits,
        codec_id=codec_ref.id,
        cell_offsets=codec.cell_offsets,
        order=order,
        keys=_ordered(parts, "keys", order),
    )
    ids = np.concatenate([part.ids for part in parts])[order]
    return _with_metadata(written, _ordered(parts, "rows", order), _ordered(parts, "texts", order), columns, config, ids)


def column_pairs(columns: Sequence[Column]) -> tuple[tuple[str, str], ...]:
    """The manifest's columns as engine.metadata knows them."""
    return tuple((column.name, column.type) for column in columns)


def column_refs(columns: Sequence[tuple[str, str]]) -> tuple[Column, ...]:
    """Columns of engine.metadata as the manifest keeps them."""
    return tuple(Column(name=name, type=kind) for name, kind in columns)


def blobs_of(n_documents: int, keys: Sequence[str | None] | None, rows: Sequence[Mapping[str, object] | None] | None) -> list[bytes]:
    if keys is None and rows is None:
        return [b""] * n_documents
    return [
        encode_fields(keys[n] if keys is not None else None, _without_nulls(rows[n]) if rows is not None else None)
        for n in range(n_documents)
    ]


def _without_nulls(row: Mapping[str, object] | None) -> dict[str, object] | None:
    return None if row is None else {name: value for name, value in row.items() if value is not None}


def _ordered(parts: Sequence[Part], name: str, order: np.ndarray) -> list | None:  # type: ignore[type-arg]
    """One list over all parts, in the segment's order; None if no part has any."""
    lists = [getattr(part, name) for part in parts]
    if all(items is None for items in lists):
        return None
    joined = [item for items, part in zip(lists, parts, strict=True) for item in (items if items is not None else [None] * len(part))]
    return [joined[n] for n in order.tolist()]


def _document_vectors(codec: Codec, records: Records, which: np.ndarray) -> np.ndarray:
    """What a document is about: the mean of its tokens' centroids, float32 (n, D). Blocks bound the gathered rows."""
    vectors = np.zeros((len(which), codec.dim), np.float32)
    for start in range(0, len(which), _BLOCK_DOCUMENTS):
        codes, offsets = records.flat_codes(which[start : start + _BLOCK_DOCUMENTS])
        lengths = np.diff(offsets)
        full = np.flatnonzero(lengths)
        if len(full):
            sums = np.add.reduceat(np.take(codec.centroids, codes, axis=0), offsets[:-1][full], axis=0)
            vectors[start + full] = sums / lengths[full][:, None]
    return vectors


def _with_metadata(
    written: Written,
    rows: Sequence[Mapping[str, object] | None] | None,
    texts: Sequence[str | None] | None,
    columns: Sequence[Column],
    config: IndexConfig,
    ids: np.ndarray,
) -> NewSegment:
    """Add the SQLite file if a document has fields. sqlite3 is imported only here, and only then."""
    if rows is None or not columns:
        return NewSegment(written.ref, written.data, None, ids)
    from engine.metadata import database_file

    metadata = database_file.build(
        [cast("Mapping[str, Value]", row or {}) for row in rows],
        column_pairs(columns),
        ids,
        fts_tokenizer=config.fts_tokenizer,
        texts=None if texts is None else [text or "" for text in texts],
    )
    ref = ObjectRef(id=written.ref.id, size_bytes=len(metadata), checksum=checksum(metadata))
    return NewSegment(msgspec.structs.replace(written.ref, metadata=ref), written.data, metadata, ids)
