"""Deep verification of a segment: everything that a checksum cannot know. For `tartan verify`, repair and tests; no search calls it.

A checksum says that bytes are what was written. This says that what was written is a segment: that the manifest describes it, that the
postings are exactly those of the records, that ids and keys agree wherever they stand twice.
"""

from __future__ import annotations

import msgspec
import numpy as np

from engine.codec.bitpack import row_bytes
from engine.format.envelope import Buffer, Section, corrupt, parse
from engine.format.fields import decode_fields
from engine.format.keys import Keys
from engine.format.manifest import CodecRef, SegmentRef
from engine.format.postings import build_postings
from engine.format.records import ids_of_records
from engine.format.segment import QuantisedReader, describe, read_flat


def verify_segment(data: Buffer, ref: SegmentRef, codec: CodecRef | None, dim: int, *, name: str) -> None:
    """Check a whole segment object against its reference and against itself.

    codec  of a quantised segment, None for a flat one

    Raises CorruptData or UnsupportedFormat at the first thing that is wrong. Cost: reads everything, about 60 ns a token.
    """
    described = describe(data, ref.id, name=name, base=ref.base, home=ref.home)
    promised = msgspec.structs.replace(ref, metadata=None, tombstones=None, patches=())
    if described != promised:
        raise corrupt("segment is not the one that the manifest names", name=name, expected=promised, found=described)
    if ref.kind == "flat":
        flat = read_flat(ref, data, dim, name=name)
        assert flat.blobs is not None, "the whole object was read"
        _verify_ids(flat.ids, name)
        return _verify_keys(flat.keys, [decode_fields(blob, name=name, section=Section.FIELDS)[0] for blob in flat.blobs], name)
    if codec is None or codec.id != ref.codec:
        raise corrupt("segment of another codec", name=name, expected=ref.codec, found=codec and codec.id)
    return _verify_quantised(data, QuantisedReader(ref, codec.cell_offsets_array(), row_bytes(dim, codec.nbits), name))


def _verify_quantised(data: Buffer, reader: QuantisedReader) -> None:
    _, parts = parse(data, name=reader.name)
    reader.cut_hot(memoryview(data)[slice(*reader.hot_range)])
    sizes = reader.sizes(parts[Section.SIZES])
    records = reader.some_records(np.arange(len(sizes)), [parts[Section.RECORDS]], sizes)
    ids = reader.ids(parts[Section.IDS])
    _verify_ids(ids, reader.name)
    if not np.array_equal(ids_of_records(records) + reader.ref.base, ids):
        raise corrupt("ids of records are others than the ids section's", name=reader.name, section=Section.RECORDS)
    codes, offsets = records.flat_codes()
    expected, found = build_postings(codes, offsets, int(reader.cell_offsets[-1])), reader.postings(parts[Section.POSTINGS])
    if not (np.array_equal(expected.offsets, found.offsets) and np.array_equal(expected.ordinals, found.ordinals)):
        raise corrupt("postings are not those of the records", name=reader.name, section=Section.POSTINGS)
    cells = range(len(reader.cell_offsets) - 1)
    reader.posting_cells(cells, [memoryview(data)[start:end] for start, end in reader.posting_ranges(cells)])
    keys = reader.keys(parts[Section.KEYS]) if reader.ref.has_keys else None
    _verify_keys(keys, [decode_fields(blob, name=reader.name, section=Section.RECORDS)[0] for blob in records.blobs], reader.name)


def _verify_ids(ids: np.ndarray, name: str) -> None:
    if len(np.unique(ids)) != len(ids):
        raise corrupt("two documents of one id", name=name, section=Section.IDS)


def _verify_keys(keys: Keys | None, expected: list[str | None], name: str) -> None:
    found = keys.by_ordinal(len(expected)) if keys is not None else [None] * len(expected)
    if found != expected:
        raise corrupt("keys are not those of the documents", name=name, section=Section.KEYS)
