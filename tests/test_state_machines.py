"""The state machines of infra/, executed: search against one process, failing and poisoned shards; builds with failing, doubled and unfinished tasks."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from corpus import make_corpus
from engine.config import SearchParams
from engine.errors import CorruptData, EngineError, InvalidRequest, NotFound, Unavailable
from engine.fanout import messages
from engine.fanout.messages import Plan
from engine.fanout.plan import make_plan
from engine.fanout.search import FanOut
from engine.format import names
from engine.index import joint
from engine.index.commit import load_head
from engine.index.indices import drop
from engine.index.reader import Reader, Snapshot
from engine.index.verify import verify
from engine.searcher import Searcher
from engine.store.base import ObjectStore
from engine.store.objects import open_store
from handler import lambda_tasks, tracing
from handler.fanout import StateMachine, failed_execution, read_outcomes
from handler.lambda_tasks import Tasks
from handler.runtime import Runtime
from handler.settings import Settings
from machines import INFRA, Lambda, Machines, definition, machines
from test_fanout import CORPUS, mixed, same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:moto", "ignore::DeprecationWarning:botocore")
K10 = SearchParams(k=10)
ASL = sorted(path.name for path in INFRA.glob("*.asl.json"))


# The definitions


def states_of(node: Any) -> Iterator[dict[str, Any]]:
    """Every {StartAt, States} of a definition, those inside Maps included."""
    if isinstance(node, dict):
        if "States" in node:
            yield node
        for value in node.values():
            yield from states_of(value)


@pytest.mark.parametrize("name", ASL)
def test_every_next_and_default_names_a_state_and_every_state_is_reached(name: str) -> None:
    for machine in states_of(json.loads(definition(name))):
        states, reached = machine["States"], {machine["StartAt"]}
        for state in states.values():
            targets = [state.get("Next"), state.get("Default"), *(rule["Next"] for rule in state.get("Choices", []))]
            targets += [rule["Next"] for rule in state.get("Catch", [])]
            reached.update(target for target in targets if target)
            assert state["Type"] in ("Choice", "Succeed", "Fail") or ("Next" in state) != state.get("End", False)
        assert reached == set(states)


@pytest.mark.parametrize("name", ASL)
def test_every_task_waits_a_bounded_time_or_is_retried(name: str) -> None:
    for machine in states_of(json.loads(definition(name))):
        for state in machine["States"].values():
            if state["Type"] == "Task":
                assert state["Retry"]
                assert "TimeoutSeconds" in state or name.startswith("build")


def test_the_plain_map_differs_from_the_distributed_one_in_two_places() -> None:
    distributed, plain = (json.loads((INFRA / name).read_text()) for name in ("build.asl.json", "build-plain-map.asl.json"))
    for document in (distributed, plain):
        inputs = document["States"]["Inputs"]
        del document["Comment"], inputs["MaxConcurrency"], inputs["ItemProcessor"]["ProcessorConfig"]
    assert distributed == plain


@pytest.mark.slow
@pytest.mark.parametrize("name", ASL)
def test_the_validator_agrees(name: str) -> None:
    validator = shutil.which("asl-validator")
    if validator is None:
        pytest.skip("asl-validator is not installed (npm install -g asl-validator@4)")
    checked = subprocess.run([validator, "--json-path", str(INFRA / name)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


# Search


class ByMachine:
    """The transport of handler/fanout.py with executions that are waited for: moto does not start synchronous ones."""

    max_state_bytes: int | None = messages.STATE_BYTES

    def __init__(self, region: Machines, n_shards: int, mode: messages.Mode) -> None:
        self.region, self.n_shards, self.mode = region, n_shards, mode

    def shard_count(self, size_bytes: int) -> int:
        return self.n_shards

    async def run(self, plan: Plan) -> list[messages.Outcome]:
        done = await asyncio.to_thread(self.region.execute, "search.asl.json", {"plan": messages.plain(plan)})
        if done["status"] != "SUCCEEDED":
            raise failed_execution(done["error"], done["cause"])
        return read_outcomes(done["output"]["results"])


@pytest.fixture(scope="module")
def index() -> tuple[ObjectStore, Snapshot]:
    return asyncio.run(mixed())


@pytest.fixture(scope="module")
def region(index: tuple[ObjectStore, Snapshot]) -> Iterator[Machines]:
    with machines(index[0], fanout_shard_bytes=1) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_faults(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "region" in request.fixturenames:
        functions = request.getfixturevalue("region").functions
        functions.fault = functions.late_fault = lambda name, event: None
        functions.calls.clear()


@pytest.mark.parametrize("mode", ["warm", "cold"])
async def test_eight_shards_give_the_ids_and_scores_of_one_process(
    index: tuple[ObjectStore, Snapshot], region: Machines, mode: messages.Mode
) -> None:
    store, snapshot = index
    found = await FanOut(Searcher(Reader(store)), ByMachine(region, 8, mode), min_bytes=0).search(snapshot, CORPUS.queries[:2], K10)
    for query, answer in zip(CORPUS.queries[:2], found, strict=True):
        [expected] = await Searcher(Reader(store)).search(snapshot, [query], K10, mode=mode)
        same(expected, answer)
    steps = [event["do"] for name, event in region.functions.calls if name == "Shard"]
    assert steps.count("score") == 16
    assert steps.count("rank") == (16 if mode == "warm" else 0)
    assert region.functions.peak > 1


async def test_a_shard_that_fails_once_is_asked_again(index: tuple[ObjectStore, Snapshot], region: Machines) -> None:
    store, snapshot = index
    failures = [Unavailable("slow down")]
    region.functions.fault = lambda name, event: failures.pop() if name == "Shard" and event["shard"]["number"] == 3 and failures else None
    [answer] = await FanOut(Searcher(Reader(store)), ByMachine(region, 4, "cold"), min_bytes=0).search(snapshot, CORPUS.queries[:1], K10)
    [expected] = await Searcher(Reader(store)).search(snapshot, CORPUS.queries[:1], K10, mode="cold")
    same(expected, answer)
    assert [event["shard"]["number"] for _, event in region.functions.calls].count(3) == 2


async def test_a_poisoned_shard_fails_the_search_or_is_named(index: tuple[ObjectStore, Snapshot], region: Machines) -> None:
    store, snapshot = index
    region.functions.fault = lambda name, event: (
        CorruptData("other bytes", object="x/segments/y") if name == "Shard" and event["shard"]["number"] == 2 else None
    )
    fan = FanOut(Searcher(Reader(store)), ByMachine(region, 4, "cold"), min_bytes=0)
    with pytest.raises(CorruptData, match=r"shard=2 .*other bytes object=x/segments/y"):
        await fan.search(snapshot, CORPUS.queries[:1], K10)
    assert len(region.functions.calls) == 4  # damage is not asked for again
    [answer] = await fan.search(snapshot, CORPUS.queries[:1], K10, allow_partial=True)
    assert [(shard["shard"], shard["error"]) for shard in answer.failed] == [(2, "CorruptData")]
    assert len(answer.ids) == 10


@pytest.mark.parametrize("mode", ["warm", pytest.param("cold", marks=pytest.mark.slow)])
async def test_a_request_without_a_plan_is_planned_and_merged_by_the_machine(
    index: tuple[ObjectStore, Snapshot], region: Machines, mode: str
) -> None:
    store, snapshot = index
    query = CORPUS.queries[0].tolist()
    request = {"index": "x", "query": query, "params": {"k": 5}, "mode": mode, "condition": "kind = ?", "parameters": ["odd"]}
    done = await asyncio.to_thread(region.execute, "search.asl.json", {"request": request})
    assert done["status"] == "SUCCEEDED", done
    subset = await snapshot.select("kind = ?", ["odd"])
    [expected] = await Searcher(Reader(store)).search(snapshot, [CORPUS.queries[0]], SearchParams(k=5), subset=subset, mode=mode)  # type: ignore[arg-type]
    output = done["output"]
    assert (output["document_ids"], output["scores"]) == (expected.ids.tolist(), expected.scores.tolist())
    assert output["metadata"] == expected.rows
    assert output["generation"] == snapshot.manifest.generation


async def test_a_request_that_cannot_work_is_told_why(region: Machines) -> None:
    for request, error, words in (
        ({"index": "nowhere", "query": [[0.0]]}, "NotFound", "[index-not-found] no such index index=nowhere"),
        ({"index": "x", "query": [[0.0] * 32], "kk": 3}, "InvalidRequest", "unknown field `kk`"),
        ({"index": "x", "query": [[0.0] * 7]}, "InvalidRequest", "another dimension"),
    ):
        done = await asyncio.to_thread(region.execute, "search.asl.json", {"request": request})
        assert (done["status"], done["error"]) == ("FAILED", error)
        assert words in done["cause"]


# Builds

PIECES = ((0, 90), (90, 200), (200, 290), (290, 400))


def write_inputs(folder: Path) -> None:
    """The corpus as four inputs: JSON lines, an .npz with fields and ids, a pair of .npy, and JSON lines again."""
    folder.mkdir()
    for n, (first, last) in enumerate(PIECES):
        tokens, offsets = CORPUS.part(first, last)
        if n in (0, 3):
            rows = (tokens[offsets[i] : offsets[i + 1]].tolist() for i in range(last - first))
            lines = [json.dumps({"embeddings": row, "id": f"d{first + i}", "metadata": {"n": first + i}}) for i, row in enumerate(rows)]
            (folder / f"p{n}.jsonl").write_text("\n".join(lines))
        elif n == 1:
            np.savez(folder / "p1.npz", tokens=tokens, doclens=np.diff(offsets))
        else:
            np.save(folder / "p2.npy", tokens.astype(np.float16))
            np.save(folder / "p2.doclens.npy", np.diff(offsets))
        if n in (1, 2):
            (folder / f"p{n}.fields.jsonl").write_text("\n".join(json.dumps({"n": i}) for i in range(first, last)))
            (folder / f"p{n}.ids.txt").write_text("\n".join(f"d{i}" for i in range(first, last)))


@pytest.fixture
def inputs(tmp_path: Path) -> str:
    write_inputs(tmp_path / "inputs")
    return str(tmp_path / "inputs")


@pytest.fixture
def built(region: Machines) -> Iterator[Machines]:
    """The region with functions on an empty store."""
    before, region.functions = region.functions, Lambda(open_store("memory://"))
    yield region
    region.functions.close()
    region.functions = before


def request_of(inputs: str, **more: Any) -> dict[str, Any]:
    return {"request": {"index": "b", "inputs": inputs, "segment_documents": 2100, **more}}


async def executed(region: Machines, content: dict[str, Any], name: str = "build-plain-map.asl.json") -> dict[str, Any]:
    return await asyncio.to_thread(region.execute, name, content)


async def check_built(region: Machines) -> None:
    """The corpus once, in order, with fields and keys; every object verified; nothing left behind."""
    reader = Reader(region.functions.store)
    snapshot = await reader.snapshot("b")
    assert snapshot.n_documents == 400
    assert (await snapshot.live_ids()).tolist() == list(range(400))
    assert [row["n"] for row in await snapshot.rows(np.arange(400)) if row is not None] == list(range(400))
    found = await Searcher(reader).search(snapshot, CORPUS.queries, SearchParams(k=1, n_rerank=400))
    best = [int(CORPUS.exact_scores(query)[:400].argmax()) for query in CORPUS.queries]
    assert sum(int(answer.ids[0]) == n for answer, n in zip(found, best, strict=True)) >= len(best) - 1
    assert [answer.keys[0] for answer in found] == [f"d{answer.ids[0]}" for answer in found]
    report = await verify(reader, "b")
    assert not report.problems
    assert not [listed async for listed in region.functions.store.list("b/builds/")]


@pytest.mark.parametrize("name", ["build-plain-map.asl.json", pytest.param("build.asl.json", marks=pytest.mark.slow)])
async def test_a_build_of_many_inputs_is_one_commit(built: Machines, inputs: str, name: str) -> None:
    done = await executed(built, request_of(inputs), name)
    assert done["status"] == "SUCCEEDED", done
    assert done["output"]["n_documents"] == 400
    assert (await load_head(built.functions.store, "b")).manifest.generation == 1
    await check_built(built)


async def test_failing_doubled_and_interrupted_tasks_change_nothing(built: Machines, inputs: str) -> None:
    """The first try of one input fails before it works; another works and its answer is lost; a third is asked twice at once, all prepare and finish twice."""
    failures = {("input", 0): "before", ("input", 1): "after", ("prepare", None): "after", ("finish", None): "after"}

    def fault(when: str) -> Any:
        def asked(name: str, event: dict[str, Any]) -> BaseException | None:
            key = (event["do"], event.get("number"))
            return Unavailable("lost") if failures.get(key) == when and failures.pop(key) else None

        return asked

    built.functions.fault, built.functions.late_fault = fault("before"), fault("after")
    done = await executed(built, request_of(inputs))
    assert done["status"] == "SUCCEEDED", done
    assert not failures
    assert done["output"]["was_committed_before"] is True  # the second `finish` found the first one's commit
    await check_built(built)
    again = [event for _, event in built.functions.calls if event["do"] == "input"]
    head = await load_head(built.functions.store, "b")
    for event in [*again, *(event for _, event in built.functions.calls if event["do"] == "finish")]:
        await asyncio.to_thread(built.functions, "Build", event)  # duplicates that come late
    assert (await load_head(built.functions.store, "b")).etag == head.etag
    await check_built(built)


@pytest.mark.slow
async def test_two_processes_at_one_input_and_a_build_of_many_turns(built: Machines, inputs: str) -> None:
    functions = built.functions
    prepared = await asyncio.to_thread(functions, "Build", {"do": "prepare", **request_of(inputs)})
    event = {"do": "input", "index": "b", "build": prepared["build"]}
    await asyncio.gather(*(asyncio.to_thread(functions, "Build", {**event, "number": n}) for n in (0, 1, 1, 2, 2, 2, 3)))
    [status] = await joint.builds(functions.store, "b")
    assert (status.n_documents, status.n_done, status.is_committed) == (400, 4, False)
    finish = {"do": "finish", "index": "b", "build": prepared["build"], "n_inputs": 4}
    ends = await asyncio.gather(*(asyncio.to_thread(functions, "Build", finish) for _ in range(3)))
    assert sorted(end["was_committed_before"] for end in ends) == [False, True, True]
    await check_built(built)


async def test_an_aborted_build_shows_nothing_and_is_taken_up_again(built: Machines, inputs: str) -> None:
    built.functions.fault = lambda name, event: CorruptData("poison") if event.get("number") == 3 else None
    done = await executed(built, request_of(inputs))
    assert (done["status"], "poison" in done["cause"]) == ("FAILED", True)
    assert (await load_head(built.functions.store, "b")).manifest.n_documents == 0
    [status] = await joint.builds(built.functions.store, "b")
    assert status.n_done < 4
    kept = {
        segment.id for share in (await joint.read_shares(built.functions.store, "b", status.build)).values() for segment in share.segments
    }
    built.functions.fault = lambda name, event: None
    done = await executed(built, request_of(inputs))
    assert done["status"] == "SUCCEEDED", done
    assert done["output"]["build"] == status.build
    assert kept <= {segment.id for segment in (await load_head(built.functions.store, "b")).manifest.segments}
    await check_built(built)


@pytest.mark.slow
async def test_inputs_that_cannot_be_joined_are_refused_before_anything_is_visible(built: Machines, inputs: str) -> None:
    folder = Path(inputs)
    text = (folder / "p3.jsonl").read_text()
    for bad, words in (
        (text.replace('"d399"', '"d5"'), "an external id comes twice"),
        (text.replace('"n": 399', '"N": 3'), "differ only by case"),
    ):
        (folder / "p3.jsonl").write_text(bad)
        done = await executed(built, request_of(inputs))
        assert done["status"] == "FAILED"
        assert words in done["cause"]
        assert (await load_head(built.functions.store, "b")).manifest.n_documents == 0
    (folder / "p3.jsonl").write_text(text)
    assert (await executed(built, request_of(inputs)))["status"] == "SUCCEEDED"
    [*left] = await joint.builds(built.functions.store, "b")
    for status in left:
        await joint.give_up(built.functions.store, "b", status.build)
    await check_built(built)


@pytest.mark.slow
async def test_texts_are_built_with_the_built_in_encoder(built: Machines, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for n in range(3):
        lines = [json.dumps({"id": f"t{n}-{i}", "text": f"tartan number {i} woven in mill {n}"}) for i in range(20)]
        (tmp_path / "texts" / f"t{n}.jsonl").write_text("\n".join(lines))
    done = await executed(built, request_of(str(tmp_path / "texts")))
    assert done["status"] == "SUCCEEDED", done
    assert done["output"]["n_documents"] == 60
    snapshot = await Reader(built.functions.store).snapshot("b")
    assert len(await snapshot.select("text LIKE ?", ["%mill 2"])) == 20


@pytest.mark.slow
async def test_inputs_whose_columns_disagree_are_refused_unless_the_request_names_the_type(
    built: Machines, inputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.transfer.inputs.SAMPLE_ROWS", 5)
    for name, value in (("p0", "1980"), ("p3", '"eighties"')):
        path = Path(inputs) / f"{name}.jsonl"
        head, _, last = path.read_text().rpartition('"metadata": {')
        path.write_text(f'{head}"metadata": {{"late": {value}, {last}')
    done = await executed(built, request_of(inputs))
    assert (done["status"], done["error"]) == ("FAILED", "Conflict")
    assert "columns of other types" in done["cause"]
    done = await executed(built, request_of(inputs, columns={"late": "TEXT"}))
    assert done["status"] == "SUCCEEDED", done
    snapshot = await Reader(built.functions.store).snapshot("b")
    assert len(await snapshot.select("late IN (?, ?)", ["1980", "eighties"])) == 2


def leave_one_input(folder: Path) -> None:
    """The first input, and five new documents in it."""
    for path in folder.iterdir():
        if not path.name.startswith("p0"):
            path.unlink()
    extra = make_corpus(5, dim=32, n_queries=1, seed=77)
    with (folder / "p0.jsonl").open("a") as file:
        for i in range(5):
            file.write("\n" + json.dumps({"embeddings": extra.tokens[extra.offsets[i] : extra.offsets[i + 1]].tolist(), "id": f"new{i}"}))


@pytest.mark.slow
async def test_a_build_adds_to_what_is_there_and_replaces_documents_of_the_same_id(built: Machines, inputs: str) -> None:
    store = built.functions.store
    assert (await executed(built, request_of(inputs, nbits=4)))["status"] == "SUCCEEDED"
    leave_one_input(Path(inputs))
    done = await executed(built, request_of(inputs))
    assert done["status"] == "SUCCEEDED", done
    assert done["output"]["n_replaced"] == 90
    snapshot = await Reader(store).snapshot("b")
    assert snapshot.n_documents == 405
    assert len(snapshot.manifest.codecs) == 1
    assert not (await verify(Reader(store), "b")).problems


# Events as the machines and the schedule send them

EVENTS = Path(__file__).resolve().parent / "events"


def events(*, ending: str) -> list[Any]:
    return [pytest.param(json.loads(path.read_text()), id=path.stem) for path in sorted(EVENTS.glob(f"step_functions_{ending}.json"))]


@pytest.mark.parametrize("event", [*events(ending="[!b]*"), *events(ending="build_finish")])
async def test_recorded_events_are_understood(event: dict[str, Any]) -> None:
    """They name an index that is not there, and are refused for just that; `decide` needs none, and a shard of its has failed."""
    tasks = Tasks(Runtime(Settings(log_level="off"), store=open_store("memory://")))
    works = {"rank": tasks.shard, "score": tasks.shard, "plan": tasks.coordinate, "decide": tasks.coordinate, "finish": tasks.build}
    with pytest.raises(EngineError) as failure:
        await works[event["do"]](event)
    tasks.runtime.close()
    if event["do"] == "decide":
        assert failure.value.details["shard"] == 1
    else:
        assert failure.value.code == "index-not-found"


async def test_an_input_of_a_build_that_is_over_is_done() -> None:
    tasks = Tasks(Runtime(Settings(log_level="off"), store=open_store("memory://")))
    [event] = events(ending="build_input")
    done = await tasks.build(event.values[0])
    tasks.runtime.close()
    assert done == {"number": 3, "is_done": True, "n_documents": 0, "n_segments": 0}


async def test_the_schedule_compacts_and_sweeps_every_index() -> None:
    store, snapshot = await mixed()
    tasks = Tasks(Runtime(Settings(log_level="off"), store=store))
    tasks.runtime.maintenance = msgspec.structs.replace(tasks.runtime.maintenance, max_flat_segments=1)
    done = await tasks.maintain(json.loads((EVENTS / "schedule_maintain.json").read_text()))
    tasks.runtime.close()
    assert done["indices"]["x"]["steps"]
    after = await Reader(store).snapshot("x")
    assert after.n_documents == snapshot.n_documents
    assert sum(ref.kind == "flat" for ref in after.segments) <= 1


async def test_the_schedule_sweeps_what_a_deleted_index_left(monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = await mixed()
    await drop(store, "x")
    await store.put_if_absent(names.segment("x", names.fresh_id()), b"of a commit that came too late")
    tasks = Tasks(Runtime(Settings(log_level="off"), store=store))
    tasks.runtime.maintenance = msgspec.structs.replace(tasks.runtime.maintenance, grace_s=0.0)
    await asyncio.sleep(0.003)
    done = await tasks.maintain(json.loads((EVENTS / "schedule_maintain.json").read_text()))
    tasks.runtime.close()
    assert done["indices"] == {"x": {"steps": {}, "deleted_objects": 1}}
    assert [listed.name async for listed in store.list("x/")] == ["x/CURRENT"]


@pytest.mark.parametrize("what", [{"do": "erase"}, {}, {"do": "finish", "index": "x"}])
async def test_an_event_that_is_no_task_is_refused(index: tuple[ObjectStore, Snapshot], what: dict[str, Any]) -> None:
    tasks = Tasks(Runtime(Settings(log_level="off"), store=index[0]))
    for work in (tasks.coordinate, tasks.build):
        with pytest.raises(InvalidRequest):
            await work(what)
    tasks.runtime.close()


def test_every_task_says_for_cloudwatch_what_it_took(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One embedded-metric line a task; a failed one counts as an error, and an event that names no task makes no label of its own."""
    process = lambda_tasks._Process()
    process.tasks = Tasks(Runtime(Settings(log_level="off", emf_namespace="Tartan/s"), store=asyncio.run(mixed())[0]))
    monkeypatch.setattr(lambda_tasks, "_process", process)
    try:
        lambda_tasks.coordinate({"do": "plan", "request": {"index": "x", "query": CORPUS.queries[0].tolist()}})
        with pytest.raises(InvalidRequest):
            lambda_tasks.build({"do": "erase"})
    finally:
        process.runner.close()
        process.tasks.runtime.close()
    planned, refused = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (planned["service"], planned["step"], planned["count"], planned["errors"]) == ("tartan", "plan", 1, 0)
    assert planned["requests"] == 1
    assert planned["bytes"] > 0
    assert planned["ms"] > 0
    [directive] = planned["_aws"]["CloudWatchMetrics"]
    assert (directive["Namespace"], directive["Dimensions"]) == ("Tartan/s", [["service", "step"]])
    assert (refused["step"], refused["errors"], refused["requests"]) == ("build", 1, 0)


