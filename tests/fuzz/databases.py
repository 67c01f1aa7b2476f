"""Metadata databases: the SQLite file of a segment, damaged and hostile. SQLite has no checksums of its own; the manifest has."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from functools import cache
from random import Random

import numpy as np

from engine.errors import CorruptData, InvalidRequest, Unavailable, UnsupportedFormat
from engine.metadata import condition, keyword_query, matching, schema
from engine.metadata.database import Database
from engine.metadata.database_file import build

from .mutation import mutated
from .target import Target, Wrong

ROWS = [{"title": f"word{n} of the loom", "year": 1990 + n, "nested": [n], "flag": n % 2 == 0} for n in range(6)]
TIMEOUT_S = 1.0


@cache
def sound() -> tuple[schema.Columns, bytes]:
    columns, stored, texts = schema.extend((), ROWS)
    return columns, build(stored, columns, np.arange(len(ROWS)), texts=texts)


def altered(*statements: str) -> bytes:
    """The sound file after SQL that its writer would never run."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.deserialize(sound()[1])
    connection.execute("PRAGMA writable_schema = ON")
    for statement in statements:
        connection.execute(statement)
    data = connection.serialize()
    connection.close()
    return data


def open_and_ask(data: bytes) -> bool:
    """Open it and ask everything that a search asks. Any answer will do that comes in time; no error but damage."""
    columns = sound()[0]
    try:
        with_closing = Database(data, columns, 7, {1: {"year": 3}})
    except (CorruptData, UnsupportedFormat):
        return False
    try:
        return _ask(with_closing, columns)
    finally:
        with_closing.close()


def _ask(database: Database, columns: schema.Columns) -> bool:
    sound_answers = True
    n_rows = min(database.n_documents, 1000)
    questions: tuple[Callable[[], object], ...] = (
        lambda: database.select(condition.parse("year > ? OR title LIKE ?", [1, "w%"], columns), TIMEOUT_S),
        lambda: database.rows(None, TIMEOUT_S),
        lambda: database.rows(np.arange(min(2, n_rows)), TIMEOUT_S),
        lambda: database.texts(None, TIMEOUT_S),
        lambda: matching.match(keyword_query.compile_query("word1 OR loom*", database.tokenizer), database, timeout_s=TIMEOUT_S),
        lambda: matching.match(keyword_query.compile_query("NEAR(word1 loom)", database.tokenizer), database, timeout_s=TIMEOUT_S),
    )
    for ask in questions:
        try:
            ask()
        except (CorruptData, UnsupportedFormat, Unavailable):
            sound_answers = False
        except InvalidRequest as error:
            if error.message != "a value is too large for a condition":
                raise Wrong("a damaged file is blamed on the caller") from error
            sound_answers = False
    return sound_answers


_ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT"
HOSTILE: dict[str, tuple[str, ...]] = {
    "no facts": ("DELETE FROM facts",),
    "no table of facts": ("DROP TABLE facts",),
    "facts of text": ("UPDATE facts SET lengths = 'abc', n_documents = 'x', booleans = 7",),
    "lengths of odd bytes": ("UPDATE facts SET lengths = x'0102'",),
    "more documents than rows": ("UPDATE facts SET n_documents = 1 << 40",),
    "ids of text": ('UPDATE rows SET "#id" = \'x\'',),
    "ids of reals": ('UPDATE rows SET "#id" = 1e300',),
    "a row is gone": ('DELETE FROM rows WHERE "#ordinal" = 3',),
    "ordinals from afar": ('UPDATE rows SET "#ordinal" = "#ordinal" + 100',),
    "values of bytes": ("UPDATE rows SET title = x'ff00fe', year = zeroblob(1000)",),
    "text that is no UTF-8": ("UPDATE rows SET title = CAST(x'fffe80' AS TEXT)",),
    "rows are an endless view": ("DROP TABLE rows", f'CREATE VIEW rows AS {_ENDLESS} i AS "#ordinal", i AS "#id" FROM n'),
    "facts are an endless view": ("DROP TABLE facts", f"CREATE VIEW facts AS {_ENDLESS} 'unicode61' AS tokenizer, max(i) AS n_documents FROM n"),
    "texts are an endless view": ("DROP TABLE texts", f"CREATE VIEW texts AS {_ENDLESS} i AS ordinal, 'x' AS text FROM n"),
    "a column computes": ("DROP TABLE rows", 'CREATE TABLE rows("#ordinal" INTEGER PRIMARY KEY, "#id" INTEGER, title TEXT AS (hex(zeroblob(9000000))))',
                          'INSERT INTO rows("#ordinal", "#id") VALUES (0,0),(1,1),(2,2),(3,3),(4,4),(5,5)'),
    "keywords are a plain table": ("DROP TABLE fts", "CREATE TABLE fts(_fts_content_)"),
    "keywords lost their blocks": ("DELETE FROM fts_data",),
    "keywords of nonsense": ("UPDATE fts_data SET block = x'00ff00ff00ff'",),
    "sizes of nonsense": ("UPDATE fts_docsize SET sz = x'ffffffffffffffffff'",),
    "sizes in another column": ("UPDATE sqlite_master SET sql = replace(sql, 'sz BLOB', 'cz BLOB')",),
    "a keyword index spelt otherwise": ("UPDATE sqlite_master SET sql = replace(sql, 'fts_idx', 'fTs_idx') WHERE name = 'fts_idx'",),
    "another tokenizer": ("UPDATE facts SET tokenizer = 'porter'",),
    "an unknown column": ("ALTER TABLE rows ADD COLUMN strange TEXT",),
    "the wrong version": ("PRAGMA user_version = 2",),
    "somebody else's file": ("PRAGMA application_id = 1",),
}  # fmt: skip
"""Files that SQLite finds in order, or nearly."""


def _seeds() -> list[bytes]:
    return [sound()[1], *(altered(*statements) for statements in HOSTILE.values())]


def _mutate(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """Half the changes hit the first two pages, where the schema stands."""
    if rng.random() < 0.5 or len(data) < 8192:
        return mutated(data, rng, others, tokens)
    head = mutated(data[:8192], rng, (), tokens)
    return (head + bytes(8192))[:8192] + data[8192:]


DATABASE = Target(
    "database",
    "metadata databases (SQLite files)",
    open_and_ask,
    _seeds,
    (b"rows", b"facts", b"CREATE VIEW", b"\0" * 8, b"INTEGER"),
    _mutate,
)
