"""Token pooling: replace like tokens of one document by their mean, so that it stores fewer.

Called by the encoders when a caller sends `pool_factor`. The semantics are scipy's: Ward linkage over pairwise cosine distances, cut into
a number of clusters, as PyLate does it. (NextPlaid cuts its merges in another order and gets looser clusters.)
"""

from __future__ import annotations

import itertools

import numpy as np

from engine.encoding.encoder import flatten


def pool_tokens(tokens: np.ndarray, offsets: np.ndarray, pool_factor: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Pool each document on its own; a factor of None, 0 or 1 changes nothing.

    tokens       float32 (T, D)
    offsets      int64 (n + 1,)
    returns      the same pair for the pooled documents; means are not normalised again

    Cost: t² per document of t tokens in time and memory: 300 tokens take about 10 ms.
    """
    if pool_factor is None or pool_factor <= 1:
        return tokens, offsets
    documents = [tokens[start:end] for start, end in itertools.pairwise(offsets)]
    return flatten([pool_document(document, pool_factor) for document in documents], tokens.shape[1])


def pool_document(tokens: np.ndarray, pool_factor: int) -> np.ndarray:
    """float32 (t, D) to (1 + c, D): row 0 ([CLS]) as it is, the other n rows as the means of at most c = max(n // pool_factor, 1) clusters.

    Ties may make fewer clusters than asked for (scipy's maxclust). A zero row is at cosine distance 1 from everything.
    Source: Clavié, Chaffin and Adams 2024, Reducing the footprint of multi-vector retrieval (arXiv 2409.14683).
    """
    rest = tokens[1:]
    n_clusters = max(len(rest) // pool_factor, 1)
    if n_clusters >= len(rest):
        return tokens
    labels = _clusters(rest, n_clusters)
    members = np.bincount(labels)
    means = np.zeros((len(members), tokens.shape[1]), np.float64)
    np.add.at(means, labels, rest)
    means /= members[:, None]
    return np.concatenate([tokens[:1], means.astype(np.float32)])


def _clusters(rows: np.ndarray, n_clusters: int) -> np.ndarray:
    """Cluster numbers 0.. of the rows, int (n,). scipy is imported here because a second is too much for a cold start."""
    from scipy.cluster.hierarchy import fcluster, linkage  # type: ignore[import-untyped]
    from scipy.spatial.distance import pdist  # type: ignore[import-untyped]

    with np.errstate(invalid="ignore", divide="ignore"):
        distances = pdist(rows.astype(np.float64), "cosine")
    distances = np.clip(np.nan_to_num(distances, nan=1.0), 0.0, 2.0)
    labels = fcluster(linkage(distances, "ward"), n_clusters, criterion="maxclust")
    return np.unique(labels, return_inverse=True)[1]
