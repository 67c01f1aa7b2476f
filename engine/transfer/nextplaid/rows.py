"""Metadata rows of a peer's index: its SQLite database, read without writing into the directory."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import Conflict, InvalidRequest
from engine.transfer.nextplaid.files import identity, malformed

DATABASE = "metadata.db"
_RESERVED_COLUMNS = ("_subset_", "_content_id_")
Value = str | int | float | None


@contextmanager
def database_of(directory: Path) -> Iterator[sqlite3.Connection]:
    """metadata.db, read-only. Where changes lie beside it that it does not hold yet, a copy of all of them is read instead:
    folding them in (a WAL's index, a journal's rollback) writes, and the directory is not ours to write.

    Raises CorruptData for what SQLite cannot read, Conflict if a file changes between opening and closing.
    """
    names = [DATABASE, f"{DATABASE}-wal", f"{DATABASE}-journal"]
    present = {name: identity(directory / name) for name in names if (directory / name).exists()}
    pending = any(size > 0 for name, (_, size, _) in present.items() if name != DATABASE)
    with tempfile.TemporaryDirectory(prefix="tartan-import-") as scratch:
        uri = f"{(directory / DATABASE).absolute().as_uri()}?mode=ro&immutable=1"
        if pending:
            for name in present:
                shutil.copyfile(directory / name, Path(scratch) / name)
            uri = f"{(Path(scratch) / DATABASE).as_uri()}?mode=rw"
        try:
            connection = sqlite3.connect(uri, uri=True)
            try:
                connection.execute("PRAGMA trusted_schema = OFF")
                connection.execute("PRAGMA query_only = ON")
                yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise malformed("SQLite cannot read it", DATABASE, reason=str(error)) from error
        now = {name: identity(directory / name) for name in names if (directory / name).exists()}
        if now != present:
            raise Conflict("the metadata changed while it was read: stop the server, or import from a copy", object=DATABASE)


def tables_of(database: sqlite3.Connection) -> set[str]:
    """Names of its tables."""
    return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def columns_of(database: sqlite3.Connection) -> tuple[dict[str, str], str]:
    """Users' columns -> alias of their table, and the FROM clause. The form is told by its tables, not by its version number."""
    tables = tables_of(database)
    if "METADATA" not in tables:
        raise malformed("no table METADATA", DATABASE, found=sorted(tables))
    source, parts = "METADATA AS t", [("t", "METADATA")]
    if "METADATA_CONTENT" in tables:
        source += " JOIN METADATA_CONTENT AS c ON c._content_id_ = t._content_id_"
        parts.append(("c", "METADATA_CONTENT"))
    columns: dict[str, str] = {}
    for alias, table in parts:
        for _, name, *_ in database.execute(f"PRAGMA table_info({table})"):
            if name in _RESERVED_COLUMNS:
                continue
            if name in columns or not name.isidentifier() or not name.isascii():
                raise malformed("a column's name is repeated or impossible", DATABASE, column=name)
            columns[name] = alias
    return columns, source


def check_rows(database: sqlite3.Connection, source: str, n_documents: int, *, every: bool) -> None:
    """Rows belong to documents: numbers in range, none twice, each with its content. FastPlaid (`every`) has one for each document."""
    question = "SELECT count(*), count(DISTINCT _subset_), total(typeof(_subset_) = 'integer' AND _subset_ BETWEEN 0 AND ?) FROM METADATA"
    n_rows, n_distinct, n_in_range = database.execute(question, (n_documents - 1,)).fetchone()
    (n_joined,) = database.execute(f"SELECT count(*) FROM {source}").fetchone()
    facts = {"expected": n_documents, "found": n_rows}
    if n_in_range != n_rows or (every and n_rows != n_documents):
        reason = "rows without a document: the file may be left over from an older index, or a write was cut short; import without fields"
        raise malformed(reason if n_rows else "no rows for the documents", DATABASE, **facts, in_range=int(n_in_range))
    if n_distinct != n_rows:
        raise malformed("a document has two rows", DATABASE, **facts, distinct=n_distinct)
    if n_joined != n_rows:
        raise malformed("a row has no content", DATABASE, **facts, joined=n_joined)


def json_value(value: object, id_: int, column: str) -> Value:
    """A value as JSON can have it; InvalidRequest for bytes that are no text."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            reason = "a binary value has no form in JSON: leave the column out"
            raise InvalidRequest(reason, object=DATABASE, id=id_, column=column) from error
    assert value is None or isinstance(value, str | int | float)
    return value
