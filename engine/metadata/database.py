"""The metadata of one segment, open for questions: which rows a condition selects, rows, keyword texts.

Changed metadata (patches) never touch the tables of the file (database_file.py). When a database is opened, changed rows are put into
temp.patched and their keyword text into temp.patched_fts; every question is asked of both, leaving changed rows out of the first. So a
file is opened without a copy.

Opened by index/parts.py and asked in worker threads, by index/filters.py among others. Does no I/O but reading the file it is given.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np

from engine.errors import CorruptData, Unavailable, UnsupportedFormat
from engine.metadata.condition import Condition, render
from engine.metadata.connection import Connection
from engine.metadata.database_file import (
    APPLICATION_ID,
    FORMAT_VERSION,
    Facts,
    checked_facts,
    create_fts,
    create_rows,
    in_order,
    insert_rows,
)
from engine.metadata.schema import Columns, Row, Value, complete, keyword_text, with_booleans

TIMEOUT_S = 5.0
"""Of one question to one database. Chosen: a scan of 65,536 rows takes well under a second."""
N_CONNECTIONS = 4
"""Threads that may ask one database at the same time; opened from bytes it is one, because each connection would copy the bytes."""

Patches = Mapping[int, Mapping[str, Value]]
"""Ordinal to changed values. An ordinal that is there was touched, even if no value differs: its keyword text is made anew."""


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
        self._idle: list[Connection] = []
        self._closed = False
        self._patched_rows: list[tuple[int, int, Row]] = []
        self._patched_lengths = np.zeros(0, np.int32)
        self.n_patched_indexed = 0
        first = Connection(source)
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
        try:
            return [found[ordinal].copy() for ordinal in wanted.tolist()]
        except KeyError as error:
            raise CorruptData("a row of a metadata database is missing", code="malformed", ordinal=error.args[0]) from error

    def texts(self, ordinals: np.ndarray | None = None, timeout_s: float = TIMEOUT_S) -> list[str]:
        """Keyword texts, in the order asked for: what `build` needs to index these rows again with the same words."""
        wanted = self._checked(ordinals)
        with self.asking(timeout_s) as connection:
            kept = dict(connection.execute("SELECT ordinal, text FROM main.texts").fetchall())
        texts = []
        for ordinal, row in zip(wanted.tolist(), self.rows(wanted, timeout_s), strict=True):
            text = None if ordinal in self._patches else kept.get(ordinal)
            if text is None:
                mine = in_order(row, self.columns)
                text = keyword_text(mine if ordinal in self._patches else with_booleans(mine, self._booleans))
            texts.append(text)
        return texts

    def close(self) -> None:
        """Close what is idle; connections in use close when their question is answered."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def asking(self, timeout_s: float) -> Iterator[Connection]:
        """A connection for one thread and one deadline (also for matching.py)."""
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

    def _another(self) -> Connection:
        if self._closed:
            raise ValueError("the metadata database is closed")
        connection = Connection(self._source)
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

    def _fetch(self, connection: Connection, table: str, columns: Columns, ordinals: np.ndarray) -> dict[int, Row]:
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

    def _read_facts(self, connection: Connection) -> None:
        """Take in the one row of facts, the stored ids and the columns; raises CorruptData if they do not fit together."""
        with connection.translated():
            application, version = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        if application != APPLICATION_ID:
            raise CorruptData("this is no metadata database", code="malformed")
        if version != FORMAT_VERSION:
            raise UnsupportedFormat("unknown format version of a metadata database", expected=FORMAT_VERSION, found=version)
        with connection.limited(time.monotonic() + TIMEOUT_S, TIMEOUT_S):
            declared = connection.check_tables()
            facts = checked_facts(connection.execute(f"SELECT {', '.join(Facts._fields)} FROM main.facts").fetchone())
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

    def _add_patches(self, connection: Connection, first_time: bool) -> None:
        """Put changed rows into temp tables; the first connection works out what they are."""
        connection.prepare_questions()
        if not self._patches:
            return
        with connection.limited(time.monotonic() + TIMEOUT_S, TIMEOUT_S):
            self._put_patches(connection, first_time)

    def _put_patches(self, connection: Connection, first_time: bool) -> None:
        if first_time:
            self._patched_rows = self._changed_rows(connection)
        create_rows(connection.sqlite, "temp.patched", self.columns)
        insert_rows(connection.sqlite, "temp.patched", self.columns, self._patched_rows)
        texts = ((ordinal, keyword_text(in_order(row, self.columns))) for ordinal, _, row in self._patched_rows)
        n_rows = self.n_documents
        lengths = create_fts(connection.sqlite, "temp", "patched_fts", self.tokenizer, texts, n_rows)
        self._patched_lengths = lengths[self.patched_ordinals]
        self.n_patched_indexed = connection.execute("SELECT count(*) FROM temp.patched_fts_docsize").fetchone()[0]
        connection.sqlite.execute("CREATE VIRTUAL TABLE temp.patched_instances USING fts5vocab(temp, patched_fts, instance)")

    def _changed_rows(self, connection: Connection) -> list[tuple[int, int, Row]]:
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


def merge_patches(patches: Sequence[Patches]) -> dict[int, Row]:
    """Several patches as one; a later value replaces an earlier one."""
    merged: dict[int, Row] = {}
    for patch in patches:
        for ordinal, values in patch.items():
            merged.setdefault(int(ordinal), {}).update(values)
    return merged


def _json(numbers: np.ndarray) -> str:
    return msgspec.json.encode(numbers.tolist()).decode()
