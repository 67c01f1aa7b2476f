"""Sameness: however documents lie in segments, wherever they are read from, the hits do not change; and recall stays above a number.

Scores may differ by 1e-4 between layouts: BLAS adds in another order for another block shape, and codecs differ between builds.
"""

from __future__ import annotations

import asyncio

import msgspec
import numpy as np
import pytest

from corpus import Corpus, make_corpus
from engine.config import MAX_SEGMENT_DOCUMENTS, ColdParams, IndexConfig, MaintenanceParams, SearchParams
from engine.errors import CorruptData, InvalidRequest
from engine.evaluate import recall_at_k
from engine.format import names
from engine.index.commit import create
from engine.index.compact import compact
from engine.index.reader import Reader, Snapshot
from engine.near import company
from engine.searcher import Answer, Searcher
from engine.store.base import ObjectStore
from engine.store.objects import open_store

CORPUS = make_corpus(400, dim=32)
TOLERANCE = 1e-4
K10 = SearchParams(k=10)
READ_ALL = ColdParams(n_probe=10_000, n_rerank=10_000, max_gets=10_000, max_bytes=1 << 31, max_cell_bytes=1 << 30)


async def indexed(store: ObjectStore, cuts: list[int], corpus: Corpus = CORPUS, name: str = "x", nbits: int = 4) -> Reader:
    """An index whose flat segments end at `cuts`."""
    reader = Reader(store)
    await create(store, name, IndexConfig(nbits=nbits))
    for first, last in zip([0, *cuts], [*cuts, len(corpus)], strict=True):
        await reader.writer(name).add(*corpus.part(first, last), fields=[{"n": n, "even": n % 2 == 0} for n in range(first, last)])
    return reader


async def answers(reader: Reader, name: str = "x", params: SearchParams = K10, **options: object) -> list[Answer]:
    snapshot = await reader.snapshot(name)
    return await Searcher(reader).search(snapshot, CORPUS.queries, params, **options)  # type: ignore[arg-type]


def assert_same(first: list[Answer], second: list[Answer], tolerance: float = TOLERANCE) -> None:
    """The same hits, except among scores closer than the tolerance."""
    for one, other in zip(first, second, strict=True):
        assert np.allclose(one.scores, other.scores, atol=tolerance)
        by_id = dict(zip(other.ids.tolist(), other.scores.tolist(), strict=True))
        for document_id, score in zip(one.ids.tolist(), one.scores.tolist(), strict=True):
            if document_id not in by_id:
                assert abs(score - one.scores[-1]) < tolerance


async def test_flat_search_is_exhaustive_search() -> None:
    reader = await indexed(open_store("memory://"), [])
    for query, answer in zip(CORPUS.queries, await answers(reader), strict=True):
        exact = CORPUS.exact_scores(query)
        assert np.allclose(answer.scores, np.sort(exact)[::-1][:10], atol=2e-3)  # float16 storage


@pytest.mark.parametrize("cuts", [[200], [1, 2, 399], list(range(40, 400, 40))])
async def test_hits_do_not_depend_on_how_documents_are_cut_into_flat_segments(cuts: list[int]) -> None:
    whole = await indexed(open_store("memory://"), [])
    cut = await indexed(open_store("memory://"), cuts)
    assert_same(await answers(whole), await answers(cut))


async def test_hits_are_the_same_before_and_after_compaction_up_to_quantisation() -> None:
    reader = await indexed(open_store("memory://"), [100, 300], nbits=8)
    before = await answers(reader)
    await compact(reader, "x", force=True)
    after = await answers(reader)
    assert_same(before, after, tolerance=0.05)
    assert np.mean([one.ids[0] == other.ids[0] for one, other in zip(before, after, strict=True)]) >= 0.85


