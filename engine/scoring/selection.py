"""Which tokens of a document are worth exact arithmetic.

A token can only matter if it is the best of its document for some query token, and its centroid says roughly how good it is. So a document gets a *floor* per query
token, a lane (uint8), and the tokens whose centroid reaches the floor anywhere are selected. maxsim.py chooses the floors.

Documents are looked at as a rectangle, as wide as the longest of them: copying `width` codes from the start of each is much cheaper than gathering
exactly its own, and documents come sorted by length, so little is wasted.

        codes_by_position (L, n)          a column is a document, so floors (n, width) are compared with a whole
        position 0   c c c c c            row of documents in one contiguous pass
        position 1   c c c c .
        position 2   c c . . .            . is some other document's code and masked out
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from engine.scoring.arrays import Records
from engine.scoring.centroid_scores import CentroidScores
from engine.scoring.scratch import scratch

RECTANGLE_TOKENS = 32_768
"""Tokens looked at together: their lanes take half of a 2 MiB L2 cache. Half as many cost 5 % more, for the calls; twice as many save nothing."""
QUAD = 4
"""A document's selected tokens are filled up to a multiple of this, so that most of a segmented maximum can be done on whole planes (maxsim.py)."""
HASH_MASK = (1 << 16) - 1
"""Slots of one_per_code's table, minus one: ten times the tokens of a rectangle that come through a first look."""
HASH_FACTOR = 2_654_435_761
"""Knuth's multiplier, 2^32 / golden ratio: spreads neighbouring codes and documents over the slots."""


class Selection(msgspec.Struct, frozen=True):
    """Selected tokens, document after document, each document's last token repeated up to a multiple of QUAD.

    rows, scalars  int64 (t,): where their residual rows and scalars stand in Records
    codes          uint16 (t,)
    counts         int64 (n,): places taken by each document, a multiple of QUAD, 0 allowed
    n_tokens       tokens without the repeats
    """

    rows: np.ndarray
    scalars: np.ndarray
    codes: np.ndarray
    counts: np.ndarray
    n_tokens: int


def all_tokens(scores: CentroidScores, records: Records, ordinals: np.ndarray) -> Selection:
    """Select every token of known code. ordinals int64 (n,), best by falling number of tokens."""
    parts = []
    for rectangle, _ in _rectangles(records, ordinals):
        keep = rectangle.inside
        if scores.known is not None:
            known = np.take(scores.known, rectangle.codes_by_position, mode="clip")
            keep = known if keep is None else known & keep
        parts.append(rectangle.selection(rectangle.places(keep)))
    return _joined(parts)


def first_tokens(scores: CentroidScores, records: Records, ordinals: np.ndarray, lanes: np.ndarray) -> Selection:
    """Select the tokens whose centroid is the document's best for some query token; of equal codes in a document the last token only.

    ordinals  int64 (n,), best by falling number of tokens
    lanes     uint8 (G, n, width) of centroid_maxsim, padding columns 255

    Tokens of one code in one document are mostly the same word again: measured on SciFact, leaving all but one out halves the tokens and makes
    the score's error a quarter larger. Cost: about 7 ns per token of the documents, 30 per token selected.
    """
    parts = []
    for rectangle, part in _rectangles(records, ordinals):
        places = rectangle.places(rectangle.reaching(scores, lanes[:, part]))
        parts.append(rectangle.selection(rectangle.one_per_code(places, certain=False)))
    return _joined(parts)


def second_tokens(
    scores: CentroidScores, records: Records, ordinals: np.ndarray, lanes: np.ndarray, floors: np.ndarray, reach: np.ndarray
) -> Selection:
    """Select the tokens that first_tokens left out and that may reach the floor of their document for some query token.

    lanes   as for first_tokens
    floors  uint8 (G, n, width), padding columns 255
    reach   uint8 (G, 256, width), at most 255 - TOP_LANE: added to the lanes of a token, by its second scalar, before they are compared with the
            floor: a token far from its centroid may be much better than it. Padding columns 0

    Cost: about 15 ns per token of the documents, 10 per token selected.
    """
    parts = []
    for rectangle, part in _rectangles(records, ordinals):
        seen = rectangle.one_per_code(rectangle.places(rectangle.reaching(scores, lanes[:, part])), certain=True)
        keep = rectangle.reaching(scores, floors[:, part], reach)
        parts.append(rectangle.selection(rectangle.places(keep, without=seen)))
    return _joined(parts)


