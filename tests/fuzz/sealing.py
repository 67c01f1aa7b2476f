"""Checksums made anew: of the frame, and those inside sections, as a forger or a wrong writer would leave them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import pairwise

import msgspec
import numpy as np
import xxhash

from engine.format import envelope
from engine.format.envelope import Kind, Section

_HEADER_BYTES, _ROW_BYTES = 32, 32
Contents = dict[int, bytes]
"""Sections by id, in the order in which they lie in the object."""


def resealed(data: bytes) -> bytes:
    """The same bytes with every checksum made anew, of parts of sections first, as far as the tables can be read."""
    found = bytearray(data)
    if len(found) < _HEADER_BYTES:
        return data
    kind, _, n_sections = struct.unpack_from("<HHI", found, 8)
    table_end = _HEADER_BYTES + _ROW_BYTES * n_sections
    if n_sections > 64 or table_end > len(found):
        return data
    places: dict[int, tuple[int, int]] = {}
    for at in range(_HEADER_BYTES, table_end, _ROW_BYTES):
        section, _, offset, length = struct.unpack_from("<IIQQ", found, at)
        if offset + length <= len(found):
            places[section] = (offset, offset + length)
    contents = {section: bytes(found[start:end]) for section, (start, end) in places.items()}
    seal_inner(kind, contents)
    for section, (start, end) in places.items():
        found[start:end] = contents[section]
    for at in range(_HEADER_BYTES, table_end, _ROW_BYTES):
        offset, length = struct.unpack_from("<QQ", found, at + 8)
        if offset + length <= len(found):
            struct.pack_into("<Q", found, at + 24, xxhash.xxh3_64_intdigest(found[offset : offset + length]))
    struct.pack_into("<Q", found, 24, xxhash.xxh3_64_intdigest(found[:24] + found[_HEADER_BYTES:table_end]))
    return bytes(found)


def with_sections(data: bytes, change: Callable[[Contents], None]) -> bytes:
    """A sound object with its sections changed: laid out, summed and sealed as a writer would."""
    header, parts = envelope.parse(data, name="x")
    contents: Contents = {number: bytes(part) for number, part in parts.items()}
    change(contents)
    seal_inner(header.kind, contents)
    return bytes(envelope.build(header.kind, contents.items())[0])


def seal_inner(kind: int, contents: Contents) -> None:
    """The checksums of records, of blocks of posting lists, of cells of centroids. Lengths stay as they are; nonsense is left alone."""
    if kind == Kind.QUANTISED_SEGMENT:
        if Section.SIZES in contents and Section.RECORDS in contents:
            contents[Section.RECORDS] = b"".join(sealed_records(cut_records(contents)))
        if Section.POSTINGS in contents and Section.POSTING_CELLS in contents and Section.POSTING_CHECKSUMS in contents:
            ends = _numbers(contents[Section.POSTING_CELLS], "<u4")
            _seal_blocks(contents, Section.POSTING_CHECKSUMS, Section.POSTINGS, ends)
    elif kind == Kind.CODEC and {Section.META, Section.CENTROIDS, Section.CELL_OFFSETS, Section.CENTROID_CHECKSUMS} <= contents.keys():
        try:
            width = int(msgspec.msgpack.decode(contents[Section.META])["dim"]) + 4
        except (msgspec.MsgspecError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
            return
        if 0 < width < 1 << 16:
            ends = _numbers(contents[Section.CELL_OFFSETS], "<u4")
            _seal_blocks(contents, Section.CENTROID_CHECKSUMS, Section.CENTROIDS, [end * width for end in ends])


def cut_records(contents: Contents) -> list[bytes]:
    """The records section cut as its sizes say; what they do not reach is the last piece."""
    data, pieces, start = contents[Section.RECORDS], [], 0
    for size in _numbers(contents[Section.SIZES], "<u4")[1::2]:
        pieces.append(data[start : start + size])
        start += size
    return [*pieces, data[start:]]


def sealed_records(pieces: list[bytes]) -> list[bytes]:
    """Each record under the checksum of its place; the last piece is none."""
    sealed = [
        struct.pack("<Q", xxhash.xxh3_64_intdigest(record[8:], ordinal)) + record[8:] if len(record) >= 8 else record
        for ordinal, record in enumerate(pieces[:-1])
    ]
    return [*sealed, *pieces[-1:]]


def _seal_blocks(contents: Contents, checksums: Section, blocks: Section, ends: list[int]) -> None:
    stored, data = bytearray(contents[checksums]), contents[blocks]
    for number, (start, end) in enumerate(pairwise(ends)):
        if 8 * number + 8 <= len(stored):
            struct.pack_into("<Q", stored, 8 * number, xxhash.xxh3_64_intdigest(data[start:end]))
    contents[checksums] = bytes(stored)


def _numbers(data: bytes, dtype: str) -> list[int]:
    width = np.dtype(dtype).itemsize
    found: list[int] = np.frombuffer(data[: len(data) // width * width], dtype).tolist()
    return found
