"""A synthetic collection of any size that never lies in memory or on disk: shards are made from a seed, block by block, whenever somebody asks.

The geometry is that of collections.py, fitted to the tokens of a ColBERT encoder: a cone, Zipf-like words, topics, a bend that each document gives its
tokens, noise; variances fall by a power law. Here documents are short, and topics are many and of Zipf-like sizes. A block of documents depends on
the seed and its own number alone, so it is the same whoever makes it, in whatever order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from benchmarks.collections import Geometry
from engine.index.bulk import Block

DIM = 128
BLOCK_DOCUMENTS = 2048
SHARD_DOCUMENTS = 62_500
"""A million documents are sixteen shards, each of which fills one segment."""
MIN_SHARDS = 8
FIRST_YEAR, N_YEARS = 1900, 100
SHORTEST, LONGEST = 12, 20
QUERY_TOKENS, OWN_TOKENS = 16, 7
"""Of a query's tokens so many are noisy tokens of one document; the others are of nobody's document on its topic."""
_SPACE, _BLOCKS, _QUERIES, _SAMPLES, _DOOMED = range(5)
"""What random numbers are for: each purpose has a stream of its own."""

SHORT = Geometry(n_words=10_000, n_topics=1_000, document=0.3, noise=0.25)
"""Many topics; context and noise so strong that tokens lie as near to their centroids as real ones (0.8, benchmarks/README.md)."""


@dataclass(frozen=True)
class Made:
    """Documents of one block: tokens float16 (T, 128), unit rows; offsets int64 (n + 1,); years and topics int64 (n,)."""

    tokens: np.ndarray
    offsets: np.ndarray
    years: np.ndarray
    topics: np.ndarray

    def __len__(self) -> int:
        return len(self.years)

    def behind(self, n: int) -> Made:
        """Without the first n documents."""
        first = self.offsets[n]
        return Made(self.tokens[first:], self.offsets[n:] - first, self.years[n:], self.topics[n:])

    def fields(self) -> list[dict[str, Any]]:
        return [{"year": year, "topic": topic} for year, topic in zip(self.years.tolist(), self.topics.tolist(), strict=True)]


@dataclass(frozen=True)
class Synthetic:
    """n_documents documents, numbered from 0, in shards of about one size."""

    n_documents: int
    seed: int = 0
    geometry: Geometry = field(default_factory=lambda: SHORT)

    @property
    def shard_documents(self) -> int:
        return min(SHARD_DOCUMENTS, -(-self.n_documents // MIN_SHARDS))

    @property
    def n_shards(self) -> int:
        return -(-self.n_documents // self.shard_documents)

    def span(self, shard: int) -> tuple[int, int]:
        """Documents first to last, half-open."""
        first = shard * self.shard_documents
        return first, min(first + self.shard_documents, self.n_documents)

    def _random(self, *purpose: int) -> np.random.Generator:
        return _random(self.seed, *purpose)

    @property
    def _space(self) -> _Space:
        return _space(self.geometry, self.seed)

    def blocks(self, shard: int, start: int = 0) -> Iterator[Made]:
        """The documents of a shard from its `start`-th on."""
        first, last = self.span(shard)
        for number in range(start // BLOCK_DOCUMENTS, -(-(last - first) // BLOCK_DOCUMENTS)):
            n = min(BLOCK_DOCUMENTS, last - first - number * BLOCK_DOCUMENTS)
            made = self._space.documents(self._random(_BLOCKS, shard, number), n)
            yield made.behind(max(start - number * BLOCK_DOCUMENTS, 0))

    def sample(self, shard: int, n_tokens: int) -> np.ndarray:
        """About n_tokens tokens of random blocks of a shard, float16 (n, 128)."""
        first, last = self.span(shard)
        n_blocks = -(-(last - first) // BLOCK_DOCUMENTS)
        rng = self._random(_SAMPLES, shard)
        parts: list[np.ndarray] = []
        for number in rng.permutation(n_blocks).tolist():
            if sum(map(len, parts)) >= n_tokens:
                break
            start = number * BLOCK_DOCUMENTS
            tokens = next(self.blocks(shard, start)).tokens
            parts.append(tokens[np.sort(rng.choice(len(tokens), min(n_tokens, max(1, len(tokens) // 2)), replace=False))])
        return np.concatenate(parts)[:n_tokens]

    def queries(self, n: int) -> np.ndarray:
        """float32 (n, QUERY_TOKENS, 128), unit rows: noisy tokens of a random document, and of its topic."""
        return np.stack([self._query(self._random(_QUERIES, number)) for number in range(n)])

    def _query(self, rng: np.random.Generator) -> np.ndarray:
        document = int(rng.integers(self.n_documents))
        shard, place = divmod(document, self.shard_documents)
        number, row = divmod(place, BLOCK_DOCUMENTS)
        made = next(self.blocks(shard, number * BLOCK_DOCUMENTS))
        own = made.tokens[rng.integers(made.offsets[row], made.offsets[row + 1], OWN_TOKENS)].astype(np.float32)
        others = self._space.tokens(rng, np.full(QUERY_TOKENS - OWN_TOKENS, made.topics[row]), np.arange(QUERY_TOKENS - OWN_TOKENS))
        noise = self.geometry.query_noise * self._space.directions(rng, QUERY_TOKENS)
        return _unit(np.concatenate([own, others]) + noise)

    def doomed(self, share: float) -> np.ndarray:
        """Random documents to be deleted by id: int64, in random order."""
        return self._random(_DOOMED).choice(self.n_documents, round(share * self.n_documents), replace=False)


class _Space:
    """Directions that all blocks share, and how tokens come from them."""

    def __init__(self, geometry: Geometry, rng: np.random.Generator) -> None:
        self.geometry = geometry
        scales = np.arange(1, DIM + 1) ** -geometry.spectrum
        self._scales = (scales / np.sqrt((scales**2).mean()) / np.sqrt(DIM)).astype(np.float32)
        self._mean = geometry.mean * self.directions(rng, 1)
        self._words = geometry.word * self.directions(rng, geometry.n_words)
        self._topics = geometry.topic * self.directions(rng, geometry.n_topics)
        self._topic_words = rng.integers(geometry.n_words, size=(geometry.n_topics, geometry.words_per_topic))
        self._word_steps = _zipf_steps(geometry.n_words, geometry.zipf)
        self._topic_word_steps = _zipf_steps(geometry.words_per_topic, geometry.zipf)
        self._topic_steps = _zipf_steps(geometry.n_topics, 0.7)

    def directions(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """About unit length, float32 (n, 128), with the falling spectrum."""
        drawn: np.ndarray = rng.standard_normal((n, DIM), dtype=np.float32)
        drawn *= self._scales
        return drawn

    def documents(self, rng: np.random.Generator, n: int) -> Made:
        """A document has two topics, in any proportion, and SHORTEST to LONGEST tokens."""
        years = FIRST_YEAR + rng.integers(N_YEARS, size=n)
        lengths = rng.integers(SHORTEST, LONGEST + 1, n)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        topics, seconds = _drawn(rng, self._topic_steps, n), _drawn(rng, self._topic_steps, n)
        owner = np.repeat(np.arange(n), lengths)
        is_first = rng.random(len(owner)) < np.repeat(rng.uniform(0.4, 1.0, n), lengths)
        tokens = self.tokens(rng, np.where(is_first, topics[owner], seconds[owner]), owner)
        return Made(tokens.astype(np.float16), offsets, years, topics)

    def tokens(self, rng: np.random.Generator, topics: np.ndarray, owner: np.ndarray) -> np.ndarray:
        """One token for each topic, float32 (n, 128), unit rows. owner: the document of each, int64 rising from 0."""
        n = len(topics)
        of_topic = self._topic_words[topics, _drawn(rng, self._topic_word_steps, n)]
        word = np.where(rng.random(n) < 0.6, of_topic, _drawn(rng, self._word_steps, n))
        context = self.geometry.document * self.directions(rng, int(owner[-1]) + 1)
        rows = self.directions(rng, n)
        rows *= self.geometry.noise
        for part in (self._mean, self._words[word], self._topics[topics], context[owner]):
            rows += part
        return _unit(rows)


@cache
def _space(geometry: Geometry, seed: int) -> _Space:
    """Made once a process: a quarter of a second."""
    return _Space(geometry, _random(seed, _SPACE))


class ShardSource:
    """A shard as one input of a bulk build (engine.index.bulk.Source). before_block: called whenever the build wants more."""

    def __init__(self, collection: Synthetic, shard: int, watch: Callable[[str], None] = lambda stage: None) -> None:
        self._collection, self._shard, self._watch = collection, shard, watch
        first, last = collection.span(shard)
        self.fingerprint = f"synthetic-{collection.n_documents}-{collection.seed}-{shard}"
        self.n_documents = last - first
        self.n_tokens = self.n_documents * (SHORTEST + LONGEST) // 2

    def sample(self, n_tokens: int) -> np.ndarray:
        return self._collection.sample(self._shard, n_tokens)

    def blocks(self, first_document: int) -> Iterator[Block]:
        """watch is told when a block is being made, and when it is handed over."""
        self._watch("generate")
        for made in self._collection.blocks(self._shard, first_document):
            block = Block(made.tokens, made.offsets, made.fields())
            self._watch("encode")
            yield block
            self._watch("generate")


class Sampled:
    """Some shards that stand for all of a collection: what the codec is trained on, as the build tasks do it."""

    def __init__(self, collection: Synthetic, n_shards: int) -> None:
        chosen = np.unique(np.linspace(0, collection.n_shards - 1, n_shards).round().astype(int)).tolist()
        self._sources = [ShardSource(collection, shard) for shard in chosen]
        self.fingerprint = f"synthetic-{collection.n_documents}-{collection.seed}"
        self.n_documents = collection.n_documents
        self.n_tokens = collection.n_documents * (SHORTEST + LONGEST) // 2

    def sample(self, n_tokens: int) -> np.ndarray:
        return np.concatenate([source.sample(-(-n_tokens // len(self._sources))) for source in self._sources])

    def blocks(self, first_document: int) -> Iterator[Block]:
        raise AssertionError("a sample has no blocks")


def _random(seed: int, *purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, *purpose]))


def _zipf_steps(n: int, exponent: float) -> np.ndarray:
    """Cumulated weights, float64 (n,), the last of which is 1."""
    weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return np.asarray(np.cumsum(weights) / weights.sum())


def _drawn(rng: np.random.Generator, steps: np.ndarray, n: int) -> np.ndarray:
    """n numbers by their weights, int64. (rng.choice would check and cumulate the weights again each time.)"""
    return np.minimum(np.searchsorted(steps, rng.random(n), side="right"), len(steps) - 1)


def _unit(rows: np.ndarray) -> np.ndarray:
    rows /= np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    return rows
