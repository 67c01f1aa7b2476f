"""The manifest: everything that one generation of an index consists of. CURRENT holds the one in force.

A manifest is one msgpack map in an envelope of kind MANIFEST; the field names below are the keys on disk. It carries the small hot
parts of every segment and codec (section tables, offsets of posting cells, coarse centroids, checksums), so that one GET opens an
index and every later read is a range whose checksum is known before it is asked for.

Decoding checks every invariant that a reader relies on, so no reader checks again. Unknown fields are refused, never dropped: a
writer that dropped them would destroy what a newer release wrote. So a new field is a new format version (FORMAT.md, rolling out).
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import msgspec
import numpy as np

from engine.config import INDEX_NAME, MAX_DIM, MAX_DOCUMENT_TOKENS, MAX_SEGMENT_DOCUMENTS, NBITS, IndexConfig
from engine.format import names
from engine.format.envelope import ALIGNMENT, Buffer, Kind, Section, SectionRef, build_body, corrupt, find_section, parse_body
from engine.format.half import is_finite

COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MAX_ID = (1 << 62) - 1
MAX_GENERATIONS = 10**names.GENERATION_DIGITS
MAX_BYTES = 1 << 48
FLAT_SECTIONS = frozenset({Section.META, Section.LENGTHS, Section.TOKENS, Section.FIELD_OFFSETS, Section.FIELDS})
QUANTISED_SECTIONS = frozenset(
    {Section.META, Section.IDS, Section.SIZES, Section.RECORDS, Section.POSTING_CELLS, Section.POSTING_CHECKSUMS, Section.POSTINGS}
)
CODEC_SECTIONS = frozenset(
    {
        Section.META,
        Section.LEVELS,
        Section.CUTOFFS,
        Section.INV_TABLE,
        Section.SCALE_TABLE,
        Section.CELL_OFFSETS,
        Section.CENTROID_CHECKSUMS,
        Section.ROTATION,
        Section.COARSE,
        Section.CENTROIDS,
    }
)


class _Stored(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the structures in a manifest: immutable, compared by value, refusing fields they do not know."""


class ObjectRef(_Stored, frozen=True, kw_only=True):
    """An object that is read whole. home: "" for this index, else the index whose prefix holds it; checksum: xxh3_64 of all its bytes."""

    id: str
    home: str = ""
    size_bytes: int
    checksum: int


class TombstoneRef(_Stored, frozen=True, kw_only=True):
    """Which ordinals of a segment are deleted: a tombstones object and how many it lists (at least one)."""

    id: str
    home: str = ""
    n_deleted: int
    size_bytes: int
    checksum: int


class Column(_Stored, frozen=True, kw_only=True):
    """A metadata column: its name as first written, and its SQLite type."""

    name: str
    type: str


class CodecRef(_Stored, frozen=True, kw_only=True):
    """A codec object, and what a cold query needs of it to choose the cells it fetches.

    coarse              float16 (M, D): coarse centroids in the space of the *queries* (coarse @ rotation.T), so that cells can be
                        chosen before the rotation has been fetched
    cell_offsets        uint32 (M + 1,): cell m owns the codes cell_offsets[m]:cell_offsets[m + 1]
    centroid_checksums  uint64 (M,): xxh3_64 of each cell's block of the centroids section
    """

    id: str
    home: str = ""
    dim: int
    nbits: int
    n_centroids: int
    n_tokens_trained: int
    size_bytes: int
    sections: tuple[SectionRef, ...]
    coarse: bytes
    cell_offsets: bytes
    centroid_checksums: bytes

    @property
    def n_cells(self) -> int:
        return len(self.centroid_checksums) // 8

    def coarse_array(self) -> np.ndarray:
        """float32 (M, D), in the space of the queries."""
        return np.frombuffer(self.coarse, "<f2").reshape(self.n_cells, self.dim).astype(np.float32)

    def cell_offsets_array(self) -> np.ndarray:
        """int64 (M + 1,)."""
        return np.frombuffer(self.cell_offsets, "<u4").astype(np.int64)

    def centroid_checksums_array(self) -> np.ndarray:
        """uint64 (M,)."""
        return np.frombuffer(self.centroid_checksums, "<u8")

    def section(self, section_id: int) -> SectionRef:
        return find_section(self.sections, section_id, name=self.id)


