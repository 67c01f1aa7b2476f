"""Files of an index directory that may change while it is read: JSON, slices of .npy files, and the watch over them.

Payload files are read with ordinary reads, not mapped: both peers truncate and rewrite these files in place, and a mapped page
behind a new end of file kills the process where a short read is only an error.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from engine.errors import Conflict, CorruptData, UnsupportedFormat
from engine.transfer.npy import read_header

_MOST_TOKENS = 1 << 31
"""Of one document: beyond it is rubbish, and sums of rubbish would overflow."""


class Watch:
    """Identities of the files that were consulted: an index that changes under the reader would mix two states."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._seen: dict[str, tuple[int, int, int]] = {}

    def open(self, name: str) -> Path:
        """The path of `name`, from now on watched. CorruptData if it is not there."""
        try:
            seen = identity(self.root / name)
        except FileNotFoundError as error:
            raise CorruptData("a file of the index is missing", code="missing-object", object=name) from error
        if self._seen.setdefault(name, seen) != seen:
            raise self._changed(name)
        return self.root / name

    def fingerprint(self, further: Sequence[str]) -> str:
        """Changes with the place, size or time of any watched or further file."""
        seen = {**self._seen, **{name: identity(self.root / name) for name in further}}
        return hashlib.sha256(repr((str(self.root.resolve()), sorted(seen.items()))).encode()).hexdigest()

    def check(self) -> None:
        """Raise Conflict if a watched file is no longer what it was. One stat a file."""
        for name, seen in self._seen.items():
            try:
                now = identity(self.root / name)
            except FileNotFoundError as error:
                raise self._changed(name) from error
            if now != seen:
                raise self._changed(name)

    def _changed(self, name: str) -> Conflict:
        reason = "the directory changed while it was read: stop its server, or import from a copy"
        return Conflict(reason, object=name, directory=str(self.root))


def identity(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced or written: inode, size in bytes, time in nanoseconds."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def malformed(message: str, name: str, **facts: object) -> CorruptData:
    """The error for a file whose content is impossible."""
    return CorruptData(message, code="malformed", object=name, **facts)


def json_object(watch: Watch, name: str) -> dict[str, Any]:
    """A JSON file that holds an object; CorruptData if it does not."""
    try:
        content = json.loads(watch.open(name).read_bytes())
    except (ValueError, RecursionError) as error:
        raise malformed("not JSON", name, reason=str(error)) from error
    if not isinstance(content, dict):
        raise malformed("a JSON object was expected", name, found=type(content).__name__)
    return content


def count_of(content: dict[str, Any], key: str, name: str) -> int:
    """A count in the content of file `name`; CorruptData unless it is an integer from 0."""
    value = content.get(key)
    if type(value) is not int or value < 0:
        raise malformed("a count was expected", name, key=key, found=repr(value)[:80])
    return value


def lengths_of(watch: Watch, name: str) -> np.ndarray:
    """A JSON array of counts -> int64 (n,)."""
    try:
        lengths = np.array(msgspec.json.decode(watch.open(name).read_bytes(), type=list[int]), np.int64)
    except (msgspec.MsgspecError, OverflowError, ValueError, RecursionError) as error:
        raise malformed("an array of token counts was expected", name, reason=str(error)) from error
    impossible = np.flatnonzero((lengths < 0) | (lengths > _MOST_TOKENS))
    if len(impossible):
        raise malformed("an impossible number of tokens", name, row=int(impossible[0]), found=int(lengths[impossible[0]]))
    return lengths


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of an .npy file, by their place. Reading copies, so that data at odd places comes out aligned."""

    watch: Watch
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    data_start: int
    first_row: int = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the slice. CorruptData if the file ends before them."""
        row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        wanted = np.empty((stop - start, *self.shape[1:]), self.dtype)
        view = wanted.reshape(-1).view(np.uint8).data
        with open(self.watch.open(self.name), "rb", buffering=0) as file:
            file.seek(self.data_start + (self.first_row + start) * row_bytes)
            done = 0
            while done < len(view):
                n = file.readinto(view[done:])
                if not n:
                    raise malformed("the file ends before its rows do", self.name, expected=len(view), found=done)
                done += n
        return wanted

    def at(self, first_row: int) -> Slice:
        return Slice(self.watch, self.name, self.dtype, self.shape, self.data_start, first_row)


def array_slice(watch: Watch, name: str, kinds: str) -> Slice:
    """The header of an .npy file. kinds: letters of numpy's dtype kinds that are allowed. Object arrays are pickles, never read."""
    with open(watch.open(name), "rb") as file:
        try:
            shape, fortran, dtype = read_header(file)
        except ValueError as error:
            raise malformed("not an .npy file", name, reason=str(error)) from error
        start = file.tell()
    if dtype.hasobject:
        raise UnsupportedFormat("an object array is a pickle and is not read", object=name)
    if fortran and len(shape) > 1:
        raise malformed("rows must lie end to end", name, expected="C order", found="Fortran order")
    if dtype.kind not in kinds or dtype.fields is not None:
        raise malformed("another type of number was expected", name, expected=kinds, found=str(dtype))
    size, found = start + dtype.itemsize * math.prod(shape), (watch.root / name).stat().st_size
    if found < size:
        raise malformed("the file ends before its rows do", name, expected=size, found=found)
    return Slice(watch, name, dtype, shape, start)
