"""The yardstick: exhaustive MaxSim over uncompressed vectors, and what is said of an answer against it.

`tartan recall` and the benchmarks call this. Arrays in, arrays out: no store, no index, no codec; what is measured shares no code
with what measures it. It is meant to be right and bounded in memory; benchmarks/exhaustive.py is the fast rival of the same name.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from engine.errors import InvalidRequest

BLOCK_TOKENS = 16_384
_TABLE_VALUES = 4 << 20
"""A table of query tokens x document tokens has at most so many float32 values (16 MiB), unless one document alone needs more."""

ABSENT = -1
"""In a row of found ids: there was no further document."""


class Qrels(msgspec.Struct, frozen=True):
    """Judgements, ragged by query: ids int64 (J,), gains float64 (J,) of which those > 0 are relevant, offsets int64 (queries + 1,)."""

    ids: np.ndarray
    gains: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, judged: Sequence[dict[int, float]]) -> Qrels:
        """From one {document id: gain} for each query."""
        ids = np.array([id_ for row in judged for id_ in row], np.int64)
        gains = np.array([gain for row in judged for gain in row.values()], np.float64)
        return cls(ids, gains, np.cumsum([0, *(len(row) for row in judged)]).astype(np.int64))


class Exhaustive:
    """The true top k of many queries, fed with documents block by block, so that a collection need not fit into memory.

    queries        float32 (sum of Q, D), the tokens of all queries, end to end, used as given
    query_offsets  int64 (queries + 1,); every query has a token
    """

    def __init__(self, queries: np.ndarray, query_offsets: np.ndarray, k: int) -> None:
        self._queries = np.ascontiguousarray(queries, np.float32)
        self._offsets = np.asarray(query_offsets, np.int64)
        n_queries = len(self._offsets) - 1
        if k < 1 or queries.ndim != 2 or self._offsets[0] != 0 or self._offsets[-1] != len(queries) or (np.diff(self._offsets) < 1).any():
            raise InvalidRequest("queries need a token each, offsets from 0 to their number, and k >= 1", k=k, shape=queries.shape)
        self._ids = np.full((n_queries, k), ABSENT, np.int64)
        self._scores = np.full((n_queries, k), -np.inf, np.float32)

    def add(self, tokens: np.ndarray, offsets: np.ndarray, ids: np.ndarray | None = None) -> None:
        """Score documents: tokens float16/float32 (T, D), offsets int64 (N + 1,), ids int64 (N,), by default 0..N-1.

        Cost: all queries' tokens · T · D multiply-adds; blocks of about BLOCK_TOKENS tokens are made float32 one after another.
        """
        offsets = np.asarray(offsets, np.int64)
        if tokens.ndim != 2 or tokens.shape[1] != self._queries.shape[1]:
            raise InvalidRequest("another dimension", code="dimension-mismatch", expected=self._queries.shape[1], found=tokens.shape)
        ids = np.arange(len(offsets) - 1, dtype=np.int64) if ids is None else np.asarray(ids, np.int64)
        if len(ids) != len(offsets) - 1 or (len(offsets) and offsets[-1] > len(tokens)):
            raise InvalidRequest("one id per document, tokens for all", ids=len(ids), documents=len(offsets) - 1, tokens=len(tokens))
        full = np.flatnonzero(np.diff(offsets))  # a document without tokens has no score and is no hit
        start = 0
        while start < len(full):
            first_token = offsets[full[start]]
            stop = max(start + 1, int(np.searchsorted(offsets[full + 1], first_token + BLOCK_TOKENS, side="right")))
            block = tokens[first_token : offsets[full[stop - 1] + 1]].astype(np.float32)
            self._score(block, offsets[full[start:stop]] - first_token, ids[full[start:stop]])
            start = stop

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """ids int64 (queries, k) and scores float32, best first, equal scores by lower id; ABSENT and -inf behind the last document."""
        return self._ids.copy(), self._scores.copy()

    def _score(self, block: np.ndarray, starts: np.ndarray, ids: np.ndarray) -> None:
        """block float32 (t, D), starts int64 (n,) rising: first token of each document."""
        first = 0
        while first < len(self._ids):
            limit = self._offsets[first] + max(1, _TABLE_VALUES // len(block))
            last = max(first + 1, int(np.searchsorted(self._offsets, limit, side="right")) - 1)
            begin, end = self._offsets[first], self._offsets[last]
            best = np.maximum.reduceat(self._queries[begin:end] @ block.T, starts, axis=1)
            scores = np.add.reduceat(best, self._offsets[first:last] - begin, axis=0)
            self._keep(slice(first, last), scores, ids)
            first = last

    def _keep(self, rows: slice, scores: np.ndarray, ids: np.ndarray) -> None:
        scores = np.concatenate([self._scores[rows], scores], axis=1)
        candidates = np.concatenate([self._ids[rows], np.broadcast_to(ids, (len(scores), len(ids)))], axis=1)
        order = np.lexsort((candidates, -scores), axis=1)[:, : self._ids.shape[1]]
        self._scores[rows] = np.take_along_axis(scores, order, axis=1)
        self._ids[rows] = np.take_along_axis(candidates, order, axis=1)


def exhaustive(
    queries: np.ndarray, query_offsets: np.ndarray, tokens: np.ndarray, offsets: np.ndarray, k: int, ids: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The true top k by MaxSim of documents that lie in one array (a memory map will do); shapes, order and cost as in Exhaustive."""
    search = Exhaustive(queries, query_offsets, k)
    search.add(tokens, offsets, ids)
    return search.result()


