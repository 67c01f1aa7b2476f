"""Fault: whatever a store call does, the index opens afterwards and is the old generation or the new one; and what was acknowledged is there."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from corpus import make_corpus
from engine.config import CommitParams, IndexConfig, MaintenanceParams
from engine.errors import Conflict, EngineError, NotFound, Unavailable
from engine.format import names
from engine.index.bulk import Block, BulkBuild
from engine.index.commit import Draft, commit, create, load_head
from engine.index.compact import compact
from engine.index.reader import Reader
from engine.index.sweep import sweep
from engine.index.verify import verify
from engine.store.base import Listed, ObjectStore
from engine.store.objects import open_store
from engine.store.wrappers import CountingStore, FaultyStore, WorldStopped

CORPUS = make_corpus(60, dim=16)
FAST = CommitParams(first_delay_s=0.0001, max_delay_s=0.001)


async def _index_with(store: ObjectStore, n_documents: int) -> None:
    await create(store, "books", IndexConfig())
    await Reader(store).writer("books").add(*CORPUS.part(0, n_documents), fields=[{"n": n} for n in range(n_documents)])


async def _live_ids(store: ObjectStore) -> list[int]:
    return (await (await Reader(store).snapshot("books")).live_ids()).tolist()


async def _change_everything(store: ObjectStore) -> None:
    """An add, a delete and an update, each its own commit."""
    writer = Reader(store).writer("books")
    await writer.add(*CORPUS.part(10, 13), fields=[{"n": n} for n in range(3)])
    await writer.delete(np.array([1, 2]))
    await writer.update(np.array([3]), {"n": 99})


STEPS = [list(range(10)), list(range(13)), [0, *range(3, 13)]]


@pytest.mark.parametrize("fault", ["stop", "stop-after", "unavailable", "lost"])
async def test_stopping_the_world_at_any_call_leaves_the_old_generation_or_the_new_one(fault: str) -> None:
    rehearsal = open_store("memory://")
    await _index_with(rehearsal, 10)
    counted = FaultyStore(rehearsal)
    await _change_everything(counted)
    for n in range(1, len(counted.calls) + 1):
        store = open_store("memory://")
        await _index_with(store, 10)
        try:
            await _change_everything(FaultyStore(store, {n: fault}))
        except (WorldStopped, Unavailable):
            pass
        assert await _live_ids(store) in STEPS
        report = await verify(Reader(store), "books", all_generations=True)
        assert report.problems == []


async def test_an_add_that_returned_is_there_whatever_happened_next() -> None:
    for n in range(1, 8):
        store = open_store("memory://")
        await _index_with(store, 10)
        acknowledged: list[int] = list(range(10))
        writer = Reader(FaultyStore(store, {n: "stop-after"})).writer("books")
        try:
            for start in (10, 20, 30):
                acknowledged += (await writer.add(*CORPUS.part(start, start + 5))).ids.tolist()
        except WorldStopped:
            pass
        assert set(acknowledged) <= set(await _live_ids(store))


@pytest.mark.parametrize("fault", ["stop", "stop-after"])
async def test_a_compaction_killed_anywhere_changes_no_document(fault: str) -> None:
    async def prepared() -> ObjectStore:
        store = open_store("memory://")
        await _index_with(store, 40)
        await Reader(store).writer("books").delete(np.arange(5, 9))
        return store

    rehearsal = await prepared()
    counted = FaultyStore(rehearsal)
    await compact(Reader(counted), "books", force=True)
    expected = await _live_ids(rehearsal)
    for n in range(1, len(counted.calls) + 1):
        store = await prepared()
        with pytest.raises(WorldStopped):
            await compact(Reader(FaultyStore(store, {n: fault})), "books", force=True)
        assert await _live_ids(store) == expected
        await compact(Reader(store), "books", force=True)
        assert await _live_ids(store) == expected
        assert (await verify(Reader(store), "books", all_generations=True)).problems == []


async def test_a_sweep_killed_anywhere_leaves_an_index_that_verifies() -> None:
    from engine.config import MaintenanceParams

    now = MaintenanceParams(grace_s=0.0)

    async def prepared() -> ObjectStore:
        store = open_store("memory://")
        await _index_with(store, 40)
        await compact(Reader(store), "books", force=True)
        await asyncio.sleep(0.002)
        return store

    rehearsal = await prepared()
    counted = FaultyStore(rehearsal)
    report = await sweep(counted, "books", params=now)
    assert report.n_deleted > 0
    for n in range(1, len(counted.calls) + 1):
        store = await prepared()
        with pytest.raises(WorldStopped):
            await sweep(FaultyStore(store, {n: "stop-after"}), "books", params=now)
        assert (await verify(Reader(store), "books", all_generations=True)).problems == []
        await asyncio.sleep(0.002)
        await sweep(store, "books", params=now)
        assert (await verify(Reader(store), "books", all_generations=True)).problems == []


async def test_many_processes_writing_one_index_lose_nothing() -> None:
    store = open_store("memory://")
    await create(store, "books", IndexConfig())

    async def process(number: int) -> list[int]:
        writer = Reader(store).writer("books")
        ids = []
        for round_ in range(4):
            start = (number * 4 + round_) % 50
            ids += (await writer.add(*CORPUS.part(start, start + 2))).ids.tolist()
        return ids

    results = await asyncio.gather(*(process(number) for number in range(10)))
    everything = sorted(i for ids in results for i in ids)
    assert everything == list(range(80))
    assert await _live_ids(store) == everything


async def test_concurrent_adds_of_one_process_share_a_commit() -> None:
    store = open_store("memory://")
    await create(store, "books", IndexConfig())
    writer = Reader(store).writer("books")
    await asyncio.gather(*(writer.add(*CORPUS.part(n, n + 1)) for n in range(20)))
    head = await load_head(store, "books")
    assert head.manifest.n_documents == 20
    assert head.manifest.generation <= 2


async def test_a_bad_add_in_a_group_fails_alone() -> None:
    store = open_store("memory://")
    await _index_with(store, 3)
    writer = Reader(store).writer("books")
    wrong = np.ones((2, 7), np.float32), np.array([0, 2])
    results = await asyncio.gather(
        writer.add(*CORPUS.part(3, 5)), writer.add(*wrong), writer.add(*CORPUS.part(5, 6)), return_exceptions=True
    )
    assert isinstance(results[1], EngineError)
    assert results[1].code == "dimension-mismatch"
    assert await _live_ids(store) == list(range(6))


async def test_a_commit_whose_answer_was_lost_and_that_others_built_upon_is_not_made_twice() -> None:
    """Our CURRENT is written, the answer is lost, another writer commits on top, and only then do we look."""
    inner = open_store("memory://")
    await _index_with(inner, 5)

    class LostThenOvertaken(CountingStore):
        overtaken = False

        async def replace_if_unchanged(self, name: str, data: object, etag: str) -> str:
            result = await inner.replace_if_unchanged(name, data, etag)  # type: ignore[arg-type]
            if not self.overtaken:
                self.overtaken = True
                await Reader(inner).writer("books").add(*CORPUS.part(20, 21))
                raise Conflict("CURRENT has changed", name=name)
            return result

    store = LostThenOvertaken(inner)
    added = await Reader(store).writer("books").add(*CORPUS.part(10, 12))
    assert added.ids.tolist() == [5, 6]
    assert await _live_ids(inner) == list(range(8))


async def test_a_conflict_that_never_ends_is_reported_as_one() -> None:
    inner = open_store("memory://")
    await _index_with(inner, 3)

    class AlwaysLate(CountingStore):
        async def replace_if_unchanged(self, name: str, data: object, etag: str) -> str:
            raise Conflict("CURRENT has changed", name=name)

    async def apply(manifest):  # type: ignore[no-untyped-def]
        import msgspec

        return Draft(msgspec.structs.replace(manifest, next_id=manifest.next_id + 1))

    params = CommitParams(max_attempts=3, first_delay_s=0.0001, max_delay_s=0.001)
    with pytest.raises(Conflict) as failure:
        await commit(AlwaysLate(inner), "books", apply, cause="test", params=params, rng=random.Random(1))
    assert failure.value.code == "commit-conflict"
    assert failure.value.details["attempts"] == 3


async def test_an_add_costs_two_puts_that_follow_one_another() -> None:
    store = CountingStore(open_store("memory://"))
    await _index_with(store, 10)
    writer = Reader(store).writer("books")
    await writer.add(*CORPUS.part(10, 20))
    with store.window() as cost:
        await writer.add(*CORPUS.part(20, 30), fields=[{"n": 1}] * 10)
    assert cost.rounds == 2
    assert cost.requests["replace"] == 1
    assert cost.requests["get"] == 0


async def test_every_superseded_generation_is_kept_byte_for_byte() -> None:
    store = open_store("memory://")
    await _index_with(store, 3)
    before = await load_head(store, "books")
    await Reader(store).writer("books").delete(np.array([1]))
    name = names.manifest("books", before.manifest.index_id, before.manifest.generation)
    assert bytes((await store.get(name)).data) == bytes(before.data)


async def test_writing_to_an_index_that_is_not_there_says_so() -> None:
    with pytest.raises(NotFound) as failure:
        await Reader(open_store("memory://")).writer("books").add(*CORPUS.part(0, 1))
    assert failure.value.code == "index-not-found"


async def test_an_index_cannot_be_created_twice() -> None:
    store = open_store("memory://")
    await create(store, "books", IndexConfig())
    with pytest.raises(Conflict) as failure:
        await create(store, "books", IndexConfig())
    assert failure.value.code == "index-exists"


async def test_a_caller_that_gives_up_does_not_take_the_commit_of_others_with_it() -> None:
    store = open_store("memory://")
    await create(store, "books", IndexConfig())
    writer = Reader(store).writer("books")
    first = asyncio.create_task(writer.add(*CORPUS.part(0, 1)))
    second = asyncio.create_task(writer.add(*CORPUS.part(1, 3)))
    await asyncio.sleep(0)
    first.cancel()
    assert len((await second).ids) == 2
    assert set((await second).ids.tolist()) <= set(await _live_ids(store))


# Bulk builds: one call, however many runs it takes


class _Books:
    """Documents of the corpus as a source; each block of four becomes a segment."""

    fingerprint, n_documents = "books", 12

    @property
    def n_tokens(self) -> int:
        return int(CORPUS.offsets[12])

    def sample(self, n_tokens: int) -> np.ndarray:
        return CORPUS.tokens[:n_tokens]

    def blocks(self, first_document: int) -> Iterator[Block]:
        for first in range(first_document, 12, 4):
            yield Block(*CORPUS.part(first, first + 4))


SMALL = MaintenanceParams(max_segment_documents=4, grace_s=0.0)


def _build(store: ObjectStore) -> BulkBuild:
    return BulkBuild(Reader(store), "books", _Books(), params=SMALL)


@pytest.mark.parametrize("step", ["_codec", "_build_segments", "_finish_segment", "_commit", "_is_committed"])
@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_a_build_that_another_run_overtook_is_not_committed_twice(step: str, nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow run and the one that takes its work up meet at a record, at the commit, or in the history."""
    store = open_store("memory://")
    await create(store, "books", IndexConfig())
    slow, original, n_calls = _build(store), getattr(BulkBuild, step), 0

    async def overtaken(*arguments: object) -> object:
        nonlocal n_calls
        n_calls += 1
        if n_calls == nth:
            await _build(store).run()
        return await original(slow, *arguments)

    monkeypatch.setattr(slow, step, overtaken)
    try:
        report = await slow.run()
    except Conflict:
        pass
    else:
        assert report.was_committed_before == (n_calls >= nth)
    assert await _live_ids(store) == list(range(12))
    assert (await verify(Reader(store), "books", all_generations=True)).problems == []


