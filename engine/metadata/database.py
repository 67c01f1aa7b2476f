"""The metadata database of one segment: built once as bytes, opened read-only, asked which rows a condition selects.

Layout (SQLite 3, page size 4096, application_id "TRTN", user_version 1):

    rows(#ordinal INTEGER PRIMARY KEY, #id INTEGER, one column for each name that has a value in the segment, with the index's type)
    texts(ordinal INTEGER PRIMARY KEY, text)    keyword text of the rows where it cannot be made of their columns (nested values)
    fts(_fts_content_)                          FTS5 without content: the keyword text of every row that has one, rowid = ordinal
    facts(...)                                  one row, named as Facts; lengths is int32 little-endian, booleans a JSON list

#id is the document's id minus the segment's base, so the bytes do not depend on where in the index the segment comes to lie. A # cannot
occur in a user's column. Two builds of the same rows by one release of SQLite give the same bytes.

Changed metadata (patches) never touch these tables. When a database is opened, changed rows are put into temp.patched and their keyword
text into temp.patched_fts; every question is asked of both, leaving changed rows out of the first. So a file is opened without a copy.

A connection can read our tables and call our functions, nothing else (authorizer). Time is limited by a progress handler and, inside
regular expressions, by their own timeout. Memory is limited by limiting what goes in: SQLite's heap limit counts for the whole process,
so one request that reaches it would fail its neighbours.

Called by index.reader, index.writer and searcher, in worker threads. Does no I/O but reading the file it is given.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import regex

from engine.errors import CorruptData, EngineError, InvalidRequest, Unavailable, UnsupportedFormat
from engine.metadata.condition import Condition, compile_pattern, pattern_text, render
from engine.metadata.schema import (
    Columns,
    Row,
    Value,
    complete,
    keyword_text,
    shown_as_booleans,
    with_booleans,
)

FORMAT_VERSION = 1
APPLICATION_ID = int.from_bytes(b"TRTN", "big")
TOKENIZERS = ("unicode61", "trigram")
FTS_COLUMN = "_fts_content_"
"""NextPlaid's name for it: a query may say `_fts_content_ : word`."""

TIMEOUT_S = 5.0
"""Of one question to one database. Chosen: a scan of 65,536 rows takes well under a second."""
REGEXP_TIMEOUT_S = 0.2
"""Of one pattern on one row; a sane pattern needs microseconds."""
N_CONNECTIONS = 4
"""Threads that may ask one database at the same time; opened from bytes it is one, because each connection would copy the bytes."""

_MAGIC = b"SQLite format 3\0"
_PROGRESS_STEPS = 2000
_MAX_VALUE_BYTES = 256 << 20
_FUNCTIONS = frozenset(("like", "regexp", "bm25", "match", "json_group_array", "json_each"))
_TABLES = frozenset(("rows", "texts", "facts", "fts", "patched", "patched_fts", "lists", "instances", "patched_instances", "json_each"))
_VIRTUAL_TABLES = """
    SELECT 'main.' || name FROM main.sqlite_master WHERE sql LIKE 'CREATE VIRTUAL%' AND name = 'fts'
    UNION ALL SELECT 'temp.' || name FROM temp.sqlite_master WHERE sql LIKE 'CREATE VIRTUAL%'"""
_SHADOWS = tuple(f"{table}_{part}" for table in ("fts", "patched_fts") for part in ("data", "idx", "content", "docsize", "config"))

_Count = Annotated[int, msgspec.Meta(ge=0)]

Patches = Mapping[int, Mapping[str, Value]]
"""Ordinal to changed values. An ordinal that is there was touched, even if no value differs: its keyword text is made anew."""


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
    ordered = [_in_order(row, columns) for row in rows]
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
        _create_rows(connection, "main.rows", own_columns)
        _insert_rows(connection, "main.rows", own_columns, zip(range(len(rows)), stored_ids.tolist(), rows, strict=True))
        connection.execute("CREATE TABLE texts(ordinal INTEGER PRIMARY KEY, text TEXT)")
        connection.executemany("INSERT INTO texts VALUES(?, ?)", exceptions)
        lengths = _create_fts(connection, "main", "fts", fts_tokenizer, enumerate(given), len(given))
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


