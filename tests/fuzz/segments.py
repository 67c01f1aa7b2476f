"""Segments that are changed behind their checksums (changes.py), read, and then searched (arena.py)."""

from __future__ import annotations

import numpy as np

from engine.format import segment
from engine.format.envelope import Section
from engine.format.manifest import CodecRef, SegmentRef
from engine.format.verify import verify_segment

from .arena import MUTANT, SHAPES, Arena, arena, check_scores, home_of, searched
from .changes import FLAT_CHANGES, QUANTISED_CHANGES, mutation
from .objects import both, golden
from .target import Target, Wrong, is_equal, stored


def read_segment(data: bytes) -> bool:
    """By its own description, as repair reads it; if the manifest's rules let that pass, in every way in which it is searched."""
    return both(data, _described_and_searched)


def _described_and_searched(data: bytes) -> bool:
    accepted, ref = stored(lambda: segment.describe(data, MUTANT, name="x"))
    if not accepted:
        return False
    if ref.kind == "flat":
        dim = max(1, ref.section(Section.TOKENS).length // 2 // max(1, ref.n_tokens)) if _has(ref, Section.TOKENS) else 1
        home = next((found for found in (arena(name, False) for name in SHAPES) if found.manifest.dim == dim), arena("narrow", False))
        return _taken(home, ref, data, None)
    home = home_of(ref.codec)
    return home is not None and _taken(home, ref, data, home.manifest.codecs[0])


def _has(ref: SegmentRef, section: int) -> bool:
    return any(one.id == section for one in ref.sections)


def _taken(home: Arena, ref: SegmentRef, data: bytes, codec: CodecRef | None) -> bool:
    """Searched; what deep verification passes must be taken by every search, with the scores of its tokens."""
    taken = searched(home, ref, data, codec, home.codec if codec else b"")
    if not taken:
        return False
    verified, _ = stored(lambda: verify_segment(data, ref, codec, home.manifest.dim or 1, name="x"))
    if verified:
        if not all(taken.values()):
            raise Wrong(f"deep verification passes what is refused: {taken}")
        check_scores(home, ref, data, codec)
        if ref.kind == "flat":
            _check_written_again(ref, data, home.manifest.dim or 1)
    return any(taken[way] for way in taken if way != "lookups")


def _check_written_again(ref: SegmentRef, data: bytes, dim: int) -> None:
    flat = segment.read_flat(ref, data, dim, name="x")
    n = ref.n_documents
    keys = flat.keys.by_ordinal(n) if flat.keys else None
    counted = np.array_equal(flat.ids, ref.base + np.arange(n))
    made = segment.write_flat(
        ref.id, flat.tokens, flat.offsets, blobs=list(flat.blobs or ()), keys=keys, ids=None if counted else flat.ids, base=ref.base
    )
    twice = segment.read_flat(made.ref, made.data, dim, name="x")
    is_equal(twice.tokens.tobytes(), flat.tokens.tobytes(), "tokens")
    is_equal((twice.offsets.tolist(), twice.ids.tolist()), (flat.offsets.tolist(), flat.ids.tolist()), "documents")
    is_equal(twice.keys.by_ordinal(n) if twice.keys else None, keys if keys and any(keys) else None, "keys")


FLAT = Target(
    "flat",
    "flat segments, read and searched",
    read_segment,
    lambda: [golden("segment_flat"), golden("segment_flat_ids"), *(arena(name, False).segment for name in SHAPES)],
    mutate=mutation(FLAT_CHANGES),
)
QUANTISED = Target(
    "quantised",
    "quantised segments, read and searched",
    read_segment,
    lambda: [golden("segment_quantised"), *(arena(name).segment for name in SHAPES)],
    mutate=mutation(QUANTISED_CHANGES),
)
