"""Fan-out: however an index is cut into shards, the answer is that of one process, bit for bit; failures are told; messages stay small."""

from __future__ import annotations

import asyncio
import base64
import re

import msgspec
import numpy as np
import pytest

from corpus import Corpus, make_corpus
from engine.config import IndexConfig, MaintenanceParams, SearchParams
from engine.errors import CorruptData, EngineError, InvalidRequest, LimitExceeded, NotFound, Unavailable
from engine.fanout import messages
from engine.fanout.merge import merged
from engine.fanout.messages import Mode, Outcome, Plan, Ranked, Scored, Step
from engine.fanout.plan import _packed_query, cut, make_plan
from engine.fanout.search import FanOut
from engine.fanout.shard import score, take
from engine.fanout.transport import run_steps
from engine.index.commit import create
from engine.index.compact import compact
from engine.index.reader import Reader, Snapshot
from engine.near import company
from engine.searcher import Answer, Searcher
from engine.store.base import ObjectStore
from engine.store.objects import open_store

CORPUS = make_corpus(460, dim=32)
K10 = SearchParams(k=10)
PARAMS = {
    "default": K10,
    "few reranked": SearchParams(k=5, n_rerank=16),
    "probing": SearchParams(k=10, n_candidates=20, n_rerank=40),
    "threshold": SearchParams(k=10, centroid_score_threshold=0.3),
    "many": SearchParams(k=300, n_rerank=300),
}


class InProcess:
    """A transport whose processes are searchers of their own over the same store; messages pass through JSON."""

    max_state_bytes: int | None = None

    def __init__(self, store: ObjectStore, n_shards: int, mode: Mode = "warm") -> None:
        self.store, self.n_shards, self.mode = store, n_shards, mode
        self.searchers: dict[int, Searcher] = {}
        self.steps: list[Step] = []
        self.faults: dict[int, list[Exception]] = {}

    def shard_count(self, size_bytes: int) -> int:
        return self.n_shards

    async def run(self, plan: Plan) -> list[Outcome]:
        return await run_steps(messages.read(messages.encode(plan), Plan), self.ask)

    async def ask(self, step: Step) -> Ranked | Scored:
        self.steps.append(step)
        if self.faults.get(step.shard.number):
            raise self.faults[step.shard.number].pop(0)
        searcher = self.searchers.setdefault(step.shard.number, Searcher(Reader(self.store)))
        done = await take(searcher, messages.read(messages.encode(step), Step))
        return messages.read(messages.encode(done), type(done))


async def mixed(corpus: Corpus = CORPUS) -> tuple[ObjectStore, Snapshot]:
    """Six quantised segments of two codecs and three flat ones, with keys, fields, deleted documents and two that are equal."""
    store = open_store("memory://")
    reader = Reader(store)
    await create(store, "x", IndexConfig(nbits=4))
    writer = reader.writer("x")
    for n, (first, last) in enumerate([(0, 60), (60, 120), (120, 180), (180, 240)]):
        await _add(reader, corpus, first, last)
        await compact(reader, "x", force=True, params=MaintenanceParams(max_segment_documents=60, retrain_growth=2.5))
        assert n >= 0
    for first, last in [(240, 320), (320, 400)]:
        await _add(reader, corpus, first, last)
        await compact(reader, "x", force=True, params=MaintenanceParams(retrain_growth=2.5, merge_factor=100))
    for first, last in [(400, 430), (430, 460), (430, 440)]:  # the last are doubles: equal scores under other ids
        await _add(reader, corpus, first, last)
    await writer.delete(np.array([3, 4, 70, 200, 201, 202, 250, 431]))
    return store, await reader.snapshot("x")


async def _add(reader: Reader, corpus: Corpus, first: int, last: int) -> None:
    fields = [{"n": n, "kind": "even" if n % 2 == 0 else "odd"} for n in range(first, last)]
    await reader.writer("x").add(*corpus.part(first, last), fields=fields)


@pytest.fixture(scope="module")
def index() -> tuple[ObjectStore, Snapshot]:
    return asyncio.run(mixed())


def same(one: Answer, other: Answer) -> None:
    assert one.ids.tolist() == other.ids.tolist()
    assert one.scores.tobytes() == other.scores.tobytes()
    assert one.rows == other.rows
    assert one.keys == other.keys
    assert one.matches == other.matches


async def alone(store: ObjectStore, snapshot: Snapshot, params: SearchParams, mode: Mode, **more: object) -> list[Answer]:
    return [
        (await Searcher(Reader(store)).search(snapshot, [query], params, mode=mode, **more))[0]  # type: ignore[arg-type]
        for query in CORPUS.queries[:4]
    ]


