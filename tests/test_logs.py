"""The log: what a request's line says, at which level, and what no line ever says."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engine.errors import CorruptData
from engine.store.objects import open_store
from engine.store.wrappers import FaultyStore
from handler.app import create_app
from handler.auth import SCOPES, mint_key
from handler.logs import make_logger
from handler.routes.table import ENDPOINTS
from handler.runtime import Runtime
from handler.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
SECRET = "plantedsecret"
VALUE = 0.123456789
"""A component of every vector sent: neither as a number nor in base64 may it show."""


def app_of(level: str = "debug", store: Any = None, **settings: Any) -> tuple[httpx.AsyncClient, io.StringIO]:
    runtime = Runtime(Settings(search_threads=1, log_level=level, **settings), store=store or open_store("memory://"))
    log = io.StringIO()
    runtime.__dict__["log"] = make_logger(level, stream=log)
    transport = httpx.ASGITransport(create_app(runtime=runtime))  # type: ignore[arg-type]
    client = httpx.AsyncClient(transport=transport, base_url="http://server")
    client.runtime = runtime  # type: ignore[attr-defined]
    return client, log


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


async def fill(api: httpx.AsyncClient) -> None:
    await api.post("/indices", json={"name": "a", "config": {"nbits": 4}})
    body = {"documents": [{"embeddings": [[VALUE, 0.5]]}, {"embeddings": [[0.5, VALUE]]}], "metadata": [{"n": 1, "t": SECRET}, {"n": 2}]}
    assert (await api.post("/indices/a/update", json=body)).status_code == 202


async def search(api: httpx.AsyncClient, **more: Any) -> httpx.Response:
    return await api.post("/indices/a/search", json={"queries": [{"embeddings": [[VALUE, 0.5]]}], **more})


async def test_one_line_for_each_request_says_what_was_done_and_what_it_cost() -> None:
    api, log = app_of()
    await fill(api)
    await search(api)
    await search(api)
    created, added, _, searched = lines(log)
    assert (created["route"], created["status"]) == ("/indices", 200)
    assert (added["route"], added["documents"], added["generation"]) == ("/indices/{name}/update", 2, 1)
    assert added["stages_ms"]["commit"] > 0
    assert {"event": "request", "level": "info", "method": "POST", "index": "a", "generation": 1, "status": 200}.items() <= searched.items()
    assert searched["rounds"] == 1
    assert searched["requests"] == 1
    assert searched["usd"] == pytest.approx(0.4e-6)
    assert searched["bytes"] >= 0
    assert searched["queries"] == 1
    assert searched["ms"] > searched["stages_ms"]["search"] > searched["stages_ms"]["flat"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", searched["timestamp"])


async def test_the_request_id_of_the_answer_is_that_of_the_line() -> None:
    api, log = app_of()
    given = await api.get("/livez", headers={"X-Request-ID": "mine-1"})
    made = await api.get("/livez")
    assert [line["request_id"] for line in lines(log)] == ["mine-1", made.headers["x-request-id"]]
    assert given.headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize(("level", "n_lines"), [("info", 2), ("warning", 1), ("error", 0), ("off", 0), ("tartan=warn,tower=info", 1)])
async def test_the_setting_decides_which_lines_are_written(level: str, n_lines: int) -> None:
    faulty = FaultyStore(open_store("memory://"))
    api, log = app_of(level, faulty)
    await api.get("/livez")
    faulty._schedule = lambda call: "unavailable"
    await api.get("/indices/a")
    requests = [line for line in lines(log) if line["event"] == "request"]
    assert len(requests) == n_lines
    if level == "warning":
        assert requests[0]["level"] == "warning"
        assert requests[0]["error_code"] == "SERVICE_UNAVAILABLE"


def planted(value: Any) -> Any:
    """A body with secrets wherever a client may write: in every string, and as a component of every vector."""
    if isinstance(value, dict):
        return {key: planted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [planted(item) for item in value]
    if isinstance(value, float):
        return VALUE
    return f"{value} {SECRET}" if isinstance(value, str) else value


def marks() -> set[str]:
    packed = base64.b64encode(np.full(4, VALUE, np.float32).tobytes()).decode()[2:14]
    return {SECRET, str(VALUE), f"{VALUE:.6f}", str(float(np.float32(VALUE)))[:9], packed}


async def test_no_endpoint_leaves_a_secret_in_the_log_whatever_happens() -> None:
    """Every endpoint, at the most talkative level: as it should be called, with planted values, with a wrong key, and over a store that fails."""
    key, record = mint_key(SCOPES)
    faulty = FaultyStore(open_store("memory://"))
    import msgspec

    records = msgspec.json.encode([record]).decode()
    api, log = app_of("debug", faulty, api_keys=records, model="hashing")
    api.headers.update({"Authorization": f"Bearer {key}"})
    await fill(api)
    for endpoint in ENDPOINTS:
        for schedule in ({}, lambda call: "unavailable"):
            faulty._schedule = schedule
            await call(api, endpoint, endpoint.request_example)
            await call(api, endpoint, planted(endpoint.request_example))
            faulty._schedule = {}
    await api.post("/indices/a/update", content=b'{"documents": [' + SECRET.encode(), headers={"content-type": "application/json"})
    await api.get(f"/indices/a?secret={SECRET}", headers={"Authorization": f"Bearer {SECRET}"})
    text = log.getvalue()
    assert len(text.splitlines()) > 4 * len(ENDPOINTS)
    found = [mark for mark in {*marks(), key, key.partition("_")[2][-12:], "Bearer", "Cookie"} if mark in text]
    assert not found, [line for line in text.splitlines() if found[0] in line][:2]


async def call(api: httpx.AsyncClient, endpoint: Any, body: Any) -> None:
    path = endpoint.path.replace("{name}", "a").replace("{alias}", "live").replace("{pin}", "p").replace("{file}", "swagger-ui.css")
    headers = {"Cookie": f"session={SECRET}", "X-Api-Key": SECRET, "User-Agent": SECRET}
    more = {} if endpoint.body is None else {"json": body}
    if endpoint.method == "DELETE" and endpoint.path == "/indices/{name}":
        return
    await api.request(endpoint.method, path, headers=headers, params={"q": SECRET}, **more)


async def test_a_mistake_of_ours_is_logged_with_its_places_and_without_what_it_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    api, log = app_of("info")
    await fill(api)

    async def quote(*arguments: Any, **more: Any) -> Any:
        raise ValueError(f"cannot take {SECRET}") from KeyError(SECRET)

    monkeypatch.setattr(api.runtime.searcher, "search", quote)  # type: ignore[attr-defined]
    answer = await search(api)
    assert answer.status_code == 500
    failure = next(line for line in lines(log) if line["event"] == "failed")
    assert "test_logs.py" in failure["exception"]
    assert "builtins.ValueError" in failure["exception"]
    assert "builtins.KeyError" in failure["exception"]
    assert failure["request_id"] == answer.headers["x-request-id"]
    assert SECRET not in log.getvalue()
    assert SECRET not in answer.text


async def test_our_own_errors_keep_their_message_and_a_developer_sees_all() -> None:
    for level, error, shown in (("info", CorruptData("bad bytes", object="x"), "bad bytes"), ("debug", ValueError("whole"), "whole")):
        log = io.StringIO()
        make_logger(level, stream=log).error("failed", exc_info=error)
        assert shown in lines(log)[0]["exception"]


async def test_the_manual_names_the_fields_that_there_are() -> None:
    """docs/logging.md: its table and its recipes use only fields of real lines, and the table lists all of them."""
    manual = (ROOT / "docs/logging.md").read_text()
    table = set(re.findall(r"^\| `([a-z_]+)`", manual, re.MULTILINE))
    api, log = app_of(model="hashing")
    await fill(api)
    await search(api)
    await api.post("/indices/a/search_with_encoding", json={"queries": ["weft"]})
    await api.post(
        "/indices/a/search", json={"queries": [{"embeddings": [[1.0]]}]}, headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    )
    await api.request("DELETE", "/indices/a/documents", json={"condition": "n = ?", "parameters": [1]})
    seen = {name for line in lines(log) for name in line}
    assert seen <= table, "the table lacks these"
    assert table <= seen | {"key_id", "conflicts", "exception", "error", "code"}, "the table has fields that no line has"
    for block in re.findall(r"```(?:sql|logql|json|text)\n(.*?)```", manual, re.DOTALL):
        for name in re.findall(r"\b(?:stages_ms[._])?([a-z]+(?:_[a-z]+)+)\b", block):
            stages = {stage for line in lines(log) for stage in line.get("stages_ms", {})}
            assert name in table | stages | {"stages_ms"} | _QUERY_WORDS, name


_QUERY_WORDS = {
    "count_over_time",
    "quantile_over_time",
    "sum_over_time",
    "date_histogram",
    "track_total_hits",
    "query_string",
    "fixed_interval",
}
