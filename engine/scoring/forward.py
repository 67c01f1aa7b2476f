"""Stage 3 of the cascade: MaxSim against centroids only, for thousands of documents, from the codes alone.

    Forward: documents by falling number of codes, codes transposed

        position    0   1   2   3        rank 0 has 4 different codes, rank 1 has 3, ranks 2 and 3 have 2
        rank 0      .   .   .   .
        rank 1      .   .   .            position j is one contiguous run over ranks 0 .. n_at[j] - 1,
        rank 2      .   .                so a step of the loop over positions is one np.take and one np.maximum
        rank 3      .   .

Only the *set* of a document's codes matters here, so a Forward comes from the postings and needs no records. Called by cascade.py and the searcher.
"""

from __future__ import annotations

import msgspec
import numpy as np

from engine.scoring.arrays import Postings
from engine.scoring.centroid_scores import CentroidScores
from engine.scoring.scratch import scratch

BLOCK_DOCUMENTS = 8192
"""Documents that walk the positions together: two blocks of 32 bytes a document and the uint8 table fit a 2 MiB L2 cache. Measured on 20,000 documents: 1024 cost
1.8 times as much, because the loop weighs more; 4096 a tenth more; 20000 the same."""
MAX_POSITIONS = 1024
"""Codes beyond this position lie apart, document by document, so that one huge document does not make everybody walk its positions."""
_EVEN_BYTES = np.uint64(0x00FF00FF00FF00FF)
_LANE_SUM = np.uint64(0x0001000100010001)


class Forward(msgspec.Struct, frozen=True):
    """The codes of every document, laid out for position-by-position scans.

    order      int64 (N,): rank -> ordinal, by falling number of codes, then rising ordinal
    rank       int64 (N,): ordinal -> rank
    starts     int64 (L + 1,): position j owns codes[starts[j]:starts[j + 1]], one code for each of the ranks 0 .. n_at(j) - 1
    codes      uint16 (P',)
    tail_offsets  int64 (t + 1,), tail_codes uint16: the codes beyond position MAX_POSITIONS of the ranks 0 .. t - 1
    """

    order: np.ndarray
    rank: np.ndarray
    starts: np.ndarray
    codes: np.ndarray
    tail_offsets: np.ndarray
    tail_codes: np.ndarray

    @property
    def n_at(self) -> np.ndarray:
        """int64 (L,), falling: how many documents have a code at each position."""
        return np.diff(self.starts)

    @classmethod
    def from_postings(cls, postings: Postings, n_documents: int) -> Forward:
        """Invert the postings.

        Cost: 16 to 33 ns a posting (80 ms for the 2.4 million of 20,000 abstracts), most of it a radix sort by rank; for a moment ten times the postings' memory.
        """
        n_codes = np.bincount(postings.ordinals, minlength=n_documents)
        order = np.argsort(-n_codes, kind="stable")
        rank = np.empty(n_documents, dtype=np.int64)
        rank[order] = np.arange(n_documents)
        counts = n_codes[order]
        by_rank = np.argsort(rank.astype(np.uint16)[postings.ordinals], kind="stable")
        code_of_posting = np.repeat(np.arange(len(postings.offsets) - 1, dtype=np.uint16), np.diff(postings.offsets))
        ranked_codes = code_of_posting[by_rank]  # document after document, by rank
        return cls._transposed(order, rank, counts, ranked_codes)

    @classmethod
    def _transposed(cls, order: np.ndarray, rank: np.ndarray, counts: np.ndarray, ranked_codes: np.ndarray) -> Forward:
        """Lay codes (document after document, `counts` each, falling) position after position."""
        begins = np.cumsum(counts) - counts
        longest = int(counts[0]) if len(counts) else 0
        n_positions = min(longest, MAX_POSITIONS)
        n_at = np.searchsorted(-counts, -np.arange(n_positions), side="left")  # counts > j
        starts = np.concatenate([[0], np.cumsum(n_at)]).astype(np.int64)
        codes = np.empty(int(starts[-1]), dtype=np.uint16)
        for position, n in enumerate(n_at.tolist()):
            np.take(ranked_codes, begins[:n] + position, out=codes[starts[position] : starts[position] + n], mode="clip")
        n_long = int(np.searchsorted(-counts, -MAX_POSITIONS, side="left"))
        tails = [ranked_codes[b + MAX_POSITIONS : b + c] for b, c in zip(begins[:n_long].tolist(), counts[:n_long].tolist(), strict=True)]
        tail_offsets = np.concatenate([[0], np.cumsum([len(tail) for tail in tails])]).astype(np.int64)
        return cls(order, rank, starts, codes, tail_offsets, np.concatenate([*tails, np.empty(0, dtype=np.uint16)]))


