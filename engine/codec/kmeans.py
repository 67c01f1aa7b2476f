"""Spherical k-means in two levels, and the assignment of tokens to centroids.

K centroids are grouped into M ~ sqrt(K) *cells*; a token is compared with the M coarse centroids, and then only with the centroids
of its best few cells. Centroids are numbered cell after cell, and the cells follow a path on which neighbours are alike, so codes close
in number are close in space: posting lists and centroids of one cell lie together in an object.

Brute force at K = 16,384 assigns 34,000 tokens/s on two cores; two levels with the best 8 cells 250,000 with 98.9 % the same answer.
Pure arithmetic: no I/O, no global state. Each worker thread calls BLAS, so BLAS should have one thread (OPENBLAS_NUM_THREADS=1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
import numpy as np

MAX_CENTROIDS = 65_536
"""A code is a uint16."""

MOST_CENTROIDS_WANTED = 32_768
"""More would cost every query of a large index over 2 ms for its table of query x centroid."""

SAMPLE_TOKENS_PER_CENTROID = 32
MAX_SAMPLE_TOKENS = 1 << 19
"""256 MiB of float32 at D = 128. The largest K sees 16 tokens a centroid, which costs it 4 % more residual energy than 32."""

ITERATIONS = 4
"""As the ColBERT authors' PLAID has them. Six buy 1.5 % less residual energy for 1.6 times the time (README)."""

N_CELLS_SEARCHED = 8
"""98.5 to 99 % of tokens get the centroid that brute force gives; 4 cells 97 %, 12 cells 99.5 %."""

N_CELLS_SEARCHED_TRAINING = 4
"""While centroids still move, a token in a hundred may count for its second best."""

BLOCK_TOKENS = 16_384
"""Tokens of one assignment block: 1,024 rows for each cell's GEMM at M = 128, and about 30 MiB of temporaries a thread."""

Result = TypeVar("Result")


class Cells(msgspec.Struct, frozen=True):
    """Centroids grouped by coarse cell.

    coarse        float32 (M, D), unit rows, along a path on which neighbours are alike
    cell_offsets  int64 (M + 1,), cell m owns centroids[cell_offsets[m]:cell_offsets[m + 1]]; a cell may be empty
    centroids     float32 (K, D)
    """

    coarse: np.ndarray
    cell_offsets: np.ndarray
    centroids: np.ndarray


def n_centroids(n_tokens: int) -> int:
    """K for a collection of `n_tokens`: 16 * sqrt(n_tokens) rounded down to a power of two, from 1 to MOST_CENTROIDS_WANTED.

    Source: PLAID (arXiv 2205.09707). Twice as many were tried (README): 18 % less residual energy, but a cold query reads twice the
    centroids, every query scores twice as many, and eight probes reach fewer documents: a loss on 20,000 arXiv abstracts.
    """
    if n_tokens < 1:
        return 1
    return min(MOST_CENTROIDS_WANTED, 1 << math.floor(math.log2(16 * math.sqrt(n_tokens))))


def n_sample_tokens(n_tokens: int) -> int:
    """How many tokens `train_cells` wants to see for a collection of `n_tokens`."""
    return min(n_tokens, n_centroids(n_tokens) * SAMPLE_TOKENS_PER_CENTROID, MAX_SAMPLE_TOKENS)


def train_cells(sample: np.ndarray, n_clusters: int, *, seed: int, iterations: int = ITERATIONS, n_threads: int = 1) -> Cells:
    """Train centroids on `sample`.

    sample      float32 (n, D), unit or zero rows, n >= 1
    n_clusters  K wanted; min(K, n) centroids are made
    returns     Cells with unit centroids; the same for the same sample, seed and BLAS

    Empty clusters are reseeded with the sample tokens that fit their own centroid worst. Duplicates in the sample may leave equal
    centroids; they cost a code number and nothing else.
    Cost: `iterations` + 1 two-level assignments of the sample.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    n_clusters = max(1, min(n_clusters, len(sample), MAX_CENTROIDS))
    centroids = sample[np.sort(rng.choice(len(sample), n_clusters, replace=False))].astype(np.float32)
    for _ in range(iterations):
        cells = group_into_cells(centroids, rng)
        codes, fits = assign(sample, cells, n_cells_searched=N_CELLS_SEARCHED_TRAINING, n_threads=n_threads)
        centroids = _spherical_means(sample, codes, fits, cells.centroids)
    return group_into_cells(centroids, rng)


def cells_for(n_clusters: int) -> int:
    """M for K centroids: sqrt(K) rounded down to a power of two, and more when a cell would otherwise hold over 128 centroids."""
    log_k = n_clusters.bit_length() - 1
    return 1 << max(log_k // 2, log_k - 7)


def group_into_cells(centroids: np.ndarray, rng: np.random.Generator, iterations: int = 6) -> Cells:
    """Cluster K centroids into cells_for(K) cells, order the cells along a path and the centroids by cell."""
    n_cells = cells_for(len(centroids))
    coarse = centroids[np.sort(rng.choice(len(centroids), n_cells, replace=False))]
    for _ in range(iterations):
        similarity = centroids @ coarse.T
        cell_of = similarity.argmax(1)
        coarse = _spherical_means(centroids, cell_of, similarity[np.arange(len(cell_of)), cell_of], coarse)
    coarse = coarse[path_of(coarse)]
    cell_of = (centroids @ coarse.T).argmax(1)
    order = np.argsort(cell_of, kind="stable")
    cell_offsets = np.zeros(n_cells + 1, np.int64)
    np.cumsum(np.bincount(cell_of, minlength=n_cells), out=cell_offsets[1:])
    return Cells(coarse, cell_offsets, np.ascontiguousarray(centroids[order]))


def assign(
    tokens: np.ndarray, cells: Cells, *, n_cells_searched: int = N_CELLS_SEARCHED, n_threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Find each token's nearest centroid by dot product, among the centroids of its best cells.

    tokens   float32 (T, D)
    returns  codes uint16 (T,), fits float32 (T,): dot product of the token with its centroid

    Cost per token: M + n_cells_searched * K / M dot products. Blocks of BLOCK_TOKENS go to `n_threads` threads.
    """
    codes = np.empty(len(tokens), np.uint16)
    fits = np.empty(len(tokens), np.float32)

    def one_block(start: int) -> None:
        block = slice(start, start + BLOCK_TOKENS)
        codes[block], fits[block] = assign_block(tokens[block], cells, n_cells_searched)

    for _ in map_blocks(one_block, len(tokens), BLOCK_TOKENS, n_threads):
        pass
    return codes, fits


