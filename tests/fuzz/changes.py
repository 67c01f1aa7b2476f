"""Changes of segments and codecs behind their checksums.

A change of bytes never gets past a checksum, so most changes here are of what the bytes mean: numbers of a section, one record, one
posting list, in an object that is then laid out, summed and sealed as by a writer that is wrong (sealing.py).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec
import numpy as np

from engine.codec.bitpack import row_bytes
from engine.format import envelope, segment
from engine.format.envelope import Section
from engine.format.fields import encode_fields
from engine.format.keys import build_keys
from engine.format.postings import _write_block, build_postings, write_postings
from engine.format.records import records_of_tokens

from .arena import home_of
from .mutation import changed, mutated
from .sealing import Contents, cut_records, with_sections

Change = Callable[[Contents, Random], None]
_EDGES = (0, 1, 2, 3, 24, 239, 240, 254, 255, 4079, 4080, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_HALVES = (0x0000, 0x8000, 0x0001, 0x03FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFE00)
"""float16 by its bits: zeros, denormal numbers, the largest, infinities, no numbers."""
_FLOATS = (0.0, -0.0, 1e-45, -1e-40, 1e-38, 1e6, -1e6, 1.0001e6, 3e38, float("inf"), -float("inf"), float("nan"))


# Numbers in sections


def _array(contents: Contents, section: int, dtype: str) -> np.ndarray:
    width = np.dtype(dtype).itemsize
    data = contents.get(section, b"")
    return np.frombuffer(data[: len(data) // width * width], dtype).copy()


def _set_numbers(contents: Contents, section: int, dtype: str, rng: Random, edges: Sequence[Any]) -> None:
    """One to three elements of a section: an edge, a neighbour, another's value, all the same, two exchanged."""
    values = _array(contents, section, dtype)
    if not len(values):
        return
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, other, kind = rng.randrange(len(values)), rng.randrange(len(values)), rng.randrange(6)
        with np.errstate(all="ignore"):
            if kind == 0:
                values[at] = np.array(rng.choice(edges)).astype(dtype)
            elif kind == 1:
                values[at] += np.array(rng.choice((1, -1, 8, -8))).astype(dtype)
            elif kind == 2:
                values[at] = values[other]
            elif kind == 3:
                values[at], values[other] = values[other], values[at]
            elif kind == 4:
                values[at:] = values[at]
            else:
                values = np.sort(values) if rng.random() < 0.5 else values[::-1].copy()
    contents[section] = values.tobytes()


def _numbers(section: int, dtype: str, edges: Sequence[Any] = _EDGES) -> Change:
    def change(contents: Contents, rng: Random) -> None:
        _set_numbers(contents, section, dtype, rng, edges)

    return change


_IDS = (*_EDGES, -1, -(1 << 31), -(1 << 63), (1 << 62) - 1, (1 << 63) - 1)


def _meta(contents: Contents, rng: Random) -> None:
    try:
        tree = msgspec.msgpack.decode(contents[Section.META])
        contents[Section.META] = msgspec.msgpack.encode(changed(tree, rng))
    except (msgspec.MsgspecError, ValueError, KeyError, OverflowError, RecursionError):
        return


def _bytes(contents: Contents, rng: Random) -> None:
    section = rng.choice(sorted(contents))
    contents[section] = mutated(contents[section], rng, list(contents.values()))


def _sections(contents: Contents, rng: Random) -> None:
    """One section gone, another in its place, last, or of another number."""
    section, other = rng.choice(sorted(contents)), rng.choice(sorted(contents))
    kind = rng.randrange(5)
    if kind == 0:
        del contents[section]
    elif kind == 1:
        contents[section] = contents[other]
    elif kind == 2:
        contents[section] = contents.pop(section)
    elif kind == 3:
        contents[rng.choice((Section.KEYS, Section.IDS, envelope.OPTIONAL, envelope.OPTIONAL + 7, 60))] = contents[section]
    else:
        contents[section] = b""


def _keys(contents: Contents, rng: Random) -> None:
    """Other keys for the same documents, or none for some; or numbers of the section."""
    n = len(contents.get(Section.LENGTHS, b"")) // 4 or len(contents.get(Section.SIZES, b"")) // 8
    if rng.random() < 0.5 or not n:
        return _set_numbers(contents, Section.KEYS, "<u4", rng, _EDGES)
    texts = ["", "key1", "é" * 9, "\0", "a" * 300, None, None]
    made: list[str | None] = [f"{rng.choice(texts)}{number}" if rng.random() < 0.8 else None for number in range(n)]
    section = build_keys(made)
    if section is not None:
        contents[Section.KEYS] = section


# Quantised: records