async def test_hits_do_not_depend_on_how_quantised_documents_are_cut() -> None:
    """The same codec, one segment or several: a second compaction merges what the first made."""
    reader = await indexed(open_store("memory://"), [100, 200, 300])
    small = MaintenanceParams(max_segment_documents=120)
    await compact(reader, "x", params=small, force=True)
    snapshot = await reader.snapshot("x")
    assert len(snapshot.segments) == 4
    cut = await answers(reader)
    await compact(reader, "x", params=MaintenanceParams(merge_factor=2), force=True)
    snapshot = await reader.snapshot("x")
    assert len(snapshot.segments) < 4
    assert_same(cut, await answers(reader))


async def beside_a_large_one(sizes: list[int]) -> Reader:
    """An index whose first segment has 300 documents of the corpus, or what the others leave, and the others these many, all of one codec."""
    reader = Reader(open_store("memory://"))
    await create(reader.store, "x", IndexConfig(nbits=4))
    ends = np.cumsum([min(300, len(CORPUS) - sum(sizes)), *sizes]).tolist()
    for first, last in zip([0, *ends], ends, strict=False):
        await reader.writer("x").add(*CORPUS.part(first, last), fields=[{"n": n} for n in range(first, last)])
        await compact(reader, "x", force=True, params=MaintenanceParams(merge_factor=100))
    return reader


async def test_small_segments_beside_a_large_one_answer_as_if_they_were_merged() -> None:
    """They are searched joined, and share the large one's exact stage; deleted documents, patches and keys are still their own segments'."""
    reader = await beside_a_large_one([20, 30, 10, 25])
    assert company((await reader.snapshot("x")).segments) == (0, 1, 2, 3, 4)
    writer = reader.writer("x")
    await writer.delete(np.array([4, 301, 302, 330, 360]))
    await writer.update(np.array([303, 331]), {"n": -1})
    apart = await answers(reader, with_rows=True, explain=True)
    for answer in apart:
        assert all(row["n"] in (-1, document_id) for row, document_id in zip(answer.rows, answer.ids.tolist(), strict=True))
        assert not set(answer.ids.tolist()) & {4, 301, 302, 330, 360}
        assert answer.matches is not None
        assert np.allclose([sum(similarity for *_, similarity in hit) for hit in answer.matches], answer.scores, atol=1e-3)
    assert {document_id >= 300 for answer in apart for document_id in answer.ids.tolist()} == {True, False}
    await compact(reader, "x", params=MaintenanceParams(merge_factor=2), force=True)
    assert len((await reader.snapshot("x")).segments) < 5
    assert_same(apart, await answers(reader))


async def test_what_was_joined_is_let_go_when_another_small_segment_comes() -> None:
    reader = await beside_a_large_one([20, 20])
    searcher = Searcher(reader)
    for first in (340, 350, 360):
        await searcher.search(await reader.snapshot("x"), CORPUS.queries[:1], K10, mode="warm")
        assert sum(isinstance(key, tuple) and key[0] == "joined" for key in reader.parts.memory.keys()) == 1  # noqa: SIM118
        await reader.writer("x").add(*CORPUS.part(first, first + 10))
        await compact(reader, "x", force=True, params=MaintenanceParams(merge_factor=100))


async def test_only_what_is_small_beside_the_largest_keeps_it_company() -> None:
    reader = await beside_a_large_one([20, 80, 30])
    segments = (await reader.snapshot("x")).segments
    assert [segments[n].n_documents for n in company(segments)] == [270, 20, 80, 30]
    assert [segments[1:][n].n_documents for n in company(segments[1:])] == [80, 20, 30]
    assert company(segments[:1]) == company(()) == ()


async def test_what_is_joined_has_no_more_documents_than_a_segment_may_have() -> None:
    """Ordinals of postings have sixteen bits: one document more, and hits would be those of other documents."""
    reader = await beside_a_large_one([20])
    large, small = (await reader.snapshot("x")).segments
    large = msgspec.structs.replace(large, n_tokens=1_000_000)
    small = msgspec.structs.replace(small, n_documents=2_000, n_tokens=2_000, size_bytes=200_000)
    kept = company([large, *[small] * 60])
    assert kept == (0, *range(1, 33))
    assert sum(small.n_documents for _ in kept[1:]) <= MAX_SEGMENT_DOCUMENTS


