"""Events of Lambda: what gateways, function URLs, load balancers and state machines hand over."""

from __future__ import annotations

import asyncio
import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.index.commit import load_head
from engine.store.base import ObjectStore
from handler.lambda_tasks import Tasks
from handler.runtime import Runtime
from handler.settings import Settings

from .mutation import mutated_json
from .service import RENEWED_AFTER, Answer, check_answer, filled_store
from .target import Target, Wrong, asked, closed_later

EVENTS = Path(__file__).resolve().parent.parent / "events"
_QUERY = {"queries": [{"embeddings": [[0.1, 0.2, 0.3, 0.4]]}], "params": {"top_k": 2}}
_SETTINGS: dict[str, Any] = {"log_level": "off", "metrics": False, "compact": False, "search_threads": 1}


# HTTP


class _Function:
    """A handler whose store is filled anew now and then."""

    def __init__(self) -> None:
        self._n_calls = RENEWED_AFTER
        self._handler: Any = None

    def __call__(self, event: Any) -> Any:
        from handler.lambda_http import LambdaHandler

        if self._n_calls >= RENEWED_AFTER:
            self.close()
            runtime = Runtime(Settings(**_SETTINGS, presume=True), store=asyncio.run(filled_store()))
            self._handler = LambdaHandler(runtime.settings, runtime=runtime)
            self._n_calls = 0
        self._n_calls += 1
        return self._handler(event, None)

    def close(self) -> None:
        if self._handler is not None:
            self._handler.close()
            asyncio.set_event_loop(None)


@cache
def function() -> _Function:
    made = _Function()
    closed_later(made.close)
    return made


def hand_over(data: bytes) -> bool:
    """An answer in the gateway's form whose status and body are the contract's; RuntimeError for what is no HTTP event."""
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        return False
    try:
        answer = function()(event)
    except RuntimeError as error:
        if type(error) is not RuntimeError or not str(error):
            raise
        return False
    json.dumps(answer)  # what the runtime does with it
    headers = {name.lower(): value for name, value in (answer.get("headers") or {}).items()}
    headers |= {name.lower(): values[-1] for name, values in (answer.get("multiValueHeaders") or {}).items()}
    body = answer.get("body") or ""
    found = Answer(answer["statusCode"], headers, base64.b64decode(body) if answer.get("isBase64Encoded") else body.encode())
    return check_answer(found, is_head=b"HEAD" in data)


def _events() -> list[bytes]:
    found = []
    for kind in ("rest_v1", "http_v2", "function_url", "alb_single", "alb_multi"):
        for method, path, body in (("POST", "/indices/papers/search", _QUERY), ("GET", "/indices/papers", None)):
            event = json.loads((EVENTS / f"{kind}.json").read_text())
            if kind in ("http_v2", "function_url"):
                event["rawPath"] = event["requestContext"]["http"]["path"] = path
                event["requestContext"]["http"]["method"] = method
            else:
                event["path"], event["httpMethod"] = path, method
            if body is not None:
                text = json.dumps(body)
                event["isBase64Encoded"] = kind == "alb_multi"
                event["body"] = base64.b64encode(text.encode()).decode() if event["isBase64Encoded"] else text
            found.append(json.dumps(event).encode())
    return found


EVENT = Target("event", "HTTP events of API Gateway v1 and v2, function URLs, load balancers", hand_over, _events, mutate=mutated_json)


# Tasks of state machines


class _Tasks:
    """Tasks over a store that is filled anew now and then. Inputs of builds lie in that store whatever an event says: nothing else is opened."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self._n_calls = RENEWED_AFTER
        self._tasks: Tasks | None = None
        self.store: ObjectStore | None = None

    def tasks(self) -> Tasks:
        if self._n_calls >= RENEWED_AFTER or self._tasks is None:
            self.close()
            self.store = self.runner.run(_store())
            self._tasks = Tasks(Runtime(Settings(**_SETTINGS, model="hashing"), store=self.store))
            self._tasks._store_of = lambda asked: self.store  # type: ignore[method-assign]
            self._n_calls = 0
        self._n_calls += 1
        return self._tasks

    def close(self) -> None:
        if self._tasks is not None:
            self._tasks.runtime.close()

    def end(self) -> None:
        self.close()
        self.runner.close()


async def _store() -> ObjectStore:
    store = await filled_store()
    await store.put_if_absent("inputs/a.jsonl", b'{"text": "one"}\n{"text": "two"}\n')
    return store


@cache
def tasks() -> _Tasks:
    made = _Tasks()
    closed_later(made.end)
    return made


def take(data: bytes) -> bool:
    """The first byte chooses the function: shard, coordinate, build, maintain. Every refusal is a kind of engine/errors.py."""
    try:
        event = json.loads(data[1:])
    except (ValueError, RecursionError):
        return False
    found = tasks().tasks()
    work = (found.shard, found.coordinate, lambda event: found.build(event, 4.0), lambda event: found.maintain(event, 4.0))[data[0] % 4]
    accepted, answer = asked(lambda: tasks().runner.run(work(event)))
    if accepted and not isinstance(answer, dict):
        raise Wrong(f"an answer that is no object: {answer!r}")
    if accepted:
        json.dumps(answer)
    return accepted


def _steps() -> list[bytes]:
    """The recorded events, made to fit the index that is there."""
    found = tasks()
    found.tasks()
    assert found.store is not None
    manifest = found.runner.run(load_head(found.store, "papers")).manifest
    query = base64.b64encode(b"\0\0\x80\x3f" * 4).decode()
    seeds = []
    for name, function in (
        ("rank", 0),
        ("score", 0),
        ("plan", 1),
        ("decide", 1),
        ("build_prepare", 2),
        ("build_input", 2),
        ("build_finish", 2),
    ):
        event = json.loads((EVENTS / f"step_functions_{name}.json").read_text())
        for holder in (event, event.get("plan", {})):
            if "job" in holder:
                fitting = {"index": "papers", "life": manifest.index_id, "generation": manifest.generation, "query": query, "dim": 4}
                holder["job"] |= fitting
            if "shard" in holder:
                holder["shard"]["segments"] = list(range(len(manifest.segments)))
        seeds.append(bytes([function]) + json.dumps(event).encode())
    decide = json.loads(seeds[3][1:])
    scored = found.runner.run(found.tasks().shard(json.loads(seeds[1][1:])))
    merge = {"do": "merge", "plan": decide["plan"], "results": [scored, decide["rankings"][1]], "answer": {"with_rows": True}}
    merge["plan"]["job"]["allow_partial"] = True
    return [*seeds, b"\1" + json.dumps(merge).encode(), b"\3" + json.dumps({"index": "papers"}).encode(), b"\3{}"]


def _mutate(data: bytes, rng: Any, others: Any, tokens: Any) -> bytes:
    return data[:1] + mutated_json(data[1:], rng, [other[1:] for other in others], tokens)


TASK = Target("task", "events of Step Functions and of the schedule", take, _steps, mutate=_mutate)


def kind_of(error: BaseException) -> str:
    """Name of the kind of an engine error; for tests."""
    assert isinstance(error, EngineError)
    return type(error).__name__
