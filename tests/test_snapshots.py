"""Time: generations, pins, rollback, branches; and garbage collection, which must leave all of them alone."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from corpus import make_corpus
from engine.config import IndexConfig, MaintenanceParams, SearchParams
from engine.errors import Conflict, InvalidRequest, NotFound
from engine.format import names
from engine.format.markers import Sweep, write_marker
from engine.index import indices, snapshots
from engine.index import sweep as sweeping
from engine.index.commit import Head, create
from engine.index.compact import compact
from engine.index.indices import drop, list_indices
from engine.index.reader import Reader
from engine.index.sweep import sweep
from engine.index.verify import verify
from engine.searcher import Searcher
from engine.store.base import ObjectStore
from engine.store.objects import open_store

CORPUS = make_corpus(60, dim=16)
NOW = MaintenanceParams(grace_s=0.0)


async def _history(store: ObjectStore) -> Reader:
    """Generations 0 to 4: create, add 30, delete 5, add 10, compact."""
    reader = Reader(store)
    await create(store, "x", IndexConfig())
    writer = reader.writer("x")
    await writer.add(*CORPUS.part(0, 30), fields=[{"n": n} for n in range(30)])
    await writer.delete(np.arange(5))
    await writer.add(*CORPUS.part(30, 40), fields=[{"n": n} for n in range(30, 40)])
    await compact(reader, "x", force=True)
    await asyncio.sleep(0.003)  # so that a grace period of nothing has passed
    return reader


async def _ids(reader: Reader, index: str = "x", generation: int | None = None) -> list[int]:
    return (await (await reader.snapshot(index, generation=generation)).live_ids()).tolist()


async def test_every_generation_is_listed_with_its_cause_and_can_be_opened() -> None:
    reader = await _history(open_store("memory://"))
    lines = await snapshots.generations(reader.store, "x")
    assert [line.generation for line in lines] == list(range(len(lines) - 1, -1, -1))
    assert [line.n_documents for line in lines][::-1][:4] == [0, 30, 25, 35]
    assert lines[-2].cause == "add 30 documents"
    assert lines[0].is_current
    assert await _ids(reader, generation=1) == list(range(30))
    assert await _ids(reader, generation=2) == list(range(5, 30))
    limited = await snapshots.generations(reader.store, "x", last=2)
    assert [line.generation for line in limited] == [line.generation for line in lines[:2]]


async def test_the_generation_in_force_at_a_time_is_found() -> None:
    reader = await _history(open_store("memory://"))
    lines = await snapshots.generations(reader.store, "x")
    assert await snapshots.generation_at_time(reader.store, "x", lines[1].created_s) == lines[1].generation
    with pytest.raises(NotFound):
        await snapshots.generation_at_time(reader.store, "x", lines[-1].created_s - 1)


async def test_a_generation_that_was_collected_is_not_found_and_says_so() -> None:
    reader = await _history(open_store("memory://"))
    await sweep(reader.store, "x", params=NOW)
    with pytest.raises(NotFound) as failure:
        await _ids(reader, generation=1)
    assert failure.value.code == "generation-not-found"
    assert await _ids(reader) == list(range(5, 40))
    assert (await verify(reader, "x", all_generations=True)).problems == []


async def test_a_sweep_within_the_grace_period_deletes_nothing() -> None:
    reader = await _history(open_store("memory://"))
    assert (await sweep(reader.store, "x")).n_deleted == 0


async def test_a_dry_run_deletes_nothing_and_names_everything() -> None:
    reader = await _history(open_store("memory://"))
    dry = await sweep(reader.store, "x", params=NOW, dry_run=True)
    wet = await sweep(reader.store, "x", params=NOW)
    assert set(dry.deleted) <= set(wet.deleted)
    assert dry.n_deleted > 0


async def test_a_pinned_generation_survives_garbage_collection_until_it_is_unpinned() -> None:
    reader = await _history(open_store("memory://"))
    await snapshots.pin(reader.store, "x", "before-compaction", generation=2, note="for the test")
    await sweep(reader.store, "x", params=NOW)
    assert await _ids(reader, generation=2) == list(range(5, 30))
    assert (await snapshots.pins(reader.store, "x"))["before-compaction"].note == "for the test"
    await snapshots.unpin(reader.store, "x", "before-compaction")
    await sweep(reader.store, "x", params=NOW)
    with pytest.raises(NotFound):
        await _ids(reader, generation=2)


async def test_pinning_what_a_sweep_has_written_down_fails_and_leaves_no_pin() -> None:
    reader = await _history(open_store("memory://"))
    doomed = names.manifest("x", (await reader.head("x")).manifest.index_id, 1)
    marker = write_marker(Sweep(writer=names.fresh_id(), created_s=0.0, names=(doomed,), generations=(1,)))
    await reader.store.put_if_absent(names.sweep("x", names.fresh_id()), marker)
    with pytest.raises(NotFound):
        await snapshots.pin(reader.store, "x", "late", generation=1)
    assert await snapshots.pins(reader.store, "x") == {}


async def test_a_pin_made_while_a_sweep_runs_is_seen_or_refused_but_never_broken() -> None:
    """The pin is tried before each call of the sweep in turn."""
    from engine.store.wrappers import AroundStore

    class PinsAt(AroundStore):
        def __init__(self, inner: ObjectStore, at: int) -> None:
            super().__init__(inner)
            self.at, self.n, self.pinned = at, 0, False

        async def _around(self, call, run):  # type: ignore[no-untyped-def]
            self.n += 1
            if self.n == self.at:
                try:
                    await snapshots.pin(self.inner, "x", "midway", generation=2)
                    self.pinned = True
                except NotFound:
                    pass
            return await run()

    outcomes = set()
    for at in range(1, 60):
        reader = await _history(open_store("memory://"))
        store = PinsAt(reader.store, at)
        await sweep(store, "x", params=NOW)
        if store.n < at:
            break
        outcomes.add(store.pinned)
        if store.pinned:
            assert await _ids(reader, generation=2) == list(range(5, 30))
        assert (await verify(Reader(reader.store), "x", all_generations=True)).problems == []
    assert outcomes == {True, False}


async def test_an_unknown_pin_cannot_be_removed_and_a_bad_name_not_be_used() -> None:
    reader = await _history(open_store("memory://"))
    with pytest.raises(NotFound) as failure:
        await snapshots.unpin(reader.store, "x", "never")
    assert failure.value.code == "pin-not-found"
    with pytest.raises(InvalidRequest):
        await snapshots.pin(reader.store, "x", "../evil")


async def test_a_rollback_is_a_new_generation_and_ids_are_never_used_again() -> None:
    reader = await _history(open_store("memory://"))
    before = (await reader.snapshot("x")).manifest
    head = await snapshots.rollback(reader.store, "x", 1)
    assert head.manifest.generation == before.generation + 1
    assert await _ids(reader) == list(range(30))
    added = await reader.writer("x").add(*CORPUS.part(50, 51))
    assert added.ids.tolist() == [40]
    assert await snapshots.pins(reader.store, "x") == {}


async def test_a_branch_goes_its_own_way_and_garbage_collection_of_both_keeps_both() -> None:
    reader = await _history(open_store("memory://"))
    await snapshots.branch(reader.store, "x", "y", generation=2)
    await reader.writer("y").add(*CORPUS.part(50, 55))
    await reader.writer("y").delete(np.array([6]))
    await reader.writer("x").delete(np.arange(40))
    await asyncio.sleep(0.003)
    await sweep(reader.store, "x", params=NOW)
    await sweep(reader.store, "y", params=NOW)
    fresh = Reader(reader.store)
    assert await _ids(fresh, "y") == [5, *range(7, 35)]
    assert await _ids(fresh, "x") == []
    [answer] = await Searcher(fresh).search(await fresh.snapshot("y"), [CORPUS.part(10, 11)[0]], SearchParams(k=1))
    assert answer.ids.tolist() == [10]
    assert answer.rows[0]["n"] == 10
    assert (await verify(fresh, "y", all_generations=True)).problems == []


async def test_a_branch_survives_the_deletion_of_its_parent_and_frees_its_objects_in_the_end() -> None:
    reader = await _history(open_store("memory://"))
    await snapshots.branch(reader.store, "x", "y")
    await drop(reader.store, "x")
    fresh = Reader(reader.store)
    assert await _ids(fresh, "y") == list(range(5, 40))
    assert list(await list_indices(reader.store)) == ["y"]
    await compact(fresh, "y", force=True)
    await drop(reader.store, "y")
    await asyncio.sleep(0.003)
    await sweep(reader.store, "x", params=NOW)
    left = [listed.name async for listed in reader.store.list("x/segments/")]
    assert left == []


async def test_a_branch_of_a_branch_keeps_what_both_ancestors_hold() -> None:
    reader = await _history(open_store("memory://"))
    await snapshots.branch(reader.store, "x", "y")
    await reader.writer("y").add(*CORPUS.part(50, 55))
    await snapshots.branch(reader.store, "y", "z")
    await drop(reader.store, "x")
    await drop(reader.store, "y")
    fresh = Reader(reader.store)
    assert await _ids(fresh, "z") == list(range(5, 45))
    assert (await verify(fresh, "z")).problems == []


async def test_a_branch_of_a_branch_under_way_survives_the_deletion_of_both_ancestors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its marker in the first one is there before its index: the deletion of the first one must leave it."""
    reader = await _history(open_store("memory://"))
    await snapshots.branch(reader.store, "x", "y")
    reached, go = _stopped_before_create(monkeypatch)
    making = asyncio.create_task(snapshots.branch(reader.store, "y", "z"))
    await reached.wait()
    await drop(reader.store, "x")
    go.set()
    await making
    await drop(reader.store, "y")
    await sweep(reader.store, "x", params=NOW)
    assert not (await verify(reader, "z")).problems