def assign_block(tokens: np.ndarray, cells: Cells, n_cells_searched: int) -> tuple[np.ndarray, np.ndarray]:
    """`assign` for one block on the calling thread: (token, cell) pairs are grouped by cell, and each cell is one GEMM."""
    n_tokens, n_cells = len(tokens), len(cells.coarse)
    sizes = np.diff(cells.cell_offsets)
    n_searched = min(n_cells_searched, int(np.count_nonzero(sizes)))
    coarse_scores = tokens @ cells.coarse.T
    coarse_scores[:, sizes == 0] = -np.inf
    if n_searched < n_cells:
        best_cells = np.argpartition(coarse_scores, n_cells - n_searched, axis=1)[:, n_cells - n_searched :]
    else:
        best_cells = np.broadcast_to(np.arange(n_cells), (n_tokens, n_cells))
    # uint16 keys make numpy's stable sort a radix sort.
    pairs_by_cell = np.argsort(best_cells.ravel().astype(np.uint16), kind="stable")
    pair_offsets = np.zeros(n_cells + 1, np.int64)
    np.cumsum(np.bincount(best_cells.ravel(), minlength=n_cells), out=pair_offsets[1:])
    pair_fits = np.empty(n_tokens * n_searched, np.float32)
    codes = np.empty(n_tokens * n_searched, np.uint16)
    token_of_pair = pairs_by_cell // n_searched
    for cell in np.flatnonzero(np.diff(pair_offsets)).tolist():
        chosen = slice(pair_offsets[cell], pair_offsets[cell + 1])
        first, end = int(cells.cell_offsets[cell]), int(cells.cell_offsets[cell + 1])
        scores = np.take(tokens, token_of_pair[chosen], axis=0) @ cells.centroids[first:end].T
        nearest = scores.argmax(1)
        pairs = pairs_by_cell[chosen]
        codes[pairs] = nearest + first
        pair_fits[pairs] = np.take_along_axis(scores, nearest[:, None], 1)[:, 0]
    fits = pair_fits.reshape(n_tokens, n_searched)
    winner = fits.argmax(1)
    rows = np.arange(n_tokens)
    return codes.reshape(n_tokens, n_searched)[rows, winner], fits[rows, winner]


def map_blocks(work: Callable[[int], Result], n_items: int, block: int, n_threads: int) -> Iterator[Result]:
    """Call work(start) for every block of `n_items`, on `n_threads` threads, and yield the results in order."""
    starts = range(0, n_items, block)
    if n_threads <= 1 or len(starts) <= 1:
        yield from map(work, starts)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        yield from pool.map(work, starts)


def _spherical_means(points: np.ndarray, cluster_of: np.ndarray, fits: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """Unit means of each cluster; an empty cluster becomes one of the points that fit worst; a zero mean keeps its centroid."""
    sums = np.zeros(previous.shape, np.float32)
    for start in range(0, len(points), BLOCK_TOKENS):
        block = slice(start, start + BLOCK_TOKENS)
        order = np.argsort(cluster_of[block], kind="stable")
        present, starts = np.unique(cluster_of[block][order], return_index=True)
        sums[present] += np.add.reduceat(np.take(points[block], order, axis=0), starts, axis=0)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    means = np.where(norms > 1e-12, sums / np.maximum(norms, 1e-12), previous)
    empty = np.flatnonzero(np.bincount(cluster_of, minlength=len(previous)) == 0)
    worst = np.argsort(fits, kind="stable")[: len(empty)]
    means[empty[: len(worst)]] = points[worst]
    return means


def path_of(points: np.ndarray) -> np.ndarray:
    """Order M points, float32 (M, D), so that neighbours are alike: greedy nearest-neighbour tour, O(M^2). Returns int64 (M,)."""
    similarity = points @ points.T
    # Start at the most remote point, so that the tour does not have to come back to it.
    current = int(similarity.sum(1).argmin())
    order = [current]
    left = np.ones(len(points), bool)
    left[current] = False
    while len(order) < len(points):
        current = int(np.where(left, similarity[current], -np.inf).argmax())
        left[current] = False
        order.append(current)
    return np.asarray(order, np.int64)
