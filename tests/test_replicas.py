"""Several servers over one bucket: read-only replicas, nginx in front, and what clients see while servers die, drain, are updated or exchanged.

The files under infra/ are the ones that run here (infra/local/replicas.py puts this machine's addresses into them). Tests with nginx are skipped
where it is not installed: apt-get install nginx-light.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import BUCKET, s3_options
from engine.store.objects import open_store
from handler.app import create_app
from handler.auth import mint_key
from handler.cli import app
from handler.lambda_http import LambdaHandler
from handler.routes.table import ENDPOINTS
from handler.runtime import Runtime
from handler.settings import Settings
from infra.local.replicas import Balancer, Replicas, nginx
from lambda_runtime import answer_of, make_event
from s3_server import S3Server
from serving import ROOT, Served, s3_environment, serving

DIM = 8
CHANGES = {
    "create_index", "delete_index", "update_config", "update", "update_with_encoding", "add_documents", "delete_documents", "update_metadata",
    "add_pin", "remove_pin", "rollback", "branch", "put_alias", "delete_alias", "begin_upload", "commit_upload",
}  # fmt: skip


def matrix(seed: int) -> list[list[float]]:
    return np.random.default_rng(seed).standard_normal((4, DIM)).round(3).tolist()


def adding(*seeds: int) -> dict[str, Any]:
    return {"documents": [{"embeddings": matrix(seed)} for seed in seeds], "metadata": [{"n": seed} for seed in seeds]}


def searching(seed: int, top_k: int = 1) -> dict[str, Any]:
    return {"queries": [{"embeddings": matrix(seed)}], "params": {"top_k": top_k}}


def in_process(store: Any, **settings: Any) -> httpx.AsyncClient:
    runtime = Runtime(Settings(**{"log_level": "off", "search_threads": 1, **settings}), store=store)
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(runtime=runtime)), base_url="http://server")  # type: ignore[arg-type]


# The read-only role


async def test_a_read_only_server_searches_and_answers_every_change_with_403() -> None:
    store = open_store("memory://")
    async with in_process(store) as writer, in_process(store, read_only=True) as replica:
        await writer.post("/indices", json={"name": "a"})
        assert (await writer.post("/indices/a/update", json=adding(0, 1, 2))).status_code == 202
        assert (await replica.post("/indices/a/search", json=searching(1))).json()["results"][0]["document_ids"] == [1]
        assert {endpoint.name for endpoint in ENDPOINTS if endpoint.is_change} == CHANGES
        for endpoint in ENDPOINTS:
            path = re.sub(r"{\w+}", "a", endpoint.path)
            if not endpoint.is_change:
                if endpoint.method == "GET" and endpoint.name not in ("get_alias", "swagger_ui_file"):
                    assert (await replica.get(path)).status_code == 200, path
                continue
            answer = await replica.request(endpoint.method, path, json={})
            assert (answer.status_code, answer.json()["code"]) == (403, "READ_ONLY"), endpoint.name
            assert set(answer.json()) == {"code", "message"}
        assert (await writer.get("/indices/a")).json()["num_documents"] == 3


async def test_a_key_is_asked_for_before_the_role() -> None:
    _, record = mint_key(["search"])
    async with in_process(open_store("memory://"), read_only=True, api_keys=json.dumps([json.loads(_encoded(record))])) as replica:
        assert (await replica.post("/indices", json={"name": "a"})).status_code == 401


def _encoded(record: Any) -> str:
    import msgspec

    return msgspec.json.encode(record).decode()


async def test_a_bucket_that_refuses_writes_makes_a_read_only_server_of_its_own(s3: S3Server, s3_url: str) -> None:
    async with in_process(open_store(s3_url, s3_options(s3))) as api:
        await api.post("/indices", json={"name": "a"})
        assert (await api.post("/indices/a/update", json=adding(0, 1))).status_code == 202
        denied = {"status": "403 Forbidden", "code": "AccessDenied", "times": 1000}
        with s3.fault("PUT", "refuse", **denied), s3.fault("POST", "refuse", **denied), s3.fault("DELETE", "refuse", **denied):
            changes = [
                ("POST", "/indices", {"name": "b"}),
                ("POST", "/indices/a/update", adding(2)),
                ("DELETE", "/indices/a/documents", {"condition": "n = ?", "parameters": [0]}),
                ("DELETE", "/indices/a", None),
                ("PUT", "/aliases/c", {"index": "a"}),
            ]
            for method, path, body in changes:
                answer = await api.request(method, path, json=body)
                assert (answer.status_code, answer.json()["code"]) == (403, "READ_ONLY"), answer.text
            assert (await api.post("/indices/a/search", json=searching(1))).json()["results"][0]["document_ids"] == [1]
        assert (await api.post("/indices/a/update", json=adding(2))).status_code == 202


async def test_wrong_credentials_are_no_read_only_role(s3: S3Server, s3_url: str) -> None:
    async with in_process(open_store(s3_url, s3_options(s3))) as api:
        with s3.fault("PUT", "refuse", status="403 Forbidden", code="InvalidAccessKeyId", times=1000):
            answer = await api.post("/indices", json={"name": "a"})
        assert (answer.status_code, answer.json()["code"]) == (503, "SERVICE_UNAVAILABLE")


async def test_a_file_system_that_is_read_only_gives_the_same_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*ignored: Any, **more: Any) -> int:
        raise OSError(30, "Read-only file system")

    async with in_process(open_store(str(tmp_path))) as api:
        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr(os, "makedirs", refuse)
        answer = await api.post("/indices", json={"name": "a"})
        monkeypatch.undo()
        assert (answer.status_code, answer.json()["code"]) == (403, "READ_ONLY"), answer.text


# TLS in the server, and `tartan smoke`


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tls.crt and tls.key for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=tartan", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "tls.key", "-out", "tls.crt"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed: apt-get install openssl")
    return folder


def smoke(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["smoke", *arguments, "--json"])
    return done.exit_code, json.loads(done.stdout)


def test_smoke_tries_a_server_with_tls_and_leaves_nothing_behind(tmp_path: Path, certificate: Path) -> None:
    tls = {"tls_cert": str(certificate / "tls.crt"), "tls_key": str(certificate / "tls.key")}
    with contextlib.ExitStack() as stack:
        context = ssl.create_default_context(cafile=tls["tls_cert"])
        server = stack.enter_context(_serving_tls(tmp_path, context, tls))
        url = server.url.replace("http:", "https:")
        code, report = smoke(url, "--ca", tls["tls_cert"])
        assert (code, report["is_good"]) == (0, True), report
        assert [step["name"] for step in report["steps"]][-2:] == ["delete", "drop"]
        assert json.load(urllib.request.urlopen(f"{url}/indices", context=context)) == []
        code, report = smoke(url)
        assert code == 1
        assert "certificate" in report["steps"][0]["said"]


@contextlib.contextmanager
def _serving_tls(folder: Path, context: ssl.SSLContext, tls: dict[str, str]) -> Iterator[Any]:
    server = Served({}, index_dir=str(folder), **tls)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"https://127.0.0.1:{server.settings.port}/readyz", context=context, timeout=10).close()
                break
            assert server.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield server
    finally:
        server.end()


def test_smoke_says_what_is_wrong_with_a_server(tmp_path: Path) -> None:
    with serving(index_dir=str(tmp_path), read_only=True) as server:
        code, report = smoke(server.url)
        assert code == 1
        assert report["steps"][-1]["name"] == "create"
        assert "READ_ONLY" in report["steps"][-1]["said"]
        code, report = smoke(server.url, "--read-only")
        assert (code, report["is_good"]) == (0, True)
    code, report = smoke(server.url)
    assert (code, report["release"]) == (1, None)


@pytest.mark.parametrize("setting", ["tls_cert", "tls_key"])
def test_half_a_certificate_starts_no_server(setting: str, tmp_path: Path) -> None:
    from handler.server import serve

    with pytest.raises(ValueError, match="TLS"):
        serve("127.0.0.1", 1, Settings(**{setting: str(tmp_path / "nothing")}))


# Replicas behind nginx


@pytest.fixture(scope="module")
def replicas(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    try:
        nginx()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    environment = {**s3_environment(s3), "TARTAN_LOG_LEVEL": "info"}
    with Replicas(tmp_path_factory.mktemp("replicas"), f"s3://{BUCKET}/{uuid4().hex}", environment) as running:
        with httpx.Client(base_url=running.url, timeout=30) as client:
            assert client.post("/indices", json={"name": "a"}).status_code == 200
            assert client.post("/indices/a/update", json=adding(*range(20))).status_code == 202
        yield running


def test_containers_and_the_function_serve_one_bucket_together(replicas: Replicas, s3: S3Server) -> None:
    """Lambda for spikes beside containers: what one acknowledged the other finds at once, and an index that only one has ever seen as well."""
    settings = Settings(log_level="off", metrics=False, compact=False, search_threads=1)
    runtime = Runtime(settings, store=open_store(replicas.store, s3_options(s3)))
    function = LambdaHandler(settings, runtime=runtime)

    def invoke(method: str, path: str, body: Any = None) -> Any:
        status, _, answer = answer_of(function(make_event("http_v2", method, path, json.dumps(body).encode()), None))
        assert status in (200, 202), answer
        return json.loads(answer)

    with contextlib.closing(function), httpx.Client(base_url=replicas.url, timeout=30) as client:
        invoke("POST", "/indices", {"name": "mixed"})
        for seed in range(0, 12, 2):
            invoke("POST", "/indices/mixed/update", adding(seed))
            assert client.post("/indices/mixed/update", json=adding(seed + 1)).status_code == 202
            for wanted in (seed, seed + 1):
                here = invoke("POST", "/indices/mixed/search", searching(wanted))["results"][0]
                there = client.post("/indices/mixed/search", json=searching(wanted)).json()["results"][0]
                assert here["document_ids"] == there["document_ids"] == [wanted]
                assert here["scores"] == pytest.approx(there["scores"], abs=1e-5)
        assert client.delete("/indices/mixed").status_code == 200


class Load:
    """Searches without a pause, and adds if `adds`, from several threads: with kept connections, and with a new one for each request."""

    def __init__(self, url: str, *, adds: bool = False) -> None:
        self.url, self.adds = url, adds
        self.failures: list[str] = []
        self.n_searches = self.n_added = 0
        self._is_over = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._run, args=(self._search, kept)) for kept in (True, True, False)]
        if self.adds:
            self._threads.append(threading.Thread(target=self._run, args=(self._add, True)))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, ask: Any, keeps: bool) -> None:
        limits = httpx.Limits(max_keepalive_connections=5 if keeps else 0)
        with httpx.Client(base_url=self.url, timeout=60, limits=limits) as client:
            seed = 0
            while not self._is_over.is_set():
                seed += 1
                try:
                    ask(client, seed % 20)
                except Exception as error:
                    self.failures.append(repr(error))
                time.sleep(0.01)

    def _search(self, client: httpx.Client, seed: int) -> None:
        answer = client.post("/indices/a/search", json=searching(seed))
        if answer.status_code != 200 or len(answer.json()["results"][0]["document_ids"]) != 1:
            self.failures.append(answer.text)
        with self._lock:
            self.n_searches += 1

    def _add(self, client: httpx.Client, seed: int) -> None:
        answer = client.post("/indices/a/update", json=adding(1000 + seed))
        if answer.status_code != 202:
            self.failures.append(answer.text)
        self.n_added += 1
        time.sleep(0.1)

    def goes_on(self, n: int) -> None:
        """Wait for so many more searches."""
        enough, deadline = self.n_searches + n, time.monotonic() + 60
        while self.n_searches < enough:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_nginx_spreads_searches_sends_writes_to_the_writer_and_keeps_request_ids(replicas: Replicas) -> None:
    with httpx.Client(base_url=replicas.url, timeout=30) as client:
        answers = [client.post("/indices/a/search", json=searching(3), headers={"x-request-id": f"id-{n}"}) for n in range(9)]
        assert {answer.status_code for answer in answers} == {200}
        assert [answer.headers["x-request-id"] for answer in answers] == [f"id-{n}" for n in range(9)]
        assert client.put("/aliases/other", json={"index": "a"}).status_code == 200
        assert client.delete("/aliases/other").status_code == 200
        assert client.get("/nginx-health").json() == {"status": "alive"}
        assert client.get("/health").json()["status"] == "healthy"
        assert client.get("/metrics").json()["code"] == "NO_SUCH_ROUTE"
        assert client.post("/internal/shard", json={}).json()["code"] == "NO_SUCH_ROUTE"
        assert client.post("/indices", content=b" " * (101 << 20)).json()["code"] == "PAYLOAD_TOO_LARGE"
        assert client.post("/indices/none/search", json=searching(3)).status_code == 404
    lines = [json.loads(line) for line in (replicas.folder / "access.log").read_text().splitlines()]
    by_request = {line["request_id"]: line for line in lines}
    assert len({by_request[f"id-{n}"]["upstream"] for n in range(9)}) == 3
    writer = f"127.0.0.1:{replicas.servers['a'].port}"
    assert {line["upstream"] for line in lines if line["method"] in ("PUT", "DELETE")} == {writer}
    logged = "".join(server.log.read_text() for server in replicas.servers.values())
    assert all(f'"request_id":"id-{n}"' in logged for n in range(9))
    refused = httpx.post(f"{replicas.servers['b'].url}/indices", json={"name": "b"})
    assert (refused.status_code, refused.json()["code"]) == (403, "READ_ONLY")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_search_fails_when_a_replica_is_killed_or_drained_under_load(how: signal.Signals, replicas: Replicas) -> None:
    with Load(replicas.url) as load:
        load.goes_on(30)
        assert replicas.servers["b"].end(how) == (0 if how == signal.SIGTERM else -signal.SIGKILL)
        load.goes_on(60)
        assert replicas.revive() == ["b"]
        replicas.servers["b"].wait_until_ready()
        load.goes_on(30)
    assert load.failures == []
    assert replicas.servers["b"].log.read_text().count('"event":"serving"') >= 2  # nothing of the killed one went on serving


@pytest.mark.slow
def test_no_request_fails_during_two_rolling_updates(replicas: Replicas) -> None:
    with httpx.Client(base_url=replicas.url, timeout=30) as client:
        n_before = client.get("/indices/a").json()["num_documents"]
        processes = {name: server.process for name, server in replicas.servers.items()}
        with Load(replicas.url, adds=True) as load:
            replicas.roll()
            assert [replicas.servers[name].is_read_only for name in "abc"] == [True, False, True]
            replicas.roll()
            load.goes_on(20)
        assert [replicas.servers[name].is_read_only for name in "abc"] == [False, True, True]
        assert all(replicas.servers[name].process is not process for name, process in processes.items())
        assert load.failures == []
        assert load.n_added > 20
        assert client.get("/indices/a").json()["num_documents"] == n_before + load.n_added


@pytest.mark.slow
def test_three_servers_that_score_a_share_each_find_what_one_finds(replicas: Replicas, tmp_path: Path) -> None:
    with httpx.Client(base_url=replicas.url, timeout=30) as client:
        assert client.post("/indices", json={"name": "shared"}).status_code == 200  # of its own: compaction makes one segment of more than 32
        for first in range(2000, 2060, 10):  # segments to share out
            assert client.post("/indices/shared/update", json=adding(*range(first, first + 10))).status_code == 202
        alone = [client.post("/indices/shared/search", json=searching(seed, 5)).json() for seed in range(2000, 2010)]
    with (
        Replicas(tmp_path, replicas.store, replicas.environment, sharded=True) as sharded,
        httpx.Client(base_url=sharded.url, timeout=30) as client,
    ):
        together = [client.post("/indices/shared/search", json=searching(seed, 5)).json() for seed in range(2000, 2010)]
        logged = "".join(server.log.read_text() for server in sharded.servers.values())
    assert "/internal/shard" in logged
    for one, other in zip(alone, together, strict=True):
        assert one["results"][0]["document_ids"] == other["results"][0]["document_ids"]
        assert np.allclose(one["results"][0]["scores"], other["results"][0]["scores"], atol=1e-4)


@pytest.mark.slow
def test_the_load_test_leaves_its_figures(replicas: Replicas, tmp_path: Path) -> None:
    if shutil.which("wrk") is None:
        pytest.skip("wrk is not installed: apt-get install wrk")
    result = tmp_path / "load-test.json"
    command = [sys.executable, ROOT / "infra/load/run.py", "--url", replicas.url, "--seconds", "1", "--documents", "20", "--result", result]
    ran = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(result.read_text())
    assert {"at", "url", "seconds", "requests", "failures", "p50_ms", "p95_ms", "p99_ms", "requests_per_s"} <= set(figures)
    assert figures["failures"] == 0
    assert figures["requests"] > 0


@pytest.mark.slow
def test_no_request_fails_when_a_green_set_takes_over_and_gives_back(replicas: Replicas) -> None:
    url = replicas.start_green()
    code, report = smoke(url)
    assert code == 0, report
    with Load(replicas.url, adds=True) as load:
        load.goes_on(20)
        replicas.switch(green=True)
        load.goes_on(60)
        replicas.switch(green=False)
        load.goes_on(20)
    asked = replicas.balancer.green.log.read_text().count('"route":"/indices/{name}/search"')  # type: ignore[union-attr]
    replicas.end_green()
    assert asked > 30
    assert load.failures == []
    assert load.n_added > 0


def test_tls_and_basic_auth_in_front_and_keys_behind(replicas: Replicas, certificate: Path, tmp_path: Path, s3: S3Server) -> None:
    key, record = mint_key(["search"], note="alice")
    with serving(s3_environment(s3), index_dir=replicas.store, api_keys=f"[{_encoded(record)}]", read_only=True) as server:
        server.port = server.settings.port  # type: ignore[attr-defined]
        with contextlib.ExitStack() as stack:
            clients = {}
            for variant in ("nginx-tls.conf", "nginx-basic.conf"):
                folder = tmp_path / variant
                folder.mkdir()
                for name in ("tls.crt", "tls.key"):
                    (folder / name).write_bytes((certificate / name).read_bytes())
                hashed = subprocess.run(["openssl", "passwd", "-apr1", "secret"], capture_output=True, text=True, check=True).stdout
                (folder / "users.htpasswd").write_text(f"alice:{hashed}bob:{hashed}")
                (folder / "keys.conf").write_text(f'alice "Bearer {key}";\n')
                balancer = Balancer(folder, dict.fromkeys("abc", server), replicas.flags, variant=variant)  # type: ignore[misc]
                balancer.start()
                stack.callback(balancer.stop)
                context = ssl.create_default_context(cafile=str(certificate / "tls.crt"))
                clients[variant] = stack.enter_context(httpx.Client(base_url=balancer.url, verify=context, timeout=30))
            tls, basic = clients["nginx-tls.conf"], clients["nginx-basic.conf"]
            path, body = "/indices/a/search", searching(3)
            assert tls.get("/health").status_code == 200
            assert tls.post(path, json=body).status_code == 401
            assert tls.post(path, json=body, headers={"authorization": f"Bearer {key}"}).status_code == 200
            assert tls.post(path, json=body, headers={"x-api-key": key}).status_code == 200
            assert tls.post("/indices/a/update", json=adding(1), headers={"x-api-key": key}).json()["code"] == "FORBIDDEN"
            answer = basic.post(path, json=body)
            assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHORIZED")
            assert "Basic" in answer.headers["www-authenticate"]
            assert basic.post(path, json=body, auth=("alice", "wrong")).status_code == 401
            assert basic.post(path, json=body, auth=("alice", "secret")).status_code == 200
            assert basic.post(path, json=body, auth=("bob", "secret")).status_code == 401  # no key stands behind the name
            assert basic.get("/health").status_code == 200


def test_every_variant_of_the_configuration_is_one_that_nginx_takes(replicas: Replicas, certificate: Path, tmp_path: Path) -> None:
    for variant in ("nginx.conf", "nginx-tls.conf", "nginx-basic.conf"):
        balancer = Balancer(tmp_path, replicas.servers, replicas.flags, variant=variant)
        balancer.configure()
        for name in ("tls.crt", "tls.key"):
            (tmp_path / name).write_bytes((certificate / name).read_bytes())
        (tmp_path / "users.htpasswd").touch()
        (tmp_path / "keys.conf").touch()
        checked = subprocess.run([nginx(), "-t", *balancer.arguments()], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        assert "warn" not in checked.stderr, checked.stderr
