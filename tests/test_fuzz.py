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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.encoding.folder import load_from_store
from engine.encoding.onnx import OnnxEncoder, _check_output, read_config
from engine.errors import CorruptData, EngineError, InvalidRequest, LimitExceeded, Unavailable, UnsupportedFormat
from engine.fanout import messages
from engine.fanout.merge import STAGES, bars_of, best_of
from engine.format import codec_object, envelope
from engine.format.envelope import Section
from engine.format.manifest import SegmentRef, TombstoneRef
from engine.format.segment import describe
from engine.format.tombstones import read_tombstones
from engine.format.verify import verify_segment
from engine.metadata import keyword_query
from engine.metadata.database import Database
from engine.searcher import Answer as Merged
from engine.searcher import SearchStats
from engine.transfer.arrays import open_npy
from engine.transfer.nextplaid.opening import read
from engine.transfer.npz import open_npz
from engine.transfer.text_lines import TextLines
from fuzz import __main__ as runner
from fuzz import arena, codecs, databases, drawn, encoders, events, objects, plaid, shards
from fuzz import target as fuzz_target
from fuzz.arrays import LENGTHS, _hashed, _npy, _npzs, _tokens
from fuzz.sealing import Contents, cut_records, with_sections
from fuzz.service import Answer, check_answer
from fuzz.table import TARGETS
from fuzz.target import Target, Wrong, close_all, judge
from golden.readers import golden_readers
from handler.lambda_tasks import _query
from handler.routes.uploads import _Bytes

ROOT = Path(__file__).resolve().parent.parent
N_VARIANTS, N_DRAWN = 50, 12
"""Inputs of each target; the costly ones (a whole request, a directory) get a fifth."""
COSTLY = ("request", "task", "nextplaid", "model", "encoder", "event", "database", "shards")


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    """Stores, loops and databases that targets share; and the handler that Lambda would call."""
    yield
    close_all()
    if "handler.lambda_http" in sys.modules:
        sys.modules["handler.lambda_http"].handler.close()


def _target(name: str) -> Target:
    if name == "encoder" and not encoders.IS_INSTALLED:
        pytest.skip("the extra `encoder` is not installed")
    return TARGETS[name]


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_of_sound_inputs_are_taken_or_refused_as_documented(name: str) -> None:
    target = _target(name)
    n = N_VARIANTS // 5 if name in COSTLY else N_VARIANTS
    accepted = sum(judge(target, data) for data in target.seeds)
    assert accepted, "some seed is sound"
    for number in range(n):
        judge(target, target.variant(number))


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_hypothesis_draws_are_taken_or_refused_as_documented(name: str) -> None:
    drawn.run_batch(_target(name), 1, N_DRAWN // 3 if name in COSTLY else N_DRAWN, lambda data, accepted: None)


@pytest.mark.parametrize(
    "name", ["manifest", "codec", "segment_flat", "segment_flat_ids", "segment_quantised", "tombstones", "patch", "pin", "build"]
)
def test_a_flipped_bit_is_refused(name: str) -> None:
    data, read_all = objects.golden(name), golden_readers()[name]
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
    for name in ("manifest", "bodies", "npz", "quantised", "flat", "codec", "shards"):
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


# Found in segments and codecs


def _segment(change: Callable[[Contents], None], quantised: bool = True) -> tuple[arena.Arena, SegmentRef, bytes]:
    """A segment changed behind all its checksums."""
    home = arena.arena("wide", quantised)
    data = with_sections(home.segment, change)
    return home, describe(data, arena.MUTANT, name="x"), data


def _is_searched(home: arena.Arena, ref: SegmentRef, data: bytes) -> dict[str, bool]:
    codec = home.manifest.codecs[0] if home.manifest.codecs else None
    return arena.searched(home, ref, data, codec, home.codec if codec else b"")


def test_a_sound_segment_is_taken_by_every_search() -> None:
    for quantised in (True, False):
        taken = _is_searched(*_segment(lambda contents: None, quantised))
        assert taken.keys() >= {"warm", "hasty", "cold", "narrow", "beside"}
        assert all(taken.values())


def test_codes_of_no_centroid_are_corrupt() -> None:
    """A warm search took them for the last centroid; explaining a hit, compaction and export ended in an IndexError."""

    def change(contents: Contents) -> None:
        records = [bytearray(record) for record in cut_records(contents)]
        for record in records[:-1]:
            record[24:26] = b"\xff\xff"
        contents[Section.RECORDS] = b"".join(records)

    home, ref, data = _segment(change)
    assert not any(_is_searched(home, ref, data)[way] for way in ("warm", "hasty", "cold", "narrow"))
    with pytest.raises(CorruptData, match="beyond the last centroid"):
        verify_segment(data, ref, home.manifest.codecs[0], 16, name="x")


def test_ids_of_records_that_the_segment_does_not_have_are_corrupt() -> None:
    """A cold search gave them to the caller."""

    def change(contents: Contents) -> None:
        records = [bytearray(record) for record in cut_records(contents)]
        for record in records[:-1]:
            record[8:16] = (1 << 40).to_bytes(8, "little")
        contents[Section.RECORDS] = b"".join(records)

    taken = _is_searched(*_segment(change))
    assert taken["warm"], "which has the ids section"
    assert not taken["cold"]
    assert not taken["narrow"]


def test_sections_in_another_order_are_corrupt() -> None:
    """KeyError in a warm search; for a codec InvalidRequest in a cold one."""

    def change(contents: Contents) -> None:
        contents[Section.SIZES] = contents.pop(Section.SIZES)

    home, ref, data = _segment(change)
    assert not _is_searched(home, ref, data)["warm"]
    with pytest.raises(CorruptData, match="another order"):
        verify_segment(data, ref, home.manifest.codecs[0], 16, name="x")

    def change_codec(contents: Contents) -> None:
        contents[Section.META] = contents.pop(Section.META)

    codec = with_sections(home.codec, change_codec)
    with pytest.raises(CorruptData, match="another order"):
        codec_object.describe_codec(codec, "x", name="x")
    assert not codecs._searched_with(codec)


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0x7C01])
def test_flat_tokens_that_are_no_numbers_are_corrupt(bits: int) -> None:
    """They were widened to large ones, which won every search; matches were NaN."""

    def change(contents: Contents) -> None:
        contents[Section.TOKENS] = contents[Section.TOKENS][:-2] + bits.to_bytes(2, "little")

    assert not any(_is_searched(*_segment(change, quantised=False)).values())


