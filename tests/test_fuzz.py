"""Fuzzing (tests/fuzz) for a few seconds: every target, seeded; flipped bits; and what longer runs found, each as a test of its own."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import itertools
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import fanout
from engine.encoding.folder import load_from_store
from engine.encoding.onnx import read_config
from engine.errors import CorruptData, EngineError, InvalidRequest, LimitExceeded, UnsupportedFormat
from engine.format import envelope
from engine.metadata import keyword
from engine.metadata.database import Database
from engine.transfer import vectors
from engine.transfer.nextplaid import read
from fuzz import __main__ as runner
from fuzz import databases, drawn, events, objects, plaid
from fuzz import target as fuzz_target
from fuzz.arrays import LENGTHS, _npy, _npzs, _tokens
from fuzz.service import Answer, check_answer
from fuzz.table import TARGETS
from fuzz.target import Target, Wrong, close_all, judge
from handler.lambda_tasks import _query
from handler.routes.uploads import _Bytes

ROOT = Path(__file__).resolve().parent.parent
N_VARIANTS, N_DRAWN = 50, 12
"""Inputs of each target; the costly ones (a whole request, a directory) get a fifth."""
COSTLY = ("request", "task", "nextplaid", "model", "event", "database")


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    """Stores, loops and databases that targets share; and the handler that Lambda would call."""
    yield
    close_all()
    if "handler.lambda_http" in sys.modules:
        sys.modules["handler.lambda_http"].handler.close()


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_of_sound_inputs_are_taken_or_refused_as_documented(name: str) -> None:
    target = TARGETS[name]
    n = N_VARIANTS // 5 if name in COSTLY else N_VARIANTS
    accepted = sum(judge(target, data) for data in target.seeds)
    assert accepted, "some seed is sound"
    for number in range(n):
        judge(target, target.variant(number))


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_hypothesis_draws_are_taken_or_refused_as_documented(name: str) -> None:
    drawn.run_batch(TARGETS[name], 1, N_DRAWN // 3 if name in COSTLY else N_DRAWN, lambda data, accepted: None)


@pytest.mark.parametrize(
    "name", ["manifest", "codec", "segment_flat", "segment_flat_ids", "segment_quantised", "tombstones", "patch", "pin", "build"]
)
def test_a_flipped_bit_is_refused(name: str) -> None:
    data, read_all = objects.flips(name)
    read_all(data)
    rng = random.Random(name)
    for at in rng.sample(range(8 * len(data)), min(200, 8 * len(data))):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises((CorruptData, UnsupportedFormat)):
            read_all(bytes(flipped))


# The machinery


def test_a_planted_mistake_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checksums of sections flipped bits pass, and the frame built again is another."""
    monkeypatch.setattr(envelope, "check_section", lambda ref, data, **_: memoryview(data))

    def look() -> None:
        for number in range(2000):
            judge(TARGETS["envelope"], TARGETS["envelope"].variant(number))

    with pytest.raises((Wrong, AssertionError)):
        look()


def test_time_memory_and_other_exceptions_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def target(run: Any) -> Target:
        return Target("own", "nothing", run, lambda: [b"seed"])

    assert judge(target(lambda data: True), b"x")
    with pytest.raises(KeyError):
        judge(target(lambda data: {}[data]), b"x")
    peaks = itertools.chain((0, 1 << 30, 0, 1 << 20), itertools.repeat(0))
    monkeypatch.setattr(fuzz_target, "_peak_bytes", lambda: next(peaks))
    with pytest.raises(Wrong, match="memory grew"):
        judge(target(lambda data: True), b"x")
    assert judge(target(lambda data: True), b"x")
    monkeypatch.setattr(fuzz_target, "MAX_CPU_S", -1.0)
    with pytest.raises(Wrong, match="processor time"):
        judge(target(lambda data: True), b"x")


def test_an_answer_outside_the_contract_is_a_finding() -> None:
    json_ = {"content-type": "application/json"}
    assert check_answer(Answer(200, json_, b'{"results": [{"scores": [1.5]}]}'))
    assert not check_answer(Answer(404, json_, b'{"code": "INDEX_NOT_FOUND", "message": "a"}'))
    for status, body in (
        (500, b'{"code": "INTERNAL_ERROR", "message": "m"}'),
        (404, b'{"code": "BAD_REQUEST", "message": "m"}'),
        (400, b"no"),
    ):
        with pytest.raises(Wrong):
            check_answer(Answer(status, json_, body))
    for body in (b'{"results": [{"scores": [null]}]}', b'{"a": NaN}'):
        with pytest.raises(Wrong):
            check_answer(Answer(200, json_, body))


