"""Requests that no client library would send, handed to the application as a server hands them over."""

from __future__ import annotations

import urllib.parse
from typing import Any, NamedTuple

from handler.app import Application

Headers = list[tuple[bytes, bytes]]
JSON: Headers = [(b"content-type", b"application/json")]


class Answer(NamedTuple):
    status: int
    headers: Headers
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


async def ask(app: Application, method: str, path: str, headers: Headers, query: bytes = b"", body: bytes = b"", *, is_raw: bool = False) -> Answer:
    """is_raw: `path` is what stood in the request line, still to be decoded; else it is decoded already."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    decoded = urllib.parse.unquote(path, errors="replace") if is_raw else path
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": decoded,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "query_string": query,
        "root_path": "",
        "scheme": "http",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("server", 80),
    }
    await app(scope, receive, send)
    return Answer(sent[0]["status"], sent[0]["headers"], b"".join(message.get("body", b"") for message in sent[1:]))
