"""Which tokens of a document are worth exact arithmetic.

A token can only matter if it is the best of its document for some query token, and its centroid says roughly how good it is: so a document has a
*floor* per query token (a lane, uint8), and a token is selected if its centroid's lanes reach the floor anywhere. maxsim.py chooses the floors.

Documents are looked at as a rectangle, as wide as the longest of them: copying `width` codes from the start of each is much cheaper than gathering
exactly its own, and documents come sorted by length, so little is wasted.

        codes_by_position (L, n)          a column is a document, so floors (n, width) are compared with a whole
        position 0   c c c c c            row of documents in one contiguous pass
        position 1   c c c c .
        position 2   c c . . .            . is some other document's code and masked out
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.scoring.arrays import Records
from engine.scoring.centroid_scores import CentroidScores
from engine.scoring.scratch import scratch

RECTANGLE_TOKENS = 16_384
"""Tokens looked at together: their lanes take half a MiB of a 2 MiB L2 cache."""
QUAD = 4
"""A document's selected tokens are filled up to a multiple of this, so that most of a segmented maximum can be done on whole planes (maxsim.py)."""


@dataclass(frozen=True)
class Selection:
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


def select_tokens(
    scores: CentroidScores,
    records: Records,
    ordinals: np.ndarray,
    floors: np.ndarray | None = None,
    below: np.ndarray | None = None,
    reach: np.ndarray | None = None,
) -> Selection:
    """Select the tokens whose lanes reach the floor of their document for any query token, and not `below` for any.

    ordinals       int64 (n,), best by falling number of tokens
    floors, below  uint8 (G, n, width) as CentroidScores.lanes, padding columns 255; no floors select all, no `below` excludes none.
                   Tokens of unknown codes are never selected.
    reach          uint8 (G, 256, width): added to the lanes of a token by its second scalar before they are compared with the floor: a token
                   far from its centroid may be much better than it. None adds nothing.

    Cost: about 7 ns per token of the documents, and 8 per token selected.
    """
    parts = []
    for first, last in rectangles(records.n_tokens[ordinals]):
        part = slice(first, last)
        rectangle = _Rectangle(records, ordinals[part])
        keep = rectangle.inside
        if floors is not None:
            reached = _reaching(scores, rectangle, floors[:, part], None if below is None else below[:, part], reach)
            keep = reached if keep is None else np.logical_and(reached, keep, out=reached)
        if scores.known is not None:
            known = np.take(scores.known, rectangle.codes_by_position, mode="clip")
            keep = known if keep is None else known & keep
        parts.append(rectangle.selection(keep))
    if len(parts) == 1:
        return parts[0]
    if not parts:
        empty = np.empty(0, dtype=np.int64)
        return Selection(empty, empty, np.empty(0, dtype=np.uint16), empty, 0)
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "scalars", "codes", "counts"))
    return Selection(*joined, sum(part.n_tokens for part in parts))


def best_lanes(scores: CentroidScores, records: Records, ordinals: np.ndarray) -> np.ndarray:
    """What centroid_maxsim gives as lanes, uint8 (G, n, width), from the records' codes instead of a Forward; unknown codes count as 0.

    Cost: 3 ns per token and group of 32 query tokens.
    """
    lanes = np.zeros((len(scores.lanes), len(ordinals), scores.width), dtype=np.uint8)
    for first, last in rectangles(records.n_tokens[ordinals]):
        rectangle = _Rectangle(records, ordinals[first:last])
        if not rectangle.width:
            continue
        for group in range(len(scores.lanes)):
            rows = rectangle.lanes(scores, group)
            if rectangle.inside is not None:
                rows[~rectangle.inside] = 0
            lanes[group, first:last] = rows.max(axis=0)
    return lanes


