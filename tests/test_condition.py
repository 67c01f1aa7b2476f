"""The filter language: what parses, what is refused, and that nothing a user writes becomes SQL."""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from engine.metadata import condition, schema
from engine.metadata.database import Database
from engine.metadata.database_file import build

ROWS: list[dict[str, Any]] = [
    {"title": "Alpha", "year": 2019, "score": 0.5, "open": True, "order": "a", "tags": ["x", "y"]},
    {"title": "beta", "year": 2020, "score": 3, "open": False, "order": "b", "tags": {"k": 1}},
    {"title": "alphabet", "year": None, "score": None, "open": None, "order": None, "tags": None},
    {"title": "5", "year": 2021, "score": -1.25, "open": True, "order": "c", "tags": []},
]
COLUMNS, STORED, TEXTS = schema.extend((), ROWS)
BASE = 10


@pytest.fixture(scope="module")
def database() -> Any:
    opened = Database(build(STORED, COLUMNS, np.arange(len(ROWS)), texts=TEXTS), COLUMNS, base=BASE)
    yield opened
    opened.close()


def select(database: Database, text: str, *parameters: object) -> list[int]:
    found: list[int] = database.select(condition.parse(text, parameters, COLUMNS)).tolist()
    return found


@pytest.mark.parametrize(
    ("text", "parameters", "expected"),
    [
        ("1=1", (), [0, 1, 2, 3]),
        (" 0 = 1\n", (), []),
        ("007=7", (), [0, 1, 2, 3]),
        ("year = ?", (2020,), [1]),
        ("YEAR=?", ("2020",), [1]),
        ('"year" <> ?', (2020,), [0, 3]),
        ("year != ?", (None,), []),
        ("year IS NULL", (), [2]),
        ("year is not null", (), [0, 1, 3]),
        ("NOT year IS NULL", (), [0, 1, 3]),
        ("NOT year = ?", (2020,), [0, 3]),
        ("year BETWEEN ? AND ?", (2019, 2020), [0, 1]),
        ("year NOT BETWEEN ? AND ? AND title LIKE ?", (2019, 2020, "%"), [3]),
        ("year IN (?, ?)", (2019, 2021), [0, 3]),
        ("year NOT IN (?)", (2019,), [1, 3]),
        ("year NOT IN (?, ?)", (2019, None), []),
        ("title LIKE ?", ("ALPHA%",), [0, 2]),
        ("title NOT LIKE ?", ("alpha%",), [1, 3]),
        ("title = ?", ("alpha",), []),
        ("title = ?", (5,), [3]),
        ("title REGEXP ?", ("^[Aa]lpha$",), [0]),
        ("title NOT REGEXP ?", ("lpha",), [1, 3]),
        ("year NOT REGEXP ?", ("19",), [1, 3]),
        ("year REGEXP ?", ("^20[12]0",), [1]),
        ("year REGEXP ?", (None,), []),
        ("open = ?", (True,), [0, 3]),
        ("tags = ?", (["x", "y"],), [0]),
        ("tags = ?", ({"k": 1},), [1]),
        ("tags LIKE ?", ('%"x"%',), [0]),
        ('"order" >= ?', ("b",), [1, 3]),
        ("score = ?", (3,), [1]),
        ("year > ?", ("text",), []),
        ("year < ?", ("text",), [0, 1, 3]),
        ("_subset_ = ?", (12,), [2]),
        ("_subset_ = ?", ("12",), [2]),
        ("_SUBSET_ IN (?, ?)", (10, "13"), [0, 3]),
        ("_subset_ IS NULL", (), []),
        ("title = ? OR title = ? AND year = ?", ("beta", "Alpha", 1), [1]),
        ("(title = ? OR title = ?) AND year = ?", ("beta", "Alpha", 2019), [0]),
        ("NOT (year = ? OR open = ?)", (2020, True), []),
        ("NOT (year = ? AND open = ?)", (2020, True), [0, 1, 3]),
        ("((((year = ?))))", (2020,), [1]),
        ("year=?AND(title=?)", (2020, "beta"), [1]),
    ],
)
def test_a_condition_selects_what_sqlite_would(database: Database, text: str, parameters: tuple[object, ...], expected: list[int]) -> None:
    assert select(database, text, *parameters) == expected


