"""The local cache: what it answers, what it asks the store, what it keeps under its budget, and what it survives."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from engine.errors import NotFound, Unavailable
from engine.store.base import Buffer, ObjectStore, Range
from engine.store.cache import CachedStore
from engine.store.extent_file import BLOCK_BYTES
from engine.store.extents import ExtentCache
from engine.store.wrappers import AroundStore, Call, CountingStore, DelayStore, FaultyStore

T = TypeVar("T")
SIZE = 100_000
BODY = random.Random(20261123).randbytes(SIZE)


@pytest.fixture
async def inner(memory_store: ObjectStore) -> CountingStore:
    for number in range(4):
        await memory_store.put_if_absent(f"i/segments/{number}/data", BODY)
    return CountingStore(memory_store)


def cached(inner: ObjectStore, folder: Path, budget_bytes: int = 10 << 20, **more: float) -> CachedStore:
    return CachedStore(inner, str(folder), budget_bytes=budget_bytes, cacheable=lambda name: "/segments/" in name, **more)  # type: ignore[arg-type]


@pytest.fixture
async def cache(inner: CountingStore, tmp_path: Path) -> AsyncIterator[CachedStore]:
    made = cached(inner, tmp_path / "cache")
    yield made
    await made.settle()


async def read(store: ObjectStore, wanted: list[Range], number: int = 0) -> list[bytes]:
    """Ranges of an object, checked against what was put."""
    answers = [bytes(data) for data in await store.get_ranges(f"i/segments/{number}/data", wanted)]
    assert answers == [BODY[start:end] for start, end in wanted]
    if isinstance(store, CachedStore):
        await store.settle()
    return answers


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache" / "objects").rglob("~*") if path.is_file())


# --- hits and misses


async def test_a_range_inside_a_kept_extent_is_a_hit(cache: CachedStore, inner: CountingStore) -> None:
    await read(cache, [(1000, 2000), (5000, 9000)])
    with inner.window() as cost:
        await read(cache, [(1000, 2000), (1500, 1600), (5000, 5001), (8999, 9000), (7, 7)])
    assert cost.n_requests == 0
    assert (cache.stats.hits, cache.stats.misses, cache.stats.hit_bytes, cache.stats.miss_bytes) == (4, 2, 1102, 5000)


async def test_only_what_is_missing_is_asked_for_and_only_once(cache: CachedStore, inner: CountingStore) -> None:
    await read(cache, [(1000, 2000)])
    with inner.window() as cost:
        await read(cache, [(1500, 2500), (1000, 2000), (1500, 2500), (0, 10)])
    assert (dict(cost.requests), cost.bytes_read, cost.rounds) == ({"range": 2}, 1010, 1)


async def test_neighbours_fetched_together_are_one_extent(cache: CachedStore, inner: CountingStore) -> None:
    await read(cache, [(1000, 2000), (2000, 3000)])
    with inner.window() as cost:
        await read(cache, [(1900, 2100)])
    assert cost.n_requests == 0


async def test_a_whole_object_answers_ranges_and_ranges_do_not_answer_a_whole(cache: CachedStore, inner: CountingStore) -> None:
    await read(cache, [(0, SIZE)])
    with inner.window() as cost:
        found = await cache.get("i/segments/0/data")
        await cache.settle()
        again = await cache.get("i/segments/0/data")
        await read(cache, [(0, 10), (50_000, SIZE)])
    assert dict(cost.requests) == {"get": 1}
    assert (bytes(found.data), found.etag) == (bytes(again.data), again.etag) == (BODY, found.etag)


async def test_names_that_may_change_are_never_kept(cache: CachedStore, inner: CountingStore) -> None:
    etag = await cache.put_if_absent("i/CURRENT", b"1")
    for body in (b"2", b"3"):
        await cache.get("i/CURRENT")
        await cache.get_ranges("i/CURRENT", [(0, 1)])
        etag = await cache.replace_if_unchanged("i/CURRENT", body, etag)
        assert bytes((await cache.get("i/CURRENT")).data) == body
        assert [bytes(part) for part in await cache.get_ranges("i/CURRENT", [(0, 1)])] == [body]
    assert (cache.stats.hits, cache.stats.misses) == (0, 0)


async def test_concurrent_requests_for_the_same_missing_bytes_share_one_get(inner: CountingStore, tmp_path: Path) -> None:
    slow = CountingStore(DelayStore(inner, p50_s=0.02, p99_s=0.02))
    cache = cached(slow, tmp_path / "cache")
    with slow.window() as cost:
        await asyncio.gather(*(cache.get_ranges("i/segments/0/data", [(0, 10), (at, at + 10)]) for at in (20, 20, 40, 40)))
        await asyncio.gather(*(cache.get("i/segments/1/data") for _ in range(5)))
    assert dict(cost.requests) == {"range": 3, "get": 1}
    assert cache.stats.shared == 5 + 4
    await cache.settle()


async def test_a_cancelled_request_does_not_take_the_others_with_it(inner: CountingStore, tmp_path: Path) -> None:
    cache = cached(DelayStore(inner, p50_s=0.03, p99_s=0.03), tmp_path / "cache")
    first, second = (asyncio.ensure_future(cache.get_ranges("i/segments/0/data", [(0, 10)])) for _ in range(2))
    await asyncio.sleep(0.015)
    first.cancel()
    assert [bytes(data) for data in await second] == [BODY[:10]]
    await cache.settle()


async def test_a_failed_fetch_is_told_to_all_who_wait_and_not_remembered(inner: CountingStore, tmp_path: Path) -> None:
    class Late(FaultyStore):
        async def _around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
            await asyncio.sleep(0.05)
            return await super()._around(call, run)

    cache = cached(Late(inner, {1: "unavailable", 2: "unavailable"}), tmp_path / "cache")
    for attempt in (lambda: cache.get("i/segments/0/data"), lambda: cache.get_ranges("i/segments/0/data", [(0, 10)])):
        answers = await asyncio.gather(attempt(), attempt(), return_exceptions=True)
        assert [type(answer) for answer in answers] == [Unavailable, Unavailable]
    await read(cache, [(0, 10)])
    assert bytes((await cache.get("i/segments/0/data")).data) == BODY
    with pytest.raises(NotFound):
        await cache.get("i/segments/none/data")
    await cache.settle()


async def test_until_it_is_written_an_answer_is_given_from_memory(inner: CountingStore, tmp_path: Path) -> None:
    cache = cached(inner, tmp_path / "cache")
    await cache.get_ranges("i/segments/0/data", [(0, 10)])
    with inner.window() as cost:
        await cache.get_ranges("i/segments/0/data", [(0, 10)])
    assert cost.n_requests == 0
    await cache.settle()


async def test_answers_are_not_kept_while_too_many_wait_to_be_written(inner: CountingStore, tmp_path: Path) -> None:
    cache = cached(inner, tmp_path / "cache", max_pending_bytes=5000)
    await asyncio.gather(*(cache.get_ranges("i/segments/0/data", [(at, at + 4000)]) for at in (0, 10_000, 20_000)))
    await cache.settle()
    assert cache.stats.skipped >= 1
    assert cache.stats.skipped + len(files_in(tmp_path)) == 3
    assert cache._pending_bytes == 0


# --- processes


async def test_a_new_process_finds_what_an_earlier_one_kept(cache: CachedStore, inner: CountingStore, tmp_path: Path) -> None:
    await read(cache, [(1000, 2000), (70_000, SIZE)])
    await cache.get("i/segments/1/data")
    await cache.settle()
    later = cached(inner, tmp_path / "cache")
    with inner.window() as cost:
        await read(later, [(1500, 1600), (80_000, SIZE)])
        found = await later.get("i/segments/1/data")
    assert cost.n_requests == 0
    assert (bytes(found.data), found.etag) == (BODY, (await inner.get("i/segments/1/data")).etag)


async def test_a_process_finds_what_another_writes_meanwhile(cache: CachedStore, inner: CountingStore, tmp_path: Path) -> None:
    other = cached(inner, tmp_path / "cache")
    await read(other, [(0, 10)])
    await read(cache, [(20, 30)])
    with inner.window() as cost:
        await read(other, [(20, 30)])
    assert cost.n_requests == 0


async def test_a_file_that_another_process_evicted_is_fetched_again(cache: CachedStore, inner: CountingStore, tmp_path: Path) -> None:
    await read(cache, [(0, 10)])
    await cache.get("i/segments/1/data")
    await cache.settle()
    for path in files_in(tmp_path):
        path.unlink()
    with inner.window() as cost:
        await read(cache, [(0, 10)])
        assert await cache.local_path("i/segments/1/data") is None
        await cache.get("i/segments/1/data")
    assert dict(cost.requests) == {"range": 1, "get": 1}


async def test_the_whole_directory_may_vanish(cache: CachedStore, tmp_path: Path) -> None:
    await read(cache, [(0, 10)])
    await asyncio.to_thread(shutil.rmtree, tmp_path / "cache")
    await read(cache, [(0, 10)])
    await read(cache, [(0, 10)])
    assert cache.stats.write_errors == 0
    assert len(files_in(tmp_path)) == 1


WRITER = """
import random, sys
from engine.store.extents import ExtentCache