async def test_a_task_works_in_the_trace_of_the_search_that_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The API puts its trace into the machine's input; a step, wherever it runs, logs under it."""
    store, snapshot = await mixed()
    sent: dict[str, Any] = {}

    class Client:
        async def start_sync_execution(self, *, stateMachineArn: str, input: str) -> dict[str, str]:
            sent.update(json.loads(input))
            return {"status": "SUCCEEDED", "output": '{"results": []}'}

    async def client(machine: StateMachine) -> Client:
        return Client()

    monkeypatch.setattr(StateMachine, "_made_client", client)
    machine = StateMachine("arn", 1 << 20)
    with tracing.continued({"x-request-id": "r7"}) as trace:
        await machine.run(make_plan(snapshot, CORPUS.queries[0], SearchParams(k=3), machine))
    job = sent["plan"]["job"]
    assert job["trace"] == {"traceparent": trace.traceparent, "x-request-id": "r7"}

    def step() -> None:
        process = lambda_tasks._Process()
        process.tasks = Tasks(Runtime(Settings(log_level="error"), store=store))
        monkeypatch.setattr(lambda_tasks, "_process", process)
        try:
            for _ in range(2):  # the second in the same process has its own context
                with pytest.raises(NotFound):
                    lambda_tasks.shard({"do": "score", "job": {**job, "index": "gone"}, "shard": sent["plan"]["shards"][0]})
        finally:
            process.runner.close()
            process.tasks.runtime.close()

    await asyncio.to_thread(step)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["trace_id"], line["request_id"]) for line in lines] == [(trace.trace_id, "r7")] * 2
