"""Text that would break an answer's headers, a line of the log, the labels of the metrics or the terminal that shows it; and what errors tell."""

from __future__ import annotations

import io
import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine.errors import CorruptData, InvalidRequest, Unavailable
from engine.store.base import ObjectStore
from engine.store.objects import StoreOptions, open_store
from handler.app import Application, create_app
from handler.auth import SCOPES, mint_key
from handler.cli import app as command
from handler.cli.session import harmless
from handler.lambda_http import LambdaHandler
from handler.logs import make_logger
from handler.problems import outward, problem_of
from handler.runtime import Runtime
from handler.settings import Settings
from lambda_runtime import KINDS, answer_of, make_event
from security.payloads import NAMES, TEXT
from security.raw import Answer, ask
from serving import ROOT, client_of, serving

LINE = re.compile(rb"[\x20-\x7e]*")
"""What a header of an answer may hold."""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
HEADERS = ("x-request-id", "traceparent", "tracestate", "user-agent", "referer", "origin", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "forwarded", "accept",
           "accept-encoding", "content-type", "content-length", "host", "cookie", "authorization", "x-api-key", "x-embeddings-format", "x-tartan-answer", "range", "te",
           "access-control-request-method", "access-control-request-headers", "x-amzn-trace-id", "x-original-url", "planted")  # fmt: skip


def application(store: ObjectStore | None = None, **settings: Any) -> tuple[Application, io.StringIO]:
    runtime = Runtime(Settings(search_threads=1, log_level="debug", **settings), store=store or open_store("memory://"))
    log = io.StringIO()
    runtime.__dict__["log"] = make_logger("debug", stream=log)
    return create_app(runtime=runtime), log


def check_headers(answer: Answer, *allowed: bytes) -> None:
    for name, value in answer.headers:
        assert re.fullmatch(rb"[a-z-]+", name.lower()), name
        assert LINE.fullmatch(value), (name, value)
        assert name.lower() not in (b"planted", b"set-cookie")
        if value not in allowed:
            assert b"planted" not in value, (name, value)


def check_log(log: io.StringIO, n_requests: int) -> list[dict[str, Any]]:
    """As many lines as events, each one JSON object whichever way lines are cut, none with a character that commands a terminal."""
    text = log.getvalue()
    lines = text.splitlines()
    assert text.count("\n") == len(lines) == text.count('"timestamp"')
    assert not [line for line in lines if BREAKS.search(line)]
    read = [json.loads(line) for line in lines]
    assert sum(line["event"] == "request" for line in read) == n_requests
    return read


async def test_a_header_of_a_request_breaks_neither_the_answer_nor_the_log() -> None:
    app, log = application(trust_proxy=True, rate_limit_enabled=True, rate_limit_burst=10_000)
    n_requests = 0
    for header in HEADERS:
        for value in TEXT:
            for method, path in (("POST", "/indices"), ("OPTIONS", "/indices")) if "control" in header else (("POST", "/indices"),):
                given = [(header.encode(), value), (b"access-control-request-method", b"PUT")]
                answer = await ask(app, method, path, given, body=b'{"name": "."}')
                n_requests += 1
                assert answer.status in (200, 400, 401, 413, 415), (header, value, answer)
                echoed = header in ("x-request-id", "access-control-request-headers") and LINE.fullmatch(value) is not None
                check_headers(answer, *([value] if echoed else []))
    lines = check_log(log, n_requests)
    said = {key for line in lines for key, value in line.items() if "planted" in str(value)}
    assert said <= {"request_id"}
    assert all(len(str(line["request_id"])) <= 200 for line in lines if "request_id" in line)