class SegmentRef(_Stored, frozen=True, kw_only=True):
    """A segment and what a reader must know before its first read.

    home                 "" or the index whose prefix holds the objects of this segment (a branch refers to its parent's)
    codec                id of its codec; "" for a flat segment
    base                 added to the ids stored in the object, so that a commit can give ids to a segment that is already uploaded
    first_id, last_id    least and greatest document id, with base
    n_documents, n_tokens, max_tokens   stored, deleted ones included; max_tokens is of the longest document
    posting_cells        uint32 (M + 1,) byte offsets of the blocks in the postings section; b"" for a flat segment
    posting_checksums    uint64 (M,) of those blocks; b"" for a flat segment
    metadata             the SQLite file, if any document has fields
    patches              changed metadata rows, in the order in which they apply
    """

    id: str
    home: str = ""
    kind: Literal["flat", "quantised"]
    codec: str = ""
    base: int = 0
    first_id: int
    last_id: int
    n_documents: int
    n_tokens: int
    max_tokens: int
    size_bytes: int
    sections: tuple[SectionRef, ...]
    posting_cells: bytes = b""
    posting_checksums: bytes = b""
    has_keys: bool = False
    metadata: ObjectRef | None = None
    tombstones: TombstoneRef | None = None
    patches: tuple[ObjectRef, ...] = ()

    @property
    def n_live(self) -> int:
        """Documents that are not deleted."""
        return self.n_documents - (self.tombstones.n_deleted if self.tombstones else 0)

    def posting_cells_array(self) -> np.ndarray:
        """int64 (M + 1,): byte offsets of the posting cells within their section."""
        return np.frombuffer(self.posting_cells, "<u4").astype(np.int64)

    def posting_checksums_array(self) -> np.ndarray:
        """uint64 (M,)."""
        return np.frombuffer(self.posting_checksums, "<u8")

    def section(self, section_id: int) -> SectionRef:
        return find_section(self.sections, section_id, name=self.id)

    def rebased(self, base: int) -> SegmentRef:
        """The same segment with its ids counted from `base`: what a commit does when it gives out ids."""
        shift = base - self.base
        return msgspec.structs.replace(self, base=base, first_id=self.first_id + shift, last_id=self.last_id + shift)


class Manifest(_Stored, frozen=True, kw_only=True):
    """One generation of an index.

    index_id    of the index, for ever: tells an index that was deleted and created again from its former self
    generation  0 for the first, one more with each commit
    created_s   unix seconds, the writer's clock
    cause       what made this generation, for people
    writer      unique to each attempt to commit, so that a lost answer can be told from a refusal
    dim         of every vector; None until the first document comes
    next_id     id of the next document; never falls
    """

    index_id: str
    generation: int
    created_s: float
    cause: str
    writer: str
    config: IndexConfig
    dim: int | None = None
    next_id: int = 0
    codecs: tuple[CodecRef, ...] = ()
    segments: tuple[SegmentRef, ...] = ()
    columns: tuple[Column, ...] = ()

    @property
    def n_documents(self) -> int:
        """Live documents."""
        return sum(segment.n_live for segment in self.segments)

    def codec_of(self, segment: SegmentRef) -> CodecRef:
        """The codec of a quantised segment."""
        return next(codec for codec in self.codecs if codec.id == segment.codec)


