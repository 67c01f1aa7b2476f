"""Metadata rows as users send them, and as an index keeps them: column names, column types, stored values, keyword text.

The columns of an index are a tuple of (name, type) in order of first appearance, kept in the manifest. Types are SQLite's: a column's
type is an affinity, which changes values that fit it ("12" in an INTEGER column is 12) and leaves the others as they are.
Values are normalised here, in Python, once, when a document is written: what a record keeps, what the database keeps and what an answer
shows are then equal on every release of SQLite (their rendering of a float as text differs).

Called by index.writer and the routes that change metadata. Does not import sqlite3: a search without a filter never needs it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import msgspec

from engine.errors import InvalidRequest, LimitExceeded

Value = int | float | str | None
"""A stored value. There are no blobs: a BLOB column holds what it is given (lists and objects arrive as JSON text)."""
Row = dict[str, Value]
Columns = tuple[tuple[str, str], ...]
"""(name, type) in order of first appearance; a type is INTEGER, REAL, TEXT or BLOB."""

SUBSET = "_subset_"
RESERVED = (SUBSET, "_content_id_")
"""Keys that NextPlaid keeps for itself. People send back rows that they have read, so these are dropped, not refused."""

MAX_COLUMNS = 1900
"""SQLite allows 2000 per table; some are ours, and a margin is kept."""
MAX_ROW_BYTES = 16 << 20
"""UTF-8 bytes of one row. Chosen: far above any sane row, far below what makes a worker run out of memory."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_NUMBER = re.compile(r"[ \t\n\v\f\r]*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)[ \t\n\v\f\r]*", re.ASCII)
"""What SQLite takes for a number when it applies a numeric affinity to text (sqlite.org/datatype3.html, 3)."""
_INT64 = range(-(1 << 63), 1 << 63)


class Extended(NamedTuple):
    """Columns after some rows were added; the rows as stored, without their nulls; the keyword text of each row."""

    columns: Columns
    rows: list[Row]
    texts: list[str]


def extend(columns: Columns, rows: Sequence[object]) -> Extended:
    """Add rows as a user sent them to an index that has `columns`.

    columns  of the whole index so far; a name's type never changes, new names are appended
    rows     one mapping per document; values are what JSON can hold
    returns  Extended; a stored row has only its non-null values, under the names in `columns` (see `complete`)

    Raises InvalidRequest for rows that are no objects, names that cannot be columns, names that differ only by case, and values that
    cannot be stored; LimitExceeded for too many columns or too large a row. Cost: one pass for names and types, one for values.
    """
    items = [_checked_row(row, number) for number, row in enumerate(rows)]
    columns = _with_new_columns(columns, items)
    types = dict(columns)
    stored = []
    for number, item in enumerate(items):
        plain = {name: plain_value(value, name) for name, value in item.items()}
        _check_row_size(plain, number)
        stored.append({name: affinity(value, types[name], name) for name, value in plain.items() if value is not None})
    return Extended(columns, stored, [keyword_text(item) for item in items])


def adopt(columns: Columns, more: Columns) -> Columns | None:
    """`columns` with those of `more` appended, or None if a name occurs in both with another type or another case.

    For a commit that is re-applied after somebody else's: None means that the rows must go through `extend` again.
    """
    types = dict(columns)
    spellings = {name.lower(): name for name in types}
    added = []
    for name, kind in more:
        if types.get(name, kind) != kind or spellings.get(name.lower(), name) != name:
            return None
        if name not in types:
            added.append((name, kind))
    return columns + tuple(added)


def complete(row: Mapping[str, Value], columns: Columns, document_id: int) -> Row:
    """A stored row as an answer shows it: `_subset_` and every column of the index, null where the row has no value."""
    answer: Row = {SUBSET: document_id}
    for name, _ in columns:
        answer[name] = row.get(name)
    return answer


