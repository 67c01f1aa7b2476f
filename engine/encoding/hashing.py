"""The embedded encoder: every word gets a fixed pseudo-random direction, so MaxSim over them is keyword search with a little tolerance.

Needs no download and no statistics, only hashes; it is *lexical*: it matches words, their forms (one stem) and, partly, look-alikes
(shared character n-grams), and understands nothing. It is what an index is filled with when no model is configured. Three numbers of
BM25 are rebuilt with what MaxSim has:

- a word's weight stands in the norm of its query vector (queries are not normalised): commonness.py in place of IDF;
- saturation of repeated words and the document's length stand in the *angle* of its document vector (those are normalised): a share
  `prominence` of the vector lies in the word's direction, the rest in the last dimension, where queries are zero. So q . d =
  weight * prominence, with prominence = tf / (tf + k1 * (1 - b + b * length / typical length)), BM25's own term;
- a word occurs once in a document's tokens: repeating it could not change MaxSim.

Vectors are the same bits on every machine and in every release: signs come from xxh3, sums are integers, and the only floating-point
operations are single correctly rounded ones (divide, square root, multiply), never a long sum. Changing any constant below is a new
encoder and needs a new NAME, because stored vectors would no longer match; golden values in the tests hold that.

What is still unsatisfying: an unmatched query word finds some document word at a cosine of 0.2-0.25 by chance (D = 128); long documents
collect more of that, which costs about a hundredth of nDCG@10. Stop words and stems are English.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np
import xxhash

from engine.encoding.commonness import weight
from engine.encoding.encoder import ModelInfo, flatten
from engine.encoding.pooling import pool_tokens
from engine.encoding.words import stem, words
from engine.errors import InvalidRequest

NAME = "tartan-lexical-hash"
DEFAULT_DIM = 128
MIN_DIM = 32
HASH_SEED = 0

FULL_WEIGHT = 8.0
"""Norm of a subject word in a query: the size of an IDF. So a real match passes the clients' default centroid_score_threshold of 0.4."""

SUBWORD_SHARE = 0.5
"""Share of a word's squared norm that its n-grams have: finds misspellings and relatives that the stems miss. README.md has the table."""

NGRAM_LENGTHS = (3, 4)

SATURATION = 0.8
"""BM25's k1, whose usual 1.2 was two hundredths worse on SciFact and equal on NPL (README.md)."""

LENGTH_SHARE = 0.75
"""BM25's b."""

TYPICAL_WORDS = 120
"""In place of the collection's mean length: a long paragraph. A wrong guess costs little (README.md)."""

MAX_DOCUMENT_WORDS = 2048
MAX_QUERY_WORDS = 256
"""Distinct words kept of one text, first come first served."""

MAX_REMEMBERED_WORDS = 1 << 16
"""Vectors kept for words seen before, 33 MB at 128 dimensions. When full, forgets all and starts again."""

_FIXED_POINT = 1 << 20


