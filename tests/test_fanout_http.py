"""Fan-out behind the HTTP API: peers and the state machine give the answers of one server; keys, failures and what does not fit."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from engine.config import SearchParams
from engine.fanout import messages
from engine.fanout.messages import Plan
from engine.fanout.plan import make_plan
from engine.index.reader import Snapshot
from engine.store.base import ObjectStore
from handler.app import create_app
from handler.auth import mint_key
from handler.fanout import Peers, StateMachine, make_transport
from handler.runtime import Runtime
from handler.settings import Settings
from test_fanout import CORPUS, InProcess, mixed

PEERS = ("http://p0", "http://p1", "http://p2")
QUERY = {"embeddings": CORPUS.queries[0].tolist()}
BODIES: dict[str, dict[str, Any]] = {
    "plain": {"queries": [QUERY, {"embeddings": CORPUS.queries[1].tolist()}], "params": {"top_k": 7}},
    "condition": {"queries": [QUERY], "filter_condition": "n > ? AND kind = ?", "filter_parameters": [150, "even"], "with_ids": True},
    "subset": {"queries": [QUERY], "subset": [1, 5, 80, 210, 211, 212, 430, 431, 7000]},
    "nothing": {"queries": [QUERY], "subset": []},
    "hybrid": {"queries": [QUERY], "text_query": ["odd"], "filter_condition": "n < ?", "filter_parameters": [400]},
}


def runtime_of(store: ObjectStore, **settings: Any) -> Runtime:
    return Runtime(Settings(**{"log_level": "off", "search_threads": 1, "fanout_bytes": 0, **settings}), store=store)


def client_of(runtime: Runtime) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(runtime=runtime))  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://server")


class Deaf(httpx.AsyncBaseTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")


def among_peers(store: ObjectStore, deaf: tuple[int, ...] = (), **settings: Any) -> tuple[httpx.AsyncClient, list[str]]:
    """A server that asks three peers, which see the same store; and what arrived at them."""
    runtime = runtime_of(store, fanout_peers=PEERS, **settings)
    arrived: list[str] = []

    async def note(request: httpx.Request) -> None:
        arrived.append(f"{request.url.host} {request.url.path}")

    mounts: dict[str, httpx.AsyncBaseTransport] = {
        url: Deaf() if n in deaf else httpx.ASGITransport(create_app(runtime=runtime_of(store, **settings)))  # type: ignore[arg-type]
        for n, url in enumerate(PEERS)
    }
    assert isinstance(runtime.transport, Peers)
    runtime.transport._clients.append(httpx.AsyncClient(mounts=mounts, event_hooks={"request": [note]}))
    return client_of(runtime), arrived


@pytest.fixture(scope="module")
def index() -> tuple[ObjectStore, Snapshot]:
    return asyncio.run(mixed())


@pytest.fixture
async def alone(index: tuple[ObjectStore, Snapshot]) -> AsyncIterator[httpx.AsyncClient]:
    """A server by itself, the index in memory."""
    async with client_of(runtime_of(index[0])) as client:
        assert (await client.post("/indices/x/warm")).status_code == 202 or (await client.post("/indices/x/warm")).status_code == 200
        yield client


async def results(client: httpx.AsyncClient, body: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    answer = await client.post("/indices/x/search", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["results"])


@pytest.mark.parametrize("name", BODIES)
async def test_peers_give_the_answers_of_one_server(index: tuple[ObjectStore, Snapshot], alone: httpx.AsyncClient, name: str) -> None:
    client, arrived = among_peers(index[0])
    async with client:
        assert await results(client, BODIES[name]) == await results(alone, BODIES[name])
    assert {"p0 /internal/shard", "p1 /internal/shard", "p2 /internal/shard"} == set(arrived)


async def test_a_peer_that_does_not_answer_is_replaced(index: tuple[ObjectStore, Snapshot], alone: httpx.AsyncClient) -> None:
    client, _ = among_peers(index[0], deaf=(1,))
    async with client:
        assert await results(client, BODIES["plain"]) == await results(alone, BODIES["plain"])


async def test_no_peer_is_an_outage_and_never_an_empty_answer(index: tuple[ObjectStore, Snapshot]) -> None:
    client, _ = among_peers(index[0], deaf=(0, 1, 2))
    async with client:
        for body in (BODIES["plain"], {**BODIES["plain"], "allow_partial": True}):
            answer = await client.post("/indices/x/search", json=body)
            assert answer.status_code == 503
            assert "a shard of the search failed" in answer.json()["message"]
            assert "http://p" not in answer.json()["message"], "addresses of servers are not for clients"


async def test_an_index_below_the_size_is_searched_by_one_server(index: tuple[ObjectStore, Snapshot]) -> None:
    client, arrived = among_peers(index[0], fanout_bytes=1 << 40)
    async with client:
        assert len((await results(client, BODIES["plain"]))[0]["document_ids"]) == 7
    assert not arrived


async def test_a_bad_condition_is_refused_before_peers_are_asked(index: tuple[ObjectStore, Snapshot]) -> None:
    client, arrived = among_peers(index[0])
    async with client:
        answer = await client.post(
            "/indices/x/search", json={"queries": [QUERY], "filter_condition": "nowhere = 1", "filter_parameters": []}
        )
    assert answer.status_code == 400
    assert answer.json()["message"].startswith("invalid filter condition: ")
    assert not arrived


async def test_peers_are_asked_with_the_callers_key_and_obey_its_pattern(index: tuple[ObjectStore, Snapshot]) -> None:
    store, snapshot = index
    keys = {pattern: mint_key(["search"], indices=pattern) for pattern in ("x", "y")}
    records = msgspec.json.encode([record for _, record in keys.values()]).decode()
    client, arrived = among_peers(store, api_keys=records)
    async with client:
        assert len(await results(client, BODIES["plain"], authorization=f"Bearer {keys['x'][0]}")) == 2
        assert arrived
        plan = make_plan(snapshot, CORPUS.queries[0], SearchParams(k=3), InProcess(store, 1))
        step = messages.encode(messages.Step(do="score", job=plan.job, shard=plan.shards[0]))
        json_type = {"content-type": "application/json"}
        for key, status in ((keys["x"][0], 200), (keys["y"][0], 403), ("nonsense", 401)):
            answer = await client.post("/internal/shard", content=step, headers={"x-api-key": key, **json_type})
            assert answer.status_code == status, answer.text


async def test_peers_say_what_is_wrong_with_a_step(index: tuple[ObjectStore, Snapshot]) -> None:
    store, snapshot = index
    plan = make_plan(snapshot, CORPUS.queries[0], SearchParams(k=3), InProcess(store, 1))
    async with client_of(runtime_of(store)) as client:
        for change, status, code in (
            ({"generation": 999}, 404, "GENERATION_NOT_FOUND"),
            ({"index": "nowhere"}, 404, "INDEX_NOT_FOUND"),
            ({"dim": 16}, 400, "DIMENSION_MISMATCH"),
            ({"dim": 7}, 400, "BAD_REQUEST"),
        ):
            job = msgspec.structs.replace(plan.job, **change)  # type: ignore[arg-type]
            body = messages.encode(messages.Step(do="score", job=job, shard=plan.shards[0]))
            answer = await client.post("/internal/shard", content=body, headers={"content-type": "application/json"})
            assert (answer.status_code, answer.json()["code"]) == (status, code)


# The state machine, its client replaced: what AWS is asked and what its answers mean


class Executions:
    """Stands for the SDK's client: the machine's states done in this process."""

    def __init__(self, store: ObjectStore, failure: dict[str, str] | None = None) -> None:
        self.process, self.failure, self.inputs = InProcess(store, 0), failure, []

    async def start_sync_execution(self, *, stateMachineArn: str, input: str) -> dict[str, Any]:
        self.inputs.append((stateMachineArn, input))
        assert len(input) <= 256 << 10
        if self.failure is not None:
            return self.failure
        outcomes = await self.process.run(messages.read(messages.plain(msgspec.json.decode(input)["plan"]), Plan))
        return {"status": "SUCCEEDED", "output": messages.encode({"results": outcomes}).decode()}


def by_machine(store: ObjectStore, **more: Any) -> tuple[httpx.AsyncClient, Executions]:
    runtime = runtime_of(store, fanout_machine="arn:aws:states:eu-west-1:1:stateMachine:search", fanout_shard_bytes=30_000)
    executions = Executions(store, **more)
    assert isinstance(runtime.transport, StateMachine)
    runtime.transport._client = executions
    return client_of(runtime), executions


@pytest.mark.parametrize("name", ["plain", "condition", "subset"])
async def test_the_state_machine_gives_the_answers_of_one_cold_server(index: tuple[ObjectStore, Snapshot], name: str) -> None:
    client, executions = by_machine(index[0])
    async with client, client_of(runtime_of(index[0])) as alone:
        assert await results(client, BODIES[name]) == await results(alone, BODIES[name])
    assert len(executions.inputs) == len(BODIES[name]["queries"])
    assert executions.process.steps
    assert {step.do for step in executions.process.steps} == {"score"}


async def test_a_query_that_does_not_fit_is_searched_by_one_server(
    index: tuple[ObjectStore, Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StateMachine, "max_state_bytes", 20_000)
    long = np.random.default_rng(3).standard_normal((160, 32)).astype(np.float32)
    for condition in ({}, {"filter_condition": "kind = ?", "filter_parameters": ["odd"]}):
        body = {"queries": [{"embeddings": long.tolist()}], **condition}
        client, executions = by_machine(index[0])
        async with client, client_of(runtime_of(index[0])) as alone:
            assert await results(client, body) == await results(alone, body)
        assert not executions.inputs


@pytest.mark.parametrize(
    ("failure", "status", "words"),
    [
        ({"status": "TIMED_OUT"}, 503, "TIMED_OUT"),
        (
            {
                "status": "FAILED",
                "error": "CorruptData",
                "cause": '{"errorType":"CorruptData","errorMessage":"[missing-object] gone object=x/y"}',
            },
            500,
            "gone object=x/y",
        ),
        ({"status": "FAILED", "error": "States.DataLimitExceeded", "cause": "too large"}, 503, "too large"),
    ],
)
async def test_a_failed_execution_says_why(index: tuple[ObjectStore, Snapshot], failure: dict[str, str], status: int, words: str) -> None:
    client, _ = by_machine(index[0], failure=failure)
    async with client:
        answer = await client.post("/indices/x/search", json=BODIES["plain"])
    assert answer.status_code == status, answer.text
    assert words in answer.json()["message"]


async def test_a_partial_answer_names_the_shard_on_the_wire(index: tuple[ObjectStore, Snapshot]) -> None:
    client, executions = by_machine(index[0])
    executions.process.faults[1] = [TimeoutError("60 s"), TimeoutError("60 s")]
    async with client:
        [result] = await results(client, {"queries": [QUERY], "allow_partial": True})
        assert result["failed_shards"] == [{"shard": 1, "error": "TimeoutError", "cause": "60 s"}]
        assert result["document_ids"]
        executions.process.faults[1] = [TimeoutError("60 s")]
        assert (await client.post("/indices/x/search", json={"queries": [QUERY]})).status_code == 503


def test_only_one_transport_can_be_configured() -> None:
    assert make_transport(Settings()) is None
    with pytest.raises(ValueError, match="exclude"):
        make_transport(Settings(fanout_machine="arn", fanout_peers=("http://a",)))


async def test_an_ordinary_server_never_loads_the_transports() -> None:
    import subprocess
    import sys

    code = "import sys, handler.app, handler.routes.table; print([m for m in ('aioboto3', 'boto3', 'botocore', 'aiohttp') if m in sys.modules])"
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_closing_a_runtime_closes_its_connections_to_others(index: tuple[ObjectStore, Snapshot], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aioboto3", reason="package tartan[aws]")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    machine = runtime_of(index[0], fanout_machine="arn:aws:states:us-east-1:1:stateMachine:s", sfn_endpoint="http://127.0.0.1:9")
    peers = runtime_of(index[0], fanout_peers=PEERS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert isinstance(machine.transport, StateMachine) and isinstance(peers.transport, Peers)
        assert await machine.transport._made_client()
        connections = peers.transport._client()
        await machine.aclose()
        await peers.aclose()
        assert machine.transport._client is None
        assert connections.is_closed
        del machine, peers, connections
        gc.collect()
    assert [str(one.message) for one in caught if issubclass(one.category, ResourceWarning)] == []
