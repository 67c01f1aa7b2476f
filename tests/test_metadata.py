"""Rows, columns, and the database of a segment."""

from __future__ import annotations

import contextlib
import gc
import json
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CorruptData, InvalidRequest, LimitExceeded, Unavailable, UnsupportedFormat
from engine.metadata import condition, schema
from engine.metadata.database import Database, Patches, merge_patches
from engine.metadata.database_file import build, empty


def opened(rows: list[Any], base: int = 0, patches: Patches | None = None) -> Database:
    columns, stored, texts = schema.extend((), rows)
    return Database(build(stored, columns, np.arange(len(rows)), texts=texts), columns, base, patches)


def test_importing_schema_and_conditions_does_not_import_sqlite() -> None:
    code = "import sys, engine.metadata.schema, engine.metadata.condition; sys.exit('sqlite3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{}], ()),
        ([{"a": 1, "b": 1.5, "c": "x", "d": True, "e": [1], "f": {}}], "a INTEGER b REAL c TEXT d INTEGER e BLOB f BLOB"),
        ([{"a": None, "b": 1}, {"a": 5}], "a TEXT b INTEGER"),  # the first row has every key: null means TEXT
        ([{"b": 1}, {"a": None}, {"a": 5}], "b INTEGER a INTEGER"),
        ([{"b": 1}, {"a": None}], "b INTEGER a TEXT"),
        ([{"a": 1 << 63}], "a REAL"),
        ([{"a": -(1 << 63)}], "a INTEGER"),
        ([{"a": 1, "_subset_": 4, "_content_id_": 9}], "a INTEGER"),
        ([{"_subset_": 3}, {"a": None}, {"a": 1}], "a INTEGER"),
    ],
)
def test_column_types_follow_the_first_value(rows: list[dict[str, object]], expected: str | tuple[()]) -> None:
    columns = schema.extend((), rows).columns
    assert " ".join(f"{name} {kind}" for name, kind in columns) == (expected or "")


def test_later_batches_append_columns_and_never_change_types() -> None:
    columns = schema.extend((), [{"a": 1}]).columns
    extended = schema.extend(columns, [{"b": None, "a": "text"}, {"b": 2.5}])
    assert extended.columns == (("a", "INTEGER"), ("b", "REAL"))
    assert extended.rows == [{"a": "text"}, {"b": 2.5}]


@pytest.mark.parametrize(
    "rows",
    [
        [None],
        ["text"],
        [[1]],
        [{"1a": 1}],
        [{"": 1}],
        [{"a b": 1}],
        [{"é": 1}],
        [{"a\n": 1}],
        [{'a"': 1}],
        [{"a": 1, "A": 2}],
        [{"a": 1}, {"A": 2}],
        [{"_Subset_": 1}],
        [{"a" * 256: 1}],
        [{"a": float("nan")}],
        [{"a": float("inf")}],
        [{"a": 10**400}],
        [{"a": [float("inf")]}],
        [{"a": "\ud800"}],
        [{"a": ["\ud800"]}],
        [{"a": b"bytes"}],
        [{"a": {1, 2}}],
        [{"a": 1}, {"a": "1e999"}],
    ],
)
def test_rows_that_cannot_be_stored_are_refused(rows: list[object]) -> None:
    with pytest.raises(InvalidRequest):
        schema.extend((), rows)


def test_deeply_nested_values_are_refused_or_stored_but_never_a_recursion_error() -> None:
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(InvalidRequest):
        schema.extend((), [{"a": value}])
    while value:  # taken apart by hand: freeing it at once would recurse in C
        value = value.pop()  # type: ignore[assignment]


def test_limits_of_columns_and_row_size_are_errors() -> None:
    with pytest.raises(LimitExceeded):
        schema.extend((), [{f"c{number}": 1 for number in range(schema.MAX_COLUMNS + 1)}])
    with pytest.raises(LimitExceeded):
        schema.extend((), [{"a": "x" * (schema.MAX_ROW_BYTES + 1)}])
    widest = opened([{f"c{number}": number for number in range(schema.MAX_COLUMNS)}])
    assert widest.rows()[0]["c1899"] == 1899
    widest.close()