class _Settings(msgspec.Struct):
    """The config of a manifest as it stands in the bytes: IndexConfig itself would drop what it does not know."""

    config: dict[str, Any]


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of CURRENT or of manifests/{generation}. Raises ValueError for a manifest that no reader would take."""
    problem = _problem(manifest)
    if problem is not None:
        raise ValueError(f"a manifest that breaks its own rules: {problem}")
    return build_body(Kind.MANIFEST, manifest)


def decode_manifest(data: Buffer, *, name: str) -> Manifest:
    """The manifest in an object's bytes. Raises CorruptData or UnsupportedFormat. Under 2 ms for 20 segments."""
    manifest: Manifest = parse_body(Kind.MANIFEST, data, Manifest, name=name)
    settings: _Settings = parse_body(Kind.MANIFEST, data, _Settings, name=name)
    problem = "config: unknown fields" if settings.config.keys() - set(IndexConfig.__struct_fields__) else _problem(manifest)
    if problem is not None:
        raise corrupt("a manifest breaks its own rules", name=name, section=Section.BODY, expected="FORMAT.md, Manifest", found=problem)
    return manifest


# The rules. Each function answers with the first that is broken, in words, or None.


def _problem(manifest: Manifest) -> str | None:
    if not 0 <= manifest.generation < MAX_GENERATIONS or not 0 <= manifest.next_id <= MAX_ID or not math.isfinite(manifest.created_s):
        return "generation, next_id or created_s"
    if not names.is_id(manifest.index_id) or not names.is_id(manifest.writer):
        return "index_id or writer"
    if manifest.dim is None:
        return "segments or codecs without a dimension" if manifest.segments or manifest.codecs else _columns_problem(manifest)
    if not 1 <= manifest.dim <= MAX_DIM:
        return "dim"
    if not _distinct([codec.id for codec in manifest.codecs]) or not _distinct([segment.id for segment in manifest.segments]):
        return "two codecs or two segments of one id"
    codecs = {codec.id: codec for codec in manifest.codecs}
    for codec in manifest.codecs:
        if problem := _codec_problem(codec, manifest.dim):
            return f"codec {codec.id}: {problem}"
    for segment in manifest.segments:
        if problem := _segment_problem(segment, codecs, manifest):
            return f"segment {segment.id}: {problem}"
    return _columns_problem(manifest)


def _distinct(items: list[str]) -> bool:
    return len(set(items)) == len(items)


def _columns_problem(manifest: Manifest) -> str | None:
    if not all(COLUMN_NAME.fullmatch(column.name) and column.type.isalpha() for column in manifest.columns):
        return "columns"
    return None if _distinct([column.name.lower() for column in manifest.columns]) else "two columns of one name"


def _object_problem(ref: ObjectRef | TombstoneRef | CodecRef | SegmentRef) -> str | None:
    if not names.is_id(ref.id) or (ref.home and not INDEX_NAME.fullmatch(ref.home)):
        return "id or home"
    if not 0 < ref.size_bytes <= MAX_BYTES:
        return "size_bytes"
    return "checksum" if isinstance(ref, ObjectRef | TombstoneRef) and not 0 <= ref.checksum < 1 << 64 else None


def _sections_problem(sections: tuple[SectionRef, ...], size_bytes: int, needed: frozenset[Section]) -> str | None:
    end = 0
    for ref in sections:
        if ref.offset % ALIGNMENT or ref.offset < end or ref.length < 0 or not 0 <= ref.checksum < 1 << 64:
            return f"section {ref.id}"
        end = ref.end
    if end != size_bytes:
        return "sections do not end where the object ends"
    ids = {ref.id for ref in sections}
    return None if len(ids) == len(sections) and ids >= needed else "sections twice or missing"


def _length(sections: tuple[SectionRef, ...], section_id: int) -> int:
    return next(ref.length for ref in sections if ref.id == section_id)