NASTY = [
    "",
    "   ",
    "1",
    "1=1=1",
    "(1=1)",
    "1=1 OR 1=1",
    "year = 2020",
    "year = '2020'",
    "2020 = year",
    "? = year",
    "year = ?1",
    "year = :year",
    "year = @year",
    "year = $year",
    "year == ?",
    "year = ? OR",
    "OR year = ?",
    "NOT NOT year = ?",
    "NOT",
    "NOT ()",
    "()",
    "year",
    "year IS",
    "year IS ?",
    "year IS NOT ?",
    "year IN ()",
    "year IN ?",
    "year IN (?,)",
    "year IN (SELECT ?)",
    "year IN (1, ?)",
    "year BETWEEN ? OR ?",
    "year NOT = ?",
    "year LIKE ? ESCAPE ?",
    "year GLOB ?",
    "year MATCH ?",
    "year COLLATE NOCASE = ?",
    "year = ? ORDER BY year",
    "year = ? LIMIT 1",
    "year = year",
    "year + 1 = ?",
    "year || ? = ?",
    "lower(title) = ?",
    "load_extension(?)",
    "title -> ? = ?",
    "main.rows.year = ?",
    "rows.year = ?",
    '"#ordinal" = ?',
    '"#id" = ?',
    "rowid = ?",
    "oid = ?",
    "_content_id_ = ?",
    "nope = ?",
    '"nope" = ?',
    '"year = ?',
    '"year"" = ?',
    '"year"" OR 1=1 OR ""year" = ?',
    "[year] = ?",
    "`year` = ?",
    "year = ? -- comment",
    "year = ? /* comment",
    "year = ? */",
    "year = ?; DROP TABLE rows",
    "year = ?;",
    "year = ? UNION SELECT 1",
    "year = ? and exists(select 1)",
    '"update" = ?',
    "order = ?",
    "year = ? \0",
    "year\u00a0= ?",
    "ye\u0430r = ?",
    "\uff49\uff44 = ?",
    "year = \ud800",
    "x" * 300 + " = ?",
    "9" * 5000 + " = ?",
    "PRAGMA user_version",
    "ATTACH ? AS x",
    "CASE WHEN year = ? THEN 1 END",
    "\\",
    "year = ?)",
    "(year = ?",
    "%s = ?",
    "{year} = ?",
]


@pytest.mark.parametrize("text", NASTY)
def test_what_is_not_in_the_grammar_is_an_invalid_condition(text: str) -> None:
    for n_parameters in range(3):
        with pytest.raises(InvalidRequest) as caught:
            condition.parse(text, [1] * n_parameters, COLUMNS)
        assert caught.value.code == "invalid-condition"
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "parameters", "message"),
    [
        ("year -- = ?", (1,), "comments"),
        ("year = ?;", (1,), "semicolons"),
        ("drop = ?", (1,), "keyword"),
        ("year # ?", (1,), "unexpected character"),
        ("year ?", (1,), "expected an operator, found ?"),
        ("year =", (), "expected ?, found end of condition"),
        ("nope = ?", (1,), "unknown column"),
        ('"year', (), "unterminated quote"),
        ("year = ?", (), "number of parameters"),
        ("1=1", (1,), "number of parameters"),
        ("title REGEXP ?", ("(",), "regular expression"),
        ("title REGEXP ?", ("((a{1000}){1000}){1000}",), "repeats too often"),
        ("title REGEXP ?", ("(" * 480 + ")" * 480,), "regular expression"),
        ("title REGEXP ?", ("a" * 2000,), "too long"),
        ("title LIKE ?", ("a" * 2000,), "too long"),
        ("year = ?", (float("nan"),), "finite"),
        ("year = ?", (b"bytes",), "parameter 0"),
        ("year = ?", ("\ud800",), "surrogate"),
    ],
)
def test_each_refusal_says_why(text: str, parameters: tuple[object, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match="(?i)" + message.replace("?", r"\?")) as caught:
        condition.parse(text, parameters, COLUMNS)
    assert caught.value.code == "invalid-condition"


def test_a_condition_that_is_no_string_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="string"):
        condition.parse(None, [], COLUMNS)  # type: ignore[arg-type]