@pytest.mark.parametrize(
    ("kind", "value", "stored"),
    [
        ("INTEGER", "12", 12),
        ("INTEGER", " +12.0 ", 12),
        ("INTEGER", "1e3", 1000),
        ("INTEGER", "0x1A", "0x1A"),
        ("INTEGER", "", ""),
        ("INTEGER", "12 x", "12 x"),
        ("INTEGER", 3.0, 3),
        ("INTEGER", 3.5, 3.5),
        ("INTEGER", True, 1),
        ("REAL", 3, 3.0),
        ("REAL", "3", 3.0),
        ("REAL", "x", "x"),
        ("TEXT", 5, "5"),
        ("TEXT", 5.0, "5.0"),
        ("TEXT", 1e20, "1.0e+20"),
        ("TEXT", False, "0"),
        ("BLOB", 3.0, 3.0),
        ("BLOB", "12", "12"),
        ("BLOB", [1, {"a": None, "é": "x"}], '[1,{"a":null,"é":"x"}]'),
        ("INTEGER", 1 << 64, float(1 << 64)),
    ],
)
def test_affinity_changes_values_that_fit(kind: str, value: object, stored: object) -> None:
    found = schema.extend((("a", kind),), [{"a": value}]).rows[0]["a"]
    assert found == stored
    assert type(found) is type(stored)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(["12", "-0", " 7", "1.50", "1e5", ".5", "5.", "9223372036854775808", "0.1", "+3", "1_0", "\u0661", "\v2\f"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)
random_rows = st.lists(st.dictionaries(st.sampled_from(["a", "b", "c", "order", "rowid"]), json_values, max_size=5), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(rows=random_rows)
def test_stored_rows_are_exactly_what_the_database_gives_back(rows: list[dict[str, Any]]) -> None:
    columns, stored, texts = schema.extend((), rows)
    with_texts = Database(build(stored, columns, np.arange(len(rows)) * 2, texts=texts), columns, base=5)
    expected = [schema.complete(row, columns, 5 + 2 * number) for number, row in enumerate(stored)]
    assert [list(row.items()) for row in with_texts.rows()] == [list(row.items()) for row in expected]
    assert json.dumps(with_texts.rows()) == json.dumps(expected)  # 1 and 1.0 are equal in Python and not in JSON
    assert with_texts.texts() == texts
    with_texts.close()


@settings(max_examples=120, deadline=None)
@given(value=json_values, kind=st.sampled_from(["INTEGER", "REAL", "TEXT", "BLOB"]))
def test_affinity_agrees_with_sqlite(value: Any, kind: str) -> None:
    plain = schema.plain_value(value)
    try:
        mine = schema.affinity(plain, kind)
    except InvalidRequest:
        return
    connection = sqlite3.connect(":memory:")
    connection.execute(f"CREATE TABLE t(a {kind})")
    connection.execute("INSERT INTO t VALUES(?)", (plain,))
    theirs = connection.execute("SELECT a FROM t").fetchone()[0]
    connection.close()
    if kind == "TEXT" and isinstance(plain, float):
        assert float(str(theirs)) == pytest.approx(float(str(mine)), rel=1e-13)  # 15 digits or 17, by release
    elif isinstance(theirs, float):
        assert mine == pytest.approx(theirs, rel=1e-14)  # old releases read decimals with an error in the last bit
    else:
        assert (mine, type(mine)) == (theirs, type(theirs)) or (isinstance(theirs, int) and mine == theirs)


def test_keyword_text_joins_values_through_nested_ones() -> None:
    row = {"a": "Hello", "b": None, "c": [1, {"k": True, "l": ["x", 2.5]}], "d": "", "e": False, "_subset_": 7, "f": 1e20, "g": 1 << 65}
    assert schema.keyword_text(row) == f"Hello 1 true x 2.5 false 1e20 {schema.number_text(float(1 << 65))}"


def test_changed_values_are_normalised_and_unknown_columns_refused() -> None:
    columns = (("Year", "INTEGER"), ("title", "TEXT"))
    assert schema.changed_values(columns, {"year": "7", "title": None}) == {"Year": 7, "title": None}
    assert schema.changed_values(columns, {}) == {}
    strange: list[object] = [[], None, {"_subset_": 1}, {"nope": 1}, {"year": 1, "YEAR": 2}, {1: 1}, {"title": "\ud800"}]
    for updates in strange:
        with pytest.raises(InvalidRequest):
            schema.changed_values(columns, updates)


def test_adopting_columns_of_a_concurrent_commit() -> None:
    mine = (("a", "INTEGER"), ("b", "TEXT"))
    assert schema.adopt(mine, (("c", "REAL"), ("a", "INTEGER"))) == (*mine, ("c", "REAL"))
    assert schema.adopt(mine, (("a", "TEXT"),)) is None
    assert schema.adopt(mine, (("A", "INTEGER"),)) is None


def test_a_database_lacks_columns_without_values_and_reads_them_as_null() -> None:
    columns = (("a", "INTEGER"), ("b", "TEXT"), ("c", "REAL"))
    segment = Database(build([{"a": 1}, {}], columns, np.array([3, 8])), columns, base=100)
    assert segment.rows() == [{"_subset_": 103, "a": 1, "b": None, "c": None}, {"_subset_": 108, "a": None, "b": None, "c": None}]
    for text, parameters, expected in (
        ("b IS NULL", [], [0, 1]),
        ("b IS NOT NULL", [], []),
        ("NOT b = ?", ["x"], []),
        ("b != ? OR a = ?", ["x", 1], [0]),
        ("c NOT IN (?)", [1], []),
        ("b REGEXP ?", ["x"], []),
        ("_subset_ > ?", [103], [1]),
    ):
        assert segment.select(condition.parse(text, parameters, columns)).tolist() == expected, text
    segment.close()


def test_an_empty_database_has_rows_of_nulls() -> None:
    columns = (("a", "INTEGER"),)
    segment = Database(empty(np.array([0, 2, 5])), columns, base=7)
    assert segment.select(condition.parse("a IS NULL", [], columns)).tolist() == [0, 1, 2]
    assert segment.select(condition.parse("1=1", [], columns)).tolist() == [0, 1, 2]
    assert segment.select(condition.parse("_subset_ IN (?, ?)", [9, 12], columns)).tolist() == [1, 2]
    assert segment.rows(np.array([2])) == [{"_subset_": 12, "a": None}]
    segment.close()
    nothing = Database(empty(np.zeros(0, np.int64)), columns)
    assert nothing.rows() == []
    assert nothing.select(condition.parse("1=1", [], columns)).size == 0
    nothing.close()


def test_rows_come_in_the_order_asked_for_and_strange_ordinals_are_a_mistake() -> None:
    segment = opened([{"a": number} for number in range(5)])
    assert [row["a"] for row in segment.rows(np.array([3, 0, 3]))] == [3, 0, 3]
    assert segment.rows(np.zeros(0, np.int64)) == []
    for ordinal in (-1, 5):
        with pytest.raises(IndexError):
            segment.rows(np.array([ordinal]))
    segment.close()


def test_patches_change_rows_conditions_and_texts() -> None:
    rows = [{"a": number, "b": f"word{number}", "flag": True} for number in range(4)]
    patches = merge_patches([{1: {"a": 50, "b": None}}, {1: {"a": 51}, 3: {}}])
    segment = opened(rows, base=20, patches=patches)
    assert segment.rows(np.array([1, 0])) == [
        {"_subset_": 21, "a": 51, "b": None, "flag": 1},
        {"_subset_": 20, "a": 0, "b": "word0", "flag": 1},
    ]
    columns = segment.columns
    assert segment.select(condition.parse("a = ? OR a = ?", [1, 51], columns)).tolist() == [1]
    assert segment.select(condition.parse("b IS NULL", [], columns)).tolist() == [1]
    assert segment.select(condition.parse("_subset_ >= ?", [21], columns)).tolist() == [1, 2, 3]
    assert segment.texts() == ["0 word0 true", "51 1", "2 word2 true", "3 word3 1"]
    segment.close()


def test_a_patch_can_fill_a_column_that_the_segment_lacks() -> None:
    columns = (("a", "INTEGER"), ("late", "TEXT"))
    segment = Database(build([{"a": 1}, {"a": 2}], columns, np.arange(2)), columns, patches={1: {"late": "5"}})
    assert segment.select(condition.parse("late = ?", [5], columns)).tolist() == [1]
    segment.close()
    with pytest.raises(CorruptData):
        Database(build([{"a": 1}], columns, np.arange(1)), columns, patches={0: {"nope": 1}})


def test_rows_and_texts_of_a_database_build_the_same_database_again() -> None:
    rows = [{"a": number, "flag": number % 2 == 0, "nested": [True, {"x": "deep"}] if number % 3 == 0 else None} for number in range(20)]
    columns, stored, texts = schema.extend((), rows)
    data = build(stored, columns, np.arange(20), texts=texts)
    assert data == build(stored, columns, np.arange(20), texts=texts)
    first = Database(data, columns)
    again = [{name: row[name] for name, _ in columns} for row in first.rows()]
    assert build(again, columns, np.arange(20), texts=first.texts()) == data
    first.close()


def test_texts_of_boolean_columns_are_not_kept_twice() -> None:
    rows = [{"word": f"w{number}", "flag": number % 2 == 0} for number in range(50)]
    columns, stored, texts = schema.extend((), rows)
    connection = sqlite3.connect(":memory:")
    connection.deserialize(build(stored, columns, np.arange(50), texts=texts))
    assert connection.execute("SELECT count(*) FROM texts").fetchone() == (0,)
    connection.close()


def test_a_file_is_opened_without_being_changed(tmp_path: Path) -> None:
    columns, stored, texts = schema.extend((), [{"a": 1}, {"a": 2}])
    path = tmp_path / "metadata with ?#% in its name.sqlite"
    path.write_bytes(build(stored, columns, np.arange(2), texts=texts))
    before = path.read_bytes()
    segment = Database(path, columns, patches={0: {"a": 9}})
    assert segment.select(condition.parse("a > ?", [1], columns)).tolist() == [0, 1]
    segment.close()
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_strange_bytes_are_corrupt_data(tmp_path: Path) -> None:
    columns, stored, _ = schema.extend((), [{"a": 1}])
    data = build(stored, columns, np.arange(1))
    other_version = bytearray(data)
    other_version[60:64] = (99).to_bytes(4, "big")
    with pytest.raises(UnsupportedFormat):
        Database(bytes(other_version), columns)
    for broken in (
        b"",
        b"no database at all" * 100,
        data[:100],
        data[:4096],
        bytes(4096) + data[4096:],
        data[:4096] + bytes(len(data) - 4096),
    ):
        with pytest.raises(CorruptData):
            Database(broken, columns)
    with pytest.raises(CorruptData):
        Database(data, (("a", "TEXT"),))
    foreign = sqlite3.connect(":memory:")
    foreign.execute("CREATE TABLE rows(a)")
    with pytest.raises(CorruptData):
        Database(foreign.serialize(), columns)
    foreign.close()


def test_a_connection_can_only_read() -> None:
    segment = opened([{"a": 1}])
    with segment.asking(5) as connection:
        for sql in (
            "DELETE FROM main.rows",
            "INSERT INTO main.rows VALUES(9, 9, 9)",
            "UPDATE main.rows SET a = 2",
            "DROP TABLE main.rows",
            "CREATE TABLE x(a)",
            "CREATE TEMP TABLE x(a)",
            "ATTACH ':memory:' AS other",
            "PRAGMA writable_schema = 1",
            "PRAGMA user_version",
            "VACUUM",
            "BEGIN",
            "SELECT load_extension('x')",
            "SELECT randomblob(10)",
            "SELECT zeroblob(1000000000)",
            "SELECT * FROM pragma_database_list",
            "INSERT INTO fts(fts) VALUES('rebuild')",
            "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n",
        ):
            with pytest.raises(sqlite3.DatabaseError):
                connection.sqlite.execute(sql).fetchall()
    assert segment.rows()[0]["a"] == 1
    segment.close()


@pytest.mark.parametrize("pattern", ["(a|aa)+$", "(?:a?){40}a{40}b", "(a(?R)?b)"])
def test_a_pathological_pattern_ends_soon_and_leaves_the_database_usable(pattern: str) -> None:
    segment = opened([{"a": "a" * 5000 + "c"}, {"a": "ab"}])
    start = time.monotonic()
    with contextlib.suppress(InvalidRequest):
        segment.select(condition.parse("a REGEXP ?", [pattern], segment.columns))
    assert time.monotonic() - start < 5
    assert segment.select(condition.parse("a REGEXP ?", ["^ab"], segment.columns)).tolist() == [1]
    segment.close()


def test_a_pattern_that_backtracks_forever_is_an_invalid_condition() -> None:
    segment = opened([{"a": "a" * 60 + "b"}])
    with pytest.raises(InvalidRequest, match="too long on one value"):
        segment.select(condition.parse("a REGEXP ?", ["(a|aa)+$"], segment.columns))
    segment.close()


def test_a_condition_that_takes_too_long_is_unavailable_with_code_timeout() -> None:
    segment = opened([{"a": f"some words {number}"} for number in range(5000)])
    slow = condition.parse(" OR ".join(["a LIKE ?"] * 200), ["%x%y%z%"] * 200, segment.columns)
    with pytest.raises(Unavailable) as caught:
        segment.select(slow, timeout_s=0.01)
    assert caught.value.code == "timeout"
    assert segment.select(condition.parse("a LIKE ?", ["% 17"], segment.columns)).tolist() == [17]
    segment.close()


@pytest.mark.parametrize("from_file", [False, True])
def test_threads_can_ask_one_database(tmp_path: Path, from_file: bool) -> None:
    columns, stored, texts = schema.extend((), [{"a": number % 7} for number in range(2000)])
    data = build(stored, columns, np.arange(2000), texts=texts)
    (tmp_path / "x").write_bytes(data)
    segment = Database(tmp_path / "x" if from_file else data, columns, patches={3: {"a": 99}})
    wrong = []

    def ask(value: int) -> None:
        expected = [number for number in range(2000) if number % 7 == value and number != 3]
        for _ in range(10):
            if segment.select(condition.parse("a = ?", [value], columns), timeout_s=60).tolist() != expected:
                wrong.append(value)

    threads = [threading.Thread(target=ask, args=(value,)) for value in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    segment.close()


def test_a_database_that_is_dropped_without_closing_frees_its_memory() -> None:
    segment = opened([{"a": 1}], patches={0: {"a": 2}})
    with segment.asking(5) as connection:
        guard = weakref.ref(connection._guard)
    del segment, connection
    gc.collect()
    assert guard() is None


def test_a_database_that_is_dropped_in_a_cycle_is_closed_whatever_the_collector_finds_first() -> None:
    """Python 3.13 warns of a sqlite3 connection that it finds open, and finds them in the order in which it has last seen them alive."""
    segment = opened([{"a": 1}])
    with segment.asking(5) as connection:
        cursor = connection.execute("SELECT 1")
    cycle: list[object] = [segment]
    cycle.append(cycle)
    del segment, connection
    gc.collect()
    del cursor, cycle
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.collect()
    assert [str(one.message) for one in caught] == []


def test_odd_but_lawful_values_survive() -> None:
    rows = [{"a": "nul\0inside"}, {"a": "x" * 3_000_000}, {"a": "\U0001f600 \ufffd \uffff"}, {"a": "'; DROP TABLE rows; --"}]
    segment = opened(rows)
    assert [row["a"] for row in segment.rows()] == [row["a"] for row in rows]
    for number, row in enumerate(rows):
        assert segment.select(condition.parse("a = ?", [row["a"]], segment.columns)).tolist() == [number]
    segment.close()


conditions = st.sampled_from(
    [
        ("a = ?", 1),
        ("a < ?", 1),
        ("NOT (a = ? OR b IS NULL)", 1),
        ("b IN (?, ?) AND a IS NOT NULL", 2),
        ("c NOT BETWEEN ? AND ?", 2),
        ("_subset_ >= ? AND (c LIKE ? OR a > ?)", 3),
        ("c REGEXP ? OR _subset_ IN (?, ?)", 3),
        ("d != ?", 1),
        ("d IS NULL", 0),
        ("1=1", 0),
    ]
)
flat_values = st.sampled_from([None, 0, 1, 2, 5, "1", "2.0", "x", 2.5, True, "", "3", 12, 1 << 40])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from("abc"), flat_values, max_size=3), min_size=2, max_size=12),
    asked=conditions,
    data=st.data(),
)
def test_a_condition_selects_the_same_documents_however_they_are_cut_into_segments(
    rows: list[dict[str, Any]], asked: tuple[str, int], data: st.DataObject
) -> None:
    kinds = st.sampled_from(["INTEGER", "REAL", "TEXT", "BLOB"])
    columns, stored, texts = schema.extend((*((name, data.draw(kinds)) for name in "abc"), ("d", "REAL")), rows)
    parsed = condition.parse(asked[0], [data.draw(flat_values) for _ in range(asked[1])], columns)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) - 1), max_size=3)))
    answers = []
    for edges in ([0, len(rows)], [0, *cuts, len(rows)]):
        found: list[int] = []
        for start, stop in pairwise(edges):
            ids = np.arange(stop - start)
            segment = Database(build(stored[start:stop], columns, ids, texts=texts[start:stop]), columns, base=start)
            found += [row["_subset_"] for row in segment.rows(segment.select(parsed))]  # type: ignore[misc]
            segment.close()
        answers.append(found)
    assert answers[0] == answers[1]
