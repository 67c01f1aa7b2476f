"""Updates of an index and their undoing while it is searched: no search fails, every answer is of one state or the other.

The servers log only errors: nobody reads their output while they run, and a full pipe would stop them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from serving import serving

DIM, N_SEARCHERS = 16, 4
RNG = np.random.default_rng(3)
QUERY = RNG.standard_normal((4, DIM)).round(3)


class Load:
    """Searches from many threads until stopped. `answers` has the hits of each, in the order of arrival; `failures` what was no 200."""

    def __init__(self, url: str, path: str) -> None:
        self.url, self.path = url, path
        self.answers: list[tuple[int, ...]] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(N_SEARCHERS)]

    def _ask(self) -> None:
        body = {"queries": [{"embeddings": QUERY.tolist()}], "params": {"top_k": 3}}
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while not self._stop.is_set():
                try:
                    reply = client.post(self.path, json=body)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                if reply.status_code != 200:
                    self.failures.append(reply.text)
                else:
                    self.answers.append(tuple(reply.json()["results"][0]["document_ids"]))

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(30)

    def wait_for(self, n: int) -> None:
        """Until so many more searches have been answered."""
        wanted, deadline = len(self.answers) + n, time.monotonic() + 90
        while len(self.answers) < wanted and not self.failures:
            assert time.monotonic() < deadline
            time.sleep(0.002)


def add(client: httpx.Client, index: str, n: int, closeness: float) -> None:
    """Documents of which the last is the closest to the query."""
    rows = [RNG.standard_normal((4, DIM)) + closeness * (i + 1) * QUERY for i in range(n)]
    body = {"documents": [{"embeddings": row.round(3).tolist()} for row in rows], "metadata": [{"n": i} for i in range(n)]}
    assert client.post(f"/indices/{index}/update", json=body).status_code == 202


def hits(client: httpx.Client, name: str) -> tuple[int, ...]:
    body = {"queries": [{"embeddings": QUERY.tolist()}], "params": {"top_k": 3}}
    found: dict[str, Any] = client.post(f"/indices/{name}/search", json=body).json()
    return tuple(found["results"][0]["document_ids"])


def test_an_index_is_rolled_back_and_forth_under_load_without_a_failed_search(tmp_path: Path) -> None:
    with serving(index_dir=str(tmp_path), log_level="error") as server, httpx.Client(base_url=server.url, timeout=30) as client:
        client.post("/indices", json={"name": "a"})
        add(client, "a", 8, 0.2)
        good = client.get("/indices/a/generations").json()["generations"][0]["generation"]
        before = hits(client, "a")
        add(client, "a", 8, 2.0)
        bad = client.get("/indices/a/generations").json()["generations"][0]["generation"]
        after = hits(client, "a")
        assert before != after
        load = Load(server.url, "/indices/a/search")
        with load.running():
            for target, expected in ((good, before), (bad, after)) * 3:
                load.wait_for(20)
                assert client.post("/indices/a/rollback", json={"generation": target}).status_code == 200
                assert hits(client, "a") == expected  # at once, for everybody who asks after the answer
            load.wait_for(20)
    assert load.failures == []
    assert set(load.answers) == {before, after}


def test_an_alias_is_switched_between_two_builds_under_load_without_a_failed_search(tmp_path: Path) -> None:
    with serving(index_dir=str(tmp_path), log_level="error") as server, httpx.Client(base_url=server.url, timeout=30) as client:
        for name, closeness in (("blue", 0.2), ("green", -2.0)):
            client.post("/indices", json={"name": name})
            add(client, name, 12, closeness)
        blue, green = hits(client, "blue"), hits(client, "green")
        assert blue != green
        assert client.put("/aliases/live", json={"index": "blue"}).status_code in (200, 201)
        load = Load(server.url, "/indices/live/search")
        with load.running():
            for name, expected in (("green", green), ("blue", blue)) * 3:
                load.wait_for(20)
                assert client.put("/aliases/live", json={"index": name}).status_code == 200
                assert hits(client, "live") == expected
            client.put("/aliases/live", json={"index": "green"})
            assert client.delete("/indices/blue").json()["deleted"] is True  # the old build goes while searches run
            load.wait_for(20)
    assert load.failures == []
    assert set(load.answers) == {blue, green}
    assert load.answers[-1] == green
