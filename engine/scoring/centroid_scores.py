"""Query x centroids: the table that every stage of the cascade reads, made once per query and codec and shared by all its segments.

Two forms of it: float32 for exact scores, and uint8 with rows of 16 or 32 bytes, because np.take copies rows of exactly that width with
one instruction or two, and because eight times as many of them fit the cache.
"""

from __future__ import annotations

import msgspec
import numpy as np

from engine.scoring.scratch import scratch

NARROW, WIDE = 16, 32
"""Query tokens per uint8 row. Both are widths for which np.take has a fixed-size copy; 24 or 40 bytes cost twice as much."""

TOP_LANE = 191
"""The largest lane. What is left up to 255 is room to add to lanes without wrapping round (selection.py)."""


class CentroidScores(msgspec.Struct, frozen=True):
    """What a query thinks of every centroid.

    n_tokens  Q
    query     float32 (W, D): the rotated query tokens, padded with zero rows to W, a multiple of 16 (OpenBLAS is slower for 23 than for 32)
    table     float32 (K, W): table[c, q] = centroid c . query token q; columns from Q on are 0
    lanes     uint8 (G, K, width): the same, quantised to 0 .. TOP_LANE: table = low + step * lanes; group g holds tokens g * width to (g + 1) * width.
              width is 16 if Q <= 16, else 32; columns from Q on are 0
    low, step the quantisation, one for all tokens, so that sums over tokens compare
    known     bool (K,) or None: None means every row of the table is computed; rows that are not are 0 and must not be believed
    """

    n_tokens: int
    query: np.ndarray
    table: np.ndarray
    lanes: np.ndarray
    low: float
    step: float
    known: np.ndarray | None = None

    @property
    def width(self) -> int:
        return int(self.lanes.shape[2])

    def lane_sums_as_scores(self, sums: np.ndarray) -> np.ndarray:
        """Turn sums of one lane per query token, integers (n,), into approximate scores, float32 (n,)."""
        return sums.astype(np.float32) * np.float32(self.step) + np.float32(self.low * self.n_tokens)


def score_centroids(query: np.ndarray, centroids: np.ndarray) -> CentroidScores:
    """Score all K centroids against a query.

    query      float32 (Q, D), rotated into the codec's space, not normalised
    centroids  float32 (K, D)

    Cost: Q·K·D multiply-adds and three passes over (K, W). C @ Q.T is 1.6 times as fast as Q @ C.T.
    """
    padded = _padded(query)
    table = centroids @ np.ascontiguousarray(padded.T)
    return _with_lanes(query.shape[0], padded, table, None)


def score_some_centroids(query: np.ndarray, centroids: np.ndarray, codes: np.ndarray, n_centroids: int) -> CentroidScores:
    """As score_centroids where only some centroids are at hand (a cold query has fetched a few cells).

    centroids  float32 (k, D), those of `codes`, int (k,), unique; n_centroids is K
    """
    padded = _padded(query)
    table = np.zeros((n_centroids, len(padded)), dtype=np.float32)
    table[codes] = centroids @ np.ascontiguousarray(padded.T)
    known = np.zeros(n_centroids, dtype=bool)
    known[codes] = True
    return _with_lanes(query.shape[0], padded, table, None if known.all() else known)


def _padded(query: np.ndarray) -> np.ndarray:
    """The query with zero rows appended up to 16 or a multiple of 32 tokens, float32 (W, D)."""
    n_tokens, dim = query.shape
    width = NARROW if n_tokens <= NARROW else -(-n_tokens // WIDE) * WIDE
    padded = np.zeros((width, dim), dtype=np.float32)
    padded[:n_tokens] = query
    return padded


def _with_lanes(n_tokens: int, padded: np.ndarray, table: np.ndarray, known: np.ndarray | None) -> CentroidScores:
    """Quantise the table. Rounding down costs at most one step (about 0.007) per query token, far below what centroids are wrong by."""
    n_centroids, columns = table.shape
    width = min(columns, WIDE)
    low, high = (float(table.min()), float(table.max())) if n_centroids else (0.0, 0.0)
    step = (high - low) / TOP_LANE or 1.0
    lanes = np.zeros((columns // width, n_centroids, width), dtype=np.uint8)
    scaled = scratch("centroid_scores.scaled", (n_centroids, columns), np.float32)
    np.subtract(table, np.float32(low), out=scaled)
    np.multiply(scaled, np.float32(1 / step * (1 - 1e-6)), out=scaled)  # a hair less, so that none is above TOP_LANE
    for group in range(len(lanes)):
        np.copyto(lanes[group], scaled[:, group * width : (group + 1) * width], casting="unsafe")
    lanes[-1][:, n_tokens - (len(lanes) - 1) * width :] = 0
    return CentroidScores(n_tokens, padded, table, lanes, low, step, known)
