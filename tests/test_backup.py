"""Backup, restore, recovery through versions of a bucket, and the drill that tries them."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import s3_options
from corpus import make_corpus
from engine.config import IndexConfig, MaintenanceParams, SearchParams
from engine.errors import Conflict, CorruptData, NotFound, Unavailable
from engine.format import names
from engine.index import snapshots
from engine.index.commit import create, load_head
from engine.index.compact import compact
from engine.index.indices import drop, list_indices
from engine.index.reader import Reader
from engine.index.references import homes_of, objects_of
from engine.index.sweep import sweep
from engine.index.undelete import plan_recovery, recover
from engine.index.verify import verify
from engine.searcher import Searcher
from engine.store.base import Object, ObjectStore
from engine.store.bucket import Bucket, open_bucket
from engine.store.objects import StoreOptions, open_store
from engine.store.wrappers import AroundStore, Call, CountingStore, Fault, FaultyStore, WorldStopped
from engine.transfer import copying
from engine.transfer import drill as drills
from engine.transfer.backup import BackupRecord, backup, generation_of, newest_record, restore
from engine.transfer.drill import DrillRecord, drill
from handler.cli import app
from s3_server import REGION, S3Server

CORPUS = make_corpus(60, dim=16)
NOW = MaintenanceParams(grace_s=0.0)


async def filled(store: ObjectStore | None = None) -> Reader:
    """Index x with segments of both kinds, tombstones, a patch and metadata; generation 3 pinned as `first`."""
    reader = Reader(store or open_store("memory://"))
    await create(reader.store, "x", IndexConfig())
    writer = reader.writer("x")
    await writer.add(*CORPUS.part(0, 30), fields=[{"n": n} for n in range(30)], keys=[f"k{n}" for n in range(30)])
    await compact(reader, "x", force=True)
    await snapshots.pin(reader.store, "x", "first")
    await writer.delete(np.arange(5))
    await writer.update(np.array([7]), {"n": 700})
    await writer.add(*CORPUS.part(30, 40), fields=[{"n": n} for n in range(30, 40)])
    return reader


async def answers(reader: Reader, index: str = "x", generation: int | None = None) -> list[tuple[list[int], list[float], list[object]]]:
    snapshot = await reader.snapshot(index, generation=generation)
    found = await Searcher(reader).search(snapshot, CORPUS.queries, SearchParams(k=5), mode="warm")
    return [(answer.ids.tolist(), answer.scores.tolist(), list(answer.rows)) for answer in found]


async def n_objects(store: ObjectStore, prefix: str = "x/") -> int:
    return len([listed async for listed in store.list(prefix)])


@pytest.mark.parametrize("kind", ["memory_store", "directory_store", "s3_store"])
async def test_a_backup_is_an_index_that_answers_alike_where_it_lies(kind: str, request: pytest.FixtureRequest) -> None:
    reader = await filled()
    target: ObjectStore = request.getfixturevalue(kind)
    report = await backup(reader.store, "x", target)
    copy = Reader(target)
    assert (await verify(copy, "x", all_generations=True)).problems == []
    assert await answers(copy) == await answers(reader)
    assert (await load_head(target, "x")).data == (await load_head(reader.store, "x")).data
    assert report.generations == (3, 6)
    pins = await snapshots.pins(target, "x")
    assert {name: pin.generation for name, pin in pins.items()} == {"first": 3, "backup-6": 6}
    assert await n_objects(reader.store, names.pins("x")) == 1  # nothing is left of those that held it
    assert report.copied.n_copied == report.copied.n_objects


async def test_a_second_backup_copies_only_what_the_target_lacks() -> None:
    reader = await filled()
    target = CountingStore(open_store("memory://"))
    first = await backup(reader.store, "x", target)
    await reader.writer("x").add(*CORPUS.part(40, 42))
    with target.window() as cost:
        second = await backup(reader.store, "x", target)
    assert second.copied.n_copied == 1
    assert second.copied.n_present == first.copied.n_copied
    assert cost.bytes_written < 100_000
    assert cost.bytes_read < first.copied.bytes_copied / 2
    with target.window() as cost:
        third = await backup(reader.store, "x", target)
    assert (third.copied.n_copied, third.moved) == (0, False)
    record = await newest_record(target, "backups", "x", BackupRecord)
    assert record == third.record


async def test_a_backup_holds_old_generations_as_asked_by_number_time_and_pin() -> None:
    reader = await filled()
    lines = {line.generation: line for line in await snapshots.generations(reader.store, "x")}
    target = open_store("memory://")
    for as_of in (4, lines[4].created_s, "first"):
        number = await generation_of(reader.store, "x", as_of)
        assert number == (3 if as_of == "first" else 4)
        await backup(reader.store, "x", target, generations=[number])
    assert (await load_head(target, "x")).manifest.generation == 4  # forward only: that of the pin is kept, not in force
    await backup(reader.store, "x", target, generations=sorted(lines))
    assert [line.generation for line in await snapshots.generations(target, "x")] == sorted(lines, reverse=True)
    for number in (4, 6):
        assert await answers(Reader(target), generation=number) == await answers(reader, generation=number)
    with pytest.raises(NotFound):
        await backup(reader.store, "x", target, generations=[99])


async def test_the_copy_of_a_branch_stands_alone() -> None:
    reader = await filled()
    await snapshots.branch(reader.store, "x", "y", generation=6)
    await reader.writer("y").add(*CORPUS.part(42, 44))
    assert homes_of((await reader.snapshot("y")).manifest, "y") == {"x"}
    target = open_store("memory://")
    await backup(reader.store, "y", target)
    await backup(reader.store, "y", target)
    copy = Reader(target)
    manifest = (await copy.snapshot("y")).manifest
    assert homes_of(manifest, "y") == set()
    assert [folder async for folder in target.list_folders("")] == ["_records", "y"]
    assert (await verify(copy, "y")).problems == []
    assert await answers(copy, "y") == await answers(reader, "y")
    await copy.writer("y").delete(np.array([10]))  # it is an index like any other
    with pytest.raises(Conflict) as refused:
        await backup(reader.store, "y", target)  # but then no longer a copy
    assert refused.value.code == "index-exists"


async def test_a_backup_of_another_life_of_the_index_is_refused() -> None:
    reader, target = await filled(), open_store("memory://")
    await backup(reader.store, "x", target)
    await drop(reader.store, "x")
    again = await filled(reader.store)
    before = await answers(Reader(target))
    with pytest.raises(Conflict):
        await backup(again.store, "x", target)
    assert await answers(Reader(target)) == before


async def test_a_backup_killed_after_any_call_leaves_the_old_one_in_force_and_goes_on() -> None:
    """The target's world stops after each of its calls in turn."""
    reader = await filled()
    inner = open_store("memory://")
    await backup(reader.store, "x", inner, generations=[4])
    before = await answers(Reader(inner))
    rehearsal = FaultyStore(open_store("memory://"))
    await _clone(inner, rehearsal.inner)
    after = await answers(reader)
    await backup(reader.store, "x", rehearsal)
    n_copied_in_all = 0
    for stop in range(1, len(rehearsal.calls) + 1, 2):
        target = open_store("memory://")
        await _clone(inner, target)
        with pytest.raises(WorldStopped):
            await backup(reader.store, "x", FaultyStore(target, {stop: _death(rehearsal.calls[stop - 1])}))
        head = (await load_head(target, "x")).manifest
        assert head.generation in (4, 6)
        assert await answers(Reader(target)) == (before if head.generation == 4 else after)
        assert (await verify(Reader(target), "x", all_generations=True)).problems == []
        report = await backup(reader.store, "x", target)
        n_copied_in_all += report.copied.n_copied
        assert await answers(Reader(target)) == after
    assert n_copied_in_all
    assert len(await snapshots.pins(reader.store, "x")) == 1


