"""Segments: the objects that hold documents. Writers turn arrays into one object; readers turn its sections back into arrays.

A *flat* segment is what an add becomes: float16 tokens, searched by brute force. Sections, in this order:

    meta           msgpack                {dim, n_documents, n_tokens, max_tokens, nbits: 0, codec: ""}
    lengths        u32 (N,)               tokens of each document
    ids            i64 (N,)               document id minus the segment's base; absent: 0..N-1
    field_offsets  u64 (N + 1,)           document n's blob is fields[field_offsets[n]:field_offsets[n + 1]]
    keys           keys.py                absent if no document has a key
    tokens         f16 (T, D)             document after document, as they were given (normalised by the caller)
    fields         fields.py

A *quantised* segment is what compaction makes: N <= 65,536 documents, all encoded by one codec, in an order that puts documents of
one topic side by side:

    meta           msgpack                {dim, n_documents, n_tokens, max_tokens, nbits, codec: id}
    posting_cells, posting_checksums      postings.py
    sizes          u32 (N, 2)             records.py
    ids            i64 (N,)
    keys           keys.py                absent if no document has a key
    postings       postings.py
    records        records.py

so that everything before the records, which is what a warm process keeps of a segment, is one range (hot_range).

The writers answer with the SegmentRef too; the caller adds metadata, tombstones and patches to it. Readers take bytes of sections,
verify them against the SegmentRef, and answer with views wherever the bytes already lie right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from engine.codec.bitpack import row_bytes as bytes_per_row
from engine.config import MAX_DIM, MAX_DOCUMENT_TOKENS, MAX_SEGMENT_DOCUMENTS, NBITS
from engine.errors import LimitExceeded
from engine.format.envelope import (
    Buffer,
    Builder,
    Kind,
    Section,
    SectionRef,
    array,
    build,
    check_section,
    corrupt,
    cut,
    find_section,
    parse,
    unpack,
)
from engine.format.half import is_finite
from engine.format.keys import Keys, build_keys, parse_keys
from engine.format.manifest import SegmentRef
from engine.format.postings import Postings, build_postings, read_posting_cells, read_postings, write_postings
from engine.format.records import Records, Sizes, plan_records, read_records, read_sizes, view_records

CHECKED_DOCUMENTS = 2048
"""Looked at together when a segment is opened: so many that calls cost nothing, so few that memory does not grow with the segment."""


class SegmentMeta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The meta section: with it a segment can be understood without a manifest."""

    dim: int
    n_documents: int
    n_tokens: int
    max_tokens: int
    nbits: int = 0
    codec: str = ""


class Written(msgspec.Struct, frozen=True):
    """A segment ready to be put: its bytes, and the reference for the manifest."""

    data: memoryview
    ref: SegmentRef


# Writing


def write_flat(
    segment_id: str,
    tokens: np.ndarray,
    offsets: np.ndarray,
    *,
    blobs: Sequence[Buffer] | None = None,
    keys: Sequence[str | None] | None = None,
    ids: np.ndarray | None = None,
    base: int = 0,
    home: str = "",
) -> Written:
    """A flat segment.

    tokens   float16 (T, D), of all documents, end to end
    offsets  int64 (N + 1,), N >= 1
    blobs    encoded fields of each document (fields.encode_fields), if any has some
    keys     external id of each document or None, if any has one
    ids      int64 (N,) document ids, unique; None for base, base + 1, ... which costs nothing to store and can be rebased by the commit

    Raises LimitExceeded for a document of more than MAX_DOCUMENT_TOKENS tokens, InvalidRequest for a key given twice.
    """
    if tokens.dtype != np.float16 or tokens.ndim != 2:
        raise ValueError(f"tokens are float16 (T, D), not {tokens.dtype} {tokens.shape}")
    lengths = np.diff(offsets)
    meta = _meta(tokens.shape[1], lengths)
    blob_sizes = [len(blob) for blob in blobs] if blobs is not None else [0] * len(lengths)
    relative = None if ids is None else _relative_ids(ids, base)
    key_section = build_keys(keys) if keys is not None else None
    parts: list[tuple[int, Buffer | np.ndarray | None]] = [
        (Section.META, msgspec.msgpack.encode(meta)),
        (Section.LENGTHS, lengths.astype("<u4")),
        (Section.IDS, None if relative is None else relative.astype("<i8")),
        (Section.FIELD_OFFSETS, np.cumsum([0, *blob_sizes], dtype=np.int64).astype("<u8")),
        (Section.KEYS, key_section),
        (Section.TOKENS, tokens.astype("<f2", copy=False)),
        (Section.FIELDS, b"".join(blobs or ())),
    ]
    data, sections = build(Kind.FLAT_SEGMENT, [(section, part) for section, part in parts if part is not None])
    first, last = (0, len(lengths) - 1) if relative is None else (int(relative.min()), int(relative.max()))
    ref = _segment_ref("flat", segment_id, home, base, (first, last), meta, data.nbytes, sections)
    return Written(data, ref)


