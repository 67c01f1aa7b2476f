"""Twin tests: every scoring kernel equals its slow twin in reference_scoring.py, on seeded random and on edge shapes."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import reference_scoring as slow
from engine.config import SearchParams
from engine.errors import InvalidRequest
from engine.scoring import fusion, topk
from engine.scoring.arrays import Decoder, Postings, Records
from engine.scoring.brute_force import maxsim, widened
from engine.scoring.candidates import choose_candidates, probe, rank_documents
from engine.scoring.cascade import SegmentArrays, StageStats, cascade, finish, finish_together, shortlist
from engine.scoring.centroid_scores import score_centroids, score_some_centroids
from engine.scoring.forward import Forward, centroid_maxsim
from engine.scoring.joined import join, size_bytes
from engine.scoring.maxsim import ExactScorer, best_tokens, exact_ordinals
from engine.scoring.rerank import chances, rerank
from engine.scoring.selection import best_lanes

TOLERANCE = 2e-4  # float32 sums of up to 70 similarities of size 1, against float64


def unit(rng, n, dim):
    rows = rng.standard_normal((n, dim)).astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def make_decoder(dim, nbits, affine):
    n_levels = 1 << nbits
    levels = np.linspace(-2, 2, n_levels)
    if not affine:
        levels = levels + 0.1 * np.sin(np.arange(n_levels) + 1)
    return Decoder(
        levels.astype(np.float32),
        np.linspace(0.9, 1.1, 256).astype(np.float32),
        np.linspace(0.005, 0.15, 256).astype(np.float32),
        dim,
        nbits,
    )


def make_records(rng, lengths, n_codes, decoder):
    """Records with gaps between documents and rubbish in the padding, as views of a section have them."""
    lengths = np.asarray(lengths, dtype=np.int64)
    gaps = lengths + rng.integers(0, 3, len(lengths))
    starts = np.cumsum(gaps) - gaps
    n_rows = max(int(gaps.sum()), 1)
    row_bytes = -(-decoder.payload_bytes // 4) * 4
    return Records(
        rng.integers(0, 256, (n_rows + 7, row_bytes), dtype=np.uint8),
        rng.integers(0, n_codes, n_rows + 3).astype(np.uint16),
        rng.integers(0, 256, (n_rows + 5, 2), dtype=np.uint8),
        starts + 7,
        starts + 3,
        starts + 5,
        lengths,
    )


def make_postings(records, n_codes):
    pairs = set()
    for ordinal, n in enumerate(records.n_tokens.tolist()):
        begin = int(records.code_start[ordinal])
        pairs |= {(int(code), ordinal) for code in records.codes[begin : begin + n]}
    ordered = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    offsets = np.searchsorted(ordered[:, 0], np.arange(n_codes + 1)).astype(np.int64)
    return Postings(offsets, ordered[:, 1].astype(np.uint16))


def make_segment(seed=0, lengths=(3, 0, 1, 12, 7, 40, 5, 5), n_codes=50, dim=24, nbits=4, affine=True):
    rng = np.random.default_rng(seed)
    decoder = make_decoder(dim, nbits, affine)
    records = make_records(rng, lengths, n_codes, decoder)
    return SegmentArrays.of(unit(rng, n_codes, dim), make_postings(records, n_codes), records, decoder)


def flat_lanes(lanes, n_tokens):
    return np.concatenate(list(lanes), axis=1)[:, :n_tokens]


QUERY_LENGTHS = (1, 16, 17, 33, 70)


# --- query x centroids ---


@pytest.mark.parametrize("n_query", QUERY_LENGTHS)
def test_centroid_lanes_are_the_table_within_one_step(n_query):
    rng = np.random.default_rng(n_query)
    centroids, query = unit(rng, 30, 20), 3 * unit(rng, n_query, 20)
    scores = score_centroids(query, centroids)
    np.testing.assert_allclose(scores.table[:, :n_query], centroids @ query.T, atol=1e-5)
    assert scores.width == (16 if n_query <= 16 else 32)
    lanes = flat_lanes(scores.lanes, n_query)
    below = scores.table[:, :n_query] - (scores.low + scores.step * lanes)
    assert below.min() > -1e-4 * scores.step - 1e-6
    assert below.max() <= scores.step * 1.001
    assert flat_lanes(scores.lanes, 1024)[:, n_query:].sum() == 0


def test_some_centroids_scored_leave_the_rest_unknown():
    rng = np.random.default_rng(1)
    centroids, query = unit(rng, 30, 20), unit(rng, 5, 20)
    codes = np.array([3, 29, 7])
    scores = score_some_centroids(query, centroids[codes], codes, 30)
    assert scores.known is not None
    assert np.flatnonzero(scores.known).tolist() == [3, 7, 29]
    np.testing.assert_allclose(scores.table[codes, :5], centroids[codes] @ query.T, atol=1e-5)
    assert score_some_centroids(query, centroids, np.arange(30), 30).known is None


# --- stages 1 and 2 ---


@pytest.mark.parametrize("n_query", QUERY_LENGTHS)
@pytest.mark.parametrize(("n_codes", "n_probe"), [(1, 1), (5, 8), (50, 1), (3000, 8), (3001, 32)])
def test_probe_takes_the_best_centroids_of_every_query_token(n_query, n_codes, n_probe):
    rng = np.random.default_rng(n_codes)
    scores = score_centroids(unit(rng, n_query, 16), unit(rng, n_codes, 16))
    probed = probe(scores, n_probe)
    pairs, missing = slow.probes(scores.table, n_query, n_probe)
    assert set(zip(probed.tokens.tolist(), probed.codes.tolist(), strict=True)) == pairs
    np.testing.assert_array_equal(probed.missing, missing.astype(np.float32))
    np.testing.assert_array_equal(probed.scores, scores.table[probed.codes, probed.tokens])
    inside = np.diff(probed.scores)[np.diff(probed.tokens) == 0]
    assert (inside >= 0).all()
    assert probed.grades.min() >= 1


def test_probe_obeys_threshold_and_unknown_centroids():
    rng = np.random.default_rng(2)
    query, centroids = unit(rng, 6, 16), unit(rng, 200, 16)
    scores = score_centroids(query, centroids)
    bar = float(np.quantile(scores.table[:, :6].max(axis=1), 0.95))
    probed = probe(scores, 8, bar)
    pairs, _ = slow.probes(scores.table, 6, 8, bar)
    assert set(zip(probed.tokens.tolist(), probed.codes.tolist(), strict=True)) == pairs
    assert 0 < len(pairs) < 48
    assert len(probe(scores, 8, 99.0).codes) == 0
    codes = rng.permutation(200)[:50]
    partial = score_some_centroids(query, centroids[codes], codes, 200)
    pairs, missing = slow.probes(partial.table, 6, 8, None, partial.known)
    probed = probe(partial, 8)
    assert set(zip(probed.tokens.tolist(), probed.codes.tolist(), strict=True)) == pairs
    np.testing.assert_array_equal(probed.missing, missing.astype(np.float32))


@pytest.mark.parametrize("n_query", QUERY_LENGTHS)
def test_documents_are_ranked_by_their_best_probed_grades(n_query):
    segment = make_segment(seed=n_query, lengths=np.random.default_rng(n_query).integers(0, 9, 77))
    rng = np.random.default_rng(3)
    scores = score_centroids(unit(rng, n_query, 24), segment.centroids)
    probed = probe(scores, 3)
    sums = rank_documents(probed, segment.postings, 77)
    np.testing.assert_array_equal(sums, slow.rank_documents(probed, segment.postings, 77))
    approximate = probed.grade_sums_as_scores(sums)
    assert (np.diff(approximate[np.argsort(sums, kind="stable")]) >= 0).all()


def test_candidates_are_reached_allowed_and_best():
    sums = np.array([5, 0, 7, 7, 1, 7, 0, 2], dtype=np.uint32)
    assert choose_candidates(sums, 3).tolist() == [2, 3, 5]
    assert choose_candidates(sums, 2).tolist() == [2, 3]
    assert choose_candidates(sums, 100).tolist() == [0, 2, 3, 4, 5, 7]
    mask = np.array([True, True, False, True, True, False, True, False])
    assert choose_candidates(sums, 100, mask).tolist() == [0, 3, 4]
    assert choose_candidates(sums, 100, np.zeros(8, dtype=bool)).tolist() == []


# --- stage 3 ---


@pytest.mark.parametrize("n_query", QUERY_LENGTHS)
def test_centroid_maxsim_equals_its_twin_on_all_and_on_some_documents(n_query):
    segment = make_segment(seed=4, lengths=np.random.default_rng(n_query).integers(0, 30, 60))
    scores = score_centroids(unit(np.random.default_rng(5), n_query, 24), segment.centroids)
    for ordinals in (None, np.random.default_rng(6).permutation(60)[:23], np.array([7]), np.empty(0, dtype=np.int64)):
        approximate, lanes = centroid_maxsim(scores, segment.forward, ordinals)
        every = np.arange(60) if ordinals is None else ordinals
        expected = slow.centroid_lanes(scores, segment.postings, 60, every)
        np.testing.assert_array_equal(flat_lanes(lanes, n_query), expected)
        np.testing.assert_allclose(approximate, scores.low * n_query + scores.step * expected.sum(axis=1), atol=1e-4)


def test_centroid_maxsim_walks_documents_with_very_many_codes(monkeypatch):
    monkeypatch.setattr("engine.scoring.forward.MAX_POSITIONS", 8)
    monkeypatch.setattr("engine.scoring.forward.BLOCK_DOCUMENTS", 4)
    segment = make_segment(seed=7, lengths=[0, 300, 9, 8, 7, 1, 80, 60, 3, 30, 29])
    scores = score_centroids(unit(np.random.default_rng(8), 5, 24), segment.centroids)
    for ordinals in (None, np.array([9, 1, 4, 2, 6, 7])):
        _, lanes = centroid_maxsim(scores, segment.forward, ordinals)
        every = np.arange(11) if ordinals is None else ordinals
        np.testing.assert_array_equal(flat_lanes(lanes, 5), slow.centroid_lanes(scores, segment.postings, 11, every))


def test_forward_of_a_segment_without_postings_scores_nothing():
    forward = Forward.from_postings(Postings(np.zeros(6, dtype=np.int64), np.empty(0, dtype=np.uint16)), 3)
    scores = score_centroids(np.ones((2, 4), dtype=np.float32), np.ones((5, 4), dtype=np.float32))
    _, lanes = centroid_maxsim(scores, forward)
    assert lanes.shape == (1, 3, 16)
    assert lanes.sum() == 0


# --- stage 4 ---


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
@pytest.mark.parametrize(("dim", "n_query"), [(24, 5), (13, 1), (128, 32), (9, 17), (3, 16), (1, 33), (48, 70)])
def test_exact_scores_equal_their_twin(dim, n_query, nbits, affine):
    segment = make_segment(seed=dim, lengths=(3, 0, 1, 12, 7, 40, 5, 4), dim=dim, nbits=nbits, affine=affine)
    query = unit(np.random.default_rng(9), n_query, dim)
    scores = score_centroids(query, segment.centroids)
    ordinals = np.array([5, 1, 0, 2, 7, 3])
    expected = slow.exact_maxsim(query, segment.centroids, segment.decoder, segment.records, ordinals)
    got = exact_ordinals(scores, segment.records, segment.decoder, ordinals)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    assert got.dtype == np.float32


def test_exact_scores_do_not_depend_on_blocks(monkeypatch):
    segment = make_segment(seed=10, lengths=np.random.default_rng(10).integers(0, 60, 40), dim=32)
    scores = score_centroids(unit(np.random.default_rng(11), 20, 32), segment.centroids)
    whole = exact_ordinals(scores, segment.records, segment.decoder, np.arange(40))
    monkeypatch.setattr("engine.scoring.selection.RECTANGLE_TOKENS", 50)
    monkeypatch.setattr("engine.scoring.maxsim.SMALL_PRODUCT", 32 * 32 * 16)
    monkeypatch.setattr("engine.scoring.maxsim.BLOCK_BYTES", 1)
    np.testing.assert_allclose(exact_ordinals(scores, segment.records, segment.decoder, np.arange(40)), whole, atol=1e-5)


def test_tokens_of_unknown_codes_are_left_out():
    segment = make_segment(seed=12, n_codes=20)
    rng = np.random.default_rng(13)
    query = unit(rng, 6, 24)
    codes = np.sort(rng.permutation(20)[:6])
    scores = score_some_centroids(query, segment.centroids[codes], codes, 20)
    ordinals = np.arange(8)
    expected = slow.exact_maxsim(query, segment.centroids, segment.decoder, segment.records, ordinals, scores.known)
    np.testing.assert_allclose(exact_ordinals(scores, segment.records, segment.decoder, ordinals), expected, atol=TOLERANCE)
    assert np.isneginf(expected).any()


@pytest.mark.parametrize("n_query", QUERY_LENGTHS)
def test_a_second_look_with_a_wide_reach_finds_every_best_token(n_query):
    segment = make_segment(seed=14, lengths=np.random.default_rng(14).integers(0, 60, 40))
    scores = score_centroids(unit(np.random.default_rng(15), n_query, 24), segment.centroids)
    ordinals = np.random.default_rng(16).permutation(40)
    _, lanes = centroid_maxsim(scores, segment.forward, ordinals)
    scorer = ExactScorer(scores, segment.records, segment.decoder)
    every = scorer.all_tokens(ordinals)
    n_every = scorer.n_tokens_scored
    assert n_every == segment.records.n_tokens.sum()
    first = scorer.first_look(ordinals, lanes)
    n_first = scorer.n_tokens_scored - n_every
    assert 0 < n_first < n_every
    assert (first <= every).all()
    np.testing.assert_array_equal(np.isfinite(first), np.isfinite(every))
    second = scorer.second_look(ordinals, lanes, first, 1e9)
    n_second = scorer.n_tokens_scored - n_first - n_every
    assert n_second <= n_every - n_first  # the rest, but for what even the widest reach leaves below the floor
    np.testing.assert_allclose(second, every, atol=1e-6)
    near = scorer.second_look(ordinals, lanes, first, 0.5)
    assert 0 < scorer.n_tokens_scored - n_second - n_first - n_every < n_second
    assert (near >= first).all()
    assert (near <= every + 1e-6).all()


@pytest.mark.parametrize("n_query", QUERY_LENGTHS)
def test_the_first_look_takes_the_last_token_of_each_best_centroid(n_query):
    segment = make_segment(seed=14, lengths=np.random.default_rng(14).integers(0, 30, 20))
    query = unit(np.random.default_rng(15), n_query, 24)
    scores = score_centroids(query, segment.centroids)
    _, lanes = centroid_maxsim(scores, segment.forward)
    best = ExactScorer(scores, segment.records, segment.decoder).first_look(np.arange(20), lanes)
    flat = np.concatenate(list(scores.lanes), axis=1)[:, :n_query].astype(int)
    for ordinal in range(20):
        table, _ = slow.document_similarities(query, segment.centroids, segment.decoder, segment.records, ordinal)
        begin = segment.records.code_start[ordinal]
        own = flat[segment.records.codes[begin : begin + len(table)]]
        chosen = (own >= own.max(axis=0)).any(axis=1) if len(table) else np.empty(0, dtype=bool)
        codes = segment.records.codes[begin : begin + len(table)].tolist()
        for token in range(len(table)):
            chosen[token] &= codes[token] not in codes[token + 1 :]
        expected = table[chosen].max(axis=0) if len(table) else -np.inf
        np.testing.assert_allclose(best[ordinal], expected, atol=1e-5)


def test_lanes_from_records_equal_lanes_from_postings():
    segment = make_segment(seed=17, lengths=np.random.default_rng(17).integers(0, 60, 40))
    scores = score_centroids(unit(np.random.default_rng(18), 40, 24), segment.centroids)
    ordinals = np.random.default_rng(19).permutation(40)
    np.testing.assert_array_equal(best_lanes(scores, segment.records, ordinals), centroid_maxsim(scores, segment.forward, ordinals)[1])
    exact = exact_ordinals(scores, segment.records, segment.decoder, ordinals)
    np.testing.assert_allclose(exact_ordinals(scores, segment.records, segment.decoder, ordinals, 99.0), exact, atol=1e-5)


def test_best_tokens_name_the_winner_of_each_query_token():
    segment = make_segment(seed=20)
    query = unit(np.random.default_rng(21), 18, 24)
    scores = score_centroids(query, segment.centroids)
    for ordinal in (5, 2):
        positions, similarities = best_tokens(scores, segment.records, segment.decoder, ordinal)
        table, _ = slow.document_similarities(query, segment.centroids, segment.decoder, segment.records, ordinal)
        np.testing.assert_array_equal(positions, table.argmax(axis=0))
        np.testing.assert_allclose(similarities, table.max(axis=0), atol=1e-5)
    with pytest.raises(InvalidRequest):
        best_tokens(scores, segment.records, segment.decoder, 1)


def test_threads_do_not_share_scratch_memory():
    segment = make_segment(seed=22, lengths=np.random.default_rng(22).integers(1, 60, 60), dim=64)
    queries = [unit(np.random.default_rng(s), 20, 64) for s in range(8)]
    params = SearchParams(k=10)
    alone = [cascade(segment, query, params)[1] for query in queries]
    together: list[np.ndarray | None] = [None] * 8

    def work(i):
        for _ in range(20):
            together[i] = cascade(segment, queries[i], params)[1]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(got, expected)


# --- rerank and cascade ---


def test_rerank_scores_everything_when_the_bound_is_small():
    approximate = np.linspace(9, 1, 50).astype(np.float32)
    exact = np.random.default_rng(23).standard_normal(50).astype(np.float32)
    np.testing.assert_array_equal(rerank(approximate, lambda p: exact[p], 10, 20), exact[:20])
    np.testing.assert_array_equal(rerank(approximate, lambda p: exact[p], 30, 20), exact[:30])
    assert len(rerank(approximate[:0], lambda p: exact[p], 30, 20)) == 0


@pytest.mark.parametrize("k", [1, 10, 100])
def test_rerank_stops_early_and_loses_almost_nothing(k):
    rng = np.random.default_rng(24)
    lost, scored = 0, 0
    for _ in range(20):
        exact = rng.gumbel(0, 1, 4000)
        approximate = exact + 0.3 * rng.standard_normal(4000)
        order = np.argsort(-approximate)
        exact, approximate = exact[order].astype(np.float32), approximate[order].astype(np.float32)
        got = rerank(approximate, lambda p, e=exact: e[p], k, 4000)
        scored += len(got)
        lost += k - len(set(topk.top_k(got, k).tolist()) & set(topk.top_k(exact, k).tolist()))
    assert scored < 20 * 2000
    assert lost <= 0.01 * 20 * k + 1


def test_rerank_stops_at_once_below_the_floor_of_another_segment():
    approximate = np.linspace(9, 1, 3000).astype(np.float32)
    noise = np.random.default_rng(25).standard_normal(3000).astype(np.float32) * 0.1
    unaware = rerank(approximate, lambda p: approximate[p] + noise[p], 100, 3000)
    aware = rerank(approximate, lambda p: approximate[p] + noise[p], 100, 3000, floor=50.0)
    assert len(aware) <= len(unaware)


def test_chances_fall_with_the_distance_to_the_bar():
    approximate = np.linspace(10, 8, 64).astype(np.float32)
    exact = approximate + np.random.default_rng(26).standard_normal(64).astype(np.float32) * 0.1
    chance = chances(approximate, exact, np.array([11, 9.5, 9.0, 5.0], dtype=np.float32), 10)
    assert (np.diff(chance) < 0).all()
    assert chance[0] > 0.99
    assert chance[-1] < 1e-3
    assert chances(approximate[:5], exact[:5], approximate[5:], 10).tolist() == [1.0] * 59


@pytest.mark.parametrize("params", [SearchParams(k=7), SearchParams(k=7, n_candidates=20, n_probe=16), SearchParams(k=300)])
@pytest.mark.parametrize("n_query", [1, 16, 33])
def test_cascade_finds_the_best_documents(params, n_query, monkeypatch):
    monkeypatch.setattr("engine.scoring.cascade.SECOND_LOOK_SPREADS", 9.0)
    segment = make_segment(seed=27, lengths=np.random.default_rng(27).integers(0, 30, 90), n_codes=60)
    query = unit(np.random.default_rng(28), n_query, 24)
    ordinals, scores, stats = cascade(segment, query, params)
    exact = slow.exact_maxsim(query, segment.centroids, segment.decoder, segment.records, range(90))
    expected = [n for n in slow.top_k(exact, params.k) if np.isfinite(exact[n])]
    assert set(stats.times) >= {"centroids", "centroid_maxsim", "exact"}
    assert stats.n_reranked <= stats.n_candidates
    np.testing.assert_allclose(scores[np.isfinite(scores)], exact[ordinals][np.isfinite(scores)], atol=1e-4)
    if params.n_candidates > 90:
        found = [n for n in ordinals.tolist() if np.isfinite(exact[n])]
        overlap = len(set(found) & set(expected)) / len(expected)
        assert overlap >= (1.0 if params.k > 90 else 6 / 7)
    assert len(ordinals) == len(set(ordinals.tolist()))


def test_a_mask_restricts_and_an_empty_mask_is_not_no_mask():
    segment = make_segment(seed=29, lengths=np.random.default_rng(29).integers(1, 30, 90))
    query = unit(np.random.default_rng(30), 8, 24)
    mask = np.zeros(90, dtype=bool)
    for params in (SearchParams(k=50), SearchParams(k=50, n_candidates=10), SearchParams(k=50, centroid_score_threshold=-1.0)):
        assert len(cascade(segment, query, params, mask)[0]) == 0
        allowed = mask.copy()
        allowed[::3] = True
        ordinals = cascade(segment, query, params, allowed)[0]
        assert len(ordinals) > 0
        assert (ordinals % 3 == 0).all()
        assert len(cascade(segment, query, params, None)[0]) > len(ordinals) or params.n_candidates == 10
    assert len(cascade(segment, query, SearchParams(k=0))[0]) == 0


def test_documents_reached_by_no_probe_above_the_threshold_are_no_candidates():
    segment = make_segment(seed=31, lengths=np.random.default_rng(31).integers(1, 4, 90), n_codes=80)
    query = unit(np.random.default_rng(32), 4, 24)
    scores = score_centroids(query, segment.centroids)
    bar = float(np.quantile(scores.table[:, :4].max(axis=1), 0.9))
    params = SearchParams(k=90, n_probe=4, centroid_score_threshold=bar)
    pairs, _ = slow.probes(scores.table, 4, 4, bar)
    codes = {code for _, code in pairs}
    reached = {n for n, own in enumerate(slow.document_codes(segment.postings, 90)) if own & codes}
    assert set(cascade(segment, query, params)[0].tolist()) == reached
    assert len(cascade(segment, query, SearchParams(k=9, centroid_score_threshold=50.0))[0]) == 0


def test_one_document_is_found():
    segment = make_segment(seed=33, lengths=[4])
    query = unit(np.random.default_rng(34), 3, 24)
    ordinals, scores, _ = cascade(segment, query, SearchParams(k=5))
    assert ordinals.tolist() == [0]
    expected = slow.exact_maxsim(query, segment.centroids, segment.decoder, segment.records, [0])
    np.testing.assert_allclose(scores, expected, atol=0.05)


def test_equal_documents_come_in_rising_order():
    segment = make_segment(seed=35, lengths=[6] * 9)
    records = segment.records
    same = Records(
        records.rows,
        records.codes,
        records.scalars,
        np.full(9, records.residual_start[0]),
        np.full(9, records.code_start[0]),
        np.full(9, records.scalar_start[0]),
        records.n_tokens,
    )
    segment = SegmentArrays.of(segment.centroids, make_postings(same, 50), same, segment.decoder)
    for k in (4, 9):
        ordinals, scores, _ = cascade(segment, unit(np.random.default_rng(36), 5, 24), SearchParams(k=k))
        assert ordinals.tolist() == list(range(k))
        assert len(set(scores.tolist())) == 1


def test_stages_run_apart_give_what_the_cascade_gives():
    segment = make_segment(seed=37, lengths=np.random.default_rng(37).integers(0, 30, 90))
    query = unit(np.random.default_rng(38), 20, 24)
    params = SearchParams(k=10, n_candidates=30)
    whole = cascade(segment, query, params)
    scores = score_centroids(query, segment.centroids)
    stats = StageStats()
    listed = shortlist(segment, scores, params, None, stats, probe(scores, params.n_probe))
    assert (np.diff(listed.approximate) <= 0).all()
    ordinals, exact = finish(segment, scores, listed.cut(len(listed.ordinals)), params, stats)
    np.testing.assert_array_equal(ordinals, whole[0])
    np.testing.assert_array_equal(exact, whole[1])


def test_segments_finished_together_give_the_best_of_all():
    segments = [make_segment(seed=s, lengths=np.random.default_rng(s).integers(0, 30, 50)) for s in (50, 51, 52)]
    query = unit(np.random.default_rng(53), 20, 24)
    params = SearchParams(k=10, n_rerank=1000)
    stats = StageStats()
    parts = []
    for segment in segments:
        scores = score_centroids(query, segment.centroids)
        parts.append((segment, scores, shortlist(segment, scores, params, None, stats)))
    together = finish_together(parts, params, stats)
    assert sum(len(ordinals) for ordinals, _ in together) == 10
    apart = sorted((score for segment in segments for score in cascade(segment, query, SearchParams(k=10))[1].tolist()), reverse=True)
    np.testing.assert_allclose(sorted(np.concatenate([scores for _, scores in together]), reverse=True), apart[:10], atol=1e-5)
    assert [len(o) for o, _ in finish_together(parts, SearchParams(k=0), stats)] == [0, 0, 0]
    assert finish_together([], params, stats) == []


def test_joined_segments_score_as_each_by_itself():
    """Bit for bit, documents without tokens and empty segments included: the approximate scores, the lanes and the exact scores."""
    lengths = [np.random.default_rng(60).integers(0, 30, 50), (), (0, 4, 0), np.random.default_rng(61).integers(1, 200, 20)]
    segments = [make_segment(seed=60 + n, lengths=own) for n, own in enumerate(lengths)]
    segments = [SegmentArrays.of(segments[0].centroids, one.postings, one.records, segments[0].decoder) for one in segments]
    joined = join(segments)
    assert joined.n_documents == sum(segment.n_documents for segment in segments)
    assert size_bytes(joined) > joined.records.rows.nbytes
    scores = score_centroids(unit(np.random.default_rng(62), 20, 24), joined.centroids)
    before = np.cumsum([0, *(segment.n_documents for segment in segments)])
    approximate, lanes = centroid_maxsim(scores, joined.forward)
    exact = exact_ordinals(scores, joined.records, joined.decoder, np.arange(joined.n_documents))
    for first, last, segment in zip(before, before[1:], segments, strict=False):
        alone, own_lanes = centroid_maxsim(scores, segment.forward)
        np.testing.assert_array_equal(approximate[first:last], alone)
        np.testing.assert_array_equal(lanes[:, first:last], own_lanes)
        np.testing.assert_allclose(
            exact[first:last], exact_ordinals(scores, segment.records, segment.decoder, np.arange(segment.n_documents)), atol=1e-5
        )


# --- brute force ---


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("n_query", QUERY_LENGTHS)
@pytest.mark.parametrize("lengths", [(), (0,), (1,), (0, 3, 0, 0, 9, 1, 0), (700,) * 8, (5000, 1, 2)])
def test_flat_maxsim_equals_its_twin(dtype, n_query, lengths):
    if sum(lengths) > 1000 and n_query not in (1, 17):
        pytest.skip("the twin is slow")
    rng = np.random.default_rng(39)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens, query = unit(rng, int(offsets[-1]), 10).astype(dtype), unit(rng, n_query, 10)
    got = maxsim(query, tokens, offsets)
    np.testing.assert_allclose(got, slow.maxsim(query, tokens, offsets), atol=TOLERANCE)
    assert got.dtype == np.float32


def test_every_finite_half_is_widened_exactly():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(-1, 64)
    np.testing.assert_array_equal(widened(halves).view(np.uint32), halves.astype(np.float32).view(np.uint32))


def test_flat_maxsim_refuses_another_dimension():
    with pytest.raises(InvalidRequest, match="dimensions"):
        maxsim(np.ones((2, 3), dtype=np.float32), np.ones((2, 4), dtype=np.float32), np.array([0, 2]))


# --- top k and fusion ---


@pytest.mark.parametrize("k", [0, 1, 3, 8, 99])
def test_top_k_equals_its_twin_on_ties_and_non_finite_scores(k):
    rng = np.random.default_rng(40)
    for _ in range(50):
        n = int(rng.integers(0, 30))
        scores = rng.integers(-2, 3, n).astype(np.float32)
        scores[rng.random(n) < 0.2] = rng.choice([np.nan, np.inf, -np.inf])
        ids = rng.permutation(1000)[:n]
        assert topk.top_k(scores, k).tolist() == slow.top_k(scores, k)
        assert topk.top_k(scores, k, ids).tolist() == slow.top_k(scores, k, ids)
        assert topk.best_set(scores, k).tolist() == sorted(slow.top_k(scores, k))
    counts = np.array([3, 9, 9, 1], dtype=np.uint32)
    assert topk.top_k(counts, 3).tolist() == [1, 2, 0]
    assert topk.best_set(counts, 1).tolist() == [1]


def test_kth_score_counts_finite_scores_only():
    scores = np.array([3, np.nan, 1, 2, np.inf], dtype=np.float32)
    assert topk.kth_score(scores, 1) == 3
    assert topk.kth_score(scores, 3) == 1
    assert topk.kth_score(scores, 4) == -np.inf
    assert topk.kth_score(scores, 40) == -np.inf


@pytest.mark.parametrize("method", ["relative_score", "rrf"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_fusion_equals_its_twin(method, alpha):
    rng = np.random.default_rng(41)
    for n_semantic, n_keyword in ((0, 0), (0, 3), (3, 0), (1, 1), (30, 30), (5, 40)):
        semantic = list(zip(rng.permutation(60)[:n_semantic].tolist(), np.sort(rng.integers(0, 9, n_semantic))[::-1].tolist(), strict=True))
        keyword = list(zip(rng.permutation(60)[:n_keyword].tolist(), np.sort(rng.integers(0, 9, n_keyword))[::-1].tolist(), strict=True))
        sides = [np.array([[i for i, _ in side], [s for _, s in side]], dtype=np.float64).reshape(2, -1) for side in (semantic, keyword)]
        (semantic_ids, semantic_scores), (keyword_ids, keyword_scores) = sides
        ids, scores = fusion.fuse(
            method, semantic_ids.astype(np.int64), semantic_scores, keyword_ids.astype(np.int64), keyword_scores, alpha, 20
        )
        expected = slow.fuse(method, semantic, keyword, alpha, 20)
        assert ids.tolist() == [i for i, _ in expected]
        np.testing.assert_allclose(scores, [s for _, s in expected], atol=1e-6)


def test_fusion_of_long_lists_takes_the_other_path_to_the_same_scores(monkeypatch):
    rng = np.random.default_rng(42)
    ids, scores = np.arange(500), np.sort(rng.random(500))[::-1]
    short = fusion.fuse("relative_score", ids, scores, ids[::-1], scores, 0.4, 50)
    monkeypatch.setattr(fusion, "NUMEXPR_LENGTH", 10)
    long = fusion.fuse("relative_score", ids, scores, ids[::-1], scores, 0.4, 50)
    np.testing.assert_array_equal(short[0], long[0])
    np.testing.assert_allclose(short[1], long[1], atol=1e-12)


@pytest.mark.parametrize(("method", "alpha"), [("max", 0.5), ("rrf", -0.1), ("rrf", 1.1), ("rrf", float("nan"))])
def test_fusion_refuses_nonsense(method, alpha):
    one = np.array([1])
    with pytest.raises(InvalidRequest):
        fusion.fuse(method, one, one, one, one, alpha, 5)