def _joined(parts: list[Selection]) -> Selection:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        empty = np.empty(0, dtype=np.int64)
        return Selection(empty, empty, np.empty(0, dtype=np.uint16), empty, 0)
    return Selection(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.scalars for part in parts]),
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.counts for part in parts]),
        sum(part.n_tokens for part in parts),
    )


def best_lanes(scores: CentroidScores, records: Records, ordinals: np.ndarray) -> np.ndarray:
    """What centroid_maxsim gives as lanes, uint8 (G, n, width), from the records' codes instead of a Forward; unknown codes count as 0.

    Cost: 3 ns per token and group of 32 query tokens.
    """
    lanes = np.zeros((len(scores.lanes), len(ordinals), scores.width), dtype=np.uint8)
    for rectangle, part in _rectangles(records, ordinals):
        for group in range(len(scores.lanes) if rectangle.width else 0):
            rows = rectangle.lanes(scores, group)
            if rectangle.inside is not None:
                rows[~rectangle.inside] = 0
            lanes[group, part] = rows.max(axis=0)
    return lanes


def _rectangles(records: Records, ordinals: np.ndarray) -> Iterator[tuple[_Rectangle, slice]]:
    """The documents as rectangles of bounded size, and which of the ordinals each holds."""
    for first, last in _cuts(records.n_tokens[ordinals]):
        yield _Rectangle(records, ordinals[first:last]), slice(first, last)