def _death(call: Call) -> Fault:
    """A write takes effect and is the last."""
    return "stop-after" if call.kind in ("put", "replace") else "stop"


async def _clone(source: ObjectStore, target: ObjectStore) -> None:
    async for listed in source.list(""):
        await target.put_if_absent(listed.name, (await source.get(listed.name)).data)


async def test_garbage_collection_of_the_source_waits_for_a_backup_under_way() -> None:
    """At each object that the backup reads, documents are deleted, folded away and collected without grace."""
    reader = await filled()
    expected = await answers(reader)

    class Collects(AroundStore):
        async def get(self, name: str) -> Object:
            if "/segments/" in name:
                await asyncio.sleep(0.002)
                live = await (await reader.snapshot("x")).live_ids()
                await reader.writer("x").delete(live[:1])
                await compact(reader, "x", force=True)
                await asyncio.sleep(0.002)
                await sweep(reader.store, "x", params=NOW)
            return await self.inner.get(name)

    target = open_store("memory://")
    await backup(Collects(reader.store), "x", target)
    assert await answers(Reader(target)) == expected
    await asyncio.sleep(0.002)
    await sweep(reader.store, "x", params=NOW)  # and no longer than that
    with pytest.raises(NotFound):
        await answers(reader, generation=6)


async def test_garbage_collection_of_the_target_does_not_take_what_is_being_copied() -> None:
    reader = await filled()
    inner = open_store("memory://")
    await backup(reader.store, "x", inner, generations=[3])

    class Collects(AroundStore):
        n = 0

        async def put_if_absent(self, name: str, data: object) -> str:
            etag = await self.inner.put_if_absent(name, data)  # type: ignore[arg-type]
            if "/pins/" in name:  # without grace, what is copied but not pinned yet goes
                self.n += 1
                await asyncio.sleep(0.002)
                await sweep(self.inner, "x", params=NOW)
            return etag

    target = Collects(inner)
    await backup(reader.store, "x", target)
    assert target.n >= 1
    assert (await verify(Reader(inner), "x", all_generations=True)).problems == []
    assert await answers(Reader(inner)) == await answers(reader)


