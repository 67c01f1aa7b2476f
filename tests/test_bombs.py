"""Bombs (fuzz/bombs.py): each is answered as it should be, in bounded time and memory, and the worker lives on."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.format import names
from engine.store.objects import StoreOptions, open_store
from fuzz.bombs import BOMBS, HEAVY, MAX_UPLOAD_BYTES, Bomb
from fuzz.service import DIM, UPLOAD, Service, check_answer, filled_store
from handler.problems import STATUSES
from serving import Served, serving

MAX_CPU_S = 5.0
MAX_GROWTH_BYTES = 128 << 20
MAX_GROWTH_FACTOR = 24
"""A list of Python numbers is sixteen times its JSON."""
pytestmark = pytest.mark.filterwarnings("error")


def peak_bytes(pid: int | str = "self", field: str = "VmHWM") -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(field))) * 1024


def forget_peak() -> bool:
    """Let the peak count from now on; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    made = Service(max_upload_bytes=MAX_UPLOAD_BYTES)
    made.ask("GET", "/livez")
    yield made
    made.close()


async def put_upload(service: Service, data: bytes) -> None:
    assert service.runtime is not None
    for part in ("data", "claim", "receipt"):
        await service.runtime.store.delete([names.upload("papers", UPLOAD, part)])
    await service.runtime.store.put_if_absent(names.upload("papers", UPLOAD, "data"), data)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else []) for name in BOMBS])
def test_a_bomb_is_answered_in_bounded_time_and_memory(service: Service, name: str) -> None:
    bomb = BOMBS[name]
    body, headers = bomb.body(), [(key.encode(), value.encode()) for key, value in bomb.headers.items()]
    if bomb.upload is not None:
        service.run(put_upload(service, bomb.upload()))
    can_measure = forget_peak()
    before, began_s = peak_bytes(field="VmRSS"), time.process_time()
    answer = service.ask(bomb.method, urllib.parse.unquote(bomb.path), body, headers)
    took_s, grown = time.process_time() - began_s, peak_bytes() - before
    check_answer(answer)
    assert (answer.status, "" if answer.status < 300 else answer.json()["code"]) == (bomb.status, bomb.code), answer.body[:300]
    assert took_s < MAX_CPU_S
    assert not can_measure or grown < MAX_GROWTH_BYTES + MAX_GROWTH_FACTOR * len(body)
    assert len(answer.body) < 4096 + len(bomb.path) or answer.status == 200, "a refusal does not repeat what it refuses"


def test_a_search_after_all_bombs_finds_what_it_should(service: Service) -> None:
    answer = service.ask(
        "POST", "/indices/papers/search", json.dumps({"text_query": ["word7"]}).encode(), [(b"content-type", b"application/json")]
    )
    assert [row["title"] for row in answer.json()["results"][0]["metadata"]] == ["word7 loom"]


@pytest.mark.parametrize("length", ["\u00b2", "9" * 5000, "-1", "1_0", " "])
def test_a_content_length_that_is_no_number_is_not_counted_upon(service: Service, length: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", length.encode("latin-1"))]
    answer = service.ask("POST", "/indices/papers/search", b'{"text_query": ["word7"]}', headers)
    assert answer.status in (200, 413)
    check_answer(answer)


# A server of its own


def worker_pids(server: Served) -> list[int]:
    """The processes that answer: children of the server's own."""
    return sorted(int(pid) for pid in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split())


def send(server: Served, bomb: Bomb) -> tuple[int, bytes]:
    """A request as it stands: no library looks at the path or the body. A server may answer before it has read all, and hang up."""
    connection = http.client.HTTPConnection("127.0.0.1", server.settings.port, timeout=120)
    try:
        try:
            connection.request(bomb.method, bomb.path, bomb.body(), bomb.headers)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The filled store in a directory."""
    root = tmp_path_factory.mktemp("bombs")

    async def copy() -> None:
        memory, directory = await filled_store(), open_store(str(root), StoreOptions(fsync=False))
        async for listed in memory.list(""):
            await directory.put_if_absent(listed.name, (await memory.get(listed.name)).data)

    asyncio.run(copy())
    return root


def bombarded(folder: Path, chosen: dict[str, Bomb], max_growth_bytes: int) -> None:
    settings: dict[str, Any] = {"index_dir": str(folder), "model": "hashing", "max_upload_bytes": MAX_UPLOAD_BYTES, "log_level": "error"}
    with serving(**settings) as server:
        send(server, Bomb(200, "", "/indices/papers/search", lambda: b'{"text_query": ["word7"]}'))
        workers = worker_pids(server)
        before = {pid: peak_bytes(pid) for pid in workers}
        for name, bomb in chosen.items():
            status, body = send(server, bomb)
            assert status == bomb.status, (name, status, body[:300])
            if status >= 400:
                found = json.loads(body)
                assert STATUSES[found["code"]] == status, name
                assert found["code"] == bomb.code, name
        assert worker_pids(server) == workers, "no worker was replaced"
        for pid in workers:
            os.kill(pid, 0)
            assert peak_bytes(pid) - before[pid] < max_growth_bytes
        status, body = send(server, Bomb(200, "", "/indices/papers/search", lambda: b'{"text_query": ["word7"]}'))
        assert status == 200
        assert json.loads(body)["results"][0]["metadata"][0]["title"] == "word7 loom"
    assert "Traceback" not in server.log


def _for_servers(*, heavy: bool) -> dict[str, Bomb]:
    return {name: bomb for name, bomb in BOMBS.items() if bomb.upload is None and (heavy or name not in HEAVY)}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc (Linux)")
def test_a_worker_lives_through_the_bombs(folder: Path) -> None:
    bombarded(folder, _for_servers(heavy=False), 400 << 20)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc (Linux)")
def test_a_worker_lives_through_the_heavy_bombs_too_three_times(folder: Path) -> None:
    for _ in range(3):
        bombarded(folder, _for_servers(heavy=True), 600 << 20)


def test_every_bomb_is_for_a_dimension_that_is_there() -> None:
    assert DIM == 4
    assert set(HEAVY) <= set(BOMBS)