def merge_patches(patches: Sequence[Patches]) -> dict[int, Row]:
    """Several patches as one; a later value replaces an earlier one."""
    merged: dict[int, Row] = {}
    for patch in patches:
        for ordinal, values in patch.items():
            merged.setdefault(int(ordinal), {}).update(values)
    return merged


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


class Database:
    """One segment's metadata, open for questions from any thread. Nothing it does changes what it answers later; close it when done.

    n_documents  rows, deleted ones included: tombstones are the caller's
    tokenizer    of the keyword index
    """

    def __init__(self, source: bytes | str | os.PathLike[str], columns: Columns, base: int = 0, patches: Patches | None = None) -> None:
        """Open a database.

        source   the bytes, or the path of a file that will not change while it is open; the caller has compared them with the manifest's
                 checksum, because SQLite has none and a flipped bit can be a lawful value
        columns  of the whole index
        base     added to every stored id
        patches  changed values of this segment's rows (see merge_patches)

        Raises CorruptData if the bytes are no such database or have a column with another type than the index; UnsupportedFormat.
        """
        self.columns = columns
        self.base = int(base)
        self._patches = patches or {}
        self._source = source
        self._n_connections = 1 if isinstance(source, bytes) else N_CONNECTIONS
        self._slots = threading.BoundedSemaphore(self._n_connections)
        self._idle: list[_Connection] = []
        self._closed = False
        self._patched_rows: list[tuple[int, int, Row]] = []
        self._patched_lengths = np.zeros(0, np.int32)
        self.n_patched_indexed = 0
        first = _Connection(source)
        try:
            self._read_facts(first)
            self._add_patches(first, first_time=True)
        except BaseException:
            first.close()
            raise
        first.seal()
        self._idle.append(first)

    def select(self, condition: Condition, timeout_s: float = TIMEOUT_S) -> np.ndarray:
        """Ordinals of the rows for which the condition is true: int64 (n,), ascending.

        Raises Unavailable (timeout), InvalidRequest if a pattern takes too long on one row. Cost: one scan.
        """
        subset_sql = f'CAST({self.base} + "#id" AS INTEGER)'
        fragment = render(condition, self._present, subset_sql)
        unchanged = ' AND "#ordinal" NOT IN (SELECT "#ordinal" FROM temp.patched)' if self._patches else ""
        with self.asking(timeout_s) as connection:
            connection.set_lists(fragment.lists)
            sql = f'SELECT json_group_array("#ordinal") FROM main.rows WHERE {fragment.sql}{unchanged}'
            found = connection.array(sql, fragment.parameters, np.int64)
            if self._patches:
                fragment = render(condition, {name for name, _ in self.columns}, subset_sql)
                connection.set_lists(fragment.lists)
                sql = f'SELECT json_group_array("#ordinal") FROM temp.patched WHERE {fragment.sql}'
                found = np.concatenate([found, connection.array(sql, fragment.parameters, np.int64)])
        found.sort()
        return found

    def rows(self, ordinals: np.ndarray | None = None, timeout_s: float = TIMEOUT_S) -> list[Row]:
        """Rows as an answer shows them (schema.complete), in the order asked for; None means all of them.

        Raises IndexError for ordinals that are not there; Unavailable (timeout).
        """
        wanted = self._checked(ordinals)
        found: dict[int, Row] = {}
        unique = np.unique(wanted)
        with self.asking(timeout_s) as connection:
            for table, columns in (("main.rows", self._own_columns), ("temp.patched", self.columns)):
                if table == "main.rows" or self._patches:
                    found.update(self._fetch(connection, table, columns, unique))
        return [found[ordinal].copy() for ordinal in wanted.tolist()]

    def texts(self, ordinals: np.ndarray | None = None, timeout_s: float = TIMEOUT_S) -> list[str]:
        """Keyword texts, in the order asked for: what `build` needs to index these rows again with the same words."""
        wanted = self._checked(ordinals)
        with self.asking(timeout_s) as connection:
            kept = dict(connection.execute("SELECT ordinal, text FROM main.texts").fetchall())
        texts = []
        for ordinal, row in zip(wanted.tolist(), self.rows(wanted, timeout_s), strict=True):
            text = None if ordinal in self._patches else kept.get(ordinal)
            if text is None:
                mine = _in_order(row, self.columns)
                text = keyword_text(mine if ordinal in self._patches else with_booleans(mine, self._booleans))
            texts.append(text)
        return texts

    def close(self) -> None:
        """Close what is idle; connections in use close when their question is answered."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def asking(self, timeout_s: float) -> Iterator[_Connection]:
        """A connection for one thread and one deadline (also for keyword.py)."""
        deadline = time.monotonic() + timeout_s
        if not self._slots.acquire(timeout=max(0.0, timeout_s)):
            raise Unavailable("waited too long for the metadata database", code="timeout", timeout_s=timeout_s)
        try:
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._another()
            try:
                with connection.limited(deadline, timeout_s):
                    yield connection
            finally:
                self._idle.append(connection)
                if self._closed:
                    self.close()
        finally:
            self._slots.release()

    @property
    def patched_ordinals(self) -> np.ndarray:
        """int64, ascending: rows that stand in the patched tables."""
        return np.array([ordinal for ordinal, _, _ in self._patched_rows], np.int64)

    @property
    def patched_lengths(self) -> np.ndarray:
        """int32: FTS5 tokens of the patched ordinals."""
        return self._patched_lengths

    def _another(self) -> _Connection:
        if self._closed:
            raise ValueError("the metadata database is closed")
        connection = _Connection(self._source)
        self._add_patches(connection, first_time=False)
        connection.seal()
        return connection

    def _checked(self, ordinals: np.ndarray | None) -> np.ndarray:
        if ordinals is None:
            return np.arange(self.n_documents)
        wanted = np.asarray(ordinals, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.n_documents):
            raise IndexError("no such ordinal in the metadata database")
        return wanted

    def _fetch(self, connection: _Connection, table: str, columns: Columns, ordinals: np.ndarray) -> dict[int, Row]:
        where, parameters = "", []
        if len(ordinals) < self.n_documents:
            where = ' WHERE "#ordinal" IN (SELECT value FROM json_each(?))'
            parameters = [_json(ordinals)]
        names = "".join(f', "{name}"' for name, _ in columns)
        nulls: Row = complete({}, self.columns, 0)
        found = {}
        for ordinal, stored_id, *values in connection.execute(f'SELECT "#ordinal", "#id"{names} FROM {table}{where}', parameters):
            row = nulls.copy()
            row["_subset_"] = self.base + stored_id
            row.update(zip((name for name, _ in columns), values, strict=True))
            found[ordinal] = row
        return found

    def _read_facts(self, connection: _Connection) -> None:
        """Take in the one row of facts, the stored ids and the columns; raises CorruptData if they do not fit together."""
        with connection.translated():
            application, version = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        if application != APPLICATION_ID:
            raise CorruptData("this is no metadata database", code="malformed")
        if version != FORMAT_VERSION:
            raise UnsupportedFormat("unknown format version of a metadata database", expected=FORMAT_VERSION, found=version)
        with connection.limited(time.monotonic() + TIMEOUT_S, TIMEOUT_S):
            declared = connection.check_tables()
            facts = _checked_facts(connection.execute(f"SELECT {', '.join(Facts._fields)} FROM main.facts").fetchone())
            ordinals = connection.execute('SELECT count(*), min("#ordinal"), max("#ordinal") FROM main.rows').fetchone()
            self.stored_ids = connection.array('SELECT json_group_array("#id") FROM main.rows', (), np.int64)
        self.tokenizer, self.n_documents, self.n_indexed, self.n_tokens = facts[:4]
        self.lengths = np.frombuffer(facts.lengths, "<i4")
        self._booleans = frozenset(msgspec.json.decode(facts.booleans, type=list[str]))
        types = dict(self.columns)
        own = [(name, kind) for name, kind in declared.items() if not name.startswith("#")]
        strange = [name for name, kind in own if types.get(name) != kind]
        if strange:
            raise CorruptData("a metadata column is not what the manifest says", code="malformed", column=strange[0])
        expected = (self.n_documents, 0, self.n_documents - 1) if self.n_documents else (0, None, None)
        if ordinals != expected or len(self.stored_ids) != self.n_documents:
            raise CorruptData("the facts of a metadata database contradict its rows", code="malformed")
        self._own_columns: Columns = tuple(own)
        self._present = {name for name, _ in own}

    def _add_patches(self, connection: _Connection, first_time: bool) -> None:
        """Put changed rows into temp tables; the first connection works out what they are."""
        connection.prepare_questions()
        if not self._patches:
            return
        with connection.limited(time.monotonic() + TIMEOUT_S, TIMEOUT_S):
            self._put_patches(connection, first_time)

    def _put_patches(self, connection: _Connection, first_time: bool) -> None:
        if first_time:
            self._patched_rows = self._changed_rows(connection)
        _create_rows(connection.sqlite, "temp.patched", self.columns)
        _insert_rows(connection.sqlite, "temp.patched", self.columns, self._patched_rows)
        texts = ((ordinal, keyword_text(_in_order(row, self.columns))) for ordinal, _, row in self._patched_rows)
        n_rows = self.n_documents
        lengths = _create_fts(connection.sqlite, "temp", "patched_fts", self.tokenizer, texts, n_rows)
        self._patched_lengths = lengths[self.patched_ordinals]
        self.n_patched_indexed = connection.execute("SELECT count(*) FROM temp.patched_fts_docsize").fetchone()[0]
        connection.sqlite.execute("CREATE VIRTUAL TABLE temp.patched_instances USING fts5vocab(temp, patched_fts, instance)")

    def _changed_rows(self, connection: _Connection) -> list[tuple[int, int, Row]]:
        """(ordinal, stored id, whole row) of every patched ordinal, ascending."""
        ordinals = self._checked(np.array(sorted(self._patches), np.int64))
        known = {name for name, _ in self.columns}
        before = self._fetch(connection, "main.rows", self._own_columns, ordinals)
        changed = []
        for ordinal in ordinals.tolist():
            patch = self._patches[ordinal]
            if not known.issuperset(patch):
                raise CorruptData("a patch names a column that the manifest lacks", code="malformed", column=sorted(set(patch) - known)[0])
            changed.append((ordinal, int(self.stored_ids[ordinal]), {**before[ordinal], **patch}))
        return changed


class _Connection:
    """A sqlite3 connection that can only read, with a deadline while it is asked something."""

    def __init__(self, source: bytes | str | os.PathLike[str]) -> None:
        if isinstance(source, bytes):
            if not source.startswith(_MAGIC):  # SQLite takes an empty input for an empty database, or for a lack of memory
                raise CorruptData("this is no metadata database", code="malformed")
            self.sqlite = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        else:
            path = urllib.parse.quote(os.fspath(source))
            self.sqlite = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True, check_same_thread=False, isolation_level=None)
        self._guard = _Guard()
        self._has_lists = False
        try:
            with self.translated():
                if isinstance(source, bytes):
                    self.sqlite.deserialize(source)
                self.sqlite.execute("SELECT count(*) FROM main.sqlite_master")
        except BaseException:
            self.sqlite.close()
            raise
        self.sqlite.set_progress_handler(self._guard.is_late, _PROGRESS_STEPS)
        self.sqlite.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
        self.sqlite.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        self.sqlite.create_function("regexp", 2, self._guard.regexp, deterministic=True)

    def execute(self, sql: str, parameters: Sequence[Value] = ()) -> sqlite3.Cursor:
        return self.sqlite.execute(sql, parameters)

    def array(self, sql: str, parameters: Sequence[Value], dtype: type[np.generic]) -> np.ndarray:
        """The one JSON array of numbers that `sql` selects; CorruptData if it holds anything else. Reading rows one by one costs twenty times
        as much as this detour through text."""
        values = np.array(msgspec.json.decode(self.sqlite.execute(sql, parameters).fetchone()[0]))
        if values.dtype.kind not in ("i" if dtype is np.int64 else "if") and values.size:
            raise CorruptData("numbers of a metadata database are none", code="malformed", found=str(values.dtype))
        return values.astype(dtype)

    def check_tables(self) -> dict[str, str]:
        """The columns of rows, name -> type. CorruptData unless our tables are plain tables, with plain columns: a view of one of their names
        can be endless, and a column that is computed can be as large as it likes."""
        kinds = dict(self.sqlite.execute("SELECT name, type FROM main.sqlite_master").fetchall())
        columns: dict[str, dict[str, str]] = {}
        for table, needed in (("rows", ("#ordinal", "#id")), ("texts", ("ordinal", "text")), ("facts", Facts._fields)):
            found = self.sqlite.execute(f"PRAGMA main.table_xinfo({table})").fetchall()
            columns[table] = {name: kind for _, name, kind, *_ in found}
            is_plain = kinds.get(table) == "table" and not any(hidden for *_, hidden in found)
            if not is_plain or tuple(columns[table])[: len(needed)] != needed:
                raise CorruptData("a table of a metadata database is not what it was made", code="malformed", table=table)
        keywords = self.sqlite.execute("SELECT sql FROM main.sqlite_master WHERE name = 'fts' AND type = 'table'").fetchone()
        if keywords is None or not str(keywords[0]).startswith("CREATE VIRTUAL TABLE fts USING fts5("):
            raise CorruptData("the keyword index of a metadata database is none", code="malformed")
        return columns["rows"]

    def prepare_questions(self) -> None:
        """Make the temp tables that questions use."""
        with self.translated():
            self.sqlite.execute("PRAGMA temp_store = MEMORY")
            self.sqlite.execute("CREATE TABLE temp.lists(list INTEGER, value)")
            self.sqlite.execute("CREATE INDEX temp.lists_by_number ON lists(list, value)")
            self.sqlite.execute("CREATE VIRTUAL TABLE temp.instances USING fts5vocab(main, fts, instance)")

    def seal(self) -> None:
        """From here on only reading is allowed. Virtual tables are touched first: connecting to one is more than reading."""
        with self.translated():
            for (table,) in self.sqlite.execute(_VIRTUAL_TABLES).fetchall():
                self.sqlite.execute(f"SELECT 1 FROM {table} LIMIT 0")
            self.sqlite.execute("SELECT value FROM json_each('[]')")
        self.sqlite.set_authorizer(self._guard.authorize)
        self._guard.sealed = True

    def set_lists(self, lists: Sequence[Sequence[Value]]) -> None:
        """Fill temp.lists: the one thing that is written after sealing, and by us."""
        if not lists and not self._has_lists:
            return
        self._has_lists = bool(lists)
        self._guard.sealed = False
        try:
            self.sqlite.execute("DELETE FROM temp.lists")
            numbered = [(number, value) for number, values in enumerate(lists) for value in values]
            self.sqlite.executemany("INSERT INTO temp.lists VALUES(?, ?)", numbered)
        finally:
            self._guard.sealed = True

    @contextmanager
    def limited(self, deadline: float, timeout_s: float) -> Iterator[None]:
        """Let what is asked in this block run until `deadline` (time.monotonic)."""
        self._guard.deadline = deadline
        self._guard.stopped_by = None
        try:
            with self.translated(timeout_s):
                yield
        finally:
            self._guard.deadline = None
            self._guard.patterns.clear()

    @contextmanager
    def translated(self, timeout_s: float = 0.0) -> Iterator[None]:
        """SQLite's errors as ours. What stays a sqlite3.Error is a mistake in this package."""
        try:
            yield
        except UnicodeDecodeError as error:  # sqlite3 says so of some texts, and of names in its own messages
            raise CorruptData("a metadata database holds text that is no UTF-8", code="malformed", reason=str(error)[:140]) from error
        except sqlite3.Error as error:
            if self._guard.stopped_by is not None:
                raise self._guard.stopped_by from error
            if str(error) == "interrupted":
                raise Unavailable("the metadata database took too long", code="timeout", timeout_s=timeout_s) from error
            if isinstance(error, sqlite3.DataError):
                raise InvalidRequest("a value is too large for a condition", code="invalid-condition") from error
            name = getattr(error, "sqlite_errorname", "")
            is_corrupt = name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_FORMAT")) or "Could not decode to UTF-8" in str(error)
            is_corrupt |= name == "SQLITE_ERROR" and not self._guard.sealed  # until then only what we always ask is asked
            if is_corrupt or "no such table: main." in str(error) or "vtable constructor failed" in str(error):
                raise CorruptData("a metadata database cannot be read", code="malformed", reason=str(error)[:140]) from error
            raise

    def close(self) -> None:
        self.sqlite.close()

    def __del__(self) -> None:
        """Caches let go of databases without closing them."""
        if hasattr(self, "sqlite"):
            self.sqlite.close()


