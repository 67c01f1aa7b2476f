"""Lambda handlers of the state machines and of the maintenance schedule: an event in, one engine call, an event out.

    shard       one shard of a search: rank or score (infra/search.asl.json)
    coordinate  plan, decide, merge of a search that did not come through the API
    build       prepare, one input, finish of a bulk build (infra/build.asl.json)
    maintain    compaction and garbage collection, on a schedule or for one index

What a process keeps (settings, caches, snapshots) outlives the invocation. A failure leaves as an exception whose class is the kind (engine/errors.py; the
machines' Retry and Catch go by it) and whose text is short, with the code in front: a state has little room, so the traceback goes to the log.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Annotated, Any

import msgspec
import numpy as np

from engine.config import INDEX_NAME, MAX_DIM, MAX_QUERY_TOKENS, SearchParams
from engine.errors import CorruptData, EngineError, InvalidRequest, LimitExceeded
from engine.fanout import messages
from engine.fanout.merge import bars_of, merged
from engine.fanout.messages import Plan, Ranked, Step
from engine.fanout.plan import make_plan
from engine.fanout.shard import open_pinned, take
from handler import tracing
from handler.runtime import Runtime
from handler.settings import Settings

Event = dict[str, Any]
MIN_SHARE_S = 1.0
"""A share goes on until half of the invocation's time is over, so that the segment begun last has the other half."""
MAINTENANCE_SHARE = 0.6
DEFAULT_REMAINING_S = 900.0
STEPS = {"shard": ("rank", "score"), "coordinate": ("plan", "decide", "merge"), "build": ("prepare", "input", "finish")}


Name = Annotated[str, msgspec.Meta(pattern=rf"\A{INDEX_NAME.pattern}\Z")]
BuildId = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
"""As joint.build_id makes them: nothing else may come into an object's name, or be looked for in the history."""
Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


class SearchAsked(msgspec.Struct, forbid_unknown_fields=True):
    """A search that comes straight to the state machine."""

    index: Name
    query: list[list[float]]
    params: SearchParams = SearchParams()
    subset: list[Id] | None = None
    condition: str | None = None
    parameters: list[Any] = []
    generation: Count | None = None
    mode: messages.Mode = "cold"
    allow_partial: bool = False
    with_rows: bool = True


class BuildAsked(msgspec.Struct, forbid_unknown_fields=True):
    """A bulk build. inputs: s3://bucket/prefix (or a directory). nbits and tokenizer: of an index that is not there yet. columns: name -> INTEGER, REAL or TEXT."""

    index: Name
    inputs: str
    nbits: int | None = None
    tokenizer: str | None = None
    model: str = ""
    pool_factor: int | None = None
    without: list[str] = []
    columns: dict[str, str] = {}
    segment_documents: Size | None = None
    segment_bytes: Size | None = None


class BuildPlan(msgspec.Struct, forbid_unknown_fields=True):
    """What a build consists of, as its first record keeps it. The same plan is the same build."""

    asked: BuildAsked
    inputs: list[Any]


class InputAsked(msgspec.Struct):
    index: Name
    build: BuildId
    number: Count


class FinishAsked(msgspec.Struct):
    index: Name
    build: BuildId
    n_inputs: Count


class DecideAsked(msgspec.Struct):
    plan: Plan
    rankings: list[dict[str, Any]]


class AnswerAsked(msgspec.Struct):
    with_rows: bool = True


class MergeAsked(msgspec.Struct):
    plan: Plan
    results: list[dict[str, Any]]
    answer: AnswerAsked


class MaintainAsked(msgspec.Struct):
    """What is absent in the schedule's own event: all indices, and a sweep."""

    index: Name | None = None
    sweep: bool = True


