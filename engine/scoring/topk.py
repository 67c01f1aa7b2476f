"""The best k of scored things, with one rule for ties that every list in Tartan obeys: score falling, then id rising.

Non-finite scores come last: +inf and nan are no scores, they mean that something overflowed, and -inf is a document without tokens.
Called wherever a list is cut: candidates, rerank, merge of segments and shards, fusion. Pure arrays; no I/O.
"""

from __future__ import annotations

import numpy as np


def top_k(scores: np.ndarray, k: int, ids: np.ndarray | None = None) -> np.ndarray:
    """Return the positions of the best k, best first.

    scores  float32 or integer (n,)
    k       0 or more; more than n means all
    ids     int64 (n,) breaking ties, rising; None means the position itself
    returns int64 (min(k, n),)

    Cost: one partition of n and a sort of little more than k.
    """
    n = len(scores)
    k = min(k, n)
    if k <= 0:
        return np.empty(0, dtype=np.int64)
    keys = _sortable(scores)
    if k < n:
        bound = np.partition(keys, n - k)[n - k]
        chosen = np.flatnonzero(keys >= bound)  # more than k only if the k-th place is tied
    else:
        chosen = np.arange(n, dtype=np.int64)
    tie = chosen if ids is None else ids[chosen]
    order = np.lexsort((tie, -keys[chosen]))
    return chosen[order[:k]]


def best_set(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the positions of the best k in *rising position*, ties at the edge by position: for cuts whose order does not matter yet.

    scores  float32 or integer (n,); returns int64 (min(k, n),). Cost: one partition, no sort.
    """
    n = len(scores)
    if k >= n:
        return np.arange(n, dtype=np.int64)
    if k <= 0:
        return np.empty(0, dtype=np.int64)
    keys = _finite(scores)
    bound = np.partition(keys, n - k)[n - k]
    keep = keys > bound
    tied = np.flatnonzero(keys == bound)
    keep[tied[: k - int(np.count_nonzero(keep))]] = True
    return np.flatnonzero(keep)


def kth_score(scores: np.ndarray, k: int) -> float:
    """Return the k-th best score, -inf if there are fewer than k finite ones. scores float32 (n,); k at least 1."""
    keys = _finite(scores)
    n = len(keys)
    return float(np.partition(keys, n - k)[n - k]) if n >= k else -np.inf


def _finite(scores: np.ndarray) -> np.ndarray:
    """Scores with everything that is not finite replaced by -inf (integers as they are)."""
    if scores.dtype.kind != "f":
        return scores
    finite = np.isfinite(scores)
    return scores if finite.all() else np.where(finite, scores, np.asarray(-np.inf, dtype=scores.dtype))


def _sortable(scores: np.ndarray) -> np.ndarray:
    """Keys whose negation cannot overflow: floats as _finite gives them, integers widened."""
    return _finite(scores) if scores.dtype.kind == "f" else scores.astype(np.int64)
