"""Real processes over real stores: killed at random and audited; and stores that fail in the middle: what a client sees, and what is there afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest

from crash.actors import SENTINEL, Client, ask, vectors_of
from crash.arena import CASTS, Arena
from crash.audit import Row, audit, compare
from crash.journal import REFUSED, Call, Told

SENTINEL_SEARCH = {"queries": [{"embeddings": vectors_of(SENTINEL).tolist()}], "params": {"top_k": 1}}


async def test_some_seconds_of_random_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    arena = Arena(tmp_path / "arena", "directory", CASTS["small"])
    try:
        report = await arena.run(5.0, kill_every_s=(0.2, 0.8), audit_every_s=2.0)
    finally:
        arena.close()
    assert report.wrong == []
    assert sum(report.kills.values()) >= 4
    assert report.outcomes["add: done"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["directory", "s3"])
async def test_half_a_minute_of_random_kills_of_everything_loses_nothing(kind: str, tmp_path: Path) -> None:
    arena = Arena(tmp_path / "arena", kind, CASTS["full"], seed=2)
    try:
        report = await arena.run(30.0, kill_every_s=(0.3, 2.0))
    finally:
        arena.close()
    assert report.wrong == []
    assert report.outcomes["build: done"] > 0


def _call(kind: str, outcome: str = "done", ended_s: float = 1.0, **args: object) -> Call:
    return Call(kind, "a", 0.0, {"labels": ["x", "y"], **args}, outcome, ended_s, [1, 2] if kind == "add" else None)


X, Y = Row(1, 0), Row(2, 0)
LIES = {
    "lost": ([_call("add")], {}),
    "half there": ([_call("add", "unknown", float("inf"))], {"x": X}),
    "refused and there": ([_call("add", REFUSED)], {"x": X, "y": Y}),
    "deleted and there": ([_call("add"), _call("delete")], {"x": X, "y": Y}),
    "half deleted": ([_call("add"), _call("delete", "unknown", float("inf"))], {"y": Y}),
    "another id": ([_call("add")], {"x": X, "y": Row(3, 0)}),
    "an update lost": ([_call("add"), _call("update", revision=7)], {"x": X, "y": Y}),
    "half an update": ([_call("add"), _call("update", "unknown", float("inf"), revision=7)], {"x": Row(1, 7), "y": Y}),
    "from nowhere": ([], {"z": X}),
}


@pytest.mark.parametrize("lie", LIES)
def test_the_auditor_sees_what_is_wrong(lie: str) -> None:
    calls, rows = LIES[lie]
    assert len(compare("a", rows, Told(calls), opened_s=2.0)) == 1


def test_the_auditor_has_nothing_to_say_about_what_may_be() -> None:
    unknown = {"outcome": "unknown", "ended_s": float("inf")}
    both = {"x": X, "y": Y}
    for calls, rows in (
        ([_call("add")], both),
        ([_call("add", **unknown)], both),  # type: ignore[arg-type]
        ([_call("add", **unknown)], {}),  # type: ignore[arg-type]
        ([_call("add"), _call("delete")], {}),
        ([_call("add"), _call("delete", **unknown)], both),  # type: ignore[arg-type]
        ([_call("add"), _call("update", revision=7)], {"x": Row(1, 7), "y": Row(2, 7)}),
        ([_call("add", ended_s=3.0)], {}),
    ):
        assert compare("a", rows, Told(calls), opened_s=2.0) == []


# Stores that fail


@contextlib.asynccontextmanager
async def under_way(kind: str, folder: Path) -> AsyncIterator[tuple[Arena, httpx.AsyncClient]]:
    """A server with a client and an asker at work on it; everything is audited at the end."""
    arena = Arena(folder / "arena", kind, {"server": 1})
    try:
        await arena.prepare()
        arena.start("server0")
        await arena.wait_for_servers()
        client = Client(msgspec.structs.replace(arena.config, name="client"))
        asking = ask(msgspec.structs.replace(arena.config, name="asker"))
        work = [asyncio.create_task(client.run()), asyncio.create_task(asking)]
        async with client.http, httpx.AsyncClient(base_url=arena.config.servers[0], timeout=60) as http:
            yield arena, http
            await asyncio.sleep(0.3)
            for task in work:
                assert not task.done()
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
        await asyncio.sleep(0.3)  # what is under way in the server ends
        assert await audit(arena.config.open(), arena.journals, final=True) == []
    finally:
        arena.close()


async def _add(http: httpx.AsyncClient) -> httpx.Response:
    body = {"documents": [{"embeddings": vectors_of("probe").tolist()}]}
    return await http.post("/indices/probe/update", json=body)


async def _check(http: httpx.AsyncClient, *, reads: bool, writes: bool) -> None:
    """Who can be served is; who cannot gets an error that says why; nobody gets an empty answer; the server lives."""
    found = await http.post("/indices/a/search", json=SENTINEL_SEARCH)
    if reads:
        assert found.json()["results"][0]["document_ids"] == [0]
    else:
        assert found.status_code == 503, found.text
        assert found.json()["code"] == "SERVICE_UNAVAILABLE"
        assert int(found.headers["retry-after"]) >= 1
    added = await _add(http)
    if writes:
        assert added.status_code == 202, added.text
    else:
        assert (added.status_code, added.json()["code"]) in ((503, "SERVICE_UNAVAILABLE"), (403, "READ_ONLY")), added.text
        assert added.json()["message"]
    assert (await http.get("/livez")).status_code == 200


async def _recovers(http: httpx.AsyncClient) -> None:
    deadline_s = time.monotonic() + 30
    while (answer := await _add(http)).status_code != 202:
        assert time.monotonic() < deadline_s, answer.text
        await asyncio.sleep(0.1)
    await _check(http, reads=True, writes=True)


DISK_MOODS = {"full": True, "read-only": True, "forbidden": False}
"""Whether reading goes on."""
S3_MOODS = {"denied": False, "read-only": True, "expired": False, "gone": False, "failing": False}


async def test_a_full_read_only_or_forbidden_disk_is_an_error_that_passes(tmp_path: Path) -> None:
    async with under_way("directory", tmp_path) as (arena, http):
        await http.post("/indices", json={"name": "probe"})
        for mood, reads in DISK_MOODS.items():
            with arena.mood(mood):
                await _check(http, reads=reads, writes=False)
                await asyncio.sleep(0.2)
            await _recovers(http)


@pytest.mark.parametrize("moods", [("expired",), pytest.param(tuple(S3_MOODS), marks=pytest.mark.slow)], ids=["expired keys", "all"])
async def test_lost_rights_expired_keys_and_a_store_that_is_gone_are_errors_that_pass(moods: tuple[str, ...], tmp_path: Path) -> None:
    async with under_way("s3", tmp_path) as (arena, http):
        await http.post("/indices", json={"name": "probe"})
        for mood in moods:
            with arena.mood(mood):
                await _check(http, reads=S3_MOODS[mood], writes=False)
                await asyncio.sleep(0.3)
            await _recovers(http)


@pytest.mark.slow
async def test_a_slow_or_silent_s3_is_waited_for(tmp_path: Path) -> None:
    async with under_way("s3", tmp_path) as (arena, http):
        await http.post("/indices", json={"name": "probe"})
        with arena.mood("slow", delay_s=0.3):
            await _check(http, reads=True, writes=True)
        assert arena.s3 is not None
        os.kill(arena.s3.process.pid, signal.SIGSTOP)
        try:
            answer = asyncio.create_task(_add(http))
            await asyncio.sleep(3.0)
            assert not answer.done()
        finally:
            os.kill(arena.s3.process.pid, signal.SIGCONT)
        assert (await answer).status_code == 202
        await _recovers(http)


@pytest.mark.slow
async def test_an_s3_that_is_silent_for_longer_than_anybody_waits_is_an_error(tmp_path: Path) -> None:
    async with under_way("s3", tmp_path) as (arena, http):
        await http.post("/indices", json={"name": "probe"})
        assert arena.s3 is not None
        os.kill(arena.s3.process.pid, signal.SIGSTOP)
        try:
            began_s = time.monotonic()
            await _check(http, reads=False, writes=False)
            assert time.monotonic() - began_s < 120
        finally:
            os.kill(arena.s3.process.pid, signal.SIGCONT)
        await _recovers(http)