def _codec_problem(codec: CodecRef, dim: int) -> str | None:
    problem = _object_problem(codec) or _sections_problem(codec.sections, codec.size_bytes, CODEC_SECTIONS)
    if problem:
        return problem
    if codec.dim != dim or codec.nbits not in NBITS or not 1 <= codec.n_centroids <= 1 << 16 or codec.n_tokens_trained < 0:
        return "dim, nbits, n_centroids or n_tokens_trained"
    n_cells = codec.n_cells
    if (
        not n_cells
        or len(codec.centroid_checksums) % 8
        or len(codec.cell_offsets) != 4 * (n_cells + 1)
        or len(codec.coarse) != 2 * n_cells * dim
    ):
        return "lengths of coarse, cell_offsets and centroid_checksums"
    cell_offsets = codec.cell_offsets_array()
    if cell_offsets[0] or cell_offsets[-1] != codec.n_centroids or (cell_offsets[1:] < cell_offsets[:-1]).any():
        return "cell_offsets"
    if not is_finite(np.frombuffer(codec.coarse, "<f2")):
        return "coarse"
    return None if _length(codec.sections, Section.CENTROIDS) == codec.n_centroids * (dim + 4) else "length of centroids"


def _segment_problem(segment: SegmentRef, codecs: dict[str, CodecRef], manifest: Manifest) -> str | None:
    needed = FLAT_SECTIONS if segment.kind == "flat" else QUANTISED_SECTIONS
    problem = _object_problem(segment) or _sections_problem(segment.sections, segment.size_bytes, needed)
    if problem:
        return problem
    if segment.has_keys != any(ref.id == Section.KEYS for ref in segment.sections):
        return "has_keys"
    if not 0 <= segment.first_id <= segment.last_id < manifest.next_id or segment.n_documents > segment.last_id - segment.first_id + 1:
        return "first_id, last_id, n_documents or the manifest's next_id"
    if not segment.n_documents >= 1 or not 0 <= segment.max_tokens <= min(segment.n_tokens, MAX_DOCUMENT_TOKENS):
        return "n_documents, n_tokens or max_tokens"
    if segment.n_tokens > segment.n_documents * segment.max_tokens:
        return "n_tokens"
    if segment.kind == "flat":
        return _flat_problem(segment, manifest.dim or 0) or _additions_problem(segment)
    return _quantised_problem(segment, codecs) or _additions_problem(segment)


def _flat_problem(segment: SegmentRef, dim: int) -> str | None:
    if segment.codec or segment.posting_cells or segment.posting_checksums:
        return "a flat segment has no codec and no postings"
    sound = (
        _length(segment.sections, Section.LENGTHS) == 4 * segment.n_documents
        and _length(segment.sections, Section.TOKENS) == 2 * segment.n_tokens * dim
        and _length(segment.sections, Section.FIELD_OFFSETS) == 8 * (segment.n_documents + 1)
    )
    return None if sound else "length of a section"


def _quantised_problem(segment: SegmentRef, codecs: dict[str, CodecRef]) -> str | None:
    codec = codecs.get(segment.codec)
    if codec is None:
        return "its codec is not in the manifest"
    if segment.n_documents > MAX_SEGMENT_DOCUMENTS:
        return "n_documents"
    sound = (
        len(segment.posting_cells) == 4 * (codec.n_cells + 1)
        and len(segment.posting_checksums) == 8 * codec.n_cells
        and _length(segment.sections, Section.IDS) == _length(segment.sections, Section.SIZES) == 8 * segment.n_documents
    )
    if not sound:
        return "length of a section or of the posting cells"
    cells = segment.posting_cells_array()
    n_codes = np.diff(codec.cell_offsets_array())
    smallest = np.where(n_codes, 4 + n_codes, 0)
    if cells[0] or cells[-1] != _length(segment.sections, Section.POSTINGS) or (np.diff(cells) < smallest).any():
        return "posting_cells"
    return None


def _additions_problem(segment: SegmentRef) -> str | None:
    """Of the objects that came to a segment after it was written."""
    for ref in (segment.metadata, segment.tombstones, *segment.patches):
        if ref is not None and (problem := _object_problem(ref)):
            return f"object {ref.id}: {problem}"
    if segment.tombstones and not 1 <= segment.tombstones.n_deleted <= segment.n_documents:
        return "n_deleted"
    return None