async def test_a_cold_search_that_reads_everything_finds_what_a_warm_one_finds() -> None:
    reader = await indexed(open_store("memory://"), [])
    await compact(reader, "x", force=True)
    snapshot = await reader.snapshot("x")
    everything = SearchParams(k=10, n_rerank=10_000)
    warm = await Searcher(reader).search(snapshot, CORPUS.queries, everything, mode="warm")
    for query, expected in zip(CORPUS.queries, warm, strict=True):
        cold_reader = Reader(reader.store)
        [cold] = await Searcher(cold_reader, cold_params=READ_ALL).search(snapshot, [query], everything, mode="cold")
        assert_same([expected], [cold])
        assert cold.rows == expected.rows


async def test_flat_and_quantised_segments_are_searched_together() -> None:
    reader = await indexed(open_store("memory://"), [200], nbits=8)
    await compact(reader, "x", force=True, max_steps=2)
    more = make_corpus(30, seed=99)
    added = await reader.writer("x").add(more.tokens, more.offsets)
    snapshot = await reader.snapshot("x")
    assert {segment.kind for segment in snapshot.segments} == {"flat", "quantised"}
    [answer] = await Searcher(reader).search(snapshot, [more.tokens[:6]], K10)
    assert answer.ids[0] == added.ids[0]


async def test_deleted_documents_are_no_hits_warm_cold_or_flat() -> None:
    reader = await indexed(open_store("memory://"), [])
    [first, *_] = await answers(reader)
    gone = first.ids[:3]
    await reader.writer("x").delete(gone)
    for stage in ("flat", "quantised"):
        for mode in ("warm", "cold"):
            for answer in await answers(reader, mode=mode):
                assert not set(answer.ids.tolist()) & set(gone.tolist()), stage
        await compact(reader, "x", force=True)


async def test_no_filter_is_everything_and_an_empty_one_is_nothing() -> None:
    reader = await indexed(open_store("memory://"), [150])
    assert all(len(answer.ids) == 10 for answer in await answers(reader, subset=None))
    assert all(len(answer.ids) == 0 for answer in await answers(reader, subset=np.empty(0, np.int64)))
    for answer in await answers(reader, subset=np.array([3, 7, 160, 5000, -1])):
        assert sorted(answer.ids.tolist()) == [3, 7, 160]


async def test_a_subset_gives_the_best_of_the_subset() -> None:
    reader = await indexed(open_store("memory://"), [])
    await compact(reader, "x", force=True)
    allowed = np.arange(0, 400, 3)
    everything = await answers(reader, params=SearchParams(k=400, n_rerank=400))
    for whole, part in zip(everything, await answers(reader, subset=allowed), strict=True):
        kept = np.isin(whole.ids, allowed)
        assert np.allclose(part.scores, whole.scores[kept][:10], atol=TOLERANCE)


async def test_a_condition_selects_documents_and_rows_come_with_every_column() -> None:
    reader = await indexed(open_store("memory://"), [100])
    snapshot = await reader.snapshot("x")
    chosen = await snapshot.select("n < ? AND even = ?", [10, True])
    assert chosen.tolist() == [0, 2, 4, 6, 8]
    [answer, *_] = await answers(reader, subset=chosen)
    assert set(answer.rows[0]) == {"_subset_", "n", "even"}


async def test_equal_scores_are_ordered_by_document_id() -> None:
    store = open_store("memory://")
    reader = Reader(store)
    await create(store, "twins", IndexConfig())
    tokens, offsets = CORPUS.part(0, 1)
    for _ in range(5):
        await reader.writer("twins").add(tokens, offsets)
    snapshot = await reader.snapshot("twins")
    [answer] = await Searcher(reader).search(snapshot, [tokens[:3]], SearchParams(k=3))
    assert answer.ids.tolist() == [0, 1, 2]


