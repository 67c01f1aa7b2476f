"""The keys section: external ids (strings that users gave) to ordinals.

    0        4  n              u32, documents that have a key
    4        4  zero
    8       8n  hashes         u64, xxh3_64 of each key's UTF-8, rising
    8+8n    4n  ordinals       u32, of the document with that key
    8+12n  4(n+1)  ends        u32, key i is blob[ends[i]:ends[i + 1]]; ends[0] = 0
    ...        blob            UTF-8, keys in the order of their hashes; rising within equal hashes

A lookup hashes, searches, and compares the string itself, so equal hashes are slow and not wrong. Keys are unique in a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np
import xxhash

from engine.errors import InvalidRequest
from engine.format.envelope import Buffer, Section, corrupt


class Keys(msgspec.Struct, frozen=True):
    """A parsed keys section: hashes uint64 (n,) rising, ordinals uint32 (n,), ends uint32 (n + 1,), blob."""

    hashes: np.ndarray
    ordinals: np.ndarray
    ends: np.ndarray
    blob: memoryview

    def __len__(self) -> int:
        return len(self.hashes)

    def raw(self, row: int) -> bytes:
        """UTF-8 of the key in row `row`."""
        return bytes(self.blob[self.ends[row] : self.ends[row + 1]])

    def by_ordinal(self, n_documents: int) -> list[str | None]:
        """The key of every document, None where it has none: what a merge hands to the next segment. About 0.5 us per key."""
        keys: list[str | None] = [None] * n_documents
        for row, ordinal in enumerate(self.ordinals.tolist()):
            keys[ordinal] = self.raw(row).decode()
        return keys

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """The ordinal of each key, -1 where no document has it: int64 (len(keys),). About 1 us per key."""
        wanted = [key.encode() for key in keys]
        hashes = np.fromiter((xxhash.xxh3_64_intdigest(raw) for raw in wanted), np.uint64, len(wanted))
        rows = np.searchsorted(self.hashes, hashes)
        found = np.full(len(wanted), -1, np.int64)
        hit = (rows < len(self)) & (np.take(self.hashes, rows, mode="clip") == hashes) if len(self) else np.zeros(len(wanted), bool)
        for i in np.flatnonzero(hit):
            row = int(rows[i])
            while row < len(self) and self.hashes[row] == hashes[i]:
                if self.raw(row) == wanted[i]:
                    found[i] = self.ordinals[row]
                    break
                row += 1
        return found


def build_keys(keys: Sequence[str | None]) -> bytes | None:
    """The keys section of a segment whose ordinal i has the key keys[i]; None if no document has one.

    Raises InvalidRequest if two documents share a key.
    """
    rows = [(xxhash.xxh3_64_intdigest(raw), raw, ordinal) for ordinal, raw in enumerate(_encoded(keys)) if raw is not None]
    if not rows:
        return None
    rows.sort()
    for before, after in pairwise(rows):
        if before[1] == after[1]:
            raise InvalidRequest("two documents of a segment have the same key", key=repr(after[1])[:140])
    n_keys = np.array([len(rows), 0], "<u4")
    hashes = np.array([row[0] for row in rows], "<u8")
    ordinals = np.array([row[2] for row in rows], "<u4")
    ends = np.cumsum([0] + [len(row[1]) for row in rows], dtype=np.int64)
    if ends[-1] >= 1 << 32:
        raise InvalidRequest("keys of a segment are too large", limit_bytes=1 << 32, found=int(ends[-1]))
    return b"".join([n_keys.tobytes(), hashes.tobytes(), ordinals.tobytes(), ends.astype("<u4").tobytes(), *(row[1] for row in rows)])


def _encoded(keys: Sequence[str | None]) -> list[bytes | None]:
    try:
        return [None if key is None else key.encode() for key in keys]
    except UnicodeEncodeError as error:
        raise InvalidRequest("a key is not text", reason=error) from error


def parse_keys(data: Buffer, n_documents: int, *, name: str) -> Keys:
    """A verified keys section as arrays, without a copy; CorruptData if its content is impossible."""
    view = memoryview(data)
    n_keys = int.from_bytes(view[:4], "little") if len(view) >= 12 else -1
    blob_start = 12 + 16 * n_keys
    if n_keys < 0 or any(view[4:8]) or blob_start > len(view):
        raise corrupt("keys are cut", name=name, section=Section.KEYS, expected=blob_start, found=len(view))
    hashes = np.frombuffer(view, "<u8", n_keys, 8)
    ordinals = np.frombuffer(view, "<u4", n_keys, 8 + 8 * n_keys)
    ends = np.frombuffer(view, "<u4", n_keys + 1, 8 + 12 * n_keys)
    blob = view[blob_start:]
    sound = ends[0] == 0 and ends[-1] == len(blob) and (ends[1:] >= ends[:-1]).all() and (hashes[1:] >= hashes[:-1]).all()
    if not sound or (n_keys and ordinals.max() >= n_documents) or not _is_text(blob, ends):
        raise corrupt("keys are impossible", name=name, section=Section.KEYS, expected="rising hashes and ends", found="others")
    return Keys(hashes, ordinals, ends, blob)


def _is_text(blob: memoryview, ends: np.ndarray) -> bool:
    """Whether the blob is UTF-8 and no key begins in the middle of a character."""
    try:
        str(blob, "utf-8")
    except UnicodeDecodeError:
        return False
    begins = np.frombuffer(blob, np.uint8)[ends[ends < len(blob)]]
    return not ((begins & 0xC0) == 0x80).any()
