"""The bytes of an input: a local file or an object of a store, read by ranges; and the lines of a text.

Sources (input_kind.py has the list) read through this, so that they do not care where their input lies. Nothing is mapped: mapped pages would count as
this process's memory, and a file cut short meanwhile would kill it. The interface waits, because a Source does (engine/index/bulk.py);
what is asynchronous underneath runs on an event loop of its own, Background.
"""

from __future__ import annotations

import asyncio
import io
import os
import stat
import threading
import weakref
from array import array
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import xxhash

from engine.errors import Conflict, InvalidRequest, NotFound
from engine.store.base import Buffer, ObjectStore, Range
from engine.store.ranges import plan_reads

T = TypeVar("T")
CHUNK_BYTES = 8 << 20
MAX_LINE_BYTES = 256 << 20
"""Of one line of JSON: 65,535 tokens of 128 dimensions as decimal numbers are about 100 MB."""
WHOLE_FINGERPRINT_BYTES = 4 << 30
"""Inputs up to this are hashed whole (a few seconds); of larger ones the size, both ends and blocks in between."""
_N_PROBES = 64
_PROBE_BYTES = 1 << 20


class Content(Protocol):
    """Bytes that do not change while they are read. `label` names them in messages."""

    label: str
    size_bytes: int

    def read(self, ranges: Sequence[Range]) -> list[Buffer]:
        """The bytes of each range, in order. Conflict if the content changed since it was opened."""
        ...


class FileContent:
    """A local file, held open. Raises InvalidRequest for anything that is not a readable regular file."""

    def __init__(self, path: str | os.PathLike[str], *, label: str | None = None) -> None:
        self.label = label or os.fspath(path)
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe must not wait for its writer
        except FileNotFoundError as error:
            raise NotFound("no such file", file=self.label) from error
        except OSError as error:
            raise InvalidRequest("a readable file was expected", file=self.label, found=error.strerror) from error
        weakref.finalize(self, os.close, self._file)
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidRequest("a regular file was expected, because it is read more than once", file=self.label)
        self.size_bytes = status.st_size
        self._identity = status.st_size, status.st_mtime_ns

    def read(self, ranges: Sequence[Range]) -> list[Buffer]:
        found: list[Buffer] = [self._read(start, end) for start, end in ranges]
        status = os.fstat(self._file)
        if (status.st_size, status.st_mtime_ns) != self._identity:
            raise Conflict("the file changed while it was read", file=self.label)
        return found

    def _read(self, start: int, end: int) -> memoryview:
        wanted = np.empty(end - start, np.uint8).data
        done = 0
        while done < len(wanted):
            n = os.preadv(self._file, [wanted[done:]], start + done)
            if not n:
                raise Conflict("the file became shorter while it was read", file=self.label, expected=end, found=start + done)
            done += n
        return wanted