async def test_the_matches_of_a_document_add_up_to_its_score() -> None:
    reader = await indexed(open_store("memory://"), [])
    for _ in range(2):
        [answer, *_] = await answers(reader, explain=True)
        assert answer.matches is not None
        for score, matches in zip(answer.scores, answer.matches, strict=True):
            assert sum(similarity for _, similarity in matches) == pytest.approx(score, abs=5e-3)
        await compact(reader, "x", force=True)


async def test_k_of_nothing_and_of_everything() -> None:
    reader = await indexed(open_store("memory://"), [])
    assert all(len(answer.ids) == 0 for answer in await answers(reader, params=SearchParams(k=0)))
    assert all(len(answer.ids) == 400 for answer in await answers(reader, params=SearchParams(k=1000)))
    await compact(reader, "x", force=True)
    assert all(len(answer.ids) == 400 for answer in await answers(reader, params=SearchParams(k=1000)))


async def test_an_empty_index_answers_with_no_hits() -> None:
    store = open_store("memory://")
    await create(store, "empty", IndexConfig())
    reader = Reader(store)
    snapshot = await reader.snapshot("empty")
    [answer] = await Searcher(reader).search(snapshot, [np.ones((2, 8), np.float32)])
    assert len(answer.ids) == 0


@pytest.mark.parametrize("query", [np.ones((2, 5)), np.ones((0, 32)), np.ones(32), np.full((1, 32), np.nan), np.ones((2000, 32))], ids=str)
async def test_a_query_that_cannot_be_answered_says_why(query: np.ndarray) -> None:
    reader = await indexed(open_store("memory://"), [])
    snapshot = await reader.snapshot("x")
    with pytest.raises(InvalidRequest):
        await Searcher(reader).search(snapshot, [query])


async def test_recall_on_a_fixed_corpus_stays_above_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    corpus = make_corpus(3000, dim=64, n_topics=60, n_queries=30, seed=11)
    store = open_store("memory://")
    reader = await indexed(store, [], corpus)
    await compact(reader, "x", force=True)
    snapshot = await reader.snapshot("x")
    searcher = Searcher(reader)
    truth = [np.argsort(-corpus.exact_scores(query), kind="stable")[:10] for query in corpus.queries]
    everything = SearchParams(k=10, n_candidates=3000, n_rerank=3000)
    decoded = [answer.ids for answer in await searcher.search(snapshot, corpus.queries, everything, mode="warm")]
    found = [answer.ids for answer in await searcher.search(snapshot, corpus.queries, SearchParams(k=10, n_candidates=1000), mode="warm")]
    codec, search = (float(recall_at_k(np.array(truth), np.array(other), 10).mean()) for other in (decoded, found))
    with capsys.disabled():
        print(f"\nrecall@10: codec alone {codec:.3f}, codec and search {search:.3f}")
    assert codec >= 0.93
    assert search >= codec - 0.01


async def test_an_object_that_vanished_is_an_error_and_never_an_empty_answer() -> None:
    store = open_store("memory://")
    reader = await indexed(store, [])
    await compact(reader, "x", force=True)
    snapshot = await reader.snapshot("x")
    await store.delete([names.segment("x", snapshot.segments[0].id)])
    for mode in ("warm", "cold"):
        with pytest.raises(CorruptData) as failure:
            await Searcher(Reader(store)).search(snapshot, CORPUS.queries[:1], mode=mode)
        assert failure.value.code == "missing-object"


async def test_concurrent_searches_and_writes_each_see_one_generation() -> None:
    reader = await indexed(open_store("memory://"), [])
    searcher = Searcher(reader)
    snapshot: Snapshot = await reader.snapshot("x")
    before = await searcher.search(snapshot, CORPUS.queries, K10)

    async def write() -> None:
        for n in range(5):
            await reader.writer("x").delete(before[0].ids[n : n + 1])

    held, _ = await asyncio.gather(searcher.search(snapshot, CORPUS.queries, K10), write())
    assert_same(before, held)
    assert_same(before, await searcher.search(snapshot, CORPUS.queries, K10))
