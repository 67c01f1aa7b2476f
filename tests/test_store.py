"""The promises of engine/store/base.py, kept by every store and every wrapper; then what only some stores must survive."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from conftest import s3_options
from engine.errors import Conflict, CorruptData, EngineError, InvalidRequest, LimitExceeded, NotFound, Unavailable
from engine.store import objects
from engine.store.base import Buffer, ObjectStore, Range
from engine.store.cache import CachedStore
from engine.store.directory import DirectoryStore
from engine.store.objects import StoreOptions, open_store, probe_conditional_writes
from engine.store.wrappers import AroundStore, Call, CountingStore, DelayStore, Fault, FaultyStore, WorldStopped
from s3_server import REGION, S3Server, SlowServer

KINDS = ["memory", "directory", "s3", "cached", "counting", "delay", "faulty", "cached-counting-directory"]


@pytest.fixture(params=KINDS)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectStore]:
    """Each store of the house, empty."""

    def fixed(name: str) -> ObjectStore:
        found: ObjectStore = request.getfixturevalue(name)
        return found

    def cached(inner: ObjectStore) -> CachedStore:
        return CachedStore(inner, str(tmp_path / "cache"), budget_bytes=1 << 20, cacheable=lambda name: not name.endswith("CURRENT"))

    makers: dict[str, Callable[[], ObjectStore]] = {
        "memory": lambda: fixed("memory_store"),
        "directory": lambda: fixed("directory_store"),
        "s3": lambda: fixed("s3_store"),
        "cached": lambda: cached(fixed("memory_store")),
        "counting": lambda: CountingStore(fixed("memory_store")),
        "delay": lambda: DelayStore(fixed("memory_store"), p50_s=0.0005, p99_s=0.001),
        "faulty": lambda: FaultyStore(fixed("memory_store")),
        "cached-counting-directory": lambda: cached(CountingStore(fixed("directory_store"))),
    }
    made = makers[request.param]()
    yield made
    if isinstance(made, CachedStore):
        await made.settle()


async def names_of(store: ObjectStore, prefix: str, after: str | None = None) -> list[str]:
    return [line.name async for line in store.list(prefix, after=after)]


async def folders_of(store: ObjectStore, prefix: str) -> list[str]:
    return [folder async for folder in store.list_folders(prefix)]


# --- promises of every store


async def test_an_object_that_was_put_is_read_back_whole_with_its_etag(store: ObjectStore) -> None:
    etag = await store.put_if_absent("a/b", b"hello")
    for _ in range(2):  # the second time a cache answers
        found = await store.get("a/b")
        assert (bytes(found.data), found.etag) == (b"hello", etag)


async def test_an_absent_object_is_not_found_by_any_read(store: ObjectStore) -> None:
    for read in (store.get("no"), store.get_if_changed("no", "etag"), store.get_ranges("no", [(0, 1)])):
        with pytest.raises(NotFound) as caught:
            await read
        assert caught.value.code == "object-not-found"
        assert caught.value.details["name"] == "no"


async def test_an_unchanged_object_is_not_sent_again(store: ObjectStore) -> None:
    first = await store.put_if_absent("x/CURRENT", b"1")
    assert await store.get_if_changed("x/CURRENT", first) is None
    second = await store.replace_if_unchanged("x/CURRENT", b"2", first)
    found = await store.get_if_changed("x/CURRENT", first)
    assert found is not None
    assert (bytes(found.data), found.etag) == (b"2", second)


async def test_ranges_come_in_the_order_asked_for_and_empty_ones_are_empty(store: ObjectStore) -> None:
    await store.put_if_absent("o", bytes(range(100)))
    wanted = [(90, 100), (0, 0), (3, 5), (3, 5), (0, 100), (100, 100)]
    for _ in range(2):
        assert [bytes(data) for data in await store.get_ranges("o", wanted)] == [bytes(range(*one)) for one in wanted]
    assert await store.get_ranges("o", []) == []


@pytest.mark.parametrize("beyond", [(90, 101), (100, 101), (200, 300)])
async def test_a_range_beyond_the_end_is_corrupt_data(store: ObjectStore, beyond: Range) -> None:
    await store.put_if_absent("o", bytes(100))
    with pytest.raises(CorruptData) as caught:
        await store.get_ranges("o", [(0, 10), beyond])
    assert caught.value.details["object"] == "o"


async def test_creating_an_object_twice_with_the_same_bytes_is_success_and_with_others_a_conflict(store: ObjectStore) -> None:
    etag = await store.put_if_absent("o", b"mine")
    assert await store.put_if_absent("o", b"mine") == etag
    for other in (b"else", b"longer than mine"):
        with pytest.raises(Conflict) as caught:
            await store.put_if_absent("o", other)
        assert caught.value.code == "already-exists"
    assert bytes((await store.get("o")).data) == b"mine"


async def test_replacing_needs_the_etag_of_what_is_there(store: ObjectStore) -> None:
    first = await store.put_if_absent("CURRENT", b"1")
    second = await store.replace_if_unchanged("CURRENT", b"2", first)
    assert second != first
    with pytest.raises(Conflict) as caught:
        await store.replace_if_unchanged("CURRENT", b"3", first)
    assert caught.value.code == "commit-conflict"
    assert await store.replace_if_unchanged("CURRENT", b"2", first) == second  # a repeated call
    with pytest.raises(NotFound):
        await store.replace_if_unchanged("OTHER", b"3", first)
    assert bytes((await store.get("CURRENT")).data) == b"2"


async def test_the_etag_changes_with_every_change_of_the_content_even_of_the_same_size(store: ObjectStore) -> None:
    etags = [await store.put_if_absent("CURRENT", b"%03d" % 0)]
    for number in range(1, 20):
        etags.append(await store.replace_if_unchanged("CURRENT", b"%03d" % number, etags[-1]))
    assert len(set(etags)) == 20


async def test_of_racing_creators_exactly_one_wins(store: ObjectStore) -> None:
    bodies = [bytes([number]) * 50_000 for number in range(8)]
    answers = await asyncio.gather(*(store.put_if_absent("o", body) for body in bodies), return_exceptions=True)
    won = [body for body, answer in zip(bodies, answers, strict=True) if isinstance(answer, str)]
    assert [bytes((await store.get("o")).data)] == won
    assert sum(isinstance(answer, Conflict) for answer in answers) == 7


async def test_no_increment_of_racing_writers_is_lost(store: ObjectStore) -> None:
    await store.put_if_absent("CURRENT", b"0 start")

    async def increment(writer: int) -> None:
        while True:
            seen = await store.get("CURRENT")
            number = int(bytes(seen.data).split()[0]) + 1
            try:
                await store.replace_if_unchanged("CURRENT", b"%d by %d" % (number, writer), seen.etag)
                return
            except Conflict:
                continue

    await asyncio.gather(*(increment(writer) for writer in range(8)))
    assert bytes((await store.get("CURRENT")).data).startswith(b"8 ")


async def test_listing_is_in_name_order_begins_after_a_name_and_takes_any_prefix(store: ObjectStore) -> None:
    names = ["a-b/z", "a/b.c", "a/b/c", "a/bc", "a/c", "a0", "b/x"]
    for name in reversed(names):
        await store.put_if_absent(name, name.encode())
    assert await names_of(store, "") == names
    assert await names_of(store, "a/") == ["a/b.c", "a/b/c", "a/bc", "a/c"]
    assert await names_of(store, "a/b") == ["a/b.c", "a/b/c", "a/bc"]
    assert await names_of(store, "a/", after="a/b/c") == ["a/bc", "a/c"]
    assert await names_of(store, "", after="a/b") == ["a/b.c", "a/b/c", "a/bc", "a/c", "a0", "b/x"]
    assert await names_of(store, "none/") == []


async def test_a_listing_tells_size_and_time(store: ObjectStore) -> None:
    await store.put_if_absent("a/b", b"12345")
    (line,) = [line async for line in store.list("a/")]
    assert line.size_bytes == 5
    assert abs(line.modified_s - time.time()) < 60


async def test_folders_are_those_that_hold_objects(store: ObjectStore) -> None:
    for name in ("i/CURRENT", "i/segments/1/data", "i/segments/2/data", "j/CURRENT"):
        await store.put_if_absent(name, b"x")
    assert await folders_of(store, "") == ["i", "j"]
    assert await folders_of(store, "i/") == ["segments"]
    assert await folders_of(store, "i/segments/") == ["1", "2"]
    await store.delete(["i/segments/2/data", "j/CURRENT"])
    assert await folders_of(store, "") == ["i"]
    assert await folders_of(store, "i/segments/") == ["1"]
    with pytest.raises(InvalidRequest):
        await folders_of(store, "i/segments")


async def test_deleted_objects_are_gone_and_absent_ones_no_error(store: ObjectStore) -> None:
    for name in ("a/x", "a/y", "a/z"):
        await store.put_if_absent(name, b"x")
        await store.get(name)
    await store.delete(["a/none", "a/x", "b/none", "a/z"])
    await store.delete([])
    assert await names_of(store, "") == ["a/y"]
    with pytest.raises(NotFound):
        await store.get("a/x")
    await store.put_if_absent("a/x", b"new")
    assert bytes((await store.get("a/x")).data) == b"new"


async def test_views_and_empty_objects_can_be_stored(store: ObjectStore) -> None:
    await store.put_if_absent("view", memoryview(b"0123456789")[2:5])
    await store.put_if_absent("empty", b"")
    assert bytes((await store.get("view")).data) == b"234"
    assert bytes((await store.get("empty")).data) == b""


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../up", "a/../b", "a//b", "a/", ".hidden", "a/.tartan", "a b", "a\\b", "ä", "a%2f", "a\n"]
)
async def test_a_name_that_could_mean_something_else_is_refused(store: ObjectStore, name: str) -> None:
    for attempt in (store.get(name), store.get_ranges(name, [(0, 1)]), store.put_if_absent(name, b"x"), store.delete([name])):
        with pytest.raises(InvalidRequest):
            await attempt


async def test_a_local_path_begins_with_the_object(store: ObjectStore) -> None:
    await store.put_if_absent("a/b", b"hello")
    await store.get("a/b")
    if isinstance(store, CachedStore):
        await store.settle()
    path = await store.local_path("a/b")
    if path is not None:
        assert (await asyncio.to_thread(Path(path).read_bytes))[:5] == b"hello"
    assert await store.local_path("a/none") is None


# --- what a bucket may do to us


async def test_a_throttled_or_failing_read_is_tried_again(s3: S3Server, s3_store: ObjectStore) -> None:
    await s3_store.put_if_absent("o", b"hello")
    for status, code in (
        ("503 Slow Down", "SlowDown"),
        ("500 Oops", "InternalError"),
        ("429 Busy", "TooMany"),
        ("400 Bad", "RequestTimeout"),
    ):
        with s3.fault("GET", "refuse", times=3, status=status, code=code) as fault:
            assert bytes((await s3_store.get("o")).data) == b"hello"
            assert fault.seen == 3


async def test_a_connection_that_is_cut_is_tried_again(s3: S3Server, s3_store: ObjectStore) -> None:
    body = os.urandom(300_000)
    await s3_store.put_if_absent("o", body)
    with s3.fault("GET", "hang-up"), s3.fault("GET", "truncate", times=2) as cut:
        assert bytes((await s3_store.get("o")).data) == body
        assert [bytes(part) for part in await s3_store.get_ranges("o", [(0, 200_000)])] == [body[:200_000]]
        assert cut.seen == 2


async def test_a_store_that_stays_down_is_unavailable_after_bounded_tries(s3: S3Server, s3_url: str) -> None:
    store = open_store(s3_url, s3_options(s3, attempts=3))
    with s3.fault("GET", "refuse", times=99) as fault:
        with pytest.raises(Unavailable) as caught:
            await store.get("o")
        assert fault.seen == 3
    assert (caught.value.code, caught.value.details["name"], caught.value.details["status"]) == ("store-unavailable", "o", 503)


async def test_no_try_begins_after_the_retry_budget(s3: S3Server, s3_url: str) -> None:
    store = open_store(s3_url, s3_options(s3, retry_budget_s=0.0, attempts=99))
    with s3.fault("GET", "refuse", times=99) as fault:
        with pytest.raises(Unavailable):
            await store.get("o")
        assert fault.seen == 1


@pytest.mark.parametrize("status", ["403 Forbidden", "401 Unauthorized"])
async def test_refused_credentials_are_told_apart_and_not_tried_again(s3: S3Server, s3_store: ObjectStore, status: str) -> None:
    for method in ("GET", "PUT"):
        with s3.fault(method, "refuse", times=99, status=status, code="AccessDenied") as fault:
            with pytest.raises(Unavailable) as caught:
                await (s3_store.get("o") if method == "GET" else s3_store.put_if_absent("o", b"x"))
            assert (caught.value.code, fault.seen) == ("store-denied", 1)


async def test_a_bucket_that_does_not_exist_is_not_an_absent_object(s3: S3Server) -> None:
    store = open_store("s3://no-such-bucket/x", s3_options(s3))
    with pytest.raises(Unavailable) as caught:
        await store.get("o")
    assert caught.value.code == "store-denied"


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    store = open_store("s3://bucket", StoreOptions(endpoint="http://127.0.0.1:9", access_key_id="k", secret_access_key="s", attempts=1))
    with pytest.raises(Unavailable) as caught:
        await store.get("o")
    assert caught.value.code == "store-unavailable"


async def test_a_server_that_never_answers_is_unavailable_in_time() -> None:
    async with SlowServer(first_byte_s=60).running() as server:
        store = open_store("s3://bucket", slow_options(server, timeout_s=0.1, attempts=2))
        with pytest.raises(Unavailable):
            await store.get_ranges("o", [(0, 10)])
        assert server.peak >= 1


@pytest.mark.parametrize("action", ["forget", "hang-up"])
async def test_a_write_whose_answer_was_lost_is_success(s3: S3Server, s3_store: ObjectStore, action: str) -> None:
    with s3.fault("PUT", action) as fault:  # type: ignore[arg-type]
        first = await s3_store.put_if_absent("CURRENT", b"1")
        assert fault.seen == 1
    with s3.fault("PUT", action) as fault:  # type: ignore[arg-type]
        second = await s3_store.replace_if_unchanged("CURRENT", b"2", first)
        assert fault.seen == 1
    found = await s3_store.get("CURRENT")
    assert (bytes(found.data), found.etag) == (b"2", second)


async def test_a_write_that_was_dropped_on_the_way_is_written_again(s3: S3Server, s3_store: ObjectStore) -> None:
    with s3.fault("PUT", "hang-up", effect=False, times=2) as fault:
        first = await s3_store.put_if_absent("CURRENT", b"1")
        assert fault.seen == 2
    with s3.fault("PUT", "refuse", times=2) as fault:
        await s3_store.replace_if_unchanged("CURRENT", b"2", first)
        assert fault.seen == 2
    assert bytes((await s3_store.get("CURRENT")).data) == b"2"


async def test_a_409_on_a_conditional_write_means_try_again(s3: S3Server, s3_store: ObjectStore) -> None:
    conflict = {"status": "409 Conflict", "code": "ConditionalRequestConflict", "times": 2}
    with s3.fault("PUT", "refuse", **conflict) as fault:
        first = await s3_store.put_if_absent("CURRENT", b"1")
        assert fault.seen == 2
    with s3.fault("PUT", "refuse", **conflict) as fault:
        await s3_store.replace_if_unchanged("CURRENT", b"2", first)
        assert fault.seen == 2
    assert bytes((await s3_store.get("CURRENT")).data) == b"2"


async def test_a_409_while_another_writer_wins_is_a_conflict(s3: S3Server, s3_store: ObjectStore) -> None:
    await s3_store.put_if_absent("o", b"other")
    with s3.fault("PUT", "refuse", status="409 Conflict", code="ConditionalRequestConflict"), pytest.raises(Conflict) as caught:
        await s3_store.put_if_absent("o", b"mine!")
    assert caught.value.code == "already-exists"


async def test_a_lost_answer_after_which_another_writer_committed_is_a_conflict(
    s3: S3Server, s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await s3_store.put_if_absent("CURRENT", b"1")
    read_back = s3_store._read_back  # type: ignore[attr-defined]

    async def read_back_late(name: str, data: Buffer) -> object:
        monkeypatch.undo()
        ours = await s3_store.get(name)
        await s3_store.replace_if_unchanged(name, b"other", ours.etag)
        return await read_back(name, data)

    monkeypatch.setattr(s3_store, "_read_back", read_back_late)
    with s3.fault("PUT", "forget"), pytest.raises(Conflict):
        await s3_store.replace_if_unchanged("CURRENT", b"mine", first)
    assert bytes((await s3_store.get("CURRENT")).data) == b"other"


async def test_a_write_of_unknown_outcome_says_so(s3: S3Server, s3_url: str) -> None:
    store = open_store(s3_url, s3_options(s3, attempts=2))
    with s3.fault("PUT", "hang-up"), s3.fault("GET", "refuse", times=99), pytest.raises(Unavailable) as caught:
        await store.put_if_absent("o", b"x")
    assert caught.value.details["outcome"] == "unknown"
    with s3.fault("PUT", "refuse", times=99), pytest.raises(Unavailable) as caught:
        await store.put_if_absent("p", b"x")
    assert caught.value.details["outcome"] == "not written"


async def test_reading_back_a_refused_write_of_another_size_fetches_no_body(s3: S3Server, s3_store: ObjectStore) -> None:
    await s3_store.put_if_absent("o", b"other")
    with s3.fault("GET", "truncate") as cut, pytest.raises(Conflict):
        await s3_store.put_if_absent("o", b"of another size")
    assert cut.seen == 1


async def test_a_listing_goes_on_where_it_failed(s3: S3Server, s3_store: ObjectStore) -> None:
    for name in ("a/1", "a/2", "a/3"):
        await s3_store.put_if_absent(name, b"x")
    with s3.fault("GET", "refuse", times=2):
        assert await names_of(s3_store, "a/") == ["a/1", "a/2", "a/3"]
    with s3.fault("GET", "refuse", times=2):
        assert await folders_of(s3_store, "") == ["a"]


async def test_an_object_larger_than_one_put_is_refused(monkeypatch: pytest.MonkeyPatch, memory_store: ObjectStore) -> None:
    monkeypatch.setattr(objects, "MAX_PUT_BYTES", 10)
    with pytest.raises(LimitExceeded):
        await memory_store.put_if_absent("o", bytes(11))


async def test_one_failing_range_fails_all_with_one_error(s3: S3Server, s3_store: ObjectStore) -> None:
    await s3_store.put_if_absent("o", bytes(1000))
    with pytest.raises(CorruptData):
        await s3_store.get_ranges("o", [(at, at + 1) for at in range(0, 2000, 100)])


# --- many ranges at once


def slow_options(server: SlowServer, **more: object) -> StoreOptions:
    settings: dict[str, object] = {"endpoint": server.url, "region": REGION, "access_key_id": "k", "secret_access_key": "s", **more}
    return StoreOptions(**settings)  # type: ignore[arg-type]


async def test_two_hundred_slow_ranges_travel_side_by_side() -> None:
    """25 ms each: 5 s one after another, 0.5 s ten at a time. The peak is exact; the time has room for a busy machine."""
    async with SlowServer(first_byte_s=0.025).running() as server:
        store = open_store("s3://bucket", slow_options(server))
        wanted = [(at * 20_000, at * 20_000 + 16_384) for at in range(200)]
        times_s = []
        for _ in range(4):
            begin = time.perf_counter()
            answers = await store.get_ranges("o", wanted)
            times_s.append(time.perf_counter() - begin)
        assert [len(data) for data in answers] == [16_384] * 200
        assert server.peak >= 150
        assert min(times_s) < 0.25


async def test_requests_in_flight_are_bounded() -> None:
    async with SlowServer(first_byte_s=0.005).running() as server:
        store = open_store("s3://bucket", slow_options(server, max_in_flight=7))
        await asyncio.gather(*(store.get_ranges(f"o{at}", [(0, 1), (5, 6)]) for at in range(20)))
        assert (server.served, server.peak) == (40, 7)


async def test_a_slow_store_serves_two_hundred_ranges_in_little_more_than_one_latency(memory_store: ObjectStore) -> None:
    store = DelayStore(memory_store, p50_s=0.025, p99_s=0.025, bytes_per_s=1e12)
    await store.put_if_absent("o", bytes(200))
    begin = time.perf_counter()
    await store.get_ranges("o", [(at, at + 1) for at in range(200)])
    assert 0.025 <= time.perf_counter() - begin < 1.0  # one after the other would take five seconds


# --- opening


@pytest.mark.parametrize("url", ["", "http://host/x", "s3://", "memory://x/y", "gs://bucket", "file://host/x"])
def test_an_unknown_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        open_store(url)


async def test_a_file_url_and_a_plain_path_are_the_same_store(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    await open_store(f"file://{str(folder).replace(' ', '%20')}").put_if_absent("o", b"x")
    assert bytes((await open_store(str(folder)).get("o")).data) == b"x"


def test_opening_creates_nothing(tmp_path: Path) -> None:
    open_store(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_secrets_are_not_shown() -> None:
    assert "hunter2" not in repr(StoreOptions(secret_access_key="hunter2", session_token="hunter2", access_key_id="hunter2"))


async def test_a_credential_provider_is_asked_for_the_keys(s3: S3Server, s3_url: str) -> None:
    asked = []

    def provide() -> dict[str, object]:
        asked.append(1)
        return {"access_key_id": "k", "secret_access_key": "s", "token": None, "expires_at": None}

    store = open_store(s3_url, StoreOptions(endpoint=s3.url, region=REGION, credential_provider=provide))
    await store.put_if_absent("o", b"x")
    assert asked


async def test_an_aws_profile_is_read_by_boto(s3: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("boto3")
    credentials = tmp_path / "credentials"
    credentials.write_text("[work]\naws_access_key_id = k\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    store = open_store(s3_url, StoreOptions(endpoint=s3.url, region=REGION, profile="work"))
    await store.put_if_absent("o", b"x")
    with pytest.raises(Unavailable) as caught:
        open_store(s3_url, StoreOptions(endpoint=s3.url, profile="none"))
    assert caught.value.code == "store-denied"


async def test_one_store_serves_several_event_loops() -> None:
    store = open_store("memory://", StoreOptions(max_in_flight=4))
    await store.put_if_absent("o", bytes(300))

    def in_another_loop() -> int:
        return len(asyncio.run(store.get_ranges("o", [(at, at + 1) for at in range(300)])))

    assert await asyncio.gather(*(asyncio.to_thread(in_another_loop) for _ in range(3))) == [300] * 3


# --- the probe


async def test_the_probe_accepts_every_store_of_the_house_and_leaves_nothing(store: ObjectStore) -> None:
    await probe_conditional_writes(store, "probe/")
    assert await names_of(store, "") == []


async def test_the_probe_refuses_a_bucket_that_ignores_conditions(s3: S3Server, s3_store: ObjectStore) -> None:
    with s3.fault("PUT", "unconditional", times=99), pytest.raises(Unavailable) as caught:
        await probe_conditional_writes(s3_store, "")
    assert caught.value.code == "store-unsuitable"
    assert await names_of(s3_store, "") == []


async def test_the_probe_refuses_a_bucket_that_replaces_regardless(memory_store: ObjectStore) -> None:
    class Regardless(AroundStore):
        async def replace_if_unchanged(self, name: str, data: bytes | memoryview, etag: str) -> str:
            return await super().replace_if_unchanged(name, data, (await self.inner.get(name)).etag)

    with pytest.raises(Unavailable, match="replaces an object that has changed"):
        await probe_conditional_writes(Regardless(memory_store), "")


async def test_the_probe_refuses_a_bucket_that_never_replaces(s3: S3Server, s3_url: str) -> None:
    store = open_store(s3_url, s3_options(s3, attempts=2))
    refusal = {"status": "412 Precondition Failed", "code": "PreconditionFailed"}

    class Refusing(AroundStore):
        async def replace_if_unchanged(self, name: str, data: bytes | memoryview, etag: str) -> str:
            with s3.fault("PUT", "refuse", times=99, **refusal):
                return await super().replace_if_unchanged(name, data, etag)

    with pytest.raises(Unavailable, match="does not replace an unchanged object"):
        await probe_conditional_writes(Refusing(store), "")


# --- directories


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


WRITER = """
import asyncio, sys
from engine.errors import Conflict
from engine.store.directory import DirectoryStore

