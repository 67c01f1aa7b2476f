"""The `tartan` command: every command through typer's runner, and a few real processes for signals, kills and what is imported."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from corpus import make_corpus
from engine.config import SearchParams
from engine.demo import documents as demo_documents
from handler.cli import app, progress, query, session
from handler.settings import Settings
from s3_server import REGION, S3Server

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "engine/demo/demo.jsonl"
CORPUS = make_corpus(200, 16)
RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A developer's settings must not reach the tests; each works on a store of its own, without waiting for the disk."""
    for name in [name for name in os.environ if name.startswith("TARTAN_") or name == "INDEX_DIR"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TARTAN_INDEX_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("TARTAN_FSYNC", "false")


def tartan(*arguments: object, code: int = 0, **more: Any) -> Result:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments], **more)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output + result.stderr
    return result


def answer(*arguments: object, code: int = 0) -> dict[str, Any]:
    """What --json says: one document on standard output and nothing else."""
    result = tartan(*arguments, "--json", code=code)
    assert result.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refusal(*arguments: object, code: int = 1) -> str:
    """The one line on stderr of a command that fails."""
    result = tartan(*arguments, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("tartan: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.strip()


@pytest.fixture
def arrays(tmp_path: Path) -> tuple[Path, Path]:
    np.save(tmp_path / "tokens.npy", CORPUS.tokens.astype(np.float16))
    np.save(tmp_path / "doclens.npy", np.diff(CORPUS.offsets))
    return tmp_path / "tokens.npy", tmp_path / "doclens.npy"


def index_arrays(arrays: tuple[Path, Path], *more: object) -> dict[str, Any]:
    return answer("index", arrays[0], "--lengths", arrays[1], *more)


# Indexing and searching


def test_the_demo_collection_is_indexed_and_searched_by_text() -> None:
    made = answer("index", DEMO)
    assert (made["index"], made["documents"], made["created"]) == ("demo", len(demo_documents()), True)
    found = answer("search", "demo", "suspension bridge twisted in the wind", "-k", 3)
    assert found["hits"][0]["fields"]["title"] == "The Tacoma Narrows Bridge"
    assert found["cost"]["requests"] >= 1
    assert found["cost"]["times_ms"]["total"] > 0
    shown = tartan("search", "demo", "suspension bridge twisted in the wind", "-k", 3, "--explain").stdout
    assert "Tacoma" in shown
    assert "scored exactly" in shown
    assert "similarity" in shown


def test_search_filters_by_a_condition_and_searches_keywords() -> None:
    answer("index", DEMO)
    found = answer("search", "demo", "bridge", "--where", "year > ? AND topic = ?", "--param", 1900, "--param", "engineering")
    assert found["documents_allowed"] > 0
    assert all(hit["fields"]["year"] > 1900 and hit["fields"]["topic"] == "engineering" for hit in found["hits"])
    none = answer("search", "demo", "bridge", "--where", "year > ?", "--param", 9999)
    assert (none["documents_allowed"], none["hits"]) == (0, [])
    by_word = answer("search", "demo", "Tacoma", "--keyword")
    assert by_word["hits"]
    assert all("Tacoma" in json.dumps(hit["fields"]) for hit in by_word["hits"])
    result = tartan("search", "demo", "bridge", "--where", "no_such = 1", "--json", code=1)
    assert json.loads(result.stderr)["error"]["code"] == "invalid-condition"


def test_arrays_are_indexed_with_fields_and_ids_and_searched_by_vectors(arrays: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(len(CORPUS))))
    (tmp_path / "ids.txt").write_text("".join(f"doc-{n}\n" for n in range(len(CORPUS))))
    extras = ("--fields", tmp_path / "rows.jsonl", "--ids", tmp_path / "ids.txt", "--name", "arrays", "--nbits", 8)
    index_arrays(arrays, *extras)
    np.save(tmp_path / "query.npy", CORPUS.queries[0])
    found = answer("search", "arrays", "--vectors", tmp_path / "query.npy", "-k", 1, "--n-rerank", 50, "--explain")
    best = int(CORPUS.exact_scores(CORPUS.queries[0]).argmax())
    [hit] = found["hits"]
    assert (hit["document_id"], hit["id"], hit["fields"]) == (best, f"doc-{best}", {"n": best})
    assert sum(match["similarity"] for match in hit["matches"]) == pytest.approx(hit["score"], abs=0.05)

    again = index_arrays(arrays, *extras)  # the same ids: replaced, not doubled
    assert (again["documents_replaced"], again["documents"]) == (len(CORPUS), len(CORPUS))


def test_an_index_is_not_made_again_with_other_settings(arrays: tuple[Path, Path]) -> None:
    index_arrays(arrays, "--name", "a", "--nbits", 2)
    assert index_arrays(arrays, "--name", "a")["documents"] == 2 * len(CORPUS)
    said = refusal("index", arrays[0], "--lengths", arrays[1], "--name", "a", "--nbits", 4)
    assert "nbits index=a expected=4 found=2" in said


def test_an_export_is_indexed_again() -> None:
    answer("index", DEMO)
    out = Path(os.environ["TARTAN_INDEX_DIR"]).parent / "out.jsonl"
    assert answer("export", "demo", out)["documents"] == 300
    assert not out.with_name("out.jsonl.part").exists()
    assert answer("index", out, "--name", "again", "--nbits", 8)["documents"] == 300
    first, again = (answer("search", name, "a storm at sea", "-k", 1)["hits"][0] for name in ("demo", "again"))
    assert first["fields"] == again["fields"]
    assert first["score"] == pytest.approx(again["score"], rel=0.02)
    lines = tartan("export", "demo", "--no-vectors").stdout.splitlines()
    assert sorted(json.loads(line)["document_id"] for line in lines) == list(range(300))


def test_an_index_directory_of_nextplaid_is_imported(tmp_path: Path) -> None:
    from test_transfer import Peer

    peer = Peer([[3, 1, 4], [1, 5]])
    folder = tmp_path / "peer"
    folder.mkdir()
    peer.write_nextplaid(folder)
    made = answer("import", folder, "--nbits", 8)
    assert (made["index"], made["documents"], made["tokens_added"]) == ("peer", 5, 14)
    np.save(tmp_path / "query.npy", peer.tokens()[4:8])
    assert answer("search", "peer", "--vectors", tmp_path / "query.npy")["hits"][0]["document_id"] == 2
    assert "no such directory" in refusal("import", tmp_path / "nothing")


def test_objects_of_s3_are_indexed_into_s3(s3: S3Server, s3_url: str, arrays: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from engine.store.objects import StoreOptions, open_store

    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": REGION, "ENDPOINT_URL": s3.url}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    inputs = open_store(f"{s3_url}/in", StoreOptions(endpoint=s3.url))

    async def upload() -> None:
        for path in arrays:
            await inputs.put_if_absent(path.name, path.read_bytes())

    asyncio.run(upload())
    made = answer(
        "index", f"{s3_url}/in/tokens.npy", "--lengths", f"{s3_url}/in/doclens.npy", "--name", "far", "--store", f"{s3_url}/indices"
    )
    assert made["documents"] == len(CORPUS)
    [line] = answer("list", "--store", f"{s3_url}/indices")["indices"]
    assert line["index"] == "far"
    assert answer("verify", "--store", f"{s3_url}/indices")["sound"]
    bucket = s3_url.rsplit("/", 2)[0] + "/not-there-bucket"
    assert "does not know the bucket" in refusal("list", "--store", bucket.replace("tartan-tests/", ""))


# Time and upkeep


def test_an_index_goes_through_its_life(arrays: tuple[Path, Path]) -> None:
    index_arrays(arrays, "--name", "life")
    assert answer("pin", "add", "life", "first", "--note", "as built")["generation"] == 1
    index_arrays(arrays, "--name", "life")
    lines = answer("generations", "life")["generations"]
    assert [line["generation"] for line in lines] == [2, 1, 0]
    assert [line["pins"] for line in lines] == [[], ["first"], []]
    assert answer("info", "life", "--generation", 1)["documents"] == len(CORPUS)
    back = answer("rollback", "life", "--pin", "first")
    assert (back["to"], back["generation"], back["documents"]) == (1, 3, len(CORPUS))
    assert answer("branch", "life", "twin", "--generation", 2)["documents"] == 2 * len(CORPUS)
    assert [pin["pin"] for pin in answer("pin", "list", "life")["pins"]] == ["first"]
    assert answer("compact", "life", "--force")["steps"] == {}
    doomed = answer("gc", "life", "--dry-run", "--grace-s", 0)
    assert doomed["dry_run"]
    report = answer("verify", "--all")
    assert report["sound"]
    assert {line["index"] for line in report["indices"]} == {"life", "twin"}
    answer("pin", "remove", "life", "first")
    assert "pin-not-found" not in refusal("pin", "remove", "life", "first")
    assert answer("delete", "life", "--yes")["deleted"]
    assert answer("verify", "twin")["sound"]
    assert [line["index"] for line in answer("list")["indices"]] == ["twin"]


def test_rollback_takes_a_time(arrays: tuple[Path, Path]) -> None:
    index_arrays(arrays, "--name", "a")
    index_arrays(arrays, "--name", "a")
    created = answer("info", "a", "--generation", 1)["created"]
    assert answer("rollback", "a", "--at", "2999-01-01")["to"] == 2
    assert "no kept generation is that old" in refusal("rollback", "a", "--at", "1999-01-01")
    assert created.endswith("Z")
    assert tartan("rollback", "a", "--at", "yesterday", code=2)
    assert tartan("rollback", "a", code=2)


def test_verify_finds_a_flipped_bit(arrays: tuple[Path, Path]) -> None:
    index_arrays(arrays, "--name", "a")
    [data] = Path(os.environ["TARTAN_INDEX_DIR"]).glob("a/segments/*/data")
    content = bytearray(data.read_bytes())
    content[-100] ^= 4
    data.write_bytes(content)
    report = answer("verify", "a", code=1)
    assert not report["sound"]
    assert len(report["indices"][0]["problems"]) >= 1
    assert "problem" in tartan("verify", "a", code=1).stdout


def test_recall_names_the_cheapest_setting_that_reaches_the_target(arrays: tuple[Path, Path]) -> None:
    index_arrays(arrays, "--name", "a")
    found = answer("recall", "a", "-k", 5, "--queries", 12, "--query-tokens", 4, "--target", 0.9)
    assert found["cheapest"]["recall"] >= 0.9
    assert found["settings"].index(found["cheapest"]) == next(n for n, line in enumerate(found["settings"]) if line["recall"] >= 0.9)
    assert found["settings"][-1]["recall"] > 0.98
    assert "cheapest" in tartan("recall", "a", "-k", 5, "--queries", 12).stdout


# Refusals


def test_what_is_not_there_is_said_in_one_line(arrays: tuple[Path, Path], tmp_path: Path) -> None:
    assert "no such directory" in refusal("list")
    index_arrays(arrays, "--name", "a")
    for command in ("info", "generations", "compact", "verify", "export", "recall"):
        assert refusal(command, "b") == "tartan: no such index index=b", command
    assert refusal("search", "b", "text") == "tartan: no such index index=b"
    assert "no such generation" in refusal("rollback", "a", 77)
    assert "no pin of this name" in refusal("rollback", "a", "--pin", "x")
    assert "no such file" in refusal("index", tmp_path / "nothing.npy")
    assert "a store is s3://" in refusal("list", "--store", "ftp://host/folder")
    answer("branch", "a", "a2")
    assert "an index of this name exists already" in refusal("branch", "a", "a2")


def test_a_bad_source_leaves_no_index(arrays: tuple[Path, Path], tmp_path: Path) -> None:
    tokens = CORPUS.tokens.copy()
    tokens[11, 0] = np.nan
    np.save(tmp_path / "nan.npy", tokens)
    (tmp_path / "ragged.jsonl").write_text('{"embeddings": [[1, 2], [3]]}\n')
    sources: list[tuple[object, ...]] = [
        (tmp_path / "nan.npy", "--lengths", arrays[1]),
        (arrays[0], "--lengths", arrays[0]),
        (tmp_path / "ragged.jsonl",),
    ]
    for source in sources:
        refusal("index", *source, "--name", "bad")
    assert "an index name is" in refusal("index", arrays[0], "--lengths", arrays[1], "--name", "a/b")
    assert "nbits is 1, 2, 4 or 8" in refusal("index", arrays[0], "--lengths", arrays[1], "--nbits", 3)
    assert not list(Path(os.environ["TARTAN_INDEX_DIR"]).glob("*/CURRENT"))


def test_another_dimension_is_refused_before_anything_is_written(arrays: tuple[Path, Path], tmp_path: Path) -> None:
    index_arrays(arrays, "--name", "a")
    (tmp_path / "wide.jsonl").write_text('{"embeddings": [[1, 2, 3]]}\n')
    assert "expected=16 found=3" in refusal("index", tmp_path / "wide.jsonl", "--name", "a")
    np.save(tmp_path / "query.npy", np.ones((2, 3), np.float32))
    assert "expected=16 found=3" in refusal("search", "a", "--vectors", tmp_path / "query.npy")
    assert answer("info", "a")["generation"] == 1


def test_with_json_a_failure_is_json_on_stderr() -> None:
    Path(os.environ["TARTAN_INDEX_DIR"]).mkdir()
    result = tartan("info", "nothing", "--json", code=1)
    assert result.stdout == ""
    assert json.loads(result.stderr)["error"] == {"code": "index-not-found", "message": "no such index", "details": {"index": "nothing"}}


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["info"],
        ["search", "a"],
        ["search", "a", "text", "--vectors", "q.npy"],
        ["search", "a", "text", "--param", "1"],
        ["search", "a", "--keyword", "--vectors", "q.npy"],
        ["search", "a", "text", "-k", "-1"],
        ["index", "tokens.npy", "--ids"],
        ["delete", "a"],
        ["export", "a", "--json"],
        ["key", "mint", "--scope", "everything"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_with_2(arguments: list[str]) -> None:
    result = tartan(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr


def test_an_unreadable_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARTAN_PORT", "eighty")
    assert "TARTAN_PORT='eighty'" in refusal("list")
    assert "TARTAN_PORT='eighty'" in refusal("serve")


def test_progress_says_rate_and_time_left_and_not_what_an_earlier_run_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    with progress.Reporter() as report:
        report("build", 9000, 10_000)  # 9000 were there from an interrupted run
        now_s += 10
        report("build", 9200, 10_000)
        report("build", 9201, 10_000)  # within LINE_INTERVAL_S
    assert capsys.readouterr().err == "tartan: build 9,200 of 10,000 documents, 20/s, 40s left\n"
    assert [progress.duration(s) for s in (59.6, 185, 7800)] == ["1m00s", "3m05s", "2h10m"]


# What belongs to the server


def test_a_minted_key_opens_what_its_record_says() -> None:
    from handler.auth import Gate, parse_records

    made = answer("key", "mint", "--scope", "search", "--indices", "a*", "--note", "test")
    gate = Gate(parse_records(json.dumps([made["record"]])), frozenset())
    caller = gate.admit({"x-api-key": made["key"]}, "search", index="abc")
    assert caller is not None
    assert made["key"] not in json.dumps(made["record"])


def test_serve_hands_the_options_to_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from handler import server

    called = []
    monkeypatch.setattr(server, "serve", lambda *arguments: called.append(arguments) or 0)
    tartan("serve", "-h", "127.0.0.1", "-p", 9001, "-d", tmp_path, "-m", "hashing", "--int8", "--workers", 2, "--threads", 3)
    [(host, port, settings, workers)] = called
    assert (host, port, workers) == ("127.0.0.1", 9001, 2)
    assert (settings.index_dir, settings.model, settings.model_int8, settings.encoder_threads) == (str(tmp_path), "hashing", True, 3)


def test_the_store_is_the_options_then_the_environments_then_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.settings_of("elsewhere").index_dir == "elsewhere"
    assert session.settings_of(None).index_dir == os.environ["TARTAN_INDEX_DIR"]
    monkeypatch.delenv("TARTAN_INDEX_DIR")
    assert session.settings_of(None).index_dir == session.DEFAULT_STORE == Settings().index_dir
    monkeypatch.setenv("TARTAN_INDEX_DIR", "./indices")
    assert session.settings_of(None).index_dir == "./indices"


def test_version_and_help() -> None:
    assert set(answer("version")) >= {"tartan", "python", "numpy"}
    assert "tartan search demo" in tartan("search", "--help").stdout


# Documents


def commands(group: Any = app, prefix: str = "") -> dict[str, Any]:
    found = {f"{prefix}{command.name}": command.callback for command in group.registered_commands}
    for inner in group.registered_groups:
        found |= commands(inner.typer_instance, f"{prefix}{inner.name} ")
    return found


def test_every_command_takes_json_has_an_example_and_is_in_the_manual() -> None:
    manual = (ROOT / "docs/cli.md").read_text()
    for name, callback in commands().items():
        assert "as_json" in inspect.signature(callback).parameters, name
        assert re.search(rf"\[dim\]\s*tartan {name}\b", callback.__doc__), name
        assert f"## tartan {name}\n" in manual, name
        assert re.search(rf"^tartan {name}\b", manual, re.MULTILINE), name


def test_the_defaults_that_help_shows_are_the_engines() -> None:
    for option, name in ((query.NProbe, "n_probe"), (query.NCandidates, "n_candidates"), (query.NRerank, "n_rerank")):
        assert option.__metadata__[0].show_default == str(getattr(SearchParams(), name))
    assert any(all(line[name] == getattr(SearchParams(), name) for name in line) for line in query.SWEEP)


# Real processes


_CLI = """
import runpy, signal

signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("handler.cli", run_name="__main__", alter_sys=True)
"""
"""`python -m handler.cli`. Tests that run in the background of a shell inherit an ignored SIGINT, and the command would ignore it too."""


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _CLI, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_help_imports_neither_numpy_nor_the_engine() -> None:
    code = "import sys, handler.cli; print(*sorted({name.partition('.')[0] for name in sys.modules} & {'numpy', 'engine', 'litestar', 'obstore'}))"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == ""


@pytest.fixture
def many(tmp_path: Path) -> tuple[Path, Path, Path, int]:
    """A collection that takes a dozen small segments."""
    return collection(tmp_path, n_documents=24_000)


def collection(tmp_path: Path, n_documents: int) -> tuple[Path, Path, Path, int]:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 6, n_documents)
    np.save(tmp_path / "many.npy", rng.standard_normal((int(lengths.sum()), 16)).astype(np.float16))
    np.save(tmp_path / "lengths.npy", lengths)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"n":{n}}}\n' for n in range(n_documents)))
    return tmp_path / "many.npy", tmp_path / "lengths.npy", tmp_path / "rows.jsonl", n_documents


def wait_for_segments(process: subprocess.Popen[str], n: int) -> None:
    """Until a build has written down that many finished parts."""
    folder, deadline = Path(os.environ["TARTAN_INDEX_DIR"]), time.monotonic() + 60
    while len(list(folder.glob("many/builds/*/*"))) < n:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_build_goes_on_where_it_stopped_and_doubles_nothing(many: tuple[Path, Path, Path, int]) -> None:
    tokens, lengths, rows, n_documents = many
    arguments = ("index", tokens, "--lengths", lengths, "--fields", rows, "--segment-documents", 2048, "--nbits", 2)
    for n in (3, 6):
        process = start(*arguments)
        wait_for_segments(process, n)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert answer("info", "many")["documents"] == 0
    done = answer(*arguments)
    assert 0 < done["documents_resumed"] < n_documents
    assert (done["documents_added"], done["documents"]) == (n_documents, n_documents)
    assert not list(Path(os.environ["TARTAN_INDEX_DIR"]).glob("many/builds/*/*"))
    lines = [json.loads(line) for line in tartan("export", "many", "--no-vectors").stdout.splitlines()]
    assert sorted(line["document_id"] for line in lines) == list(range(n_documents))
    assert all(line["document_id"] == line["metadata"]["n"] for line in lines)


def test_an_interrupted_command_ends_with_130_in_one_line(tmp_path: Path) -> None:
    # Big enough that the build is far from its end even when this process is woken late.
    tokens, lengths, _, _ = collection(tmp_path, n_documents=240_000)
    process = start("index", tokens, "--lengths", lengths, "--segment-documents", 2048)
    wait_for_segments(process, 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, err) == ("", "tartan: interrupted\n")
    assert answer("info", "many")["documents"] == 0