def changed_values(columns: Columns, updates: object) -> Row:
    """Normalise the `updates` of a metadata update: canonical names, stored values (null stays, it clears the value).

    Raises InvalidRequest if `updates` is no object, or names `_subset_`, an unknown column, or one column twice.
    """
    if not isinstance(updates, Mapping):
        raise InvalidRequest("updates must be an object", found=type(updates).__name__)
    known = {name.lower(): (name, kind) for name, kind in columns}
    changed: Row = {}
    for key, value in updates.items():
        if not isinstance(key, str) or key.lower() in RESERVED:
            raise InvalidRequest("this column cannot be changed", column=repr(key)[:140])
        name, kind = known.get(key.lower(), ("", ""))
        if not name:
            raise InvalidRequest("unknown column", column=repr(key)[:140])
        if name in changed:
            raise InvalidRequest("a column is named twice", column=name)
        changed[name] = affinity(plain_value(value, name), kind, name)
    _check_row_size(changed, 0)
    return changed


def keyword_text(row: Mapping[str, object]) -> str:
    """The text that keyword search sees: all values, depth first, joined by single spaces; keys are not part of it.

    Strings as they are (empty ones skipped), numbers in decimal, booleans as true/false, nulls skipped. Given a raw row this is the text
    of a new document; given a stored row, in column order, the text of a document whose metadata were changed (booleans are 1/0 then, and
    nested values their JSON text).
    """
    words: list[str] = []
    waiting: list[object] = [value for key, value in reversed(list(row.items())) if key not in RESERVED]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if value:
                words.append(value)
        elif isinstance(value, bool):
            words.append("true" if value else "false")
        elif isinstance(value, int | float):
            words.append(number_text(value))
        elif isinstance(value, Mapping):
            waiting.extend(reversed(list(value.values())))
        elif isinstance(value, list | tuple):
            waiting.extend(reversed(value))
    return " ".join(words)


def shown_as_booleans(row: Mapping[str, Value], text: str) -> set[str] | None:
    """Which of a stored row's values must be written as true or false so that its keyword text is `text`; None if that cannot be done.

    So a database need not keep the texts of rows whose only difference to their columns is that SQLite has no booleans.
    """
    shown = set()
    padded = f"{text} " if text else ""
    position = 0
    for name, value in row.items():
        if value is None or value == "":
            continue
        words = [keyword_text({name: value})]
        if isinstance(value, int) and value in (0, 1):
            words.append("true" if value else "false")
        fitting = [word for word in words if padded.startswith(f"{word} ", position)]
        if not fitting:
            return None
        if fitting[0] != words[0]:
            shown.add(name)
        position += len(fitting[0]) + 1
    return shown if position == len(padded) else None


def with_booleans(row: Mapping[str, Value], names: Set[str]) -> Row:
    """The row with 1 and 0 in these columns as True and False."""
    return {name: bool(value) if name in names and isinstance(value, int) and value in (0, 1) else value for name, value in row.items()}


def number_text(value: int | float) -> str:
    """A number in decimal: the shortest text that reads back as the same number."""
    if isinstance(value, int):
        if value in _INT64:
            return str(value)
        try:
            value = float(value)
        except OverflowError:  # inside a list or an object, which is kept as its text
            return str(value)
    return msgspec.json.encode(value).decode()