async def main(root, writer):
    store = DirectoryStore(root, fsync=False)
    done = 0
    while done < 50:
        seen = await store.get("CURRENT")
        number = int(bytes(seen.data).split()[0]) + 1
        try:
            await store.replace_if_unchanged("CURRENT", b"%d by %s" % (number, writer.encode()), seen.etag)
            done += 1
            print(number, flush=True)
        except Conflict:
            pass

asyncio.run(main(*sys.argv[1:]))
"""


async def test_processes_that_race_for_a_file_lose_no_commit(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path))
    await store.put_if_absent("CURRENT", b"0 start")
    writers = [run_python(WRITER, str(tmp_path), name) for name in "abc"]
    numbers = [int(line) for writer in writers for line in (await asyncio.to_thread(writer.communicate))[0].splitlines()]
    assert sorted(numbers) == list(range(1, 151))
    assert bytes((await store.get("CURRENT")).data).startswith(b"150 ")


async def test_what_a_killed_process_had_committed_is_there_and_its_lock_is_not(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path))
    first = await store.put_if_absent("CURRENT", b"0 start")
    writer = run_python(WRITER.replace("done < 50", "True"), str(tmp_path), "killed")
    assert writer.stdout is not None
    await asyncio.to_thread(writer.stdout.readline)
    writer.send_signal(signal.SIGKILL)
    acknowledged = (await asyncio.to_thread(writer.communicate))[0].split()
    found = await store.get("CURRENT")
    assert int(bytes(found.data).split()[0]) >= int(acknowledged[-1] if acknowledged else 1)
    assert found.etag != first
    await asyncio.wait_for(store.replace_if_unchanged("CURRENT", b"next", found.etag), timeout=5)


async def test_a_reader_never_sees_part_of_a_file(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path), fsync=False)
    etag = await store.put_if_absent("CURRENT", b"\0" * 300_000)
    for number in range(1, 30):
        writing = asyncio.ensure_future(store.replace_if_unchanged("CURRENT", bytes([number]) * 300_000, etag))
        seen = await asyncio.gather(*(store.get("CURRENT") for _ in range(3)))
        etag = await writing
        assert all(len(set(found.data)) == 1 and found.data[0] in (number - 1, number) for found in seen)


async def test_a_staged_file_that_a_killed_writer_left_is_removed_after_a_day(tmp_path: Path) -> None:
    stage = tmp_path / ".tartan" / "stage"
    stage.mkdir(parents=True)
    for name, age_s in (("old", 25 * 3600), ("young", 60)):
        (stage / name).write_bytes(b"half")
        os.utime(stage / name, (time.time() - age_s,) * 2)
    store = DirectoryStore(str(tmp_path))
    await store.put_if_absent("o", b"x")
    assert [path.name for path in stage.iterdir()] == ["young"]
    assert await names_of(store, "") == ["o"]


async def test_an_acknowledged_file_was_flushed_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    real = os.fsync

    def noting_fsync(file: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{file}"))
        real(file)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    await DirectoryStore(str(tmp_path)).put_if_absent("i/segments/s/data", b"x")
    assert "/.tartan/stage/" in flushed[0]
    assert set(flushed[1:]) == {str(tmp_path / folder) for folder in ("", "i", "i/segments", "i/segments/s")}
    assert flushed[-1] == str(tmp_path / "i/segments/s")


async def test_a_folder_that_empties_while_it_is_written_to_loses_nothing(directory_store: ObjectStore) -> None:
    async def come_and_go(number: int) -> None:
        for _ in range(20):
            await directory_store.put_if_absent(f"a/b/{number}", b"x")
            await directory_store.delete([f"a/b/{number}"])

    await asyncio.gather(*(come_and_go(number) for number in range(6)), directory_store.put_if_absent("a/b/stays", b"x"))
    assert await names_of(directory_store, "") == ["a/b/stays"]


async def test_a_name_cannot_be_both_a_file_and_a_folder(directory_store: ObjectStore) -> None:
    await directory_store.put_if_absent("a", b"x")
    with pytest.raises(InvalidRequest):
        await directory_store.put_if_absent("a/b", b"x")
    with pytest.raises(NotFound):
        await directory_store.get("a/b")


async def test_a_full_file_system_is_unavailable_and_leaves_nothing(directory_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*ignored: object) -> int:
        raise OSError(28, "No space left on device")

    await directory_store.put_if_absent("first", b"x")
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(Unavailable) as caught:
            await directory_store.put_if_absent("o", b"x")
    assert caught.value.details["cause"] == "No space left on device"
    assert await names_of(directory_store, "") == ["first"]


# --- wrappers


async def test_counting_tells_requests_bytes_and_rounds_of_a_window(memory_store: ObjectStore) -> None:
    counting = CountingStore(memory_store)
    await counting.put_if_absent("o", bytes(100))
    with counting.window() as cost:
        await counting.get("o")
        await asyncio.gather(counting.get_ranges("o", [(0, 10), (20, 30), (5, 5)]), counting.get_ranges("o", [(50, 60)]))
        await counting.get_ranges("o", [(3, 3)])
        await counting.get_ranges("o", [(0, 1)])
    assert dict(cost.requests) == {"get": 1, "range": 4}
    assert (cost.n_requests, cost.bytes_read, cost.bytes_written, cost.rounds) == (5, 131, 0, 3)
    assert (counting.total.bytes_written, counting.total.rounds) == (100, 4)


async def test_a_window_counts_its_own_tasks_and_nobody_elses(memory_store: ObjectStore) -> None:
    counting = CountingStore(memory_store)
    await counting.put_if_absent("o", bytes(100))

    async def search(n_gets: int) -> tuple[int, int]:
        with counting.window() as cost:
            await asyncio.gather(*(counting.get("o") for _ in range(n_gets)))
            await counting.get("o")
        return cost.n_requests, cost.rounds

    assert list(await asyncio.gather(search(1), search(4))) == [(2, 2), (5, 2)]


async def test_windows_nest_and_failed_requests_count(memory_store: ObjectStore) -> None:
    counting = CountingStore(memory_store)
    with counting.window() as outer, counting.window() as inner, pytest.raises(NotFound):
        await counting.get("none")
    assert (outer.n_requests, inner.n_requests, inner.bytes_read) == (1, 1, 0)


async def test_delays_are_lognormal_through_the_given_quantiles_and_repeat_with_the_seed(memory_store: ObjectStore) -> None:
    first, second = (DelayStore(memory_store, p50_s=0.02, p99_s=0.1, seed=7) for _ in range(2))
    drawn = sorted(first.first_byte_s() for _ in range(4000))
    assert sorted(second.first_byte_s() for _ in range(4000)) == drawn
    assert drawn[2000] == pytest.approx(0.02, rel=0.05)
    assert drawn[3960] == pytest.approx(0.1, rel=0.25)


async def test_delay_counts_bytes_and_the_connections_there_are(memory_store: ObjectStore) -> None:
    store = DelayStore(memory_store, p50_s=0.001, p99_s=0.001, bytes_per_s=100_000, max_in_flight=2)
    await memory_store.put_if_absent("o", bytes(4000))
    begin = time.perf_counter()
    await store.get_ranges("o", [(0, 1000)] * 4)  # 11 ms each, two at a time
    assert time.perf_counter() - begin >= 0.022


@pytest.mark.parametrize(("fault", "is_written"), [("unavailable", False), ("throttled", False), ("lost", True)])
async def test_a_scheduled_fault_hits_its_call_and_no_other(memory_store: ObjectStore, fault: Fault, is_written: bool) -> None:
    store = FaultyStore(memory_store, {2: fault})
    await store.put_if_absent("a", b"x")
    with pytest.raises(Unavailable):
        await store.put_if_absent("b", b"x")
    await store.put_if_absent("c", b"x")
    assert await names_of(memory_store, "") == (["a", "b", "c"] if is_written else ["a", "c"])
    assert [call.name for call in store.calls] == ["a", "b", "c"]


@pytest.mark.parametrize(("fault", "is_written"), [("stop", False), ("stop-after", True)])
async def test_a_stopped_world_stays_stopped(memory_store: ObjectStore, fault: Fault, is_written: bool) -> None:
    def at_first_put(call: Call) -> Fault | None:
        return fault if call.kind == "put" else None

    store = FaultyStore(memory_store, at_first_put)
    with pytest.raises(WorldStopped):
        await store.put_if_absent("a", b"x")
    with pytest.raises(WorldStopped):
        await names_of(store, "")
    assert await names_of(memory_store, "") == (["a"] if is_written else [])


async def test_a_hanging_call_can_be_cancelled(memory_store: ObjectStore) -> None:
    store = FaultyStore(memory_store, {1: "hang"})
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(store.get("a"), timeout=0.01)


def test_errors_of_a_store_are_ours(memory_store: ObjectStore) -> None:
    with pytest.raises(EngineError):
        asyncio.run(memory_store.get("none"))