cache = ExtentCache(sys.argv[1], 400_000)
body = random.Random(20261123).randbytes(100_000)
choose = random.Random(sys.argv[2])
for _ in range(300):
    start = choose.randrange(90_000)
    end = start + choose.randrange(1, 10_000)
    name = f"i/segments/{choose.randrange(8)}/data"
    found = cache.read(name, [(start, end)])[0]
    assert found is None or found == body[start:end]
    cache.write(name, [(start, body[start:end])])
assert cache.stats.bad_files == 0 and cache.stats.write_errors == 0, cache.stats
print(cache.stats.hits)
"""


def start_writer(folder: Path, seed: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), seed]
    root = str(Path(__file__).parent.parent)
    return subprocess.Popen(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_processes_share_a_directory_and_its_budget(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path / "cache", seed) for seed in "ab"]
    for writer, (out, err) in [(writer, writer.communicate()) for writer in writers]:
        assert (writer.returncode, err) == (0, "")
        assert int(out) > 0
    held_bytes = sum(path.stat().st_size for path in files_in(tmp_path))
    assert 100_000 < held_bytes <= 400_000 * (1 + 2 / 16)


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    writer = start_writer(tmp_path / "cache", "killed")
    deadline_s = time.monotonic() + 10
    while not files_in(tmp_path) and time.monotonic() < deadline_s:
        time.sleep(0.005)
    writer.kill()
    writer.communicate()
    cache = ExtentCache(str(tmp_path / "cache"), 400_000)
    for number in range(8):
        (found,) = cache.read(f"i/segments/{number}/data", [(0, 1000)])
        assert found in (None, BODY[:1000])
    assert cache.stats.bad_files == 0


# --- damage


@pytest.mark.parametrize("at", [5, 1500, -1, -20, -30])
async def test_a_damaged_file_is_dropped_and_fetched_again(cache: CachedStore, inner: CountingStore, tmp_path: Path, at: int) -> None:
    await read(cache, [(0, 2000)])
    (path,) = files_in(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
    later = cached(inner, tmp_path / "cache")
    with inner.window() as cost:
        await read(later, [(0, 2000)])
        await read(later, [(0, 2000)])
    assert (cost.n_requests, later.stats.bad_files) == (1, 1)
    assert not path.exists()


@pytest.mark.parametrize("length", [0, 10, 1999, 2010])
async def test_a_file_that_was_cut_short_is_dropped(cache: CachedStore, inner: CountingStore, tmp_path: Path, length: int) -> None:
    await read(cache, [(0, 2000)])
    (path,) = files_in(tmp_path)
    os.truncate(path, length)
    later = cached(inner, tmp_path / "cache")
    await read(later, [(0, 2000)])
    assert (later.stats.bad_files, path.exists()) == (1, False)


def test_each_mebibyte_is_verified_when_it_is_first_read(tmp_path: Path) -> None:
    body = random.Random(1).randbytes(3 * BLOCK_BYTES + 5)
    ExtentCache(str(tmp_path / "cache"), 100 << 20).write("o", [(0, body)], etag="e")
    (path,) = files_in(tmp_path)
    with path.open("r+b") as file:
        file.seek(2 * BLOCK_BYTES + 7)
        file.write(bytes([body[2 * BLOCK_BYTES + 7] ^ 1]))
    later = ExtentCache(str(tmp_path / "cache"), 100 << 20)
    sound = [(0, 10), (BLOCK_BYTES - 5, BLOCK_BYTES + 5), (3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 5)]
    assert later.read("o", sound) == [body[start:end] for start, end in sound]
    assert later.stats.bad_files == 0
    assert later.read("o", [(2 * BLOCK_BYTES, 2 * BLOCK_BYTES + 1)]) == [None]
    assert later.stats.bad_files == 1


# --- budget and eviction


def fill(cache: ExtentCache, names: list[str], n_bytes: int = 10_000) -> None:
    for name in names:
        cache.write(name, [(0, BODY[:n_bytes])])


def kept(cache: ExtentCache, names: list[str]) -> int:
    return sum(cache.read(name, [(0, 10)]) != [None] for name in names)


def test_the_budget_holds_and_the_oldest_go_first(tmp_path: Path) -> None:
    cache = ExtentCache(str(tmp_path / "cache"), 200_000)
    names = [f"o{number:03d}" for number in range(100)]
    fill(cache, names)
    assert sum(path.stat().st_size for path in files_in(tmp_path)) <= 200_000 * (1 + 1 / 16)
    assert cache.stats.evicted_bytes > 0
    assert kept(cache, names[:50]) == 0
    assert kept(cache, names[-10:]) == 10


@pytest.mark.parametrize("is_new_process", [False, True])
def test_one_big_scan_does_not_wash_out_what_is_hot(tmp_path: Path, is_new_process: bool) -> None:
    cache = ExtentCache(str(tmp_path / "cache"), 400_000, touch_interval_s=0)
    hot = [f"hot/{number}" for number in range(10)]
    fill(cache, hot)
    assert kept(cache, hot) == 10
    if is_new_process:
        cache = ExtentCache(str(tmp_path / "cache"), 400_000, touch_interval_s=0)
    fill(cache, [f"scan/{number}" for number in range(300)])
    assert kept(cache, hot) == 10


def test_what_was_hot_once_makes_room_for_what_is_hot_now(tmp_path: Path) -> None:
    cache = ExtentCache(str(tmp_path / "cache"), 400_000, touch_interval_s=0)
    before, now = [f"before/{number}" for number in range(25)], [f"now/{number}" for number in range(20)]
    fill(cache, before)
    kept(cache, before)
    for _ in range(4):
        for name in now:
            if not kept(cache, [name]):
                fill(cache, [name])
    assert kept(cache, now) >= 15
    assert kept(cache, before) <= 15


def test_what_is_larger_than_half_the_budget_is_not_kept(tmp_path: Path) -> None:
    cache = ExtentCache(str(tmp_path / "cache"), 50_000)
    cache.write("o", [(0, BODY[:30_000])])
    assert (files_in(tmp_path), cache.stats.skipped) == ([], 1)


def test_an_extent_makes_those_inside_it_superfluous(tmp_path: Path) -> None:
    cache = ExtentCache(str(tmp_path / "cache"), 1_000_000)
    cache.write("o", [(100, BODY[100:200]), (5000, BODY[5000:6000])])
    cache.write("o", [(0, BODY[:1000])])
    assert len(files_in(tmp_path)) == 2
    cache.write("o", [(0, BODY)], etag="e")
    assert len(files_in(tmp_path)) == 1
    cache.write("o", [(300, BODY[300:400])])
    assert len(files_in(tmp_path)) == 1
    assert cache.read("o", [(0, SIZE), (5500, 5600)]) == [BODY, BODY[5500:5600]]


def test_random_extents_never_answer_wrong_bytes(tmp_path: Path) -> None:
    choose = random.Random(7)
    cache = ExtentCache(str(tmp_path / "cache"), 300_000)
    held: list[Range] = []
    for _ in range(150):
        pieces = [(start, BODY[start : start + choose.randrange(1, 3000)]) for start in choose.sample(range(SIZE - 3000), 3)]
        cache.write("o", pieces)
        held += [(start, start + len(data)) for start, data in pieces]
        wanted = [(start, start + choose.randrange(1, 500)) for start in choose.sample(range(SIZE - 500), 20)]
        for (start, end), found in zip(wanted, cache.read("o", wanted), strict=True):
            assert found is None or found == BODY[start:end]
            assert found is None or any(low <= start for low, _ in held)
    assert cache.stats.hits > 100
    assert cache.stats.bad_files == 0


async def test_forgetting_drops_names_and_folders_and_nothing_else(cache: CachedStore, inner: CountingStore, tmp_path: Path) -> None:
    for number in range(4):
        await read(cache, [(0, 10)], number)
    await cache.forget(["i/segments/0/data", "i/segments/none/data"])
    await cache.forget(folder="i/segments/1/")
    with inner.window() as cost:
        for number in (2, 3):
            await read(cache, [(0, 10)], number)
        assert cost.n_requests == 0
        for number in (0, 1):
            await read(cache, [(0, 10)], number)
    assert cost.n_requests == 2
    await cache.forget(folder="")
    assert files_in(tmp_path) == []


# --- paths


async def test_a_kept_database_can_be_opened_where_it_lies(cache: CachedStore, inner: CountingStore, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "made.sqlite") as made:
        made.execute("create table t (x)")
        made.executemany("insert into t values (?)", [(number,) for number in range(1000)])
    made.close()
    await inner.put_if_absent("i/segments/9/metadata", await asyncio.to_thread((tmp_path / "made.sqlite").read_bytes))
    assert await cache.local_path("i/segments/9/metadata") is None
    await cache.get("i/segments/9/metadata")
    await cache.settle()
    for store in (cache, cached(inner, tmp_path / "cache")):
        path = await store.local_path("i/segments/9/metadata")
        opened = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
        assert opened.execute("pragma integrity_check").fetchall() == [("ok",)]
        assert opened.execute("select sum(x) from t").fetchone() == (499_500,)
        opened.close()


async def test_a_damaged_file_is_not_given_out(cache: CachedStore, inner: CountingStore, tmp_path: Path) -> None:
    await cache.get("i/segments/0/data")
    await cache.settle()
    (path,) = files_in(tmp_path)
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    later = cached(inner, tmp_path / "cache")
    assert await later.local_path("i/segments/0/data") is None
    assert later.stats.bad_files == 1


async def test_a_directory_store_gives_its_own_files(directory_store: ObjectStore, tmp_path: Path) -> None:
    await directory_store.put_if_absent("i/segments/0/data", BODY)
    path = await cached(directory_store, tmp_path / "cache").local_path("i/segments/0/data")
    assert path == str(tmp_path / "store/i/segments/0/data")


# --- a disk that does not take it


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
async def test_a_full_or_read_only_disk_turns_writing_off_and_everything_still_works(
    cache: CachedStore, inner: CountingStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    await read(cache, [(0, 10)])

    def refuse(*ignored: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "rename", refuse)
    for _ in range(3):
        await read(cache, [(100, 200)])
    assert (cache.stats.write_errors, cache.is_off, cache.stats.skipped) == (1, True, 2)
    with inner.window() as cost:
        await read(cache, [(0, 10)])
    assert cost.n_requests == 0
    monkeypatch.undo()
    cache._extents._off_until_s = 0.0  # a minute later
    await read(cache, [(100, 200)])
    assert not cache.is_off
    with inner.window() as cost:
        await read(cache, [(100, 200)])
    assert cost.n_requests == 0


async def test_a_folder_that_cannot_be_made_is_a_cache_that_is_off(inner: CountingStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    cache = cached(inner, tmp_path / "file" / "cache")
    for _ in range(2):
        await read(cache, [(0, 10)])
        assert bytes((await cache.get("i/segments/1/data")).data) == BODY
        await cache.settle()
    await cache.forget(folder="")
    assert cache.is_off


async def test_a_hit_is_a_hit_while_the_inner_store_is_down(cache: CachedStore, inner: CountingStore, tmp_path: Path) -> None:
    await read(cache, [(0, 1000)])

    class Down(AroundStore):
        async def get_ranges(self, name: str, ranges: object) -> list[Buffer]:
            raise Unavailable("down")

    later = cached(Down(inner), tmp_path / "cache")
    await read(later, [(10, 20)])
    with pytest.raises(Unavailable):
        await read(later, [(10, 2000)])
