"""A small clustered corpus for tests: topics, documents around topics, tokens around documents; seeded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Corpus:
    """tokens float32 (T, D) of unit rows, offsets int64 (N + 1,), queries float32 (Q, D) each."""

    tokens: np.ndarray
    offsets: np.ndarray
    queries: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def part(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and offsets of documents first to last."""
        start, end = self.offsets[first], self.offsets[last]
        return self.tokens[start:end], self.offsets[first : last + 1] - start

    def exact_scores(self, query: np.ndarray) -> np.ndarray:
        """MaxSim of every document, the plain way: float32 (N,)."""
        return np.maximum.reduceat(self.tokens @ query.T, self.offsets[:-1], axis=0).sum(axis=1)


def make_corpus(n_documents: int = 300, dim: int = 32, *, n_topics: int = 12, n_queries: int = 8, seed: int = 5) -> Corpus:
    """Documents of 4 to 24 tokens; each query is six tokens of one document, a little noisy."""
    rng = np.random.default_rng(seed)
    topics = rng.standard_normal((n_topics, 6, dim))
    lengths = rng.integers(4, 25, n_documents)
    rows = []
    for n, length in enumerate(lengths):
        anchors = topics[n % n_topics, rng.integers(0, 6, length)]
        rows.append(anchors + 0.6 * rng.standard_normal((1, dim)) + 0.5 * rng.standard_normal((length, dim)))
    tokens = _unit(np.concatenate(rows))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    queries = []
    for n in rng.choice(n_documents, n_queries, replace=False):
        own = tokens[offsets[n] : offsets[n + 1]]
        queries.append(_unit(own[rng.integers(0, len(own), 6)] + 0.15 * rng.standard_normal((6, dim))))
    return Corpus(tokens, offsets, queries)


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
