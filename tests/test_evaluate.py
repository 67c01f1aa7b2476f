"""The yardstick against plain loops: exhaustive MaxSim, recall, nDCG, percentiles."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine import evaluate
from engine.errors import InvalidRequest
from engine.evaluate import ABSENT, Exhaustive, Qrels, exhaustive, ndcg_at_k, percentiles, recall_at_k, relevant_recall_at_k

DIM = 24


def ragged(rng: np.random.Generator, lengths: list[int], dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray]:
    rows = rng.standard_normal((sum(lengths), DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(dtype), np.cumsum([0, *lengths]).astype(np.int64)


def by_loops(
    queries: np.ndarray, query_offsets: np.ndarray, tokens: np.ndarray, offsets: np.ndarray, ids: list[int]
) -> list[list[tuple[float, int]]]:
    """Every query's documents as (score, id), best first; documents without tokens are left out."""
    answers = []
    for i in range(len(query_offsets) - 1):
        query = queries[query_offsets[i] : query_offsets[i + 1]].astype(np.float64)
        scored = []
        for n, id_ in enumerate(ids):
            document = tokens[offsets[n] : offsets[n + 1]].astype(np.float64)
            if len(document):
                scored.append((sum(max(float(q @ d) for d in document) for q in query), id_))
        answers.append(sorted(scored, key=lambda hit: (-hit[0], hit[1])))
    return answers


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("block_tokens", "table_values"), [(evaluate.BLOCK_TOKENS, 4 << 20), (16, 64), (1, 1)])
def test_exhaustive_search_equals_plain_loops_however_it_is_blocked(
    monkeypatch: pytest.MonkeyPatch, dtype: type, block_tokens: int, table_values: int
) -> None:
    monkeypatch.setattr(evaluate, "BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(evaluate, "_TABLE_VALUES", table_values)
    rng = np.random.default_rng(1)
    tokens, offsets = ragged(rng, [0, 3, 1, 0, 40, 7, 5, 0, 2, 9, 0], dtype)
    queries, query_offsets = ragged(rng, [1, 5, 12])
    ids, scores = exhaustive(queries, query_offsets, tokens, offsets, 9)
    expected = by_loops(queries, query_offsets, tokens, offsets, list(range(11)))
    for i, hits in enumerate(expected):
        assert ids[i, :7].tolist() == [id_ for _, id_ in hits]
        np.testing.assert_allclose(scores[i, :7], [score for score, _ in hits], atol=1e-5)
    assert (ids[:, 7:] == ABSENT).all(), "seven documents have tokens"
    assert (scores[:, 7:] == -np.inf).all()


def test_exhaustive_search_gives_the_same_answer_for_documents_in_pieces_and_in_any_order() -> None:
    rng = np.random.default_rng(2)
    lengths = rng.integers(0, 12, 60).tolist()
    tokens, offsets = ragged(rng, lengths)
    queries, query_offsets = ragged(rng, [4, 4])
    whole = exhaustive(queries, query_offsets, tokens, offsets, 10)
    pieces = Exhaustive(queries, query_offsets, 10)
    for start in (40, 0, 20):
        ids = np.arange(start, start + 20)
        piece = tokens[offsets[start] : offsets[start + 20]]
        pieces.add(piece, offsets[start : start + 21] - offsets[start], ids)
    np.testing.assert_array_equal(pieces.result()[0], whole[0])
    np.testing.assert_allclose(pieces.result()[1], whole[1], atol=1e-5)


def test_equal_scores_are_ordered_by_lower_id_whatever_came_first() -> None:
    token = np.eye(1, DIM, dtype=np.float32)
    search = Exhaustive(token, np.array([0, 1]), 3)
    for id_ in (9, 4, 7, 2):
        search.add(token, np.array([0, 1]), np.array([id_]))
    assert search.result()[0].tolist() == [[2, 4, 7]]


def test_offsets_may_point_into_a_larger_array() -> None:
    rng = np.random.default_rng(3)
    tokens, offsets = ragged(rng, [5, 6, 7])
    queries, query_offsets = ragged(rng, [3])
    part = exhaustive(queries, query_offsets, tokens, offsets[1:], 2, np.array([1, 2]))
    alone = exhaustive(queries, query_offsets, tokens[5:], offsets[1:] - 5, 2, np.array([1, 2]))
    np.testing.assert_array_equal(part[0], alone[0])


def test_exhaustive_search_refuses_what_has_no_answer() -> None:
    token = np.eye(1, DIM, dtype=np.float32)
    with pytest.raises(InvalidRequest):
        Exhaustive(token, np.array([0, 0, 1]), 3)  # a query without tokens
    with pytest.raises(InvalidRequest):
        Exhaustive(token, np.array([0, 1]), 0)
    with pytest.raises(InvalidRequest):
        Exhaustive(token, np.array([0, 1]), 1).add(np.eye(1, DIM + 1, dtype=np.float32), np.array([0, 1]))
    with pytest.raises(InvalidRequest):
        Exhaustive(token, np.array([0, 1]), 1).add(token, np.array([0, 2]))


def test_recall_counts_the_true_top_k_and_not_its_order() -> None:
    truth = np.array([[1, 2, 3, 4], [5, 6, 7, ABSENT], [ABSENT] * 4])
    found = np.array([[4, 9, 1, 8], [7, 6, 5, ABSENT], [1, 2, 3, ABSENT]])
    assert recall_at_k(truth, found, 4).tolist() == [0.5, 1.0, 1.0]
    assert recall_at_k(truth, found, 1).tolist() == [0.0, 0.0, 1.0]
    assert recall_at_k(truth, found[:, :2], 4).tolist() == [0.25, 2 / 3, 1.0]
    with pytest.raises(InvalidRequest):
        recall_at_k(truth, found, 5)


def ndcg_by_loops(judged: dict[int, float], found: list[int], k: int) -> float:
    gained = sum(judged.get(id_, 0) / math.log2(rank + 2) for rank, id_ in enumerate(found[:k]))
    ideal = sum(gain / math.log2(rank + 2) for rank, gain in enumerate(sorted(judged.values(), reverse=True)[:k]))
    return gained / ideal


def test_ndcg_equals_plain_loops() -> None:
    rng = np.random.default_rng(4)
    judged = [{int(id_): float(rng.integers(0, 4)) for id_ in rng.permutation(50)[: rng.integers(3, 20)]} | {1: 1.0} for _ in range(20)]
    found = np.array([rng.permutation(50)[:30] for _ in range(20)])
    for k in (1, 10, 40):
        values = ndcg_at_k(Qrels.of(judged), found, k)
        expected = [ndcg_by_loops(row, hits, k) for row, hits in zip(judged, found.tolist(), strict=True)]
        np.testing.assert_allclose(values, expected, atol=1e-12)


def test_ndcg_by_hand() -> None:
    qrels = Qrels.of([{7: 1.0}, {7: 2.0, 8: 1.0}, {}, {3: 0.0}])
    found = np.array([[1, 7], [8, 7], [7, 8], [3, 1]])
    values = ndcg_at_k(qrels, found, 10)
    assert values[0] == pytest.approx(1 / math.log2(3))
    assert values[1] == pytest.approx((1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)))
    assert np.isnan(values[2:]).all(), "nothing relevant, nothing said"


def test_a_repeated_hit_earns_its_gain_once() -> None:
    assert ndcg_at_k(Qrels.of([{7: 1.0}]), np.array([[7, 7, 7]]), 3).tolist() == [1.0]


def test_relevant_recall_takes_positive_gains_only() -> None:
    qrels = Qrels.of([{1: 1.0, 2: 2.0, 3: 0.0}, {}])
    values = relevant_recall_at_k(qrels, np.array([[3, 1, 2], [1, 2, 3]]), 2)
    assert values[0] == 0.5
    assert np.isnan(values[1])
    with pytest.raises(InvalidRequest):
        relevant_recall_at_k(qrels, np.array([[1]]), 1)


def test_percentiles_are_values_that_occurred() -> None:
    values = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
    assert percentiles(values, (0, 20, 50, 95, 100)).tolist() == [1.0, 1.0, 3.0, 5.0, 5.0]
    with pytest.raises(InvalidRequest):
        percentiles(np.array([]))
