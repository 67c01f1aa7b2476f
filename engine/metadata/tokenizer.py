"""SQLite's parser and tokenizer without any documents: whether a text is a query to FTS5, and which tokens a text has."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from engine.metadata.database_file import FTS_COLUMN


class Scratch:
    """An empty FTS5 table: SQLite's parser and tokenizer without any documents."""

    def __init__(self, tokenizer: str) -> None:
        self.lock = threading.Lock()
        self.sqlite = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self.sqlite.execute(f"CREATE VIRTUAL TABLE fts USING fts5({FTS_COLUMN}, content='', tokenize='{tokenizer}')")
        self.sqlite.execute("CREATE VIRTUAL TABLE temp.instances USING fts5vocab(main, fts, instance)")
        # Text of users is only ever bound; if it were not, no file would be in reach.
        self.sqlite.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)

    def accepts(self, text: str) -> bool:
        """Whether FTS5 takes this for a query. A leading * would be a debugging command of FTS5, not a query."""
        if text.startswith("*"):
            return False
        try:
            self.sqlite.execute("SELECT 1 FROM fts WHERE fts MATCH ?", (text,)).fetchall()
        except sqlite3.OperationalError:
            return False
        return True

    def terms(self, text: str) -> list[str]:
        """The tokens of a text, in order."""
        self.sqlite.execute("BEGIN")
        try:
            self.sqlite.execute(f"INSERT INTO fts(rowid, {FTS_COLUMN}) VALUES(1, ?)", (text,))
            return [term for (term,) in self.sqlite.execute('SELECT term FROM instances ORDER BY "offset"')]
        finally:
            self.sqlite.execute("ROLLBACK")


_scratches: dict[str, Scratch] = {}
_scratches_lock = threading.Lock()


@contextmanager
def tokenizing(tokenizer: str) -> Iterator[Scratch]:
    """The process's scratch table for a tokenizer, for one thread at a time; making one costs a millisecond."""
    with _scratches_lock:
        scratch = _scratches.get(tokenizer)
        if scratch is None:
            scratch = _scratches[tokenizer] = Scratch(tokenizer)
    with scratch.lock:
        yield scratch
