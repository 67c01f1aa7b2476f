"""The metadata database of one segment as bytes: its layout, and building it, once.

Layout (SQLite 3, page size 4096, application_id "TRTN", user_version 1):

    rows(#ordinal INTEGER PRIMARY KEY, #id INTEGER, one column for each name that has a value in the segment, with the index's type)
    texts(ordinal INTEGER PRIMARY KEY, text)    keyword text of the rows where it cannot be made of their columns (nested values)
    fts(_fts_content_)                          FTS5 without content: the keyword text of every row that has one, rowid = ordinal
    facts(...)                                  one row, named as Facts; lengths is int32 little-endian, booleans a JSON list

#id is the document's id minus the segment's base, so the bytes do not depend on where in the index the segment comes to lie. A # cannot
occur in a user's column. Two builds of the same rows by one release of SQLite give the same bytes.

Called by index/build.py; database.py opens what is built here, and makes its tables of changed rows by the same functions.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from engine.errors import CorruptData, InvalidRequest
from engine.metadata.schema import Columns, Row, Value, keyword_text, shown_as_booleans, with_booleans

FORMAT_VERSION = 1
APPLICATION_ID = int.from_bytes(b"TRTN", "big")
TOKENIZERS = ("unicode61", "trigram")
FTS_COLUMN = "_fts_content_"
"""NextPlaid's name for it: a query may say `_fts_content_ : word`."""

_Count = Annotated[int, msgspec.Meta(ge=0)]


class Facts(NamedTuple):
    """What a database says about itself.

    n_indexed, n_tokens  rows and tokens of the FTS5 table; rows without text are not in it
    lengths              tokens of each ordinal
    booleans             columns whose 1 and 0 were true and false: their keyword text says so
    """

    tokenizer: str
    n_documents: int
    n_indexed: int
    n_tokens: int
    lengths: bytes
    booleans: str


def build(
    rows: Sequence[Mapping[str, Value]],
    columns: Columns,
    stored_ids: np.ndarray,
    fts_tokenizer: str = "unicode61",
    texts: Sequence[str] | None = None,
) -> bytes:
    """The database of a segment.

    rows        stored rows by ordinal (schema.extend, or Database.rows of segments that are merged)
    columns     of the whole index; those without a value here take no space
    stored_ids  int64 (N,), document id minus the segment's base
    texts       keyword text by ordinal (schema.extend, or Database.texts); None: what the stored columns give
    returns     bytes of a SQLite database

    Raises InvalidRequest for an unknown tokenizer. Cost: about 60 microseconds a row of 40 words, most of it in FTS5.
    """
    if fts_tokenizer not in TOKENIZERS:
        raise InvalidRequest("fts_tokenizer is unicode61 or trigram", fts_tokenizer=repr(fts_tokenizer)[:140])
    if len(rows) != len(stored_ids) or (texts is not None and len(texts) != len(rows)):
        raise ValueError("rows, stored_ids and texts differ in length")
    ordered = [in_order(row, columns) for row in rows]
    given = [keyword_text(row) for row in ordered] if texts is None else list(texts)
    booleans, exceptions = _explained(ordered, given)
    used = {name for row in rows for name, value in row.items() if value is not None}
    own_columns = tuple(column for column in columns if column[0] in used)
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        connection.execute("PRAGMA page_size = 4096")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        connection.execute("BEGIN")
        create_rows(connection, "main.rows", own_columns)
        insert_rows(connection, "main.rows", own_columns, zip(range(len(rows)), stored_ids.tolist(), rows, strict=True))
        connection.execute("CREATE TABLE texts(ordinal INTEGER PRIMARY KEY, text TEXT)")
        connection.executemany("INSERT INTO texts VALUES(?, ?)", exceptions)
        lengths = create_fts(connection, "main", "fts", fts_tokenizer, enumerate(given), len(given))
        n_indexed = sum(map(bool, given))
        shown = msgspec.json.encode(sorted(booleans)).decode()
        facts = Facts(fts_tokenizer, len(rows), n_indexed, int(lengths.sum()), lengths.astype("<i4").tobytes(), shown)
        connection.execute(f"CREATE TABLE facts({', '.join(Facts._fields)})")
        connection.execute("INSERT INTO facts VALUES(?, ?, ?, ?, ?, ?)", facts)
        connection.execute("COMMIT")
        connection.execute("VACUUM")
        return connection.serialize()
    finally:
        connection.close()


