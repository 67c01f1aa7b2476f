"""What a process knows of the extents on disk: where each lies, how much of it was verified, and which covers a range. No I/O.

An *extent* is a run of bytes of one object. The extents that were fetched together lie in one file, so that a query writes one file
per object and not one per posting list.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class File:
    path: str
    cost_bytes: int
    etag: str | None
    touched_s: float = -math.inf
    n_extents: int = 0


@dataclass(slots=True, eq=False)
class Extent:
    start: int
    end: int
    offset: int
    checksums: Sequence[int]
    verified: bytearray
    file: File


@dataclass(slots=True)
class Known:
    """What this process knows of one object: extents of which none contains another, so starts and ends both ascend."""

    extents: list[Extent] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    files: dict[str, File] = field(default_factory=dict)
    folder_modified_ns: int = -1

    def covering(self, start: int, end: int) -> Extent | None:
        """Of the extents that begin early enough, the last reaches farthest."""
        at = bisect_right(self.starts, start) - 1
        return self.extents[at] if at >= 0 and end <= self.extents[at].end else None

    def whole(self) -> Extent | None:
        first = self.extents[0] if self.extents else None
        return first if first and first.file.etag is not None else None

    def add(self, extent: Extent) -> None:
        """Take it in and let go what it contains, or leave it out if another contains it (a whole object comes before a part)."""
        covered = self.covering(extent.start, extent.end) is not None
        if covered and (extent.file.etag is None or self.whole() is not None):
            return
        first = bisect_left(self.starts, extent.start)
        last = first
        while last < len(self.extents) and self.extents[last].end <= extent.end:
            last += 1
        contained = self.extents[first:last]
        self.extents[first:last] = [extent]
        self.starts[first:last] = [extent.start]
        extent.file.n_extents += 1
        for old in contained:
            old.file.n_extents -= 1

    def pop_superfluous(self) -> list[File]:
        """Files none of whose extents is in use any more."""
        superfluous = [file for file in self.files.values() if file.n_extents == 0]
        for file in superfluous:
            del self.files[file.path]
        return superfluous

    def drop(self, file: File) -> None:
        self.files.pop(file.path, None)
        self.extents = [extent for extent in self.extents if extent.file is not file]
        self.starts = [extent.start for extent in self.extents]
