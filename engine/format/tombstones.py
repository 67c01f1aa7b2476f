"""The tombstones object: which documents of one segment are deleted. One section, ordinals u32 (n,), rising, n >= 1.

A commit that deletes writes a new object with all deleted ordinals of the segment; objects are never added to.
"""

from __future__ import annotations

import numpy as np

from engine.format.envelope import Buffer, Kind, Section, build, checksum, corrupt, parse
from engine.format.manifest import TombstoneRef


def write_tombstones(ordinals: np.ndarray, tombstones_id: str, *, home: str = "") -> tuple[bytes, TombstoneRef]:
    """The object and its reference. ordinals: integers (n,), n >= 1, in any order; repeats are dropped."""
    rising = np.unique(ordinals).astype("<u4")
    if not len(rising):
        raise ValueError("a tombstones object names at least one document")
    data = bytes(build(Kind.TOMBSTONES, [(Section.ORDINALS, rising)])[0])
    return data, TombstoneRef(id=tombstones_id, home=home, n_deleted=len(rising), size_bytes=len(data), checksum=checksum(data))


def read_tombstones(data: Buffer, ref: TombstoneRef, n_documents: int, *, name: str) -> np.ndarray:
    """Deleted ordinals, int64 (n,), rising, all below n_documents. Raises CorruptData or UnsupportedFormat."""
    header, parts = parse(data, name=name, kind=Kind.TOMBSTONES)
    section = header.section(Section.ORDINALS, name=name)
    found = checksum(memoryview(data))
    if found != ref.checksum:
        raise corrupt("not the tombstones that the manifest names", name=name, expected=ref.checksum, found=found, code="checksum-mismatch")
    ordinals = np.frombuffer(parts[Section.ORDINALS], "<u4", section.length // 4).astype(np.int64)
    rising = bool((np.diff(ordinals) > 0).all())
    if section.length != 4 * ref.n_deleted or not len(ordinals) or not rising or ordinals[-1] >= n_documents:
        raise corrupt("tombstones are impossible", name=name, section=Section.ORDINALS, expected=ref.n_deleted, found=len(ordinals))
    return ordinals