def parsed_or_none(text: str, n_parameters: int) -> condition.Condition | None:
    """None if it is an invalid condition; any other error is raised."""
    code = ""
    try:
        return condition.parse(text, [1] * n_parameters, COLUMNS)
    except InvalidRequest as error:
        code = error.code
    assert code == "invalid-condition"
    return None


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(
        st.sampled_from([*"()?,='\";-*", "year", "title", '"order"', "AND", "OR", "NOT", "IN", "IS", "NULL", "LIKE", "1"]), max_size=9
    )
)
def test_any_text_parses_or_is_an_invalid_condition_and_its_sql_holds_only_known_words(text: list[str]) -> None:
    parsed = parsed_or_none(" ".join(text), text.count("?"))
    if parsed is None:
        return
    sql = condition.render(parsed, {name for name, _ in COLUMNS}, "1").sql
    assert "'" not in sql
    assert ";" not in sql
    assert "--" not in sql
    with sqlite3.connect(":memory:") as connection:
        connection.execute('CREATE TABLE rows(title TEXT, year INTEGER, "order" TEXT)')
        connection.execute(f"SELECT 1 FROM rows WHERE {sql}", [1] * sql.count("?"))
    connection.close()


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_unicode_is_refused_politely(text: str) -> None:
    assert parsed_or_none(text, 0) is None or "=" in text or "null" in text.lower()


def test_deep_parentheses_are_refused_and_do_not_exhaust_the_stack() -> None:
    for depth in (condition.MAX_PARENTHESES + 1, 100_000):
        with pytest.raises(InvalidRequest, match="nested too deeply"):
            condition.parse("(" * depth + "year = ?" + ")" * depth, [1], COLUMNS)


def deep(depth: int, right: bool) -> str:
    text = "year = ?"
    for level in range(depth):
        operator = "AND NOT" if level % 2 else "OR"
        text = f"title = ? {operator} ({text})" if right else f"({text}) {operator.removesuffix(' NOT')} title = ?"
    return text


def bushy(depth: int) -> str:
    if depth == 0:
        return "year = ?"
    return f"({bushy(depth - 1)} {'AND' if depth % 2 else 'OR'} {bushy(depth - 1)})"


@pytest.mark.parametrize("text", [deep(condition.MAX_DEPTH - 1, True), deep(condition.MAX_DEPTH - 1, False), bushy(10)])
def test_the_deepest_allowed_conditions_fit_the_parser_of_sqlite(database: Database, text: str) -> None:
    assert isinstance(select(database, text, *[1] * text.count("?")), list)


def test_a_deep_and_bushy_condition_fits_the_parser_of_sqlite(database: Database) -> None:
    text = bushy(8)
    for level in range(36):
        text = f"({text}) {'AND' if level % 2 else 'OR'} {bushy(4)}"
    assert isinstance(select(database, text, *[1] * text.count("?")), list)


def test_thousands_of_comparisons_in_a_row_work(database: Database) -> None:
    for operator, expected in (("OR", [1]), ("AND", [])):
        text = f" {operator} ".join(["year = ?"] * condition.MAX_TERMS)
        assert select(database, text, *range(2020, 2020 - condition.MAX_TERMS, -1)) == ([0, 1] if expected else [])
    with pytest.raises(InvalidRequest, match="too many comparisons"):
        condition.parse(text + " AND year = ?", [1] * (condition.MAX_TERMS + 1), COLUMNS)