def centroid_maxsim(scores: CentroidScores, forward: Forward, ordinals: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """MaxSim of documents whose tokens are taken for their centroids.

    ordinals  int64 (n,), unique, any order; None means all documents by ordinal
    returns   approximate scores float32 (n,), and lanes uint8 (G, n, width): per query token the document's best, as CentroidScores.lanes has it.
              A document without tokens has all lanes 0.

    Cost: about 3 ns per code and group of 32 query tokens.
    """
    ranks = forward.rank if ordinals is None else forward.rank[ordinals]
    by_rank = forward.order if ordinals is None else np.argsort(ranks)
    sorted_ranks = None if ordinals is None else ranks[by_rank]
    n = len(ranks)
    n_groups, _, width = scores.lanes.shape
    lanes = np.empty((n_groups, n, width), dtype=np.uint8)
    best = scratch("forward.best", (min(n, BLOCK_DOCUMENTS), width), np.uint8)
    for group in range(n_groups):
        for first in range(0, n, BLOCK_DOCUMENTS):
            last = min(n, first + BLOCK_DOCUMENTS)
            block = best[: last - first]
            _walk(forward, scores.lanes[group], first, last, sorted_ranks, block)
            lanes[group, by_rank[first:last]] = block
    return scores.lane_sums_as_scores(sum_lanes(lanes)), lanes


def _walk(forward: Forward, table: np.ndarray, first: int, last: int, sorted_ranks: np.ndarray | None, best: np.ndarray) -> None:
    """Fill best uint8 (last - first, width) for the ranks first .. last - 1, or for sorted_ranks[first:last] (rising)."""
    best.fill(0)
    n_at = forward.n_at
    if sorted_ranks is None:
        n_here = np.minimum(n_at, last) - first
    else:
        block_ranks = sorted_ranks[first:last]
        n_here = np.searchsorted(block_ranks, n_at)
        picked = scratch("forward.picked", (last - first,), np.uint16)
    rows = scratch("forward.rows", best.shape, np.uint8)
    for start, n in zip(forward.starts.tolist(), n_here.tolist(), strict=False):
        if n <= 0:
            break
        if sorted_ranks is None:
            codes = forward.codes[start + first : start + first + n]
        else:
            codes = picked[:n]
            forward.codes[start:].take(block_ranks[:n], out=codes, mode="clip")
        table.take(codes, axis=0, out=rows[:n], mode="clip")
        np.maximum(best[:n], rows[:n], out=best[:n])
    _walk_tails(forward, table, range(first, last) if sorted_ranks is None else block_ranks.tolist(), best)


def _walk_tails(forward: Forward, table: np.ndarray, ranks: range | list[int], best: np.ndarray) -> None:
    """Fold in the codes of documents with more than MAX_POSITIONS of them; ranks rise, so these come first."""
    for row, rank in enumerate(ranks):
        if rank >= len(forward.tail_offsets) - 1:
            break
        codes = forward.tail_codes[forward.tail_offsets[rank] : forward.tail_offsets[rank + 1]]
        if len(codes):
            np.maximum(best[row], table[codes].max(axis=0), out=best[row])


def sum_lanes(lanes: np.ndarray) -> np.ndarray:
    """Sum over query tokens: uint8 (G, n, width) to uint32 (n,). Four 16-bit partial sums a word; numpy's own sum over 32 bytes takes 2.5 times as long."""
    n_groups, n, width = lanes.shape
    sums = np.zeros(n, dtype=np.uint32)
    for group in range(n_groups):
        words = lanes[group].view(np.uint64)  # (n, width / 8)
        partial = words & _EVEN_BYTES
        partial += (words >> np.uint64(8)) & _EVEN_BYTES
        total = partial[:, 0].copy()
        for column in range(1, width // 8):
            total += partial[:, column]
        sums += ((total * _LANE_SUM) >> np.uint64(48)).astype(np.uint32)
    return sums