@pytest.mark.parametrize("scale", [np.nan, np.inf, 3e38, -1e7])
def test_scales_of_centroids_are_checked_by_a_cold_search_too(scale: float) -> None:
    home = arena.arena("wide")

    def change(contents: Contents) -> None:
        contents[Section.CENTROIDS] = np.float32(scale).tobytes() + contents[Section.CENTROIDS][4:]

    taken = codecs.searches_with(home, with_sections(home.codec, change))
    assert not taken["warm"]
    assert not taken["cold"], "which reads all cells"
    with pytest.raises(CorruptData, match="scales"):
        codec_object.describe_codec(with_sections(home.codec, change), "x", name="x")


@pytest.mark.parametrize("name", ["quantised", "flat", "codec"])
def test_mutations_get_past_all_checksums(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a third ends at a checksum; without the sealing nearly all did."""
    refusals: list[str] = []
    before = CorruptData.__init__

    def noting(self: CorruptData, message: str, *, code: str | None = None, **details: object) -> None:
        before(self, message, code=code, **details)
        refusals.append(self.code)

    monkeypatch.setattr(CorruptData, "__init__", noting)
    rng, target, n_stopped = random.Random(3), TARGETS[name], 0
    for _ in range(25):
        refusals.clear()
        judge(target, target.mutate(rng.choice(target.seeds), rng, target.seeds, target.tokens))
        n_stopped += bool(refusals) and set(refusals) == {"checksum-mismatch"}
    assert n_stopped <= 8


def test_tombstones_of_nothing_are_corrupt() -> None:
    """IndexError; a manifest's own rules keep such a reference out."""
    data = with_sections(objects.golden("tombstones"), lambda contents: contents.update({Section.ORDINALS: b""}))
    ref = TombstoneRef(id="x", n_deleted=0, size_bytes=len(data), checksum=envelope.checksum(data))
    with pytest.raises(CorruptData, match="impossible"):
        read_tombstones(data, ref, 5, name="x")


# Found in answers of shards


def _merged(kind: int, body: bytes) -> Merged:
    found: Merged = shards.cluster().run(shards._asked(kind, body, False))
    return found


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b'{"results": 3}', b'{"results": [1]}', b'{"results": [{"shard": 0}]}', b'{"results": "\xff"}']
)
def test_an_execution_that_ends_with_something_else_failed_us_and_not_the_caller(body: bytes) -> None:
    with pytest.raises(Unavailable):
        _merged(shards.OUTPUT, body)


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"scored": null}', b"\xff", b"[" * 5000])
@pytest.mark.parametrize("kind", [shards.RANKED, shards.SCORED, shards.REFUSED])
def test_a_peer_that_answers_something_else_is_unavailable(kind: int, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.fanout.PEER_PAUSE_S", 0.0)
    if kind == shards.REFUSED:  # by the first server only: the second does the step
        assert len(_merged(kind, b"\5" + body).ids) == shards.PARAMS.k
    else:
        with pytest.raises(Unavailable):
            _merged(kind, body)


def _scored(**changes: Any) -> bytes:
    answer = json.loads(shards.SHARDS.seeds[1][1:])
    for name, (dtype, value) in changes.items():
        numbers = np.frombuffer(base64.b64decode(answer["scored"][name]), dtype).copy()
        numbers[0] = value
        answer["scored"][name] = base64.b64encode(numbers.tobytes()).decode()
    return json.dumps(answer).encode()


@pytest.mark.parametrize(
    "change",
    [
        {"positions": ("<u4", 9)},
        {"ordinals": ("<u4", 4000)},
        {"ids": ("<i8", -1)},
        {"ids": ("<i8", 1 << 62)},
        *({"scores": ("<f4", score)} for score in (np.inf, np.nan)),
    ],
)
def test_a_hit_that_its_segment_cannot_have_is_corrupt(change: dict[str, Any]) -> None:
    """IndexError, or a hit that is no document."""
    assert len(_merged(shards.SCORED, _scored()).ids) == shards.PARAMS.k
    with pytest.raises(CorruptData):
        _merged(shards.SCORED, _scored(**change))


def test_numbers_of_two_shards_do_not_make_up_for_each_other() -> None:
    one, two = (
        messages.Scored(shard=n, ids=bytes(16 - 8 * n), scores=bytes(4 + 4 * n), positions=b"", ordinals=b"", stats=SearchStats())
        for n in (0, 1)
    )
    with pytest.raises(CorruptData, match="differ in number"):
        best_of([one, two], 3)


def test_figures_of_a_shard_are_ones_that_metrics_can_hold() -> None:
    answer = json.loads(shards.SHARDS.seeds[1][1:])
    answer["scored"]["stats"] |= {"times_ms": {"x" * 99: 1.0, "exact": 2.0}, "n_requests": -5, "n_candidates": -1}
    stats = _merged(shards.SCORED, json.dumps(answer).encode()).stats
    assert stats.times_ms.keys() <= STAGES
    assert stats.n_requests >= 0
    found = shards.cluster()
    [alone] = found.run(found.searcher.search(found.snapshot, [arena.query(4, 3)]))
    assert alone.stats.times_ms.keys() <= STAGES, "a stage that merging would leave out"


# Found in models


@pytest.mark.parametrize(
    ("file", "find", "replacement"),
    [
        (encoders.NETWORK, b"token_type_ids", b"token\xfftype_ids"),
        (encoders.NETWORK, b"ReduceSum", b"ReduceXXX"),
        (encoders.TOKENIZER, b'"[UNK]":', b'"[UNG]":'),
        (encoders.TOKENIZER, b'"WordLevel"', b'"Bee"'),
        (encoders.SETTINGS, b'"embedding_dim": 4', b'"embedding_dim": -4'),
        (encoders.SETTINGS, b"{", b'{"mask_token_id": 1180591620717411303424,'),
        (encoders.SETTINGS, b"{", b'{"mask_token_id": 18446744073709551615,'),
        (encoders.SETTINGS, b"{", b'{"query_prefix_id": -1,'),
    ],
)
def test_what_the_libraries_raise_over_a_model_is_corrupt_data(file: int, find: bytes, replacement: bytes, tmp_path: Path) -> None:
    """UnicodeDecodeError, bare Exception, a panic that is no Exception, OverflowError."""
    if not encoders.IS_INSTALLED:
        pytest.skip("the extra `encoder` is not installed")
    for number, content in encoders._sound().items():
        changed = content.replace(find, replacement) if number == file else content
        assert (changed != content) == (number == file)
        (tmp_path / encoders._FILES[number]).write_bytes(changed)
    with pytest.raises(CorruptData):
        OnnxEncoder(tmp_path, n_threads=1).encode_queries(["the bee", "unknown"])


@pytest.mark.parametrize(
    "output", [np.full((1, 3, 4), np.nan, "f4"), np.zeros((1, 3, 4), "f8"), np.zeros((1, 3, 4), "O"), [], {}, "vectors"]
)
def test_what_a_network_returns_is_checked(output: Any) -> None:
    with pytest.raises(CorruptData):
        _check_output(output, (1, 3, 4))


# Found in metadata databases


@pytest.mark.parametrize("name", databases.HOSTILE)
def test_a_hostile_database_is_refused_or_harmless(name: str) -> None:
    """TypeError, ValueError, OverflowError, KeyError, MemoryError, sqlite3's own errors, or no end."""
    judge(TARGETS["database"], databases.altered(*databases.HOSTILE[name]))


@pytest.mark.parametrize("name", ["rows are an endless view", "a column computes", "no facts", "ids of text", "ordinals from afar"])
def test_a_database_of_other_tables_is_not_opened(name: str) -> None:
    with pytest.raises(CorruptData):
        Database(databases.altered(*databases.HOSTILE[name]), databases.sound()[0])


def test_a_database_with_a_row_twice_does_not_give_the_one_that_is_missing() -> None:
    """KeyError: the number of a row, changed in its page."""
    columns, data = databases.sound()
    found = bytearray(data)
    number = found.rindex(3, 0, found.index(b"word3 of the loom") - 7)
    found[number] = 0
    database = Database(bytes(found), columns)
    try:
        with pytest.raises(CorruptData):
            database.rows(np.array([3]))
        with pytest.raises(CorruptData):
            database.rows()
        assert database.rows(np.array([4]))[0]["title"] == "word4 of the loom"
    finally:
        database.close()


def test_a_keyword_query_of_many_nots_is_refused_and_not_too_deep() -> None:
    with pytest.raises(InvalidRequest, match="too many phrases"):
        keyword_query.compile_query("a" + " NOT a" * 1600)
    found = keyword_query.compile_query("a NOT b NOT c")
    assert isinstance(found.tree, keyword_query.Without)
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
        open_npy(_Bytes(data), _Bytes(_npy(LENGTHS)))
    for name, content in plaid._files().items():
        (tmp_path / name).write_bytes(data if name == "centroids.npy" else content)
    with pytest.raises(CorruptData):
        read(tmp_path)


def test_an_npy_of_a_version_that_numpy_does_not_know_is_refused() -> None:
    data = bytearray(_npy(_tokens(), (2, 0)))
    data[6] = 93
    with pytest.raises(InvalidRequest, match="version"):
        open_npy(_Bytes(bytes(data)), _Bytes(_npy(LENGTHS)))


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
        open_npz(_Bytes(archive))
        damaged = bytearray(archive)
        damaged[archive.index(b"\x93NUMPY") + 150 if archive is stored else 60] ^= 1
        with pytest.raises(InvalidRequest):
            open_npz(_Bytes(bytes(damaged)))


def test_an_npz_may_not_claim_more_than_it_holds() -> None:
    stored, _ = _npzs()
    for cut in range(1, len(stored), 7):
        with pytest.raises((InvalidRequest, LimitExceeded)):
            open_npz(_Bytes(stored[cut:]))
    with pytest.raises(LimitExceeded):
        open_npz(_Bytes(stored), max_member_bytes=100)
    sizes = stored.rindex(b"PK\x01\x02", 0, stored.rindex(b"PK\x01\x02")) + 20
    with pytest.raises(InvalidRequest):
        open_npz(_Bytes(stored[:sizes] + bytes(4) + stored[sizes + 4 :]))


def test_an_npz_of_an_unknown_method_is_an_invalid_request() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("tokens.npy", _npy(_tokens()))
        archive.writestr("doclens.npy", _npy(LENGTHS))
    data = buffer.getvalue()
    open_npz(_Bytes(data))
    for at in (data.index(b"BZh") + 12, data.rindex(b"PK\x01\x02") + 10):
        damaged = bytearray(data)
        damaged[at] ^= 0x55
        with pytest.raises(InvalidRequest):
            open_npz(_Bytes(bytes(damaged)))


def test_a_line_of_text_with_a_number_that_is_none_is_an_invalid_request() -> None:
    """Keys that are not encoded were read when the line's turn came: ValidationError of msgspec."""
    source = TextLines(_Bytes(b'{"text": "a"}\n{"text": "b", "n": 1e999}'), _hashed, encoder="none")
    with pytest.raises(InvalidRequest, match="document=1"):
        list(source.blocks(0))


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
        (2, {"do": "input", "index": "papers", "build": "../../x", "number": "\0"}),
        (2, {"do": "prepare", "request": {"index": "papers", "inputs": "\ud800"}}), (3, {"index": ["a"]}), (3, 1),
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
        messages.read({"error": "\ud800"}, messages.Failed)
    nan = base64.b64encode(np.full(2, np.nan, "<f4")).decode()
    for exact in (nan, "AAA="):
        ranked = messages.read({"shard": 0, "approximate": "", "exact": exact, "stats": {}}, messages.Ranked)
        with pytest.raises(CorruptData):
            bars_of(None, [ranked])  # type: ignore[arg-type]