def write_quantised(
    segment_id: str,
    parts: Sequence[tuple[np.ndarray, Records]],
    *,
    dim: int,
    nbits: int,
    codec_id: str,
    cell_offsets: np.ndarray,
    order: np.ndarray | None = None,
    keys: Sequence[str | None] | None = None,
    base: int = 0,
    home: str = "",
) -> Written:
    """A quantised segment, from freshly encoded documents, from other segments of the same codec, or from both.

    parts         (ids int64 (n,), Records): whole document ids; a merge passes the records it has read
    cell_offsets  int64 (M + 1,), of the codec
    order         int64 (N,): ordinal n becomes document order[n], counting through all parts. It may leave documents out (deleted ones).
                  None keeps the order of the parts
    keys          external id of each document by *ordinal*, or None

    Raises LimitExceeded beyond MAX_SEGMENT_DOCUMENTS documents or where the parts' limits are passed.
    Cost: about 4 us per document, 30 ns per token, and one buffer of the object's size.
    """
    order = np.arange(sum(len(records) for _, records in parts)) if order is None else np.asarray(order, np.int64)
    if len(order) > MAX_SEGMENT_DOCUMENTS:
        raise LimitExceeded("too many documents for one segment", limit=MAX_SEGMENT_DOCUMENTS, found=len(order))
    row_bytes = bytes_per_row(dim, nbits)
    ids = _relative_ids(np.concatenate([part_ids for part_ids, _ in parts])[order], base)
    plan = plan_records([records for _, records in parts], ids, order, row_bytes)
    meta = _meta(dim, plan.n_tokens, nbits, codec_id)
    codes, offsets = plan.codes()
    postings, cells, checksums = write_postings(build_postings(codes, offsets, int(cell_offsets[-1])), cell_offsets)
    key_section = build_keys(keys) if keys is not None else None
    small: list[tuple[int, Buffer | np.ndarray | None]] = [
        (Section.META, msgspec.msgpack.encode(meta)),
        (Section.POSTING_CELLS, cells),
        (Section.POSTING_CHECKSUMS, checksums),
        (Section.SIZES, plan.sizes.tobytes()),
        (Section.IDS, ids.astype("<i8").tobytes()),
        (Section.KEYS, key_section),
        (Section.POSTINGS, postings),
    ]
    contents = {section: np.frombuffer(part, np.uint8) for section, part in small if part is not None}
    builder = Builder(
        Kind.QUANTISED_SEGMENT, [*((section, len(part)) for section, part in contents.items()), (Section.RECORDS, plan.size_bytes)]
    )
    for section, part in contents.items():
        builder.view(section)[:] = part
    plan.fill(builder.view(Section.RECORDS))
    data, sections = builder.finish()
    id_range = (int(ids.min()), int(ids.max()))
    return Written(data, _segment_ref("quantised", segment_id, home, base, id_range, meta, data.nbytes, sections, cells, checksums))


def _meta(dim: int, lengths: np.ndarray, nbits: int = 0, codec_id: str = "") -> SegmentMeta:
    if not len(lengths):
        raise ValueError("a segment holds at least one document")
    longest = int(lengths.max())
    if longest > MAX_DOCUMENT_TOKENS:
        raise LimitExceeded("a document has too many tokens", limit=MAX_DOCUMENT_TOKENS, found=longest)
    return SegmentMeta(dim=dim, n_documents=len(lengths), n_tokens=int(lengths.sum()), max_tokens=longest, nbits=nbits, codec=codec_id)


def _relative_ids(ids: np.ndarray, base: int) -> np.ndarray:
    if len(np.unique(ids)) != len(ids):
        raise ValueError("document ids of a segment are unique")
    return np.asarray(ids, np.int64) - base


