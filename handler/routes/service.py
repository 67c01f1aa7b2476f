"""The server itself: health, liveness and readiness, metrics, documentation."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import msgspec

from engine.errors import EngineError
from engine.index.indices import survey
from handler.problems import Problem, unavailable
from handler.routes.endpoint import Call, Endpoint, Reply
from handler.routes.indices import summary_of
from handler.runtime import Runtime, release
from handler.wire.answers import Alive, Health

STATIC = Path(__file__).resolve().parent.parent / "static"
MEDIA_TYPES = {  # Litestar adds the character set to text
    ".js": "text/javascript",
    ".css": "text/css",
    ".png": "image/png",
    ".html": "text/html",
}
_PAGE_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
_PAGE_HEADERS = {"Content-Security-Policy": _PAGE_POLICY, "Referrer-Policy": "no-referrer"}


async def health(call: Call) -> Reply:
    """NextPlaid's health. While the server drains it is 503, so that balancers look elsewhere."""
    _check_serving(call)
    runtime = call.runtime
    found = await survey(runtime.store)
    heads = found.heads
    _note_unreadable(runtime, found.unreadable)
    visible = runtime.gate.visible(call.caller, list(heads))
    is_known = runtime.gate.is_open or call.caller is not None  # where things lie is nothing for passers-by
    answer = Health(
        status="healthy",
        version=release(),
        loaded_indices=sum(runtime.reader.known_head(name) is not None for name in visible),
        index_dir=runtime.settings.index_dir if is_known else "",
        memory_usage_bytes=runtime.reader.parts.memory.used_bytes,
        indices=[summary_of(name, heads[name].manifest) for name in visible],
        updates=[],
    )
    info = await runtime.model_info()
    if info is not None:
        answer.model = {key: value for key, value in msgspec.to_builtins(info).items() if value is not None or key != "name"}
        if not is_known:
            answer.model["path"] = ""
    return Reply(answer)


def _note_unreadable(runtime: Runtime, unreadable: Mapping[str, EngineError]) -> None:
    """One index that cannot be read is no reason to take the server out for all: it is left out of the answer, and counted."""
    for error in unreadable.values():
        if runtime.metrics is not None:
            runtime.metrics.errors.labels(error.code).inc()


def _check_serving(call: Call) -> None:
    if call.runtime.is_draining():
        raise unavailable("the server is draining: it finishes what it has and takes nothing new", 5.0)


async def live(call: Call) -> Reply:
    """The process answers. Says nothing about the store: restarting does not heal a store."""
    return Reply(Alive("alive"))


async def ready(call: Call) -> Reply:
    """Requests are welcome: warm-up is over and the server is not draining."""
    _check_serving(call)
    if not call.runtime.is_warm():
        raise unavailable("the server is warming up", 2.0)
    return Reply(Alive("ready"))


async def metrics(call: Call) -> Reply:
    found = call.runtime.metrics
    if found is None:
        raise Problem("NO_SUCH_ROUTE", "metrics are switched off")
    call.runtime.count_process()
    text = await asyncio.to_thread(found.render)
    return Reply(text, media_type="text/plain; version=0.0.4")


async def documentation(call: Call) -> Reply:
    return Reply(_static("index.html"), media_type=MEDIA_TYPES[".html"], headers=_PAGE_HEADERS)


async def asset(call: Call) -> Reply:
    """One of the page's own files; anything else is 404, so no path leads out of the folder."""
    name = call.path["file"]
    if name not in _asset_names():
        raise Problem("NO_SUCH_ROUTE", "no such file")
    return Reply(_static(name), media_type=MEDIA_TYPES[Path(name).suffix], headers={"Cache-Control": "public, max-age=86400"})


@lru_cache(maxsize=1)
def _asset_names() -> frozenset[str]:
    return frozenset(path.name for path in STATIC.iterdir() if path.suffix in MEDIA_TYPES)


@lru_cache(maxsize=8)
def _static(name: str) -> bytes:
    return (STATIC / name).read_bytes()


async def openapi(call: Call) -> Reply:
    from handler.routes.openapi import document_bytes

    return Reply(document_bytes(), media_type="application/vnd.oai.openapi+json")


_HEALTH = {
    "status": "healthy",
    "version": "0.1.0",
    "loaded_indices": 1,
    "index_dir": "./data/indices",
    "memory_usage_bytes": 1048576,
    "indices": [
        {
            "name": "papers",
            "num_documents": 2,
            "num_embeddings": 40,
            "num_partitions": 0,
            "dimension": 128,
            "nbits": 4,
            "avg_doclen": 20.0,
            "has_metadata": True,
        }
    ],
    "updates": [],
}

ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/",
        name="root",
        handle=health,
        summary="Health, as GET /health",
        answer=Health,
        answer_example=_HEALTH,
        tag="service",
        scope=None,
        area="health",
        timeout="short",
    ),
    Endpoint(
        method="GET",
        path="/health",
        name="health",
        handle=health,
        summary="Health: release, memory, every index, the model",
        answer=Health,
        answer_example=_HEALTH,
        tag="service",
        scope=None,
        area="health",
        timeout="short",
        description="503 while the server drains. With access control on, indices are listed only to keys that reach them.",
    ),
    Endpoint(
        method="GET",
        path="/livez",
        name="livez",
        handle=live,
        summary="The process answers",
        answer=Alive,
        answer_example={"status": "alive"},
        tag="service",
        scope=None,
        area="probe",
        timeout="short",
    ),
    Endpoint(
        method="GET",
        path="/readyz",
        name="readyz",
        handle=ready,
        summary="Requests are welcome",
        answer=Alive,
        answer_example={"status": "ready"},
        tag="service",
        scope=None,
        area="probe",
        timeout="short",
    ),
    Endpoint(
        method="GET",
        path="/metrics",
        name="metrics",
        handle=metrics,
        summary="Prometheus metrics",
        answer="text/plain",
        answer_example="# HELP next_plaid_active_requests Requests being answered\n",
        tag="service",
        scope=None,
        area="metrics",
        errors=("NO_SUCH_ROUTE",),
    ),
    Endpoint(
        method="GET",
        path="/swagger-ui",
        name="swagger_ui",
        handle=documentation,
        summary="This description as a page",
        answer="text/html",
        tag="service",
        scope=None,
        area="docs",
    ),
    Endpoint(
        method="GET",
        path="/swagger-ui/{file}",
        name="swagger_ui_file",
        handle=asset,
        summary="A file of that page",
        answer="*/*",
        tag="service",
        scope=None,
        area="docs",
        errors=("NO_SUCH_ROUTE",),
    ),
    Endpoint(
        method="GET",
        path="/api-docs/openapi.json",
        name="openapi",
        handle=openapi,
        summary="This description",
        answer="application/vnd.oai.openapi+json",
        tag="service",
        scope=None,
        area="docs",
    ),
)