async def fanned(store: ObjectStore, snapshot: Snapshot, params: SearchParams, mode: Mode, n_shards: int, **more: object) -> list[Answer]:
    fan = FanOut(Searcher(Reader(store)), InProcess(store, n_shards, mode), min_bytes=0)
    return await fan.search(snapshot, CORPUS.queries[:4], params, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["default", *(pytest.param(name, marks=pytest.mark.slow) for name in PARAMS if name != "default")])
@pytest.mark.parametrize("mode", ["warm", "cold"])
async def test_any_number_of_shards_gives_the_ids_and_scores_of_one_process(
    index: tuple[ObjectStore, Snapshot], name: str, mode: Mode
) -> None:
    store, snapshot = index
    assert [ref.kind for ref in snapshot.segments].count("quantised") >= 4
    expected = await alone(store, snapshot, PARAMS[name], mode)
    for n_shards in (1, 2, 3, 5, 8) if name == "default" else (3, 8):
        for one, other in zip(expected, await fanned(store, snapshot, PARAMS[name], mode, n_shards), strict=True):
            same(one, other)


async def test_small_segments_stay_with_the_large_one_whose_exact_stage_they_share() -> None:
    store = open_store("memory://")
    reader = Reader(store)
    await create(store, "x", IndexConfig(nbits=4))
    for first, last in [(0, 300), (300, 320), (320, 350), (350, 360), (360, 460)]:
        await _add(reader, CORPUS, first, last)
        if last < 400:
            await compact(reader, "x", force=True, params=MaintenanceParams(merge_factor=100))
    await reader.writer("x").delete(np.array([5, 310, 330]))
    snapshot = await reader.snapshot("x")
    assert company(snapshot.segments) == (0, 1, 2, 3)
    subset = np.arange(0, 460, 2)
    for options in ({}, {"subset": subset}):
        expected = await alone(store, snapshot, K10, "warm", **options)
        for n_shards in (1, 2, 5):
            for one, other in zip(expected, await fanned(store, snapshot, K10, "warm", n_shards, **options), strict=True):
                same(one, other)
    plan = make_plan(snapshot, CORPUS.queries[0], K10, InProcess(store, 5))
    assert sorted(shard.segments for shard in plan.shards) == [(0, 1, 2, 3), (4,)]


@pytest.mark.parametrize("mode", ["warm", "cold"])
async def test_subsets_give_the_same_however_the_index_is_cut(index: tuple[ObjectStore, Snapshot], mode: Mode) -> None:
    store, snapshot = index
    for subset in (np.arange(0, 460, 3), np.array([5, 431, 432, 9999, -1]), np.empty(0, np.int64)):
        expected = await alone(store, snapshot, K10, mode, subset=subset)
        for one, other in zip(expected, await fanned(store, snapshot, K10, mode, 4, subset=subset), strict=True):
            same(one, other)


async def test_a_condition_is_evaluated_by_the_shards(index: tuple[ObjectStore, Snapshot]) -> None:
    store, snapshot = index
    subset = await snapshot.select("n > ? AND kind = ?", [100, "odd"])
    expected = await alone(store, snapshot, K10, "warm", subset=subset)
    found = await fanned(store, snapshot, K10, "warm", 5, condition="n > ? AND kind = ?", parameters=[100, "odd"])
    for one, other in zip(expected, found, strict=True):
        same(one, other)
    with pytest.raises(InvalidRequest) as failure:
        await fanned(store, snapshot, K10, "warm", 2, condition="nowhere = 1")
    assert failure.value.code == "invalid-condition"


async def test_matches_are_those_of_one_process(index: tuple[ObjectStore, Snapshot]) -> None:
    store, snapshot = index
    expected = await alone(store, snapshot, SearchParams(k=3), "warm", explain=True)
    for one, other in zip(expected, await fanned(store, snapshot, SearchParams(k=3), "warm", 3, explain=True), strict=True):
        same(one, other)


async def test_a_generation_stays_pinned_while_others_write() -> None:
    store, snapshot = await mixed(make_corpus(460, dim=32, seed=8))
    expected = await alone(store, snapshot, K10, "warm")
    transport = InProcess(store, 3)
    fan = FanOut(Searcher(Reader(store)), transport, min_bytes=0)
    await Reader(store).writer("x").delete(expected[0].ids[:5])
    for one, other in zip(expected, await fan.search(snapshot, CORPUS.queries[:4], K10), strict=True):
        same(one, other)
    assert {step.job.generation for step in transport.steps} == {snapshot.manifest.generation}


