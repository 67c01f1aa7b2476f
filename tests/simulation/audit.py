"""What the stored bytes of a generation say, decoded without engine/index: the other witness beside the model.

Only engine/format (bytes to arrays) and engine/codec (decoding) are used; manifests, tombstones, patches, ids and rebasing are put
together here a second time, so that a mistake in engine/index shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.codec.bitpack import row_bytes
from engine.codec.residual import Codec, Encoded, decode
from engine.format import names
from engine.format.codec_object import read_codec
from engine.format.envelope import Section
from engine.format.fields import decode_fields
from engine.format.manifest import Manifest, SegmentRef
from engine.format.patch import read_patch
from engine.format.segment import QuantisedReader, read_flat
from engine.format.tombstones import read_tombstones

from .store import Stored


@dataclass(frozen=True)
class Found:
    """A document as stored: key, fields, and its vectors float32 (t, D)."""

    key: str | None
    fields: dict[str, Any]
    tokens: np.ndarray


@dataclass(frozen=True)
class _Segment:
    """ids int64 (N,) without base, and the documents, by ordinal."""

    ids: list[int]
    documents: list[Found]
    quantised: bool


class Auditor:
    """Reads generations out of a bucket. Segments and codecs are decoded once."""

    def __init__(self, objects: Mapping[str, Stored]) -> None:
        self._objects = objects
        self._segments: dict[str, _Segment] = {}
        self._codecs: dict[str, Codec] = {}

    def documents(self, manifest: Manifest, index: str) -> dict[int, Found]:
        """Every live document of a generation. Raises AssertionError if an id occurs twice, KeyError if an object is missing."""
        found: dict[int, Found] = {}
        for segment in manifest.segments:
            decoded = self._segment(manifest, index, segment)
            dead: set[int] = set()
            if segment.tombstones is not None:
                name = names.tombstones(segment.tombstones.home or index, segment.tombstones.id)
                dead = set(read_tombstones(self._objects[name].data, segment.tombstones, segment.n_documents, name=name).tolist())
            patches: dict[int, dict[str, Any]] = {}
            for ref in segment.patches:
                name = names.patch(ref.home or index, ref.id)
                for ordinal, row in read_patch(self._objects[name].data, ref, segment.n_documents, name=name).items():
                    patches[ordinal] = {**patches.get(ordinal, {}), **row}
            for ordinal, (number, doc) in enumerate(zip(decoded.ids, decoded.documents, strict=True)):
                if ordinal in dead:
                    continue
                assert number + segment.base not in found, f"document {number + segment.base} is in two segments"
                fields = {**doc.fields, **patches[ordinal]} if ordinal in patches else doc.fields
                found[number + segment.base] = Found(doc.key, fields, doc.tokens)
        return found

    def _segment(self, manifest: Manifest, index: str, ref: SegmentRef) -> _Segment:
        known = self._segments.get(ref.id)
        if known is None:
            name = names.segment(ref.home or index, ref.id)
            data = self._objects[name].data
            known = (
                self._flat(ref, data, name, manifest.dim or 0) if ref.kind == "flat" else self._quantised(manifest, index, ref, data, name)
            )
            self._segments[ref.id] = known
        return known

    def _flat(self, ref: SegmentRef, data: bytes, name: str, dim: int) -> _Segment:
        flat = read_flat(ref, data, dim, name=name)
        documents = []
        for n in range(ref.n_documents):
            blob = flat.blobs[n] if flat.blobs is not None else b""
            key, fields = decode_fields(blob, name=name, section=int(Section.FIELDS))
            documents.append(Found(key, fields or {}, flat.tokens[flat.offsets[n] : flat.offsets[n + 1]].astype(np.float32)))
        return _Segment((flat.ids - ref.base).tolist(), documents, False)

    def _quantised(self, manifest: Manifest, index: str, ref: SegmentRef, data: bytes, name: str) -> _Segment:
        codec_ref = manifest.codec_of(ref)
        codec = self._codecs.get(codec_ref.id)
        if codec is None:
            codec_name = names.codec(codec_ref.home or index, codec_ref.id)
            codec = self._codecs[codec_ref.id] = read_codec(self._objects[codec_name].data, name=codec_name, ref=codec_ref)
        reader = QuantisedReader(ref, codec_ref.cell_offsets_array(), row_bytes(codec.dim, codec.nbits), name)
        sections = reader.cut(data)
        records = reader.records(sections[Section.RECORDS], reader.sizes(sections[Section.SIZES]))
        documents = []
        for n in range(ref.n_documents):
            key, fields = decode_fields(records.blobs[n], name=name, section=int(Section.RECORDS))
            own = np.arange(int(records.n_tokens[n]))
            encoded = Encoded(
                records.codes[records.code_start[n] + own],
                records.scalars[records.scalar_start[n] + own],
                records.rows[records.residual_start[n] + own],
            )
            documents.append(Found(key, fields or {}, decode(codec, encoded)))
        return _Segment((reader.ids(sections[Section.IDS]) - ref.base).tolist(), documents, True)

    def is_quantised(self, segment_id: str) -> bool:
        return self._segments[segment_id].quantised