class Background:
    """An event loop on a thread of its own, for asynchronous work that synchronous code waits for. Close it, or use it in `with`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tartan-background", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for `work`, from any thread but its own."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ObjectContent:
    """An object of a store. Neighbouring ranges share a GET, long ones travel in pieces side by side (store/ranges.py)."""

    def __init__(self, store: ObjectStore, name: str, background: Background, *, label: str | None = None) -> None:
        self.label = label or name
        self._store, self._name, self._background = store, name, background
        self.size_bytes = background.run(self._find())

    async def _find(self) -> int:
        async for listed in self._store.list(self._name):
            if listed.name == self._name:
                return listed.size_bytes
            break
        raise NotFound("no such object", object=self.label)

    def read(self, ranges: Sequence[Range]) -> list[Buffer]:
        plan = plan_reads(ranges)
        return plan.slice(self._background.run(self._store.get_ranges(self._name, plan.gets)))


class PartContent:
    """A run of bytes inside another content."""

    def __init__(self, content: Content, start: int, size_bytes: int, label: str) -> None:
        self.label, self.size_bytes = label, size_bytes
        self._content, self._start = content, start

    def read(self, ranges: Sequence[Range]) -> list[Buffer]:
        return self._content.read([(self._start + start, self._start + end) for start, end in ranges])


class AsFile(io.RawIOBase):
    """A content as a readable, seekable file, for libraries that want one."""

    def __init__(self, content: Content) -> None:
        self._content, self._at = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._content.size_bytes}[whence]
        if at < 0:
            raise ValueError(f"a place before the beginning: {at}")
        self._at = at
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._content.size_bytes)
        if end <= self._at:
            return 0
        [data] = self._content.read([(self._at, end)])
        buffer[: len(data)] = data
        self._at = end
        return len(data)


def chunks(content: Content) -> Iterator[Buffer]:
    """The whole content in order, CHUNK_BYTES at a time."""
    for start in range(0, content.size_bytes, CHUNK_BYTES):
        yield content.read([(start, min(start + CHUNK_BYTES, content.size_bytes))])[0]


def fingerprint(content: Content) -> str:
    """Changes with the content and with nothing else: not with its name, place or time. See WHOLE_FINGERPRINT_BYTES."""
    state = xxhash.xxh3_128(content.size_bytes.to_bytes(8, "little"))
    if content.size_bytes <= WHOLE_FINGERPRINT_BYTES:
        for chunk in chunks(content):
            state.update(chunk)
        return state.hexdigest()
    for start in np.linspace(0, content.size_bytes - _PROBE_BYTES, _N_PROBES).astype(np.int64).tolist():
        state.update(content.read([(start, start + _PROBE_BYTES)])[0])
    return state.hexdigest()


@dataclass(frozen=True, slots=True)
class Line:
    """One line that is not blank. number counts from 1, blank lines included; start is its first byte's place."""

    number: int
    start: int
    data: bytes


def lines(content: Content) -> Iterator[Line]:
    """The lines of a UTF-8 text that are not blank, without their ends. One pass; memory is that of a chunk and a line.

    Raises InvalidRequest, naming the line, for bytes that are not UTF-8 and for a line longer than MAX_LINE_BYTES.
    """
    rest, start, number = b"", 0, 0
    for chunk in chunks(content):
        pieces = (rest + bytes(chunk)).split(b"\n")
        rest = pieces.pop()
        for piece in pieces:
            number += 1
            yield from _line(content, number, start, piece)
            start += len(piece) + 1
        if len(rest) > MAX_LINE_BYTES:
            raise InvalidRequest("a line is too long", file=content.label, line=number + 1, expected=f"at most {MAX_LINE_BYTES} bytes")
    yield from _line(content, number + 1, start, rest)


def _line(content: Content, number: int, start: int, data: bytes) -> Iterator[Line]:
    if not start and data.startswith(b"\xef\xbb\xbf"):  # a byte order mark is no content
        start, data = 3, data[3:]
    try:
        data.decode()
    except UnicodeDecodeError as error:
        found = f"0x{data[error.start]:02x} at byte {start + error.start}"
        raise InvalidRequest("text in UTF-8 was expected", file=content.label, line=number, found=found) from error
    if data.strip():
        yield Line(number, start, data)


@dataclass(slots=True)
class LineMap:
    """Where the lines of a content lie, so that any of them can be read again: 24 bytes of memory a line."""

    content: Content
    _numbers: array[int] = field(default_factory=lambda: array("q"))
    _starts: array[int] = field(default_factory=lambda: array("q"))
    _ends: array[int] = field(default_factory=lambda: array("q"))

    def note(self, line: Line) -> None:
        self._numbers.append(line.number)
        self._starts.append(line.start)
        self._ends.append(line.start + len(line.data))

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, n: int) -> int:
        """Line number, from 1, of the n-th noted line."""
        return self._numbers[n]

    def size_bytes(self, first: int, last: int) -> int:
        return self._ends[last - 1] - self._starts[first] if last > first else 0

    def read(self, which: Sequence[int] | range) -> list[bytes]:
        """The lines of these numbers (from 0, rising), without their ends."""
        return [bytes(data) for data in self.content.read([(self._starts[n], self._ends[n]) for n in which])]

    def run(self, first: int, last: int) -> list[bytes]:
        """The lines first to last, in one read."""
        if last <= first:
            return []
        base = self._starts[first]
        data = bytes(self.content.read([(base, self._ends[last - 1])])[0])
        return [data[self._starts[n] - base : self._ends[n] - base] for n in range(first, last)]
