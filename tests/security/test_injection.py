"""SQL where none belongs: conditions, parameters, columns, keyword queries and fields. Refused, or answered as the model says; nothing changes.

The model is the list of rows that were written: what a filter may answer follows from them, in Python. The whole index is compared
byte by byte before and after, and the folder of every database is looked at.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import unicodedata
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import regex

from engine.index.build import column_pairs
from engine.metadata.database import Database
from engine.metadata.database_file import build
from engine.metadata.schema import Columns, extend
from engine.metadata.tokenizer import Scratch
from security.payloads import RAW_SQL, SQL
from serving import client_of

FILES = [Path("/tmp/tartan-owned.db"), Path("/tmp/tartan-owned")]
"""What some payloads would write."""
ROWS: list[dict[str, Any]] = [{"title": text, "year": 1900 + n, "mark": f"planted{n}"} for n, text in enumerate(SQL)]
SOME = SQL[::23]


@pytest.fixture
async def api() -> httpx.AsyncClient:
    """An index whose titles are the payloads, in two segments."""
    client = client_of(max_queries=2000)
    assert (await client.post("/indices", json={"name": "a"})).status_code == 200
    for part in (ROWS[: len(ROWS) // 2], ROWS[len(ROWS) // 2 :]):
        body = {"documents": [{"embeddings": [[1.0, 0.5]]}] * len(part), "metadata": part}
        assert (await client.post("/indices/a/update", json=body)).status_code == 202
    return client


async def objects(api: httpx.AsyncClient) -> dict[str, str]:
    """Every object of the store with a digest of its bytes."""
    store = api.runtime.counting  # type: ignore[attr-defined]
    return {line.name: hashlib.sha256((await store.get(line.name)).data).hexdigest() async for line in store.list("")}


async def ids(api: httpx.AsyncClient, condition: str, *parameters: Any) -> list[int]:
    answer = await api.post("/indices/a/metadata/query", json={"condition": condition, "parameters": list(parameters)})
    assert answer.status_code == 200, answer.text
    return answer.json()["document_ids"]


def refusal(answer: httpx.Response, *statuses: int) -> dict[str, Any]:
    """An error in the contract's form, which tells nothing of the rows."""
    assert answer.status_code in statuses, answer.text
    body = answer.json()
    assert set(body) == {"code", "message"}
    assert "planted" not in answer.text
    return body


STEP = pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
"""How many of the payloads go to each of the routes that lead to the same code as the first."""


@STEP
async def test_a_condition_with_sql_in_it_is_refused_on_every_route_and_changes_nothing(api: httpx.AsyncClient, step: int) -> None:
    assert len(SQL) >= 200
    before = await objects(api)
    for n, text in enumerate(SQL):
        own = {"condition": text, "parameters": [2000] * text.count("?")}
        filtered = {"filter_condition": text, "filter_parameters": own["parameters"], "queries": [{"embeddings": [[1.0, 0.5]]}]}
        requests: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", "/indices/a/metadata/get", own),
            ("POST", "/indices/a/metadata/update", own | {"updates": {"year": 0}}),
            ("DELETE", "/indices/a/documents", own),
            ("POST", "/indices/a/search", filtered),
            ("POST", "/indices/a/search/filtered", filtered),
        ]
        for method, path, body in [("POST", "/indices/a/metadata/query", own), *requests[n % step :: step]]:
            assert refusal(await api.request(method, path, json=body), 400)["code"] == "BAD_REQUEST", text
    assert await objects(api) == before
    assert not [path for path in FILES if path.exists()]


def like(pattern: str, text: str) -> bool:
    """SQLite's LIKE: ASCII letters without case, and both texts end at a NUL."""
    pattern, text = pattern.partition("\0")[0], text.partition("\0")[0]
    parts = ["." if c == "_" else ".*" if c == "%" else f"(?i:{c})" if c.isascii() and c.isalpha() else re.escape(c) for c in pattern]
    return re.fullmatch("".join(parts), text, re.DOTALL | re.ASCII) is not None


def found_by(pattern: str) -> list[int] | None:
    """Rows that REGEXP finds; None if it is no pattern."""
    try:
        compiled = regex.compile(pattern, flags=regex.VERSION0)
    except (regex.error, ValueError):
        return None
    return [n for n, text in enumerate(SQL) if compiled.search(text)]


@STEP
async def test_a_parameter_is_a_value_whatever_stands_in_it(api: httpx.AsyncClient, step: int) -> None:
    before = await objects(api)
    for n, text in enumerate(SQL):
        if n % step == 0:
            assert await ids(api, "title = ?", text) == [n]
            assert await ids(api, "year = ? OR mark = ?", text, text) == []
        if step > 1 and n % 3:
            continue
        assert await ids(api, "title LIKE ?", text) == [m for m, title in enumerate(SQL) if like(text, title)], text
        expected = found_by(text)
        if expected is None:
            answer = await api.post("/indices/a/metadata/query", json={"condition": "title REGEXP ?", "parameters": [text]})
            assert refusal(answer, 400)["code"] == "BAD_REQUEST"
        else:
            assert await ids(api, "title REGEXP ?", text) == expected, text
    every = await ids(api, f"title IN ({','.join('?' * len(SQL))})", *SQL)
    assert every == await ids(api, "1=1") == list(range(len(SQL)))
    assert await ids(api, "title NOT IN (?, ?)", SQL[0], SQL[5]) == [n for n in every if n not in (0, 5)]
    low, high = sorted((SQL[3], SQL[40]), key=str.encode)
    assert await ids(api, "title BETWEEN ? AND ?", low, high) == [n for n, t in enumerate(SQL) if low.encode() <= t.encode() <= high.encode()]
    assert await objects(api) == before