def _segment_ref(
    kind: Literal["flat", "quantised"],
    segment_id: str,
    home: str,
    base: int,
    id_range: tuple[int, int],
    meta: SegmentMeta,
    size_bytes: int,
    sections: tuple[SectionRef, ...],
    posting_cells: bytes = b"",
    posting_checksums: bytes = b"",
) -> SegmentRef:
    return SegmentRef(
        id=segment_id,
        home=home,
        kind=kind,
        codec=meta.codec,
        base=base,
        first_id=base + id_range[0],
        last_id=base + id_range[1],
        n_documents=meta.n_documents,
        n_tokens=meta.n_tokens,
        max_tokens=meta.max_tokens,
        size_bytes=size_bytes,
        sections=sections,
        posting_cells=posting_cells,
        posting_checksums=posting_checksums,
        has_keys=any(ref.id == Section.KEYS for ref in sections),
    )


# Reading, flat


class Flat(msgspec.Struct, frozen=True):
    """A flat segment in memory.

    ids int64 (N,) whole document ids · offsets int64 (N + 1,) · tokens float16 (T, D) · keys or None
    blobs  encoded fields by ordinal, or None if the bytes that were read do not reach them
    """

    ids: np.ndarray
    offsets: np.ndarray
    tokens: np.ndarray
    keys: Keys | None
    blobs: FlatBlobs | None


@dataclass(frozen=True)
class FlatBlobs(Sequence[Buffer]):
    """Encoded fields of a flat segment's documents: offsets int64 (N + 1,) into fields."""

    offsets: np.ndarray
    fields: memoryview

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.fields[self.offsets[index] : self.offsets[index + 1]]


def read_flat(ref: SegmentRef, data: Buffer, dim: int, *, name: str, verify: bool = True) -> Flat:
    """A flat segment from the object's bytes: all of them, or as many from its beginning as reach to the end of its tokens.

    verify  False for bytes that this process has verified before; then only lengths are checked

    Raises CorruptData. Cost: one hash over the bytes; tokens and fields are views of `data`.
    """
    parts = cut(ref.sections, data, name=name, verify=verify)
    for section in (Section.LENGTHS, Section.FIELD_OFFSETS, Section.TOKENS):
        if section not in parts:
            raise corrupt("segment is cut", name=name, section=section, expected=ref.size_bytes, found=memoryview(data).nbytes)
    lengths = np.frombuffer(parts[Section.LENGTHS], "<u4").astype(np.int64)
    offsets = _cumulate(lengths)
    if len(lengths) != ref.n_documents or offsets[-1] != ref.n_tokens or lengths.max() != ref.max_tokens:
        raise corrupt("lengths disagree with the manifest", name=name, section=Section.LENGTHS, expected=ref.n_tokens, found=offsets[-1])
    if len(parts[Section.TOKENS]) != 2 * ref.n_tokens * dim:
        raise corrupt(
            "tokens have another length",
            name=name,
            section=Section.TOKENS,
            expected=2 * ref.n_tokens * dim,
            found=len(parts[Section.TOKENS]),
        )
    tokens = np.frombuffer(parts[Section.TOKENS], "<f2").reshape(-1, dim)
    if verify and not is_finite(tokens):
        raise corrupt("tokens that are no finite numbers", name=name, section=Section.TOKENS)
    return Flat(
        ids=_read_ids(ref, parts.get(Section.IDS), name),
        offsets=offsets,
        tokens=tokens,
        keys=parse_keys(parts[Section.KEYS], ref.n_documents, name=name) if Section.KEYS in parts else None,
        blobs=_flat_blobs(ref, parts, name),
    )


def _flat_blobs(ref: SegmentRef, parts: dict[int, memoryview], name: str) -> FlatBlobs | None:
    if Section.FIELDS not in parts:
        return None
    offsets = np.frombuffer(parts[Section.FIELD_OFFSETS], "<u8").astype(np.int64)
    fields = parts[Section.FIELDS]
    if len(offsets) != ref.n_documents + 1 or offsets[0] or offsets[-1] != len(fields) or (np.diff(offsets) < 0).any():
        raise corrupt("field offsets are impossible", name=name, section=Section.FIELD_OFFSETS, expected=len(fields), found=offsets[-1])
    return FlatBlobs(offsets, fields)


