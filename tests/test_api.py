"""The HTTP contract, endpoint by endpoint, in-process: statuses, bodies, order of checks, limits. test_sdk.py drives the real clients."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from engine.config import IndexConfig
from engine.errors import Unavailable
from engine.format.manifest import CodecRef, Manifest
from engine.index.reader import Reader, Snapshot
from engine.store.objects import open_store
from handler.routes.indices import numbers_of
from handler.routes.table import ENDPOINTS
from handler.settings import SETTINGS, Settings
from serving import client_of

DIM = 8
NO_LENGTH = {"queries": []}


@pytest.fixture
async def api() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of() as client:
        yield client


def vectors(n: int, seed: int = 0, tokens: int = 3) -> list[list[list[float]]]:
    return np.random.default_rng(seed).standard_normal((n, tokens, DIM)).round(4).tolist()


def documents(n: int, seed: int = 0) -> list[dict[str, Any]]:
    return [{"embeddings": matrix} for matrix in vectors(n, seed)]


async def filled(api: httpx.AsyncClient, name: str = "a", n: int = 4, **config: Any) -> list[list[list[float]]]:
    """An index of n documents with metadata; returns their vectors."""
    await api.post("/indices", json={"name": name, "config": config})
    rows = [{"title": f"word{i}", "year": 2000 + i, "even": i % 2 == 0} for i in range(n)]
    answer = await api.post(f"/indices/{name}/update", json={"documents": documents(n), "metadata": rows})
    assert answer.status_code == 202, answer.text
    return vectors(n)


async def refused(request: Any, status: int, code: str) -> str:
    answer = await request
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert set(answer.json()) <= {"code", "message", "retry_after_seconds"}
    return str(answer.json()["message"])


async def search(api: httpx.AsyncClient, name: str = "a", **body: Any) -> dict[str, Any]:
    answer = await api.post(f"/indices/{name}/search", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def delete_documents(api: httpx.AsyncClient, name: str, condition: str, *parameters: Any) -> Any:
    return api.request("DELETE", f"/indices/{name}/documents", json={"condition": condition, "parameters": list(parameters)})


# Service


async def test_health_has_what_the_clients_require(api: httpx.AsyncClient) -> None:
    await filled(api)
    await api.post("/indices", json={"name": "empty", "config": {"max_documents": 5}})
    for path in ("/", "/health"):
        body = (await api.get(path)).json()
        assert body["status"] == "healthy"
        assert {"version", "loaded_indices", "index_dir", "memory_usage_bytes", "updates"} <= set(body)
        assert "model" not in body
        first, second = body["indices"]
        assert first == {
            "name": "a", "num_documents": 4, "num_embeddings": 12, "num_partitions": 0, "dimension": DIM, "nbits": 4, "avg_doclen": 3.0,
            "has_metadata": True,
        }  # fmt: skip
        assert second["num_documents"] == second["dimension"] == 0
        assert second["max_documents"] == 5
        assert second["has_metadata"] is False


async def test_draining_turns_health_and_readiness_to_503_and_serves_the_rest(api: httpx.AsyncClient) -> None:
    assert (await api.get("/readyz")).json() == {"status": "ready"}
    api.runtime.is_draining = lambda: True  # type: ignore[attr-defined]
    for path in ("/", "/health", "/readyz"):
        answer = await api.get(path)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
    assert (await api.get("/livez")).status_code == 200
    listing = await api.get("/indices")
    assert listing.status_code == 200
    assert listing.headers["connection"] == "close"


async def test_metrics_have_the_peers_names_and_bounded_labels(api: httpx.AsyncClient) -> None:
    await filled(api)
    await search(api, queries=[{"embeddings": vectors(1)[0]}])
    await api.get("/no/such/path")
    answer = await api.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.text
    assert 'next_plaid_request_duration_seconds_count{endpoint="search"} 1.0' in text
    assert 'next_plaid_active_requests{endpoint="metrics"} 1.0' in text
    assert 'next_plaid_index_documents{index="a"} 4.0' in text
    assert 'tartan_requests_total{endpoint="unmatched",status="404"} 1.0' in text
    assert 'tartan_searches_total{index="a",kind="semantic"} 1.0' in text
    assert 'tartan_store_requests_total{method="replace"} 1.0' in text
    assert "no/such" not in text


async def test_documentation_needs_no_foreign_host(api: httpx.AsyncClient) -> None:
    page = (await api.get("/swagger-ui")).text
    assert "http://" not in page
    assert "https://" not in page
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "initializer.js", "favicon.png"):
        assert f"swagger-ui/{name}" in page
        assert (await api.get(f"/swagger-ui/{name}")).status_code == 200
    await refused(api.get("/swagger-ui/LICENSE"), 404, "NO_SUCH_ROUTE")
    await refused(api.get("/swagger-ui/..%2f..%2fapp.py"), 404, "NO_SUCH_ROUTE")


async def test_the_description_covers_every_endpoint_with_examples_and_errors(api: httpx.AsyncClient) -> None:
    document = (await api.get("/api-docs/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    for endpoint in ENDPOINTS:
        operation = document["paths"][endpoint.path][endpoint.method.lower()]
        assert operation["operationId"] == endpoint.name
        assert str(endpoint.status) in operation["responses"]
        assert "500" in operation["responses"]
        if endpoint.body is not None:
            assert "example" in operation["requestBody"]["content"]["application/json"]
            assert {"400", "413", "415", "422"} <= set(operation["responses"])
    names = [endpoint.name for endpoint in ENDPOINTS]
    assert len(set(names)) == len(names)


async def test_every_example_of_a_request_is_understood(api: httpx.AsyncClient) -> None:
    for endpoint in ENDPOINTS:
        if endpoint.body is not None:
            path = endpoint.path.replace("{name}", "papers").replace("{alias}", "live").replace("{pin}", "p")
            answer = await api.request(endpoint.method, path, json=endpoint.request_example)
            assert answer.status_code != 422, (endpoint.name, answer.text)


# Conventions


async def test_request_ids_are_echoed_or_made(api: httpx.AsyncClient) -> None:
    assert (await api.get("/indices", headers={"X-Request-ID": "abc-1"})).headers["x-request-id"] == "abc-1"
    for path in ("/indices/none", "/nowhere", "/health"):
        made = (await api.get(path)).headers["x-request-id"]
        assert len(made) == 36
    assert (await api.get("/health", headers={"X-Request-ID": "has space"})).headers["x-request-id"] != "has space"


async def test_unknown_paths_and_methods_are_json_errors(api: httpx.AsyncClient) -> None:
    await refused(api.get("/nowhere"), 404, "NO_SUCH_ROUTE")
    await refused(api.post("/indices/a/nowhere", json={}), 404, "NO_SUCH_ROUTE")
    answer = await api.patch("/indices/a")
    assert answer.status_code == 405
    assert answer.json()["code"] == "METHOD_NOT_ALLOWED"
    assert {"GET", "DELETE"} <= set(answer.headers["allow"].replace(" ", "").split(","))
    assert (await api.post("/indices/a/metadata", json={})).status_code == 405


async def test_bodies_must_be_json_of_the_right_shape_and_size(api: httpx.AsyncClient) -> None:
    await refused(api.post("/indices", content=b'{"name":"a"}'), 415, "UNSUPPORTED_MEDIA_TYPE")
    await refused(api.post("/indices", content=b"{", headers={"content-type": "application/json"}), 400, "BAD_REQUEST")
    await refused(api.post("/indices", json={"name": 3}), 422, "UNPROCESSABLE")
    fine = await api.post("/indices", content=b'{"name":"a"}', headers={"content-type": "application/vnd.x+json; charset=utf-8"})
    assert fine.status_code == 200
    async with client_of(max_body_bytes=1000) as small:
        await refused(small.post("/indices", json={"name": "a" * 2000}), 413, "PAYLOAD_TOO_LARGE")

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b" " * 100

        await refused(small.post("/indices", content=chunks(), headers={"content-type": "application/json"}), 413, "PAYLOAD_TOO_LARGE")
    big = json.dumps({"condition": "x" * (3 << 20)})
    await refused(
        api.request("DELETE", "/indices/a/documents", content=big, headers={"content-type": "application/json"}), 413, "PAYLOAD_TOO_LARGE"
    )


async def test_head_is_get_without_a_body_and_options_is_a_success(api: httpx.AsyncClient) -> None:
    await filled(api)
    for path, status in (("/health", 200), ("/indices/a", 200), ("/indices/none", 404), ("/nowhere", 404), ("/indices/a/export", 200)):
        answer = await api.head(path)
        assert (answer.status_code, answer.content) == (status, b""), path
    described = await api.get("/indices/a", headers={"accept-encoding": "identity"})
    assert (await api.head("/indices/a", headers={"accept-encoding": "identity"})).headers["content-length"] == str(len(described.content))
    assert 'tartan_requests_total{endpoint="health",status="200"} 1.0' in (await api.get("/metrics")).text
    answer = await api.options("/health")
    assert (answer.status_code, answer.content, "GET" in answer.headers["allow"]) == (200, b"", True)


async def test_any_origin_may_call_except_for_health(api: httpx.AsyncClient) -> None:
    assert (await api.get("/indices")).headers["access-control-allow-origin"] == "*"
    assert (await api.get("/indices/none")).headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-origin" not in (await api.get("/health")).headers
    asked = {"Origin": "http://x", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    answer = await api.options("/indices/a/search", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-headers"] == "x-api-key"


async def test_answers_are_compressed_for_those_who_ask(api: httpx.AsyncClient) -> None:
    await filled(api, n=40)
    plain = await api.get("/indices/a/metadata", headers={"accept-encoding": "identity"})
    packed = await api.get("/indices/a/metadata", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"])
    assert packed.json() == plain.json()


async def test_a_stage_prefix_is_tolerated_and_not_needed() -> None:
    async with client_of(path_prefix="/prod") as api:
        assert (await api.get("/prod/indices")).json() == []
        assert (await api.get("/indices")).json() == []
        assert (await api.get("/prod")).json()["status"] == "healthy"
        assert (await api.get("http://server/prod//indices")).json() == (await api.get("http://server//indices")).json() == []
        assert (await api.get("/production")).status_code == 404


async def test_a_slow_store_ends_in_408_and_a_failing_one_in_503() -> None:
    class Slow:
        def __getattr__(self, name: str) -> Any:
            async def wait(*_: Any, **__: Any) -> None:
                await asyncio.sleep(10)

            return wait

    async with client_of(Slow(), short_timeout_s=0.02, timeout_s=0.02) as api:  # type: ignore[arg-type]
        await refused(api.get("/indices/a"), 408, "TIMEOUT")
        await refused(api.post("/indices", json={"name": "a"}), 408, "TIMEOUT")

    class Failing:
        def __getattr__(self, name: str) -> Any:
            async def fail(*_: Any, **__: Any) -> None:
                raise Unavailable("the store is away", retry_after_s=3.2)

            return fail

    async with client_of(Failing()) as api:  # type: ignore[arg-type]
        answer = await api.get("/indices/a")
        assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "SERVICE_UNAVAILABLE", "4")


async def test_excess_requests_wait_their_turn_and_then_give_up() -> None:
    class Gated:
        def __init__(self) -> None:
            self.inner = open_store("memory://")
            self.gate = asyncio.Event()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        async def get(self, name: str) -> Any:
            await self.gate.wait()
            return await self.inner.get(name)

    store = Gated()
    async with client_of(store, concurrency_limit=1, queue_wait_s=0.05) as api:  # type: ignore[arg-type]
        first = asyncio.create_task(api.get("/indices/a"))
        await asyncio.sleep(0.01)
        message = await refused(api.get("/indices/a"), 503, "SERVICE_UNAVAILABLE")
        assert "busy" in message
        assert (await api.get("/livez")).status_code == 200
        waiting = asyncio.create_task(api.get("/indices/a"))
        await asyncio.sleep(0.01)
        store.gate.set()
        assert [(await task).status_code for task in (first, waiting)] == [404, 404]


async def test_the_rate_limit_counts_real_tokens_and_spares_the_peers_exceptions() -> None:
    async with client_of(rate_limit_enabled=True, rate_limit_burst=2, rate_limit_per_second=50.0) as api:
        body = {"queries": [{"embeddings": [[1.0]]}]}
        statuses = [(await api.post("/indices/a/search", json=body)).status_code for _ in range(3)]
        assert statuses[:2] == [404, 404]
        answer = await api.post("/indices/a/search", json=body)
        if answer.status_code == 429:  # on a slow machine a token may have come back already
            assert answer.headers["retry-after"] == "2"
            assert answer.json()["retry_after_seconds"] == 2
        await asyncio.sleep(0.05)
        assert (await api.post("/indices/a/search", json=body)).status_code == 404
        for _ in range(5):
            assert (await api.get("/indices")).status_code == 200
            assert (await api.post("/indices/a/update", json={"documents": []})).status_code == 404


# Indices


async def test_an_index_is_declared_once_and_appears_when_it_holds_documents(api: httpx.AsyncClient) -> None:
    answer = await api.post("/indices", json={"name": "a", "config": {"nbits": 2, "binary": True, "unknown": 1}})
    assert answer.status_code == 200
    assert answer.json()["config"] == {
        "nbits": 2, "batch_size": 50000, "seed": None, "start_from_scratch": 999, "max_documents": None, "fts_tokenizer": "unicode61",
        "binary": False,
    }  # fmt: skip
    assert "declared" in answer.json()["message"]
    assert await refused(api.post("/indices", json={"name": "a"}), 409, "INDEX_ALREADY_EXISTS") == "a"
    assert (await api.get("/indices")).json() == []
    assert await refused(api.get("/indices/a"), 404, "INDEX_NOT_FOUND") == "a"
    await api.post("/indices/a/update", json={"documents": documents(2)})
    assert (await api.get("/indices")).json() == ["a"]
    info = (await api.get("/indices/a")).json()
    assert info == {
        "name": "a", "num_documents": 2, "num_embeddings": 6, "num_partitions": 0, "avg_doclen": 3.0, "dimension": DIM,
        "has_metadata": False, "metadata_count": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 129, "ä"])
async def test_names_that_name_nothing_are_refused_on_create_and_unknown_elsewhere(api: httpx.AsyncClient, name: str) -> None:
    await refused(api.post("/indices", json={"name": name}), 400, "BAD_REQUEST")
    if name and "/" not in name:
        await refused(api.get(f"/indices/{name}"), 404, "INDEX_NOT_FOUND")
        await refused(api.post(f"/indices/{name}/update", json={"documents": documents(1)}), 404, "INDEX_NOT_DECLARED")
        assert (await api.delete(f"/indices/{name}")).json() == {"deleted": True, "name": name}


@pytest.mark.parametrize("config", [{"nbits": 3}, {"fts_tokenizer": "porter"}, {"max_documents": 0}])
async def test_a_configuration_that_cannot_work_is_refused(api: httpx.AsyncClient, config: dict[str, Any]) -> None:
    await refused(api.post("/indices", json={"name": "a", "config": config}), 400, "BAD_REQUEST")


async def test_deleting_an_index_is_idempotent(api: httpx.AsyncClient) -> None:
    await filled(api)
    for _ in range(2):
        answer = await api.delete("/indices/a")
        assert (answer.status_code, answer.json()) == (200, {"deleted": True, "name": "a"})
    await refused(api.get("/indices/a"), 404, "INDEX_NOT_FOUND")
    assert (await api.post("/indices", json={"name": "a"})).status_code == 200


async def test_the_limit_on_documents_evicts_the_lowest_ids_at_the_next_add(api: httpx.AsyncClient) -> None:
    await filled(api, n=4)
    await refused(api.put("/indices/none/config", json={"max_documents": 2}), 404, "INDEX_NOT_FOUND")
    await refused(api.put("/indices/a/config", json={"max_documents": 0}), 400, "BAD_REQUEST")
    answer = await api.put("/indices/a/config", json={"max_documents": 3})
    assert answer.json()["config"]["max_documents"] == 3
    assert (await api.get("/indices/a")).json()["num_documents"] == 4
    await api.post("/indices/a/update", json={"documents": documents(1, seed=5), "metadata": [{"title": "new"}]})
    info = (await api.get("/indices/a")).json()
    assert (info["num_documents"], info["max_documents"]) == (3, 3)
    assert [row["_subset_"] for row in (await api.get("/indices/a/metadata")).json()["metadata"]] == [2, 3, 4]
    assert (await api.put("/indices/a/config", json={})).json()["config"]["max_documents"] is None
    declared = await api.post("/indices", json={"name": "empty"})
    assert declared.status_code == 200
    assert (await api.put("/indices/empty/config", json={"max_documents": 9})).status_code == 200


# Documents


async def test_an_acknowledged_add_is_found_by_the_next_search(api: httpx.AsyncClient) -> None:
    matrices = await filled(api)
    for i, matrix in enumerate(matrices):
        found = await search(api, queries=[{"embeddings": matrix}], params={"top_k": 1})
        assert found["results"][0]["document_ids"] == [i]
        assert found["results"][0]["metadata"] == [{"_subset_": i, "title": f"word{i}", "year": 2000 + i, "even": int(i % 2 == 0)}]


async def test_the_answer_of_an_add_is_one_json_string_and_names_the_ids_in_a_header(api: httpx.AsyncClient) -> None:
    await filled(api, n=4)
    answer = await api.post("/indices/a/update", json={"documents": documents(2), "metadata": [{}, {}]})
    assert isinstance(answer.json(), str)
    assert "update" in answer.json()
    assert "queued" in answer.json()
    assert answer.headers["x-tartan-document-ids"] == "4-5"


async def test_checks_of_an_add_come_in_the_contracts_order(api: httpx.AsyncClient) -> None:
    bad: dict[str, Any] = {"documents": [{}], "metadata": [{}, {}]}
    await refused(api.post("/indices/a/update", json=bad), 404, "INDEX_NOT_DECLARED")
    await api.post("/indices", json={"name": "a"})
    assert "document 0" in await refused(api.post("/indices/a/update", json=bad), 400, "BAD_REQUEST")
    assert "empty" in await refused(api.post("/indices/a/update", json={"documents": [], "metadata": [{}]}), 400, "BAD_REQUEST")
    one = documents(1)
    assert "metadata" in await refused(api.post("/indices/a/update", json={"documents": one, "metadata": [{}, {}]}), 400, "BAD_REQUEST")
    await refused(api.post("/indices/a/update", json={"documents": one, "metadata": [3]}), 400, "BAD_REQUEST")
    await refused(api.post("/indices/a/update", json={"documents": one, "metadata": [{"bad name": 1}]}), 400, "BAD_REQUEST")
    mixed = [*one, {"embeddings": [[1.0, 2.0]]}]
    await refused(api.post("/indices/a/update", json={"documents": mixed, "metadata": [{}, {}]}), 400, "DIMENSION_MISMATCH")
    await filled(api, "b")
    wrong = {"documents": [{"embeddings": [[1.0, 2.0]]}], "metadata": [{}]}
    await refused(api.post("/indices/b/update", json=wrong), 400, "DIMENSION_MISMATCH")
    assert (await api.get("/indices/b")).json()["num_documents"] == 4


async def test_the_older_add_needs_documents_that_are_there(api: httpx.AsyncClient) -> None:
    await refused(api.post("/indices/a/documents", json={"documents": []}), 400, "BAD_REQUEST")
    await refused(api.post("/indices/a/documents", json={"documents": documents(1), "metadata": []}), 400, "BAD_REQUEST")
    await refused(api.post("/indices/a/documents", json={"documents": documents(1)}), 404, "INDEX_NOT_FOUND")
    await api.post("/indices", json={"name": "a"})
    await refused(api.post("/indices/a/documents", json={"documents": documents(1)}), 404, "INDEX_NOT_FOUND")
    await filled(api, "b")
    wrong = {"documents": [{"embeddings": [[1.0]]}, {}], "metadata": [{}, {}]}
    await refused(api.post("/indices/b/documents", json=wrong), 400, "DIMENSION_MISMATCH")
    answer = await api.post("/indices/b/documents", json={"documents": documents(1), "metadata": [{"title": "legacy"}]})
    assert answer.status_code == 202
    assert (await search(api, "b", text_query=["legacy"]))["results"][0]["document_ids"] == [4]


async def test_external_ids_replace_documents_and_come_back_when_asked_for(api: httpx.AsyncClient) -> None:
    await api.post("/indices", json={"name": "a"})
    first, second = vectors(2)
    await api.post("/indices/a/update", json={"documents": [{"embeddings": first}], "ids": ["x"], "metadata": [{"v": 1}]})
    await api.post("/indices/a/update", json={"documents": [{"embeddings": second}], "ids": ["x"], "metadata": [{"v": 2}]})
    result = (await search(api, queries=[{"embeddings": second}], with_ids=True))["results"][0]
    assert (result["ids"], result["document_ids"], result["metadata"][0]["v"]) == (["x"], [1], 2)
    assert "ids" not in (await search(api, queries=[{"embeddings": second}]))["results"][0]
    wrong = {"documents": [{"embeddings": first}], "ids": ["x", "y"]}
    await refused(api.post("/indices/a/update", json=wrong), 400, "BAD_REQUEST")


async def test_deletes_are_evaluated_before_the_answer(api: httpx.AsyncClient) -> None:
    await refused(delete_documents(api, "a", ""), 400, "BAD_REQUEST")
    await refused(delete_documents(api, "a", "1=1"), 404, "INDEX_NOT_FOUND")
    await filled(api)
    await refused(delete_documents(api, "a", "year >"), 400, "BAD_REQUEST")
    await refused(delete_documents(api, "a", "nothing = ?", 1), 400, "BAD_REQUEST")
    answer = await delete_documents(api, "a", "year = ?", 1900)
    assert (answer.status_code, "No documents match" in answer.json()) == (202, True)
    answer = await delete_documents(api, "a", "year = ?", 2001)
    assert (answer.status_code, "queued" in answer.json()) == (202, True)
    info = (await api.get("/indices/a")).json()
    assert (info["num_documents"], info["num_embeddings"], info["metadata_count"]) == (3, 9, 3)
    assert [row["_subset_"] for row in (await api.get("/indices/a/metadata")).json()["metadata"]] == [0, 2, 3]


async def test_an_emptied_index_stays(api: httpx.AsyncClient) -> None:
    await filled(api)
    await delete_documents(api, "a", "1=1")
    info = await api.get("/indices/a")
    assert (info.status_code, info.json()["num_documents"], info.json()["num_embeddings"]) == (200, 0, 0)
    assert (await search(api, queries=[{"embeddings": vectors(1)[0]}]))["results"][0]["document_ids"] == []
    await api.post("/indices/a/update", json={"documents": documents(1), "metadata": [{"year": 1}]})
    assert (await api.get("/indices/a/metadata")).json()["metadata"] == [{"_subset_": 4, "title": None, "year": 1, "even": None}]


async def test_an_index_without_columns_has_no_metadata_but_its_documents_can_be_deleted(api: httpx.AsyncClient) -> None:
    await api.post("/indices", json={"name": "a"})
    await api.post("/indices/a/update", json={"documents": documents(3)})
    assert (await search(api, queries=[{"embeddings": vectors(1)[0]}]))["results"][0]["metadata"] == [None] * 3
    assert (await api.get("/indices/a/metadata/count")).json() == {"count": 0, "has_metadata": False}
    assert await refused(api.get("/indices/a/metadata"), 404, "METADATA_NOT_FOUND") == "a"
    await refused(delete_documents(api, "a", "year = ?", 1), 404, "METADATA_NOT_FOUND")
    assert (await delete_documents(api, "a", "_subset_ = ?", 1)).status_code == 202
    assert (await api.get("/indices/a")).json()["num_documents"] == 2


# Search


async def test_checks_of_a_search_come_in_the_contracts_order(api: httpx.AsyncClient) -> None:
    async def post(body: dict[str, Any], status: int, code: str, name: str = "none") -> str:
        return await refused(api.post(f"/indices/{name}/search", json=body), status, code)

    bad_vector = {"embeddings": [[1.0], [1.0, 2.0]]}
    assert "text_query" in await post({"queries": [], "text_query": [], "alpha": 7}, 400, "BAD_REQUEST")
    assert "alpha" in await post({"text_query": ["x"], "alpha": 1.1, "fusion": "no"}, 400, "BAD_REQUEST")
    assert "fusion" in await post({"queries": [{}, {}], "text_query": ["x"], "fusion": "no"}, 400, "BAD_REQUEST")
    assert "hybrid" in await post({"queries": [{}, {}], "text_query": ["x"], "filter_condition": "x = ?"}, 400, "BAD_REQUEST")
    await post({"queries": [bad_vector], "filter_condition": "x = ?"}, 404, "METADATA_NOT_FOUND")
    await post({"queries": [bad_vector]}, 400, "BAD_REQUEST")
    await post({"queries": [{"embeddings": [[1.0]]}]}, 404, "INDEX_NOT_FOUND")
    await filled(api)
    message = await post({"queries": [bad_vector], "filter_condition": "nope = ?", "filter_parameters": [1]}, 400, "BAD_REQUEST", "a")
    assert message.startswith("invalid filter condition")
    await post({"queries": [{"embeddings": [[1.0]]}], "text_query": ["a", "b"]}, 400, "DIMENSION_MISMATCH", "a")
    assert "hybrid" in await post({"queries": [{"embeddings": vectors(1)[0]}], "text_query": ["a", "b"]}, 400, "BAD_REQUEST", "a")


async def test_keyword_search_on_an_unknown_or_empty_index_is_empty(api: httpx.AsyncClient) -> None:
    expected = {"results": [{"query_id": i, "document_ids": [], "scores": [], "metadata": []} for i in range(2)], "num_queries": 2}
    assert await search(api, "none", text_query=["x", "y"]) == expected
    await api.post("/indices", json={"name": "declared"})
    assert await search(api, "declared", text_query=["x", "y"]) == expected


async def test_subsets_and_filters_restrict_and_a_filter_replaces_a_subset(api: httpx.AsyncClient) -> None:
    matrices = await filled(api)
    query = [{"embeddings": matrices[0]}]

    async def ids(**more: Any) -> list[int]:
        return sorted((await search(api, queries=query, **more))["results"][0]["document_ids"])

    assert await ids() == [0, 1, 2, 3]
    assert await ids(subset=[3, 1, 1, 99, -5]) == [1, 3]
    assert await ids(subset=[]) == []
    assert await ids(subset=[0], filter_condition="year >= ?", filter_parameters=[2002]) == [2, 3]
    assert await ids(filter_condition="year > ?", filter_parameters=[3000]) == []
    assert await ids(params={"top_k": 0}) == []
    assert len(await ids(params={"top_k": 2, "n_ivf_probe": 0})) == 2
    assert len(await ids(params={"top_k": 4, "n_full_scores": 3})) == 3
    filtered = {"queries": query, "filter_condition": "title LIKE ?", "filter_parameters": ["%1"]}
    assert (await api.post("/indices/a/search/filtered", json=filtered)).json()["results"][0]["document_ids"] == [1]
    await refused(api.post("/indices/a/search/filtered", json={**filtered, "queries": []}), 400, "BAD_REQUEST")
    await refused(api.post("/indices/none/search/filtered", json=filtered), 404, "METADATA_NOT_FOUND")


async def test_batches_answer_in_order(api: httpx.AsyncClient) -> None:
    matrices = await filled(api)
    found = await search(api, queries=[{"embeddings": matrix} for matrix in matrices], params={"top_k": 1})
    assert found["num_queries"] == 4
    assert [(result["query_id"], result["document_ids"]) for result in found["results"]] == [(i, [i]) for i in range(4)]
    words = await search(api, text_query=["word2", "nothing", "word0"])
    assert [result["document_ids"] for result in words["results"]] == [[2], [], [0]]
    async with client_of(max_queries=3) as small:
        many = {"queries": [{"embeddings": matrices[0]}] * 4}
        await refused(small.post("/indices/a/search", json=many), 413, "PAYLOAD_TOO_LARGE")


async def test_hybrid_fuses_both_sides(api: httpx.AsyncClient) -> None:
    matrices = await filled(api)
    query: dict[str, Any] = {"queries": [{"embeddings": matrices[0]}], "text_query": ["word3"]}
    semantic = (await search(api, **query, alpha=1.0))["results"][0]
    assert (semantic["document_ids"][0], semantic["scores"][0]) == (0, 1.0)
    keyword = (await search(api, **query, alpha=0.0))["results"][0]
    assert (keyword["document_ids"][0], keyword["scores"][0]) == (3, 1.0)
    ranks = (await search(api, **query, fusion="rrf", params={"top_k": 2}))["results"][0]
    assert ranks["document_ids"][0] in (0, 3)
    assert max(ranks["scores"]) < 2 / 60


async def test_an_old_generation_can_be_searched(api: httpx.AsyncClient) -> None:
    matrices = await filled(api)
    await delete_documents(api, "a", "year = ?", 2000)
    query: dict[str, Any] = {"queries": [{"embeddings": matrices[0]}]}
    assert 0 not in (await search(api, **query))["results"][0]["document_ids"]
    assert (await search(api, **query, as_of=1))["results"][0]["document_ids"][0] == 0
    assert (await search(api, **query, as_of="2999-01-01T00:00:00Z"))["results"][0]["document_ids"][0] != 0
    await refused(api.post("/indices/a/search", json={**query, "as_of": 99}), 404, "GENERATION_NOT_FOUND")
    await refused(api.post("/indices/a/search", json={**query, "as_of": "1999-01-01T00:00:00Z"}), 404, "GENERATION_NOT_FOUND")
    await refused(api.post("/indices/a/search", json={**query, "as_of": "soon"}), 400, "BAD_REQUEST")


async def test_explain_tells_matches_and_costs_and_does_not_change_the_hits(api: httpx.AsyncClient) -> None:
    matrices = await filled(api)
    query: dict[str, Any] = {"queries": [{"embeddings": matrices[1]}]}
    plain, explained = (await search(api, **query))["results"][0], (await search(api, **query, explain=True))["results"][0]
    explanation = explained.pop("explain")
    assert explained == plain
    assert explanation["generation"] == 1
    assert [token for token, _ in explanation["matches"][0]] == [0, 1, 2]
    assert sum(similarity for _, similarity in explanation["matches"][0]) == pytest.approx(plain["scores"][0], rel=1e-3)
    assert {"rounds", "requests", "bytes", "stages_ms", "estimated_usd"} <= set(explanation["cost"])
    assert explanation["cost"]["requests"] >= 1  # opening the index counts
    hybrid = (await search(api, **query, text_query=["word3"], explain=True))["results"][0]
    assert len(hybrid["explain"]["matches"]) == len(hybrid["document_ids"])


async def test_eventual_reads_may_be_old_and_strong_ones_never() -> None:
    store = open_store("memory://")
    async with client_of(store) as one, client_of(store) as two:
        matrices = await filled(one)
        query: dict[str, Any] = {"queries": [{"embeddings": matrices[0]}]}
        await search(two, **query)
        await delete_documents(one, "a", "1=1")
        old = await search(two, **query, consistency="eventual", max_age_s=60)
        assert old["results"][0]["document_ids"][0] == 0
        assert (await search(two, **query))["results"][0]["document_ids"] == []


# Metadata


async def test_metadata_endpoints_need_an_index_and_columns(api: httpx.AsyncClient) -> None:
    await api.post("/indices", json={"name": "declared"})
    bodies = {
        "check": {"document_ids": [1]},
        "query": {"condition": "a = ?", "parameters": [1]},
        "get": {},
        "update": {"condition": "a = ?", "parameters": [1], "updates": {"a": 1}},
    }
    for name in ("none", "declared"):
        for verb, body in bodies.items():
            await refused(api.post(f"/indices/{name}/metadata/{verb}", json=body), 404, "INDEX_NOT_FOUND")
        await refused(api.get(f"/indices/{name}/metadata"), 404, "INDEX_NOT_FOUND")
        await refused(api.get(f"/indices/{name}/metadata/count"), 404, "INDEX_NOT_FOUND")


async def test_rows_by_ids_conditions_and_limits(api: httpx.AsyncClient) -> None:
    await filled(api)

    async def get(**body: Any) -> list[int]:
        answer = (await api.post("/indices/a/metadata/get", json=body)).json()
        assert answer["count"] == len(answer["metadata"])
        return [row["_subset_"] for row in answer["metadata"]]

    assert await get() == [0, 1, 2, 3]
    assert await get(document_ids=[3, 0, 3, 99, -1]) == [3, 0]
    assert await get(document_ids=[99, 3, 0], limit=1) == [3]
    assert await get(document_ids=[]) == []
    assert await get(condition="year > ?", parameters=[2001]) == [2, 3]
    assert await get(condition="year > ?", parameters=[2000], limit=2) == [1, 2]
    assert await get(limit=0) == []
    await refused(api.post("/indices/a/metadata/get", json={"document_ids": [1], "condition": "1=1"}), 400, "BAD_REQUEST")
    await refused(api.post("/indices/a/metadata/get", json={"condition": "nope = ?", "parameters": [1]}), 400, "BAD_REQUEST")
    await refused(api.post("/indices/a/metadata/get", json={"limit": -1}), 422, "UNPROCESSABLE")


async def test_check_count_and_query(api: httpx.AsyncClient) -> None:
    await filled(api)
    checked = (await api.post("/indices/a/metadata/check", json={"document_ids": [9, 0, 9, 0, -1]})).json()
    assert checked == {"existing_ids": [0, 0], "missing_ids": [9, 9, -1], "existing_count": 2, "missing_count": 3}
    empty = (await api.post("/indices/a/metadata/check", json={"document_ids": []})).json()
    assert empty == {"existing_ids": [], "missing_ids": [], "existing_count": 0, "missing_count": 0}
    assert (await api.get("/indices/a/metadata/count")).json() == {"count": 4, "has_metadata": True}
    found = (
        await api.post("/indices/a/metadata/query", json={"condition": "even = ? OR title REGEXP ?", "parameters": [True, "3$"]})
    ).json()
    assert found == {"document_ids": [0, 2, 3], "count": 3}
    for condition, parameters in (("year > 2000", []), ("year = ?", []), ("1=1", [1]), ("a; b", []), ("year = ?", [1, 2])):
        await refused(api.post("/indices/a/metadata/query", json={"condition": condition, "parameters": parameters}), 400, "BAD_REQUEST")


async def test_metadata_updates_are_there_when_they_are_answered(api: httpx.AsyncClient) -> None:
    await filled(api)

    def update(condition: str, updates: Any, *parameters: Any) -> Any:
        return api.post("/indices/a/metadata/update", json={"condition": condition, "parameters": list(parameters), "updates": updates})

    assert (await update("year < ?", {"title": "old"}, 2002)).json() == {"updated": 2}
    assert (await search(api, text_query=["old"]))["results"][0]["document_ids"] == [0, 1]
    assert (await search(api, text_query=["word0"]))["results"][0]["document_ids"] == []
    assert (await update("not even a condition", {})).json() == {"updated": 0}
    assert (await update("year > ?", {"title": "x"}, 3000)).json() == {"updated": 0}
    for updates in ([1], "x", None, {"nope": 1}, {"_subset_": 1}):
        await refused(update("1=1", updates), 400, "BAD_REQUEST")
    await refused(update("nope = ?", {"title": "x"}, 1), 400, "BAD_REQUEST")


# Encoding


async def test_without_a_model_texts_are_a_client_error(api: httpx.AsyncClient) -> None:
    await api.post("/indices", json={"name": "a"})
    texts = {"documents": ["x"], "metadata": [{}]}
    await refused(api.post("/encode", json={"texts": ["x"], "input_type": "query"}), 400, "MODEL_NOT_LOADED")
    await refused(api.post("/rerank_with_encoding", json={"query": "x", "documents": ["y"]}), 400, "MODEL_NOT_LOADED")
    await refused(api.post("/indices/a/update_with_encoding", json=texts), 400, "MODEL_NOT_LOADED")
    await refused(api.post("/indices/none/update_with_encoding", json=texts), 404, "INDEX_NOT_DECLARED")
    await refused(api.post("/indices/none/search_with_encoding", json={"queries": ["x"]}), 400, "MODEL_NOT_LOADED")
    filtered = {"queries": ["x"], "filter_condition": "a = ?"}
    await refused(api.post("/indices/none/search/filtered_with_encoding", json=filtered), 400, "MODEL_NOT_LOADED")
    await refused(api.post("/rerank_with_encoding", json={"query": "", "documents": []}), 400, "BAD_REQUEST")


async def test_texts_are_encoded_added_found_and_reranked() -> None:
    async with client_of(model="hashing") as api:
        assert (await api.get("/health")).json()["model"]["kind"] == "lexical"
        await api.post("/indices", json={"name": "a"})
        texts = ["the warp holds the weft", "sheep graze on the hill", "looms of oak"]
        answer = await api.post("/indices/a/update_with_encoding", json={"documents": texts, "metadata": [{"n": i} for i in range(3)]})
        assert answer.status_code == 202
        found = (
            await api.post("/indices/a/search_with_encoding", json={"queries": ["sheep on a hill", "oak loom"], "params": {"top_k": 1}})
        ).json()
        assert [result["document_ids"] for result in found["results"]] == [[1], [2]]
        filtered = {"queries": ["sheep on a hill"], "filter_condition": "n = ?", "filter_parameters": [0]}
        assert (await api.post("/indices/a/search/filtered_with_encoding", json=filtered)).json()["results"][0]["document_ids"] == [0]
        ranked = (await api.post("/rerank_with_encoding", json={"query": "oak looms", "documents": texts})).json()
        assert ranked["results"][0]["index"] == 2
        assert ranked["num_documents"] == 3
        for path in ("search_with_encoding", "update_with_encoding"):
            key = "queries" if path.startswith("search") else "documents"
            await refused(api.post(f"/indices/a/{path}", json={key: []}), 400, "BAD_REQUEST")


async def test_both_forms_of_an_encoding_agree() -> None:
    async with client_of(model="hashing") as api:
        body = {"texts": ["plain weave", "x"], "input_type": "document", "pool_factor": 0}
        lists = (await api.post("/encode", json=body)).json()
        packed = (await api.post("/encode", json=body, headers={"X-Embeddings-Format": "BASE64"})).json()
        assert set(packed) == {"embeddings_b64", "shapes", "num_texts"}
        for text, shape, rows in zip(packed["embeddings_b64"], packed["shapes"], lists["embeddings"], strict=True):
            assert np.array_equal(np.frombuffer(base64.b64decode(text), "<f4").reshape(shape), np.array(rows, np.float32))
        await refused(api.post("/encode", json={"texts": [], "input_type": "query"}), 400, "BAD_REQUEST")
        await refused(api.post("/encode", json={"texts": ["x"], "input_type": "QUERY"}), 422, "UNPROCESSABLE")


async def test_rerank_is_plain_maxsim_and_stable(api: httpx.AsyncClient) -> None:
    query, *items = vectors(5)
    packed = base64.b64encode(np.array(query, "<f4").tobytes()).decode()
    body = {"query_b64": packed, "query_shape": [3, DIM], "documents": [{"embeddings": item} for item in [*items, items[0]]]}
    answer = (await api.post("/rerank", json=body)).json()
    scores = [float((np.array(query) @ np.array(item).T).max(axis=1).sum()) for item in [*items, items[0]]]
    expected = sorted(range(5), key=lambda i: -scores[i])
    assert [line["index"] for line in answer["results"]] == expected
    assert [line["score"] for line in answer["results"]] == pytest.approx([scores[i] for i in expected], rel=1e-5)
    await refused(api.post("/rerank", json={"query": query, "documents": []}), 400, "BAD_REQUEST")
    await refused(api.post("/rerank", json={"documents": documents(1)}), 400, "BAD_REQUEST")
    await refused(api.post("/rerank", json={"query": [[1.0]], "documents": documents(1)}), 400, "DIMENSION_MISMATCH")
    huge = {"query": [[3e38] * DIM], "documents": [{"embeddings": [[3e38] * DIM]}]}
    await refused(api.post("/rerank", json=huge), 400, "BAD_REQUEST")


# Extensions


async def test_history_pins_and_rollback(api: httpx.AsyncClient) -> None:
    await filled(api)
    pin = (await api.post("/indices/a/pins", json={"pin": "before", "note": "n"})).json()
    assert (pin["generation"], pin["note"]) == (1, "n")
    await delete_documents(api, "a", "1=1")
    lines = (await api.get("/indices/a/generations")).json()["generations"]
    assert [(line["generation"], line["num_documents"], line["pins"], line["current"]) for line in lines] == [
        (2, 0, [], True),
        (1, 4, ["before"], False),
        (0, 0, [], False),
    ]
    assert [line["pin"] for line in (await api.get("/indices/a/pins")).json()["pins"]] == ["before"]
    moved = (await api.post("/indices/a/rollback", json={"pin": "before"})).json()
    assert moved == {"name": "a", "generation": 3, "num_documents": 4}
    assert (await api.get("/indices/a")).json()["num_documents"] == 4
    added = await api.post("/indices/a/update", json={"documents": documents(1), "metadata": [{}]})
    assert added.headers["x-tartan-document-ids"] == "4-4"
    assert (await api.delete("/indices/a/pins/before")).json() == {"deleted": True, "name": "before"}
    await refused(api.delete("/indices/a/pins/before"), 404, "PIN_NOT_FOUND")
    await refused(api.post("/indices/a/rollback", json={"pin": "before"}), 404, "PIN_NOT_FOUND")
    await refused(api.post("/indices/a/rollback", json={"generation": 77}), 404, "GENERATION_NOT_FOUND")
    await refused(api.post("/indices/a/rollback", json={}), 400, "BAD_REQUEST")
    await refused(api.post("/indices/a/pins", json={"pin": "a/b"}), 400, "BAD_REQUEST")


async def test_a_branch_goes_its_own_way(api: httpx.AsyncClient) -> None:
    await filled(api)
    assert (await api.post("/indices/a/branch", json={"name": "b"})).json()["num_documents"] == 4
    await delete_documents(api, "b", "year > ?", 2000)
    assert (await api.get("/indices/a")).json()["num_documents"] == 4
    assert (await api.get("/indices/b")).json()["num_documents"] == 1
    await refused(api.post("/indices/a/branch", json={"name": "b"}), 409, "INDEX_ALREADY_EXISTS")
    await refused(api.post("/indices/none/branch", json={"name": "c"}), 404, "INDEX_NOT_FOUND")


async def test_an_alias_serves_reads_and_writes_and_moves_for_everybody_at_once() -> None:
    store = open_store("memory://")
    async with client_of(store) as one, client_of(store) as two:
        await filled(one, "blue", n=2)
        await filled(one, "green", n=3)
        assert (await one.put("/aliases/live", json={"index": "blue"})).json() == {"alias": "live", "index": "blue"}
        assert (await two.get("/indices/live")).json()["num_documents"] == 2
        await two.post("/indices/live/update", json={"documents": documents(1), "metadata": [{}]})
        assert (await one.get("/indices/blue")).json()["num_documents"] == 3
        await one.put("/aliases/live", json={"index": "green"})
        assert (await two.get("/indices/live")).json()["name"] == "live"
        assert (await two.post("/indices/live/metadata/query", json={"condition": "1=1"})).json()["count"] == 3
        assert (await two.get("/aliases")).json() == {"aliases": [{"alias": "live", "index": "green"}]}
        await refused(two.put("/aliases/live", json={"index": "none"}), 404, "INDEX_NOT_FOUND")
        await refused(two.put("/aliases/blue", json={"index": "green"}), 409, "INDEX_ALREADY_EXISTS")
        await refused(two.post("/indices", json={"name": "live"}), 409, "INDEX_ALREADY_EXISTS")
        await refused(two.delete("/indices/live"), 400, "BAD_REQUEST")
        assert (await two.get("/indices")).json() == ["blue", "green"]
        assert (await one.delete("/aliases/live")).json() == {"deleted": True, "name": "live"}
        await refused(two.get("/indices/live"), 404, "INDEX_NOT_FOUND")
        await refused(two.get("/aliases/live"), 404, "ALIAS_NOT_FOUND")
        await refused(one.delete("/aliases/live"), 404, "ALIAS_NOT_FOUND")


async def test_export_is_one_line_of_json_per_document(api: httpx.AsyncClient) -> None:
    matrices = await filled(api)
    await delete_documents(api, "a", "year = ?", 2001)
    answer = await api.get("/indices/a/export")
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert [line["document_id"] for line in lines] == [0, 2, 3]
    exported = np.frombuffer(base64.b64decode(lines[1]["embeddings_b64"]), "<f4").reshape(lines[1]["shape"])
    original = np.array(matrices[2])
    assert np.allclose(exported, original / np.linalg.norm(original, axis=1, keepdims=True), atol=2e-3)
    assert lines[1]["metadata"]["title"] == "word2"
    slim = (await api.get("/indices/a/export?vectors=false")).text.splitlines()
    assert "embeddings_b64" not in json.loads(slim[0])
    assert (await api.get("/indices/a/pins")).json() == {"pins": []}
    await refused(api.get("/indices/none/export"), 404, "INDEX_NOT_FOUND")


async def test_the_self_test_and_warming(api: httpx.AsyncClient) -> None:
    await filled(api, n=12)
    recall = (await api.post("/indices/a/recall", json={"n_queries": 5, "top_k": 3})).json()
    assert (recall["num_queries"], recall["top_k"], recall["recall"]) == (5, 3, 1.0)
    assert (await api.post("/indices/a/recall")).status_code == 200
    warmed = (await api.post("/indices/a/warm")).json()
    assert warmed["memory_usage_bytes"] > 0
    await refused(api.post("/indices/none/warm"), 404, "INDEX_NOT_FOUND")


# Together


async def test_concurrent_clients_leave_what_a_model_says(api: httpx.AsyncClient) -> None:
    """Adds, deletes and searches at once; at the end the index holds exactly what was added and not deleted."""
    await api.post("/indices", json={"name": "a"})
    rng = np.random.default_rng(4)
    expected: set[int] = set()

    async def writer(number: int) -> None:
        for step in range(4):
            body = {
                "documents": documents(3, seed=int(rng.integers(1000))),
                "metadata": [{"who": number, "step": step, "n": n} for n in range(3)],
            }
            assert (await api.post("/indices/a/update", json=body)).status_code == 202
            expected.update(number * 100 + step * 10 + n for n in range(3))
            answer = await delete_documents(api, "a", "who = ? AND step = ? AND n = ?", number, step, step % 3)
            assert answer.status_code == 202
            expected.discard(number * 100 + step * 10 + step % 3)
            await search(api, queries=[{"embeddings": vectors(1)[0]}])

    await asyncio.gather(*(writer(number) for number in range(4)))
    rows = (await api.get("/indices/a/metadata")).json()["metadata"]
    assert sorted(row["who"] * 100 + row["step"] * 10 + row["n"] for row in rows) == sorted(expected)
    ids = [row["_subset_"] for row in rows]
    assert len(set(ids)) == len(ids) == (await api.get("/indices/a")).json()["num_documents"]


# Settings


def test_settings_come_from_their_variables_and_overrides_win() -> None:
    settings = Settings.from_environment(
        {"TARTAN_PORT": "9", "RATE_LIMIT_ENABLED": "yes", "TARTAN_WARM": "a, b", "TARTAN_MODEL": " "}, port=10, host=None
    )
    assert (settings.port, settings.rate_limit_enabled, settings.warm, settings.model, settings.host) == (
        10,
        True,
        ("a", "b"),
        "",
        "0.0.0.0",
    )
    for name, text in (("CONCURRENCY_LIMIT", "0"), ("TARTAN_CORS", "perhaps"), ("TARTAN_TIMEOUT_S", "nan")):
        with pytest.raises(ValueError, match=name):
            Settings.from_environment({name: text})


def test_every_setting_survives_the_way_through_the_environment() -> None:
    settings = Settings(query_length=7, warm=("a", "b"), compact=False, drain_s=0.5, api_keys="[]")
    assert Settings.from_environment(settings.to_environment()) == settings
    assert {setting.field for setting in SETTINGS} == set(Settings.__struct_fields__)
    variables = [variable for setting in SETTINGS for variable in setting.variables]
    assert len(set(variables)) == len(variables)


def test_the_packaged_page_has_its_licence() -> None:
    from handler.routes.service import STATIC

    assert (STATIC / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert (STATIC / "NOTICE").is_file()


def test_the_partitions_of_an_index_are_those_of_the_codec_that_was_trained_on_most() -> None:
    """Not of the one with the greatest id: ids follow the clocks of machines."""
    empty = {"dim": DIM, "nbits": 4, "size_bytes": 1, "sections": (), "coarse": b"", "cell_offsets": b"", "centroid_checksums": b""}
    older = CodecRef(id="B", n_centroids=16, n_tokens_trained=100, **empty)  # type: ignore[arg-type]
    newer = CodecRef(id="A", n_centroids=64, n_tokens_trained=900, **empty)  # type: ignore[arg-type]
    manifest = Manifest(index_id="I", generation=1, created_s=0.0, cause="", writer="W", config=IndexConfig(), codecs=(older, newer))
    assert numbers_of(manifest)["num_partitions"] == 64
    assert Snapshot(Reader(open_store("memory://")), "a", manifest).n_centroids == 64
