"""Questions: filter conditions and keyword queries, asked of a small database. SQLite itself is the second opinion."""

from __future__ import annotations

import json
import sqlite3
from functools import cache
from typing import Any

import numpy as np

from engine.errors import InvalidRequest
from engine.metadata import bm25, condition, keyword_query, matching, schema
from engine.metadata.database import Database
from engine.metadata.database_file import build

from .mutation import mutated_json
from .target import Target, Wrong, asked, closed_later, is_equal

ROWS: list[dict[str, Any]] = [
    {"title": f"word{n % 5} of the {'red' if n % 2 else 'blue'} loom", "year": 1990 + n, "score": n / 4, "done": n % 3 == 0, "tags": [n, "a-b"]}
    for n in range(18)
] + [{"title": None, "year": None}, {"title": "O'Brien \"quoted\" (NEAR) AND é\u0301 日本語 2.5", "year": 2**40}]  # fmt: skip


@cache
def _file(tokenizer: str) -> tuple[schema.Columns, bytes]:
    columns, stored, texts = schema.extend((), ROWS)
    return columns, build(stored, columns, np.arange(len(ROWS)), tokenizer, texts)


@cache
def database(tokenizer: str = "unicode61") -> Database:
    columns, data = _file(tokenizer)
    found = Database(data, columns, base=100)
    closed_later(found.close)
    return found


@cache
def _plain(tokenizer: str) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.deserialize(_file(tokenizer)[1])
    closed_later(connection.close)
    return connection


# Conditions


def ask_condition(data: bytes) -> bool:
    """JSON {condition, parameters}. No row meets a condition and its negation; what neither selects is null."""
    try:
        asking = json.loads(data)
        text, parameters = asking["condition"], asking["parameters"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    if not isinstance(parameters, list):
        return False
    columns = database().columns
    accepted, parsed = asked(lambda: condition.parse(text, parameters, columns))
    if not accepted:
        return False
    accepted, rows = asked(lambda: database().select(parsed))
    if not accepted:
        return False
    if rows.size and (np.diff(rows) <= 0).any():
        raise Wrong("rows are not ascending")
    accepted, negated = asked(lambda: condition.parse(f"NOT ({text})", parameters, columns))
    if accepted:
        others = database().select(negated)
        if np.intersect1d(rows, others).size:
            raise Wrong("a row meets the condition and its negation")
        double = asked(lambda: condition.parse(f"NOT (NOT ({text}))", parameters, columns))
        if double[0]:
            is_equal(database().select(double[1]).tolist(), rows.tolist(), "the condition negated twice")
    return True


def _conditions() -> list[bytes]:
    asking: list[tuple[str, list[Any]]] = [
        ("1=1", []), ("year > ? AND title LIKE ?", [1995, "word%"]), ("NOT (done = ? OR score BETWEEN ? AND ?)", [1, 0.5, 2]),
        ("title IS NOT NULL AND year IN (?, ?, ?)", [1990, "1991", None]), ('"title" REGEXP ? OR tags LIKE ?', ["^word[0-3]", "%a-b%"]),
        ("_subset_ >= ? AND NOT title NOT REGEXP ?", [105, "(a|b)*c"]), ("((year <= ?) OR (score <> ?)) AND done != ?", [2000, 1.5, True]),
    ]  # fmt: skip
    return [json.dumps({"condition": text, "parameters": parameters}).encode() for text, parameters in asking]


_WORDS = b"AND |OR |NOT |( |) |? |IN (?) |BETWEEN ? AND ? |LIKE ? |REGEXP ? |IS NULL |IS NOT NULL |= ? |year |title |_subset_ |1=1 |; |-- |SELECT |\\\" |\\u0000".split(b"|")  # fmt: skip
CONDITION = Target("condition", "filter conditions and their parameters", ask_condition, _conditions, tuple(_WORDS), mutated_json)


# Keyword queries


def ask_keywords(data: bytes) -> bool:
    """The first byte chooses the tokenizer. If SQLite takes the query as it is, the rows are SQLite's."""
    if not data:
        return False
    tokenizer = ("unicode61", "trigram")[data[0] % 2]
    text = data[1:].decode("utf-8", "surrogateescape")
    accepted, query = asked(lambda: keyword_query.compile_query(text, tokenizer))
    if not accepted:
        return False
    accepted, matches = asked(lambda: matching.match(query, database(tokenizer)))
    if not accepted:
        return False
    ranking = bm25.combine(query, [matches])
    if not np.isfinite(ranking.scores).all() or (np.diff(ranking.scores) > 0).any():
        raise Wrong(f"scores {ranking.scores.tolist()}")
    if query.tree is not None:
        try:
            found = _plain(tokenizer).execute("SELECT rowid FROM fts WHERE fts MATCH ? ORDER BY rowid", (query.text,)).fetchall()
        except sqlite3.Error as error:
            raise Wrong("a query was taken that SQLite refuses") from error
        is_equal(sorted(matches.ordinals.tolist()), [row for (row,) in found], "rows of a keyword query")
    return True


def _keywords() -> list[bytes]:
    texts = (
        "red loom", '"of the" AND word1', "word* NOT blue", "NEAR(word1 loom, 4) OR red", "_fts_content_ : (red OR blue)", "^ word2 + of",
        "what's this? a-b", "((a OR b) AND (c OR word3))", "- {_fts_content_} : x", "日本語 é", "a NOT b NOT c NOT d",
    )  # fmt: skip
    return [bytes([n % 2]) + text.encode() for n, text in enumerate(texts)]


_OPERATORS = (
    b" AND ", b" OR ", b" NOT ", b"NEAR(", b")", b"(", b'"', b"*", b"^", b" + ", b":", b"{", b"}", b"_fts_content_", b"word1", b"red", b"\0", b",", b"-",
)  # fmt: skip
KEYWORDS = Target("keywords", "keyword queries (FTS5)", ask_keywords, _keywords, _OPERATORS)


def refused(text: str, parameters: list[Any]) -> str:
    """The message with which a condition is refused; for tests."""
    try:
        database().select(condition.parse(text, parameters, database().columns))
    except InvalidRequest as error:
        return str(error)
    raise AssertionError("it was taken")
