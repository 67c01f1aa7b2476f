"""The simplest peer, as fast as numpy honestly gets it: exhaustive float32 MaxSim, all tokens resident, one BLAS thread.

What makes it fast: documents are sorted by length once and padded (with a copy of their last token, which changes no maximum) to the
longest of a small block, so that a block is one GEMM and the maximum over a document's tokens is one reduction over the slow axis of a
table that is still in cache. numpy's reduceat over ragged documents costs several times that reduction.
"""

from __future__ import annotations

import numpy as np

from benchmarks.collections import Vectors

BLOCK_TOKENS = 2048


class ExhaustiveEngine:
    """Peer `exhaustive`: build(vectors), search(query, k) -> ids. Exact, so its recall is 1 but for ties."""

    name = "exhaustive"

    def build(self, vectors: Vectors) -> None:
        lengths = vectors.doclens
        self._order = np.argsort(lengths, kind="stable")
        self._order = self._order[np.searchsorted(lengths[self._order], 1) :]  # a document without tokens is no hit
        self._blocks: list[tuple[int, int, np.ndarray]] = []
        start = 0
        while start < len(self._order):
            n = max(1, BLOCK_TOKENS // int(lengths[self._order[start]]))
            chosen = self._order[start : start + n]
            longest = int(lengths[chosen].max())
            # position by position: row p·n + d is token p of the block's document d
            positions = np.minimum(np.arange(longest)[:, None], lengths[chosen] - 1) + vectors.offsets[chosen]
            rows = np.take(vectors.tokens, positions.ravel(), axis=0).astype(np.float32)
            self._blocks.append((start, longest, rows))
            start += len(chosen)
        self.n_resident_tokens = sum(len(rows) for _, _, rows in self._blocks)

    def search(self, query: np.ndarray, k: int) -> np.ndarray:
        """query float32 (Q, D) -> int64 (<= k,), best first, equal scores by lower number."""
        scores = self.scores(query)
        best = np.argpartition(-scores, min(k, len(scores) - 1))[:k] if k < len(scores) else np.arange(len(scores))
        ids = self._order[best]
        return ids[np.lexsort((ids, -scores[best]))]

    def scores(self, query: np.ndarray) -> np.ndarray:
        """float32, in the order of length."""
        columns = np.ascontiguousarray(query.T)
        scores = np.empty(len(self._order), np.float32)
        table = np.empty((max(len(rows) for _, _, rows in self._blocks), len(query)), np.float32)
        for start, longest, rows in self._blocks:
            similarities = np.matmul(rows, columns, out=table[: len(rows)])
            n = len(rows) // longest
            best = similarities.reshape(longest, n * len(query)).max(axis=0)
            best.reshape(n, len(query)).sum(axis=1, out=scores[start : start + n])
        return scores

    @property
    def stored_bytes(self) -> int:
        return sum(rows.nbytes for _, _, rows in self._blocks)
