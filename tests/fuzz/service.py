"""A service in this process: the application over a store in memory, with two filled indices, driven by its ASGI interface alone.

So that every byte of a request is the fuzzer's, no client library stands between. Answers are held against the contract.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np

from engine.config import IndexConfig, MaintenanceParams
from engine.format import names
from engine.index.aliases import Aliases
from engine.index.commit import create
from engine.index.compact import compact
from engine.index.reader import Reader
from engine.index.snapshots import pin
from engine.store.base import ObjectStore
from engine.store.objects import open_store
from handler.app import create_app
from handler.problems import STATUSES
from handler.runtime import Runtime
from handler.settings import Settings

from .target import Wrong

T = TypeVar("T")
DIM = 4
UPLOAD = "01KATR0000000000000000000A"
RENEWED_AFTER = 300
"""Requests, some of which delete indices, until a fresh service takes over."""


async def filled_store() -> ObjectStore:
    """`papers`: a quantised and a flat segment, fields, keys, a deleted document, a pin `p`, an alias `a`, an upload. `bare`: no fields.
    `empty`: declared only. `texts`: of the lexical encoder's dimension."""
    store, rng = open_store("memory://"), np.random.default_rng(2)
    reader = Reader(store)
    for name in ("papers", "bare", "empty"):
        await create(store, name, IndexConfig(nbits=4))
    for first, last in ((0, 40), (40, 48)):
        fields = [{"title": f"word{n} loom", "year": 1990 + n, "score": n / 4} for n in range(first, last)]
        tokens, offsets = rng.standard_normal((3 * (last - first), DIM)).astype(np.float32), np.arange(0, 3 * (last - first) + 1, 3)
        await reader.writer("papers").add(tokens, offsets, fields=fields, keys=[f"key{n}" for n in range(first, last)])
        if first == 0:
            await compact(reader, "papers", force=True, params=MaintenanceParams(min_quantise_documents=10))
            await reader.writer("bare").add(tokens, offsets)
    await reader.writer("papers").delete(np.array([3, 41]))
    await create(store, "texts", IndexConfig())
    await reader.writer("texts").add(rng.standard_normal((3, 128)).astype(np.float32), np.arange(4), fields=[{"title": "a" * 64}] * 3)
    await pin(store, "papers", "p")
    await Aliases(store).point("a", "papers")
    await store.put_if_absent(names.upload("papers", UPLOAD, "data"), b'{"documents": [{"embeddings": [[0, 1, 2, 3]]}]}')
    return store


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body, parse_constant=_no_constant)


def _no_constant(text: str) -> NoReturn:
    raise Wrong(f"{text} in an answer, which is no JSON")


class Service:
    """Makes itself anew after RENEWED_AFTER requests. Not for several threads."""

    def __init__(self, **settings: Any) -> None:
        self._settings = {"log_level": "off", "search_threads": 1, "model": "hashing", "compact": False, "metrics": False, **settings}
        self._runner = asyncio.Runner()
        self._n_requests = 0
        self.runtime: Runtime | None = None

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: list[tuple[bytes, bytes]] | None = None, query: bytes = b""
    ) -> Answer:
        if self.runtime is None or self._n_requests >= RENEWED_AFTER:
            self._renew()
        self._n_requests += 1
        answer = self._runner.run(self._asked(method, path, body, headers or [], query))
        if method == "DELETE" and path.count("/") == 2 and answer.status == 200:
            self._n_requests = RENEWED_AFTER  # an index less: later requests would find nothing
        return answer

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for something else on the service's own loop."""
        return self._runner.run(work)

    def close(self) -> None:
        if self.runtime is not None:
            self.runtime.close()
        self._runner.close()

    def _renew(self) -> None:
        if self.runtime is not None:
            self.runtime.close()
        self.runtime = Runtime(Settings(**self._settings), store=self._runner.run(filled_store()))
        self._app = create_app(runtime=self.runtime)
        self._n_requests = 0

    async def _asked(self, method: str, path: str, body: bytes, headers: list[tuple[bytes, bytes]], query: bytes) -> Answer:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
            "raw_path": path.encode(errors="replace"), "query_string": query, "root_path": "", "headers": headers,
            "client": ("192.0.2.1", 5), "server": ("server", 80),
        }  # fmt: skip
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        over = asyncio.Event()
        found = Answer(0, {}, b"")

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await over.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                found.status = message["status"]
                found.headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in message["headers"]}
            else:
                found.body += message.get("body", b"")
                if not message.get("more_body", False):
                    over.set()

        await self._app(scope, receive, send)
        return found


def check_answer(answer: Answer, is_head: bool = False) -> bool:
    """True for a success, False for a refusal in the contract's form; Wrong for anything else.

    is_head  whether HEAD was asked, whose answers have no body
    """
    if is_head and not answer.body:
        return answer.status == 200
    if answer.status in (200, 202):
        if (
            answer.headers.get("content-type", "").startswith("application/json")
            and "content-encoding" not in answer.headers
            and answer.body
        ):
            _check_scores(answer.json())
        return True
    try:
        body = answer.json()
        code, message = body["code"], body["message"]
    except (ValueError, KeyError, TypeError) as error:
        raise Wrong(f"status {answer.status} with the body {answer.body[:200]!r}") from error
    has_message = isinstance(message, str) and (message or code == "INDEX_NOT_FOUND")  # there the name alone, which may have been none
    if STATUSES.get(code) != answer.status or not has_message:
        raise Wrong(f"status {answer.status} with code {code} and message {message!r}")
    if answer.status >= 500 and answer.status != 503:
        raise Wrong(f"{answer.status} {code}: {message}")
    return False


def _check_scores(body: Any) -> None:
    for result in body.get("results", []) if isinstance(body, dict) else []:
        scores = result["scores"] if "scores" in result else [result.get("score")]
        if any(not isinstance(score, float | int) for score in scores):
            raise Wrong(f"scores that are no numbers: {scores}")
