"""Keys and scopes: every route with every kind of key as docs/access.md says, in process and behind the gateways of Lambda; how keys are compared."""

from __future__ import annotations

import ast
import hmac
import inspect
import json
from collections.abc import Iterator

import httpx
import msgspec
import pytest

from engine.errors import Unavailable
from engine.store.base import ObjectStore
from engine.store.objects import open_store
from handler import auth
from handler.auth import SCOPES, Gate, KeyRecord, mint_key
from handler.lambda_http import LambdaHandler
from handler.problems import Problem
from handler.routes.endpoint import Endpoint
from handler.routes.table import ENDPOINTS
from handler.runtime import Runtime
from handler.settings import Settings
from lambda_runtime import KINDS, answer_of, make_event
from security.access import ACCESS, COLUMNS, DOCUMENT, Line, expected, written
from serving import client_of

KEYS: dict[str, tuple[str, KeyRecord]] = {scope: mint_key([scope], indices="papers*") for scope in SCOPES}
KEYS["a key of other indices"] = mint_key(SCOPES, indices="other*")
KEYS["all"] = mint_key(SCOPES)
RECORDS = msgspec.json.encode([record for _, record in KEYS.values()]).decode()
ROUTES = {f"{endpoint.method} {endpoint.path}": endpoint for endpoint in ENDPOINTS}


def headers(column: str) -> dict[str, str]:
    if column == "no key":
        return {}
    key = mint_key(SCOPES)[0] if column == "unknown key" else KEYS[column][0]
    return {"authorization": f"Bearer {key}"}


def request_of(endpoint: Endpoint) -> tuple[str, bytes]:
    """Path and body of a request as the documentation shows it."""
    path = endpoint.path.replace("{name}", "papers").replace("{alias}", "papers-live").replace("{pin}", "before-import")
    path = path.replace("{file}", "favicon.png").replace("{upload}", "01KATR0000000000000000000A")
    return path, b"" if endpoint.body is None else json.dumps(endpoint.request_example).encode()


@pytest.fixture
async def api() -> httpx.AsyncClient:
    client = client_of(api_keys=RECORDS, model="hashing")
    await fill(client)
    return client


async def fill(api: httpx.AsyncClient) -> None:
    for name in ("papers", "other-papers"):
        await api.post("/indices", json={"name": name}, headers=headers("all"))
        body = {"documents": [{"embeddings": [[0.1, 0.2, 0.3, 0.4]]}], "metadata": [{"year": 2000}]}
        assert (await api.post(f"/indices/{name}/update", json=body, headers=headers("all"))).status_code == 202


def test_every_route_has_a_line_and_every_line_a_route() -> None:
    """A route that is new: decide who may call it, give it a line in access.py, and run that file to write the document."""
    assert ROUTES.keys() == ACCESS.keys()
    assert len(ROUTES) == len(ENDPOINTS)


def test_the_document_is_the_table() -> None:
    text = DOCUMENT.read_text()
    assert text == written(text), "PYTHONPATH=.:tests python -m security.access"
    assert all(f"| `{route}` |" in text for route in ACCESS)


async def test_there_is_no_way_in_besides_the_table(api: httpx.AsyncClient) -> None:
    """What Litestar routes is what the table lists; not, for instance, a schema of its own."""
    from handler.app import create_app

    app = create_app(runtime=api.runtime)  # type: ignore[attr-defined]
    routed = {(method, route.path_format) for route in app.routes.routes for method in route.methods if method != "OPTIONS"}
    assert {(endpoint.method, endpoint.path) for endpoint in ENDPOINTS} == routed
    for path in ("/schema", "/schema/openapi.json", "/docs", "/redoc", "/openapi.json", "/static", "/admin", "/debug"):
        assert (await api.get(path, headers=headers("all"))).status_code == 404


def check(route: str, column: str, status: int, answered: dict[str, str], body: bytes) -> None:
    refused = expected(ACCESS[route], column)
    if refused is None:
        assert status not in (401, 403), (route, column, body)
        return
    assert status == refused, (route, column, body)
    error = json.loads(body)
    assert error["code"] == {401: "UNAUTHORIZED", 403: "FORBIDDEN"}[refused]
    assert set(error) == {"code", "message"}
    assert answered.get("www-authenticate") == ("Bearer" if refused == 401 else None)
    assert "papers" not in error["message"]  # nothing of what is there