def rectangles(n_tokens: np.ndarray) -> list[tuple[int, int]]:
    """Cut documents (int64 (n,) tokens each) into runs whose rectangle has at most RECTANGLE_TOKENS places, one document at least."""
    blocks, first, widest = [], 0, 0
    for place, n in enumerate(n_tokens.tolist()):
        widest = max(widest, n)
        if place > first and widest * (place + 1 - first) > RECTANGLE_TOKENS:
            blocks.append((first, place))
            first, widest = place, n
    if len(n_tokens):
        blocks.append((first, len(n_tokens)))
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
        room = len(records.codes) - width  # a window that began later would leave the array
        latest = np.minimum(begins, room)
        self.shift = begins - latest
        strides = (records.codes.strides[0],) * 2
        windows = np.ndarray((room + 1, width), records.codes.dtype, buffer=records.codes, strides=strides)
        self.codes_by_document = windows[latest]
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

    def add_reach(self, rows: np.ndarray, reach: np.ndarray) -> None:
        """Add reach[second scalar], uint8 (256, width), to the lanes of every place, stopping at 255."""
        first = self.records.scalar_start[self.ordinals] - self.shift
        places = np.arange(self.width)[:, None] + first
        by_position = np.take(self.records.scalars.reshape(-1), 2 * places + 1, mode="clip")
        added = scratch("selection.reach", rows.shape, np.uint8)
        np.take(reach, by_position, axis=0, out=added, mode="clip")
        np.add(rows, added, out=rows)
        np.maximum(rows, np.subtract(0, np.less(rows, added), dtype=np.uint8), out=rows)

    def selection(self, keep: np.ndarray | None) -> Selection:
        """Turn flags bool (L, n) into a Selection; None keeps every place."""
        n_documents = len(self.ordinals)
        if keep is None:
            counts = np.full(n_documents, self.width, dtype=np.int64)
            places = np.arange(n_documents * self.width)
        else:
            places = np.flatnonzero(keep.T)
            counts = np.bincount(places // self.width, minlength=n_documents) if self.width else np.zeros(n_documents, np.int64)
        repeats = -counts % QUAD
        padded = counts + repeats
        if repeats.any():
            times = np.ones(len(places), dtype=np.int64)
            times[(np.cumsum(counts) - 1)[repeats > 0]] += repeats[repeats > 0]
            n_tokens, places = len(places), np.repeat(places, times)
        else:
            n_tokens = len(places)
        first_place = np.arange(n_documents) * self.width + self.shift
        rows = places + np.repeat(self.records.residual_start[self.ordinals] - first_place, padded)
        scalars = places + np.repeat(self.records.scalar_start[self.ordinals] - first_place, padded)
        codes = np.take(self.codes_by_document.reshape(-1), places, mode="clip")
        return Selection(rows, scalars, codes, padded, n_tokens)


def _reaching(
    scores: CentroidScores, rectangle: _Rectangle, floors: np.ndarray, below: np.ndarray | None, reach: np.ndarray | None
) -> np.ndarray:
    """bool (L, n): whether any lane of a place reaches its document's floor, and none reaches `below`."""
    keep: np.ndarray | None = None
    drop: np.ndarray | None = None
    for group in range(len(scores.lanes)):
        rows = rectangle.lanes(scores, group)
        if below is not None:
            above = _any_lane(rows, below[group])
            drop = above if drop is None else np.logical_or(drop, above, out=drop)
        if reach is not None:
            rectangle.add_reach(rows, reach[group])
        reached = _any_lane(rows, floors[group])
        keep = reached if keep is None else np.logical_or(keep, reached, out=keep)
    assert keep is not None
    return keep if drop is None else np.greater(keep, drop, out=keep)


def _any_lane(rows: np.ndarray, floors: np.ndarray) -> np.ndarray:
    """bool (L, n): rows uint8 (L, n, width) >= floors (n, width) in any lane. Sixteen or 32 flags become one integer through packbits."""
    flags = scratch("selection.flags", rows.shape, np.bool_)
    np.greater_equal(rows.reshape(len(rows), -1), floors.reshape(1, -1), out=flags.reshape(len(rows), -1))
    packed = np.packbits(flags.reshape(-1)).view(np.uint16 if rows.shape[2] == 16 else np.uint32)
    any_lane: np.ndarray = packed.reshape(rows.shape[:2]) != 0
    return any_lane
