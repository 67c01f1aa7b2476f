"""Background work beside a server: what it counts, and that one damaged index stops nothing that is done for the others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest

import handler.maintenance
from engine.config import MaintenanceParams
from engine.format.names import fresh_id
from handler.app import create_app
from handler.maintenance import Maintenance
from handler.runtime import Runtime
from handler.settings import Settings, child_environment

DIM = 4
FLAT = MaintenanceParams().max_flat_segments + 1
"""More flat segments than maintenance leaves alone."""


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Over a directory; nothing is logged, which must not matter to the metrics."""
    runtime = Runtime(Settings(log_level="off", search_threads=1, fsync=False, index_dir=str(tmp_path / "indices")))
    transport = httpx.ASGITransport(create_app(runtime=runtime))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        client.runtime = runtime  # type: ignore[attr-defined]
        yield client


async def fill(api: httpx.AsyncClient, name: str, n_adds: int) -> None:
    await api.post("/indices", json={"name": name})
    matrix = np.random.default_rng(0).standard_normal((2, DIM)).tolist()
    for _ in range(n_adds):
        assert (await api.post(f"/indices/{name}/update", json={"documents": [{"embeddings": matrix}]})).status_code == 202


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 4, len(data) // 2):
        data[at] ^= 0x55
    path.write_bytes(data)


async def sample(api: httpx.AsyncClient, name: str) -> float:
    lines = (await api.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))


async def test_one_damaged_index_takes_neither_the_server_nor_the_others_out(api: httpx.AsyncClient, tmp_path: Path) -> None:
    for name in ("bad", "good"):
        await fill(api, name, 1)
    damage(tmp_path / "indices/bad/CURRENT")
    health = await api.get("/health")
    assert (health.status_code, [index["name"] for index in health.json()["indices"]]) == (200, ["good"])
    assert (await api.get("/indices")).json() == ["bad", "good"]
    assert (await api.get("/indices/bad")).json()["code"] == "CORRUPT_DATA"
    assert await sample(api, 'tartan_errors_total{code="checksum-mismatch"}') == 1  # so that its alarm rings


async def test_a_damaged_index_is_counted_and_the_next_one_is_worked_on(api: httpx.AsyncClient, tmp_path: Path) -> None:
    for name, n_adds in (("bad", 1), ("late", FLAT), ("torn", FLAT)):
        await fill(api, name, n_adds)
    damage(tmp_path / "indices/bad/CURRENT")
    damage(next((tmp_path / "indices/torn/segments").glob("*/data")))
    maintenance = Maintenance(api.runtime, tmp_path)  # type: ignore[attr-defined]
    await maintenance._look_at_all()
    await maintenance._end_child()
    assert (await api.get("/indices/late/generations")).json()["generations"][0]["cause"].startswith("flatten")
    assert await sample(api, 'tartan_maintenance_runs_total{outcome="done"}') == 1
    assert await sample(api, 'tartan_maintenance_runs_total{outcome="failed"}') == 2
    assert await sample(api, 'tartan_maintenance_seconds_count{verb="compact"}') == 1
    assert await sample(api, 'tartan_errors_total{code="checksum-mismatch"}') == 2


async def test_what_a_deleted_index_left_is_collected_and_what_never_was_an_index_is_not(
    api: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer was about to commit when its index was deleted: nobody names its upload, and nobody but maintenance ever looks."""
    monkeypatch.setattr(handler.maintenance, "SWEEP_INTERVAL_S", 0.0)
    await fill(api, "gone", 1)
    await api.delete("/indices/gone")
    left = [tmp_path / f"indices/{folder}/segments/{fresh_id()}/data" for folder in ("gone", "photos")]
    for path in left:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
        os.utime(path, (1e9, 1e9))
    maintenance = Maintenance(api.runtime, tmp_path)  # type: ignore[attr-defined]
    await maintenance._look_at_all()
    await maintenance._end_child()
    assert [path.exists() for path in left] == [False, True]
    assert await sample(api, 'tartan_maintenance_runs_total{outcome="done"}') == 1
    await maintenance._look_at_all()  # nothing is left to do
    assert await sample(api, 'tartan_maintenance_runs_total{outcome="done"}') == 1


def test_a_child_whose_worker_was_killed_ends_without_a_word(tmp_path: Path) -> None:
    pipe, environment = subprocess.PIPE, child_environment(Settings(index_dir=str(tmp_path)))
    command = [sys.executable, "-m", "handler.maintenance"]
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, text=True)
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    with child.stderr:
        child.stdout.close()
        with child.stdin:
            child.stdin.write("compact nothing\n")
        assert child.stderr.read() == ""
    assert child.wait(60) == 0
