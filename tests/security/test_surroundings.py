"""What lies around the routes: addresses that are given away, requests that the server could be made to send, TLS."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.parse
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from conftest import s3_options
from engine.format import names
from engine.store.base import ObjectStore
from engine.store.objects import open_store, signed_address
from handler.app import create_app
from handler.routes.table import ENDPOINTS
from handler.routes.uploads import ADDRESS_LIFE_S
from s3_server import S3Server
from security.raw import JSON, ask
from serving import Served, client_of

# Addresses


@pytest.fixture
async def by_s3(s3_store: ObjectStore) -> httpx.AsyncClient:
    api = client_of(s3_store)
    for name in ("papers", "others"):
        assert (await api.post("/indices", json={"name": name})).status_code == 200
    return api


def parts(url: str) -> tuple[str, dict[str, str]]:
    """Path and query of an address."""
    found = urllib.parse.urlsplit(url)
    return found.path, dict(urllib.parse.parse_qsl(found.query))


async def test_an_address_is_for_one_object_one_method_and_one_hour(by_s3: httpx.AsyncClient, s3_url: str) -> None:
    given = (await by_s3.post("/indices/papers/uploads")).json()
    path, query = parts(given["url"])
    assert path == "/" + s3_url.removeprefix("s3://") + "/" + names.upload("papers", given["upload_id"], "data")
    assert names.is_id(given["upload_id"])
    assert int(query["X-Amz-Expires"]) == ADDRESS_LIFE_S == 3600
    left_s = (datetime.fromisoformat(given["expires_at"]) - datetime.now(UTC)).total_seconds()
    assert 3500 < left_s <= 3601
    assert query["X-Amz-SignedHeaders"] == "host"
    assert set(query) <= {"X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires", "X-Amz-SignedHeaders", "X-Amz-Signature", "X-Amz-Security-Token"}
    assert "secret" not in given["url"]
    again = (await by_s3.post("/indices/papers/uploads")).json()
    assert parts(again["url"])[0] != path
    assert parts(again["url"])[1]["X-Amz-Signature"] != query["X-Amz-Signature"]
    assert given["max_bytes"] > 0


async def test_the_signature_covers_key_and_method(s3: S3Server, s3_url: str) -> None:
    store = open_store(s3_url, s3_options(s3))
    signed = {(method, name): parts(await signed_address(store, method, name, 60.0))[1]["X-Amz-Signature"] for method in ("GET", "PUT") for name in ("a/x", "a/y")}
    assert len(set(signed.values())) == 4
    for hostile in ("../other/x", "/etc/passwd", "a/../b", "", "a\n", "a?x"):
        with pytest.raises(ValueError, match="name"):
            await signed_address(store, "PUT", hostile, 60.0)


async def test_an_upload_is_committed_only_where_it_was_begun(by_s3: httpx.AsyncClient) -> None:
    given = (await by_s3.post("/indices/papers/uploads")).json()
    body = json.dumps({"documents": [{"embeddings": [[1.0, 2.0]]}]}).encode()
    async with httpx.AsyncClient(trust_env=False) as stranger:
        put = await stranger.put(given["url"], content=body, headers={"content-type": "application/json"})
    assert put.status_code == 200
    elsewhere = await by_s3.post(f"/indices/others/uploads/{given['upload_id']}/commit")
    assert (elsewhere.status_code, elsewhere.json()["code"]) == (404, "UPLOAD_NOT_FOUND")
    assert (await by_s3.get("/indices/papers")).status_code == 404  # nothing is there before the commit
    assert (await by_s3.post(f"/indices/papers/uploads/{given['upload_id']}/commit")).status_code == 202


async def test_an_upload_that_is_too_large_is_not_read(s3_store: ObjectStore) -> None:
    """The address itself does not bound what is put there; the commit does, by the listing."""
    api = client_of(s3_store, max_upload_bytes=100)
    await api.post("/indices", json={"name": "papers"})
    upload = names.fresh_id()
    await s3_store.put_if_absent(names.upload("papers", upload, "data"), b"x" * 101)
    read = api.runtime.counting.total.bytes_read  # type: ignore[attr-defined]
    answer = await api.post(f"/indices/papers/uploads/{upload}/commit")
    assert (answer.status_code, answer.json()["code"]) == (413, "PAYLOAD_TOO_LARGE")
    assert api.runtime.counting.total.bytes_read - read < 2000  # type: ignore[attr-defined]


# Requests that the server could be made to send

_calls: list[tuple[str, Any]] = []
_is_listening = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _is_listening and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "subprocess.Popen", "os.system", "os.exec"):
        _calls.append((event, arguments))


sys.addaudithook(_hook)


@pytest.fixture
def calls() -> Iterator[list[tuple[str, Any]]]:
    global _is_listening
    _calls.clear()
    _is_listening = True
    yield _calls
    _is_listening = False


URLS = ("http://169.254.169.254/latest/meta-data/", "http://127.0.0.1:9/", "s3://other/x", "file:///etc/passwd", "gopher://127.0.0.1:9/", "owner/model", "\\\\host\\share")


def filled_with(value: Any, text: str) -> Any:
    """A body with this text wherever a string may stand."""
    if isinstance(value, dict):
        return {key: filled_with(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [filled_with(item, text) for item in value]
    return text if isinstance(value, str) else value


async def test_nothing_in_a_request_makes_the_server_call_anybody(calls: list[tuple[str, Any]]) -> None:
    api = client_of(model="hashing")
    await api.post("/indices", json={"name": "papers"})
    app = create_app(runtime=api.runtime)  # type: ignore[attr-defined]
    for n, endpoint in enumerate(ENDPOINTS):
        path = endpoint.path.replace("{name}", "papers").replace("{alias}", "live").replace("{pin}", "p").replace("{file}", "x").replace("{upload}", "x")
        for url in (URLS[n % len(URLS)], URLS[(n + 3) % len(URLS)]):
            more = [(name, url.encode()) for name in (b"host", b"x-forwarded-host", b"forwarded", b"referer", b"origin", b"x-tartan-answer", b"traceparent")]
            body = b"" if endpoint.body is None else json.dumps(filled_with(endpoint.request_example, url)).encode()
            answer = await ask(app, endpoint.method, path, JSON + more, query=b"url=" + url.encode(), body=body)
            assert answer.status < 500, (endpoint.path, answer)
            assert not [value for _, value in answer.headers if url.encode() in value]
    assert calls == []


def test_the_listener_hears(calls: list[tuple[str, Any]]) -> None:
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", 9), timeout=1):
        pass
    assert calls


def test_no_body_has_a_field_for_an_address_or_a_model() -> None:
    for endpoint in ENDPOINTS:
        if endpoint.body is not None:
            fields = {field.encode_name for field in msgspec.structs.fields(endpoint.body)}
            assert not fields & {"url", "uri", "endpoint", "callback", "webhook", "model", "path", "file", "source", "bucket", "host", "proxy"}, endpoint.name


# TLS


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed (package openssl)")
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    names_of = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-keyout", key, "-out", cert, *names_of]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.mark.slow
def test_a_server_with_a_certificate_speaks_modern_tls_and_nothing_else(tmp_path: Path, certificate: tuple[str, str]) -> None:
    cert, key = certificate

    def handshake(port: int, version: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=cert)
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = version
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=30) as plain, context.wrap_socket(plain, server_hostname="localhost") as wrapped:
                wrapped.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert wrapped.recv(100).startswith(b"HTTP/1.1 200")
                return wrapped.version()
        except (ssl.SSLError, ConnectionError):
            return None

    server_settings: dict[str, Any] = {"index_dir": str(tmp_path / "store"), "tls_cert": cert, "tls_key": key}
    server = Served({}, **server_settings)
    try:
        for _ in range(400):
            try:
                found = handshake(server.settings.port, ssl.TLSVersion.TLSv1_3)
            except OSError:
                found = None
            if found:
                break
            assert server.process.poll() is None, server.log


            time.sleep(0.1)
        assert found == "TLSv1.3"
        assert handshake(server.settings.port, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            assert handshake(server.settings.port, ssl.TLSVersion.TLSv1_1) is None
            assert handshake(server.settings.port, ssl.TLSVersion.TLSv1) is None
        with socket.create_connection(("127.0.0.1", server.settings.port), timeout=30) as plain:
            plain.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            try:
                assert b"200" not in plain.recv(1000)
            except ConnectionError:
                pass
    finally:
        server.end()
    assert "PRIVATE KEY" not in server.log


