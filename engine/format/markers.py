"""Markers: tiny objects that say one thing each. Every one is one msgpack map in an envelope of its own kind.

pin     {index_id, generation, created_s, note, id, temporary}   garbage collection keeps this generation
branch  {index, generation, created_s}             the index named here refers to objects of the index that holds the marker
sweep   {writer, created_s, names, generations}    a garbage collection is about to delete these objects and these manifests
alias   {index, created_s, id}                     another name of an index
upload  {index_id, generation, first_id, last_id, created_s}   where the commit of a presigned upload begins, and then what it made
build   {id, part, source, n_documents, objects, segment, codec, columns, created_s}   progress of a bulk build that can be resumed
deletion {index_id, generation, created_s, id}   in place of a manifest in CURRENT: there is no index of this name
"""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import msgspec

from engine.config import INDEX_NAME
from engine.format.envelope import Buffer, Kind, Section, build_body, corrupt, parse_body
from engine.format.manifest import CodecRef, Column, SegmentRef
from engine.format.names import is_id


class _Marker(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """created_s is unix seconds of the writer's clock, for people: no decision rests on it."""

    created_s: float


class Pin(_Marker, frozen=True, kw_only=True):
    """A named generation: a snapshot, a backup point.

    index_id   the life of the index that it belongs to
    id         unique, so that two pins of one name are never the same bytes
    temporary  held by work under way; garbage collection forgets it after a day
    """

    index_id: str
    generation: int
    id: str
    note: str = ""
    temporary: bool = False


class Branch(_Marker, frozen=True, kw_only=True):
    """In the home index: `index` was branched off at `generation` and refers to objects here."""

    index: str
    generation: int


class Sweep(_Marker, frozen=True, kw_only=True):
    """What a garbage collection is about to delete: object names as the store knows them, and generations."""

    writer: str
    names: tuple[str, ...]
    generations: tuple[int, ...]


class Alias(_Marker, frozen=True, kw_only=True):
    """Another name for an index. `id` makes each switch unique, so that a lost answer can be told from a refusal."""

    index: str
    id: str


class BuildProgress(_Marker, frozen=True, kw_only=True):
    """One finished step of a bulk build: documents of `source` consumed so far, and what this step put into the store.

    objects  names of the objects that garbage collection must keep while the build may be resumed
    """

    id: str
    part: int
    source: str
    n_documents: int
    objects: tuple[str, ...]
    segment: SegmentRef | None = None
    codec: CodecRef | None = None
    columns: tuple[Column, ...] = ()


class Upload(_Marker, frozen=True, kw_only=True):
    """The commit of a presigned upload. As a claim: it can be found in generations after `generation` of this life of the index, and only
    there. As a receipt (with document ids): `generation` made it."""

    index_id: str
    generation: int
    first_id: int | None = None
    last_id: int | None = None


class Deletion(_Marker, frozen=True, kw_only=True):
    """The end of an index. It stays, so that no request that is late or repeated can bring the index back, or take the next one with it.

    index_id    the life that ended; empty if its CURRENT could not be read
    generation  its last
    id          unique, so that a lost answer can be told from a refusal
    """

    index_id: str
    generation: int
    id: str


Marker: TypeAlias = Pin | Branch | Sweep | Alias | BuildProgress | Upload | Deletion
M = TypeVar("M", Pin, Branch, Sweep, Alias, BuildProgress, Upload, Deletion)
KINDS: dict[type, Kind] = {
    Pin: Kind.PIN,
    Branch: Kind.BRANCH,
    Sweep: Kind.SWEEP,
    Alias: Kind.ALIAS,
    BuildProgress: Kind.BUILD,
    Upload: Kind.UPLOAD,
    Deletion: Kind.DELETION,
}


def write_marker(marker: Marker) -> bytes:
    """The bytes of a marker's object."""
    return build_body(KINDS[type(marker)], marker)


def read_marker(data: Buffer, type: type[M], *, name: str) -> M:
    """The marker of this type in an object's bytes. Raises CorruptData or UnsupportedFormat."""
    marker: M = parse_body(KINDS[type], data, type, name=name)
    generations = marker.generations if isinstance(marker, Sweep) else (getattr(marker, "generation", 0),)
    index = getattr(marker, "index", "index")
    is_receipt_possible = not isinstance(marker, Upload) or _is_range(marker.first_id, marker.last_id)
    is_life_possible = not isinstance(marker, Deletion) or not marker.index_id or is_id(marker.index_id)
    if min(generations, default=0) < 0 or not INDEX_NAME.fullmatch(index) or not (is_receipt_possible and is_life_possible):
        raise corrupt("a marker is impossible", name=name, section=Section.BODY, expected="FORMAT.md, markers", found=marker)
    return marker


def _is_range(first_id: int | None, last_id: int | None) -> bool:
    """Whether these are the ids of some documents, or of none."""
    if first_id is None or last_id is None:
        return first_id is last_id
    return 0 <= first_id <= last_id