async def test_rows_come_back_as_they_were_written(api: httpx.AsyncClient) -> None:
    rows = (await api.get("/indices/a/metadata")).json()["metadata"]
    assert rows == [{"_subset_": n, **row} for n, row in enumerate(ROWS)]


def words(text: str) -> set[str]:
    """Roughly the words of the tokenizer: letters and digits without case and diacritics."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return set(re.findall(r"[^\W_]+", plain.lower())) | set(re.findall(r"[^\W_]+", text.lower()))


async def test_a_keyword_query_finds_documents_that_share_a_word_with_it_and_is_never_run(api: httpx.AsyncClient) -> None:
    before = await objects(api)
    answer = await api.post("/indices/a/search", json={"text_query": list(SQL), "params": {"top_k": 500}})
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert len(results) == len(SQL)
    n_hits = 0
    for text, result in zip(SQL, results, strict=True):
        for number, row in zip(result["document_ids"], result["metadata"], strict=True):
            n_hits += 1
            assert row == {"_subset_": number, **ROWS[number]}
            own = words(" ".join(map(str, ROWS[number].values())))
            assert any(any(have.startswith(want) for have in own) for want in words(text)), (text, row)
    assert n_hits > len(SQL)
    assert await objects(api) == before
    for commanding in ("*", "*rank", "*stats", "* reads", "*reads", "fts : a", "rank : a", "{fts rowid} : a", "_fts_content_ : planted0"):
        answer = await api.post("/indices/a/search", json={"text_query": [commanding]})
        assert answer.status_code == 200
        assert len(answer.json()["results"][0]["document_ids"]) <= (1 if "planted0" in commanding else 10)


FIELDS: tuple[tuple[str, str, dict[str, Any], tuple[str, ...]], ...] = (
    ("POST", "/indices/a/metadata/get", {}, ("limit", "document_ids")),
    ("POST", "/indices/a/metadata/check", {"document_ids": [1]}, ("document_ids",)),
    ("POST", "/indices/a/search", {"text_query": ["x"]}, ("params", "subset", "alpha", "fusion", "as_of", "max_age_s", "consistency", "explain")),
    ("POST", "/indices/a/search", {"text_query": ["x"], "params": {}}, ("params.top_k", "params.n_ivf_probe", "params.n_full_scores")),
    ("POST", "/indices/a/search", {"text_query": ["x"], "params": {}}, ("params.centroid_score_threshold",)),
    ("POST", "/indices/a/rollback", {}, ("generation", "pin")),
    ("POST", "/indices/a/pins", {}, ("pin",)),
    ("POST", "/indices/a/branch", {}, ("name",)),
    ("POST", "/indices", {}, ("name",)),
    ("POST", "/indices", {"name": "b", "config": {}}, ("config.fts_tokenizer", "config.nbits", "config.max_documents")),
    ("PUT", "/indices/a/config", {}, ("max_documents",)),
)  # fmt: skip


async def test_fields_that_are_numbers_names_or_choices_take_nothing_else(api: httpx.AsyncClient) -> None:
    before = await objects(api)
    for method, path, body, fields in FIELDS:
        for field in fields:
            for text in SOME:
                outer, _, inner = field.partition(".")
                sent = body | {outer: {inner: text} if inner else text}
                refusal(await api.request(method, path, json=sent), 400, 404, 422)
    for query in ("limit=1;DROP TABLE rows", "vectors=' OR 1=1 --", "top_k=9 UNION SELECT 1"):
        assert (await api.get(f"/indices/a/metadata?{query}")).json()["count"] == len(SQL)
    assert await objects(api) == before


async def test_a_column_is_a_name_or_it_is_refused(api: httpx.AsyncClient) -> None:
    before = await objects(api)
    document = {"documents": [{"embeddings": [[1.0, 0.5]]}]}
    for n, text in enumerate((*SQL, 'a" TEXT, "b', "a); DROP TABLE rows; --", "#ordinal", "#id", "a-b", "a b", "1a", "", "a" * 256, "\u00e4", 'a"')):
        if n % 2 and n < len(SQL):
            continue
        added = await api.post("/indices/a/update", json=document | {"metadata": [{"year": 1, text: "x"}]})
        assert refusal(added, 400)["code"] == "BAD_REQUEST", text
        if n % 3:
            continue
        changed = await api.post("/indices/a/metadata/update", json={"condition": "1=1", "updates": {text: 1}})
        assert refusal(changed, 400)["code"] == "BAD_REQUEST", text
        quoted = {"condition": f'"{text}" = ?', "parameters": [1]}
        assert refusal(await api.post("/indices/a/metadata/query", json=quoted), 400)["code"] == "BAD_REQUEST", text
    assert await objects(api) == before


async def test_deletes_and_updates_touch_what_the_model_says_and_nothing_else(api: httpx.AsyncClient) -> None:
    expected = {n: {"_subset_": n, **row} for n, row in enumerate(ROWS)}
    for n, text in list(enumerate(SQL))[::12]:
        changed = {"condition": "title = ? AND mark != ?", "parameters": [text, text], "updates": {"mark": text}}
        assert (await api.post("/indices/a/metadata/update", json=changed)).json() == {"updated": 1}
        expected[n]["mark"] = text
        gone = {"condition": "title = ? OR mark = ?", "parameters": [SQL[n + 1], SQL[n + 1]]}
        assert (await api.request("DELETE", "/indices/a/documents", json=gone)).status_code == 202
        del expected[n + 1]
        nothing = await api.request("DELETE", "/indices/a/documents", json=gone)
        assert (nothing.status_code, "No documents match" in nothing.text) == (202, True)
    assert (await api.get("/indices/a/metadata")).json()["metadata"] == list(expected.values())
    assert await ids(api, "1=1") == list(expected)


# Defence in depth: SQL that got through all the same


def database(folder: Path) -> Columns:
    """Two rows in metadata.sqlite."""
    columns, rows, texts = extend((), [{"title": "weft", "year": 1}, {"title": "warp", "year": 2}])
    (folder / "metadata.sqlite").write_bytes(build(rows, columns, np.arange(2), texts=texts))
    return columns


def lawful_elsewhere(folder: Path) -> set[str]:
    """Those of the statements that SQLite itself would run."""
    done = set()
    for sql in RAW_SQL:
        if "heap_limit" in sql or "printf" in sql:  # the one counts for the whole process, the other works for seconds
            continue
        plain = sqlite3.connect(":memory:", isolation_level=None)
        plain.deserialize((folder / "metadata.sqlite").read_bytes())
        plain.execute("CREATE TABLE temp.lists(list, value)")
        plain.set_progress_handler(lambda: 1, 100_000)  # a query without end
        plain.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)
        plain.execute("PRAGMA synchronous = OFF")
        try:
            plain.execute(sql.format(folder=folder)).fetchmany(3)
            done.add(sql)
        except (sqlite3.DatabaseError, MemoryError):
            pass
        finally:
            plain.close()
    return done


def test_the_connection_refuses_every_statement_that_is_not_ours(tmp_path: Path) -> None:
    columns = database(tmp_path)
    before = (tmp_path / "metadata.sqlite").read_bytes()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/metadata.sqlite").write_bytes(before)
    lawful = lawful_elsewhere(tmp_path / "elsewhere")
    assert len(lawful) > 30
    for sql in (*RAW_SQL, "SELECT 1; DELETE FROM main.rows"):
        segment = Database(str(tmp_path / "metadata.sqlite"), columns)
        with segment.asking(5) as connection:
            with pytest.raises(sqlite3.DatabaseError) as caught:
                connection.sqlite.execute(sql.format(folder=tmp_path)).fetchall()
            if sql in lawful:
                assert re.search("not authorized|prohibited|authorization denied|vtable constructor failed", str(caught.value)), (sql, caught.value)
        assert [row["title"] for row in segment.rows()] == ["weft", "warp"]
        segment.close()
    assert (tmp_path / "metadata.sqlite").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"metadata.sqlite", "elsewhere"}


def test_the_connection_that_only_tokenizes_reaches_no_file(tmp_path: Path) -> None:
    scratch = Scratch("unicode61")
    with closing(scratch.sqlite):
        assert scratch.terms("a weft; DROP TABLE fts") == ["a", "weft", "drop", "table", "fts"]
        reaching = [sql for sql in RAW_SQL if re.search("folder|ATTACH|VACUUM INTO|readfile|load_extension|fsdir", sql)]
        assert len(reaching) >= 9
        for sql in reaching:
            if "PRAGMA" not in sql:
                with pytest.raises(sqlite3.DatabaseError):
                    scratch.sqlite.execute(sql.format(folder=tmp_path)).fetchall()
        assert scratch.accepts("weft OR warp")
        assert scratch.terms("weft") == ["weft"]
        assert list(tmp_path.iterdir()) == []


def test_a_forged_column_does_not_reach_sql() -> None:
    """Column names stand in SQL: the manifest that names them is refused before anything is made of them."""
    from engine.format.manifest import Column, _columns_problem

    class Forged:
        columns = (Column(name='a" TEXT); DROP TABLE rows; --', type="TEXT"),)

    assert _columns_problem(Forged()) == "columns"  # type: ignore[arg-type]
    Forged.columns = (Column(name="a", type="TEXT); DROP TABLE rows"),)
    assert _columns_problem(Forged()) == "columns"  # type: ignore[arg-type]
    assert column_pairs((Column(name="a", type="TEXT"),)) == (("a", "TEXT"),)