async def test_only_so_many_backups_are_kept_and_the_rest_is_collected() -> None:
    reader, target = await filled(), open_store("memory://")
    for n in range(4):
        await reader.writer("x").delete(np.array([10 + n]))
        report = await backup(reader.store, "x", target, keep=2)
    assert report.dropped == (8,)
    kept = {name for name in await snapshots.pins(target, "x") if name.startswith("backup-")}
    assert kept == {"backup-9", "backup-10"}
    before = await n_objects(target)
    await asyncio.sleep(0.003)
    swept = await sweep(target, "x", params=NOW)
    assert swept.n_deleted > 0
    assert await n_objects(target) == before - swept.n_deleted
    assert (await verify(Reader(target), "x", all_generations=True)).problems == []


async def test_a_damaged_source_is_not_copied_over_a_sound_backup(tmp_path: Path) -> None:
    reader = await filled(open_store(str(tmp_path), StoreOptions(fsync=False)))
    target = open_store("memory://")
    await backup(reader.store, "x", target)
    before = await answers(Reader(target))
    await reader.writer("x").add(*CORPUS.part(44, 46))
    newest = max((tmp_path / "x/segments").iterdir()) / "data"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    with pytest.raises(CorruptData) as damaged:
        await backup(reader.store, "x", target)
    assert newest.parent.name in str(damaged.value)
    assert await answers(Reader(target)) == before


# Restore


async def test_an_index_is_restored_under_its_own_or_another_name_whole_or_as_it_was() -> None:
    reader, copy = await filled(), open_store("memory://")
    await backup(reader.store, "x", copy)
    fresh = Reader(open_store("memory://"))
    report = await restore(copy, "x", fresh.store, "x")
    assert (report.from_generation, report.generation, report.is_new) == (6, 0, True)
    assert await answers(fresh) == await answers(reader)
    await restore(copy, "x", fresh.store, "old", generation=3)
    assert await answers(fresh, "old") == await answers(reader, generation=3)
    await restore(reader.store, "x", reader.store, "twin")  # one store will do
    assert await answers(reader, "twin") == await answers(reader)
    await drop(reader.store, "x")
    assert (await verify(Reader(reader.store), "twin")).problems == []
    for name in ("x", "old"):
        assert (await verify(Reader(fresh.store), name, all_generations=True)).problems == []
    added = await fresh.writer("x").add(*CORPUS.part(46, 47))
    assert added.ids.tolist() == [40]  # ids go on where they were
    assert await snapshots.pins(fresh.store, "x") == {}