def _change_records(contents: Contents, change: Callable[[list[bytes], np.ndarray], None]) -> None:
    """Records cut, changed, joined; their sizes as they are afterwards in the pairs, uint32 (N, 2)."""
    pairs = _array(contents, Section.SIZES, "<u4")
    pairs = pairs[: len(pairs) // 2 * 2].reshape(-1, 2)
    pieces = cut_records(contents)
    change(pieces, pairs)
    contents[Section.RECORDS] = b"".join(pieces)
    contents[Section.SIZES] = pairs.tobytes()


def _record_bytes(contents: Contents, rng: Random) -> None:
    """Codes, scalars, fields, residuals of one record: any bytes in the same number."""

    def change(pieces: list[bytes], pairs: np.ndarray) -> None:
        at = rng.randrange(len(pieces))
        record = bytearray(pieces[at])
        for _ in range(rng.choice((1, 2, 8))):
            start, length = rng.randrange(len(record) + 1), rng.choice((1, 2, 4, 16, 64))
            filling = rng.choice((b"\0", b"\xff", b"\x80", b"\x7f", rng.randbytes(1))) * length
            record[start : start + length] = filling[: max(0, len(record) - start)]
        pieces[at] = bytes(record)

    _change_records(contents, change)


def _record_head(contents: Contents, rng: Random) -> None:
    """id, tokens or bytes of fields of one record, as it says itself."""

    def change(pieces: list[bytes], pairs: np.ndarray) -> None:
        at = rng.randrange(len(pieces))
        if len(pieces[at]) < 24:
            return
        record, kind = bytearray(pieces[at]), rng.randrange(3)
        if kind == 0:
            struct.pack_into("<q", record, 8, rng.choice(_IDS))
        else:
            struct.pack_into("<I", record, 12 + 4 * kind, rng.choice(_EDGES))
        pieces[at] = bytes(record)

    _change_records(contents, change)


def _record_places(contents: Contents, rng: Random) -> None:
    """Two records exchanged, one twice, one gone, longer, shorter; the sizes follow or do not."""

    def change(pieces: list[bytes], pairs: np.ndarray) -> None:
        if not len(pairs):
            return
        one, two, kind = rng.randrange(len(pairs)), rng.randrange(len(pairs)), rng.randrange(5)
        if kind == 0:
            pieces[one], pieces[two] = pieces[two], pieces[one]
        elif kind == 1:
            pieces[one] = pieces[two]
        elif kind == 2:
            pieces[one] = b""
        elif kind == 3:
            pieces[one] += bytes(rng.choice((1, 8, 64)))
        else:
            pieces[one] = pieces[one][: -rng.choice((1, 8, 24, 64))]
        if rng.random() < 0.8:
            pairs[:, 1] = [len(piece) for piece in pieces[: len(pairs)]]
        if rng.random() < 0.3:
            pairs[one, 0] = rng.choice(_EDGES)

    _change_records(contents, change)


def _codes(contents: Contents, rng: Random) -> None:
    """Codes of one record: of no centroid, or of others than the posting lists say."""

    def change(pieces: list[bytes], pairs: np.ndarray) -> None:
        at = rng.randrange(max(1, len(pairs)))
        n_tokens = int(pairs[at, 0]) if len(pairs) else 0
        if not 0 < 2 * n_tokens <= len(pieces[at]) - 24:
            return
        record, top = bytearray(pieces[at]), rng.choice((2, 121, 0xFFFF))
        for token in range(n_tokens) if rng.random() < 0.5 else [rng.randrange(n_tokens)]:
            struct.pack_into("<H", record, 24 + 2 * token, rng.randrange(top + 1))
        pieces[at] = bytes(record)

    _change_records(contents, change)


# Quantised: posting lists


def _lists(contents: Contents, rng: Random) -> None:
    """The numbers of one block: counts and gaps, changed, and written again as a block of these numbers."""
    ends = _array(contents, Section.POSTING_CELLS, "<u4").astype(np.int64)
    if len(ends) < 2:
        return
    blocks = [contents[Section.POSTINGS][first:last] for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    at = rng.randrange(len(blocks))
    if len(blocks[at]) >= 8:
        blocks[at] = mutated(blocks[at], rng) if rng.random() < 0.2 else _other_numbers(blocks[at], rng)
    contents[Section.POSTINGS] = b"".join(blocks)
    if rng.random() < 0.9:
        contents[Section.POSTING_CELLS] = np.cumsum([0, *map(len, blocks)]).astype("<u4").tobytes()


def _other_numbers(block: bytes, rng: Random) -> bytes:
    (n_postings,) = struct.unpack_from("<I", block)
    heads = np.frombuffer(block, np.uint8, min(len(block) - 4, 4096), 4).astype(np.int64)
    n_codes = max(0, len(heads) - n_postings)
    counts, gaps = heads[:n_codes].copy(), heads[n_codes:].copy()
    for values in (counts, gaps):
        if len(values) and rng.random() < 0.6:
            values[rng.randrange(len(values))] = rng.choice(_EDGES[:15])
    kind = rng.randrange(4)
    if kind == 0 and len(counts):
        counts[:] = 0
        counts[rng.randrange(len(counts))] = len(gaps)
    elif kind == 1:
        gaps[:] = rng.choice((0, 0, 1, 300))
    elif kind == 2:
        counts, gaps = np.zeros_like(counts), gaps[:0]
    return bytes(_write_block(counts, gaps))


def _fresh(contents: Contents, rng: Random) -> None:
    """Another sound segment of the same codec: other documents, some without tokens, one with many, two alike, some out of their cells."""
    meta = msgspec.msgpack.decode(contents[Section.META], type=segment.SegmentMeta)
    home = home_of(meta.codec)
    if home is None:
        return
    codec, draw = home.manifest.codecs[0], np.random.default_rng(rng.randrange(1 << 30))
    n = rng.choice((1, 2, 5, 40, 90))
    lengths = draw.integers(0, rng.choice((1, 3, 9)), n)
    lengths[rng.randrange(n)] = rng.choice((1, 2, 60, 1100))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    width, total = row_bytes(codec.dim, codec.nbits), int(offsets[-1])
    codes = draw.integers(0, rng.choice((1, 2, codec.n_centroids)), total).astype(np.uint16)
    scalars = draw.choice([0, 1, 128, 254, 255], (total, 2)).astype(np.uint8)
    rows = draw.integers(0, 256, (total, width)).astype(np.uint8)
    blobs = [encode_fields(f"key{number}", {"title": "x" * (number % 70)}) for number in range(n)]
    records = records_of_tokens(codes, scalars, rows, offsets, blobs)
    ids = np.sort(draw.choice(1000, n, replace=False)) if rng.random() < 0.5 else np.arange(n)
    made = segment.write_quantised(
        "x",
        [(ids, records)],
        dim=codec.dim,
        nbits=codec.nbits,
        codec_id=codec.id,
        cell_offsets=codec.cell_offsets_array(),
        keys=[f"key{number}" for number in range(n)],
    )
    _, parts = envelope.parse(made.data, name="x")
    contents.clear()
    contents.update({number: bytes(part) for number, part in parts.items()})


def _reposted(contents: Contents, rng: Random) -> None:
    """Codes changed and the posting lists made of them again: sound, if the codes are."""
    _codes(contents, rng)
    meta = msgspec.msgpack.decode(contents[Section.META], type=segment.SegmentMeta)
    home = home_of(meta.codec)
    if home is None:
        return
    codes, lengths = [np.empty(0, np.uint16)], []
    pairs = _array(contents, Section.SIZES, "<u4").reshape(-1, 2)
    for record, n_tokens in zip(cut_records(contents), pairs[:, 0].tolist(), strict=False):
        codes.append(np.frombuffer(record, "<u2", n_tokens, 24))
        lengths.append(n_tokens)
    flat, offsets, codec = np.concatenate(codes), np.cumsum([0, *lengths]), home.manifest.codecs[0]
    made = build_postings(np.minimum(flat, codec.n_centroids - 1), offsets, codec.n_centroids)
    postings, cells, checksums = write_postings(made, codec.cell_offsets_array())
    contents[Section.POSTINGS], contents[Section.POSTING_CELLS], contents[Section.POSTING_CHECKSUMS] = postings.tobytes(), cells, checksums


QUANTISED_CHANGES: tuple[Change, ...] = (
    *(
        _record_bytes,
        _record_bytes,
        _record_head,
        _record_places,
        _codes,
        _lists,
        _lists,
        _fresh,
        _reposted,
        _keys,
        _meta,
        _bytes,
        _sections,
    ),
    *(_numbers(Section.IDS, "<i8", _IDS), _numbers(Section.SIZES, "<u4"), _numbers(Section.POSTING_CELLS, "<u4")),
)
FLAT_CHANGES: tuple[Change, ...] = (
    *(_keys, _meta, _bytes, _bytes, _sections, _numbers(Section.IDS, "<i8", _IDS), _numbers(Section.LENGTHS, "<u4")),
    *(_numbers(Section.FIELD_OFFSETS, "<u8", (*_EDGES, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)), _numbers(Section.TOKENS, "<u2", _HALVES)),
)
CODEC_CHANGES: tuple[Change, ...] = (
    *(_meta, _bytes, _sections, _numbers(Section.CELL_OFFSETS, "<u4"), _numbers(Section.CENTROIDS, "<f4", _FLOATS)),
    *(_numbers(section, "<f4", _FLOATS) for section in (Section.LEVELS, Section.CUTOFFS, Section.INV_TABLE, Section.SCALE_TABLE)),
    *(_numbers(section, "<f4", _FLOATS) for section in (Section.ROTATION, Section.COARSE, Section.RESIDUAL_MOMENT)),
)


def mutation(changes: Sequence[Change]) -> Callable[[bytes, Random, Sequence[bytes], Sequence[bytes]], bytes]:
    """One change of what the object means, behind all checksums; now and then of its bytes."""

    def mutate(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
        if rng.random() < 0.1:
            return mutated(data, rng, others, tokens)
        try:
            return with_sections(data, lambda contents: rng.choice(changes)(contents, rng))
        except Exception:  # already broken
            return mutated(data, rng, others, tokens)

    return mutate