async def test_a_build_that_died_after_its_commit_is_known_after_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its segments may have left the index long ago, and the generations that showed them been collected."""
    store = open_store("memory://")
    await create(store, "books", IndexConfig())
    died = _build(store)

    async def die() -> None:
        raise WorldStopped

    monkeypatch.setattr(died, "_tidy", die)
    with pytest.raises(WorldStopped):
        await died.run()
    await Reader(store).writer("books").delete(np.arange(11))
    await asyncio.sleep(0.002)
    await compact(Reader(store), "books", force=True, params=SMALL)
    for _ in range(2):
        await asyncio.sleep(0.002)
        await sweep(store, "books", params=SMALL)
    assert (await _build(store).run()).was_committed_before
    assert await _live_ids(store) == [11]
    await asyncio.sleep(0.002)
    assert (await sweep(store, "books", params=SMALL)).n_deleted > 0  # what showed the commit is needed no more


async def test_a_build_that_died_while_it_removed_its_records_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("memory://")
    await create(store, "books", IndexConfig())
    died = _build(store)
    real_delete, n_deletes = died.store.delete, 0

    async def delete(wanted: list[str]) -> None:
        nonlocal n_deletes
        n_deletes += 1
        if n_deletes == 2:
            raise WorldStopped
        await real_delete(wanted)

    monkeypatch.setattr(died.store, "delete", delete)
    with pytest.raises(WorldStopped):
        await died.run()
    monkeypatch.undo()
    assert (await _build(store).run()).was_committed_before
    assert await _live_ids(store) == list(range(12))
    report = await _build(store).run()
    assert not report.was_committed_before  # given again after all that, it adds again
    assert len(await _live_ids(store)) == 24


class _Aged:
    """A store whose listings say of some objects that they are eight days old; `at_delete` runs before each delete."""

    def __init__(self, inner: ObjectStore, old: Sequence[str]) -> None:
        self._inner, self._old = inner, old

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[Listed]:
        async for listed in self._inner.list(prefix, after=after):
            yield msgspec.structs.replace(listed, modified_s=listed.modified_s - 8 * 86_400) if listed.name in self._old else listed

    async def at_delete(self, wanted: list[str]) -> None: ...

    async def delete(self, wanted: list[str]) -> None:
        await self.at_delete(wanted)
        await self._inner.delete(wanted)


async def _abandoned_build(monkeypatch: pytest.MonkeyPatch) -> tuple[ObjectStore, list[str]]:
    """A store with a build that died before its commit, and the names of its records."""
    store = open_store("memory://")
    await create(store, "books", IndexConfig())
    died = _build(store)

    async def die(life: str) -> None:
        raise WorldStopped

    monkeypatch.setattr(died, "_commit", die)
    with pytest.raises(WorldStopped):
        await died.run()
    await asyncio.sleep(0.002)
    return store, [listed.name async for listed in store.list(names.builds("books"))]


async def _is_whole_when_run_again(store: ObjectStore) -> None:
    report = await _build(store).run()
    assert not report.was_committed_before
    assert await _live_ids(store) == list(range(12))
    assert (await verify(Reader(store), "books", all_generations=True)).problems == []


@pytest.mark.parametrize("n_old", [1, 2, 3, 4])
async def test_a_build_is_kept_for_a_week_after_its_last_progress_not_its_first(n_old: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the simulation: records were forgotten one by one, and a build without its first record was taken for committed."""
    store, records = await _abandoned_build(monkeypatch)
    report = await sweep(_Aged(store, records[:n_old]), "books", params=SMALL)  # type: ignore[arg-type]
    assert bool(report.n_deleted) == (n_old == len(records))
    await _is_whole_when_run_again(store)


async def test_a_build_of_whose_records_some_are_gone_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that died while it forgot the build leaves any of them."""
    for n_gone in range(1, 5):
        for gone in itertools.combinations(range(4), n_gone):
            store, records = await _abandoned_build(monkeypatch)
            await store.delete([records[n] for n in gone])
            await _is_whole_when_run_again(store)


async def test_a_build_that_is_taken_up_while_a_sweep_forgets_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    store, records = await _abandoned_build(monkeypatch)
    aged, n_deletes = _Aged(store, records), 0

    async def take_up(wanted: list[str]) -> None:
        nonlocal n_deletes
        n_deletes += bool(set(wanted) & set(records))
        if n_deletes == 1 and set(wanted) & set(records):
            await _is_whole_when_run_again(store)

    monkeypatch.setattr(aged, "at_delete", take_up)
    assert (await sweep(aged, "books", params=SMALL)).n_deleted > 0  # type: ignore[arg-type]
    assert n_deletes == 1
    assert (await verify(Reader(store), "books", all_generations=True)).problems == []
    assert await _live_ids(store) == list(range(12))