async def test_restoring_over_an_index_is_refused_unless_told_and_then_is_its_next_generation() -> None:
    reader, copy = await filled(), open_store("memory://")
    await backup(reader.store, "x", copy)
    expected = await answers(reader)
    await reader.writer("x").delete(np.arange(20, 40))
    await reader.writer("x").add(*CORPUS.part(50, 55))
    lost = (await reader.snapshot("x")).manifest
    with pytest.raises(Conflict):
        await restore(copy, "x", reader.store, "x")
    assert (await load_head(reader.store, "x")).manifest == lost
    report = await restore(copy, "x", reader.store, "x", replace=True)
    assert (report.generation, report.is_new) == (lost.generation + 1, False)
    assert await answers(reader) == expected
    added = await reader.writer("x").add(*CORPUS.part(55, 56))
    assert added.ids.tolist() == [45]  # not 40 again, which was given out after the backup
    await snapshots.rollback(reader.store, "x", lost.generation)
    assert (await reader.snapshot("x")).n_documents == lost.n_documents


async def test_restoring_over_a_damaged_index_heals_it(tmp_path: Path) -> None:
    reader = await filled(open_store(str(tmp_path), StoreOptions(fsync=False)))
    copy = open_store("memory://")
    await backup(reader.store, "x", copy)
    expected = await answers(reader)
    data, gone = [path / "data" for path in sorted((tmp_path / "x/segments").iterdir())][-2:]
    data.write_bytes(b"rubbish" + data.read_bytes()[7:])
    gone.unlink()
    assert len((await verify(Reader(reader.store), "x")).problems) >= 2
    report = await restore(copy, "x", reader.store, "x", replace=True)
    assert (report.copied.n_repaired, report.copied.n_copied) == (1, 2)
    assert (await verify(Reader(reader.store), "x")).problems == []
    assert await answers(Reader(reader.store)) == expected


async def test_a_restore_killed_after_any_call_leaves_no_index_or_a_whole_one() -> None:
    reader, copy = await filled(), open_store("memory://")
    await backup(reader.store, "x", copy)
    expected = await answers(reader)
    rehearsal = FaultyStore(open_store("memory://"))
    await restore(copy, "x", rehearsal, "x")
    for stop in range(1, len(rehearsal.calls) + 1):
        target = open_store("memory://")
        with pytest.raises(WorldStopped):
            await restore(copy, "x", FaultyStore(target, {stop: _death(rehearsal.calls[stop - 1])}), "x")
        if "x" in await list_indices(target):
            assert await answers(Reader(target)) == expected
        else:
            await restore(copy, "x", target, "x")
            assert await answers(Reader(target)) == expected


async def test_a_backup_that_may_only_be_read_is_restored() -> None:
    class ReadOnly(AroundStore):
        async def put_if_absent(self, name: str, data: object) -> str:
            raise Unavailable("no", code="store-denied", name=name)

    reader, copy = await filled(), open_store("memory://")
    await backup(reader.store, "x", copy)
    fresh = Reader(open_store("memory://"))
    await restore(ReadOnly(copy), "x", fresh.store, "x")
    assert await answers(fresh) == await answers(reader)


# The drill


async def test_a_drill_measures_and_compares_and_leaves_only_its_record() -> None:
    reader, backups = await filled(), Reader(open_store("memory://"))
    record = await drill(reader, "x", backups, n_queries=6)
    assert record.is_good
    assert (record.rpo_s, record.n_queries, record.n_documents, record.generation) == (None, 6, 35, 6)
    assert record.rto_s >= record.restore_s > 0
    assert await newest_record(backups.store, "drills", "x", DrillRecord) == record
    assert list(await list_indices(backups.store)) == ["x"]
    assert [folder async for folder in backups.store.list_folders("")] == ["_records", "x"]
    again = await drill(reader, "x", backups, n_queries=6, as_is=True)
    assert (again.rpo_s, again.backup_s) == (0.0, None)
    await reader.writer("x").delete(np.array([12]))
    await asyncio.sleep(0.02)
    late = await drill(reader, "x", backups, n_queries=6, as_is=True)
    assert late.is_good
    assert late.generation == 6
    assert late.rpo_s is not None and 0.02 <= late.rpo_s < 60
    assert len(await snapshots.pins(reader.store, "x")) == 1


async def test_a_drill_finds_a_backup_that_was_damaged(tmp_path: Path) -> None:
    reader = await filled()
    backups = Reader(open_store(str(tmp_path), StoreOptions(fsync=False)))
    await backup(reader.store, "x", backups.store)
    victim = next((tmp_path / "x/codecs").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptData):
        await drill(reader, "x", backups, as_is=True)
    assert [folder async for folder in backups.store.list_folders("") if folder.startswith(drills.SCRATCH)] == []