def plain_value(value: object, name: str = "") -> Value:
    """A JSON value as SQLite can hold it, before affinity: bool -> 1/0, int beyond 64 bits -> float, list or object -> compact JSON text.

    Raises InvalidRequest for numbers that are not finite, text with unpaired surrogates, and what JSON does not know.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return _checked_text(value, name)
    if isinstance(value, int):
        return int(value) if value in _INT64 else _finite(value, name)
    if isinstance(value, float):
        return _finite(value, name)
    if isinstance(value, list | tuple | dict):
        try:
            text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidRequest("a nested value is no JSON", column=name, reason=str(error)[:140]) from error
        return _checked_text(text, name)
    expected = "a metadata value is null, a boolean, a number, a string, a list or an object"
    raise InvalidRequest(expected, column=name, found=type(value).__name__)


def affinity(value: Value, kind: str, name: str = "") -> Value:
    """The value that a SQLite column declared `kind` stores for `value` (sqlite.org/datatype3.html, 3).

    Raises InvalidRequest for text that a numeric column would read as infinity: JSON could not give it back.
    """
    if value is None or kind == "BLOB":
        return value
    if kind == "TEXT":
        return value if isinstance(value, str) else str(value) if isinstance(value, int) else _real_text(value)
    if isinstance(value, str):
        number = _number(value)
        if number is None:
            return value
        value = _finite(number, name) if isinstance(number, float) else number
    if kind == "REAL":
        return float(value) + 0.0  # -0.0 is stored as 0.0
    if isinstance(value, float) and value.is_integer() and -(2.0**63) < value < 2.0**63:
        return int(value)
    return value


def _checked_row(row: object, number: int) -> dict[str, object]:
    """The row without reserved keys; raises InvalidRequest unless it is an object whose keys can be columns."""
    if not isinstance(row, Mapping):
        raise InvalidRequest("metadata must be one object per document", document=number, found=type(row).__name__)
    item = {}
    for key, value in row.items():
        if key in RESERVED:
            continue
        if not isinstance(key, str) or not _NAME.fullmatch(key) or key.lower() in RESERVED:
            raise InvalidRequest(
                "a metadata key is up to 255 letters, digits and underscores, not starting with a digit, and not reserved",
                document=number,
                key=repr(key)[:140],
            )
        item[key] = value
    return item


def _with_new_columns(columns: Columns, rows: list[dict[str, object]]) -> Columns:
    """Append the names that `rows` bring, each with the type of its first value that is not null.

    The first batch of an index is special: if its first row has every key of the batch, that row alone decides, and null means TEXT.
    """
    spellings = {name.lower(): name for name, _ in columns}
    known = {name for name, _ in columns}
    types: dict[str, str | None] = {}
    for number, row in enumerate(rows):
        for name, value in row.items():
            if name in known:
                continue
            if name not in types:
                if spellings.setdefault(name.lower(), name) != name:
                    raise InvalidRequest("metadata keys differ only by case", document=number, key=name, other=spellings[name.lower()])
                types[name] = None
            if types[name] is None:
                types[name] = _type_of(value)
    if not columns and rows and len(rows[0]) == len(types):
        types = {name: _type_of(value) for name, value in rows[0].items()}
    extended = columns + tuple((name, kind or "TEXT") for name, kind in types.items())
    if len(extended) > MAX_COLUMNS:
        raise LimitExceeded("too many metadata columns", limit=MAX_COLUMNS, columns=len(extended))
    return extended


def _type_of(value: object) -> str | None:
    """The column type that a first value decides; None for null."""
    if value is None:
        return None
    if isinstance(value, int):
        return "INTEGER" if value in _INT64 else "REAL"
    if isinstance(value, float):
        return "REAL"
    return "TEXT" if isinstance(value, str) else "BLOB"


def _number(text: str) -> int | float | None:
    """Text as the number that a numeric affinity makes of it, or None."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    digits = match[1]
    if len(digits) <= 20 and digits.lstrip("+-").isdigit() and int(digits) in _INT64:
        return int(digits)
    return float(digits)


def _real_text(value: float) -> str:
    """A float as SQLite's TEXT affinity writes it: 15 significant digits and always a point."""
    mantissa, mark, exponent = f"{value + 0.0:.15g}".partition("e")
    return mantissa + ("" if "." in mantissa else ".0") + mark + exponent


def _finite(value: int | float, name: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidRequest("a number must be finite", column=name)
    return number


def _checked_text(text: str, name: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest("text has an unpaired surrogate", column=name) from error
    return text


def _check_row_size(row: Mapping[str, Value], number: int) -> None:
    texts = [value for value in row.values() if isinstance(value, str)]
    if sum(map(len, texts)) <= MAX_ROW_BYTES // 4:
        return
    size = sum(len(value.encode()) for value in texts)
    if size > MAX_ROW_BYTES:
        raise LimitExceeded("the metadata of one document are too large", document=number, limit_bytes=MAX_ROW_BYTES, size_bytes=size)