async def test_a_branch_that_comes_to_be_while_markers_are_read_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion finds no index "a" yet; then there is one, and "y", of which it was made, goes before the deletion looks for that."""
    reader = await _history(open_store("memory://"))
    await snapshots.branch(reader.store, "x", "y")
    reached, go = _stopped_before_create(monkeypatch)
    making = asyncio.create_task(snapshots.branch(reader.store, "y", "a"))
    await reached.wait()
    names_of_branch = sweeping._names_of_branch

    async def handed_on_meanwhile(store: ObjectStore, marker: str) -> set[str]:
        found = await names_of_branch(store, marker)
        if "/a-" in marker and not making.done():
            go.set()
            await making
            await drop(reader.store, "y")
        return found

    monkeypatch.setattr(sweeping, "_names_of_branch", handed_on_meanwhile)
    await drop(reader.store, "x")
    assert not (await verify(reader, "a")).problems


async def test_a_branch_that_is_withdrawn_takes_no_other_index_of_its_name_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent goes, somebody deletes it as well and makes another index of its name: that one stays."""
    reader = await _history(open_store("memory://"))

    async def create_and_replace(*args: Any, **kwargs: Any) -> Head:
        made = await create(*args, **kwargs)
        await drop(reader.store, "y")
        await drop(reader.store, "x")
        await create(reader.store, "y", IndexConfig())
        return made

    monkeypatch.setattr(snapshots, "create", create_and_replace)
    with pytest.raises(NotFound):
        await snapshots.branch(reader.store, "x", "y")
    assert list(await list_indices(reader.store)) == ["y"]