def _read_ids(ref: SegmentRef, data: Buffer | None, name: str) -> np.ndarray:
    """Whole document ids, int64 (N,), from a verified ids section, or counted where there is none."""
    ids = np.arange(ref.n_documents) if data is None else np.frombuffer(data, "<i8")
    if len(ids) != ref.n_documents or ids.min() + ref.base != ref.first_id or ids.max() + ref.base != ref.last_id:
        raise corrupt(
            "ids disagree with the manifest", name=name, section=Section.IDS, expected=(ref.first_id, ref.last_id), found=len(ids)
        )
    return ids + ref.base


# Reading, quantised


class QuantisedReader(msgspec.Struct, frozen=True):
    """Knows where everything lies in one quantised segment, and turns the bytes of its sections into arrays. Holds no bytes.

    cell_offsets  int64 (M + 1,), of the segment's codec
    row_bytes     of one packed residual
    name          of the object, for errors

    Every method that takes `data` wants exactly the bytes of that section and raises CorruptData if they are not what the manifest
    promised; verify=False trusts bytes that this process has verified before.
    """

    ref: SegmentRef
    cell_offsets: np.ndarray
    row_bytes: int
    name: str

    @property
    def hot_range(self) -> tuple[int, int]:
        """Byte range of everything but the records: what a warm process keeps, in one request."""
        return self.ref.sections[0].offset, self.ref.section(Section.POSTINGS).end

    def cut(self, data: Buffer, start: int = 0, *, verify: bool = True) -> dict[int, memoryview]:
        """Verified sections, by id, of those that lie wholly in `data`, the object's bytes from `start` on."""
        return cut(self.ref.sections, data, name=self.name, start=start, verify=verify)

    def cut_hot(self, data: Buffer) -> dict[int, memoryview]:
        """Verified sections of hot_range. CorruptData if one that a warm process needs lies elsewhere."""
        sections = self.cut(data, self.hot_range[0])
        if not {Section.SIZES, Section.IDS, Section.POSTINGS} <= sections.keys():
            raise corrupt("sections lie in another order", name=self.name, expected="sizes and ids before postings", found=list(sections))
        return sections

    def sizes(self, data: Buffer, *, verify: bool = True) -> Sizes:
        """Tokens and byte offsets of every record: wanted before any record can be found."""
        section = check_section(self.ref.section(Section.SIZES), data, name=self.name, verify=verify)
        sizes = read_sizes(section, self.row_bytes, self.ref.section(Section.RECORDS).length, name=self.name)
        n_tokens = sizes.n_tokens
        if len(sizes) != self.ref.n_documents or n_tokens.sum() != self.ref.n_tokens or n_tokens.max() != self.ref.max_tokens:
            raise corrupt(
                "sizes disagree with the manifest", name=self.name, section=Section.SIZES, expected=self.ref.n_tokens, found=n_tokens.sum()
            )
        return sizes

    def ids(self, data: Buffer, *, verify: bool = True) -> np.ndarray:
        """Whole document ids by ordinal, int64 (N,)."""
        return _read_ids(self.ref, check_section(self.ref.section(Section.IDS), data, name=self.name, verify=verify), self.name)

    def keys(self, data: Buffer, *, verify: bool = True) -> Keys:
        """External ids. Ask only if ref.has_keys."""
        section = check_section(self.ref.section(Section.KEYS), data, name=self.name, verify=verify)
        return parse_keys(section, self.ref.n_documents, name=self.name)

    def postings(self, data: Buffer, *, verify: bool = True) -> Postings:
        """All posting lists, of codes 0..K-1."""
        section = check_section(self.ref.section(Section.POSTINGS), data, name=self.name, verify=verify)
        return read_postings(section, self.ref.posting_cells_array(), self.cell_offsets, self.ref.n_documents, name=self.name)

    def posting_ranges(self, cells: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
        """Byte ranges in the object of the posting blocks of these cells."""
        start = self.ref.section(Section.POSTINGS).offset
        at = self.ref.posting_cells_array() + start
        return [(int(at[cell]), int(at[cell + 1])) for cell in cells]

    def posting_cells(self, cells: Sequence[int] | np.ndarray, blocks: Sequence[Buffer], wanted: np.ndarray | None = None) -> Postings:
        """The posting lists of these cells, from the bytes of posting_ranges(cells). The answer's codes say which lists they are.

        wanted  bool (K,): the lists of other codes are left empty; None wants all
        """
        checksums = self.ref.posting_checksums_array()
        return read_posting_cells(cells, blocks, self.cell_offsets, checksums, self.ref.n_documents, name=self.name, wanted=wanted)

    def records(self, data: Buffer, sizes: Sizes, *, verify: bool = True) -> Records:
        """All records, as views of `data`."""
        section = check_section(self.ref.section(Section.RECORDS), data, name=self.name, verify=verify)
        records = view_records(section, sizes, self.row_bytes, name=self.name)
        return self._checked_codes(records) if verify else records

    def record_ranges(self, ordinals: np.ndarray, sizes: Sizes) -> list[tuple[int, int]]:
        """Byte ranges in the object of the records of these ordinals."""
        start = self.ref.section(Section.RECORDS).offset
        begins, ends = sizes.starts[ordinals] + start, sizes.starts[ordinals + 1] + start
        return list(zip(begins.tolist(), ends.tolist(), strict=True))

    def some_records(self, ordinals: np.ndarray, pieces: Sequence[Buffer], sizes: Sizes) -> Records:
        """The records of these ordinals from the bytes of record_ranges, each verified. A piece may hold a run of several, in order."""
        return self._checked_codes(read_records(pieces, ordinals, sizes, self.row_bytes, name=self.name))

    def _checked_codes(self, records: Records) -> Records:
        """Searches trust codes. About 7 ns a token; a hash of its bytes takes as long."""
        n_centroids = int(self.cell_offsets[-1])
        for first in range(0, len(records), CHECKED_DOCUMENTS):
            codes, _ = records.flat_codes(np.arange(first, min(first + CHECKED_DOCUMENTS, len(records))))
            if codes.max(initial=0) >= n_centroids:
                raise corrupt("a code beyond the last centroid", name=self.name, section=Section.RECORDS, expected=n_centroids)
        return records


def find_ids(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The ordinal of each wanted document id, -1 where the segment has it not.

    ids      int64 (N,), by ordinal, in any order, unique
    wanted   int64 (n,)
    returns  int64 (n,)
    """
    order = np.argsort(ids, kind="stable")
    rows = np.searchsorted(ids, wanted, sorter=order)
    ordinals = np.take(order, rows, mode="clip")
    return np.where(np.take(ids, ordinals) == wanted, ordinals, -1)


# Without a manifest


def describe(data: Buffer, segment_id: str, *, name: str, base: int = 0, home: str = "") -> SegmentRef:
    """The reference of a segment, from its whole object alone: for repair and verification.

    Raises CorruptData or UnsupportedFormat. Deleted documents, patches and metadata are the manifest's knowledge and not the object's.
    """
    header, parts = parse(data, name=name)
    kinds: dict[Kind, Literal["flat", "quantised"]] = {Kind.FLAT_SEGMENT: "flat", Kind.QUANTISED_SEGMENT: "quantised"}
    if header.kind not in kinds:
        raise corrupt("object is of another kind", name=name, range=(8, 10), expected="a segment", found=header.kind.name)
    find_section(header.sections, Section.META, name=name)
    meta: SegmentMeta = unpack(parts[Section.META], SegmentMeta, name=name, section=Section.META)
    flat = header.kind == Kind.FLAT_SEGMENT
    if not 1 <= meta.dim <= MAX_DIM or meta.n_documents < 1 or (meta.nbits not in NBITS) != flat or bool(meta.codec) == flat:
        raise corrupt("a segment's meta is impossible", name=name, section=Section.META, expected="FORMAT.md, segment", found=meta)
    ids = array(parts[Section.IDS], "<i8", name=name, section=Section.IDS) if Section.IDS in parts else np.array([0, meta.n_documents - 1])
    if not len(ids):
        raise corrupt("a segment without documents", name=name, section=Section.IDS, expected=meta.n_documents, found=0)
    id_range = (int(ids.min()), int(ids.max()))
    cells, checksums = (bytes(parts.get(section, b"")) for section in (Section.POSTING_CELLS, Section.POSTING_CHECKSUMS))
    return _segment_ref(kinds[header.kind], segment_id, home, base, id_range, meta, header.size_bytes, header.sections, cells, checksums)


def _cumulate(counts: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets
