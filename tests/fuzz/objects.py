"""Stored objects: the frame, CURRENT and manifests, tombstones, patches, markers. Segments and codecs have files of their own.

Each is tried twice: with bytes changed, when its checksums must notice, and with bytes changed and checksums made anew, as a forger or a
wrong writer would leave it, when its rules must. What passes the rules must be written again as the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import msgspec
import numpy as np

from engine.errors import NotFound
from engine.format import envelope, manifest, markers, patch, tombstones
from engine.format.envelope import Kind, Section
from engine.format.manifest import Manifest, ObjectRef, TombstoneRef
from engine.index import commit
from engine.store.base import Object

from .mutation import mutated
from .sealing import resealed, with_sections
from .target import Target, Wrong, is_equal, stored

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "v1"


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def mutated_object(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """Bytes changed; or one section changed in a frame that is sound, so that the rules about its content are reached."""
    if rng.random() < 0.25:
        return mutated(data, rng, others, tokens)
    try:

        def change(contents: dict[int, bytes]) -> None:
            number = rng.choice(sorted(contents))
            contents[number] = mutated(contents[number], rng, list(contents.values()), tokens)

        return with_sections(data, change)
    except Exception:  # already broken
        return mutated(data, rng, others, tokens)


def both(data: bytes, read: Callable[[bytes], bool]) -> bool:
    """As it is, and resealed."""
    accepted = read(data)
    again = resealed(data)
    return (again != data and read(again)) or accepted


# The frame


def read_envelope(data: bytes) -> bool:
    def read(data: bytes) -> bool:
        accepted, found = stored(lambda: envelope.parse(data, name="x"))
        if accepted:
            header, parts = found
            is_equal(bytes(envelope.build(header.kind, parts.items())[0]), data, "the frame built again")
        return accepted

    return both(data, read)


_ALL = (
    "manifest",
    "tombstones",
    "patch",
    "pin",
    "branch",
    "sweep",
    "alias",
    "build",
    "deletion",
    "codec",
    "segment_flat",
    "segment_flat_ids",
    "segment_quantised",
)


def _small() -> list[bytes]:
    return [golden(name) for name in _ALL if len(golden(name)) < 20_000]


ENVELOPE = Target("envelope", "the frame of every object", read_envelope, _small)


# Structures


def read_manifest(data: bytes) -> bool:
    def read(data: bytes) -> bool:
        accepted, found = stored(lambda: manifest.decode_manifest(data, name="CURRENT"))
        is_equal(_opened(data), found, "CURRENT")
        if accepted:
            is_equal(manifest.decode_manifest(manifest.encode_manifest(found), name="again"), found, "manifest")
            for codec in found.codecs:
                codec.coarse_array(), codec.cell_offsets_array(), codec.centroid_checksums_array()
        return accepted

    return both(data, read)


def _opened(data: bytes) -> Manifest | None:
    """As an index is opened: CURRENT may hold a deletion too, which is no damage and no index."""
    try:
        return stored(lambda: commit._head(Object(data, "tag"), "papers").manifest)[1]  # type: ignore[no-any-return]
    except Wrong as wrong:
        if not isinstance(wrong.__cause__, NotFound):
            raise
    is_equal(envelope.parse_header(data, name="x").kind, Kind.DELETION, "what NotFound was said of")
    markers.read_marker(data, markers.Deletion, name="x")
    return None


def _manifests() -> list[bytes]:
    whole = manifest.decode_manifest(golden("manifest"), name="x")
    empty = msgspec.structs.replace(whole, dim=None, codecs=(), segments=(), columns=())
    flat = msgspec.structs.replace(whole, codecs=(), segments=whole.segments[:1])
    return [golden("manifest"), golden("deletion"), manifest.encode_manifest(empty), manifest.encode_manifest(flat)]


def mutated_body(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """One value of the structure changed, which is what no change of bytes would hit; else as any object."""
    from .mutation import changed

    if rng.random() < 0.3:
        return mutated_object(data, rng, others, tokens)
    try:
        header, parts = envelope.parse(data, name="x")
        tree = msgspec.msgpack.decode(parts[Section.BODY], strict=False)
        body = msgspec.msgpack.encode(changed(tree, rng))
    except Exception:  # already broken, or a value that msgpack has not
        return mutated(data, rng, others, tokens)
    return bytes(envelope.build(header.kind, [(Section.BODY, body)])[0])


MANIFEST = Target("manifest", "CURRENT and manifests", read_manifest, _manifests, mutate=mutated_body)


def read_tombstones(data: bytes) -> bool:
    """By a reference that fits the bytes: what a forged manifest would hold."""

    def read(data: bytes) -> bool:
        graves = manifest.decode_manifest(golden("manifest"), name="x").segments[2].tombstones
        assert graves is not None
        accepted, _ = stored(lambda: tombstones.read_tombstones(data, graves, 5, name="x"))
        if accepted:
            is_equal(data, golden("tombstones"), "tombstones of one checksum")
        for n_deleted in {graves.n_deleted, max(0, len(data) - 64) // 4}:
            ref = TombstoneRef(id=graves.id, n_deleted=n_deleted, size_bytes=len(data), checksum=envelope.checksum(data))
            accepted, ordinals = stored(lambda ref=ref: tombstones.read_tombstones(data, ref, 1 << 16, name="x"))  # type: ignore[misc]
            if accepted:
                is_equal(tombstones.write_tombstones(ordinals, ref.id)[0], data, "tombstones")
                return True
        return False

    return both(data, read)


TOMBSTONES = Target("tombstones", "tombstones", read_tombstones, lambda: [golden("tombstones"), tombstones.write_tombstones(np.arange(40), "x")[0]], mutate=mutated_object)  # fmt: skip


def read_patch(data: bytes) -> bool:
    def read(data: bytes) -> bool:
        ref = ObjectRef(id="x", size_bytes=len(data), checksum=envelope.checksum(data))
        accepted, rows = stored(lambda: patch.read_patch(data, ref, 1 << 16, name="x"))
        if accepted:
            again, again_ref = patch.write_patch(rows, "x")
            is_equal(patch.write_patch(patch.read_patch(again, again_ref, 1 << 16, name="x"), "x")[0], again, "patch")
        return accepted

    return both(data, read)


PATCH = Target("patch", "patches of metadata", read_patch, lambda: [golden("patch"), patch.write_patch({3: {"a": [1, {"b": None}], "c": 1.5}}, "x")[0]], mutate=mutated_body)  # fmt: skip


def read_marker(data: bytes) -> bool:
    """As each of the kinds: pins, branches, sweeps, aliases, builds, uploads, deletions."""

    def read(data: bytes) -> bool:
        found = False
        for kind in markers.KINDS:
            accepted, marker = stored(lambda kind=kind: markers.read_marker(data, kind, name="x"))  # type: ignore[misc]
            if accepted:
                is_equal(
                    markers.write_marker(markers.read_marker(markers.write_marker(marker), kind, name="x")),
                    markers.write_marker(marker),
                    "marker",
                )
            found = found or accepted
        return found

    return both(data, read)


def _markers() -> list[bytes]:
    upload = markers.Upload(created_s=1.5, index_id="01KATR0000000000000000000A", generation=3, first_id=0, last_id=9)
    return [*(golden(name) for name in ("pin", "branch", "sweep", "alias", "build", "deletion")), markers.write_marker(upload)]


MARKER = Target("marker", "pins, branches, sweeps, aliases, builds, uploads, deletions", read_marker, _markers, mutate=mutated_body)


# What others share


def golden_manifest() -> Manifest:
    return manifest.decode_manifest(golden("manifest"), name="x")
