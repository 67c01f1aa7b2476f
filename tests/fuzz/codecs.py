"""Codecs that are changed behind their checksums, read, and used to search sound segments."""

from __future__ import annotations

import msgspec
import numpy as np

from engine.format import codec_object, envelope
from engine.format.envelope import Kind, Section

from .arena import SHAPES, Arena, arena, searched
from .changes import CODEC_CHANGES, mutation
from .objects import both, golden
from .target import Target, is_equal, stored


def read_codec(data: bytes) -> bool:
    """Whole, in parts as a cold query reads it, written again; and by searches of a sound segment of its arena."""
    return both(data, lambda data: any([_read_codec(data), _searched_with(data)]))


def _read_codec(data: bytes) -> bool:
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


def _searched_with(data: bytes) -> bool:
    return any(any(searches_with(home, data).values()) for home in map(arena, SHAPES))


def searches_with(home: Arena, data: bytes) -> dict[str, bool]:
    """Which searches of an arena's segment a codec lets through, by a reference whose checksums fit whatever it holds: a forged manifest's.

    Empty if its shape is another than the arena's.
    """
    accepted, found = stored(lambda: envelope.parse(data, name="x", kind=Kind.CODEC))
    ref = home.manifest.codecs[0]
    if not accepted:
        return {}
    header, parts = found
    if len(parts.get(Section.ROTATION, b"")) != 4 * ref.dim**2 or len(parts.get(Section.LEVELS, b"")) != 4 << ref.nbits:
        return {}
    forged = msgspec.structs.replace(
        ref,
        size_bytes=len(data),
        sections=header.sections,
        centroid_checksums=bytes(parts.get(Section.CENTROID_CHECKSUMS, b"")),
        cell_offsets=bytes(parts.get(Section.CELL_OFFSETS, b"")),
    )
    return searched(home, home.manifest.segments[0], home.segment, forged, data)


CODEC = Target(
    "codec", "codecs, read and searched with", read_codec, lambda: [golden("codec"), *(arena(name).codec for name in SHAPES)], mutate=mutation(CODEC_CHANGES)
)  # fmt: skip