def test_the_same_number_is_the_same_input() -> None:
    for name in ("manifest", "bodies", "npz"):
        assert TARGETS[name].variant(7) == TARGETS[name].variant(7)


def test_the_runner_prints_what_it_tried_and_falls_back_to_hypothesis(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert runner._engine("atheris") == "hypothesis"
    assert "atheris is not installed" in capsys.readouterr().out
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", "0.1", "--target", "tombstones", "--engine", "hypothesis"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 findings" in done.stdout


# Found in metadata databases


@pytest.mark.parametrize("name", databases.HOSTILE)
def test_a_hostile_database_is_refused_or_harmless(name: str) -> None:
    """TypeError, ValueError, OverflowError, KeyError, MemoryError, sqlite3's own errors, or no end."""
    judge(TARGETS["database"], databases.altered(*databases.HOSTILE[name]))


@pytest.mark.parametrize("name", ["rows are an endless view", "a column computes", "no facts", "ids of text", "ordinals from afar"])
def test_a_database_of_other_tables_is_not_opened(name: str) -> None:
    with pytest.raises(CorruptData):
        Database(databases.altered(*databases.HOSTILE[name]), databases.sound()[0])


def test_a_keyword_query_of_many_nots_is_refused_and_not_too_deep() -> None:
    with pytest.raises(InvalidRequest, match="too many phrases"):
        keyword.compile_query("a" + " NOT a" * 1600)
    found = keyword.compile_query("a NOT b NOT c")
    assert isinstance(found.tree, keyword.Without)
    assert [phrase.terms for phrase in found.phrases] == [("a",), ("b",), ("c",)]


# Found in arrays


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (6, 3", "{'descr': '(True, 18)<f4', 'fortran_order': False, 'shape': (6, 3), }", "[" * 4000,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-6, -3), }", "{[]: 1}", "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 3), }",
    ],
)  # fmt: skip
def test_an_npy_header_of_nonsense_is_an_invalid_request_or_corrupt(tmp_path: Path, header: str) -> None:
    data = plaid.npy_with_header(header, bytes(72))
    with pytest.raises(InvalidRequest):
        vectors.open_npy(_Bytes(data), _Bytes(_npy(LENGTHS)))
    for name, content in plaid._files().items():
        (tmp_path / name).write_bytes(data if name == "centroids.npy" else content)
    with pytest.raises(CorruptData):
        read(tmp_path)


def test_an_npy_of_a_version_that_numpy_does_not_know_is_refused() -> None:
    data = bytearray(_npy(_tokens(), (2, 0)))
    data[6] = 93
    with pytest.raises(InvalidRequest, match="version"):
        vectors.open_npy(_Bytes(bytes(data)), _Bytes(_npy(LENGTHS)))


def test_a_database_in_a_file_format_that_sqlite_does_not_know_is_corrupt() -> None:
    columns, data = databases.sound()
    for at in (18, 19, 44, 47):  # write and read version, schema format
        changed = bytearray(data)
        changed[at] = 9
        with contextlib.suppress(CorruptData):
            Database(bytes(changed), columns).close()


def test_an_npz_with_a_flipped_bit_is_refused_also_where_its_members_are_stored_as_they_are() -> None:
    stored, deflated = _npzs()
    for archive in (stored, deflated):
        vectors.open_npz(_Bytes(archive))
        damaged = bytearray(archive)
        damaged[archive.index(b"\x93NUMPY") + 150 if archive is stored else 60] ^= 1
        with pytest.raises(InvalidRequest):
            vectors.open_npz(_Bytes(bytes(damaged)))


def test_an_npz_may_not_claim_more_than_it_holds() -> None:
    stored, _ = _npzs()
    for cut in range(1, len(stored), 7):
        with pytest.raises((InvalidRequest, LimitExceeded)):
            vectors.open_npz(_Bytes(stored[cut:]))
    with pytest.raises(LimitExceeded):
        vectors.open_npz(_Bytes(stored), max_member_bytes=100)
    sizes = stored.rindex(b"PK\x01\x02", 0, stored.rindex(b"PK\x01\x02")) + 20
    with pytest.raises(InvalidRequest):
        vectors.open_npz(_Bytes(stored[:sizes] + bytes(4) + stored[sizes + 4 :]))


def test_an_npz_of_an_unknown_method_is_an_invalid_request() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("tokens.npy", _npy(_tokens()))
        archive.writestr("doclens.npy", _npy(LENGTHS))
    data = buffer.getvalue()
    vectors.open_npz(_Bytes(data))
    for at in (data.index(b"BZh") + 12, data.rindex(b"PK\x01\x02") + 10):
        damaged = bytearray(data)
        damaged[at] ^= 0x55
        with pytest.raises(InvalidRequest):
            vectors.open_npz(_Bytes(bytes(damaged)))


# Found in settings of models


@pytest.mark.parametrize("content", [b'{"model_name": "\xd9"}', b'{"skiplist_words": ' + b"[" * 5000, b"\xff"])
async def test_settings_of_a_model_that_are_no_text_are_corrupt_and_a_record_of_that_kind_is_forgotten(
    tmp_path: Path, content: bytes
) -> None:
    from fuzz.models import _Store

    (tmp_path / "onnx_config.json").write_bytes(content)
    with pytest.raises(CorruptData):
        read_config(tmp_path / "onnx_config.json")
    folder = await load_from_store(_Store(), "m", tmp_path)
    (folder / "fetched.json").write_bytes(content)
    await load_from_store(_Store(), "m", tmp_path)


# Found in events


def _event(**headers: Any) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((events.EVENTS / "alb_single.json").read_text())
    return event | {"path": "/indices/papers", "httpMethod": "GET", "headers": {"accept": "*/*", **headers}}


@pytest.mark.parametrize(
    "event",
    [_event(host="a:b:c"), _event(host="[::1]:80"), _event(**{"x-forwarded-port": "x"}), _event() | {"body": "A", "isBase64Encoded": True}],
)
def test_a_header_that_the_adapter_cannot_read_is_a_bad_request_and_not_a_crash(event: dict[str, Any]) -> None:
    answer = events.function()(event)
    assert answer["statusCode"] == 400
    assert json.loads(answer["body"])["code"] == "BAD_REQUEST"


@pytest.mark.parametrize(
    "event",
    [
        3,
        None,
        [],
        {},
        {"requestContext": None},
        {"requestContext": {"elb": {}}},
        _event() | {"httpMethod": {}},
        _event(**{"x-forwarded-port": 1e999}),
    ],
)
def test_what_is_no_event_of_a_request_is_said_to_be_none(event: Any) -> None:
    with pytest.raises(RuntimeError):
        events.function()(event)


@pytest.mark.parametrize(
    ("function", "event"),
    [
        (0, {"do": "rank"}), (0, []), (1, {"do": "plan", "request": {"index": "papers", "query": [[1, 2], [3]]}}), (1, ""), (1, {"do": ["plan"]}),
        (1, {"do": "plan", "request": {"index": "papers", "query": [[1, 2, 3, 4]], "subset": [10**30]}}), (2, {"do": "decide"}),
        (2, {"do": "finish", "index": "papers", "build": "", "n_inputs": 1}), (2, {"do": "finish", "index": "papers", "build": "a" * 32, "n_inputs": 10**18}),
        (2, {"do": "input", "index": "papers", "build": "../../x", "number": "\0"}), (3, {"index": ["a"]}), (3, 1),
    ],
)  # fmt: skip
def test_an_event_of_nonsense_is_an_engine_error(function: int, event: Any) -> None:
    tasks = events.tasks().tasks()
    run = (tasks.shard, tasks.coordinate, tasks.build, tasks.maintain)[function]
    with pytest.raises(EngineError):
        events.tasks().runner.run(run(event))


def test_a_finished_build_without_a_name_is_not_any_build() -> None:
    """An empty id was the end of every cause: `finish` said that the build had been committed before."""
    tasks = events.tasks().tasks()
    with pytest.raises(InvalidRequest):
        events.tasks().runner.run(tasks.build({"do": "finish", "index": "papers", "build": "", "n_inputs": 0}))


def test_queries_of_jobs_are_finite_and_shards_answer_with_numbers() -> None:
    with pytest.raises(InvalidRequest):
        _query([[1e39, 1.0]])
    with pytest.raises(InvalidRequest):
        fanout.read({"error": "\ud800"}, fanout.Failed)
    nan = base64.b64encode(np.full(2, np.nan, "<f4")).decode()
    for exact in (nan, "AAA="):
        ranked = fanout.read({"shard": 0, "approximate": "", "exact": exact, "stats": {}}, fanout.Ranked)
        with pytest.raises(CorruptData):
            fanout.bars_of(None, [ranked])  # type: ignore[arg-type]