def empty(stored_ids: np.ndarray, fts_tokenizer: str = "unicode61") -> bytes:
    """The database of a segment whose documents have no metadata: their rows exist and are all null."""
    return build([{}] * len(stored_ids), (), stored_ids, fts_tokenizer, [""] * len(stored_ids))


def checked_facts(row: tuple[object, ...] | None) -> Facts:
    """The row of facts; CorruptData unless each has its type and lengths are those of n_documents rows."""
    try:
        facts = msgspec.convert(row, tuple[str, _Count, _Count, _Count, bytes, str])
        shown = msgspec.json.decode(facts[5], type=list[str])
        lengths = np.frombuffer(facts[4], "<i4")
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CorruptData("the facts of a metadata database do not read", code="malformed", reason=str(error)[:140]) from error
    tokenizer, n_documents, n_indexed, n_tokens = facts[:4]
    is_whole = len(lengths) == n_documents and lengths.sum(dtype=np.int64) == n_tokens and lengths.min(initial=0) >= 0
    if tokenizer not in TOKENIZERS or not is_whole or n_indexed > n_documents or len(set(shown)) != len(shown):
        raise CorruptData("the facts of a metadata database contradict one another", code="malformed")
    return Facts(*facts)


def create_rows(connection: sqlite3.Connection, table: str, columns: Columns) -> None:
    """Column names are quoted and were checked when the column was made (schema.py)."""
    declared = "".join(f', "{name}" {kind}' for name, kind in columns)
    connection.execute(f'CREATE TABLE {table}("#ordinal" INTEGER PRIMARY KEY, "#id" INTEGER NOT NULL{declared})')


def insert_rows(connection: sqlite3.Connection, table: str, columns: Columns, rows: Iterable[tuple[int, int, Mapping[str, Value]]]) -> None:
    """Rows as (ordinal, stored id, values); a column that a row lacks is null."""
    names = [name for name, _ in columns]
    marks = ", ?" * len(names)
    values = ((ordinal, stored_id, *[row.get(name) for name in names]) for ordinal, stored_id, row in rows)
    connection.executemany(f"INSERT INTO {table} VALUES(?, ?{marks})", values)


def create_fts(
    connection: sqlite3.Connection, schema: str, table: str, tokenizer: str, texts: Iterable[tuple[int, str]], n_rows: int
) -> np.ndarray:
    """An FTS5 table over (ordinal, text), and the number of tokens of every ordinal below n_rows: int32 (n_rows,).

    It has no content (texts can be had from the columns) and is merged into one b-tree. Empty texts are left out. NUL is written as a
    blank: the trigram tokenizer would stop there.
    """
    name = f"{schema}.{table}"
    connection.execute(f"CREATE VIRTUAL TABLE {name} USING fts5({FTS_COLUMN}, content='', tokenize='{tokenizer}')")
    values = ((ordinal, text.replace("\0", " ")) for ordinal, text in texts if text)
    connection.executemany(f"INSERT INTO {name}(rowid, {FTS_COLUMN}) VALUES(?, ?)", values)
    connection.execute(f"INSERT INTO {name}({table}) VALUES('optimize')")
    lengths = np.zeros(n_rows, np.int32)
    for ordinal, size in connection.execute(f"SELECT id, sz FROM {schema}.{table}_docsize"):
        lengths[ordinal] = _varint(size)
    return lengths


def in_order(row: Mapping[str, Value], columns: Columns) -> Row:
    """A row without its nulls, in the order of the columns: keyword text depends on it."""
    return {name: row[name] for name, _ in columns if row.get(name) is not None}


def _explained(rows: Sequence[Row], texts: Sequence[str]) -> tuple[frozenset[str], list[tuple[int, str]]]:
    """Columns to be shown as booleans so that most rows give their texts, and (ordinal, text) of the rows that do not."""
    worded = [(ordinal, row, text) for ordinal, (row, text) in enumerate(zip(rows, texts, strict=True)) if row or text]
    shown = [(row, shown_as_booleans(row, text)) for _, row, text in worded]
    votes = Counter(name for _, names in shown if names for name in names)
    against = Counter(name for row, names in shown if names is not None for name in votes if name in row and name not in names)
    booleans = frozenset(name for name, n_votes in votes.items() if n_votes > against[name])
    return booleans, [(ordinal, text) for ordinal, row, text in worded if keyword_text(with_booleans(row, booleans)) != text]


def _varint(data: bytes) -> int:
    """The first SQLite varint of `data`: seven bits a byte, high bits first (fts5 keeps one for each column)."""
    value = 0
    for byte in data:
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            break
    return value
