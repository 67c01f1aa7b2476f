"""`tartan smoke`: try a server that is about to get traffic, over HTTP, as a client would.

Makes an index of its own, uses it in every way that matters, and deletes it; with --read-only only looks and searches. Nothing here uses
the engine: what is tried is the server at the other end, whatever release it runs.
"""

from __future__ import annotations

import base64
import json
import random
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit, urlunsplit

import typer

from handler.cli.session import AsJson, print_json, stdout, table

DIM, TOKENS, DOCUMENTS = 16, 4, 12
NAMES = tuple(f"smoke-{n}" for n in range(16))
"""What the index may be called: a few names that are used again, since each name that ever was deleted leaves some bytes in the store."""


def register(app: typer.Typer) -> None:
    app.command("smoke")(smoke)


def smoke(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where the server is; may carry user:password@ for basic auth.")],
    read_only: Annotated[bool, typer.Option("--read-only", help="Change nothing: health, and a search of an index that is there.")] = False,
    index: Annotated[
        str | None, typer.Option("--index", help="With --read-only, the index to search.", show_default="one with documents")
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", envvar="TARTAN_API_KEY", help="API key; needs every scope.", show_default=False)
    ] = None,
    ca: Annotated[str | None, typer.Option("--ca", metavar="FILE", help="Certificate to trust, for one that you signed yourself.")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout-s", min=0.1, help="Longest wait for one answer.")] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Try a server: make an index, add, search, filter, delete, and check every answer. Exit code 1 if anything is wrong.

    What it made is deleted, whatever happens. For a deployment before it gets traffic, and for a replica after an update.

    [dim]tartan smoke http://127.0.0.1:8080
    TARTAN_API_KEY=... tartan smoke https://search.example.com --read-only --index papers --json[/dim]
    """
    trial = _Trial(_Client(url, key, ca, timeout_s))
    if read_only:
        _look(trial, index)
    else:
        _use(trial)
    if as_json:
        print_json({"url": trial.client.shown, "is_good": trial.is_good, "release": trial.release, "steps": trial.steps})
    else:
        _show(trial)
    if not trial.is_good:
        raise typer.Exit(1)


class _Wrong(Exception):
    """A check failed; the text says what was expected and found."""


@dataclass
class _Client:
    """JSON over urllib: the command must not need more than the server itself."""

    url: str
    key: str | None
    ca: str | None
    timeout_s: float

    def __post_init__(self) -> None:
        parts = urlsplit(self.url if "://" in self.url else f"http://{self.url}")
        self.headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            self.headers["X-API-Key"] = self.key
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self.headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        self.shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if parts.scheme == "https":
            try:
                handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=self.ca)))
            except OSError as error:
                raise typer.BadParameter(f"the certificate {self.ca!r} cannot be read") from error
        self._opener = urllib.request.build_opener(*handlers)

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """(status, decoded body). _Wrong if there is no answer, or one that is not JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.shown + path, data=data, method=method, headers=self.headers)
        try:
            with self._opener.open(request, timeout=self.timeout_s) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        except (OSError, ValueError) as error:
            raise _Wrong(f"no answer: {getattr(error, 'reason', error)}") from error
        try:
            return status, json.loads(content)
        except ValueError as error:
            raise _Wrong(f"status {status}, and no JSON") from error

    def must(self, method: str, path: str, body: object = None, *, status: int = 200) -> Any:
        found, answer = self.ask(method, path, body)
        if found != status:
            raise _Wrong(f"status {found} instead of {status}: {json.dumps(answer)[:200]}")
        return answer


@dataclass
class _Trial:
    """The steps so far. After the first failure the others are not tried, but for those that clean up."""

    client: _Client
    release: str | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return all(step["is_good"] for step in self.steps)

    def step(self, name: str, work: Callable[[], str | None], *, always: bool = False) -> None:
        if not self.is_good and not always:
            return
        began_s, is_good, said = time.perf_counter(), True, None
        try:
            said = work()
        except _Wrong as error:
            is_good, said = False, str(error)
        except (KeyError, IndexError, TypeError) as error:
            is_good, said = False, f"an answer of another shape: {error!r}"
        ms = round((time.perf_counter() - began_s) * 1000, 1)
        self.steps.append({"name": name, "is_good": is_good, "ms": ms, "said": said})


def _show(trial: _Trial) -> None:
    shown = table("step", "", "ms", "", right=("ms",))
    for step in trial.steps:
        shown.add_row(step["name"], "ok" if step["is_good"] else "FAILED", f"{step['ms']:.1f}", step["said"] or "")
    stdout().print(shown)
    verdict = "good" if trial.is_good else "not good"
    stdout().print(f"{trial.client.shown} is {verdict} (release {trial.release or 'unknown'})", markup=False)


def _same(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise _Wrong(f"{what}: expected {expected}, found {found}")


# What is tried


def _alive(trial: _Trial) -> None:
    client = trial.client

    def health() -> str:
        answer = client.must("GET", "/health")
        trial.release = answer["version"]
        _same(answer["status"], "healthy", "health")
        return f"release {answer['version']}"

    def ready() -> None:
        client.must("GET", "/readyz")

    trial.step("ready", ready)
    trial.step("health", health)


def _use(trial: _Trial) -> None:
    """Everything, on an index made for it."""
    client, rng = trial.client, random.Random()
    matrices = [_matrix(rng) for _ in range(DOCUMENTS)]
    name = path = ""

    def refuse() -> str:
        nonlocal name, path
        for name in rng.sample(NAMES, len(NAMES)):
            path = f"/indices/{name}"
            status, answer = client.ask("GET", path)
            if status != 200:
                _same((status, answer["code"]), (404, "INDEX_NOT_FOUND"), "answer to a question about an index that is not there")
                return name
        raise _Wrong(f"{NAMES[0]} to {NAMES[-1]} all exist: trials that were killed left them; delete them")

    def add() -> str:
        documents = [{"embeddings": matrix} for matrix in matrices]
        rows = [{"n": n, "word": f"smoke{n}"} for n in range(DOCUMENTS)]
        client.must("POST", f"{path}/update", {"documents": documents, "metadata": rows}, status=202)
        _same(client.must("GET", path)["num_documents"], DOCUMENTS, "documents")
        return f"{DOCUMENTS} documents"

    def search() -> None:
        _same(_hits(client, f"{path}/search", matrices[5])[0], 5, "best hit of a document's own vectors")

    def restrict() -> None:
        body: dict[str, Any] = {"filter_condition": "n >= ?", "filter_parameters": [9]}
        _same(sorted(_hits(client, f"{path}/search/filtered", matrices[5], **body)), [9, 10, 11], "hits of a filtered search")

    def keyword() -> None:
        answer = client.must("POST", f"{path}/search", {"text_query": ["smoke7"], "params": {"top_k": 1}})
        _same(answer["results"][0]["document_ids"], [7], "hit of a keyword search")

    def delete() -> None:
        client.must("DELETE", f"{path}/documents", {"condition": "n = ?", "parameters": [5]}, status=202)
        _same(5 in _hits(client, f"{path}/search", matrices[5]), False, "a deleted document is found")

    def drop() -> None:
        client.must("DELETE", path)

    _alive(trial)
    trial.step("refuse what is not there", refuse)
    trial.step("create", lambda: client.must("POST", "/indices", {"name": name}) and None)
    made = trial.is_good
    trial.step("add", add)
    trial.step("search", search)
    trial.step("filter", restrict)
    trial.step("keyword search", keyword)
    trial.step("delete", delete)
    if made:
        trial.step("drop", drop, always=True)


def _look(trial: _Trial, name: str | None) -> None:
    """What can be tried without changing anything."""
    client = trial.client
    chosen: dict[str, Any] = {}

    def choose() -> str:
        if name is not None:
            chosen.update(client.must("GET", f"/indices/{name}"))
            return f"{name}: {chosen['num_documents']} documents"
        for found in client.must("GET", "/indices"):
            facts = client.must("GET", f"/indices/{found}")
            if facts["num_documents"]:
                chosen.update(facts)
                return f"{found}: {facts['num_documents']} documents"
        return "no index has documents: nothing to search"

    def search() -> str:
        k = min(5, chosen["num_documents"])
        path = f"/indices/{chosen['name']}/search"
        ids = _hits(client, path, _matrix(random.Random(0), chosen["dimension"]), top_k=k)
        _same(len(ids), k, "hits")
        return f"{k} hits"

    _alive(trial)
    trial.step("find an index", choose)
    if chosen.get("num_documents"):
        trial.step("search", search)


def _matrix(rng: random.Random, dim: int = DIM) -> list[list[float]]:
    return [[round(rng.gauss(0.0, 1.0), 4) for _ in range(dim)] for _ in range(TOKENS)]


def _hits(client: _Client, path: str, matrix: list[list[float]], *, top_k: int = 5, **more: object) -> list[int]:
    answer = client.must("POST", path, {"queries": [{"embeddings": matrix}], "params": {"top_k": top_k}, **more})
    ids: list[int] = answer["results"][0]["document_ids"]
    return ids