class _Guard:
    """What SQLite calls back. It does not know its connection: the garbage collector does not see callbacks, a cycle would stay.

    deadline    time.monotonic, or None
    sealed      only reading is allowed
    stopped_by  the error that a function raised, because sqlite3 would replace it
    """

    def __init__(self) -> None:
        self.deadline: float | None = None
        self.sealed = False
        self.stopped_by: EngineError | None = None
        self.patterns: dict[str, regex.Pattern[str]] = {}

    def is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def authorize(self, action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
        if not self.sealed:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_SELECT:
            allowed = True
        elif action == sqlite3.SQLITE_READ:
            allowed = first in _TABLES or first in _SHADOWS or first in ("sqlite_master", "sqlite_temp_master", "sqlite_schema")
        elif action == sqlite3.SQLITE_FUNCTION:
            allowed = (second or "").lower() in _FUNCTIONS
        else:
            allowed = action == sqlite3.SQLITE_PRAGMA and first == "data_version"  # FTS5 asks whether its tables changed
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    def regexp(self, pattern: Value, text: str | None) -> int | None:
        """X REGEXP Y is regexp(Y, X). Null gives null, which is no match, negated or not."""
        if pattern is None or text is None:
            return None
        try:
            compiled = self.patterns.get(pattern_text(pattern))
            if compiled is None:
                compiled = self.patterns[pattern_text(pattern)] = compile_pattern(pattern_text(pattern))
            return int(compiled.search(text, timeout=REGEXP_TIMEOUT_S) is not None)
        except TimeoutError as error:
            message = "the pattern takes too long on one value"
            self.stopped_by = InvalidRequest(message, code="invalid-condition", timeout_s=REGEXP_TIMEOUT_S)
            raise self.stopped_by from error
        except EngineError as error:
            self.stopped_by = error
            raise


def _checked_facts(row: tuple[object, ...] | None) -> Facts:
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


def _create_rows(connection: sqlite3.Connection, table: str, columns: Columns) -> None:
    """Column names are quoted and were checked when the column was made (schema.py)."""
    declared = "".join(f', "{name}" {kind}' for name, kind in columns)
    connection.execute(f'CREATE TABLE {table}("#ordinal" INTEGER PRIMARY KEY, "#id" INTEGER NOT NULL{declared})')


def _insert_rows(
    connection: sqlite3.Connection, table: str, columns: Columns, rows: Iterable[tuple[int, int, Mapping[str, Value]]]
) -> None:
    names = [name for name, _ in columns]
    marks = ", ?" * len(names)
    values = ((ordinal, stored_id, *[row.get(name) for name in names]) for ordinal, stored_id, row in rows)
    connection.executemany(f"INSERT INTO {table} VALUES(?, ?{marks})", values)


def _create_fts(
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


def _in_order(row: Mapping[str, Value], columns: Columns) -> Row:
    return {name: row[name] for name, _ in columns if row.get(name) is not None}


def _json(numbers: np.ndarray) -> str:
    return msgspec.json.encode(numbers.tolist()).decode()