def test_a_long_in_list_works_and_a_million_elements_are_refused_quickly(database: Database) -> None:
    years = list(range(2020, 2020 + condition.MAX_PARAMETERS))
    assert select(database, f"year IN ({','.join('?' * len(years))})", *years) == [1, 3]
    assert select(database, f"year NOT IN ({','.join('?' * 5000)})", *years[:5000]) == [0]
    assert select(database, "year IN (?)", 2020) == [1]
    lists = " OR ".join([f"year IN ({','.join('?' * 50)})"] * 200)
    assert select(database, lists, *[2020] * 10_000) == [1]
    start = time.monotonic()
    with pytest.raises(InvalidRequest):
        condition.parse(f"year IN ({','.join('?' * 1_000_000)})", range(1_000_000), COLUMNS)
    assert time.monotonic() - start < 5


def test_an_in_list_means_the_same_whether_it_is_bound_or_in_a_table(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    values = [2019, "2020", 2021.0, "Alpha", 5, "5", None, 0.5, "0.5", True, 12, "12"]
    for column in ("title", "year", "score", "tags", "_subset_"):
        for _ in range(10):
            chosen = rng.choices(values, k=3)
            text = f"{column} {rng.choice(['IN', 'NOT IN'])} (?, ?, ?)"
            monkeypatch.setattr(condition, "INLINE_ELEMENTS", 100)
            bound = select(database, text, *chosen)
            monkeypatch.setattr(condition, "INLINE_ELEMENTS", 0)
            assert select(database, text, *chosen) == bound, (text, chosen)


def reference(text: str, parameters: Sequence[Any]) -> list[int]:
    """The condition given to SQLite as it stands: one table, no tree, no rendering."""
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE rows(_subset_ INTEGER PRIMARY KEY, " + ", ".join(f'"{name}" {kind}' for name, kind in COLUMNS) + ")")
    for number, row in enumerate(STORED):
        connection.execute(f"INSERT INTO rows VALUES(?{', ?' * len(COLUMNS)})", [number + BASE, *[row.get(name) for name, _ in COLUMNS]])
    found = [number - BASE for (number,) in connection.execute(f"SELECT _subset_ FROM rows WHERE {text} ORDER BY 1", parameters)]
    connection.close()
    return found


leaves = st.tuples(
    st.sampled_from(["title", "year", "score", "open", '"order"', "tags", "_subset_"]),
    st.sampled_from(["= ?", "!= ?", "<> ?", "< ?", "<= ?", "> ?", ">= ?", "LIKE ?", "NOT LIKE ?", "IS NULL", "IS NOT NULL"])
    | st.sampled_from(["IN (?, ?)", "NOT IN (?, ?)", "BETWEEN ? AND ?", "NOT BETWEEN ? AND ?"]),
).map(" ".join)
texts = st.recursive(
    leaves,
    lambda inner: (
        st.tuples(inner, st.sampled_from(["AND", "OR"]), inner).map(" ".join)
        | inner.map(lambda text: f"({text})")
        | inner.map(lambda text: f"NOT ({text})")
    ),
    max_leaves=8,
)
VALUES = st.sampled_from(
    [None, 2019, 2020, "2020", 2020.5, 0, 1, 3, "3.0", -1.25, "Alpha", "alpha%", "5", 5, "a", "b", '["x","y"]', 11, "12", "%", 1 << 62]
)


@settings(max_examples=200, deadline=None)
@given(text=texts, data=st.data())
def test_random_conditions_agree_with_sqlite_reading_them_itself(database: Database, text: str, data: st.DataObject) -> None:
    parameters = [data.draw(VALUES) for _ in range(text.count("?"))]
    assert select(database, text, *parameters) == reference(text, parameters)
