"""Prometheus metrics: what is counted, that labels stay few, that workers add up, and that Lambda does not pay for any of it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engine.config import IndexConfig, SearchParams
from engine.errors import Conflict, CorruptData, Unavailable
from engine.index.commit import create, load_head
from engine.index.reader import Reader
from engine.store.objects import open_store
from engine.store.wrappers import AroundStore, Call, FaultyStore
from handler.host import look
from handler.index_facts import IndexFacts
from handler.metrics import MAX_INDICES, OTHER_INDEX, Metrics
from handler.observed import ObservedStore, store_usd
from handler.recall_sampler import RecallSampler
from handler.runtime import Runtime
from handler.settings import Settings
from serving import client_of

ROOT = Path(__file__).resolve().parent.parent
DIM = 8


@pytest.fixture
async def api() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of() as client:
        yield client


def documents(n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"embeddings": rng.standard_normal((5, DIM)).round(3).tolist()} for _ in range(n)]


async def fill(api: httpx.AsyncClient, name: str = "a", n: int = 6, **config: Any) -> None:
    assert (await api.post("/indices", json={"name": name, "config": {"nbits": 4, **config}})).status_code == 200
    answer = await api.post(f"/indices/{name}/update", json={"documents": documents(n), "metadata": [{"n": i} for i in range(n)]})
    assert answer.status_code == 202


async def search(api: httpx.AsyncClient, name: str = "a") -> None:
    assert (await api.post(f"/indices/{name}/search", json={"queries": documents(1, seed=9)})).status_code == 200


async def values(api: httpx.AsyncClient) -> dict[str, float]:
    """Every sample of /metrics by name and labels."""
    return samples((await api.get("/metrics")).text)


def samples(text: str) -> dict[str, float]:
    rows = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in rows}


def facts(generation: int = 1, **more: Any) -> IndexFacts:
    given = {"n_documents": 10, "n_tokens": 100, "size_bytes": 1000, "n_segments": 2, "n_tombstones": 1, "flat_tokens": 50}
    given |= {"created_s": 1e9 + generation, "flat_segments": 1, "document_limit": None, **more}
    return IndexFacts(generation=generation, **given)


# What is counted


async def test_a_search_and_a_write_leave_their_figures(api: httpx.AsyncClient) -> None:
    await fill(api)
    await search(api)
    seen = await values(api)
    assert seen['next_plaid_request_duration_seconds_count{endpoint="search"}'] == 1
    assert seen['tartan_request_seconds_count{endpoint="search",status="2xx"}'] == 1
    assert seen["tartan_search_rounds_count"] == seen["tartan_search_requests_count"] == seen["tartan_search_bytes_count"] == 1
    assert seen["tartan_search_requests_sum"] >= 1
    for stage in ("open", "search", "flat", "total"):
        assert seen[f'tartan_search_stage_seconds_count{{stage="{stage}"}}'] == 1
    assert seen['tartan_documents_added_total{index="a"}'] == 6
    assert seen["tartan_cost_usd_total"] > 0
    assert seen['tartan_store_seconds_count{method="replace"}'] == 1
    assert seen["tartan_store_written_bytes_total"] > 0
    assert seen["process_resident_memory_bytes"] > 1e6
    assert seen["process_cpu_seconds_total"] > 0
    assert seen["tartan_host_memory_limit_bytes"] >= seen["tartan_host_memory_used_bytes"] > 0
    assert seen["tartan_host_cores"] > 0


async def test_an_index_shows_its_size_freshness_and_backlog(api: httpx.AsyncClient) -> None:
    await fill(api, max_documents=100)
    seen = await values(api)
    manifest = (await load_head(api.runtime.store, "a")).manifest  # type: ignore[attr-defined]
    assert seen['tartan_index_updated_timestamp_seconds{index="a"}'] == pytest.approx(manifest.created_s, abs=1e-3)
    assert seen['tartan_index_generation{index="a"}'] == manifest.generation == 1
    assert seen['tartan_index_tokens{index="a"}'] == 30
    assert seen['tartan_index_flat_tokens{index="a"}'] == 0, "so small an index is not compacted"
    assert seen['tartan_index_segments{index="a"}'] == seen['tartan_index_flat_segments{index="a"}'] == 1
    assert seen['tartan_index_bytes{index="a"}'] > 30 * DIM * 2
    assert seen['tartan_index_document_limit{index="a"}'] == 100
    assert seen["tartan_backlog_limit_tokens"] == api.runtime.maintenance.max_flat_tokens  # type: ignore[attr-defined]
    await api.request("DELETE", "/indices/a/documents", json={"condition": "n < ?", "parameters": [2]})
    seen = await values(api)
    assert seen['next_plaid_index_documents{index="a"}'] == 4
    assert seen['tartan_index_tombstones{index="a"}'] == 2


async def test_what_compaction_would_fold_is_the_backlog() -> None:
    store = open_store("memory://")
    await create(store, "a", IndexConfig())
    writer = Reader(store).writer("a")
    await writer.add(np.ones((1100, DIM), np.float32), np.arange(1101))
    assert IndexFacts.of((await load_head(store, "a")).manifest).flat_tokens == 1100


async def test_a_look_at_an_older_generation_does_not_turn_the_gauges_back(api: httpx.AsyncClient) -> None:
    await fill(api)
    await api.post("/indices/a/update", json={"documents": documents(2), "metadata": [{"n": 1}, {"n": 2}]})
    answer = await api.post("/indices/a/search", json={"queries": documents(1), "as_of": 1})
    assert answer.status_code == 200
    assert (await values(api))['tartan_index_generation{index="a"}'] == 2


async def test_a_deleted_index_and_a_removed_limit_leave_no_gauge(api: httpx.AsyncClient) -> None:
    await fill(api, max_documents=9)
    await api.put("/indices/a/config", json={"max_documents": None})
    await search(api)
    assert 'tartan_index_document_limit{index="a"}' not in await values(api)
    await api.delete("/indices/a")
    assert not [name for name in await values(api) if "tartan_index_" in name and 'index="a"' in name]


async def test_commits_that_lose_a_race_are_counted() -> None:
    store = open_store("memory://")
    one, other = client_of(store), client_of(store)
    async with one, other:
        await fill(one)
        await other.get("/indices/a")
        for api in (one, other, one):  # each believes its own generation is in force
            assert (await api.post("/indices/a/update", json={"documents": documents(1), "metadata": [{"n": 1}]})).status_code == 202
        lost = [(await values(api)).get("tartan_commit_conflicts_total", 0) for api in (one, other)]
    assert sum(lost) >= 1
    assert not any("tartan_store_failures" in name for api in lost for name in [str(api)])


async def test_a_store_that_fails_and_bytes_that_are_wrong_are_counted_by_code() -> None:
    faulty = FaultyStore(open_store("memory://"))
    async with client_of(faulty) as api:
        await fill(api)
        faulty._schedule = lambda call: "unavailable"
        assert (await api.get("/indices/a")).status_code == 503
        assert (await api.get("/health")).status_code == 503
        faulty._schedule = {}
        current = await faulty.inner.get("a/CURRENT")
        await faulty.inner.replace_if_unchanged("a/CURRENT", bytes(current.data)[:-8] + b"rubbish!", current.etag)
        assert (await api.get("/indices/a")).status_code == 500
        seen = await values(api)
    assert seen['tartan_store_failures_total{code="store-unavailable"}'] >= 2
    assert seen['tartan_errors_total{code="SERVICE_UNAVAILABLE"}'] == 2
    assert seen['tartan_errors_total{code="CORRUPT_DATA"}'] == 1


async def test_observing_a_store_changes_neither_its_answers_nor_its_errors() -> None:
    class Odd(AroundStore):
        async def _around(self, call: Call, run: Any) -> Any:
            raise {"get": CorruptData("bad"), "put": Conflict("other"), "replace": Conflict("lost")}.get(call.kind, Unavailable("gone"))

    metrics = Metrics()
    store = ObservedStore(Odd(open_store("memory://")), metrics)
    for attempt, kind in ((store.get("x"), CorruptData), (store.put_if_absent("x", b""), Conflict), (store.delete(["x"]), Unavailable)):
        with pytest.raises(kind):
            await attempt
    with pytest.raises(Conflict):
        await store.replace_if_unchanged("x", b"", "e")
    with pytest.raises(Unavailable):
        [line async for line in store.list("x/")]
    seen = samples(metrics.render().decode())
    assert seen["tartan_commit_conflicts_total"] == 1
    assert seen['tartan_store_failures_total{code="checksum-mismatch"}'] == 1
    assert seen['tartan_store_failures_total{code="store-unavailable"}'] == 2


def test_the_price_of_requests_is_that_of_their_kind() -> None:
    assert store_usd({"range": 1000, "put": 1}) == pytest.approx(0.0004 + 0.000005)
    assert store_usd({"delete": 5}) == 0


async def test_the_byte_cache_shows_hits_and_size(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    async with client_of(store, cache_dir=str(tmp_path / "cache"), memory_bytes=0) as api:
        await fill(api)
        for _ in range(3):
            await search(api)
            await api.runtime.store.settle()  # type: ignore[attr-defined]
        seen = await values(api)
    assert seen['tartan_cache_total{result="hit"}'] >= 1
    assert seen['tartan_cache_bytes_total{result="hit"}'] > 0
    assert seen["tartan_cache_limit_bytes"] == Settings().cache_bytes
    assert seen["tartan_cache_size_bytes"] > 0


async def test_texts_that_wait_for_the_encoder_are_shown() -> None:
    async with client_of(model="hashing") as api:
        await api.post("/encode", json={"texts": ["weft"], "input_type": "query"})
        encoder = await api.runtime.encoder()  # type: ignore[attr-defined]
        with encoder._admitted((True, 0), 3):
            seen = await values(api)
    assert seen['tartan_encoder_waiting_texts{kind="query"}'] == 3
    assert seen['tartan_encoder_waiting_texts{kind="document"}'] == 0


async def test_recall_is_measured_only_if_wanted_and_is_one_for_an_exact_search() -> None:
    async with client_of(recall_sample=1.0) as api:
        await fill(api)
        await search(api)
        await api.runtime.recall_sampler.settle()  # type: ignore[attr-defined]
        seen = await values(api)
        assert seen['tartan_measured_recall_count{index="a"}'] == 1
        assert seen['tartan_measured_recall_sum{index="a"}'] == 1.0
        assert seen['tartan_searches_total{index="a",kind="semantic"}'] == 1, "a repetition is no search of a client"
    assert Runtime(Settings()).recall_sampler is None


async def test_a_search_that_misses_documents_shows_in_the_measured_recall() -> None:
    async with client_of() as api:
        await fill(api, n=20)
        runtime: Runtime = api.runtime  # type: ignore[attr-defined]
        metrics = runtime.metrics
        assert metrics is not None
        sampler = RecallSampler(runtime.searcher, metrics, 1.0, rng=random.Random(0))
        snapshot, query, params = await runtime.reader.snapshot("a"), np.ones((2, DIM), np.float32), SearchParams(k=10)
        answer = (await runtime.searcher.search(snapshot, [query], params))[0]
        answer.ids[5:] = 999
        sampler.offer(snapshot, query, params, None, answer)
        await sampler.settle()
        assert samples(metrics.render().decode())['tartan_measured_recall_sum{index="a"}'] == 0.5


# Labels


def test_thousands_of_indices_make_a_bounded_number_of_labels() -> None:
    metrics = Metrics()
    for n in range(3000):
        metrics.saw_index(f"index-{n}", facts())
        metrics.searched(f"index-{n}", "semantic", 1, {}, {})
        metrics.added.labels(metrics.index_label(f"index-{n}")).inc()
    seen = samples(metrics.render().decode())
    labels = {match[1] for name in seen if (match := re.search(r'index="([^"]+)"', name))}
    assert len(labels) == MAX_INDICES + 1
    assert OTHER_INDEX in labels
    assert len(seen) < 20 * (MAX_INDICES + 1)
    assert seen[f'next_plaid_index_documents{{index="{OTHER_INDEX}"}}'] == 10 * (3000 - MAX_INDICES)
    assert seen[f'tartan_searches_total{{index="{OTHER_INDEX}",kind="semantic"}}'] == 3000 - MAX_INDICES


def test_indices_that_go_make_room_for_others() -> None:
    metrics = Metrics()
    metrics.saw_all({f"old-{n}": facts() for n in range(MAX_INDICES + 5)})
    assert samples(metrics.render().decode())["tartan_indices"] == MAX_INDICES + 5
    metrics.saw_all({"new": facts(2)})
    seen = samples(metrics.render().decode())
    assert [name for name in seen if name.startswith("tartan_index_bytes")] == [
        f'tartan_index_bytes{{index="{OTHER_INDEX}"}}',
        'tartan_index_bytes{index="new"}',
    ]
    assert seen[f'tartan_index_bytes{{index="{OTHER_INDEX}"}}'] == 0


async def test_paths_statuses_and_codes_of_clients_make_no_labels(api: httpx.AsyncClient) -> None:
    for n in range(50):
        await api.get(f"/no/such/{n}")
        await api.get(f"/indices/gone-{n}")
        await api.request("BREW", f"/indices/{n}")
    text = (await api.get("/metrics")).text
    assert "gone-" not in text
    assert "BREW" not in text
    assert set(re.findall(r'tartan_requests_total{endpoint="([^"]+)"', text)) <= {
        "unmatched",
        "describe_index",
        "get_index",
        "index",
        "metrics",
    }


# Several workers


def in_worker(folder: Path, code: str) -> str:
    """Run code as one worker of several would; `metrics` is its Metrics."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom handler.metrics import IndexFacts, Metrics\n"
    program += f"metrics = Metrics(folder={str(folder)!r}, release='r')\n"
    program += "def facts(g=1, n=10):\n    return IndexFacts(g, 1e9 + g, n, 100, 1000, 2, 1, 50, 1, None)\n" + code
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout


def test_workers_add_up_agree_on_labels_and_the_dead_leave_no_gauge(tmp_path: Path) -> None:
    in_worker(
        tmp_path,
        """
for n in range(150):
    metrics.saw_index(f"one-{n}", facts())
metrics.answered("search", 200, 0.1)
metrics.active.labels("search").inc()
metrics.resident.set(10)
metrics.forgot_index("one-0")
""",
    )
    text = in_worker(
        tmp_path,
        """
for n in range(150):
    metrics.saw_index(f"two-{n}", facts())
metrics.saw_index("one-1", facts(5, 77))
metrics.answered("search", 200, 0.1)
metrics.resident.set(20)
print(metrics.render().decode())
""",
    )
    seen = samples(text)
    assert seen['tartan_requests_total{endpoint="search",status="200"}'] == 2
    assert seen['next_plaid_request_duration_seconds_count{endpoint="search"}'] == 2
    assert seen["process_resident_memory_bytes"] == 20, "the first worker is dead"
    assert 'next_plaid_active_requests{endpoint="search"}' not in seen
    assert seen['next_plaid_index_documents{index="one-1"}'] == 77
    assert 'next_plaid_index_documents{index="one-0"}' not in seen
    labels = {match[1] for name in seen if (match := re.search(r'index="([^"]+)"', name))}
    assert len(labels - {OTHER_INDEX}) == MAX_INDICES - 1