async def test_an_index_that_was_made_again_is_not_searched_for_its_former_self(index: tuple[ObjectStore, Snapshot]) -> None:
    store, snapshot = index
    plan = make_plan(snapshot, CORPUS.queries[0], K10, InProcess(store, 2))
    stranger = msgspec.structs.replace(plan.job, life="0" * 26)
    with pytest.raises(NotFound) as failure:
        await score(Searcher(Reader(store)), stranger, plan.shards[0], None)
    assert failure.value.code == "generation-not-found"


# Failures


async def test_a_failed_shard_fails_the_search_and_says_which_and_why(index: tuple[ObjectStore, Snapshot]) -> None:
    store, snapshot = index
    transport = InProcess(store, 4)
    transport.faults[2] = [Unavailable("the store did not answer", object="x/segments/y")]
    with pytest.raises(Unavailable) as failure:
        await FanOut(Searcher(Reader(store)), transport, min_bytes=0).search(snapshot, CORPUS.queries[:1], K10)
    assert failure.value.code == "store-unavailable"
    assert failure.value.details["shard"] == 2
    assert "the store did not answer object=x/segments/y" in str(failure.value)


async def test_damage_in_a_shard_is_damage_and_no_outage(index: tuple[ObjectStore, Snapshot]) -> None:
    store, snapshot = index
    transport = InProcess(store, 4)
    transport.faults[1] = [CorruptData("other bytes", code="checksum-mismatch")]
    with pytest.raises(CorruptData):
        await FanOut(Searcher(Reader(store)), transport, min_bytes=0).search(snapshot, CORPUS.queries[:1], K10)


async def test_a_partial_answer_names_the_failed_shard_and_is_right_about_the_rest(index: tuple[ObjectStore, Snapshot]) -> None:
    store, snapshot = index
    for step, fault in (("rank", [Unavailable("gone")]), ("score", [None, Unavailable("gone")])):
        transport = InProcess(store, 4, "warm")
        if step == "rank":
            transport.faults[1] = fault
        else:
            transport.mode = "cold"
            transport.faults[1] = fault[1:]
        [answer] = await FanOut(Searcher(Reader(store)), transport, min_bytes=0).search(
            snapshot, CORPUS.queries[:1], SearchParams(k=460, n_rerank=460), allow_partial=True
        )
        assert [(one["shard"], one["error"]) for one in answer.failed] == [(1, "Unavailable")]
        lost = {n for step_ in transport.steps if step_.shard.number == 1 for n in step_.shard.segments}
        left = np.concatenate([await snapshot.parts.live_ids("x", ref) for n, ref in enumerate(snapshot.segments) if n not in lost])
        assert set(answer.ids.tolist()) <= set(left.tolist())
        assert len(answer.ids)


async def test_nothing_is_never_an_answer(index: tuple[ObjectStore, Snapshot]) -> None:
    store, snapshot = index
    transport = InProcess(store, 2)
    transport.faults = {0: [Unavailable("gone")], 1: [Unavailable("gone")]}
    with pytest.raises(EngineError):
        await FanOut(Searcher(Reader(store)), transport, min_bytes=0).search(snapshot, CORPUS.queries[:1], K10, allow_partial=True)
    plan = make_plan(snapshot, CORPUS.queries[0], K10, transport)
    scored = await score(Searcher(Reader(store)), plan.job, plan.shards[0], None)
    with pytest.raises(Unavailable, match="shard=1"):
        await merged(Searcher(Reader(store)), snapshot, plan, [scored])


async def test_a_step_done_twice_changes_nothing(index: tuple[ObjectStore, Snapshot]) -> None:
    store, snapshot = index
    transport = InProcess(store, 3)
    plan = make_plan(snapshot, CORPUS.queries[0], K10, transport)
    once, again = await transport.run(plan), await transport.run(plan)
    searcher = Searcher(Reader(store))
    same(await merged(searcher, snapshot, plan, once), await merged(searcher, snapshot, plan, [*once, *again]))


# Plans and their size


def test_segments_are_cut_by_bytes_and_a_small_new_one_moves_no_other() -> None:
    sizes = [90, 10, 50, 40, 40, 30, 20, 20]
    shards = cut(sizes, 3)
    assert sorted(n for shard in shards for n in shard.segments) == list(range(8))
    assert max(shard.size_bytes for shard in shards) <= 110
    before = {n: shard.number for shard in shards for n in shard.segments}
    after = {n: shard.number for shard in cut([*sizes, 5], 3) for n in shard.segments}
    assert all(after[n] == number for n, number in before.items())
    assert len(cut(sizes, 50)) == 8


class Machine(InProcess):
    max_state_bytes = messages.STATE_BYTES


