"""Records: everything that the exact score and the answer need of a document, in one contiguous run of bytes.

The records section is one record per document, by ordinal, so one range read brings a document's tokens and its fields together.
B is the width of a packed residual row (engine.codec.bitpack.row_bytes), t the tokens of the document, F the bytes of its fields:

    0         8   checksum      u64, xxh3_64 of the rest of the record with the ordinal as seed: a sound record in a wrong place fails too
    8         8   id            i64, document id minus the segment's base
    16        4   n_tokens      u32, t
    20        4   fields bytes  u32, F
    24       2t   codes         u16
    24+2t    2t   scalars       u8 (t, 2)
    24+4t     F   fields        msgpack, fields.py
              .   zero bytes up to a multiple of B
    R       B·t   residuals     u8 (t, B);  R = 24 + 4t + F rounded up to a multiple of B

Every record starts and every residual row lies at a multiple of B, so the section viewed as uint8 (rows, B) is a matrix in which the
residuals of any documents can be gathered without a copy, also straight from a mapped file. Codes and scalars lie at even offsets and
are gathered from 2-byte views in the same way. One padding per record, B/2 bytes on average: 0.5 % at 100 tokens of 64 bytes.

The sizes section is u32 (N, 2): n_tokens and record bytes. Record n starts at the sum of the record bytes before it, and its residuals
start B·t before its end, so everything is known without touching a record.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import xxhash

from engine.errors import CorruptData, LimitExceeded
from engine.format.envelope import Buffer, Section, checksum, corrupt

HEADER_BYTES = 24
MAX_RECORD_BYTES = (1 << 32) - 1
_HEADER = struct.Struct("<QqII")
_HEADER_TYPE = np.dtype([("checksum", "<u8"), ("id", "<i8"), ("n_tokens", "<u4"), ("fields", "<u4")])
_CHECKSUM = struct.Struct("<Q")


class RecordLayout(msgspec.Struct, frozen=True):
    """Byte offsets within each record, int64 (N,): scalars, fields, residuals, and the record's size. Codes are at HEADER_BYTES."""

    scalars: np.ndarray
    fields: np.ndarray
    residuals: np.ndarray
    size: np.ndarray


def record_layout(n_tokens: np.ndarray, fields_bytes: np.ndarray | int, row_bytes: int) -> RecordLayout:
    """Where the parts of records lie: the one owner of that arithmetic.

    n_tokens, fields_bytes  int64 (N,); the answer has their shape
    """
    scalars = HEADER_BYTES + 2 * n_tokens
    fields = HEADER_BYTES + 4 * n_tokens
    residuals = -(-(fields + fields_bytes) // row_bytes) * row_bytes
    return RecordLayout(scalars, fields, residuals, residuals + n_tokens * row_bytes)


class Sizes(msgspec.Struct, frozen=True):
    """The sizes section: n_tokens int64 (N,); starts int64 (N + 1,), byte offset of each record within the records section."""

    n_tokens: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.n_tokens)