# Lambda


def test_searching_without_metrics_imports_no_prometheus_client() -> None:
    program = """
import asyncio, sys
from handler.runtime import Runtime
from handler.settings import Settings
from handler.app import create_app
from engine.store.objects import open_store

runtime = Runtime(Settings(metrics=False, emf_namespace="Tartan", log_level="info", search_threads=1), store=open_store("memory://"))
app = create_app(runtime=runtime)

async def call(method, path, body):
    sent = []
    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}
    async def send(message):
        sent.append(message)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
    await app({**scope, "http_version": "1.1", "scheme": "http", "server": ("s", 80), "client": ("c", 1), "root_path": ""}, receive, send)
    return sent[0]["status"]

async def main():
    assert await call("POST", "/indices", b'{"name":"a","config":{}}') == 200
    assert await call("POST", "/indices/a/update", b'{"documents":[{"embeddings":[[1,0]]}],"metadata":[{"n":1}]}') == 202
    assert await call("POST", "/indices/a/search", b'{"queries":[{"embeddings":[[1,0]]}]}') == 200

asyncio.run(main())
heavy = [name for name in ("prometheus_client", "opentelemetry.sdk", "rich") if name in sys.modules]
print("heavy:", *heavy)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "heavy:"
    line = json.loads(lines[-1])
    assert line["event"] == "request"
    check_embedded(line)
    groups = line["_aws"]["CloudWatchMetrics"]
    assert [group["Dimensions"] for group in groups] == [[["service", "endpoint"]], [["service"]]]
    assert line["endpoint"] == "search"
    assert {"ms", "count", "errors"} <= {metric["Name"] for metric in groups[0]["Metrics"]}
    assert {"rounds", "requests", "search_ms"} <= {metric["Name"] for metric in groups[1]["Metrics"]}
    stored = json.loads(lines[-2])
    assert stored["documents"] == 1
    assert stored["age_s"] < 60
    assert stored["index_label"] == "a"


def check_embedded(line: dict[str, Any]) -> None:
    """The rules of CloudWatch's specification: every metric and dimension named is a member of the root, of the right type."""
    assert isinstance(line["_aws"]["Timestamp"], int)
    for directive in line["_aws"]["CloudWatchMetrics"]:
        assert re.fullmatch(r"[^:\s].{0,254}", directive["Namespace"])
        assert len(directive["Metrics"]) <= 100
        for dimensions in directive["Dimensions"]:
            assert len(dimensions) <= 30
            assert all(isinstance(line[name], str) and line[name] for name in dimensions)
        for metric in directive["Metrics"]:
            assert isinstance(line[metric["Name"]], (int, float)), metric
            assert metric["Unit"] in {"Milliseconds", "Count", "Bytes", "Seconds", "None"}


