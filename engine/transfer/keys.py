"""External ids of an input's documents: those in a text file beside arrays, what may be one, and the one that comes twice."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import xxhash

from engine.errors import InvalidRequest
from engine.index.operations import MAX_KEY_BYTES
from engine.transfer.content import Content, Line, LineMap, fingerprint, lines
from engine.transfer.json_lines import refuse


@dataclass(frozen=True)
class KeyLines:
    """One external id a line."""

    map: LineMap
    fingerprint: str

    @classmethod
    def open(cls, content: Content) -> KeyLines:
        map_, seen = LineMap(content), SeenKeys(lambda n: map_.read([n])[0].decode().strip())
        for line in lines(content):
            seen.note(checked_key(line.data.decode().strip(), content, line))
            map_.note(line)
        seen.check(map_)
        return cls(map_, fingerprint(content))

    def keys(self, first: int, last: int) -> list[str]:
        return [data.decode().strip() for data in self.map.run(first, last)]


@dataclass
class SeenKeys:
    """External ids met so far, 8 bytes each; finds the one that comes twice. key_of gives the key of the n-th document again."""

    key_of: Callable[[int], str | None]
    _hashes: array[int] = field(default_factory=lambda: array("Q"))
    _documents: array[int] = field(default_factory=lambda: array("q"))
    _n_documents: int = 0

    def note(self, key: str | None) -> None:
        """The key of the next document."""
        if key is not None:
            self._hashes.append(xxhash.xxh3_64_intdigest(key.encode()))
            self._documents.append(self._n_documents)
        self._n_documents += 1

    def __bool__(self) -> bool:
        return len(self._hashes) > 0

    def check(self, map_: LineMap) -> None:
        """Raise InvalidRequest, naming id and lines, if a key came twice."""
        hashes = np.frombuffer(self._hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        for n in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]).tolist():
            one, other = self._documents[order[n]], self._documents[order[n + 1]]
            key = self.key_of(one)
            if key == self.key_of(other):
                facts = {"id": repr(key)[:140], "lines": f"{map_.number(one)} and {map_.number(other)}"}
                raise InvalidRequest("an external id comes twice", file=map_.content.label, **facts)


def checked_key(key: str, content: Content, line: Line) -> str:
    """The key, or InvalidRequest, naming the line, if it cannot be one."""
    if not 1 <= len(key.encode()) <= MAX_KEY_BYTES:
        refuse(content, line, f"an external id is text of 1 to {MAX_KEY_BYTES} bytes", found=repr(key)[:80])
    return key


def key_text(key: str | int | None) -> str | None:
    """An id as text: JSON may give it as a number."""
    return None if key is None else str(key)
