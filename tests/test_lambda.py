"""The function: events of every kind in, answers out, limits, what survives between invocations, and the real runtime around it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import gzip
import http.client
import io
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from next_plaid_client import NextPlaidClient
from next_plaid_client.exceptions import IndexExistsError
from next_plaid_client.models import IndexConfig as ClientConfig
from next_plaid_client.models import SearchParams as ClientParams

from conftest import BUCKET, s3_options
from engine.config import IndexConfig, MaintenanceParams, SearchParams
from engine.errors import Conflict
from engine.format import names
from engine.index import sweep as sweep_module
from engine.index import uploads
from engine.index.commit import create
from engine.index.operations import Add
from engine.index.reader import Reader
from engine.searcher import Searcher
from engine.store.base import ObjectStore
from engine.store.objects import open_store
from engine.store.wrappers import CountingStore, FaultyStore, WorldStopped
from handler import lambda_http
from handler.lambda_http import LambdaHandler
from handler.runtime import Runtime
from handler.settings import Settings
from infra.local.lambda_gateway import Emulator, FunctionError, Gateway, gateway
from lambda_runtime import KINDS, answer_of, make_event, needed_emulator
from s3_server import S3Server
from serving import s3_environment

DIM = 8
UPLOAD = "01KATR0000000000000000000A"
RNG = np.random.default_rng(3)
VECTORS = RNG.standard_normal((6, 3, DIM)).astype(np.float32)


MADE: list[LambdaHandler] = []


@pytest.fixture(autouse=True)
def _close_handlers() -> Iterator[None]:
    """Lambda never closes a handler; the tests must, for their warnings are errors."""
    yield
    while MADE:
        MADE.pop().close()
    asyncio.set_event_loop(None)


@pytest.fixture(scope="module", autouse=True)
def _close_own_handler() -> Iterator[None]:
    yield
    lambda_http.handler.close()


class Context:
    """What the runtime hands over beside the event."""

    def __init__(self, remaining_s: float = 30.0) -> None:
        self.remaining_s = remaining_s

    def get_remaining_time_in_millis(self) -> int:
        return int(self.remaining_s * 1000)


class Function:
    """A handler in this process, and short ways to call it."""

    def __init__(self, store: ObjectStore, **settings: Any) -> None:
        given = {"log_level": "error", "metrics": False, "compact": False, "presume": True, "search_threads": 1}
        self.runtime = Runtime(Settings(**{**given, **settings}), store=store)
        self.handler = LambdaHandler(self.runtime.settings, runtime=self.runtime)
        MADE.append(self.handler)

    def call(
        self, method: str, path: str, body: Any = None, *, kind: str = "http_v2", context: Context | None = None, **more: Any
    ) -> tuple[int, dict[str, str], bytes]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        return answer_of(self.handler(make_event(kind, method, path, data, **more), context or Context()))

    def ok(self, method: str, path: str, body: Any = None, **more: Any) -> Any:
        status, _, answer = self.call(method, path, body, **more)
        assert status in (200, 202), answer
        return json.loads(answer)

    def refused(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, str, str]:
        status, headers, answer = self.call(method, path, body, **more)
        found = json.loads(answer)
        assert headers["content-type"] == "application/json"
        assert set(found) == {"code", "message"}
        return status, found["code"], found["message"]

    def fill(self, name: str = "papers") -> None:
        self.ok("POST", "/indices", {"name": name})
        self.ok("POST", f"/indices/{name}/update", {"documents": documents(), "metadata": [{"n": n} for n in range(len(VECTORS))]})

    def best(self, n: int, name: str = "papers", **more: Any) -> int:
        found = self.ok("POST", f"/indices/{name}/search", query(n), **more)
        return int(found["results"][0]["document_ids"][0])


def documents() -> list[dict[str, Any]]:
    return documents_of(VECTORS)


def documents_of(matrices: np.ndarray) -> list[dict[str, Any]]:
    return [{"embeddings": matrix.tolist()} for matrix in matrices]


def query(n: int) -> dict[str, Any]:
    return {"queries": [{"embeddings": VECTORS[n].tolist()}], "params": {"top_k": 3}}


@pytest.fixture
def function() -> Function:
    return Function(open_store("memory://"))


# Events


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_event_is_answered(function: Function, kind: str) -> None:
    function.fill()
    assert function.best(4, kind=kind) == 4
    assert function.best(2, kind=kind, as_base64=True) == 2
    status, headers, body = function.call("GET", "/health", kind=kind)
    assert (status, json.loads(body)["status"]) == (200, "healthy")
    assert headers["x-request-id"]
    assert function.refused("GET", "/indices/none", kind=kind) == (404, "INDEX_NOT_FOUND", "none")
    assert function.refused("GET", "/no/such", kind=kind)[:2] == (404, "NO_SUCH_ROUTE")
    assert function.refused("PUT", "/health", kind=kind)[:2] == (405, "METHOD_NOT_ALLOWED")
    assert function.refused("POST", "/indices/papers/search", b"{", kind=kind)[:2] == (400, "BAD_REQUEST")


@pytest.mark.parametrize("kind", KINDS)
def test_binary_and_compressed_answers_travel_in_base64(function: Function, kind: str) -> None:
    raw = function.handler(make_event(kind, "GET", "/swagger-ui/favicon.png"), Context())
    assert raw["isBase64Encoded"] is True
    assert answer_of(raw)[2].startswith(b"\x89PNG")
    packed = function.handler(make_event(kind, "GET", "/api-docs/openapi.json", headers={"accept-encoding": "gzip"}), Context())
    status, headers, answer = answer_of(packed)
    assert (status, packed["isBase64Encoded"], headers["content-encoding"]) == (200, True, "gzip")
    assert json.loads(gzip.decompress(answer))["openapi"] == "3.1.0"


@pytest.mark.parametrize("kind", KINDS)
def test_query_strings_and_lines_of_json(function: Function, kind: str) -> None:
    function.fill()
    raw = function.handler(make_event(kind, "GET", "/indices/papers/export", query=[("vectors", "false")]), Context())
    lines = [json.loads(line) for line in answer_of(raw)[2].splitlines()]
    assert [line["document_id"] for line in lines] == list(range(6))
    assert "embeddings_b64" not in lines[0]
    assert raw["isBase64Encoded"] is False


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_in_front_of_the_path_is_taken_off(kind: str) -> None:
    function = Function(open_store("memory://"), path_prefix="/prod")
    assert json.loads(function.call("GET", "/livez", kind=kind, stage="/prod")[2]) == {"status": "alive"}
    assert json.loads(function.call("GET", "/livez", kind=kind)[2]) == {"status": "alive"}


def test_an_event_that_is_no_request_is_an_error(function: Function) -> None:
    with pytest.raises(RuntimeError, match="unable to infer"):
        function.handler({"source": "aws.events"}, Context())


def test_access_control_holds_behind_every_gateway() -> None:
    from handler.auth import mint_key

    key, record = mint_key(["search"], indices="pap*")
    records = json.dumps([{"id": record.id, "sha256": record.sha256, "scopes": list(record.scopes), "indices": record.indices}])
    function = Function(open_store("memory://"), api_keys=records)
    for kind in KINDS:
        assert function.refused("POST", "/indices/papers/search", query(0), kind=kind)[0] == 401
        headers = {"authorization": f"Bearer {key}"}
        assert function.refused("POST", "/indices/papers/search", query(0), kind=kind, headers=headers)[1] == "INDEX_NOT_FOUND"
        assert function.refused("POST", "/indices", {"name": "papers"}, kind=kind, headers=headers)[1] == "FORBIDDEN"


# Limits


@pytest.mark.parametrize(("kind", "limit"), [("http_v2", lambda_http.MAX_EVENT_BYTES), ("alb_single", lambda_http.MAX_ALB_EVENT_BYTES)])
def test_a_request_too_large_for_an_event_is_refused_in_the_contracts_form(function: Function, kind: str, limit: int) -> None:
    body = b'{"documents": "' + b"x" * (limit - lambda_http.ENVELOPE_BYTES) + b'"}'
    status, code, message = function.refused("POST", "/indices/papers/update", body, kind=kind, headers={"x-request-id": "mine"})
    assert (status, code) == (413, "PAYLOAD_TOO_LARGE")
    for way_round in (str(limit - lambda_http.ENVELOPE_BYTES), "fewer documents", "float16", "/uploads"):
        assert way_round in message
    event = make_event(kind, "POST", "/indices/papers/update", body, headers={"x-request-id": "mine"})
    assert answer_of(function.handler(event, Context()))[1]["x-request-id"] == "mine"


@pytest.mark.parametrize(("kind", "limit"), [("rest_v1", lambda_http.MAX_EVENT_BYTES), ("alb_multi", lambda_http.MAX_ALB_EVENT_BYTES)])
def test_an_answer_too_large_for_lambda_is_refused_and_names_the_way_round(function: Function, kind: str, limit: int) -> None:
    function.fill()
    text = '"' * 1000  # four bytes each as JSON in JSON
    n = limit // 3900 + 20
    rows = [{"text": text} for _ in range(n)]
    matrix = {"embeddings_b64": base64.b64encode(VECTORS[0].tobytes()).decode(), "shape": [3, DIM]}
    store_rows = {"documents": [matrix] * n, "metadata": rows}
    asyncio_run(function, store_rows)
    status, code, message = function.refused("POST", "/indices/papers/metadata/get", {}, kind=kind)
    assert (status, code) == (413, "PAYLOAD_TOO_LARGE")
    assert "X-Tartan-Answer: download" in message
    assert function.refused("GET", "/indices/papers/export", kind=kind)[1] == "PAYLOAD_TOO_LARGE"
    assert function.best(2, kind=kind) == 2, "the function goes on"
    packed = function.handler(
        make_event(kind, "POST", "/indices/papers/metadata/get", b"{}", headers={"accept-encoding": "gzip"}), Context()
    )
    assert answer_of(packed)[0] == 200, "compressed it fits"


def asyncio_run(function: Function, body: dict[str, Any]) -> None:
    """An update that no event could carry, through the application itself."""
    import httpx

    from handler.app import create_app

    async def run() -> None:
        transport = httpx.ASGITransport(create_app(runtime=Runtime(Settings(log_level="off"), store=function.runtime.store)))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            assert (await client.post("/indices/papers/update", json=body)).status_code == 202

    loop = asyncio.new_event_loop()
    loop.run_until_complete(run())
    loop.close()


def test_when_the_functions_time_is_up_the_client_is_told(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    function.fill()

    async def never(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(function.runtime.searcher, "search", never)
    monkeypatch.setattr(lambda_http, "ANSWER_RESERVE_S", 0.9)
    assert function.refused("POST", "/indices/papers/search", query(0), context=Context(1.0))[:2] == (408, "TIMEOUT")
    monkeypatch.undo()
    assert function.best(3) == 3


def test_json_size_is_never_underestimated() -> None:
    for text in ("", "plain", 'a"b\\c\n', "äöü✓", json.dumps({"a": ['"', "\\", "\t"]})):
        assert lambda_http.json_bytes(text) >= len(json.dumps(text, ensure_ascii=False).encode())


# Settings


def test_budgets_follow_the_functions_size() -> None:
    small = Settings.for_lambda({"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "512", "TARTAN_EPHEMERAL_MB": "512"})
    large = Settings.for_lambda({"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "4096", "TARTAN_EPHEMERAL_MB": "4096"})
    assert 64 << 20 <= small.memory_bytes < 256 << 20 < large.memory_bytes < 4096 << 20
    assert small.cache_bytes < 512 << 20 < large.cache_bytes < 4096 << 20
    assert small.cache_dir.endswith("tartan-cache")
    assert not small.compact and not small.metrics and small.presume
    tiny = Settings.for_lambda({"TARTAN_EPHEMERAL_MB": "50"})
    assert tiny.cache_dir == ""
    chosen = Settings.for_lambda({"TARTAN_MEMORY_BYTES": "1000", "TARTAN_CACHE_DIR": "/tmp/mine", "TARTAN_METRICS": "true"})
    assert (chosen.memory_bytes, chosen.cache_dir, chosen.metrics) == (1000, "/tmp/mine", True)
    with pytest.raises(ValueError, match="TARTAN_TIMEOUT_S"):
        Settings.for_lambda({"TARTAN_TIMEOUT_S": "soon"})


# What survives, what is presumed, what is asked again


def test_what_was_read_survives_to_the_next_invocation() -> None:
    store = CountingStore(open_store("memory://"))
    Function(store).fill()
    function = Function(store)
    function.best(1)
    with store.window() as cost:
        assert function.best(2) == 2
    assert dict(cost.requests) == {"get_if_changed": 1}
    assert function.handler.runtime.reader is function.runtime.reader


def test_current_is_read_while_the_modules_load_and_confirmed_by_the_invocation() -> None:
    store = CountingStore(open_store("memory://"))
    Function(store).fill()
    function = Function(store, warm=("papers", "none"))
    assert function.best(1) == 1
    asked = [(kind, n) for kind, n in store.total.requests.items()]
    assert ("get_if_changed", 1) in asked
    before = store.total.bytes_read
    other = Function(store, warm=("papers",))
    other.handler._early._thread.join()  # type: ignore[union-attr]
    Function(store).ok("POST", "/indices/papers/update", {"documents": documents()})
    with store.window() as cost:
        assert len(other.ok("POST", "/indices/papers/search", query(0) | {"params": {"top_k": 20}})["results"][0]["document_ids"]) == 12
    assert cost.requests["get_if_changed"] == 1
    assert before


def test_what_every_search_reads_is_fetched_while_the_modules_load(tmp_path: Path) -> None:
    """Into the cache of the store's bytes, so that an invocation in the same process asks for nothing but whether CURRENT is in force."""
    store = CountingStore(open_store("memory://"))
    Function(store).fill()
    function = Function(store, warm=("papers",), cache_dir=str(tmp_path))
    function.handler._early._thread.join()  # type: ignore[union-attr]
    with store.window() as cost:
        assert function.best(3) == 3
    assert dict(cost.requests) == {"get_if_changed": 1}


