"""Access control: every endpoint with every scope, index patterns, open areas, and that keys leave no trace."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from engine.store.objects import open_store
from handler.app import create_app
from handler.auth import SCOPES, KeyRecord, digest, mint_key, parse_records
from handler.logs import make_logger
from handler.routes.endpoint import Endpoint
from handler.routes.table import ENDPOINTS
from handler.runtime import Runtime
from handler.settings import Settings

KEYS: dict[str, tuple[str, KeyRecord]] = {scope: mint_key([scope], note=scope) for scope in SCOPES}
KEYS["all of team-*"] = mint_key(SCOPES, indices="team-*")


def records() -> str:
    import msgspec

    return msgspec.json.encode([record for _, record in KEYS.values()]).decode()


def app_of(**settings: Any) -> tuple[httpx.AsyncClient, io.StringIO]:
    runtime = Runtime(Settings(api_keys=records(), search_threads=1, **settings), store=open_store("memory://"))
    log = io.StringIO()
    runtime.__dict__["log"] = make_logger("debug", stream=log)
    transport = httpx.ASGITransport(create_app(runtime=runtime))  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://server"), log


@pytest.fixture
async def api() -> AsyncIterator[httpx.AsyncClient]:
    client, _ = app_of()
    async with client:
        yield client


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name][0]}"}


async def call(api: httpx.AsyncClient, endpoint: Endpoint, headers: dict[str, str]) -> httpx.Response:
    path = endpoint.path.replace("{name}", "team-a").replace("{alias}", "live").replace("{pin}", "p").replace("{file}", "swagger-ui.css")
    body = {} if endpoint.body is None else {"json": endpoint.request_example}
    return await api.request(endpoint.method, path, headers=headers, **body)  # type: ignore[arg-type]


async def test_each_endpoint_opens_to_its_scope_and_to_no_other(api: httpx.AsyncClient) -> None:
    for endpoint in ENDPOINTS:
        await check_scopes(api, endpoint)


async def check_scopes(api: httpx.AsyncClient, endpoint: Endpoint) -> None:
    is_open = endpoint.area in ("health", "docs", "probe")
    missing = await call(api, endpoint, {})
    assert (missing.status_code == 401) is not is_open, endpoint.name
    if not is_open:
        assert missing.json()["code"] == "UNAUTHORIZED"
        assert missing.headers["www-authenticate"] == "Bearer"
    for scope in SCOPES:
        answer = await call(api, endpoint, bearer(scope))
        if is_open or endpoint.scope is None or endpoint.scope == scope:
            assert answer.status_code not in (401, 403), answer.text
        else:
            assert (answer.status_code, answer.json()["code"]) == (403, "FORBIDDEN"), (endpoint.name, scope)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer nonsense"},
        {"Authorization": "Bearer " + KEYS["search"][0][:-1]},
        {"Authorization": "Bearer " + KEYS["search"][1].sha256},
        {"X-API-Key": "nonsense"},
        {"Authorization": "Basic " + KEYS["search"][0]},
        {"Authorization": "Bearer "},
    ],
)
async def test_what_is_no_key_is_refused(api: httpx.AsyncClient, headers: dict[str, str]) -> None:
    answer = await api.get("/indices", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHORIZED")


async def test_both_headers_carry_keys(api: httpx.AsyncClient) -> None:
    assert (await api.get("/indices", headers={"X-API-Key": KEYS["search"][0]})).status_code == 200
    assert (await api.get("/indices", headers={"Authorization": f"bearer {KEYS['search'][0]}"})).status_code == 200


async def test_a_pattern_hides_other_indices_wherever_a_name_may_stand(api: httpx.AsyncClient) -> None:
    team, every = bearer("all of team-*"), bearer("admin")
    documents = {"documents": [{"embeddings": [[1.0, 2.0]]}]}
    for name in ("team-a", "other"):
        assert (await api.post("/indices", json={"name": name}, headers=every)).status_code == 200
        assert (await api.post(f"/indices/{name}/update", json=documents, headers=bearer("write"))).status_code == 202
    assert (await api.get("/indices", headers=team)).json() == ["team-a"]
    assert [line["name"] for line in (await api.get("/health", headers=team)).json()["indices"]] == ["team-a"]
    assert (await api.get("/health")).json()["indices"] == []
    assert (await api.get("/indices/team-a", headers=team)).status_code == 200
    for request in (
        api.get("/indices/other", headers=team),
        api.get("/indices/none", headers=team),
        api.delete("/indices/other", headers=team),
        api.post("/indices", json={"name": "others"}, headers=team),
        api.post("/indices/team-a/branch", json={"name": "others"}, headers=team),
        api.put("/aliases/team-live", json={"index": "other"}, headers=team),
        api.put("/aliases/live", json={"index": "team-a"}, headers=team),
    ):
        assert (await request).status_code == 403
    assert (await api.put("/aliases/team-x", json={"index": "other"}, headers=every)).status_code == 200
    assert (await api.get("/indices/team-x", headers=team)).status_code == 403
    assert (await api.get("/aliases", headers=team)).json() == {"aliases": []}
    assert (await api.delete("/aliases/team-x", headers=team)).status_code == 403


async def test_health_and_documents_can_be_closed_but_probes_stay_open() -> None:
    client, _ = app_of(open_areas=())
    async with client as api:
        for path in ("/", "/health", "/swagger-ui", "/api-docs/openapi.json", "/metrics"):
            assert (await api.get(path)).status_code == 401
            assert (await api.get(path, headers=bearer("search"))).status_code == 200
        for path in ("/livez", "/readyz"):
            assert (await api.get(path)).status_code == 200


async def test_metrics_can_be_opened() -> None:
    client, _ = app_of(open_areas=("metrics",))
    async with client as api:
        assert (await api.get("/metrics")).status_code == 200


async def test_a_log_line_names_the_key_by_id_and_holds_nothing_secret() -> None:
    client, log = app_of()
    traced = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "Cookie": "secret-cookie"}
    async with client as api:
        await api.post("/indices", json={"name": "team-a"}, headers=bearer("admin") | traced)
        body = {"documents": [{"embeddings": [[1.25, 2.5]]}], "metadata": [{"title": "secret-title"}]}
        await api.post("/indices/team-a/update", json=body, headers=bearer("write"))
        await api.post(
            "/indices/team-a/search", json={"queries": body["documents"], "text_query": ["secret-title"]}, headers=bearer("search")
        )
        await api.get("/indices", headers={"X-API-Key": "a wrong key"})
        await api.get("/nowhere?secret-query")
    text = log.getvalue()
    for secret in ("secret", "1.25", "a wrong key", *(key for key, _ in KEYS.values()), *(record.sha256 for _, record in KEYS.values())):
        assert secret not in text
    lines = [json.loads(line) for line in text.splitlines()]
    created, added, searched, refused, lost = (line for line in lines if line["event"] == "request")
    assert (created["key_id"], created["trace_id"]) == (KEYS["admin"][1].id, "0af7651916cd43dd8448eb211c80319c")
    assert (added["route"], added["status"], added["index"], added["generation"], added["documents"]) == (
        "/indices/{name}/update", 202, "team-a", 1, 1,
    )  # fmt: skip
    assert {"stages_ms", "rounds", "bytes", "requests", "ms", "request_id"} <= set(searched)
    assert (refused["status"], refused["error_code"]) == (401, "UNAUTHORIZED")
    assert (lost["status"], "route" in lost) == (404, False)


def test_a_minted_key_is_stored_only_as_its_digest() -> None:
    key, record = mint_key(["search", "write"], indices="a*", note="n")
    assert record.sha256 == digest(key)
    assert key not in repr(record)
    assert parse_records(f"[{json.dumps({'id': '1', 'sha256': record.sha256, 'scopes': ['search']})}]")[0].indices == "*"
    assert record.may_see("ab")
    assert not record.may_see("Ab")
    for scopes in ([], ["root"]):
        with pytest.raises(ValueError, match="scopes"):
            mint_key(scopes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '[{"id": "1"}]',
        '[{"id": "1", "sha256": "short", "scopes": ["search"]}]',
        '[{"id": "1", "sha256": "' + "0" * 64 + '", "scopes": ["root"]}]',
        '[{"id": "1", "sha256": "' + "0" * 64 + '", "scopes": [], "typo": 1}]',
    ],
)
def test_unreadable_records_stop_the_server_rather_than_open_it(text: str) -> None:
    with pytest.raises(ValueError, match="API keys"):
        create_app(Settings(api_keys=text))