def _cuts(n_tokens: np.ndarray) -> list[tuple[int, int]]:
    """Cut documents (int64 (n,) tokens each, best falling) into runs whose rectangle has at most RECTANGLE_TOKENS places, one document at least."""
    widest_of_rest = np.maximum.accumulate(n_tokens[::-1])[::-1]
    blocks, first = [], 0
    while first < len(n_tokens):
        last = min(len(n_tokens), first + max(1, RECTANGLE_TOKENS // max(1, int(widest_of_rest[first]))))
        blocks.append((first, last))
        first = last
    return blocks


class _Rectangle:
    """The codes of some documents, position by position.

    width              L, the most tokens of any of them
    shift              int64 (n,): where a document's first token stands in its column, 0 except near the end of the codes array
    codes_by_document  uint16 (n, L), codes_by_position  uint16 (L, n)
    inside             bool (L, n): which places are tokens of the document; None means all
    """

    def __init__(self, records: Records, ordinals: np.ndarray) -> None:
        self.records, self.ordinals = records, ordinals
        n_tokens = records.n_tokens[ordinals]
        width = self.width = int(n_tokens.max(initial=0))
        begins = records.code_start[ordinals]
        inner = np.minimum(begins, len(records.codes) - width)  # a window that began later would leave the array
        self.shift = begins - inner
        self.codes_by_document = _windows(records.codes, inner, width)
        self.codes_by_position = np.ascontiguousarray(self.codes_by_document.T)
        self.inside: np.ndarray | None = None
        if int(n_tokens.sum()) < width * len(ordinals):
            position = np.arange(width, dtype=np.int32)[:, None]
            self.inside = position < (self.shift + n_tokens).astype(np.int32)
            if self.shift.any():
                self.inside &= position >= self.shift.astype(np.int32)

    def lanes(self, scores: CentroidScores, group: int) -> np.ndarray:
        """The lanes of every place, uint8 (L, n, width), in scratch memory."""
        rows = scratch("selection.lanes", (*self.codes_by_position.shape, scores.width), np.uint8)
        np.take(scores.lanes[group], self.codes_by_position, axis=0, out=rows, mode="clip")
        return rows

    def reaching(self, scores: CentroidScores, floors: np.ndarray, reach: np.ndarray | None = None) -> np.ndarray:
        """bool (L, n): whether any lane of a place, plus its reach, is at least its document's floor, uint8 (G, n, width). False for unknown codes."""
        keep = np.zeros(self.codes_by_position.shape, dtype=bool)
        scales = np.empty(0, dtype=np.uint8) if reach is None else self._scales_by_position()
        for group in range(len(scores.lanes)):
            rows = self.lanes(scores, group)
            if reach is not None:
                added = scratch("selection.reach", rows.shape, np.uint8)
                np.take(reach[group], scales, axis=0, out=added, mode="clip")
                np.add(rows, added, out=rows)
            keep |= _any_lane(rows, floors[group])
        if scores.known is not None:
            keep &= np.take(scores.known, self.codes_by_position, mode="clip")
        return keep

    def _scales_by_position(self) -> np.ndarray:
        """The second scalar of every place, uint8 (L, n); rubbish outside documents."""
        pairs = self.records.scalars.view("<u2").reshape(-1)
        begins = self.records.scalar_start[self.ordinals] - self.shift
        inner = np.clip(begins, 0, max(len(pairs) - self.width, 0))
        if (inner == begins).all():
            windows = _windows(pairs, begins, self.width)
        else:
            windows = np.take(pairs, begins[:, None] + np.arange(self.width), mode="clip")
        return np.ascontiguousarray((windows >> 8).astype(np.uint8).T)

    def places(self, keep: np.ndarray | None, without: np.ndarray | None = None) -> np.ndarray:
        """Flags bool (L, n), None for all, to places int64 (m,), rising: document * L + position. Places outside documents, and `without`, are left out."""
        if keep is None:
            return np.arange(len(self.ordinals) * self.width)
        if self.inside is not None:
            keep = keep & self.inside
        by_document = np.ascontiguousarray(keep.T).reshape(-1)
        if without is not None:
            by_document[without] = False
        return np.flatnonzero(by_document)

    def one_per_code(self, places: np.ndarray, certain: bool) -> np.ndarray:
        """Leave out places whose document has a later place of the same code.

        certain  which way to err: False may keep a place too many, True returns only places that are surely the last of their document and code

        Every place writes its number into a hash table, and the last writer of a slot stays in it. Who finds another place of its own document and code there
        was not the last; who finds a different key there cannot tell.
        """
        codes = np.take(self.codes_by_document.reshape(-1), places, mode="clip")
        keys = (places // max(self.width, 1)) << 16 | codes
        slots = (keys * HASH_FACTOR) >> 20 & HASH_MASK
        numbers = np.arange(len(places), dtype=np.int32)
        table = scratch("selection.hash", (HASH_MASK + 1,), np.int32)
        table[slots] = numbers
        winners = np.take(table, slots)
        last = winners == numbers
        return np.asarray(places[last if certain else last | (np.take(keys, winners) != keys)])

    def selection(self, places: np.ndarray) -> Selection:
        """Turn places into a Selection."""
        n_documents = len(self.ordinals)
        counts = np.bincount(places // max(self.width, 1), minlength=n_documents)
        repeats = -counts % QUAD
        padded = counts + repeats
        n_tokens = len(places)
        if repeats.any():
            times = np.ones(n_tokens, dtype=np.int64)
            times[(np.cumsum(counts) - 1)[repeats > 0]] += repeats[repeats > 0]
            places = np.repeat(places, times)
        first_place = np.arange(n_documents) * self.width + self.shift
        rows = places + np.repeat(self.records.residual_start[self.ordinals] - first_place, padded)
        scalars = places + np.repeat(self.records.scalar_start[self.ordinals] - first_place, padded)
        codes = np.take(self.codes_by_document.reshape(-1), places, mode="clip")
        return Selection(rows, scalars, codes, padded, n_tokens)


def _windows(flat: np.ndarray, begins: np.ndarray, width: int) -> np.ndarray:
    """Copies of flat[begin : begin + width]: (n, width). Every window must lie inside; flat is contiguous."""
    item = flat.itemsize
    windows = np.ndarray((len(flat) - width + 1, width), flat.dtype, buffer=flat, strides=(item, item))
    return np.asarray(windows[begins])


def _any_lane(rows: np.ndarray, floors: np.ndarray) -> np.ndarray:
    """bool (L, n): rows uint8 (L, n, width) >= floors (n, width) in any lane. Sixteen or 32 flags become one integer through packbits."""
    flags = scratch("selection.flags", rows.shape, np.bool_)
    np.greater_equal(rows.reshape(len(rows), -1), floors.reshape(1, -1), out=flags.reshape(len(rows), -1))
    packed = np.packbits(flags.reshape(-1)).view(np.uint16 if rows.shape[2] == 16 else np.uint32)
    any_lane: np.ndarray = packed.reshape(rows.shape[:2]) != 0
    return any_lane