async def test_a_failed_copy_ends_when_nothing_of_it_is_under_way() -> None:
    landed = []

    async def slow() -> None:
        await asyncio.to_thread(time.sleep, 0.05)
        landed.append("slow")

    async def damaged() -> None:
        raise CorruptData("damaged")

    async def never() -> None:
        landed.append("never")

    with pytest.raises(CorruptData):
        await copying._all(2, [slow(), damaged(), never()])
    assert landed == ["slow"]


def test_records_are_json_that_other_programs_can_read() -> None:
    assert {"rpo_s", "rto_s", "n_problems"} <= set(msgspec.json.schema(DrillRecord)["$defs"]["DrillRecord"]["properties"])


async def test_copies_name_the_same_objects_as_verification() -> None:
    from engine.index.verify import expected_objects

    reader = await filled()
    manifest = (await reader.snapshot("x")).manifest
    assert {expected.name for expected in expected_objects(manifest, "x")} == objects_of(manifest, "x")


# Versions of a bucket


@pytest.fixture
def versioned(s3: S3Server) -> tuple[ObjectStore, Bucket]:
    """An empty bucket that keeps old versions."""
    name = f"versioned-{uuid4().hex}"
    options = s3_options(s3)
    bucket = open_bucket(f"s3://{name}/indices", options)
    bucket.client.create_bucket(Bucket=name)
    bucket.client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    return open_store(f"s3://{name}/indices", options), bucket


def remove_behind_the_engines_back(bucket: Bucket, *parts: str) -> list[str]:
    """As `aws s3 rm --recursive` does: names that contain any of these."""
    listed = bucket.client.list_objects_v2(Bucket=bucket.bucket, Prefix=bucket.prefix)["Contents"]
    doomed = [line["Key"] for line in listed if any(part in line["Key"] for part in parts)]
    bucket.client.delete_objects(Bucket=bucket.bucket, Delete={"Objects": [{"Key": key} for key in doomed]})
    return doomed


async def test_an_index_deleted_behind_the_engines_back_comes_back(versioned: tuple[ObjectStore, Bucket]) -> None:
    store, bucket = versioned
    reader = await filled(store)
    expected = await answers(reader)
    data = (await load_head(store, "x")).data
    doomed = remove_behind_the_engines_back(bucket, "")
    assert await list_indices(store) == {}
    plan = await plan_recovery(store, bucket, "x")
    assert (plan.wanted.generation, plan.n_sound, plan.shows, plan.is_whole) == (6, 0, "return", True)
    assert await list_indices(store) == {}  # a plan changes nothing
    done = await recover(store, bucket, "x", plan)
    assert (done.generation, done.lost) == (6, [])
    assert len(done.brought_back) == len(objects_of(plan.wanted, "x")) < len(doomed)
    fresh = Reader(store)
    assert (await load_head(store, "x")).data == data
    assert (await verify(fresh, "x")).problems == []
    assert await answers(fresh) == expected
    await fresh.writer("x").add(*CORPUS.part(40, 41))
    again = await plan_recovery(store, bucket, "x")
    assert (again.repairs, again.shows) == ([], "")


async def test_single_objects_come_back_and_overwritten_ones_too(versioned: tuple[ObjectStore, Bucket]) -> None:
    store, bucket = versioned
    reader = await filled(store)
    expected = await answers(reader)
    remove_behind_the_engines_back(bucket, "/codecs/", "/tombstones/")
    segment = max(name for name in objects_of((await reader.snapshot("x")).manifest, "x") if name.endswith("/data"))
    size = len((await store.get(segment)).data)
    bucket.client.put_object(Bucket=bucket.bucket, Key=bucket.prefix + segment, Body=b"short")
    bucket.client.put_object(Bucket=bucket.bucket, Key=bucket.prefix + segment, Body=bytes(size))  # of the right size, even
    bucket.client.put_object(Bucket=bucket.bucket, Key=bucket.prefix + names.current("x"), Body=b"rubbish")
    done = await recover(store, bucket, "x", await plan_recovery(store, bucket, "x"))
    assert len(done.brought_back) == 3
    assert (await verify(Reader(store), "x")).problems == []
    assert await answers(Reader(store)) == expected


