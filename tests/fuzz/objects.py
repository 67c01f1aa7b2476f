"""Stored objects: the frame, CURRENT and manifests, tombstones, patches, markers, segments, codecs.

Each is tried twice: with bytes changed, when its checksums must notice, and with bytes changed and checksums made anew, as a forger or a
wrong writer would leave it, when its rules must. What passes the rules must be written again as the same thing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import xxhash

from engine.codec.bitpack import row_bytes
from engine.format import codec_object, envelope, manifest, markers, patch, postings, segment, tombstones
from engine.format.envelope import Kind, Section
from engine.format.fields import decode_fields
from engine.format.manifest import Manifest, ObjectRef, SegmentRef, TombstoneRef
from engine.format.verify import verify_segment

from .mutation import mutated
from .target import Target, is_equal, stored

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "v1"
_HEADER_BYTES, _ROW_BYTES = 32, 32


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def resealed(data: bytes) -> bytes:
    """The same bytes with every checksum of the frame made anew, as far as its table can be read."""
    found = bytearray(data)
    if len(found) < _HEADER_BYTES:
        return data
    (n_sections,) = struct.unpack_from("<I", found, 12)
    table_end = _HEADER_BYTES + _ROW_BYTES * n_sections
    if n_sections > 64 or table_end > len(found):
        return data
    for at in range(_HEADER_BYTES, table_end, _ROW_BYTES):
        offset, length = struct.unpack_from("<QQ", found, at + 8)
        if offset + length <= len(found):
            struct.pack_into("<Q", found, at + 24, xxhash.xxh3_64_intdigest(found[offset : offset + length]))
    struct.pack_into("<Q", found, 24, xxhash.xxh3_64_intdigest(found[:24] + found[_HEADER_BYTES:table_end]))
    return bytes(found)


def with_sections(data: bytes, change: Callable[[dict[int, bytes]], None]) -> bytes:
    """A sound object with its sections changed: laid out, summed and sealed as a writer would."""
    header, parts = envelope.parse(data, name="x")
    contents: dict[int, bytes] = {number: bytes(part) for number, part in parts.items()}
    change(contents)
    return bytes(envelope.build(header.kind, contents.items())[0])


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
        if accepted:
            is_equal(manifest.decode_manifest(manifest.encode_manifest(found), name="again"), found, "manifest")
            for codec in found.codecs:
                codec.coarse_array(), codec.cell_offsets_array(), codec.centroid_checksums_array()
        return accepted

    return both(data, read)


def _manifests() -> list[bytes]:
    whole = manifest.decode_manifest(golden("manifest"), name="x")
    empty = msgspec.structs.replace(whole, dim=None, codecs=(), segments=(), columns=())
    flat = msgspec.structs.replace(whole, codecs=(), segments=whole.segments[:1])
    return [golden("manifest"), manifest.encode_manifest(empty), manifest.encode_manifest(flat)]


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
    """As each of the six kinds: pins, branches, sweeps, aliases, builds, uploads."""

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
    return [*(golden(name) for name in ("pin", "branch", "sweep", "alias", "build")), markers.write_marker(upload)]


MARKER = Target("marker", "pins, branches, sweeps, aliases, builds, uploads", read_marker, _markers, mutate=mutated_body)


# Segments and codecs


def _current() -> Manifest:
    return manifest.decode_manifest(golden("manifest"), name="x")


def read_segment(data: bytes) -> bool:
    """By its own description, as repair reads it; if the manifest's rules let that pass, in every way a search reads it."""
    return both(data, lambda data: _described(data) and _searched(data))


def _described(data: bytes) -> bool:
    return stored(lambda: segment.describe(data, _current().segments[0].id, name="x"))[0]


def _searched(data: bytes) -> bool:
    current = _current()
    ref = segment.describe(data, current.segments[0].id, name="x")
    is_flat = ref.kind == "flat"
    codec = None if is_flat else current.codecs[0]
    whole = msgspec.structs.replace(
        current, segments=(msgspec.structs.replace(ref, codec="" if codec is None else codec.id),), next_id=manifest.MAX_ID
    )
    accepted, checked = stored(lambda: manifest.decode_manifest(envelope.build_body(Kind.MANIFEST, whole), name="x").segments[0])
    if not accepted:
        return False
    if is_flat:
        return _flat(data, checked)
    hot = stored(lambda: _hot(data, checked))[0]
    verified, _ = stored(lambda: verify_segment(data, checked, codec, 10, name="x"))
    if verified:
        assert hot, "deep verification passes what a search refuses"
    return verified


