"""How many documents deserve a better score. Knows scores, not documents: the caller says how a block of them is scored.

Every stage of the cascade after the first has the same shape: cheap scores order the documents, dear scores decide, and the question is when to stop paying. A
dear score is a line of the cheap one plus noise, both learned from the documents scored already in this very query. So each document not yet
scored has a chance to get above the k-th best dear score, and the sum of these chances is the expected number of hits that stopping now would lose. Scoring stops when
that sum is small enough.

What is unsatisfying: the noise is not quite normal (its upper tail is what matters, and a few documents are much better than their centroids say), and
the k-th best score among few documents is a low bar, so the first blocks are larger than they need be.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.scoring.topk import kth_score

ScoreBlock = Callable[[np.ndarray], np.ndarray]
"""Positions int64 (m,), rising and adjoining -> their dear scores float32 (m,)."""

MISSES_PER_HIT = 0.002
"""Default for the expected share of the k hits that stopping may lose."""
MIN_BLOCK = 64
MIN_SAMPLE = 16
"""Fewer dear scores than this say nothing about the noise."""
SLOPES = (0.5, 1.0)
"""The line's slope is kept in here: measured 0.8 to 0.9 for exact against centroid scores, and a fit to few documents can be anything."""


def rerank(
    approximate: np.ndarray,
    score_block: ScoreBlock,
    k: int,
    n_rerank: int,
    floor: float = -np.inf,
    misses_per_hit: float = MISSES_PER_HIT,
) -> np.ndarray:
    """Score documents better, block by block, until more of it can hardly change the best k.

    approximate     float32 (n,), falling
    k               hits wanted, at least 1
    n_rerank        upper bound of documents scored; max(n_rerank, k) if there are that many
    floor           a dear score that k documents elsewhere are known to reach already
    misses_per_hit  expected share of the k hits that stopping may lose

    returns float32 (m,): the dear scores of the first m documents, m <= min(n, max(n_rerank, k))
    """
    limit = min(len(approximate), max(n_rerank, k))
    exact = np.empty(limit, dtype=np.float32)
    done, size, look_again = 0, min(limit, max(MIN_BLOCK, k + k // 4)), True
    while size:
        exact[done : done + size] = score_block(np.arange(done, done + size))
        done += size
        size = 0
        if look_again and done < limit:
            chance = chances(approximate[:done], exact[:done], approximate[done:limit], k, floor)
            size, look_again = _next_block(chance, misses_per_hit * k, done)
    return exact[:done]


def _next_block(chance: np.ndarray, misses: float, done: int) -> tuple[int, bool]:
    """How many documents to score next, and whether to look again after that.

    Enough would be as many as it takes until the chances of the rest add up to less than `misses`. But the bar rises with every block, so while that is many, only half
    of them are taken, and no more than twice what has been scored.
    """
    left = np.cumsum(chance[::-1])[::-1]  # left[i]: expected misses if the first i of the remaining are scored
    needed = int(np.count_nonzero(left > misses))
    if needed <= MIN_BLOCK:
        return needed, False
    return min(max(MIN_BLOCK, needed // 2), 2 * done, len(chance)), True


def chances(approximate: np.ndarray, exact: np.ndarray, remaining: np.ndarray, k: int, floor: float = -np.inf) -> np.ndarray:
    """For every document not yet scored the chance that its dear score is above the k-th best so far (or the floor): float32 (r,).

    approximate, exact  float32 (m,), of the documents scored
    remaining           float32 (r,), approximate scores of the others
    """
    bar = max(kth_score(exact, k), floor)
    finite = np.isfinite(exact)
    n = int(np.count_nonzero(finite))
    if not np.isfinite(bar) or n < MIN_SAMPLE:
        return np.ones(len(remaining), dtype=np.float32)
    x, y = (approximate, exact) if n == len(exact) else (approximate[finite], exact[finite])
    x_mean, y_mean = float(np.add.reduce(x)) / n, float(np.add.reduce(y)) / n
    dx, dy = x - np.float32(x_mean), y - np.float32(y_mean)
    xx, xy, yy = float(dx @ dx), float(dx @ dy), float(dy @ dy)
    slope = min(max(xy / xx, SLOPES[0]), SLOPES[1]) if xx > 0 else 1.0
    spread = max(max(yy - 2 * slope * xy + slope * slope * xx, 0.0) / n, 1e-12) ** 0.5
    # (bar - expected) / spread, where expected = y_mean + slope * (remaining - x_mean)
    return _normal_tail(remaining * np.float32(-slope / spread) + np.float32((bar - y_mean + slope * x_mean) / spread))


def _normal_tail(z: np.ndarray) -> np.ndarray:
    """P(standard normal > z), by a logistic function of a cubic (error below 0.0002; Bowling et al. 2009)."""
    z = np.minimum(np.maximum(z, np.float32(-8)), np.float32(8))
    return np.asarray(1.0 / (1.0 + np.exp(z * (0.07056 * z * z + 1.5976))))