async def test_an_older_generation_comes_back_as_a_new_one(versioned: tuple[ObjectStore, Bucket]) -> None:
    """It was collected long ago; its number is not given out again, whether CURRENT is there or not."""
    store, bucket = versioned
    reader = await filled(store)
    await snapshots.unpin(store, "x", "first")
    old = await reader.snapshot("x", generation=3)
    expected = await answers(reader, generation=3)
    await compact(reader, "x", force=True)
    await reader.writer("x").delete(np.arange(20, 30))
    await compact(reader, "x", force=True)
    await asyncio.sleep(1.1)  # the store's timestamps are whole seconds
    await sweep(store, "x", params=NOW)
    last = (await load_head(store, "x")).manifest.generation
    with pytest.raises(NotFound):
        await answers(reader, generation=3)
    for as_of in (3, old.manifest.created_s):
        plan = await plan_recovery(store, bucket, "x", as_of)
        assert (plan.wanted.generation, plan.shows) == (3, "renew")
        done = await recover(store, bucket, "x", plan)
        last += 1
        assert (done.generation, done.lost) == (last, [])
        assert await answers(Reader(store)) == expected
        remove_behind_the_engines_back(bucket, "/CURRENT", "/segments/")
        done = await recover(store, bucket, "x", await plan_recovery(store, bucket, "x", 3))
        last += 1
        assert done.generation == last
        assert await answers(Reader(store)) == expected
        assert (await verify(Reader(store), "x")).problems == []


async def test_a_recovery_that_lacks_an_object_for_good_says_which_and_shows_nothing(versioned: tuple[ObjectStore, Bucket]) -> None:
    store, bucket = versioned
    await filled(store)
    remove_behind_the_engines_back(bucket, "")
    [codec] = await bucket.versions("x/codecs/")
    for version in (await bucket.versions("x/codecs/"))[codec]:
        bucket.client.delete_object(Bucket=bucket.bucket, Key=bucket.prefix + codec, VersionId=version.version_id)
    plan = await plan_recovery(store, bucket, "x")
    assert not plan.is_whole
    done = await recover(store, bucket, "x", plan)
    assert done.lost == [codec]
    assert done.generation is None
    assert await list_indices(store) == {}


@pytest.mark.parametrize("generation", [None, 3])
async def test_an_index_that_was_deleted_comes_back_over_its_deletion(versioned: tuple[ObjectStore, Bucket], generation: int | None) -> None:
    store, bucket = versioned
    reader = await filled(store)
    newest = (await reader.snapshot("x")).manifest
    expected = await answers(reader, generation=generation)
    await drop(store, "x")
    plan = await plan_recovery(store, bucket, "x", generation)
    assert plan.is_whole
    await recover(store, bucket, "x", plan)
    fresh = Reader(store)
    assert await answers(fresh) == expected
    added = await fresh.writer("x").add(*CORPUS.part(46, 47))
    assert added.ids.tolist() == [newest.next_id]
    assert (await verify(fresh, "x")).problems == []


async def test_a_backup_that_was_deleted_is_made_again() -> None:
    reader, copy = await filled(), open_store("memory://")
    await backup(reader.store, "x", copy)
    await drop(copy, "x")
    await backup(reader.store, "x", copy)
    assert await answers(Reader(copy)) == await answers(reader)


async def test_what_no_version_remembers_is_refused(versioned: tuple[ObjectStore, Bucket]) -> None:
    store, bucket = versioned
    with pytest.raises(NotFound):
        await plan_recovery(store, bucket, "x")
    reader = await filled(store)
    with pytest.raises(NotFound):
        await plan_recovery(store, bucket, "x", 77)
    with pytest.raises(NotFound):
        await plan_recovery(store, bucket, "x", 1000.0)
    first = (await reader.snapshot("x")).manifest
    await drop(store, "x")
    await create(store, "x", IndexConfig())
    plan = await plan_recovery(store, bucket, "x")  # the new one, which has no objects
    assert (plan.wanted.index_id != first.index_id, plan.repairs) == (True, [])


