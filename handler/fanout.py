"""Who scores the shards of a search: a Step Functions state machine, or other servers of ours. Both are transports (engine/fanout/transport.py).

    StateMachine   infra/search.asl.json, Express: one synchronous execution a query. Retries are the machine's. Shards read cold, because nobody can choose
                   which Lambda process a shard meets, so its memory cannot be counted on
    Peers          POST /internal/shard to a list of servers, each always the same share of the segments, which it keeps in memory. A peer that fails
                   is replaced by the next in the list, after a pause

aioboto3 and httpx are imported when the first query needs them, never by an ordinary search.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import msgspec

from engine.errors import CorruptData, EngineError, InvalidRequest, LimitExceeded, NotFound, Unavailable, UnsupportedFormat
from engine.fanout import messages
from engine.fanout.messages import Failed, Mode, Outcome, Plan, Ranked, Scored, Step
from engine.fanout.search import FanOut
from engine.fanout.transport import run_steps
from engine.searcher import Searcher
from handler import tracing

if TYPE_CHECKING:
    import httpx

    from handler.settings import Settings

MAX_SHARDS = 40
"""What an inline Map runs at the same time."""
PEER_TRIES = 3
PEER_PAUSE_S = 0.2
PEER_TIMEOUT_S = 60.0
SHARD_PATH = "/internal/shard"
_NONSENSE = (msgspec.MsgspecError, UnicodeError, RecursionError)
"""What decoding arbitrary text as JSON may raise."""
_KEY_HEADERS = ("authorization", "x-api-key")


def make_transport(settings: Settings) -> StateMachine | Peers | None:
    """The transport that the settings name. ValueError if they name two."""
    if settings.fanout_machine and settings.fanout_peers:
        raise ValueError("TARTAN_FANOUT_MACHINE and TARTAN_FANOUT_PEERS exclude each other")
    if settings.fanout_machine:
        return StateMachine(settings.fanout_machine, settings.fanout_shard_bytes, settings.sfn_endpoint)
    if settings.fanout_peers:
        return Peers(settings.fanout_peers)
    return None


def make_fan_out(searcher: Searcher, transport: StateMachine | Peers, settings: Settings, headers: Mapping[str, str]) -> FanOut:
    """For one request: peers are asked with the key that the caller brought."""
    if isinstance(transport, Peers):
        transport = transport.with_headers({name: headers[name] for name in _KEY_HEADERS if name in headers})
    return FanOut(searcher, transport, min_bytes=settings.fanout_bytes)


class StateMachine:
    """Executions of an Express state machine. One client for the life of the process, made when first needed."""

    max_state_bytes: int | None = messages.STATE_BYTES
    mode: Mode = "cold"

    def __init__(self, arn: str, shard_bytes: int, endpoint: str = "") -> None:
        self.arn, self.shard_bytes, self.endpoint = arn, shard_bytes, endpoint
        self._client: Any = None

    def shard_count(self, size_bytes: int) -> int:
        return min(MAX_SHARDS, -(-size_bytes // self.shard_bytes))

    async def run(self, plan: Plan) -> list[Outcome]:
        client = await self._made_client()
        traced = msgspec.structs.replace(plan, job=msgspec.structs.replace(plan.job, trace=tracing.outgoing_headers()))
        body = messages.encode({"plan": traced}).decode()
        try:
            answer = await client.start_sync_execution(stateMachineArn=self.arn, input=body)
        except Exception as error:  # botocore's classes are made at run time
            raise Unavailable(
                "the state machine could not be started", code="shard-failed", machine=self.arn, why=str(error)[:200]
            ) from error
        if answer["status"] != "SUCCEEDED":
            raise failed_execution(answer.get("error", answer["status"]), answer.get("cause", ""))
        return _read_output(answer["output"])

    async def _made_client(self) -> Any:
        if self._client is None:
            import aioboto3
            from botocore.config import Config

            # A server of one's own has one name; Amazon's has another for synchronous executions, which the SDK puts in front.
            config = Config(inject_host_prefix=not self.endpoint, retries={"mode": "standard", "max_attempts": 3}, read_timeout=60)
            made = aioboto3.Session().client("stepfunctions", endpoint_url=self.endpoint or None, config=config)
            self._client = await made.__aenter__()
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.__aexit__(None, None, None)


class _Output(msgspec.Struct):
    """What an execution ends with."""

    results: list[dict[str, Any]]


def _read_output(output: str) -> list[Outcome]:
    """Unavailable if it is not what shards say: nothing that whoever asked could mend."""
    try:
        return read_outcomes(msgspec.json.decode(output, type=_Output).results)
    except (*_NONSENSE, InvalidRequest) as error:
        why = str(error)[: messages.MAX_CAUSE]
        raise Unavailable("the state machine answered something else than it was asked", code="shard-failed", why=why) from error


def read_outcomes(items: Sequence[dict[str, Any]]) -> list[Outcome]:
    """Results as the machine gives them: hits, or what its Catch wrote down."""
    return [read_failed(item) if "error" in item else messages.read(item, Scored) for item in items]


def read_failed(item: dict[str, Any]) -> Failed:
    """The platform's account of a failed task; a Lambda's cause is JSON."""
    plain = {"shard": item.get("shard"), "segments": item.get("segments", ())}
    failed: Failed = messages.read({**plain, "error": str(item["error"]), "cause": _reason(str(item.get("cause", "")))}, Failed)
    return failed


def failed_execution(error: str, cause: str) -> EngineError:
    """What a failed execution means to its caller: a task's own kind of failure where it is one of ours."""
    kind, code, text = messages.heard(error, _reason(cause))
    return kind(text, code=code)


