"""A sqlite3 connection to a metadata database that can only read, with a deadline while it is asked something.

A connection can read our tables and call our functions, nothing else (authorizer). Time is limited by a progress handler and, inside
regular expressions, by their own timeout. Memory is limited by limiting what goes in: SQLite's heap limit counts for the whole process,
so one request that reaches it would fail its neighbours.

database.py keeps connections and hands them out; keyword search asks by them, too.
"""

from __future__ import annotations

import os
import sqlite3
import time
import urllib.parse
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np
import regex

from engine.errors import CorruptData, EngineError, InvalidRequest, Unavailable
from engine.metadata.condition import compile_pattern, pattern_text
from engine.metadata.database_file import Facts
from engine.metadata.schema import Value

REGEXP_TIMEOUT_S = 0.2
"""Of one pattern on one row; a sane pattern needs microseconds."""

_MAGIC = b"SQLite format 3\0"
_PROGRESS_STEPS = 2000
_MAX_VALUE_BYTES = 256 << 20
_FUNCTIONS = frozenset(("like", "regexp", "bm25", "match", "json_group_array", "json_each"))
_TABLES = frozenset(("rows", "texts", "facts", "fts", "patched", "patched_fts", "lists", "instances", "patched_instances", "json_each"))
_VIRTUAL_TABLES = """
    SELECT 'main.' || name FROM main.sqlite_master WHERE sql LIKE 'CREATE VIRTUAL%' AND name = 'fts'
    UNION ALL SELECT 'temp.' || name FROM temp.sqlite_master WHERE sql LIKE 'CREATE VIRTUAL%'"""
_SHADOWS = tuple(f"{table}_{part}" for table in ("fts", "patched_fts") for part in ("data", "idx", "content", "docsize", "config"))


class Connection:
    """A sqlite3 connection that can only read, with a deadline while it is asked something."""

    def __init__(self, source: bytes | str | os.PathLike[str]) -> None:
        if isinstance(source, bytes):
            if not source.startswith(_MAGIC):  # SQLite takes an empty input for an empty database, or for a lack of memory
                raise CorruptData("this is no metadata database", code="malformed")
            self.sqlite = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        else:
            path = urllib.parse.quote(os.fspath(source))
            self.sqlite = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True, check_same_thread=False, isolation_level=None)
        # Caches let go of databases without closing them. No __del__: in a cycle Python's collector may find the sqlite3 connection first, open.
        weakref.finalize(self, self.sqlite.close).atexit = False
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
            # FTS5 whose tables are others has no better words, or tries what sealing forbids; of a mistake in our SQL more is said.
            is_corrupt |= str(error) == "SQL logic error" or name == "SQLITE_AUTH"
            if is_corrupt or "no such table: main." in str(error) or "vtable constructor failed" in str(error):
                raise CorruptData("a metadata database cannot be read", code="malformed", reason=str(error)[:140]) from error
            raise

    def close(self) -> None:
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