class Tasks:
    """The tasks of one process."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    # Search

    async def shard(self, event: Event) -> Event:
        done: Event = messages.plain(await take(self.runtime.searcher, messages.read(event, Step)))
        return done

    async def coordinate(self, event: Event) -> Event:
        steps = {"plan": self._plan, "decide": self._decide, "merge": self._merge}
        return await _chosen(steps, event)

    async def _plan(self, event: Event) -> Event:
        from handler.fanout import StateMachine

        asked: SearchAsked = messages.read(event["request"], SearchAsked)
        snapshot = await self.runtime.reader.snapshot(asked.index, generation=asked.generation)
        machine = StateMachine("", self.runtime.settings.fanout_shard_bytes)
        machine.mode = asked.mode
        query = _query(asked.query)
        params = msgspec.structs.replace(asked.params, k=min(asked.params.k, snapshot.n_documents))
        plan = make_plan(
            snapshot,
            query,
            params,
            machine,
            subset=None if asked.subset is None else np.array(asked.subset, np.int64),
            condition=asked.condition,
            parameters=asked.parameters,
            allow_partial=asked.allow_partial,
        )
        return {"plan": messages.plain(plan), "answer": {"with_rows": asked.with_rows}}

    async def _decide(self, event: Event) -> Event:
        from handler.fanout import read_failed

        asked: DecideAsked = messages.read(event, DecideAsked)
        failed = [read_failed(item) for item in asked.rankings if "error" in item]
        if failed and not asked.plan.job.allow_partial:
            raise failed[0].as_error()
        ranked = [messages.read(item, Ranked) for item in asked.rankings if "error" not in item]
        bars: Event = messages.plain(bars_of(asked.plan.job, ranked))
        return bars

    async def _merge(self, event: Event) -> Event:
        from handler.fanout import read_outcomes

        asked: MergeAsked = messages.read(event, MergeAsked)
        plan, with_rows = asked.plan, asked.answer.with_rows
        snapshot = await open_pinned(self.runtime.reader, plan.job)
        answer = await merged(self.runtime.searcher, snapshot, plan, read_outcomes(asked.results), with_rows=with_rows)
        found: Event = messages.plain(
            {
                "index": plan.job.index,
                "generation": plan.job.generation,
                "document_ids": answer.ids.tolist(),
                "scores": answer.scores.tolist(),
                "ids": answer.keys,
                "metadata": answer.rows,
                "failed_shards": answer.failed,
                "stats": answer.stats,
            }
        )
        size_bytes = len(messages.encode(found))
        if size_bytes > messages.STATE_BYTES:
            facts: Event = {"found_bytes": size_bytes, "limit_bytes": messages.STATE_BYTES}
            raise LimitExceeded("the rows of the hits do not fit into the answer: ask for fewer hits, or with_rows false", **facts)
        return found

    # Building

    async def build(self, event: Event, remaining_s: float = DEFAULT_REMAINING_S) -> Event:
        async def one_input(event: Event) -> Event:
            return await self._input(event, remaining_s)

        return await _chosen({"prepare": self._prepare, "input": one_input, "finish": self._finish}, event)

    async def _prepare(self, event: Event) -> Event:
        from engine.errors import NotFound
        from engine.format.manifest import Column
        from engine.index import joint
        from engine.transfer import inputs
        from engine.transfer.content import Background

        asked: BuildAsked = messages.read(event["request"], BuildAsked)
        if set(asked.columns.values()) - {"INTEGER", "REAL", "TEXT"}:
            raise InvalidRequest("a column is INTEGER, REAL or TEXT", found=sorted(set(asked.columns.values())))
        await self._make_index(asked)
        found = await inputs.inputs_under(self._store_of(asked))
        plan = msgspec.json.encode(BuildPlan(asked, msgspec.to_builtins(found))).decode()
        answer = {"index": asked.index, "n_inputs": len(found), "numbers": list(range(len(found)))}
        with suppress(NotFound):
            return {**answer, "build": (await joint.resumed(self.runtime.reader, asked.index, plan)).build}
        columns = [Column(name=name, type=kind) for name, kind in asked.columns.items()]
        with Background() as background:
            opened = inputs.sampled_of(found)
            sources = [await self._opened(asked, one, background) for one in opened]
            sampled = inputs.Sampled(sources, opened, found)
            rows = await asyncio.to_thread(sampled.rows)
            options: Event = {"columns": columns, "rows": rows, "params": self._params(asked), "n_threads": self._n_threads}
            prepared = await joint.prepare(self.runtime.reader, asked.index, plan, sampled, **options)
        return {**answer, "build": prepared.build}

    async def _make_index(self, asked: BuildAsked) -> None:
        from engine.config import IndexConfig, check_index_name
        from engine.errors import Conflict
        from engine.index.commit import create

        check_index_name(asked.index)
        chosen = {"nbits": asked.nbits, "fts_tokenizer": asked.tokenizer}
        config = IndexConfig(**{name: value for name, value in chosen.items() if value is not None})  # type: ignore[arg-type]
        try:
            await create(self.runtime.store, asked.index, config)
        except Conflict:
            there = (await self.runtime.reader.head(asked.index)).manifest.config
            if any(value is not None and value != getattr(there, name) for name, value in chosen.items()):
                raise InvalidRequest("the index is there with other settings", index=asked.index, expected=chosen, found=there) from None

    async def _input(self, event: Event, remaining_s: float) -> Event:
        from engine.errors import NotFound
        from engine.index import joint
        from engine.transfer import inputs
        from engine.transfer.content import Background

        asked: InputAsked = messages.read(event, InputAsked)
        index, build, number = asked.index, asked.build, asked.number
        try:
            prepared = await joint.prepared(self.runtime.reader, index, build)
            plan = msgspec.json.decode(prepared.plan, type=BuildPlan)
            if number >= len(plan.inputs):
                raise InvalidRequest("the build has no such input", n_inputs=len(plan.inputs), found=number)
            with Background() as background:
                source = await self._opened(plan.asked, messages.read(plan.inputs[number], inputs.Input), background)
                stop_s = time.monotonic() + max(MIN_SHARE_S, remaining_s / 2)
                options: Event = {"params": self._params(plan.asked), "n_threads": self._n_threads, "stop_s": stop_s}
                report = await joint.build_share(self.runtime.reader, index, build, number, source, **options)
        except NotFound as error:
            if await joint.is_prepared(self.runtime.reader, index, build):
                raise
            self.runtime.log.info("nothing to build", index=index, build=build, number=number, reason=str(error))
            report = joint.ShareReport(number, is_done=True, is_over=True)
        return {"number": number, "is_done": report.is_done, "n_documents": report.n_documents, "n_segments": report.n_segments}

    async def _finish(self, event: Event) -> Event:
        from engine.index import joint

        asked: FinishAsked = messages.read(event, FinishAsked)
        if asked.n_inputs > joint.MAX_INPUTS:
            raise LimitExceeded("too many inputs", limit=joint.MAX_INPUTS, found=asked.n_inputs)
        report = await joint.finish(self.runtime.reader, asked.index, asked.build, asked.n_inputs)
        return {"index": asked.index, "build": asked.build, **messages.plain(report)}

    @property
    def _n_threads(self) -> int:
        from handler.runtime import n_cores

        return self.runtime.settings.search_threads or n_cores()

    def _store_of(self, asked: BuildAsked) -> Any:
        from handler.runtime import open_at

        return open_at(asked.inputs, self.runtime.settings)

    async def _opened(self, asked: BuildAsked, one: Any, background: Any) -> Any:
        """The source that an input is; texts with their encoder. Reads the input once, on a thread."""
        from engine.transfer import inputs
        from engine.transfer.content import ObjectContent
        from handler.texts import document_encoder

        store = self._store_of(asked)
        await inputs.check_unchanged(store, one)
        encode, encoder = None, ""
        if one.name.endswith(".jsonl"):
            settings = self.runtime.settings
            settings = msgspec.structs.replace(settings, model=asked.model) if asked.model else settings
            encode, encoder = await document_encoder(settings, background, asked.pool_factor)

        def content(name: str) -> ObjectContent:
            return ObjectContent(store, name, background, label=f"{asked.inputs.rstrip('/')}/{name}")

        return await asyncio.to_thread(inputs.open_input, one, content, encode, encoder=encoder, without=asked.without)

    def _params(self, asked: BuildAsked) -> Any:
        from engine.config import MaintenanceParams

        params = MaintenanceParams()
        return msgspec.structs.replace(
            params,
            max_segment_documents=min(asked.segment_documents or params.max_segment_documents, params.max_segment_documents),
            max_segment_bytes=min(asked.segment_bytes or params.max_segment_bytes, params.max_segment_bytes),
        )

    # Maintenance

    async def maintain(self, event: Event, remaining_s: float = DEFAULT_REMAINING_S) -> Event:
        """Compact and sweep one index ({"index": name}) or all, step by step while there is time: what is left, the next run does."""
        from engine.index.indices import left_something, survey

        asked: MaintainAsked = messages.read(event, MaintainAsked)
        stop_s = time.monotonic() + remaining_s * MAINTENANCE_SHARE
        if asked.index is not None:
            return {"indices": {asked.index: await self._maintained(asked.index, asked.sweep, stop_s)}}
        runtime, done = self.runtime, {}
        found = await survey(runtime.store)
        failed: dict[str, EngineError] = dict(found.unreadable)
        for name in [*found.heads, *(await left_something(runtime.store, found.ended) if asked.sweep else ())]:
            try:
                done[name] = await self._maintained(name, asked.sweep, stop_s)
            except CorruptData as error:
                failed[name] = error
        for name, why in failed.items():  # the others are worked on all the same
            runtime.log.error("maintenance failed", index=name, code=why.code, error=str(why))
        return {"indices": done}

    async def _maintained(self, name: str, sweeps: bool, stop_s: float) -> Event:
        """Compact one index as long as there is time, then collect its garbage. Of a deleted one only garbage is left."""
        from engine.index.commit import Ended
        from engine.index.compact import compact
        from engine.index.plan import next_step
        from engine.index.sweep import sweep

        runtime, reader, n_deleted = self.runtime, self.runtime.reader, 0
        steps: dict[str, int] = {}
        with suppress(Ended):
            while time.monotonic() < stop_s and next_step((await reader.head(name)).manifest, runtime.maintenance) is not None:
                report = await compact(reader, name, params=runtime.maintenance, max_steps=1, n_threads=self._n_threads)
                for kind, n in report.steps.items():
                    steps[kind] = steps.get(kind, 0) + n
                if not report.steps:
                    break
        if sweeps and time.monotonic() < stop_s:
            n_deleted = (await sweep(runtime.store, name, params=runtime.maintenance)).n_deleted
        return {"steps": steps, "deleted_objects": n_deleted}


async def _chosen(steps: Mapping[str, Callable[[Event], Awaitable[Event]]], event: Event) -> Event:
    wanted = event.get("do") if isinstance(event, dict) else None
    step = steps.get(wanted) if isinstance(wanted, str) else None
    if step is None:
        raise InvalidRequest("no such task", expected=sorted(steps), found=repr(wanted)[:40])
    try:
        return await step(event)
    except KeyError as error:
        raise InvalidRequest("the event lacks a key", key=str(error)) from error


def _query(rows: list[list[float]]) -> np.ndarray:
    """float32 (Q, D) of a query in JSON. InvalidRequest unless all rows have one length and all values are finite."""
    dim = len(rows[0]) if rows else 0
    if not 1 <= len(rows) <= MAX_QUERY_TOKENS or not 1 <= dim <= MAX_DIM or any(len(row) != dim for row in rows):
        raise InvalidRequest("a query is a list of token vectors of one length", tokens=len(rows), dimensions=dim)
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite and is refused below
        query = np.array(rows, np.float64).astype(np.float32)
    if not np.isfinite(query).all():
        raise InvalidRequest("a query has a value that is not finite")
    return query


class _Process:
    """What the handlers of one Lambda process share, made by the first invocation."""

    @cached_property
    def tasks(self) -> Tasks:
        return Tasks(Runtime(Settings.for_lambda()))

    @cached_property
    def runner(self) -> asyncio.Runner:
        return asyncio.Runner()

    def run(self, name: str, event: Event, work: Coroutine[Any, Any, Event]) -> Event:
        """Wait for a task, in its caller's trace; let its failure go in a form that a state machine can carry; say for CloudWatch what it took."""
        runtime, began_s, took = self.tasks.runtime, time.perf_counter(), {"errors": 0}
        with tracing.continued(_trace(event)):
            try:
                return self.runner.run(_counted(runtime, work, took), context=contextvars.copy_context())
            except Exception as error:
                took["errors"] = 1
                runtime.log.error("task failed", exc_info=error, code=getattr(error, "code", "internal"))
                short = portable(error)
            finally:
                if runtime.emf is not None:
                    values = {"ms": round(1000 * (time.perf_counter() - began_s), 3), "count": 1, **took}
                    print(runtime.emf.line(values, step=_step(name, event)), flush=True)
        raise short

    def remaining_s(self, context: Any) -> float:
        left_ms = getattr(context, "get_remaining_time_in_millis", None)
        return DEFAULT_REMAINING_S if left_ms is None else left_ms() / 1000