class LexicalEncoder:
    """An Encoder that hashes words. Any two with the same `dim` agree."""

    def __init__(self, dim: int = DEFAULT_DIM) -> None:
        if not MIN_DIM <= dim <= 4096:
            raise InvalidRequest("the lexical encoder has between 32 and 4096 dimensions", dim=dim)
        self._dim = dim
        self._vocabulary = _Vocabulary(dim - 1)
        self.info = ModelInfo(
            name=NAME,
            path="",
            quantized=False,
            embedding_dim=dim,
            batch_size=1,
            num_sessions=1,
            query_prefix="",
            document_prefix="",
            query_length=MAX_QUERY_WORDS,
            document_length=MAX_DOCUMENT_WORDS,
            do_query_expansion=False,
            uses_token_type_ids=False,
            mask_token_id=0,
            pad_token_id=0,
            kind="lexical",
        )

    def encode_documents(self, texts: Sequence[str], pool_factor: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Unit rows, one per distinct word in order of first occurrence. A text without words gives one row that matches nothing.

        Pooling means are taken here as for any encoder, but words do not blend: pooled lexical vectors match worse than BM25 would.
        """
        return pool_tokens(*flatten([self._document(text) for text in texts], self._dim), pool_factor)

    def encode_queries(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Rows whose norm is the word's weight times its count. A text without words gives one zero row: every document scores 0."""
        return flatten([self._query(text) for text in texts], self._dim)

    def _document(self, text: str) -> np.ndarray:
        """float32 (t, D), unit rows."""
        stems, counts, n_words = self._count(text, MAX_DOCUMENT_WORDS)
        if not stems:
            return np.eye(1, self._dim, self._dim - 1, dtype=np.float32)
        length_term = SATURATION * (1.0 - LENGTH_SHARE + LENGTH_SHARE * n_words / TYPICAL_WORDS)
        prominence = counts / (counts + length_term)
        rows = np.empty((len(stems), self._dim), np.float32)
        np.multiply(self._vocabulary.vectors(stems), prominence.astype(np.float32)[:, None], out=rows[:, :-1])
        rows[:, -1] = np.sqrt(1.0 - prominence * prominence)
        return rows

    def _query(self, text: str) -> np.ndarray:
        """float32 (t, D), zero in the last dimension."""
        stems, counts, _ = self._count(text, MAX_QUERY_WORDS)
        rows = np.zeros((max(len(stems), 1), self._dim), np.float32)
        if stems:
            scale = FULL_WEIGHT * np.array([weight(stemmed) for stemmed in stems]) * counts
            np.multiply(self._vocabulary.vectors(stems), scale.astype(np.float32)[:, None], out=rows[:, :-1])
        return rows

    def _count(self, text: str, limit: int) -> tuple[list[str], np.ndarray, int]:
        """The first `limit` distinct stems of a text, how often each occurs (float64), and the text's length in words."""
        found = words(text)
        counts: dict[str, int] = {}
        for word, count in Counter(found).items():
            stemmed = self._vocabulary.stem(word)
            counts[stemmed] = counts.get(stemmed, 0) + count
        stems = list(counts)[:limit]
        return stems, np.array([counts[stemmed] for stemmed in stems], np.float64), len(found)


class _Vocabulary:
    """Remembers stems and unit vectors of words; a lock guards the memory, arithmetic on copies happens outside it."""

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._lock = threading.Lock()
        self._stems: dict[str, str] = {}
        self._rows: dict[str, int] = {}
        self._vectors = np.empty((1024, dim), np.float32)

    def stem(self, word: str) -> str:
        """Single dictionary operations are atomic, and two threads can only store the same answer; so no lock."""
        known = self._stems.get(word)
        if known is None:
            if len(self._stems) >= 4 * MAX_REMEMBERED_WORDS:
                self._stems = {}
            known = self._stems[word] = stem(word)
        return known

    def vectors(self, stems: Sequence[str]) -> np.ndarray:
        """float32 (len(stems), dim), unit rows; a fresh array."""
        with self._lock:
            new = [stemmed for stemmed in stems if stemmed not in self._rows]
            if new:
                if len(self._rows) + len(new) > MAX_REMEMBERED_WORDS:
                    self._rows.clear()
                    new = list(dict.fromkeys(stems))
                self._learn(new)
            return self._vectors[[self._rows[stemmed] for stemmed in stems]]

    def _learn(self, stems: Sequence[str]) -> None:
        start, end = len(self._rows), len(self._rows) + len(stems)
        if end > len(self._vectors):
            larger = np.empty((max(end, 2 * len(self._vectors)), self._dim), np.float32)
            larger[:start] = self._vectors[:start]
            self._vectors = larger
        for row, stemmed in enumerate(stems, start):
            self._vectors[row] = word_vector(stemmed, self._dim)
            self._rows[stemmed] = row


def word_vector(stemmed: str, dim: int) -> np.ndarray:
    """The direction of a stem, float32 (dim,), unit: mostly its own signs, SUBWORD_SHARE of it those of its n-grams.

    Computed in integers up to the last division, so that the bits do not depend on the order in which a library adds. About 40 us.
    """
    own = _signs([stemmed], dim)[0]
    shared = _signs([f"\0{ngram}" for ngram in _ngrams(stemmed)], dim).sum(axis=0)
    own_scale = round(_FIXED_POINT * math.sqrt(1.0 - SUBWORD_SHARE) / math.sqrt(dim))
    shared_norm = math.sqrt(int(shared @ shared))
    shared_scale = round(_FIXED_POINT * math.sqrt(SUBWORD_SHARE) / shared_norm) if shared_norm else 0
    vector = own_scale * own + shared_scale * shared
    unit: np.ndarray = (vector / math.sqrt(int(vector @ vector))).astype(np.float32)
    return unit


def _ngrams(stemmed: str) -> list[str]:
    """The distinct n-grams of the stem between marks: bee gives <be bee ee> <bee bee>."""
    marked = f"<{stemmed}>"
    return sorted({marked[i : i + n] for n in NGRAM_LENGTHS for i in range(len(marked) - n + 1)})


def _signs(features: Sequence[str], dim: int) -> np.ndarray:
    """int64 (len(features), dim) of -1 and 1: the bits of xxh3_128 under as many seeds as it takes."""
    encoded = [feature.encode() for feature in features]
    n_digests = -(-dim // 128)
    digests = b"".join(xxhash.xxh3_128_digest(feature, HASH_SEED + k) for feature in encoded for k in range(n_digests))
    bits = np.unpackbits(np.frombuffer(digests, np.uint8).reshape(len(encoded), 16 * n_digests), axis=1)
    signs: np.ndarray = bits[:, :dim].astype(np.int64) * 2 - 1
    return signs