def _flat(data: bytes, ref: SegmentRef) -> bool:
    accepted, flat = stored(lambda: segment.read_flat(ref, data, 10, name="x"))
    verified, _ = stored(lambda: verify_segment(data, ref, None, 10, name="x"))
    if not accepted:
        return False
    fields = stored(lambda: [decode_fields(blob, name="x", section=Section.FIELDS) for blob in flat.blobs or ()])[0]
    if not verified or not fields:
        return False
    n = ref.n_documents
    keys = flat.keys.by_ordinal(n) if flat.keys else None
    counted = np.array_equal(flat.ids, ref.base + np.arange(n))
    again = segment.write_flat(
        ref.id, flat.tokens, flat.offsets, blobs=list(flat.blobs or ()), keys=keys, ids=None if counted else flat.ids, base=ref.base
    )
    twice = segment.read_flat(again.ref, again.data, 10, name="x")
    is_equal(twice.tokens.tobytes(), flat.tokens.tobytes(), "tokens")
    is_equal((twice.offsets.tolist(), twice.ids.tolist()), (flat.offsets.tolist(), flat.ids.tolist()), "documents")
    is_equal(twice.keys.by_ordinal(n) if twice.keys else None, keys if keys and any(keys) else None, "keys")
    return True


def _hot(data: bytes, ref: SegmentRef) -> bool:
    """What a warm process keeps of a quantised segment, and a cold read of some records."""
    codec = _current().codecs[0]
    reader = segment.QuantisedReader(ref, codec.cell_offsets_array(), row_bytes(10, codec.nbits), "x")
    parts = reader.cut(data)
    sizes = reader.sizes(parts[Section.SIZES])
    reader.ids(parts[Section.IDS])
    lists = reader.postings(parts[Section.POSTINGS])
    section, _, _ = postings.write_postings(lists, reader.cell_offsets)
    is_equal(section.tobytes(), bytes(parts[Section.POSTINGS]), "postings written again")
    records = reader.records(parts[Section.RECORDS], sizes)
    records.flat_codes()
    ordinals = np.arange(0, len(sizes), 2)
    start = ref.section(Section.RECORDS).offset
    pieces = [parts[Section.RECORDS][first - start : last - start] for first, last in reader.record_ranges(ordinals, sizes)]
    for blob in reader.some_records(ordinals, pieces, sizes).blobs:
        decode_fields(blob, name="x", section=Section.RECORDS)
    return True


FLAT = Target("flat", "flat segments", read_segment, lambda: [golden("segment_flat"), golden("segment_flat_ids")], mutate=mutated_object)
QUANTISED = Target("quantised", "quantised segments", read_segment, lambda: [golden("segment_quantised")], mutate=mutated_object)


def read_codec(data: bytes) -> bool:
    def read(data: bytes) -> bool:
        accepted, ref = stored(lambda: codec_object.describe_codec(data, "x", name="x"))
        if not accepted:
            return False
        codec = codec_object.read_codec(data, name="x", ref=ref)
        again, _ = codec_object.write_codec(codec, "x", n_tokens_trained=ref.n_tokens_trained)
        twice, _ = codec_object.write_codec(codec_object.read_codec(again, name="x"), "x", n_tokens_trained=ref.n_tokens_trained)
        is_equal(bytes(twice), bytes(again), "codec")
        start, end = codec_object.head_range(ref)
        codec_object.read_head(ref, data[start:end], name="x")
        cells = np.arange(ref.n_cells)
        blocks = [data[first:last] for first, last in codec_object.cell_ranges(ref, cells)]
        codec_object.read_cells(ref, cells, blocks, name="x")
        return True

    return both(data, read)


CODEC = Target("codec", "codecs", read_codec, lambda: [golden("codec")], mutate=mutated_object)


def flips(name: str) -> tuple[bytes, Callable[[bytes], Any]]:
    """A golden object, and its reading by all that the manifest promises of it: every flipped bit must be refused."""
    current = _current()
    flat, flat_ids, quantised = current.segments
    assert quantised.tombstones is not None
    graves = quantised.tombstones
    readers: dict[str, Callable[[bytes], Any]] = {
        "manifest": lambda data: manifest.decode_manifest(data, name="x"),
        "codec": lambda data: codec_object.read_codec(data, name="x", ref=current.codecs[0]),
        "segment_flat": lambda data: verify_segment(data, flat, None, 10, name="x"),
        "segment_flat_ids": lambda data: verify_segment(data, flat_ids, None, 10, name="x"),
        "segment_quantised": lambda data: verify_segment(data, quantised, current.codecs[0], 10, name="x"),
        "tombstones": lambda data: tombstones.read_tombstones(data, graves, 5, name="x"),
        "patch": lambda data: patch.read_patch(data, quantised.patches[0], 5, name="x"),
        "pin": lambda data: markers.read_marker(data, markers.Pin, name="x"),
        "build": lambda data: markers.read_marker(data, markers.BuildProgress, name="x"),
    }
    return golden(name), readers[name]