async def test_an_index_that_comes_back_as_a_branch_of_its_branch_survives_the_deletion_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """"x" is being deleted; "x" is made of "y", a branch of it, and "y" goes: nobody but "x" names the objects now, and they are its own."""
    reader = await _history(open_store("memory://"))
    await snapshots.branch(reader.store, "x", "y")
    names_held = indices.names_held

    async def back_meanwhile(store: ObjectStore, index: str) -> set[str]:
        monkeypatch.setattr(indices, "names_held", names_held)
        await snapshots.branch(reader.store, "y", "x")
        await drop(reader.store, "y")
        return await names_held(store, index)

    monkeypatch.setattr(indices, "names_held", back_meanwhile)
    await drop(reader.store, "x")
    assert not (await verify(reader, "x")).problems


def _stopped_before_create(monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """(set when a branch has left its markers, to be set so that it goes on)."""
    reached, go = asyncio.Event(), asyncio.Event()

    async def create_late(*args: Any, **kwargs: Any) -> Head:
        reached.set()
        await go.wait()
        return await create(*args, **kwargs)

    monkeypatch.setattr(snapshots, "create", create_late)
    return reached, go


async def test_a_branch_cannot_take_a_name_that_is_taken() -> None:
    reader = await _history(open_store("memory://"))
    await create(reader.store, "y", IndexConfig())
    with pytest.raises(Conflict):
        await snapshots.branch(reader.store, "x", "y")
    with pytest.raises(InvalidRequest):
        await snapshots.branch(reader.store, "x", "x")


async def test_an_index_made_again_under_the_same_name_has_nothing_of_the_old_one() -> None:
    reader = await _history(open_store("memory://"))
    assert await drop(reader.store, "x")
    assert not await drop(reader.store, "x")
    assert [listed.name async for listed in reader.store.list("x/")] == ["x/CURRENT"]
    await create(reader.store, "x", IndexConfig())
    assert await _ids(reader) == []
    added = await reader.writer("x").add(*CORPUS.part(0, 2))
    assert added.ids.tolist() == [0, 1]


async def test_compaction_carries_over_what_was_deleted_and_changed_while_it_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    import engine.index.compact as module

    reader = Reader(open_store("memory://"))
    await create(reader.store, "x", IndexConfig())
    await reader.writer("x").add(*CORPUS.part(0, 40), fields=[{"n": n} for n in range(40)])
    other = Reader(reader.store)
    build = module.quantised_segment

    def meanwhile(*args, **kwargs):  # type: ignore[no-untyped-def]
        made = build(*args, **kwargs)

        async def interfere() -> None:
            writer = Reader(other.store).writer("x")
            await writer.delete(np.array([3, 4]))
            await writer.update(np.array([7]), {"n": 700})
            await writer.add(*CORPUS.part(40, 42), fields=[{"n": 40}, {"n": 41}])

        asyncio.run(interfere())
        return made

    monkeypatch.setattr(module, "quantised_segment", meanwhile)
    report = await compact(reader, "x", force=True, max_steps=2)
    assert report.steps == {"train": 1, "fold": 1}
    fresh = Reader(reader.store)
    assert await _ids(fresh) == [n for n in range(42) if n not in (3, 4)]
    rows = await (await fresh.snapshot("x")).rows([7, 8, 41])
    assert [row and row["n"] for row in rows] == [700, 8, 41]
    assert (await (await fresh.snapshot("x")).select("n = ?", [700])).tolist() == [7]
    assert (await verify(fresh, "x", all_generations=True)).problems == []


async def test_two_compactors_do_the_work_once_and_harm_nothing() -> None:
    reader = Reader(open_store("memory://"))
    await create(reader.store, "x", IndexConfig())
    for n in range(4):
        await reader.writer("x").add(*CORPUS.part(10 * n, 10 * n + 10))
    reports = await asyncio.gather(*(compact(Reader(reader.store), "x", force=True) for _ in range(3)))
    assert sum(report.steps.get("fold", 0) for report in reports) == 1
    fresh = Reader(reader.store)
    assert await _ids(fresh) == list(range(40))
    assert (await verify(fresh, "x")).problems == []


async def test_an_outgrown_codec_is_trained_again_and_old_segments_follow() -> None:
    corpus = make_corpus(900, dim=16, seed=3)
    reader = Reader(open_store("memory://"))
    await create(reader.store, "x", IndexConfig(nbits=8))
    await reader.writer("x").add(*corpus.part(0, 100))
    await compact(reader, "x", force=True)
    first = (await reader.snapshot("x")).manifest.codecs
    await reader.writer("x").add(*corpus.part(100, 900))
    await compact(reader, "x", force=True)
    manifest = (await reader.snapshot("x")).manifest
    assert [codec.id for codec in manifest.codecs] != [codec.id for codec in first]
    assert {segment.codec for segment in manifest.segments} == {manifest.codecs[-1].id}
    query = corpus.tokens[:5]
    [answer] = await Searcher(reader).search(await reader.snapshot("x"), [query], SearchParams(k=1))
    assert answer.ids.tolist() == [0]