async def test_a_path_or_query_breaks_neither_the_answer_nor_the_log_nor_the_metrics() -> None:
    app, log = application()
    runtime = app.runtime
    assert (await ask(app, "POST", "/indices", [(b"content-type", b"application/json")], body=b'{"name": "inside"}')).status == 200
    await ask(app, "GET", "/indices/none", [])
    await ask(app, "GET", "/indices/none/metadata", [], query=b"a")
    await ask(app, "PUT", "/aliases/none", [(b"content-type", b"application/json")], body=b'{"index": "none"}')
    await ask(app, "GET", "/nowhere", [])
    assert runtime.metrics is not None
    n_labels = runtime.metrics.render().count(b"\n")
    names = [name for name in (*NAMES, *(value.decode("utf-8", "replace") for value in TEXT)) if name.strip("/")]
    for name in names:
        for answer in (
            await ask(app, "GET", f"/indices/{name}", []),
            await ask(app, "GET", f"/indices/{name}/metadata", [], query=b"planted=" + name.encode("utf-8", "replace")),
            await ask(app, "PUT", f"/aliases/{name}", [(b"content-type", b"application/json")], body=json.dumps({"index": name}).encode()),
        ):
            assert answer.status in (400, 404, 405), (name, answer)
            assert set(json.loads(answer.body)) == {"code", "message"}
            check_headers(answer)
        named = json.dumps({"name": name}).encode()
        created = await ask(app, "POST", "/indices", [(b"content-type", b"application/json")], body=named)
        assert created.status == 400, (name, created)
    lines = check_log(log, 5 + 4 * len(names))
    assert not [line for line in lines if "planted" in json.dumps(line)]
    assert {line["route"] for line in lines if "route" in line} <= {"/indices", "/indices/{name}", "/indices/{name}/metadata", "/aliases/{alias}", "/health", "/"}
    rendered = runtime.metrics.render()
    assert b"planted" not in rendered
    assert rendered.count(b"\n") <= n_labels + 60  # statuses and codes of a few more routes; not one of the names
    assert not [name for name in names if len(name) > 12 and name.encode("utf-8", "replace") in rendered]


async def test_thousands_of_names_and_methods_make_no_labels() -> None:
    app, _ = application()
    assert app.runtime.metrics is not None
    for n in range(3):
        await ask(app, f"M{n}", f"/indices/x{n}", [])
        await ask(app, "GET", f"/x{n}", [])
        await ask(app, "GET", f"/indices/x{n}", [])
    before = app.runtime.metrics.render().count(b"\n")
    for n in range(3, 100):
        await ask(app, f"M{n}", f"/indices/x{n}", [])
        await ask(app, "GET", f"/x{n}", [])
        await ask(app, "GET", f"/indices/x{n}", [])
    assert app.runtime.metrics.render().count(b"\n") == before


def test_a_line_of_the_log_is_one_line_whatever_it_says() -> None:
    log = io.StringIO()
    logger = make_logger("debug", stream=log)
    said = [value.decode("utf-8", "replace") for value in TEXT] + ["\u2028", "\u2029", "\x85", "\x9b31m", "\x7f", "\U0001f600 \u00e4", "\x1c\x1d\x1e", "\v\f"]
    for text in said:
        logger.error("failed", error=text, nested={"a": [text]}, exc_info=ValueError(text))
    text = log.getvalue()
    assert len(text.splitlines()) == len(said)
    assert not BREAKS.search(text.replace("\n", ""))
    for line, expected in zip(text.splitlines(), said, strict=True):
        read = json.loads(line)
        assert (read["error"], read["nested"], read["event"], read["level"]) == (expected, {"a": [expected]}, "failed", "error")


# Browsers


async def test_any_origin_may_ask_and_none_with_credentials() -> None:
    app, _ = application()
    for origin in (b"https://evil.example", b"null", b"http://localhost"):
        asked = [(b"origin", origin), (b"access-control-request-method", b"DELETE"), (b"access-control-request-headers", b"authorization,x-a")]
        for method in ("OPTIONS", "GET"):
            answer = await ask(app, method, "/indices", asked if method == "OPTIONS" else asked[:1])
            found = [(name, value) for name, value in answer.headers if name.startswith(b"access-control-")]
            assert [value for name, value in found if name == b"access-control-allow-origin"] == [b"*"]  # two are none to a browser
            assert b"access-control-allow-credentials" not in dict(found)
        assert (b"access-control-allow-headers", b"authorization,x-a") in (await ask(app, "OPTIONS", "/indices", asked)).headers
    for value in TEXT:
        hostile = [(b"access-control-request-method", b"PUT"), (b"access-control-request-headers", value)]
        check_headers(await ask(app, "OPTIONS", "/indices", hostile), value if LINE.fullmatch(value) else b"")
    closed, _ = application(cors=False)
    answer = await ask(closed, "OPTIONS", "/indices", [(b"origin", b"null"), (b"access-control-request-method", b"PUT")])
    assert not [name for name, _ in answer.headers if name.startswith(b"access-control-")]


async def test_answers_say_what_they_are_and_pages_are_confined() -> None:
    api = client_of()
    for path in ("/", "/health", "/livez", "/metrics", "/swagger-ui", "/swagger-ui/swagger-ui.css", "/swagger-ui/favicon.png", "/api-docs/openapi.json", "/nowhere", "/indices/x"):
        answer = await api.get(path)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in answer.headers
        assert answer.headers["content-type"].count("charset") <= 1
        assert "server" not in answer.headers and "x-powered-by" not in answer.headers
    page = await api.get("/swagger-ui")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"  # scripts from nowhere else, none inline
    assert policy["frame-ancestors"] == "'none'"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bon\w+=|https?://", page.text)


# Lambda


class Context:
    aws_request_id = "1"

    @staticmethod
    def get_remaining_time_in_millis() -> int:
        return 20_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_answers_in_clean_headers_even_where_it_refuses_by_itself(kind: str) -> None:
    log = io.StringIO()
    settings = Settings(compact=False, search_threads=1)
    runtime = Runtime(settings, store=open_store("memory://"))
    runtime.__dict__["log"] = make_logger("debug", stream=log)
    function = LambdaHandler(settings, runtime=runtime)
    n_requests = 0
    for size in (10, 7_000_000):
        for text in ("a\r\nSet-Cookie: planted=1", "a\nplanted: 1", "\x1b[31mplanted", "planted" * 2000, "a\u2028planted") if size == 10 else ("a\r\nSet-Cookie: planted=1",):
            sent = {"x-request-id": text, "content-type": "application/json", "access-control-request-headers": text}
            status, headers, _ = answer_of(function(make_event(kind, "POST", "/indices", b"x" * size, headers=sent), Context()))
            n_requests += 1
            assert status in (400, 413)
            assert not [value for value in headers.values() if "planted" in value or CONTROL.search(value)]
    strange = make_event(kind, "GET", "/indices/x")
    if kind in ("http_v2", "function_url"):
        strange["rawPath"] = "/indices/\ud800"
        assert answer_of(function(strange, Context()))[0] == 404
    function.close()
    assert len(log.getvalue().splitlines()) >= n_requests
    assert not [line for line in log.getvalue().splitlines() if "planted" in line or BREAKS.search(line)]


# A real server


@pytest.mark.slow
def test_bytes_that_are_no_http_end_at_the_door(tmp_path: Path) -> None:
    key, record = mint_key(SCOPES)
    records = json.dumps([{"id": record.id, "sha256": record.sha256, "scopes": list(record.scopes)}])
    with serving(index_dir=str(tmp_path), api_keys=records, tls_cert="", tls_key="") as server:

        def ask(line: bytes, *headers: bytes) -> bytes:
            with socket.create_connection(("127.0.0.1", server.settings.port), timeout=30) as connection:
                connection.sendall(b"\r\n".join([line + b" HTTP/1.1", b"Host: server", b"Connection: close", *headers, b"", b""]))
                answer = b""
                while chunk := connection.recv(65536):
                    answer += chunk
                return answer

        bearer = b"Authorization: Bearer " + key.encode()
        for value in TEXT:
            answer = ask(b"GET /indices", bearer, b"X-Request-ID: " + value, b"traceparent: " + value)
            head = answer.partition(b"\r\n\r\n")[0].lower()
            assert answer.startswith(b"HTTP/1.1 ") and b"set-cookie" not in head and b"\nplanted" not in head, answer
        for name in (b"%ff%fe", b"%ed%a0%80", b"a%00b%0d%0aX", b"..%2f..%2fetc", b"../../etc/passwd", b"%2e%2e", b"..%252f", b"\xff", b"a\x00b"):
            assert ask(b"GET /indices/" + name, bearer).split(b" ")[1] in (b"400", b"404"), name
        for path in (b"//metrics", b"/metrics/", b"/%6detrics", b"//internal/shard", b"/internal%2fshard", b"/%69nternal/shard"):
            assert ask(b"GET " + path, bearer).split(b" ")[1] in (b"404", b"405"), path
        assert ask(b"GET /metrics", bearer).split(b" ")[1] == b"200"
    lines = server.log.splitlines()
    assert len(lines) > len(TEXT)
    for line in lines:
        json.loads(line)
        assert not BREAKS.search(line)
        assert key not in line


# Terminals