class Records(msgspec.Struct, frozen=True):
    """n documents' encoded tokens and fields, stored or about to be. Document i has n_tokens[i] tokens; its token j has

        the code          codes[code_start[i] + j]            codes     uint16 (.,)
        the two scalars   scalars[scalar_start[i] + j]        scalars   uint8 (., 2)
        the residual      rows[residual_start[i] + j]         rows      uint8 (., B)

    n_tokens and the starts are int64 (n,). blobs[i] is the fields of document i. Between what belongs to tokens the three arrays hold
    other bytes of the section, of which they are views.
    """

    n_tokens: np.ndarray
    codes: np.ndarray
    code_start: np.ndarray
    scalars: np.ndarray
    scalar_start: np.ndarray
    rows: np.ndarray
    residual_start: np.ndarray
    blobs: Sequence[Buffer]

    def __len__(self) -> int:
        return len(self.n_tokens)

    def flat_codes(self, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The codes of all tokens, document after document (in `order`, if given): uint16 (T,), and int64 offsets (n + 1,)."""
        which = np.arange(len(self)) if order is None else order
        offsets = _offsets(self.n_tokens[which])
        return np.take(self.codes, _ragged(self.code_start[which], self.n_tokens[which])), offsets


def records_of_tokens(
    codes: np.ndarray, scalars: np.ndarray, residuals: np.ndarray, offsets: np.ndarray, blobs: Sequence[Buffer] | None = None
) -> Records:
    """Records from encoded tokens that lie document after document: what a writer starts from.

    codes uint16 (T,), scalars uint8 (T, 2), residuals uint8 (T, B), offsets int64 (N + 1,), blobs N encoded fields or None for none
    """
    starts = offsets[:-1]
    return Records(np.diff(offsets), codes, starts, scalars, starts, residuals, starts, blobs if blobs is not None else [b""] * len(starts))


# Writing


def plan_records(parts: Sequence[Records], ids: np.ndarray, order: np.ndarray, row_bytes: int) -> RecordPlan:
    """Lay out the records of several parts, ordinal n being document order[n] of all parts' documents counted on.

    ids    int64 (N,), by ordinal, as they are stored, that is without the base
    order  int64 (N,)

    Raises LimitExceeded if a record would pass MAX_RECORD_BYTES.
    """
    part_of = np.repeat(np.arange(len(parts)), [len(records) for records in parts])[order]
    row_of = np.concatenate([np.arange(len(records)) for records in parts])[order]
    n_tokens = np.concatenate([records.n_tokens for records in parts])[order]
    blobs = [parts[part].blobs[row] for part, row in zip(part_of.tolist(), row_of.tolist(), strict=True)]
    fields_bytes = np.fromiter((len(blob) for blob in blobs), np.int64, len(blobs))
    layout = record_layout(n_tokens, fields_bytes, row_bytes)
    if layout.size.max(initial=0) > MAX_RECORD_BYTES:
        raise LimitExceeded("a document is too large", limit_bytes=MAX_RECORD_BYTES, found=int(layout.size.max()))
    return RecordPlan(parts, part_of, row_of, ids, n_tokens, blobs, layout, row_bytes)


class RecordPlan(msgspec.Struct, frozen=True):
    """Records laid out and not yet written, so that the object's buffer can be made of the right size first.

    Ordinal n is document row_of[n] of parts[part_of[n]]; the other fields are by ordinal.
    """

    parts: Sequence[Records]
    part_of: np.ndarray
    row_of: np.ndarray
    ids: np.ndarray
    n_tokens: np.ndarray
    blobs: Sequence[Buffer]
    layout: RecordLayout
    row_bytes: int

    @property
    def sizes(self) -> np.ndarray:
        """The sizes section, u32 (N, 2)."""
        return np.stack([self.n_tokens, self.layout.size], axis=1).astype("<u4")

    @property
    def size_bytes(self) -> int:
        return int(self.layout.size.sum())

    def codes(self) -> tuple[np.ndarray, np.ndarray]:
        """The codes of all tokens by ordinal: uint16 (T,), and int64 offsets (N + 1,)."""
        offsets = _offsets(self.n_tokens)
        codes = np.empty(offsets[-1], np.uint16)
        for part, records in enumerate(self.parts):
            mine = np.flatnonzero(self.part_of == part)
            part_codes, _ = records.flat_codes(self.row_of[mine])
            n_tokens = self.n_tokens[mine]
            codes[_ragged(offsets[mine], n_tokens)] = part_codes
        return codes, offsets

    def fill(self, section: np.ndarray) -> None:
        """Write all records into a section of size_bytes zero bytes, uint8. Cost: about 3 us per document; the bytes are copied once."""
        out, row_bytes = section.data, self.row_bytes
        columns = (
            self.part_of,
            self.row_of,
            self.ids,
            self.n_tokens,
            self.layout.scalars,
            self.layout.fields,
            self.layout.residuals,
            self.layout.size,
        )
        sources = [_Source(records, row_bytes) for records in self.parts]
        digest, pack = xxhash.xxh3_64_intdigest, _HEADER.pack_into
        start = 0
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for ordinal, (part, row, document_id, t, scalars_at, fields_at, residuals_at, size) in enumerate(rows):
            source, blob, record = sources[part], self.blobs[ordinal], out[start : start + size]
            code, scalar, residual = source.code_start[row], source.scalar_start[row], source.residual_start[row]
            pack(record, 0, 0, document_id, t, len(blob))
            record[HEADER_BYTES:scalars_at] = source.codes[2 * code : 2 * (code + t)]
            record[scalars_at:fields_at] = source.scalars[2 * scalar : 2 * (scalar + t)]
            record[fields_at : fields_at + len(blob)] = blob
            record[residuals_at:] = source.rows[residual * row_bytes : (residual + t) * row_bytes]
            _CHECKSUM.pack_into(record, 0, digest(record[8:], ordinal))
            start += size


class _Source:
    """One part as plain integers and byte views: slicing those in a loop costs a third of slicing arrays."""

    def __init__(self, records: Records, row_bytes: int) -> None:
        if records.rows.shape[1] != row_bytes:
            raise ValueError(f"rows are {records.rows.shape[1]} bytes wide, not {row_bytes}")
        self.codes, self.scalars, self.rows = (
            _as_bytes(part) for part in (records.codes.astype("<u2", copy=False), records.scalars, records.rows)
        )
        self.code_start, self.scalar_start = records.code_start.tolist(), records.scalar_start.tolist()
        self.residual_start = records.residual_start.tolist()


def _as_bytes(part: np.ndarray) -> memoryview:
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


# Reading


def read_sizes(data: Buffer, row_bytes: int, records_bytes: int, *, name: str) -> Sizes:
    """A verified sizes section.

    records_bytes  length of the records section, which the sizes must add up to

    Raises CorruptData if no records could have these sizes.
    """
    pairs = np.frombuffer(data, "<u4").reshape(-1, 2).astype(np.int64)
    n_tokens, size = pairs[:, 0].copy(), pairs[:, 1]
    starts = _offsets(size)
    least = record_layout(n_tokens, 0, row_bytes).size
    if starts[-1] != records_bytes or (size < least).any() or (size % row_bytes).any():
        raise corrupt("sizes of records are impossible", name=name, section=Section.SIZES, expected=records_bytes, found=starts[-1])
    return Sizes(n_tokens, starts)


def view_records(data: Buffer, sizes: Sizes, row_bytes: int, *, name: str) -> Records:
    """All records of a segment as views of the whole, verified records section (a mapped file will do). Nothing is copied or touched."""
    return _records(np.frombuffer(data, np.uint8), sizes.n_tokens, sizes.starts, row_bytes, name)


def read_records(pieces: Sequence[Buffer], ordinals: np.ndarray, sizes: Sizes, row_bytes: int, *, name: str) -> Records:
    """The records of some documents from the bytes that were fetched for them, each verified by its own checksum.

    pieces    joined, they are the records of `ordinals`, in that order: a piece may hold one record or a run of them
    ordinals  int64 (n,)

    Document i of the answer is ordinals[i]. Raises CorruptData. Cost: one copy if there is more than one piece, 2 us and a hash per record.
    """
    record_bytes = sizes.starts[ordinals + 1] - sizes.starts[ordinals]
    starts = _offsets(record_bytes)
    joined = memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces))
    if joined.nbytes != starts[-1]:
        raise corrupt(
            "fetched records have another length", name=name, section=Section.RECORDS, expected=int(starts[-1]), found=joined.nbytes
        )
    for ordinal, start, end in zip(ordinals.tolist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        record = joined[start:end]
        expected, found = _CHECKSUM.unpack_from(record)[0], checksum(record[8:], ordinal)
        if found != expected:
            raise _damaged(ordinal, sizes, expected, found, name)
    data, n_tokens = np.frombuffer(joined, np.uint8), sizes.n_tokens[ordinals]
    headers = _headers(data, starts)
    if (headers["n_tokens"] != n_tokens).any() or (record_layout(n_tokens, headers["fields"], row_bytes).size != record_bytes).any():
        raise corrupt(
            "records disagree with their sizes", name=name, section=Section.RECORDS, expected=n_tokens.sum(), found="another layout"
        )
    return _records(data, n_tokens, starts, row_bytes, name)


def _damaged(ordinal: int, sizes: Sizes, expected: int, found: int, name: str) -> CorruptData:
    within = (int(sizes.starts[ordinal]), int(sizes.starts[ordinal + 1]))
    message = f"record {ordinal} is damaged (range counts within the section)"
    return corrupt(message, name=name, section=Section.RECORDS, range=within, expected=expected, found=found, code="checksum-mismatch")


def ids_of_records(records: Records) -> np.ndarray:
    """The ids in the records themselves, int64 (n,), without the base: what a cold read has instead of the ids section."""
    assert isinstance(records.blobs, _StoredBlobs), "records that were read"
    return _headers(records.blobs.data, records.blobs.starts)["id"].astype(np.int64)


def _headers(data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The headers of records that start at `starts`, as a structured array (n,)."""
    return np.take(data, starts[:-1, None] + np.arange(HEADER_BYTES)).view(_HEADER_TYPE).reshape(-1)


def _records(data: np.ndarray, n_tokens: np.ndarray, starts: np.ndarray, row_bytes: int, name: str) -> Records:
    begins, ends = starts[:-1], starts[1:]
    return Records(
        n_tokens=n_tokens,
        codes=data.view("<u2"),
        code_start=(begins + HEADER_BYTES) // 2,
        scalars=data.reshape(-1, 2),
        scalar_start=(begins + HEADER_BYTES) // 2 + n_tokens,
        rows=data.reshape(-1, row_bytes),
        residual_start=ends // row_bytes - n_tokens,
        blobs=_StoredBlobs(data, starts, row_bytes, name),
    )


@dataclass(frozen=True)
class _StoredBlobs(Sequence[Buffer]):
    """The fields of stored records, read when asked for."""

    data: np.ndarray
    starts: np.ndarray
    row_bytes: int
    name: str

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        start, end = int(self.starts[index]), int(self.starts[index + 1])
        record = self.data.data[start:end]
        _, _, n_tokens, fields_bytes = _HEADER.unpack_from(record)
        fields_at = HEADER_BYTES + 4 * n_tokens
        if fields_at + fields_bytes > len(record):
            raise corrupt(
                "fields pass the end of their record", name=self.name, section=Section.RECORDS, expected=len(record), found=fields_bytes
            )
        return record[fields_at : fields_at + fields_bytes]


def _offsets(counts: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _ragged(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[i], starts[i] + 1, ... counts[i] of them, for every i, end to end: int64."""
    offsets = _offsets(counts)
    ramp: np.ndarray = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
    return ramp
