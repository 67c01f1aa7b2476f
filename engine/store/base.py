"""What the engine asks of an object store, and what each store promises.

Names are relative '/'-separated keys. Bytes-like results may be views of larger buffers and must be treated as read-only.
Stores hold no index logic; `objects.py` speaks to real stores, `cache.py` and `wrappers.py` are stores around stores.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Protocol, TypeAlias

import msgspec

from engine.errors import InvalidRequest

Buffer: TypeAlias = bytes | bytearray | memoryview
Range: TypeAlias = tuple[int, int]
"""Half-open byte range (start, end), 0 <= start <= end."""


_NAME = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9_.=-]*(/[A-Za-z0-9_=-][A-Za-z0-9_.=-]*)*")


def check_name(name: str) -> str:
    """Return `name` if it can name an object in every store, else raise InvalidRequest.

    Parts between slashes are letters, digits and `_ . = -`, and never begin with a dot; so no name is absolute, climbs
    with '..', needs escaping, or meets the files that a directory store keeps for itself.
    """
    if not _NAME.fullmatch(name) or len(name) > 1024:
        raise InvalidRequest("not the name of an object", name=repr(name)[:140])
    return name


def check_folder(prefix: str) -> str:
    """Return `prefix` if it names a folder ('' or a name and a slash), else raise InvalidRequest."""
    if prefix and not (prefix.endswith("/") and _NAME.fullmatch(prefix[:-1]) and len(prefix) <= 1024):
        raise InvalidRequest("a folder ends with a slash", prefix=repr(prefix)[:140])
    return prefix


def same_bytes(one: Buffer, other: Buffer) -> bool:
    """Whether both hold the same bytes. Compares `bytes` by the MiB: memoryviews are compared one element at a time."""
    if len(one) != len(other):
        return False
    step = 1 << 20
    return all(bytes(one[at : at + step]) == bytes(other[at : at + step]) for at in range(0, len(one), step))


class Object(msgspec.Struct, frozen=True):
    """Content and identity of an object at one moment. `etag` changes whenever the content does."""

    data: Buffer
    etag: str


class Listed(msgspec.Struct, frozen=True):
    """One line of a listing. `modified_s` is the store's own clock (unix seconds)."""

    name: str
    size_bytes: int
    modified_s: float


class ObjectStore(Protocol):
    """Strongly consistent key-value store with conditional writes (S3 since December 2024, a directory, memory).

    Every method raises Unavailable (`store-unavailable`, `store-denied`) when the store does not serve it after the
    store's own retries; those retries are for idempotent reads and for writes whose outcome can be established.
    """

    async def get(self, name: str) -> Object:
        """The whole object. NotFound if absent. One request."""
        ...

    async def get_if_changed(self, name: str, etag: str) -> Object | None:
        """The object if its etag is no longer `etag`, else None (no bytes travel). NotFound if absent. One request."""
        ...

    async def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[Buffer]:
        """The bytes of each range, in order; one request each, all in flight together up to the store's bound.

        An empty range costs nothing. A range beyond the end raises CorruptData: callers ask only for bytes that a manifest
        promised. NotFound if absent. Callers that want neighbours merged plan it first (ranges.py).
        """
        ...

    async def put_if_absent(self, name: str, data: Buffer) -> str:
        """Create the object and return its etag. Conflict (`already-exists`) if it holds other bytes.

        Idempotent: if the object holds exactly `data` already (a lost answer, a repeated call), that is success.
        Readers see nothing or everything.
        """
        ...

    async def replace_if_unchanged(self, name: str, data: Buffer, etag: str) -> str:
        """Replace the object if its etag is `etag`; return the new etag. Conflict (`commit-conflict`) if it changed, NotFound if absent.

        If the answer was lost but the object now holds exactly `data`, that is success; therefore `data` must contain
        something unique to this attempt. If ours took effect, its answer was lost, and somebody replaced it again before
        we looked, that is a Conflict too: whoever must know looks for its own mark in the history of the object.
        """
        ...

    def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[Listed]:
        """Objects whose name starts with `prefix` (and sorts after `after`), in name order, fetched page by page."""
        ...

    def list_folders(self, prefix: str) -> AsyncIterator[str]:
        """Names of the immediate sub-folders of `prefix` (without the prefix, without '/'), in order."""
        ...

    async def delete(self, names: Sequence[str]) -> None:
        """Delete objects; absent ones are no error."""
        ...

    async def local_path(self, name: str) -> str | None:
        """Path of a file whose first bytes are the whole object, for mmap or SQLite, or None if there is none. No request.

        Only for objects that never change. The file may be longer than the object (a cache keeps its checksums behind it)
        and may be deleted at any time: open it at once; what is open stays readable.
        """
        ...
