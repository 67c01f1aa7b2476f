"""The frame around every object: magic, kind, format version, a table of sections, checksums. Bytes in, bytes out, no I/O.

    offset  width  field
         0      8  magic            54 41 52 54 41 4e 0d 0a, "TARTAN\\r\\n": a transfer that treats bytes as text breaks it at once
         8      2  kind             u16, see Kind
        10      2  format version   u16, of this kind
        12      4  n_sections       u32
        16      8  object size      u64, bytes of the whole object
        24      8  header checksum  u64, xxh3_64 of bytes 0..24 followed by the table
        32   32·n  table            per section: id u32, zero u32, offset u64, length u64, checksum u64 (xxh3_64 of the section)
        ...        sections         in table order, each at the next multiple of 64, zero bytes between; the object ends with the last

The frame has one legal form for given sections, is the same in every format version of every kind, and will stay so: a reader can
always tell sound bytes of a newer version (UnsupportedFormat) from damaged ones (CorruptData). What lies inside sections is the
business of the other modules. A section whose id is at least OPTIONAL may be ignored by a reader that does not know it.

The checksum is xxh3 because it costs nothing beside the copy (10 GB/s and more); it finds damage, not malice.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, Final, TypeAlias, TypeVar

import msgspec
import numpy as np
import xxhash

from engine.errors import CorruptData, UnsupportedFormat

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Contiguous bytes; a reader keeps views of them, so they must not change afterwards. An mmap is passed as memoryview(mmap)."""

MAGIC: Final = b"TARTAN\r\n"
ALIGNMENT: Final = 64
"""Sections start at cache lines, so that arrays of any element type are aligned views wherever the object itself is."""
MAX_SECTIONS: Final = 1024
OPTIONAL: Final = 0x10000
_HEADER = struct.Struct("<8sHHIQQ")
_ROW = struct.Struct("<IIQQQ")
_CHECKED_BYTES: Final = 24


T = TypeVar("T")
N = TypeVar("N", int, np.ndarray)


class Kind(IntEnum):
    """What an object is. Numbers are never used again."""

    MANIFEST = 1
    CODEC = 2
    FLAT_SEGMENT = 3
    QUANTISED_SEGMENT = 4
    TOMBSTONES = 5
    PATCH = 6
    PIN = 7
    BRANCH = 8
    SWEEP = 9
    ALIAS = 10
    BUILD = 11
    UPLOAD = 12
    DELETION = 13


FORMAT_VERSIONS: Final[dict[Kind, tuple[int, int]]] = dict.fromkeys(Kind, (1, 1))
"""Oldest and newest format version of each kind that this release reads. It writes WRITTEN_VERSIONS, which trail by one release."""

WRITTEN_VERSIONS: Final[dict[Kind, int]] = dict.fromkeys(Kind, 1)


class Section(IntEnum):
    """What a section holds. Numbers are never used again; the layouts stand in the module named on the right."""

    BODY = 1  # msgpack of one structure: manifest.py, markers.py, patch.py
    META = 2  # segment.py, codec_object.py
    IDS = 3  # segment.py
    SIZES = 4  # records.py
    RECORDS = 5  # records.py
    POSTING_CELLS = 6  # postings.py
    POSTING_CHECKSUMS = 7  # postings.py
    POSTINGS = 8  # postings.py
    KEYS = 9  # keys.py
    LENGTHS = 10  # segment.py
    TOKENS = 11  # segment.py
    FIELD_OFFSETS = 12  # segment.py
    FIELDS = 13  # segment.py, fields.py
    ORDINALS = 14  # tombstones.py
    LEVELS = 32  # codec_object.py, to CENTROIDS
    CUTOFFS = 33
    INV_TABLE = 34
    SCALE_TABLE = 35
    CELL_OFFSETS = 36
    CENTROID_CHECKSUMS = 37
    ROTATION = 38
    COARSE = 39
    CENTROIDS = 40
    RESIDUAL_MOMENT = 41


