"""Stages 1 and 2 of the cascade: which documents are worth looking at.

Probing picks, for every query token, its best centroids; their posting lists are scattered into a small table (query token x document) of
uint8, and the sum over query tokens ranks all documents of a segment. What a document was not reached for is imputed: it counts as the best
centroid that was *not* probed, as in WARP (arXiv 2501.17788). Called by cascade.py and by the searcher; segments small enough skip it.
"""

from __future__ import annotations

import msgspec
import numpy as np

from engine.scoring.arrays import Postings
from engine.scoring.centroid_scores import CentroidScores
from engine.scoring.scratch import scratch
from engine.scoring.topk import best_set

TABLE_ROWS = 32
"""Query tokens scattered at a time: bounds the table at 32 bytes a document, 2 MiB for the largest segment."""
REDUCED_ROWS = 16
"""The search for the best centroids starts from at least this many group maxima per centroid probed; more groups, fewer false finds."""


class Probes(msgspec.Struct, frozen=True):
    """The probed posting lists, in the order in which they must be scattered: score rising within a query token.

    tokens  int64 (n,), codes  int64 (n,), scores  float32 (n,)
    grades  uint8 (n,): the scores quantised over all probes, 1 (as good as not probed) to 255
    missing float32 (Q,): per query token the best score that was not probed
    step    score = missing[token] + (grade - 1) * step
    """

    tokens: np.ndarray
    codes: np.ndarray
    scores: np.ndarray
    grades: np.ndarray
    missing: np.ndarray
    step: float

    def unique_codes(self) -> np.ndarray:
        """The codes whose posting lists a search needs, rising, int64."""
        return distinct(self.codes)

    def grade_sums_as_scores(self, sums: np.ndarray) -> np.ndarray:
        """Turn sums of grades (n,) into approximate scores float32 (n,), comparable between segments and codecs."""
        return sums.astype(np.float32) * np.float32(self.step) + np.float32(self.missing.sum(dtype=np.float64))


def distinct(numbers: np.ndarray) -> np.ndarray:
    """Each of some integers (n,) once, rising. What np.unique gives; but that imports numpy.ma when first called, 20 to 40 ms of a cold search."""
    rising = np.sort(numbers)
    return rising[np.flatnonzero(np.diff(rising, prepend=rising[:1] - 1))]


def probe(scores: CentroidScores, n_probe: int, threshold: float | None = None) -> Probes:
    """Choose for every query token its n_probe best centroids.

    threshold  drops probed centroids whose best score over all query tokens is below it; None drops nothing

    Only known centroids are probed. Cost: about three passes over (K, W), whatever n_probe is.
    """
    n_tokens = scores.n_tokens
    table, codes_of_rows = scores.table, None
    if scores.known is not None:
        codes_of_rows = np.flatnonzero(scores.known)
        table = np.ascontiguousarray(table[codes_of_rows])
    rows, tokens, values = _at_least_best(table, n_tokens, n_probe + 1)
    order = np.lexsort((rows, values, tokens))  # tokens together, values rising, then rows for a fixed order among equals
    rows, tokens, values = rows[order], tokens[order], values[order]
    ends = np.searchsorted(tokens, np.arange(1, n_tokens + 1))
    from_best = ends[tokens] - np.arange(len(tokens))  # 1 for the best of a token
    missing = _next_best(values, tokens, from_best, n_probe, n_tokens)
    keep = from_best <= n_probe
    if threshold is not None and len(rows):
        keep &= table[rows, :n_tokens].max(axis=1) >= threshold
    rows, tokens, values = rows[keep], tokens[keep], values[keep]
    above = values - missing[tokens]
    step = float(above.max()) / 254 if len(above) and above.max() > 0 else 1.0
    grades = (above / np.float32(step)).astype(np.int64).clip(0, 254) + 1
    codes = rows if codes_of_rows is None else codes_of_rows[rows]
    return Probes(tokens, codes, values, grades.astype(np.uint8), missing, step)