def test_a_store_that_fails_while_the_modules_load_costs_no_answer(tmp_path: Path) -> None:
    store = open_store("memory://")
    Function(store).fill()
    for n_calls in (1, 2):
        faulty = FaultyStore(store, {n_calls: "unavailable"})
        assert Function(faulty, warm=("papers",), cache_dir=str(tmp_path / str(n_calls))).best(3) == 3


def test_a_thawed_function_sees_what_others_wrote_meanwhile() -> None:
    store = open_store("memory://")
    frozen, writer = Function(store), Function(store)
    frozen.fill()
    assert frozen.best(5) == 5
    writer.ok("DELETE", "/indices/papers/documents", {"condition": "n = ?", "parameters": [5]})
    assert frozen.best(5) != 5
    writer.ok("POST", "/indices/papers/update", {"documents": documents()[5:], "metadata": [{"n": 50}]})
    assert frozen.best(5) == 6
    writer.ok("DELETE", "/indices/papers")
    assert frozen.refused("POST", "/indices/papers/search", query(0))[1] == "INDEX_NOT_FOUND"
    writer.fill()
    assert frozen.best(5) == 5


def test_ages_are_doubted_when_the_clock_did_not_count_a_freeze(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    function.fill()
    eventual = query(0) | {"consistency": "eventual", "max_age_s": 600}
    function.ok("POST", "/indices/papers/search", eventual)
    counting = function.runtime.counting
    with counting.window() as cost:
        function.ok("POST", "/indices/papers/search", eventual)
    assert cost.n_requests == 0
    real = lambda_http.time.time
    monkeypatch.setattr(lambda_http.time, "time", lambda: real() + 3600)
    with counting.window() as cost:
        function.ok("POST", "/indices/papers/search", eventual)
    assert dict(cost.requests) == {"get_if_changed": 1}


def test_presuming_a_generation_saves_a_round_and_no_answer() -> None:
    store = CountingStore(open_store("memory://"))
    Function(store).fill()
    plain, presuming = Function(store, presume=False), Function(store, warm=("papers",))
    rounds = []
    answers = []
    for function in (plain, presuming):
        with function.runtime.counting.window() as cost:
            answers.append(function.ok("POST", "/indices/papers/search", query(4)))
        rounds.append(cost.rounds)
    assert answers[0] == answers[1]
    assert rounds[1] < rounds[0]


# Documents and answers by way of the store


@pytest.fixture
def by_s3(s3: S3Server, s3_url: str) -> Function:
    return Function(open_store(s3_url, s3_options(s3)))


def put(url: str, data: bytes) -> None:
    request = urllib.request.Request(url, data, {"Content-Type": "application/octet-stream"}, method="PUT")
    assert urllib.request.urlopen(request).status == 200


def put_up(function: Function, data: bytes, name: str = "papers") -> str:
    """Upload, by nothing but the address; returns the upload's id."""
    address = function.ok("POST", f"/indices/{name}/uploads")
    assert address["method"] == "PUT" and address["expires_at"].endswith("Z") and address["max_bytes"] > 6 << 20
    put(address["url"], data)
    return str(address["upload_id"])


def npz_of(tokens: np.ndarray, lengths: list[int]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, tokens=tokens, doclens=np.array(lengths))
    return file.getvalue()


UPLOADS = {
    "body": json.dumps({"documents": documents_of(VECTORS), "metadata": [{"n": n} for n in range(6)], "ids": list("abcdef")}).encode(),
    "lines": b"".join(
        json.dumps({"embeddings": matrix.tolist(), "metadata": {"n": n}}).encode() + b"\n" for n, matrix in enumerate(VECTORS)
    ),
    "npz": npz_of(VECTORS.reshape(-1, DIM).astype(np.float16), [3] * 6),
}


@pytest.mark.parametrize("form", list(UPLOADS))
def test_an_upload_is_committed_once_however_often_it_is_asked(by_s3: Function, form: str) -> None:
    by_s3.ok("POST", "/indices", {"name": "papers"})
    upload = put_up(by_s3, UPLOADS[form])
    path = f"/indices/papers/uploads/{upload}/commit"
    first = by_s3.call("POST", path)
    assert (first[0], first[1]["x-tartan-document-ids"]) == (202, "0-5"), first
    again = Function(by_s3.runtime.counting.inner).call("POST", path)
    assert (again[0], again[2], again[1]["x-tartan-document-ids"]) == (first[0], first[2], "0-5")
    assert by_s3.best(4) == 4
    assert by_s3.ok("GET", "/indices/papers")["num_documents"] == 6
    left = asyncio.new_event_loop()
    found = left.run_until_complete(uploads.find(by_s3.runtime.store, "papers", upload))
    left.close()
    assert found.size_bytes is None and found.receipt is not None


def test_an_upload_that_cannot_be_added_is_refused_and_can_be_put_up_again(by_s3: Function) -> None:
    by_s3.fill()
    address = by_s3.ok("POST", "/indices/papers/uploads")
    path = f"/indices/papers/uploads/{address['upload_id']}/commit"
    assert by_s3.refused("POST", path)[:2] == (404, "UPLOAD_NOT_FOUND")
    refusals = {
        b"": "BAD_REQUEST",
        b"nonsense": "BAD_REQUEST",
        b'{"documents": 5}': "UNPROCESSABLE",
        json.dumps({"documents": [{"embeddings": [[1.0, 2.0]]}]}).encode(): "DIMENSION_MISMATCH",
        json.dumps({"documents": ["a text"]}).encode(): "MODEL_NOT_LOADED",
        b"PK\x03\x04 and no archive": "BAD_REQUEST",
    }
    for data, code in refusals.items():
        put(address["url"], data)
        assert by_s3.refused("POST", path)[1] == code, data
    put(address["url"], UPLOADS["npz"])
    assert by_s3.ok("POST", path).startswith("update committed: 6 documents")
    small = Function(by_s3.runtime.counting.inner, max_upload_bytes=100)
    other = put_up(by_s3, UPLOADS["body"])
    assert small.refused("POST", f"/indices/papers/uploads/{other}/commit")[:2] == (413, "PAYLOAD_TOO_LARGE")
    assert by_s3.refused("POST", "/indices/none/uploads")[1] == "INDEX_NOT_DECLARED"
    assert by_s3.refused("POST", "/indices/papers/uploads/none/commit")[1] == "UPLOAD_NOT_FOUND"


def test_a_directory_gives_no_addresses_away(function: Function) -> None:
    function.fill()
    status, code, message = function.refused("POST", "/indices/papers/uploads")
    assert (status, code) == (400, "BAD_REQUEST")
    assert "s3://" in message
    assert function.refused("POST", "/indices/papers/search", query(0), headers={"x-tartan-answer": "download"})[1] == "BAD_REQUEST"


def test_a_large_answer_is_fetched_by_an_address(by_s3: Function) -> None:
    by_s3.fill()
    plain = by_s3.ok("POST", "/indices/papers/search", query(2))
    found = by_s3.ok("POST", "/indices/papers/search", query(2), headers={"x-tartan-answer": "download"})
    assert set(found) == {"download_url", "size_bytes", "content_type", "expires_at"}
    assert json.loads(urllib.request.urlopen(found["download_url"]).read()) == plain
    assert by_s3.ok("POST", "/indices/papers/search", query(2), headers={"x-tartan-answer": "auto"}) == plain
    exported = by_s3.ok("GET", "/indices/papers/export", headers={"x-tartan-answer": "download"})
    assert exported["content_type"] == "application/x-ndjson"
    assert len(urllib.request.urlopen(exported["download_url"]).read().splitlines()) == 6
    assert by_s3.refused("POST", "/indices/papers/search", query(2), headers={"x-tartan-answer": "yes"})[1] == "BAD_REQUEST"


async def test_an_upload_is_added_once_whatever_dies_in_the_middle_of_its_commit() -> None:
    """The world stops at each request of a commit in turn; others write meanwhile; the retry, in another process, makes it once."""
    tokens, offsets = VECTORS.reshape(-1, DIM), np.arange(0, 19, 3)
    n_calls = 1
    while True:
        store = open_store("memory://")
        await create(store, "x", IndexConfig())
        await store.put_if_absent(names.upload("x", UPLOAD, "data"), b"data")
        faulty = FaultyStore(store, {n_calls: "stop" if n_calls % 2 else "stop-after"})
        with contextlib.suppress(WorldStopped):
            await uploads.commit_upload(Reader(faulty), "x", UPLOAD, Add.of(tokens, offsets, None, None))
        if not faulty.stopped:
            break
        for _ in range(2):
            await Reader(store).writer("x").add(tokens[:3], offsets[:2])
        receipt = await uploads.commit_upload(Reader(store), "x", UPLOAD, Add.of(tokens, offsets, None, None))
        snapshot = await Reader(store).snapshot("x")
        assert snapshot.n_documents == 6 + 2, n_calls
        assert receipt.last_id is not None and receipt.first_id is not None
        found = await Searcher(snapshot.reader).search(snapshot, [VECTORS[4]], SearchParams(k=1))
        assert found[0].ids.tolist() == [receipt.first_id + 4]
        assert receipt.last_id - receipt.first_id == 5
        assert await uploads.commit_upload(Reader(store), "x", UPLOAD, Add.of(tokens, offsets, None, None)) == receipt
        n_calls += 1
    assert n_calls > 6


async def test_two_commits_of_one_upload_at_once_make_it_once() -> None:
    store = open_store("memory://")
    await create(store, "x", IndexConfig())
    add = [Add.of(VECTORS.reshape(-1, DIM), np.arange(0, 19, 3), None, None) for _ in range(4)]
    receipts = await asyncio.gather(*(uploads.commit_upload(Reader(store), "x", UPLOAD, one) for one in add))
    assert len(set(receipts)) == 1
    assert (await Reader(store).snapshot("x")).n_documents == 6


async def test_an_attempt_whose_fate_cannot_be_known_is_refused() -> None:
    store = open_store("memory://")
    await create(store, "x", IndexConfig())
    add = Add.of(VECTORS.reshape(-1, DIM), np.arange(0, 19, 3), None, None)
    await uploads.commit_upload(Reader(store), "x", UPLOAD, add)
    await Reader(store).writer("x").add(*(VECTORS[0], np.array([0, 3])))
    lost = [names.upload("x", UPLOAD, "receipt"), *[line.name async for line in store.list(names.manifests("x"))]]
    await store.delete(lost)
    with pytest.raises(Conflict, match="may have succeeded"):
        await uploads.commit_upload(Reader(store), "x", UPLOAD, add)


async def test_uploads_are_collected_after_a_day_and_not_before() -> None:
    assert sweep_module._life_s(names.upload("x", UPLOAD, "data"), "x", 3600.0) == sweep_module.UPLOAD_LIFE_S
    assert sweep_module._life_s(names.codec("x", UPLOAD), "x", 3600.0) == 3600.0
    store = open_store("memory://")
    await create(store, "x", IndexConfig())
    await store.put_if_absent(names.upload("x", UPLOAD, "data"), b"data")
    report = await sweep_module.sweep(store, "x", params=MaintenanceParams(grace_s=0.0))
    assert report.n_deleted == 0


# The real runtime: AWS's emulator and awslambdaric in a process of their own, a gateway before them


@pytest.fixture(scope="module")
def served(s3: S3Server) -> Iterator[Gateway]:
    needed_emulator()
    variables = s3_environment(s3) | {"TARTAN_INDEX_DIR": f"s3://{BUCKET}/lambda", "TARTAN_MODEL": "hashing"}
    with gateway(variables, n_environments=2) as serving:
        yield serving


def test_the_unmodified_sdk_runs_against_the_emulated_http_api(served: Gateway) -> None:
    with NextPlaidClient(served.url) as client:
        client.delete_index("sdk")
        client.create_index("sdk", ClientConfig(nbits=4))
        with pytest.raises(IndexExistsError):
            client.create_index("sdk")
        status = client.add("sdk", documents(), [{"title": f"word{n}"} for n in range(6)])
        assert "queued" in status.lower() or "update" in status.lower()
        found = client.search("sdk", [VECTORS[3].tolist()], ClientParams(top_k=2)).results[0]
        assert found.document_ids[0] == 3
        assert found.metadata is not None and found.metadata[0]["title"] == "word3"
        assert client.keyword_search("sdk", ["word5"]).results[0].document_ids == [5]
        assert client.health().status == "healthy"
        assert client.list_indices() == ["sdk"]
        client.delete("sdk", "_subset_ = ?", [3])
        assert client.search("sdk", [VECTORS[3].tolist()]).results[0].document_ids[0] != 3
        assert len(client.encode(["a text"]).embeddings) == 1
        client.delete_index("sdk")


def test_two_environments_write_one_index_at_the_same_time(served: Gateway) -> None:
    """Eight adds over two processes: none is lost, every id is given once."""
    call(served, "POST", "/indices", {"name": "both"})

    def add(n: int) -> str:
        status, headers, body = call(served, "POST", "/indices/both/update", {"documents": documents()[:2], "metadata": [{"n": n}] * 2})
        assert status == 202, body
        return headers["x-tartan-document-ids"]

    with ThreadPoolExecutor(4) as pool:
        given = list(pool.map(add, range(8)))
    assert sorted(int(ids.partition("-")[0]) for ids in given) == list(range(0, 16, 2))
    assert json.loads(call(served, "GET", "/indices/both")[2])["num_documents"] == 16


def test_a_frozen_environment_sees_what_another_wrote(s3: S3Server) -> None:
    """SIGSTOP and SIGCONT are what Lambda's freeze looks like from within; another process writes in between."""
    binary = needed_emulator()
    variables = s3_environment(s3) | {"TARTAN_INDEX_DIR": f"s3://{BUCKET}/frozen", "TARTAN_WARM": "x"}
    writer = Function(open_store(f"s3://{BUCKET}/frozen", s3_options(s3)))
    writer.fill("x")
    emulator = Emulator(binary, variables)
    try:
        search = make_event("http_v2", "POST", "/indices/x/search", json.dumps(query(5)).encode())

        def found() -> list[int]:
            return list(json.loads(answer_of(emulator.invoke(search))[2])["results"][0]["document_ids"])

        assert found()[0] == 5
        (frozen,) = emulator.runtime_pids()
        os.kill(frozen, signal.SIGSTOP)
        writer.ok("DELETE", "/indices/x/documents", {"condition": "n = ?", "parameters": [5]})
        writer.ok("POST", "/indices/x/update", {"documents": documents()[5:], "metadata": [{"n": 5}]})
        os.kill(frozen, signal.SIGCONT)
        assert found()[0] == 6
        assert emulator.runtime_pids() == [frozen], "the same process"
    finally:
        emulator.close()


@pytest.mark.parametrize("kind", ["put", "replace"])
def test_a_time_out_in_the_middle_of_a_commit_leaves_nothing_that_goes_on_later(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store stops answering, the function's time is up, the process is frozen and thawed: the add must not happen then, and happens once when
    the client asks again."""
    store = open_store("memory://")
    Function(store).fill()
    hangs = True
    function = Function(FaultyStore(store, lambda call: "hang" if hangs and call.kind == kind else None))
    monkeypatch.setattr(lambda_http, "ANSWER_RESERVE_S", 0.7)
    add = {"documents": documents(), "metadata": [{"n": 9}] * 6}
    assert function.refused("POST", "/indices/papers/update", add, context=Context(1.0))[:2] == (408, "TIMEOUT")
    hangs = False
    assert function.ok("GET", "/indices/papers")["num_documents"] == 6
    assert not asyncio.all_tasks(function.handler._loop)
    function.ok("POST", "/indices/papers/update", add)
    assert Function(store).ok("GET", "/indices/papers")["num_documents"] == 12


@pytest.mark.slow
def test_a_function_killed_in_the_middle_of_a_commit_leaves_all_or_nothing(s3: S3Server) -> None:
    """The store refuses to move CURRENT, and meanwhile the process is killed, as Lambda does when the time is up; the client asks again."""
    binary = needed_emulator()
    store = open_store(f"s3://{BUCKET}/killed", s3_options(s3))
    writer = Function(store)
    writer.fill("x")
    emulator = Emulator(binary, s3_environment(s3) | {"TARTAN_INDEX_DIR": f"s3://{BUCKET}/killed"})
    add = make_event("http_v2", "POST", "/indices/x/update", json.dumps({"documents": documents(), "metadata": [{"n": 9}] * 6}).encode())
    try:
        assert emulator.invoke(make_event("http_v2", "GET", "/livez"))["statusCode"] == 200
        (pid,) = emulator.runtime_pids()
        n_before = len(s3.requests)
        with ThreadPoolExecutor(1) as pool, s3.fault("PUT", "refuse", part="/x/CURRENT", times=1000) as armed:
            told = pool.submit(_invoke, emulator, add)
            while armed.seen == 0:
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            assert isinstance(told.result(timeout=60), Exception)
        assert any(name.endswith("/data") for method, name, _ in s3.requests[n_before:] if method == "PUT"), "the segment was there"
        assert writer.ok("GET", "/indices/x")["num_documents"] == 6, "nothing of it is seen"
    finally:
        emulator.close()
    again = Emulator(binary, s3_environment(s3) | {"TARTAN_INDEX_DIR": f"s3://{BUCKET}/killed"})
    try:
        assert answer_of(again.invoke(add))[0] == 202
    finally:
        again.close()
    assert writer.ok("GET", "/indices/x")["num_documents"] == 12


def _invoke(emulator: Emulator, event: dict[str, Any]) -> Any:
    try:
        return emulator.invoke(event)
    except (FunctionError, OSError) as error:
        return error


def test_a_full_disk_costs_the_cache_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/tmp refuses every write, as when it is full: answers are the same, and come from the store."""
    store = open_store("memory://")
    Function(store).fill()
    full = Function(store, cache_dir=str(tmp_path / "cache"), cache_bytes=1 << 20)

    def no_space(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write", "pwrite", "writev", "pwritev", "mkdir", "posix_fallocate", "truncate", "ftruncate"):
        if hasattr(os, name):
            monkeypatch.setattr(os, name, no_space)
    assert full.best(3) == 3
    full.ok("POST", "/indices/papers/update", {"documents": documents()})
    assert full.ok("GET", "/indices/papers")["num_documents"] == 12
    monkeypatch.undo()
    assert full.best(4) == 4


def test_a_disk_that_is_really_full_costs_the_cache_and_nothing_else(tmp_path: Path) -> None:
    """A file system of 64 KiB in the place of /tmp, filled to the brim."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here (root, CAP_SYS_ADMIN)")
    try:
        with contextlib.suppress(OSError), (folder / "ballast").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        store = open_store("memory://")
        Function(store).fill()
        full = Function(store, warm=("papers",), cache_dir=str(folder / "cache"), cache_bytes=1 << 20)
        assert full.best(3) == 3
        full.ok("POST", "/indices/papers/update", {"documents": documents()})
        assert full.ok("GET", "/indices/papers")["num_documents"] == 12
        assert full.best(4) == 4
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def call(served: Gateway, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], bytes]:
    """One request through the gateway's port."""
    connection = http.client.HTTPConnection("127.0.0.1", served.server_port, timeout=60)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read()
    finally:
        connection.close()