def test_embedded_metrics_name_a_bounded_number_of_indices_and_repeat_rarely() -> None:
    from handler.emf import MAX_INDICES as MAX_EMBEDDED
    from handler.emf import Emf
    from handler.logs import RequestRecord

    emf = Emf("Tartan")
    manifest = asyncio.run(_manifest())
    labels = set()
    for n in range(500):
        assert emf.is_news(f"i{n}", manifest)
        assert not emf.is_news(f"i{n}", manifest)
        record = RequestRecord("r", "GET", status=200, index=f"i{n}", news=IndexFacts.of(manifest))
        labels.add(emf.fields("search", record, 0.1)["index_label"])
    assert len(labels) == MAX_EMBEDDED + 1


async def _manifest() -> Any:
    return (await create(open_store("memory://"), "a", IndexConfig())).manifest


def test_a_worker_without_http_has_a_line_of_its_own() -> None:
    from handler.emf import Emf

    line = json.loads(Emf("Tartan", service="shard").line({"score_ms": 12.5, "requests": 3}, step="score"))
    check_embedded(line)
    assert line["_aws"]["CloudWatchMetrics"][0]["Dimensions"] == [["service", "step"]]


def test_the_host_is_read_without_being_asked_for_anything() -> None:
    facts = look()
    assert facts.resident_bytes > 0
    assert 0 < facts.used_bytes <= facts.limit_bytes
    assert facts.cores > 0