# The commands


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A store with the demo index, and where its backups go."""
    for name in [name for name in os.environ if name.startswith("TARTAN_") or name == "INDEX_DIR"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TARTAN_INDEX_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("TARTAN_FSYNC", "false")
    asyncio.run(_fill(open_store(str(tmp_path / "store"), StoreOptions(fsync=False))))
    return str(tmp_path / "store"), str(tmp_path / "backups")


async def _fill(store: ObjectStore) -> None:
    await filled(store)


def told(*arguments: str, code: int = 0) -> dict[str, Any]:
    """What --json says."""
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout if not code else result.stdout or result.stderr)
    return found


def test_backup_and_restore_from_the_command_line(places: tuple[str, str], tmp_path: Path) -> None:
    store, to = places
    [line] = told("backup", "x", "--to", to)["indices"]
    assert (line["generation"], line["generations"], line["moved"]) == (6, [3, 6], True)
    [line] = told("backup", "--to", to, "--keep", "3")["indices"]
    assert (line["copied"], line["present"]) == (0, line["objects"])
    assert told("verify", "x", "--store", to)["sound"]
    elsewhere = str(tmp_path / "elsewhere")
    restored = told("restore", to, "x", "--store", elsewhere)
    assert (restored["created"], restored["documents"], restored["from_generation"]) == (True, 35, 6)
    old = told("restore", to, "x", "--as-of", "first", "--name", "old", "--store", elsewhere)
    assert (old["documents"], old["from_generation"]) == (30, 3)
    late = told("restore", to, "x", "--as-of", "2100-01-01T00:00Z", "--name", "then", "--store", elsewhere)
    assert (late["index"], late["from_generation"]) == ("then", 6)
    assert told("restore", to, "x", code=1)["error"]["code"] == "index-exists"
    assert told("restore", to, "x", "--replace")["generation"] == 7
    assert told("backup", "x", "--to", store, code=1)["error"]["code"] == "invalid-request"
    assert told("restore", str(tmp_path / "nowhere"), "x", code=1)["error"]["code"] == "object-not-found"
    assert told("backup", "x", "--to", to, "--as-of", "no-such", code=1)["error"]["code"] == "pin-not-found"
    assert CliRunner().invoke(app, ["backup", "--to", to, "--all", "--as-of", "3"]).exit_code == 2
    shown = CliRunner().invoke(app, ["backup", "x", "--to", to, "--all"])
    assert "generation 7 is in" in shown.stdout


def test_one_damaged_index_does_not_keep_the_others_from_being_backed_up(places: tuple[str, str]) -> None:
    store, to = places
    for name in ("a-bad", "b-torn"):
        told("restore", told("backup", "x", "--to", to)["to"], "x", "--name", name)
    (Path(store) / "a-bad/CURRENT").write_bytes(b"not what was written")
    next((Path(store) / "b-torn/segments").glob("*/data")).write_bytes(b"not what was written")
    report = told("backup", "--to", to, code=1)
    assert [line["index"] for line in report["indices"]] == ["x"]
    assert sorted(report["failed"]) == ["a-bad", "b-torn"]
    assert "b-torn: not backed up" in CliRunner().invoke(app, ["backup", "--to", to]).stdout


def test_a_drill_from_the_command_line(places: tuple[str, str]) -> None:
    _, to = places
    found = told("drill", "x", "--to", to, "--queries", "4")
    assert (found["good"], found["rpo_s"], found["n_queries"]) == (True, None, 4)
    shown = CliRunner().invoke(app, ["drill", "x", "--to", to, "--as-is", "--queries", "4"]).stdout
    assert "(RPO)" in shown
    assert "can be relied on" in shown


def test_undelete_from_the_command_line(versioned: tuple[ObjectStore, Bucket], s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store, bucket = versioned
    for name, value in (("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_REGION", REGION)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TARTAN_S3_ENDPOINT", s3.url)
    url = f"s3://{bucket.bucket}/indices"
    asyncio.run(_fill(store))
    remove_behind_the_engines_back(bucket, "")
    plan = told("undelete", "x", "--store", url)
    assert (plan["done"], plan["lost"], plan["wanted"], len(plan["missing"]) > 3) == (False, [], 6, True)
    shown = CliRunner().invoke(app, ["undelete", "x", "--store", url, "--yes"])
    assert "every object is checked" in shown.stdout
    assert told("verify", "x", "--store", url)["sound"]
    assert told("undelete", "x", "--as-of", "99", "--store", url, code=1)["error"]["code"] == "generation-not-found"
    assert told("undelete", "x", "--store", "/tmp", code=1)["error"]["code"] == "invalid-request"