def recall_at_k(truth: np.ndarray, found: np.ndarray, k: int) -> np.ndarray:
    """The share of the true top k that was found among the first k, for each query.

    truth, found  int64 (queries, >= k), best first, ABSENT where there is no further document; order within the k does not count
    returns       float64 (queries,); 1 where nothing was to be found
    """
    _check(truth, k)
    return np.array([_share(true[:k], hits[:k]) for true, hits in zip(truth, found, strict=True)], np.float64)


def relevant_recall_at_k(qrels: Qrels, found: np.ndarray, k: int) -> np.ndarray:
    """The share of the relevant documents among the first k; float64 (queries,), NaN where none is relevant (use nanmean)."""
    shares = np.full(len(found), np.nan)
    for i, (ids, gains) in enumerate(_judged(qrels, found)):
        if (gains > 0).any():
            shares[i] = _share(ids[gains > 0], found[i, :k])
    return shares


def ndcg_at_k(qrels: Qrels, found: np.ndarray, k: int) -> np.ndarray:
    """Normalised discounted cumulative gain with linear gains, as trec_eval and BEIR count it: sum of gain / log2(rank + 1).

    found    int64 (queries, any), best first; an id that is repeated counts once, at its better rank
    returns  float64 (queries,); NaN where no document is relevant: such a query says nothing (use nanmean)
    """
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    values = np.full(len(found), np.nan)
    for i, (ids, gains) in enumerate(_judged(qrels, found)):
        if not (gains > 0).any():
            continue
        gain_of = dict(zip(ids.tolist(), np.maximum(gains, 0.0).tolist(), strict=True))
        gained = [gain_of.pop(id_, 0.0) for id_ in found[i, :k].tolist()]
        ideal = np.sort(np.maximum(gains, 0.0))[::-1][:k]
        values[i] = (gained @ discounts[: len(gained)]) / (ideal @ discounts[: len(ideal)])
    return values


def percentiles(values: np.ndarray, ranks: Sequence[float] = (50.0, 95.0, 99.0)) -> np.ndarray:
    """float64, one per rank (0..100): the smallest value that so many per cent of the values do not exceed, never an interpolation."""
    if len(values) == 0:
        raise InvalidRequest("no values, no percentiles")
    return np.percentile(np.asarray(values, np.float64), ranks, method="inverted_cdf")


def _share(true: np.ndarray, hits: np.ndarray) -> float:
    wanted = set(true.tolist()) - {ABSENT}
    return len(wanted.intersection(hits.tolist())) / len(wanted) if wanted else 1.0


def _judged(qrels: Qrels, found: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    if len(qrels.offsets) - 1 != len(found):
        raise InvalidRequest("as many queries judged as answered", expected=len(qrels.offsets) - 1, found=len(found))
    cuts = qrels.offsets[1:-1]
    return list(zip(np.split(qrels.ids, cuts), np.split(qrels.gains, cuts), strict=True))


def _check(truth: np.ndarray, k: int) -> None:
    if k < 1 or truth.shape[1] < k:
        raise InvalidRequest("the truth must be known down to rank k", k=k, found=truth.shape[1])
