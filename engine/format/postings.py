"""Posting lists on disk: for every code the ordinals of the documents that carry it, cell after cell.

A posting is a (code, document) pair, once however many tokens of the document carry the code. The postings section is one block per
cell of the codec, in cell order, so that a query that probes a few cells reads a few ranges, each verified by its own checksum:

    block m (the codes cell_offsets[m]:cell_offsets[m + 1], n of them; no bytes if n is 0)
        0        4      P      u32, postings in this block
        4        n + P  heads  u8, one for each of n + P numbers
                 X      tails  u8, one for each head in 240..254
                 2Y     longs  u16, one for each head that is 255

    head         number
    h < 240      h
    240..254     240 + 256 (h - 240) + the next tail
    255          4080 + the next long

    numbers      n counts: the postings of each code
                 P gaps, list after list: of a list's first posting its ordinal, of every other its ordinal minus the one before minus 1

    posting_cells      u32 (M + 1,)  byte offset of each block within the section, and its end
    posting_checksums  u64 (M,)      xxh3_64 of each block

The last two are sections of their own, and stand in the manifest too (SegmentRef).

Every number has one spelling, and lists rise whatever the bytes. FORMAT.md, Decisions, has the sizes and times of what else was tried.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from engine.errors import LimitExceeded
from engine.format.envelope import Buffer, Section, checksum, corrupt

MAX_POSTINGS_BYTES = (1 << 32) - 1
"""Offsets are u32: half the bytes in CURRENT. 65,536 documents with 300 different codes each make 24 MB."""
_TAILED, _LONG = 240, 255
"""Heads from which a tail, and a long, follows. 240 of 176, 192, ... 248 made the smallest sections on arXiv and SciFact."""
_FIRST_LONG = _TAILED + 256 * (_LONG - _TAILED)


class Postings(msgspec.Struct, frozen=True):
    """Posting lists: list i owns ordinals[offsets[i]:offsets[i + 1]] and belongs to the code codes[i].

    codes int64 (C,), offsets int64 (C + 1,), ordinals uint16 (P,). Of a whole segment codes is 0..K-1.
    """

    codes: np.ndarray
    offsets: np.ndarray
    ordinals: np.ndarray


def build_postings(codes: np.ndarray, offsets: np.ndarray, n_centroids: int) -> Postings:
    """The posting lists of a segment's documents.

    codes    uint16 (T,), of all tokens, document after document
    offsets  int64 (N + 1,), document n owns the tokens offsets[n]:offsets[n + 1]; N <= 65,536

    Cost: one sort of T 32-bit integers (code above ordinal), about 25 ns a token; 12 bytes per token of memory.
    """
    n_documents = len(offsets) - 1
    ordinals = np.repeat(np.arange(n_documents, dtype=np.uint32), np.diff(offsets))
    pairs = (codes.astype(np.uint32) << np.uint32(16)) | ordinals
    pairs.sort()
    if len(pairs):
        fresh = np.empty(len(pairs), bool)
        fresh[0] = True
        np.not_equal(pairs[1:], pairs[:-1], out=fresh[1:])
        pairs = pairs[fresh]
    counts = np.bincount(pairs >> np.uint32(16), minlength=n_centroids)
    if len(counts) > n_centroids:
        raise ValueError("a code is not below the number of centroids")
    return Postings(np.arange(n_centroids), _offsets(counts), pairs.astype(np.uint16))


def write_postings(postings: Postings, cell_offsets: np.ndarray) -> tuple[np.ndarray, bytes, bytes]:
    """The blocks of a whole segment's postings: the section as uint8, posting_cells and posting_checksums as they are stored.

    cell_offsets  int64 (M + 1,), of the codec

    Raises LimitExceeded if the section would pass MAX_POSTINGS_BYTES.
    """
    list_ends = postings.offsets[cell_offsets]
    counts, gaps = np.diff(postings.offsets), _gaps(postings)
    blocks = [
        _write_block(counts[cell_offsets[cell] : cell_offsets[cell + 1]], gaps[list_ends[cell] : list_ends[cell + 1]])
        for cell in range(len(cell_offsets) - 1)
    ]
    cells = _offsets(np.array([len(block) for block in blocks]))
    if cells[-1] > MAX_POSTINGS_BYTES:
        raise LimitExceeded("postings of a segment are too large", limit_bytes=MAX_POSTINGS_BYTES, found=int(cells[-1]))
    checksums = np.array([checksum(block) for block in blocks], "<u8")
    return np.concatenate([np.empty(0, np.uint8), *blocks]), cells.astype("<u4").tobytes(), checksums.tobytes()


def _gaps(postings: Postings) -> np.ndarray:
    """How many ordinals each posting leaves out since the one before it in its list: int32 (P,)."""
    ordinals = postings.ordinals.astype(np.int32)
    gaps = np.diff(ordinals, prepend=np.int32(-1)) - 1
    firsts = postings.offsets[:-1][np.diff(postings.offsets) > 0]
    gaps[firsts] = ordinals[firsts]
    return gaps


def _write_block(counts: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    if not len(counts):
        return np.empty(0, np.uint8)
    numbers = np.concatenate([counts, gaps])
    tailed = (numbers >= _TAILED) & (numbers < _FIRST_LONG)
    long = numbers >= _FIRST_LONG
    heads = numbers.astype(np.uint8)
    heads[tailed] = _TAILED + (numbers[tailed] - _TAILED) // 256
    heads[long] = _LONG
    tails = (numbers[tailed] - _TAILED).astype(np.uint8)
    longs = (numbers[long] - _FIRST_LONG).astype("<u2")
    return np.concatenate([np.array([len(gaps)], "<u4").view(np.uint8), heads, tails, longs.view(np.uint8)])


def read_postings(data: Buffer, cells: np.ndarray, cell_offsets: np.ndarray, n_documents: int, *, name: str) -> Postings:
    """The posting lists of a whole, verified postings section.

    cells         int64 (M + 1,), byte offsets of the blocks
    cell_offsets  int64 (M + 1,), of the codec

    Raises CorruptData if counts and lengths disagree or an ordinal is not below n_documents.
    Cost: about 9 ns a posting and 20 us a cell. Cell by cell, so that the temporaries of a block stay in the processor's cache.
    """
    view = memoryview(data)
    blocks = [view[cells[cell] : cells[cell + 1]] for cell in range(len(cells) - 1)]
    return _join(np.arange(len(blocks)), blocks, cell_offsets, n_documents, name)


def read_posting_cells(
    cells: Sequence[int] | np.ndarray,
    blocks: Sequence[Buffer],
    cell_offsets: np.ndarray,
    checksums: np.ndarray,
    n_documents: int,
    *,
    name: str,
    wanted: np.ndarray | None = None,
) -> Postings:
    """The posting lists of a few cells, from their blocks, each verified by its checksum.

    cells      the cells, in the order of `blocks`
    checksums  uint64 (M,), of all cells
    wanted     bool (K,): other lists are left empty; None wants all. Costs 2 ns a posting left out, 9 one that is wanted

    Raises CorruptData.
    """
    for cell, block in zip(cells, blocks, strict=True):
        found = checksum(memoryview(block))
        if found != checksums[cell]:
            raise corrupt(
                f"posting cell {cell} is damaged",
                name=name,
                section=Section.POSTINGS,
                expected=int(checksums[cell]),
                found=found,
                code="checksum-mismatch",
            )
    return _join(np.asarray(cells, np.int64), blocks, cell_offsets, n_documents, name, wanted)


def _join(
    cells: np.ndarray,
    blocks: Sequence[Buffer],
    cell_offsets: np.ndarray,
    n_documents: int,
    name: str,
    wanted: np.ndarray | None = None,
) -> Postings:
    counts: list[np.ndarray] = [np.empty(0, np.int32)]
    ordinals: list[np.ndarray] = [np.empty(0, np.uint16)]
    codes: list[np.ndarray] = [np.empty(0, np.int64)]
    for cell, block in zip(cells.tolist(), blocks, strict=True):
        first, last = int(cell_offsets[cell]), int(cell_offsets[cell + 1])
        numbers = _read_numbers(np.frombuffer(block, np.uint8), last - first, None if wanted is None else wanted[first:last])
        if numbers is None:
            raise corrupt(f"posting cell {cell} is cut", name=name, section=Section.POSTINGS, found=memoryview(block).nbytes)
        cell_counts, gaps = numbers[: last - first], numbers[last - first :]
        found = _read_ordinals(cell_counts, gaps, n_documents)
        if found is None:
            raise corrupt(f"posting cell {cell} is impossible", name=name, section=Section.POSTINGS, expected=f"below {n_documents}")
        counts.append(cell_counts)
        ordinals.append(found)
        codes.append(np.arange(first, last))
    return Postings(np.concatenate(codes), _offsets(np.concatenate(counts)), np.concatenate(ordinals))


def _read_numbers(block: np.ndarray, n_codes: int, wanted: np.ndarray | None = None) -> np.ndarray | None:
    """The numbers of a block, uint8 (n,): int32 (n_codes + P,), counts before gaps. None if they do not fill the block exactly.

    wanted  bool (n_codes,): lists that are not wanted get the count 0, and their gaps are left out
    """
    if not n_codes:
        return None if len(block) else np.empty(0, np.int32)
    heads_end = 4 + n_codes + (int(block[:4].view("<u4")[0]) if len(block) >= 4 else 0)
    heads = block[4:heads_end]
    more = np.flatnonzero(heads >= _TAILED)
    is_long = heads[more] == _LONG
    n_longs = int(np.count_nonzero(is_long))
    tails_end = heads_end + len(more) - n_longs
    if len(block) != tails_end + 2 * n_longs:
        return None
    rest = (heads[more].astype(np.int32) - _TAILED) * 256 + _TAILED
    rest[~is_long] += block[heads_end:tails_end]
    rest[is_long] += block[tails_end:].view("<u2")
    if wanted is not None:
        return _some_numbers(heads, more, rest, wanted)
    numbers = heads.astype(np.int32)
    numbers[more] = rest
    return numbers


def _some_numbers(heads: np.ndarray, more: np.ndarray, rest: np.ndarray, wanted: np.ndarray) -> np.ndarray | None:
    """As _read_numbers. heads uint8 (n + P,), of which heads[more] stand for the numbers `rest`. None if the lists are not P long."""
    n_codes = len(wanted)
    counts = heads[:n_codes].astype(np.int32)
    n_large = int(np.searchsorted(more, n_codes))
    counts[more[:n_large]] = rest[:n_large]
    ends = _offsets(counts) + n_codes
    if ends[-1] != len(heads):
        return None
    kept = counts[wanted]
    places = np.arange(kept.sum(dtype=np.int64)) + np.repeat(ends[:-1][wanted] - _offsets(kept)[:-1], kept)
    gaps = heads[places].astype(np.int32)
    large = np.flatnonzero(gaps >= _TAILED)
    gaps[large] = rest[np.searchsorted(more, places[large])]
    return np.concatenate([np.where(wanted, counts, 0).astype(np.int32), gaps])


def _read_ordinals(counts: np.ndarray, gaps: np.ndarray, n_documents: int) -> np.ndarray | None:
    """Running sums that begin anew with each list: uint16 (P,). None if the lists are not P long or leave the segment.

    One sum runs through the whole block; what it had reached before a list is taken off again. A list that reaches document n has
    n + 1 = the sum of its gaps, each plus 1, so the sums between lists say whether any of them goes too far.
    """
    list_ends = _offsets(counts)
    if list_ends[-1] != len(gaps):
        return None
    reached = _offsets(gaps + 1)
    before = reached[list_ends]
    if np.diff(before).max(initial=0) > n_documents:
        return None
    ordinals = reached[1:].astype(np.uint16)  # differences are right modulo 65,536 and below it
    ordinals -= np.repeat((before[:-1] + 1).astype(np.uint16), counts)
    return ordinals


def _offsets(counts: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets
