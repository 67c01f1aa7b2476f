"""Whole requests: methods, paths, query strings, headers and bodies, through the application."""

from __future__ import annotations

import json
import urllib.parse
from functools import cache
from typing import Any

from handler.routes.table import ENDPOINTS

from .mutation import mutated_json
from .service import UPLOAD, Service, check_answer
from .target import Target, closed_later

_HEADERS = {
    "content-type": "application/json", "accept-encoding": "gzip", "x-request-id": "a-1", "content-length": "2", "x-embeddings-format": "base64",
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate": "a=b", "authorization": "Bearer k", "x-api-key": "k",
    "x-forwarded-for": "192.0.2.7, 10.0.0.1", "x-tartan-answer": "auto", "content-encoding": "identity", "origin": "http://a", "host": "h",
    "access-control-request-method": "GET",
}  # fmt: skip


@cache
def _service() -> Service:
    service = Service()
    closed_later(service.close)
    return service


def ask(data: bytes) -> bool:
    """JSON {method, path, query, headers, body}; a body that is a string travels as it is, anything else as JSON."""
    try:
        request = json.loads(data)
        method, path, query = (str(request.get(name, default)) for name, default in (("method", "GET"), ("path", "/"), ("query", "")))
        given = request.get("headers", {})
    except (ValueError, AttributeError, RecursionError):
        return False
    if "body" not in request:
        body = b""
    elif isinstance(request["body"], str):
        body = request["body"].encode("utf-8", "surrogateescape" if "\udcff" in request["body"] else "replace")
    else:
        body = json.dumps(request["body"]).encode()
    headers = [(_header(name).lower(), _header(str(value))) for name, value in given.items()] if isinstance(given, dict) else []
    # What a server decodes of a path is any text but one with unpaired surrogates.
    path = "/" + urllib.parse.unquote(path, errors="replace").encode(errors="replace").decode().lstrip("/")
    answer = _service().ask(method[:20], path, body, headers, query.encode(errors="replace"))
    return check_answer(answer, is_head=method == "HEAD")


def _header(text: str) -> bytes:
    """As a server lets it through: no line ends, no NUL."""
    return text.encode("latin-1", "replace").translate(None, b"\r\n\0")


def seed(method: str, path: str, body: Any = None, query: str = "", **headers: str) -> bytes:
    request: dict[str, Any] = {"method": method, "path": path, "query": query, "headers": {"content-type": "application/json", **headers}}
    return json.dumps(request | ({} if body is None else {"body": body})).encode()


def _seeds() -> list[bytes]:
    places = {"name": "papers", "pin": "p", "alias": "a", "upload": UPLOAD, "file": "swagger-ui.css", "generation": "1"}
    found = []
    for endpoint in ENDPOINTS:
        path = endpoint.path.replace("{name}", "texts") if "encod" in endpoint.name or endpoint.name == "delete_index" else endpoint.path
        for place, value in places.items():
            path = path.replace("{" + place + "}", value)
        found.append(seed(endpoint.method, path, endpoint.request_example))
    vectors = [[0.1, 0.2, 0.3, 0.4], [0.5, -0.6, 0.7, 0.8]]
    search = {
        "queries": [{"embeddings": vectors}], "params": {"top_k": 3, "n_full_scores": 50, "preset": "exact"}, "explain": True, "with_ids": True,
        "text_query": ["word1 loom"], "alpha": 0.3, "filter_condition": "year > ?", "filter_parameters": [1991],
    }  # fmt: skip
    documents = {"documents": [{"embeddings": vectors}], "metadata": [{"title": "new", "year": 7}], "ids": ["key1"]}
    found += [
        seed("POST", "/indices/papers/search", search), seed("POST", "/indices/bare/search", {"queries": [{"embeddings": vectors}], "as_of": 0}),
        seed("POST", "/indices/papers/update", documents), seed("POST", "/indices/empty/update", documents),
        seed("GET", "/indices/papers/export", query="vectors=false"), seed("POST", "/indices", {"name": "new"}), seed("PUT", "/aliases/b", {"index": "bare"}), seed("GET", "/indices/papers%2f..%00/metadata", None, "a=b&a=%ff"),
        seed("DELETE", "/indices/papers/documents", {"condition": "year BETWEEN ? AND ?", "parameters": [1995, 1997]}),
        seed("POST", "/indices/papers/metadata/update", {"condition": "_subset_ < ?", "parameters": [5], "updates": {"title": "z", "year": None}}),
        seed("OPTIONS", "/indices/papers/search", None, **{"access-control-request-method": "POST", "origin": "http://x"}),
        json.dumps({"method": "POST", "path": "/rerank", "headers": _HEADERS, "body": {"query": vectors, "documents": [{"embeddings": vectors}]}}).encode(),
    ]  # fmt: skip
    return found


REQUEST = Target(
    "request", "whole requests: paths, query strings, headers, bodies", ask, _seeds,
    (b"../", b"%00", b"%2f", b"\xc3\xa9", b"papers", b"bare", b"empty", b"/search", b"null", b"\\u0000", b"\\ud800"), mutated_json,
)  # fmt: skip