@pytest.mark.parametrize("column", COLUMNS)
async def test_every_route_is_open_to_whom_the_table_says(api: httpx.AsyncClient, column: str) -> None:
    for route, endpoint in sorted(ROUTES.items(), key=lambda item: item[1].method == "DELETE"):
        path, body = request_of(endpoint)
        sent = headers(column) | {"content-type": "application/json"}
        answer = await api.request(endpoint.method, path, content=body, headers=sent)
        check(route, column, answer.status_code, dict(answer.headers), answer.content)
        by_body = column == "a key of other indices" and "path" not in ACCESS[route].names
        if expected(ACCESS[route], column) is not None and not by_body:
            broken = await api.request(endpoint.method, path, content=b"{", headers=sent)  # refused before the body is looked at
            assert broken.status_code == answer.status_code


async def test_a_head_asks_for_the_same_key(api: httpx.AsyncClient) -> None:
    for path in ("/indices", "/indices/papers", "/metrics", "/indices/papers/export"):
        assert (await api.head(path)).status_code == 401
        assert (await api.head(path, headers=headers("search"))).status_code == 200


async def test_areas_are_closed_one_by_one() -> None:
    for closed in ("health", "docs", "metrics"):
        api = client_of(api_keys=RECORDS, open_areas=tuple({"health", "docs", "metrics"} - {closed}))
        for route, line in ACCESS.items():
            if line.area or line.who == "anyone":
                answer = await api.get(request_of(ROUTES[route])[0])
                assert (answer.status_code == 401) is (line.area == closed), (closed, route)


async def test_names_in_bodies_and_aliases_count_and_tell_nothing() -> None:
    api = client_of(api_keys=RECORDS)
    await fill(api)
    own, every = headers("a key of other indices"), headers("all")
    assert (await api.put("/aliases/live", json={"index": "papers"}, headers=every)).status_code == 200
    assert (await api.put("/aliases/other-live", json={"index": "papers"}, headers=every)).status_code == 200
    refused = [
        ("POST", "/indices", {"name": "papers-2"}),
        ("POST", "/indices/other-papers/branch", {"name": "papers-2"}),
        ("POST", "/indices/papers/branch", {"name": "other-2"}),
        ("PUT", "/aliases/other-x", {"index": "papers"}),
        ("PUT", "/aliases/other-x", {"index": "nothing"}),
        ("PUT", "/aliases/x", {"index": "other-papers"}),
        ("PUT", "/aliases/live", {"index": "other-papers"}),
        ("PUT", "/aliases/other-live", {"index": "other-papers"}),
        ("GET", "/aliases/live", None),
        ("GET", "/aliases/nothing", None),
        ("DELETE", "/aliases/live", None),
        ("DELETE", "/aliases/nothing", None),
        ("GET", "/indices/other-live", None),
        ("GET", "/indices/papers", None),
        ("GET", "/indices/nothing", None),
        ("DELETE", "/indices/nothing", None),
        ("GET", "/indices/OTHER-papers", None),
        ("GET", "/indices/xother-papers", None),
    ]
    answers = set()
    for method, path, body in refused:
        answer = await api.request(method, path, json=body, headers=own)
        assert answer.status_code == 403, (method, path, answer.text)
        answers.add(answer.content)
    assert len(answers) == 1, "what is there and what is not are answered alike"
    assert (await api.get("/aliases", headers=own)).json() == {"aliases": []}
    assert (await api.get("/indices", headers=own)).json() == ["other-papers"]
    assert [line["name"] for line in (await api.get("/health", headers=own)).json()["indices"]] == ["other-papers"]