def _wide(snapshot: Snapshot, n_segments: int) -> Snapshot:
    """A snapshot of as many segments as it takes, for planning only."""
    segments = tuple(snapshot.segments[n % len(snapshot.segments)] for n in range(n_segments))
    return Snapshot(snapshot.reader, snapshot.index, msgspec.structs.replace(snapshot.manifest, segments=segments))


@pytest.mark.parametrize(
    ("n_tokens", "dim", "k", "n_rerank"),
    [(32, 128, 10, 1024), (32, 128, 1000, 1024), (256, 128, 100, 100), (1, 4096, 2000, 2000), (8, 128, 10, 5000)],
)
async def test_whatever_is_planned_fits_the_messages(
    index: tuple[ObjectStore, Snapshot], n_tokens: int, dim: int, k: int, n_rerank: int
) -> None:
    """The largest state is the plan beside all results, each as large as it can be."""
    store, snapshot = index
    query = np.random.default_rng(1).standard_normal((n_tokens, dim)).astype(np.float32)
    for mode in ("warm", "cold"):
        params = SearchParams(k=k, n_rerank=n_rerank)
        plan = make_plan(_wide(snapshot, 400), query, params, Machine(store, 64, mode))
        assert len(plan.shards) >= 2
        stats = await _largest_stats(index)
        scored = [
            Scored(shard=n, ids=bytes(8 * k), scores=bytes(4 * k), positions=bytes(4 * k), ordinals=bytes(4 * k), stats=stats)
            for n in range(len(plan.shards))
        ]
        ranked = [
            Ranked(shard=n, approximate=bytes(4 * (max(k, n_rerank) + 1)), exact=bytes(4 * k), stats=stats) for n in range(len(plan.shards))
        ]
        largest = max(len(messages.encode({"plan": plan, "results": results})) for results in (scored, ranked if plan.needs_ranking else []))
        assert largest <= messages.STATE_BYTES
        failed = [
            messages.Failed(shard=n, segments=shard.segments, error="Unavailable", cause="x" * messages.MAX_CAUSE)
            for n, shard in enumerate(plan.shards)
        ]
        assert len(messages.encode({"plan": plan, "results": failed})) <= messages.STATE_BYTES


async def _largest_stats(index: tuple[ObjectStore, Snapshot]):  # type: ignore[no-untyped-def]
    store, snapshot = index
    plan = make_plan(snapshot, CORPUS.queries[0], K10, InProcess(store, 1))
    stats = (await score(Searcher(Reader(store)), plan.job, plan.shards[0], None)).stats
    stats.n_tokens_scored = stats.n_bytes = 10**15
    return stats


@pytest.mark.parametrize(("n_tokens", "dim", "k"), [(1024, 128, 10), (32, 4096, 10), (32, 128, 10_000)])
async def test_what_cannot_fit_is_refused_before_anything_is_sent(
    index: tuple[ObjectStore, Snapshot], n_tokens: int, dim: int, k: int
) -> None:
    store, snapshot = index
    query = np.random.default_rng(1).standard_normal((n_tokens, dim)).astype(np.float32)
    with pytest.raises(LimitExceeded, match="limit_bytes=262144"):
        make_plan(snapshot, query, SearchParams(k=k), Machine(store, 8))


def test_a_query_of_half_precision_travels_as_such() -> None:
    query = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float16)
    job = messages.Job(index="x", life="l", generation=1, query=query.tobytes(), query_type="f2", dim=8, params=K10, mode="cold")
    assert np.array_equal(messages.read(messages.encode(job), messages.Job).vectors(), query.astype(np.float32))
    assert _packed_query(query.astype(np.float32))[1] == "f2"
    assert _packed_query(np.array([[0.1]], np.float32))[1] == "f4"


def test_a_large_subset_is_packed_small() -> None:
    ids = np.arange(0, 1_000_000, 2)
    packed = messages.pack_ids(ids)
    assert len(packed) < 20_000
    assert np.array_equal(messages.unpack_ids(packed), ids)
    assert not len(messages.unpack_ids(messages.pack_ids(np.empty(0, np.int64))))


def test_messages_are_read_strictly() -> None:
    for bad in (b"{}", b"[]", b'{"do": "erase"}', {"do": "score", "job": {}, "shard": {}}):
        with pytest.raises(InvalidRequest):
            messages.read(bad, Step)
    with pytest.raises(InvalidRequest):
        messages.unpack_ids(base64.b64decode("AAAA"))
    assert re.fullmatch(r"\[store-unavailable\] gone object=x", messages.told(Unavailable("gone", object="x")))