KINDS: Final = frozenset(map(int, Kind))
SECTIONS: Final = frozenset(map(int, Section))


class SectionRef(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a section lies in its object and what its bytes must hash to. Kept in manifests, so that no read needs the header."""

    id: int
    offset: int
    length: int
    checksum: int

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def range(self) -> tuple[int, int]:
        """Half-open byte range in the object."""
        return self.offset, self.end


class Header(msgspec.Struct, frozen=True):
    """A parsed frame."""

    kind: Kind
    format_version: int
    size_bytes: int
    sections: tuple[SectionRef, ...]

    def section(self, section_id: int, *, name: str) -> SectionRef:
        """The section of this id; CorruptData if the object has none."""
        return find_section(self.sections, section_id, name=name)


def checksum(data: Buffer | np.ndarray, seed: int = 0) -> int:
    """xxh3_64 of contiguous bytes, as an unsigned integer. About 0.1 ms per MB."""
    return xxhash.xxh3_64_intdigest(data.data if isinstance(data, np.ndarray) else data, seed)


def align(offset: N, alignment: int = ALIGNMENT) -> N:
    """A number, or an integer array, rounded up to a multiple of `alignment`."""
    return -(-offset // alignment) * alignment


def corrupt(
    message: str,
    *,
    name: str,
    section: int | None = None,
    range: tuple[int, int] | None = None,
    expected: object = None,
    found: object = None,
    code: str = "malformed",
) -> CorruptData:
    """The error that says which bytes of which object are not what was promised."""
    facts: dict[str, object] = {"object": name}
    if section is not None:
        facts["section"] = Section(section).name.lower() if section in SECTIONS else section
    if range is not None:
        facts["range"] = f"{range[0]}..{range[1]}"
    return CorruptData(message, code=code, **facts, expected=expected, found=found)


def find_section(sections: Sequence[SectionRef], section_id: int, *, name: str) -> SectionRef:
    """The section of this id; CorruptData if there is none."""
    for ref in sections:
        if ref.id == section_id:
            return ref
    raise corrupt("a section is missing", name=name, section=section_id, expected="present", found="absent")


# Writing


class Builder:
    """An object under construction in one buffer: ask for its lengths once, fill the sections in place, finish.

    Big segments are written without a second copy of anything. Cost: one buffer of the object's size, zeroed by the system.
    """

    def __init__(self, kind: Kind, lengths: Sequence[tuple[int, int]]) -> None:
        """`lengths` gives (section id, bytes) in the order in which the sections lie in the object."""
        self.kind = kind
        self._ranges: dict[int, tuple[int, int]] = {}
        end = _HEADER.size + _ROW.size * len(lengths)
        for section_id, length in lengths:
            assert section_id not in self._ranges, "one section of each id"
            start = align(end)
            end = start + length
            self._ranges[section_id] = (start, end)
        self.data = np.zeros(end, np.uint8)

    def view(self, section_id: int) -> np.ndarray:
        """The section's bytes, uint8, writable."""
        start, end = self._ranges[section_id]
        return self.data[start:end]

    def finish(self) -> tuple[memoryview, tuple[SectionRef, ...]]:
        """Checksum everything, write the header; the finished bytes and the table. Nothing may be changed afterwards."""
        sections = tuple(
            SectionRef(section_id, start, end - start, checksum(self.data[start:end])) for section_id, (start, end) in self._ranges.items()
        )
        table = b"".join(_ROW.pack(ref.id, 0, ref.offset, ref.length, ref.checksum) for ref in sections)
        version = WRITTEN_VERSIONS[self.kind]
        head = _HEADER.pack(MAGIC, self.kind, version, len(sections), len(self.data), 0)[:_CHECKED_BYTES]
        header = head + struct.pack("<Q", checksum(head + table)) + table
        self.data[: len(header)] = np.frombuffer(header, np.uint8)
        self.data.flags.writeable = False
        return self.data.data, sections


def build(kind: Kind, sections: Iterable[tuple[int, Buffer | np.ndarray]]) -> tuple[memoryview, tuple[SectionRef, ...]]:
    """An object from finished sections, in their order; arrays are stored as their bytes. One copy."""
    contents = [(section_id, np.frombuffer(_as_bytes(content), np.uint8)) for section_id, content in sections]
    builder = Builder(kind, [(section_id, len(content)) for section_id, content in contents])
    for section_id, content in contents:
        builder.view(section_id)[:] = content
    return builder.finish()


def _as_bytes(content: Buffer | np.ndarray) -> Buffer:
    return np.ascontiguousarray(content).tobytes() if isinstance(content, np.ndarray) else content


# Reading


def parse_header(data: Buffer, *, name: str, kind: Kind | None = None) -> Header:
    """Parse the frame from the beginning of an object; `data` must reach at least to the end of the table.

    name  of the object, for errors
    kind  the kind that is expected here, if one is

    Raises CorruptData (checksum-mismatch, malformed), UnsupportedFormat for a sound frame of a kind or format version that this
    release cannot read.
    """
    view = memoryview(data)
    if len(view) < _HEADER.size:
        raise corrupt("object is shorter than a header", name=name, range=(0, _HEADER.size), expected=_HEADER.size, found=len(view))
    magic, kind_number, version, n_sections, size_bytes, header_checksum = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise corrupt("not an object of ours", name=name, range=(0, 8), expected=MAGIC.hex(), found=magic.hex())
    table_end = _HEADER.size + _ROW.size * n_sections
    if n_sections > MAX_SECTIONS or table_end > len(view):
        raise corrupt("section table does not fit", name=name, range=(12, 16), expected=f"within {len(view)} bytes", found=n_sections)
    found_checksum = checksum(bytes(view[:_CHECKED_BYTES]) + bytes(view[_HEADER.size : table_end]))
    if found_checksum != header_checksum:
        raise corrupt(
            "header is damaged", name=name, range=(0, table_end), expected=header_checksum, found=found_checksum, code="checksum-mismatch"
        )
    found_kind = _check_kind(kind_number, version, kind, name)
    return Header(found_kind, version, size_bytes, _parse_table(view, n_sections, size_bytes, name))


def _check_kind(kind_number: int, version: int, kind: Kind | None, name: str) -> Kind:
    if kind_number not in KINDS:
        raise UnsupportedFormat("an object of an unknown kind", object=name, kind=kind_number)
    if kind is not None and kind_number != kind:
        raise corrupt("object is of another kind", name=name, range=(8, 10), expected=kind.name, found=Kind(kind_number).name)
    oldest, newest = FORMAT_VERSIONS[Kind(kind_number)]
    if not oldest <= version <= newest:
        raise UnsupportedFormat(
            "a format version that this release cannot read",
            object=name,
            kind=Kind(kind_number).name,
            version=version,
            oldest=oldest,
            newest=newest,
        )
    return Kind(kind_number)


def _parse_table(view: memoryview, n_sections: int, size_bytes: int, name: str) -> tuple[SectionRef, ...]:
    """The table's rows, each exactly where the one before it lets it begin."""
    sections: list[SectionRef] = []
    end = _HEADER.size + _ROW.size * n_sections
    for row in range(n_sections):
        at = _HEADER.size + _ROW.size * row
        section_id, zero, offset, length, section_checksum = _ROW.unpack_from(view, at)
        if zero or offset != align(end) or offset + length > size_bytes or any(ref.id == section_id for ref in sections):
            raise corrupt(
                "section table is impossible", name=name, section=section_id, range=(at, at + _ROW.size), expected=align(end), found=offset
            )
        if section_id not in SECTIONS and section_id < OPTIONAL:
            raise UnsupportedFormat("a section that this release does not know", object=name, section=section_id)
        end = offset + length
        sections.append(SectionRef(section_id, offset, length, section_checksum))
    if end != size_bytes:
        raise corrupt("sections do not end where the object ends", name=name, range=(16, 24), expected=end, found=size_bytes)
    return tuple(sections)


def parse(data: Buffer, *, name: str, kind: Kind | None = None) -> tuple[Header, dict[int, memoryview]]:
    """Parse and verify a whole object: the frame, every section's checksum, the zero bytes between.

    returns  the header, and the bytes of each section by id, views of `data`

    Raises like parse_header. Cost: one pass of xxh3 over the bytes.
    """
    header = parse_header(data, name=name, kind=kind)
    view = memoryview(data)
    if len(view) != header.size_bytes:
        raise corrupt("object has another size", name=name, range=(0, len(view)), expected=header.size_bytes, found=len(view))
    end = _HEADER.size + _ROW.size * len(header.sections)
    for ref in header.sections:
        if any(view[end : ref.offset]):
            raise corrupt(
                "bytes between sections are not zero", name=name, range=(end, ref.offset), expected=0, found=view[end : ref.offset].hex()
            )
        end = ref.end
    return header, cut(header.sections, view, name=name)


def cut(sections: Sequence[SectionRef], data: Buffer, *, name: str, start: int = 0, verify: bool = True) -> dict[int, memoryview]:
    """Verified views of the sections that lie wholly in `data`, which is the bytes of the object from `start` on, by section id."""
    view = memoryview(data)
    whole = [ref for ref in sections if ref.offset >= start and ref.end <= start + len(view)]
    return {ref.id: check_section(ref, view[ref.offset - start : ref.end - start], name=name, verify=verify) for ref in whole}


def check_section(ref: SectionRef, data: Buffer, *, name: str, verify: bool = True) -> memoryview:
    """The bytes of one section, verified against what the manifest or the table says of it.

    verify  False checks only the length: for bytes that this process has verified before (a mapped cache file)

    Raises CorruptData.
    """
    view = memoryview(data)
    if view.nbytes != ref.length:
        raise corrupt("a section has another length", name=name, section=ref.id, range=ref.range, expected=ref.length, found=view.nbytes)
    if verify and (found := checksum(view)) != ref.checksum:
        raise corrupt(
            "a section is damaged", name=name, section=ref.id, range=ref.range, expected=ref.checksum, found=found, code="checksum-mismatch"
        )
    return view


def array(data: Buffer, dtype: str, *, name: str, section: int) -> np.ndarray:
    """A section as an array of a little-endian type, without a copy; CorruptData if it is not a whole number of elements."""
    if memoryview(data).nbytes % np.dtype(dtype).itemsize:
        raise corrupt("a section is cut", name=name, section=section, expected=f"a multiple of {np.dtype(dtype).itemsize}", found=len(data))
    return np.frombuffer(data, dtype)


# Objects and sections that are one msgpack structure

DECODE_ERRORS: Final = (msgspec.MsgspecError, ValueError, RecursionError, MemoryError, OverflowError)
"""What msgspec may raise over arbitrary bytes (bad text is a UnicodeDecodeError, a refusing __post_init__ a ValidationError)."""


def unpack(data: Buffer, type: type[T] | Any, *, name: str, section: int) -> Any:
    """Strictly decode msgpack as `type`; CorruptData whatever is wrong with it."""
    try:
        return msgspec.msgpack.decode(data, type=type, strict=True)
    except DECODE_ERRORS as error:
        raise corrupt(
            "a structure does not decode", name=name, section=section, expected=getattr(type, "__name__", type), found=error
        ) from error


def build_body(kind: Kind, body: object) -> bytes:
    """An object whose one section is the msgpack of `body`."""
    return bytes(build(kind, [(Section.BODY, msgspec.msgpack.encode(body))])[0])


def parse_body(kind: Kind, data: Buffer, type: type[T] | Any, *, name: str) -> Any:
    """The inverse of build_body, verified; CorruptData or UnsupportedFormat."""
    header, sections = parse(data, name=name, kind=kind)
    header.section(Section.BODY, name=name)
    return unpack(sections[Section.BODY], type, name=name, section=Section.BODY)
