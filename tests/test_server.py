"""The server as a process: draining, workers, background compaction, two of them on one directory, and its description held against it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from engine.config import MaintenanceParams
from engine.store.objects import open_store
from handler.app import create_app
from handler.maintenance import Maintenance, maintain
from handler.runtime import Runtime
from handler.server import serve
from handler.settings import Settings
from s3_server import S3Server
from serving import all_serving, s3_environment, serving

DIM = 8


def unpooled(url: str) -> httpx.Client:
    """A client that connects anew for each request, so that any worker may answer it."""
    return httpx.Client(base_url=url, timeout=30, limits=httpx.Limits(max_keepalive_connections=0))


def matrices(n: int, seed: int = 0) -> list[list[list[float]]]:
    rows: list[list[list[float]]] = np.random.default_rng(seed).standard_normal((n, 4, DIM)).round(3).tolist()
    return rows


def add(client: httpx.Client, name: str, n: int, seed: int = 0) -> httpx.Response:
    body = {"documents": [{"embeddings": matrix} for matrix in matrices(n, seed)], "metadata": [{"n": i} for i in range(n)]}
    return client.post(f"/indices/{name}/update", json=body)


def test_sigterm_turns_health_first_finishes_what_is_in_flight_and_exits_with_zero(tmp_path: Path) -> None:
    with serving(index_dir=str(tmp_path), drain_s=0.6) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        assert client.get("/health").status_code == 200
        arrived = threading.Event()
        late: list[int] = []

        def body() -> Any:
            yield b'{"name": '
            arrived.set()
            time.sleep(1.2)  # still sending when the server has stopped listening
            yield b'"late"}'

        def create() -> None:
            late.append(
                httpx.post(f"{server.url}/indices", content=body(), headers={"content-type": "application/json"}, timeout=30).status_code
            )

        thread = threading.Thread(target=create)
        thread.start()
        assert arrived.wait(10)
        os.kill(server.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + 5
        while (status := client.get("/health").status_code) == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert status == 503
        assert client.get("/indices").status_code == 200
        thread.join(20)
        assert late == [200]
        assert server.process.wait(20) == 0
    assert (tmp_path / "late" / "CURRENT").exists()


def test_a_sigterm_to_the_whole_group_drains_like_one_to_the_server_and_is_quiet(tmp_path: Path) -> None:
    """Service managers and terminals signal every process of the group; the workers must not take it for themselves."""
    with serving(index_dir=str(tmp_path), drain_s=0.8, workers=2) as server, unpooled(server.url) as client:
        os.killpg(server.process.pid, signal.SIGTERM)
        time.sleep(0.2)
        assert client.get("/health").status_code == 503
        assert client.get("/indices").status_code == 200
        assert server.process.wait(20) == 0
    assert [line for line in server.log.splitlines() if not line.startswith("{")] == []


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_two_servers_on_one_store_see_each_others_acknowledged_writes(kind: str, tmp_path: Path, s3: S3Server, s3_url: str) -> None:
    """The second server has two workers, so that its answers come from three processes in all."""
    where, environment = (str(tmp_path), {}) if kind == "directory" else (s3_url, s3_environment(s3))
    with contextlib.ExitStack() as stack:
        own = {"index_dir": where}
        servers = stack.enter_context(all_serving(own, {**own, "workers": 2}, environment=environment))
        first, second = (stack.enter_context(unpooled(server.url)) for server in servers)
        assert second.post("/indices", json={"name": "a"}).status_code == 200
        expected = 0
        for step in range(6):
            writer, reader = (first, second) if step % 2 else (second, first)
            assert add(writer, "a", 3, seed=step).status_code == 202
            expected += 3
            for _ in range(3):
                assert reader.get("/indices/a").json()["num_documents"] == expected
            gone = writer.request("DELETE", "/indices/a/documents", json={"condition": "_subset_ = ?", "parameters": [step * 3]})
            assert "queued" in gone.json()
            expected -= 1
            assert reader.post("/indices/a/metadata/query", json={"condition": "1=1"}).json()["count"] == expected
            matrix = matrices(3, seed=step)[2]
            found = reader.post("/indices/a/search", json={"queries": [{"embeddings": matrix}], "params": {"top_k": 1}}).json()
            assert found["results"][0]["document_ids"] == [step * 3 + 2]
        text = second.get("/metrics").text
        assert 'tartan_requests_total{endpoint="get_index",status="200"} 9.0' in text  # both workers' counts, whoever answers
        assert first.delete("/indices/a").json()["deleted"] is True
        assert second.get("/indices/a").status_code == 404


def test_the_server_compacts_in_the_background_and_hits_stay_the_same(tmp_path: Path) -> None:
    """Long before anybody looks by himself: whichever worker commits says that there is a backlog."""
    served = serving(index_dir=str(tmp_path), compact=True, maintenance_interval_s=300.0, workers=2)
    with served as server, unpooled(server.url) as client:
        client.post("/indices", json={"name": "a"})
        for seed in range(34):  # more flat segments than are left alone
            assert add(client, "a", 2, seed=seed).status_code == 202
        query = {"queries": [{"embeddings": np.random.default_rng(5).standard_normal((4, DIM)).tolist()}], "params": {"top_k": 5}}
        before = client.post("/indices/a/search", json=query).json()["results"][0]
        deadline = time.monotonic() + 25
        while time.monotonic() < deadline:
            causes = [line["cause"] for line in client.get("/indices/a/generations").json()["generations"]]
            if not causes[0].startswith("add"):
                break
            time.sleep(0.2)
        assert not causes[0].startswith("add"), causes[:3]
        after = client.post("/indices/a/search", json=query).json()["results"][0]
        assert after["document_ids"] == before["document_ids"]
        assert np.allclose(after["scores"], before["scores"], atol=1e-3)
        while 'tartan_maintenance_runs_total{outcome="done"}' not in client.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    lines = [json.loads(line) for line in server.log.splitlines() if '"maintained"' in line]
    assert lines[0]["verb"] == "compact"


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OSError, match="in use"):
            serve("127.0.0.1", other.getsockname()[1], Settings())


async def test_one_worker_of_a_host_maintains(tmp_path: Path) -> None:
    runtime = Runtime(Settings(log_level="off"), store=open_store("memory://"))
    first, second = (Maintenance(runtime, tmp_path) for _ in range(2))
    assert first._holds_lock()
    assert not second._holds_lock()
    assert first._holds_lock()


async def test_looking_at_all_indices_finds_the_one_with_a_backlog(tmp_path: Path) -> None:
    runtime = Runtime(Settings(log_level="off", search_threads=1, index_dir=str(tmp_path / "indices")))
    maintenance = Maintenance(runtime, tmp_path)
    transport = httpx.ASGITransport(create_app(runtime=runtime))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as api:
        for name, n_adds in (("calm", 1), ("busy", 12)):
            await api.post("/indices", json={"name": name})
            for seed in range(n_adds):
                documents = [{"embeddings": matrix} for matrix in matrices(2, seed)]
                await api.post(f"/indices/{name}/update", json={"documents": documents})
        await maintenance._look_at_all()
        await maintenance._end_child()
        causes = {name: (await api.get(f"/indices/{name}/generations")).json()["generations"][0]["cause"] for name in ("calm", "busy")}
        assert causes["calm"].startswith("add")
        assert not causes["busy"].startswith("add")
        assert (await api.get("/indices/busy")).json()["num_documents"] == 24


async def test_maintenance_folds_and_sweeps(tmp_path: Path) -> None:
    runtime = Runtime(Settings(log_level="off", search_threads=1), store=open_store("memory://"))
    runtime.maintenance = MaintenanceParams(min_quantise_documents=16, max_flat_tokens=16)
    transport = httpx.ASGITransport(create_app(runtime=runtime))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as api:
        await api.post("/indices", json={"name": "a"})
        matrices = np.random.default_rng(0).standard_normal((64, 8, DIM)).tolist()
        await api.post("/indices/a/update", json={"documents": [{"embeddings": matrix} for matrix in matrices]})
        await maintain(runtime, "a", "sweep")
        info = (await api.get("/indices/a")).json()
        assert (info["num_documents"], info["num_embeddings"]) == (64, 512)
        assert info["num_partitions"] > 0
        found = await api.post("/indices/a/search", json={"queries": [{"embeddings": matrices[9]}], "params": {"top_k": 1}})
        assert found.json()["results"][0]["document_ids"] == [9]
        await api.post("/indices/a/update", json={"documents": [{"embeddings": matrices[0][:3]}, {"embeddings": matrices[1]}]})
        for gone, n_tokens in ((3, 512 + 3), (64, 512), (65, 504)):  # of a quantised segment, of a flat one
            await api.request("DELETE", "/indices/a/documents", json={"condition": "_subset_ = ?", "parameters": [gone]})
            info = (await api.get("/indices/a")).json()
            assert (info["num_embeddings"], info["avg_doclen"]) == (n_tokens, n_tokens / info["num_documents"])
        recall = (await api.post("/indices/a/recall", json={"n_queries": 8, "top_k": 5})).json()
        assert recall["recall"] > 0.9
        lines = (await api.get("/indices/a/export")).text.splitlines()
        assert sorted(json.loads(line)["document_id"] for line in lines) == [n for n in range(64) if n != 3]
    await maintain(runtime, "gone", "compact")


class _Quiet:
    """The application for schemathesis: an index that holds documents, in memory, with the built-in encoder."""

    def __init__(self) -> None:
        runtime = Runtime(Settings(log_level="off", search_threads=1, model="hashing", timeout_s=20), store=open_store("memory://"))
        self.app = create_app(runtime=runtime)
        asyncio.run(self._fill())

    async def _fill(self) -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://server") as api:  # type: ignore[arg-type]
            await api.post("/indices", json={"name": "papers"})
            body = {"documents": ["warp", "weft", "loom"], "metadata": [{"title": "t", "year": year} for year in (2019, 2021, 2023)]}
            assert (await api.post("/indices/papers/update_with_encoding", json=body)).status_code == 202


CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


BOUNDED = settings(
    max_examples=3,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


def _hold(operation: Any, mode: Any) -> None:
    """Send generated requests of one operation, sound or broken ones; sound ones mostly go to an index that is there."""
    known_name = mode is POSITIVE and operation.label != "DELETE /indices/{name}"

    def one(case: Any) -> None:
        if known_name and "name" in case.path_parameters:
            case.path_parameters["name"] = "papers"
        case.call_and_validate(checks=CHECKS)

    try:
        BOUNDED(given(case=operation.as_strategy(generation_mode=mode))(one))()
    except Unsatisfiable:
        assert mode is NEGATIVE  # nothing in this operation can be sent wrongly


def test_the_description_holds_against_generated_requests() -> None:
    """Whatever a client sends: no failure of ours, and no status, type or body that the description does not list."""
    schema = schemathesis.openapi.from_asgi("/api-docs/openapi.json", _Quiet().app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 35
    for operation in operations:
        if operation.path != "/swagger-ui/{file}":
            for mode in (POSITIVE, NEGATIVE):
                _hold(operation, mode)
