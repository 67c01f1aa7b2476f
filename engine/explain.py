"""Why a document was found: which of its tokens answered each query token, and how well."""

from __future__ import annotations

import numpy as np

Match = tuple[int, float]
"""(token of the document, similarity): the document token with the greatest dot product with one query token."""


def best_matches(query: np.ndarray, tokens: np.ndarray, offsets: np.ndarray) -> list[list[Match]]:
    """For each document, the match of every query token; the similarities of a document add up to its score.

    query    float32 (Q, D)
    tokens   float32 (T, D), of all documents, decoded; offsets int64 (n + 1,)

    Ties go to the earlier token. Cost: one plain matrix product; meant for the hits of an answer, not for candidates.
    """
    similarities = tokens @ query.T
    found = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        block = similarities[start:end]
        best = block.argmax(axis=0)
        found.append([(int(token), float(block[token, q])) for q, token in enumerate(best.tolist())])
    return found