def _at_least_best(table: np.ndarray, n_tokens: int, n_best: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All (row, token, value) among which the n_best of each token are, and few others.

    Split the rows into groups and take each group's maximum: the n_best-th of these maxima is reached by at least n_best rows, so it is a lower
    bound of the n_best-th value, and a tight one where groups are many. Halving the table is the fastest way to such maxima.
    """
    n_rows = len(table)
    n_best = min(n_best, n_rows)
    if n_best == 0:
        empty = np.empty(0, dtype=np.int64)
        return empty, empty, np.empty(0, dtype=np.float32)
    maxima = table
    while len(maxima) >= 2 * max(REDUCED_ROWS * n_best, 64):
        half = -(-len(maxima) // 2)
        folded = maxima[:half].copy()
        np.maximum(folded[: len(maxima) - half], maxima[half:], out=folded[: len(maxima) - half])
        maxima = folded
    bounds = np.partition(maxima, len(maxima) - n_best, axis=0)[len(maxima) - n_best]
    bounds[n_tokens:] = np.inf
    found = scratch("candidates.found", table.shape, np.bool_)
    np.greater_equal(table, bounds, out=found)
    rows, tokens = np.divmod(np.flatnonzero(found), table.shape[1])
    return rows, tokens, table[rows, tokens]


def _next_best(values: np.ndarray, tokens: np.ndarray, from_best: np.ndarray, n_probe: int, n_tokens: int) -> np.ndarray:
    """Per token the (n_probe + 1)-th best value; where there is none, everything is probed and the worst probed value stands in."""
    missing = np.zeros(n_tokens, dtype=np.float32)
    last = from_best <= n_probe + 1
    missing[tokens[last][::-1]] = values[last][::-1]  # values rise within a token, so the first of each, written last, is its smallest
    return missing


def rank_documents(probes: Probes, postings: Postings, n_documents: int) -> np.ndarray:
    """Sum, for every document, the best grade per query token.

    returns uint32 (N,): 0 for a document that no probed list holds

    A later scatter overwrites an earlier one, so rising order leaves the best. Cost: about 8 ns per posting, one pass over (Q, N) bytes.
    """
    sums = np.zeros(n_documents, dtype=np.uint32)
    n_tokens = len(probes.missing)
    for first in range(0, n_tokens, TABLE_ROWS):
        n_rows = min(TABLE_ROWS, n_tokens - first)
        begin, end = np.searchsorted(probes.tokens, (first, first + n_rows))
        if begin == end:
            continue
        table = scratch("candidates.table", (n_rows, n_documents), np.uint8)
        table.fill(0)
        _scatter(table, probes, slice(int(begin), int(end)), first, postings)
        sums += np.add.reduce(table, axis=0, dtype=np.uint16)  # at most 32 * 255
    return sums


def _scatter(table: np.ndarray, probes: Probes, part: slice, first_token: int, postings: Postings) -> None:
    """Write the grades of some probes into the table rows of their tokens, in order."""
    codes = probes.codes[part]
    begins, ends = postings.offsets[codes], postings.offsets[codes + 1]
    lists = [postings.ordinals[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
    lengths = ends - begins
    row_starts = (probes.tokens[part] - first_token) * table.shape[1]
    cells = np.repeat(row_starts, lengths)
    cells += np.concatenate(lists)
    table.reshape(-1)[cells] = np.repeat(probes.grades[part], lengths)


def choose_candidates(sums: np.ndarray, n_candidates: int, mask: np.ndarray | None = None) -> np.ndarray:
    """The reached, allowed documents with the best sums: ordinals int64 (m <= n_candidates,), rising. sums uint32 (N,), mask bool (N,)."""
    if mask is not None:
        sums = np.where(mask, sums, np.uint32(0))
    chosen = best_set(sums, n_candidates)
    return np.asarray(chosen[sums[chosen] > 0])