async def _counted(runtime: Runtime, work: Coroutine[Any, Any, Event], took: dict[str, int]) -> Event:
    """The task, and in `took` what it asked of the store."""
    with runtime.counting.window() as cost:
        try:
            return await work
        finally:
            took |= {"requests": cost.n_requests, "bytes": cost.bytes_read}


def _trace(event: Event) -> dict[str, str]:
    """Headers of the request that a step of a search belongs to; none for what nobody asked for."""
    plan = event.get("plan") if isinstance(event, dict) else None
    job = event.get("job") if isinstance(event, dict) else None
    job = plan.get("job") if isinstance(plan, dict) else job
    trace = job.get("trace") if isinstance(job, dict) else None
    return {name: value for name, value in trace.items() if isinstance(value, str)} if isinstance(trace, dict) else {}


def _step(name: str, event: Event) -> str:
    """The label of a metric: one of few, for each is paid for."""
    step = event.get("do") if isinstance(event, dict) else None
    return step if step in STEPS.get(name, ()) else name


def portable(error: BaseException) -> Exception:
    """The same failure with a short text and nothing behind it."""
    if isinstance(error, EngineError):
        return type(error)(messages.told(error))
    return RuntimeError(f"{type(error).__name__}: {error}"[: messages.MAX_CAUSE])


_process = _Process()


def shard(event: Event, context: Any = None) -> Event:
    return _process.run("shard", event, _process.tasks.shard(event))


def coordinate(event: Event, context: Any = None) -> Event:
    return _process.run("coordinate", event, _process.tasks.coordinate(event))


def build(event: Event, context: Any = None) -> Event:
    return _process.run("build", event, _process.tasks.build(event, _process.remaining_s(context)))


def maintain(event: Event, context: Any = None) -> Event:
    return _process.run("maintain", event, _process.tasks.maintain(event, _process.remaining_s(context)))