async def test_a_server_that_only_reads_says_so_after_it_has_seen_the_key() -> None:
    store = open_store("memory://")
    await fill(client_of(store, api_keys=RECORDS))
    api = client_of(store, api_keys=RECORDS, read_only=True, model="hashing")
    before = [(line.name, line.size_bytes) async for line in store.list("")]
    for route, line in ACCESS.items():
        path, body = request_of(ROUTES[route])
        for column in ("no key", "a key of other indices", "all"):
            sent = headers(column) | {"content-type": "application/json", "x-tartan-answer": "download"}
            answer = await api.request(ROUTES[route].method, path, content=body, headers=sent)
            if column == "no key" or (column != "all" and (line.names.startswith("path") or line.who == "search")):
                check(route, column, answer.status_code, dict(answer.headers), answer.content)
            elif line.who in ("write", "admin") and not path.endswith("/recall"):
                assert (answer.status_code, answer.json()["code"]) == (403, "READ_ONLY"), route
    assert [(line.name, line.size_bytes) async for line in store.list("")] == before  # an answer by way of the store would be an object



class Denying:
    """A store whose credentials let one read and no more: a reader's role."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    async def put_if_absent(self, name: str, data: bytes) -> str:
        raise Unavailable("the store refused our credentials", code="store-denied", name=name, refused="write")

    replace_if_unchanged = delete = put_if_absent


async def test_a_reader_exports_though_it_can_hold_nothing() -> None:
    """Balancers and gateways send every GET to readers, and their roles may write nothing: neither a pin nor the copy of a manifest."""
    store = open_store("memory://")
    await fill(client_of(store))
    for denied, settings in ((Denying(store), {}), (store, {"read_only": True}), (Denying(store), {"read_only": True})):
        answer = await client_of(denied, **settings).get("/indices/papers/export?vectors=false")  # type: ignore[arg-type]
        assert (answer.status_code, json.loads(answer.text)["document_id"]) == (200, 0), answer.text
    assert not [line.name async for line in store.list("papers/pins/")]


async def test_a_path_that_balancers_close_has_one_spelling(api: httpx.AsyncClient) -> None:
    """A rule for /internal/* compares text: another spelling would pass it, and be understood behind it."""
    key = headers("all")
    assert (await api.get("/metrics", headers=key)).status_code == 200
    body = ROUTES["POST /internal/shard"].request_example
    for path in ("//metrics", "///metrics", "/%6detrics", "/metric%73", "/metrics/"):
        raw = httpx.URL("http://server").copy_with(raw_path=path.encode())
        answer = await api.get(raw, headers=key)
        assert (answer.status_code, answer.json()["code"]) == (404, "NO_SUCH_ROUTE"), path
    for path in ("//internal/shard", "/%69nternal/shard", "/internal%2fshard", "/internal//shard", "/internal/shard/", "/internal/%73hard"):
        raw = httpx.URL("http://server").copy_with(raw_path=path.encode())
        answer = await api.post(raw, json=body, headers=key)
        assert (answer.status_code, answer.json()["code"]) == (404, "NO_SUCH_ROUTE"), path
    reached = await api.post("/internal/shard", json=body, headers=key)
    assert reached.json()["code"] != "NO_SUCH_ROUTE"
    prefixed = client_of(path_prefix="/stage")
    assert (await prefixed.get("/stage/metrics")).status_code == (await prefixed.get("/metrics")).status_code == 200
    assert (await prefixed.get(httpx.URL("http://server").copy_with(raw_path=b"/stage//metrics"))).status_code == 404
    assert (await prefixed.get(httpx.URL("http://server").copy_with(raw_path=b"//indices"))).status_code == 200  # SDKs join so


# Behind the gateways of Lambda


class Context:
    aws_request_id = "1"

    @staticmethod
    def get_remaining_time_in_millis() -> int:
        return 20_000


@pytest.fixture
def function() -> Iterator[LambdaHandler]:
    settings = Settings(api_keys=RECORDS, log_level="off", search_threads=1, compact=False)
    handler = LambdaHandler(settings, runtime=Runtime(settings, store=open_store("memory://")))
    yield handler
    handler.close()


SAMPLE = ("GET /health", "GET /metrics", "GET /indices", "POST /indices", "POST /indices/{name}/update", "POST /indices/{name}/search", "DELETE /indices/{name}/documents",
          "DELETE /indices/{name}", "PUT /aliases/{alias}", "GET /indices/{name}/export", "POST /internal/shard", "POST /indices/{name}/uploads")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_holds_behind_every_gateway(function: LambdaHandler, kind: str) -> None:
    for route in SAMPLE:
        path, body = request_of(ROUTES[route])
        for column in COLUMNS:
            sent = headers(column) | {"content-type": "application/json"}
            event = make_event(kind, ROUTES[route].method, path, body, headers=sent)
            check(route, column, *answer_of(function(event, Context())))


# How keys are compared


def gate_of(n_records: int) -> tuple[Gate, list[str]]:
    minted = [mint_key(["search"]) for _ in range(n_records)]
    return Gate([record for _, record in minted], frozenset()), [key for key, _ in minted]


def test_as_much_is_compared_wherever_the_key_stands_and_if_it_stands_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, keys = gate_of(9)
    compared: list[tuple[bytes, bytes]] = []

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(auth, "hmac", type("Watched", (), {"compare_digest": staticmethod(watched)}))
    near = keys[4][:-1] + ("A" if keys[4][-1] != "A" else "B")
    for presented in (*keys, near, "tartan_nothing", "x", "\u00e4", "x" * 100_000):
        compared.clear()
        if presented in keys:
            assert gate.caller({"authorization": f"Bearer {presented}"}) is not None
        else:
            with pytest.raises(Problem, match="UNAUTHORIZED"):
                gate.caller({"authorization": f"Bearer {presented}"})
        assert len(compared) == 9, "every record, whichever of them matches"
        assert {len(side) for pair in compared for side in pair} == {64}, "digests, never the keys themselves"
        assert len({one for one, _ in compared}) == 1
        assert len({other for _, other in compared}) == 9


def test_secrets_meet_only_in_constant_time() -> None:
    """In auth.py no ==, `in` or startswith looks at a digest or a key; compare_digest does."""
    tree = ast.parse(inspect.getsource(auth))
    secret = {"key", "presented", "sha256", "secret"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and not isinstance(node.ops[0], (ast.Is, ast.IsNot, ast.LtE)):
            names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} | {
                part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)
            }
            is_length = ast.unparse(node) == "len(self.sha256) != 64"
            assert not names & secret or is_length, ast.unparse(node)
    assert "hmac.compare_digest(presented, record.sha256.encode())" in ast.unparse(tree)
    assert inspect.getsource(Gate.caller).count("break") == inspect.getsource(Gate.caller).count("any(") == 0


@pytest.mark.parametrize(
    "sent",
    [
        {"authorization": "Bearer"},
        {"authorization": "Bearer  "},
        {"authorization": "bearer\t{key}"},
        {"authorization": "{key}"},
        {"authorization": "Basic {key}"},
        {"authorization": "Bearer {key} {key}"},
        {"authorization": "Bearer {digest}"},
        {"authorization": "Bearer {id}"},
        {"x-api-key": " {key}x"},
        {"x-api-key": ""},
        {"cookie": "authorization=Bearer {key}; x-api-key={key}"},
        {"x-forwarded-authorization": "Bearer {key}"},
        {"proxy-authorization": "Bearer {key}"},
        {"x-original-url": "/livez", "x-rewrite-url": "/livez"},
    ],
)
async def test_what_is_nearly_a_key_is_none(sent: dict[str, str]) -> None:
    api = client_of(api_keys=RECORDS)
    key, record = KEYS["all"]
    filled = {name: value.format(key=key, digest=record.sha256, id=record.id) for name, value in sent.items()}
    assert (await api.get("/indices", headers=filled)).status_code == 401
    for place in (f"?key={key}", f"?api_key={key}", f"?authorization=Bearer%20{key}", f"?x-api-key={key}"):
        assert (await api.get("/indices" + place)).status_code == 401


def test_a_line_is_read_as_it_is_meant() -> None:
    assert [expected(Line("write", "path"), column) for column in COLUMNS] == [401, 401, 403, None, 403, 403]
    assert [expected(Line("anyone"), column) for column in COLUMNS] == [None, 401, None, None, None, None]