def test_what_others_wrote_does_not_command_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "\x1b[31mred\x1b]0;title\x07\x9b2J\x08\x7f\u2028end"
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": hostile, "title": hostile, "text": "weft and warp"}) + "\n")
    run = CliRunner()
    store = ["--store", str(tmp_path / "store")]
    assert run.invoke(command, ["index", str(tmp_path / "d.jsonl"), "--name", "a", *store]).exit_code == 0
    assert run.invoke(command, ["pin", "add", "a", "p", "--note", hostile, *store]).exit_code == 0
    monkeypatch.setenv("TERM", "xterm-256color")
    for arguments in (
        ["search", "a", "weft"],
        ["search", "a", "weft", "--explain"],
        ["search", "a", "weft", "--json"],
        ["pin", "list", "a"],
        ["pin", "list", "a", "--json"],
        ["info", hostile],
        ["info", "a", "--json", "--generation", "9"],
        ["rollback", "a", "--pin", hostile],
        ["info", "a", "--store", str(tmp_path / hostile)],
    ):
        done = run.invoke(command, arguments if "--store" in arguments else [*arguments, *store])
        for shown in (done.stdout, done.stderr):
            assert not CONTROL.search(shown.replace("\n", "")), (arguments, shown)
        if "--json" in arguments and done.stdout:
            assert len(done.stdout.splitlines()) == 1
            json.loads(done.stdout)
    assert harmless("a\x1b[31m\tb\nc\x9bd\x7f") == "a[31m\tb\ncd"


# What errors tell


async def test_an_error_names_neither_servers_nor_folders_nor_keys(tmp_path: Path) -> None:
    options = StoreOptions(endpoint="http://127.0.0.1:9", region="r", access_key_id="AKIAPLANTED", secret_access_key="plantedsecret", first_backoff_s=0.001, timeout_s=1.0)
    key, record = mint_key(SCOPES)
    records = json.dumps([{"id": record.id, "sha256": record.sha256, "scopes": list(record.scopes)}])
    folder = tmp_path / "hidden-folder"
    folder.mkdir()
    (folder / "broken").mkdir()
    (folder / "broken/CURRENT").write_bytes(b"no manifest")
    cases: list[tuple[ObjectStore, dict[str, Any]]] = [
        (open_store("s3://hidden-bucket/hidden-prefix", options), {}),
        (open_store(str(folder)), {"model": str(tmp_path / "hidden-model"), "index_dir": str(folder)}),
    ]
    for store, settings in cases:
        app, log = application(store, api_keys=records, **settings)
        bearer = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")]
        for method, path, body in (
            ("GET", "/health", b""),
            ("GET", "/indices", b""),
            ("GET", "/indices/broken", b""),
            ("GET", "/indices/missing", b""),
            ("POST", "/indices", b'{"name": "broken"}'),
            ("POST", "/encode", b'{"texts": ["a"], "input_type": "query"}'),
            ("GET", "/indices/broken/export", b""),
        ):
            for headers in ([], bearer):
                if path == "/health" and headers and settings:
                    continue  # says where the store is, to who has a key (NextPlaid's health)
                answer = await ask(app, method, path, headers, body=body)
                told = answer.text + repr(answer.headers)
                assert not re.search(r"hidden|127\.0\.0\.1|PLANTED|planted|Traceback|\.py\b|site-packages|/tmp/", told), told
                assert str(ROOT) not in told
                assert sys.prefix not in told
                assert key not in told
        assert not re.search(f"PLANTED|plantedsecret|{key}|{record.sha256}", log.getvalue())


async def test_where_the_store_is_is_told_to_who_has_a_key() -> None:
    key, record = mint_key(["search"])
    records = json.dumps([{"id": record.id, "sha256": record.sha256, "scopes": ["search"]}])
    api = client_of(api_keys=records, index_dir="s3://hidden", model="hashing")
    passer_by, known = (await api.get("/health")).json(), (await api.get("/health", headers={"x-api-key": key})).json()
    assert (passer_by["index_dir"], passer_by["model"]["path"]) == ("", "")
    assert known["index_dir"] == "s3://hidden"
    assert (await client_of(index_dir="s3://hidden").get("/health")).json()["index_dir"] == "s3://hidden"  # nobody has a key


async def test_an_error_of_a_peer_does_not_name_it() -> None:
    lost = problem_of(Unavailable("a peer did not answer", code="shard-failed", peer="http://10.0.0.3:8080", why="ConnectError 10.0.0.3"))
    assert lost.message == "a peer did not answer"
    assert problem_of(CorruptData("x", object="a/b", cause="http://10.0.0.3/bucket")).message == "x object=a/b"
    assert problem_of(InvalidRequest("a peer refused", peer="http://10.0.0.3", status=400, why="no")).message == "a peer refused status=400 why=no"
    assert outward("[shard-failed] a peer did not answer peer=http://10.0.0.3:8080 why=ConnectError") == "[shard-failed] a peer did not answer"
