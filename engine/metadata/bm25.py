"""BM25 over the whole index: what the segments contribute, added up into scores.

    score = Σ over phrases of idf · f·(k1 + 1) / (f + k1·(1 - b + b·length/average))        idf = ln((N - n + 0.5)/(n + 0.5)), at least 1e-6

Counts are all that is used of a query: SQLite was asked before (matching.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.metadata.keyword_query import KeywordQuery

K1 = 1.2
B = 0.75
MIN_IDF = 1e-6
"""These three are FTS5's (fts5_aux.c). A term in more than half of the rows would have a negative idf without the floor."""


class Matches(NamedTuple):
    """What one segment contributes to one query, M matches and P phrases.

    n_documents, n_tokens   live documents of the segment and their tokens
    document_frequencies    int64 (P,), live documents with the phrase, whether they match the query or not
    ordinals, ids           int64 (M,), matching documents that are live and in the subset, by ordinal
    lengths                 int32 (M,), their tokens
    frequencies             int64 (P, M), counted occurrences of each phrase
    """

    n_documents: int
    n_tokens: int
    document_frequencies: np.ndarray
    ordinals: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    frequencies: np.ndarray


class Ranking(NamedTuple):
    """Hits, best first, equal scores by document id: which of the parts (int64), ordinal there (int64), id (int64), score (float32)."""

    parts: np.ndarray
    ordinals: np.ndarray
    ids: np.ndarray
    scores: np.ndarray


def combine(query: KeywordQuery, parts: Sequence[Matches], k: int | None = None) -> Ranking:
    """Score all matches with the statistics of the whole index, best first, at most k of them.

    parts  one for each segment of the index (all of them, or the statistics are not the index's), matched with this query
    """
    n_documents = sum(part.n_documents for part in parts)
    n_tokens = sum(part.n_tokens for part in parts)
    document_frequencies = summed([part.document_frequencies for part in parts], len(query.phrases))
    ordinals = _joined([part.ordinals for part in parts], np.int64)
    ids = _joined([part.ids for part in parts], np.int64)
    numbers = np.repeat(np.arange(len(parts)), [len(part.ordinals) for part in parts])
    lengths = _joined([part.lengths for part in parts], np.int64)
    sums = np.zeros(len(ordinals))
    if len(ordinals):
        damping = damping_of(lengths, n_documents, n_tokens)
        frequencies = np.concatenate([part.frequencies for part in parts], axis=1)
        for phrase_frequencies, n_with_phrase in zip(frequencies, document_frequencies.tolist(), strict=True):
            sums += idf_of(n_documents, n_with_phrase) * (phrase_frequencies * (K1 + 1)) / (phrase_frequencies + damping)
    scores = sums.astype(np.float32)
    order = np.lexsort((ids, -scores))[:k]
    return Ranking(numbers[order], ordinals[order], ids[order], scores[order])


def idf_of(n_rows: int, n_with_phrase: int) -> float:
    """Of a phrase that n_with_phrase of n_rows rows have; at least MIN_IDF."""
    idf = float(np.log((n_rows - n_with_phrase + 0.5) / (n_with_phrase + 0.5)))
    return idf if idf > 0.0 else MIN_IDF


def damping_of(lengths: np.ndarray, n_rows: int, n_tokens: int) -> np.ndarray:
    """k1·(1 - b + b·length/average) of each row: float64."""
    return K1 * (1 - B + B * lengths / (n_tokens / n_rows))


def summed(counts: Sequence[np.ndarray], n_phrases: int) -> np.ndarray:
    """Counts of each phrase, int64 (P,), added up over tables or segments."""
    total = np.zeros(n_phrases, np.int64)
    for of_part in counts:
        total += of_part
    return total


def _joined(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([*arrays, np.zeros(0, dtype)]).astype(dtype)
