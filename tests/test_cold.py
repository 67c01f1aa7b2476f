"""A search of what is not in memory: what is read, how documents become requests, how much is found."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import make_corpus
from engine.cold import Allowance, Window, cells_to_read, choose_windows, rank_cells, reads_ahead
from engine.config import ColdParams, IndexConfig, SearchParams
from engine.format import postings
from engine.format.manifest import CodecRef, SegmentRef
from engine.index.commit import create
from engine.index.compact import compact
from engine.index.reader import Reader, Snapshot
from engine.scoring.candidates import distinct
from engine.searcher import Searcher
from engine.store.cache import CachedStore
from engine.store.objects import open_store
from engine.store.wrappers import CountingStore
from handler.runtime import Runtime
from handler.settings import Settings

CORPUS = make_corpus(1500, dim=64, n_topics=40, n_queries=12, seed=17)
LIMIT = 1 << 40


_MADE: list[CountingStore] = []


@pytest.fixture
async def store() -> CountingStore:
    """The corpus, quantised; made once."""
    if _MADE:
        return _MADE[0]
    store = CountingStore(open_store("memory://"))
    reader = Reader(store)
    await create(store, "x", IndexConfig())
    await reader.writer("x").add(*CORPUS.part(0, 1500), fields=[{"n": n} for n in range(1500)])
    await compact(reader, "x", force=True)
    _MADE.append(store)
    return store


async def opened(store: CountingStore) -> tuple[Snapshot, CodecRef, SegmentRef]:
    snapshot = await Reader(store).snapshot("x")
    [segment] = snapshot.segments
    return snapshot, snapshot.manifest.codec_of(segment), segment


ranked_documents = st.lists(st.integers(0, 199), unique=True, max_size=60)
STARTS = np.concatenate([[0], np.cumsum(np.random.default_rng(3).integers(1_000, 30_000, 200))])


@settings(deadline=None, derandomize=True)
@given(ranked_documents, st.integers(1, 12), st.integers(1, 2_000_000))
def test_windows_ascend_apart_and_keep_to_what_is_allowed(ranked: list[int], max_gets: int, max_bytes: int) -> None:
    windows = choose_windows(np.array(ranked, np.int64), STARTS, Allowance(max_gets, max_bytes))
    assert len(windows) <= max_gets
    assert all(before.last < after.first for before, after in pairwise(windows))
    n_bytes = sum(int(STARTS[window.last] - STARTS[window.first]) for window in windows)
    assert n_bytes <= max_bytes or len(windows) == 1
    assert bool(windows) == bool(ranked)
    if ranked:
        assert any(window.first <= ranked[0] < window.last for window in windows)


@settings(deadline=None, derandomize=True)
@given(ranked_documents, st.integers(1, 12))
def test_without_a_limit_of_bytes_every_document_is_covered(ranked: list[int], max_gets: int) -> None:
    windows = choose_windows(np.array(ranked, np.int64), STARTS, Allowance(max_gets, LIMIT))
    assert all(any(window.first <= n < window.last for window in windows) for n in ranked)


def test_neighbours_share_a_window_even_while_requests_are_left() -> None:
    starts = np.arange(11) * 1000
    assert choose_windows(np.array([5, 7]), starts, Allowance(8, LIMIT)) == [Window(5, 8)]


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 65_535), unique=True, max_size=12), min_size=1, max_size=9),
    st.lists(st.booleans(), min_size=9, max_size=9),
    st.integers(1, 8),
)
def test_posting_lists_that_are_wanted_are_the_same_whatever_else_is_left_out(lists: list[list[int]], flags: list[bool], cut: int) -> None:
    """Ordinals up to 65,535, so that numbers of all three lengths occur."""
    n = len(lists)
    offsets = np.cumsum([0, *map(len, lists)])
    ordinals = np.array([value for own in lists for value in sorted(own)], np.uint16)
    cell_offsets = np.array([0, min(cut, n), n])
    section, cells, checksums = postings.write_postings(postings.Postings(np.arange(n), offsets, ordinals), cell_offsets)
    at = np.frombuffer(cells, "<u4")
    blocks = [section[at[cell] : at[cell + 1]].data for cell in (0, 1)]
    wanted = np.array(flags[:n])
    sums = np.frombuffer(checksums, "<u8")
    found = postings.read_posting_cells([0, 1], blocks, cell_offsets, sums, 65_536, name="x", wanted=wanted)
    decoded = [found.ordinals[start:end].tolist() for start, end in pairwise(found.offsets)]
    assert decoded == [sorted(own) if flag else [] for own, flag in zip(lists, flags, strict=False)]


async def test_all_cells_are_read_where_they_are_paid_for_else_the_best(store: CountingStore) -> None:
    _, codec, segment = await opened(store)
    for query in CORPUS.queries:
        everything = cells_to_read(query, codec, [segment], ColdParams())
        assert everything.tolist() == list(range(codec.n_cells))
        few = cells_to_read(query, codec, [segment], ColdParams(max_cell_bytes=40_000, max_cell_gets=100))
        assert 1 <= len(few) < codec.n_cells
        assert set(few.tolist()) == set(rank_cells(query, codec)[: len(few)].tolist())


async def test_one_cell_is_read_however_little_is_allowed(store: CountingStore) -> None:
    _, codec, segment = await opened(store)
    assert len(cells_to_read(CORPUS.queries[0], codec, [segment], ColdParams(max_cell_bytes=1))) == 1


@pytest.mark.parametrize("cold", [ColdParams(), ColdParams(max_gets=7, max_bytes=600_000), ColdParams(max_gets=11, max_cell_bytes=100_000)])
async def test_requests_and_bytes_keep_to_what_is_allowed(store: CountingStore, cold: ColdParams) -> None:
    for query in CORPUS.queries:
        reader = Reader(store)
        snapshot = await reader.snapshot("x")
        with store.window() as cost:
            await Searcher(reader, cold_params=cold).search(snapshot, [query], SearchParams(k=10), mode="cold")
        assert cost.rounds == 2
        assert cost.n_requests <= cold.max_gets
        assert cost.bytes_read <= cold.max_bytes + cold.max_bytes // 4


async def test_a_small_segment_is_searched_with_two_requests_and_its_records(store: CountingStore) -> None:
    reader = Reader(store)
    snapshot = await reader.snapshot("x")
    with store.window() as cost:
        await Searcher(reader).search(snapshot, [CORPUS.queries[0]], SearchParams(k=1, n_rerank=1), mode="cold")
    assert cost.n_requests == 3


async def test_what_is_known_of_a_segment_is_not_read_again(store: CountingStore) -> None:
    reader = Reader(store)
    snapshot = await reader.snapshot("x")
    searcher = Searcher(reader)
    await searcher.search(snapshot, [CORPUS.queries[0]], SearchParams(k=10), mode="cold")
    sizes = reader.parts.known_sizes(snapshot.segments[0])
    assert sizes is not None and len(sizes) == 1500
    before = await searcher.search(snapshot, [CORPUS.queries[1]], SearchParams(k=10), mode="cold")
    after = await Searcher(Reader(store)).search(snapshot, [CORPUS.queries[1]], SearchParams(k=10), mode="cold")
    assert before[0].ids.tolist() == after[0].ids.tolist()


async def test_a_cold_search_finds_most_of_what_a_warm_one_finds(store: CountingStore) -> None:
    snapshot, _, _ = await opened(store)
    reader = Reader(store)
    warm = await Searcher(reader).search(snapshot, CORPUS.queries, SearchParams(k=10), mode="warm")
    found = []
    for query, expected in zip(CORPUS.queries, warm, strict=True):
        [cold] = await Searcher(Reader(store)).search(snapshot, [query], SearchParams(k=10), mode="cold")
        found.append(np.isin(expected.ids, cold.ids).mean())
        scores = dict(zip(expected.ids.tolist(), expected.scores.tolist(), strict=True))
        for document_id, score in zip(cold.ids.tolist(), cold.scores.tolist(), strict=True):
            assert score >= scores.get(document_id, score) - 1e-4  # the warm exact stage leaves out tokens that are hardly ever the best
    print(f"cold finds {np.mean(found):.3f} of the warm ten")
    assert np.mean(found) >= 0.95


async def test_a_small_segment_is_loaded_rather_than_read_cold(store: CountingStore) -> None:
    """As many bytes in fewer requests, and the next search finds it in memory."""
    reader = Reader(store)
    snapshot = await reader.snapshot("x")
    assert snapshot.segments[0].size_bytes < ColdParams().max_bytes
    with store.window() as cost:
        [first] = await Searcher(reader).search(snapshot, [CORPUS.queries[0]], SearchParams(k=10))
    assert cost.n_requests <= 4
    assert first.stats.n_cold_segments == 0
    with store.window() as cost:
        await Searcher(reader).search(snapshot, [CORPUS.queries[1]], SearchParams(k=10))
    assert cost.n_requests == 0
    small = ColdParams(max_bytes=100_000)
    [cold] = await Searcher(Reader(store), cold_params=small).search(snapshot, [CORPUS.queries[0]], SearchParams(k=10))
    assert cold.stats.n_cold_segments == 1


# Reading ahead: what does not depend on the query


async def read_ahead(store: CountingStore, folder: Path, cold: ColdParams, max_bytes: int = LIMIT) -> CachedStore:
    """A cache that holds what every search reads."""
    cached = CachedStore(store, str(folder), budget_bytes=1 << 30, cacheable=lambda name: not name.endswith("CURRENT"))
    for name, ranges in reads_ahead((await Reader(store).snapshot("x")).manifest, "x", cold, max_bytes):
        await (cached.get_ranges(name, ranges) if ranges else cached.get(name))
    await cached.settle()
    return cached


async def test_after_reading_ahead_a_cold_search_reads_records_only(store: CountingStore, tmp_path: Path) -> None:
    cold = ColdParams(max_bytes=400_000)
    for query in CORPUS.queries[:4]:
        cached = await read_ahead(store, tmp_path / str(query.sum()), cold)
        reader = Reader(cached, counter=store)
        snapshot = await reader.snapshot("x")
        with store.window() as cost:
            [ahead] = await Searcher(reader, cold_params=cold).search(snapshot, [query], SearchParams(k=10))
        [alone] = await Searcher(Reader(store), cold_params=cold).search(snapshot, [query], SearchParams(k=10))
        assert ahead.stats.n_cold_segments == 1
        assert (cost.rounds, alone.stats.n_rounds) == (1, 2)
        assert ahead.ids.tolist() == alone.ids.tolist()
        assert ahead.scores.tolist() == alone.scores.tolist()


async def test_after_reading_ahead_small_flat_and_deleted_documents_cost_no_request(tmp_path: Path) -> None:
    store = CountingStore(open_store("memory://"))
    writer = Reader(store).writer("x")
    await create(store, "x", IndexConfig())
    await writer.add(*CORPUS.part(0, 300))
    await compact(Reader(store), "x", force=True)
    await writer.delete(np.arange(7))
    await writer.add(*CORPUS.part(300, 320))
    cached = await read_ahead(store, tmp_path, ColdParams())
    reader = Reader(cached, counter=store)
    snapshot = await reader.snapshot("x")
    assert {segment.kind for segment in snapshot.segments} == {"flat", "quantised"}
    with store.window() as cost:
        [answer] = await Searcher(reader).search(snapshot, [CORPUS.queries[0]], SearchParams(k=10))
    assert cost.n_requests == 0
    assert len(answer.ids) == 10


async def test_reading_ahead_keeps_to_what_is_allowed_and_leaves_what_depends_on_the_query(store: CountingStore) -> None:
    manifest = (await Reader(store).snapshot("x")).manifest
    few_cells = ColdParams(max_bytes=400_000, max_cell_bytes=40_000, max_cell_gets=100)
    assert reads_ahead(manifest, "x", few_cells, LIMIT) == []
    assert reads_ahead(manifest, "x", ColdParams(), 1000) == []


@given(st.lists(st.integers(-5, 300), max_size=80))
def test_distinct_is_unique(numbers: list[int]) -> None:
    assert distinct(np.array(numbers, np.int64)).tolist() == sorted(set(numbers))


@pytest.mark.parametrize(("function_mb", "n_requests"), [(0, 2), (512, 1), (2048, 1), (8192, 2)])
async def test_a_function_reads_through_gaps_as_its_memory_is_priced(function_mb: int, n_requests: int) -> None:
    """A gap of 600 kB costs a function of 512 MB less than a GET, and one of 8 GB more. A server's time is paid for anyway."""
    store = open_store("memory://")
    await store.put_if_absent("x/data", bytes(700_000))
    runtime = Runtime(Settings(function_mb=function_mb, log_level="off", region="us-east-1"), store=store)
    with runtime.counting.window() as cost:
        pieces = await runtime.reader.parts.read_ranges("x/data", [(0, 10), (600_010, 600_030)])
    assert [len(piece) for piece in pieces] == [10, 20]
    assert cost.n_requests == n_requests
    runtime.close()