def _reason(cause: str) -> str:
    try:
        return str(msgspec.json.decode(cause)["errorMessage"])[: messages.MAX_CAUSE]
    except (*_NONSENSE, TypeError, KeyError):
        return cause[: messages.MAX_CAUSE]


class Peers:
    """Servers that each score a share of the segments: shard n goes to server n, so that each keeps its own in memory.

    headers  the caller's key, passed on
    """

    max_state_bytes: int | None = None
    mode: Mode = "warm"

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = tuple(url.rstrip("/") for url in urls)
        self.headers: Mapping[str, str] = {}
        self._clients: list[httpx.AsyncClient] = []

    def with_headers(self, headers: Mapping[str, str]) -> Peers:
        """The same peers and connections for another caller."""
        other = copy(self)
        other.headers = headers
        return other

    def shard_count(self, size_bytes: int) -> int:
        return len(self.urls)

    async def run(self, plan: Plan) -> list[Outcome]:
        return await run_steps(plan, self.ask)

    async def ask(self, step: Step) -> Ranked | Scored:
        """Have a step done by its server, or by the next ones if it fails as a server may (Unavailable)."""
        body, last = messages.encode(step), EngineError("")
        for attempt in range(min(PEER_TRIES, max(2, len(self.urls)))):
            url = self.urls[(step.shard.number + attempt) % len(self.urls)]
            try:
                return await self._asked(url, body, step)
            except Unavailable as error:
                last = error
                await asyncio.sleep(random.uniform(0, PEER_PAUSE_S * 2**attempt))
        raise last

    async def _asked(self, url: str, body: bytes, step: Step) -> Ranked | Scored:
        import httpx

        try:
            headers = {"content-type": "application/json", **tracing.outgoing_headers(), **self.headers}
            answer = await self._client().post(url + SHARD_PATH, content=body, headers=headers)
        except httpx.HTTPError as error:
            raise Unavailable("a peer did not answer", code="shard-failed", peer=url, why=f"{type(error).__name__} {error}") from error
        if answer.status_code != 200:
            raise _refused(url, answer.status_code, answer.content)
        return _read_done(url, answer.content, step)

    def _client(self) -> httpx.AsyncClient:
        if not self._clients:
            import httpx

            self._clients.append(httpx.AsyncClient(timeout=PEER_TIMEOUT_S))
        return self._clients[0]

    async def close(self) -> None:
        while self._clients:
            await self._clients.pop().aclose()


class ShardAnswer(msgspec.Struct, omit_defaults=True):
    """What a server answers to a step: the one of the two that was asked for."""

    ranked: Ranked | None = None
    scored: Scored | None = None


def _read_done(url: str, content: bytes, step: Step) -> Ranked | Scored:
    """What a peer did. Unavailable, so that the next one is asked, if it is something else: a page of a proxy, a server of another release."""
    try:
        done = messages.read(content, ShardAnswer)
    except InvalidRequest as error:
        raise Unavailable("a peer's answer does not read", code="shard-failed", peer=url, why=str(error)[: messages.MAX_CAUSE]) from error
    found = done.ranked if step.do == "rank" else done.scored
    if found is None or found.shard != step.shard.number:
        raise Unavailable("a peer answered something else than it was asked", code="shard-failed", peer=url)
    return found


_REFUSALS: dict[str, type[EngineError]] = {
    "BAD_REQUEST": InvalidRequest,
    "DIMENSION_MISMATCH": InvalidRequest,
    "GENERATION_NOT_FOUND": NotFound,
    "INDEX_NOT_FOUND": NotFound,
    "PAYLOAD_TOO_LARGE": LimitExceeded,
    "UNSUPPORTED_FORMAT": UnsupportedFormat,
    "CORRUPT_DATA": CorruptData,
}
"""Answers of a peer that another peer would give too, by their code on the wire; everything else is tried again elsewhere."""
_ENGINE_CODES = {"GENERATION_NOT_FOUND": "generation-not-found", "INDEX_NOT_FOUND": "index-not-found"}


def _refused(url: str, status: int, content: bytes) -> EngineError:
    try:
        body = msgspec.json.decode(content, type=dict[str, Any])
    except _NONSENSE:
        body = {}
    code, message = str(body.get("code", "")), str(body.get("message", ""))[: messages.MAX_CAUSE]
    facts: dict[str, Any] = {"peer": url, "status": status, "why": f"{code} {message}"}
    kind = _REFUSALS.get(code)
    if kind is None:
        return Unavailable("a peer refused", code="shard-failed", **facts)
    return kind("a peer refused", code=_ENGINE_CODES.get(code), **facts)
