"""The patch object: changed metadata rows of one segment. Body: msgpack {ordinal: {column: value}}, values as JSON has them.

Patches of a segment apply in the manifest's order; a later value of the same column of the same document wins; compaction folds them in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from engine.errors import InvalidRequest
from engine.format.envelope import Buffer, Kind, Section, build_body, checksum, corrupt, parse_body
from engine.format.manifest import ObjectRef

_Rows = dict[Annotated[int, msgspec.Meta(ge=0)], dict[str, Any]]


def write_patch(rows: Mapping[int, Mapping[str, Any]], patch_id: str, *, home: str = "") -> tuple[bytes, ObjectRef]:
    """The object and its reference. Raises InvalidRequest if a value is none of JSON's."""
    try:
        data = build_body(Kind.PATCH, dict(rows))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequest("metadata cannot be stored", reason=error) from error
    return data, ObjectRef(id=patch_id, home=home, size_bytes=len(data), checksum=checksum(data))


def read_patch(data: Buffer, ref: ObjectRef, n_documents: int, *, name: str) -> dict[int, dict[str, Any]]:
    """Changed columns by ordinal. Raises CorruptData or UnsupportedFormat."""
    rows: dict[int, dict[str, Any]] = parse_body(Kind.PATCH, data, _Rows, name=name)
    found = checksum(memoryview(data))
    if found != ref.checksum:
        raise corrupt("not the patch that the manifest names", name=name, expected=ref.checksum, found=found, code="checksum-mismatch")
    if max(rows, default=0) >= n_documents:
        raise corrupt("a patch beyond the last document", name=name, section=Section.BODY, expected=n_documents, found=max(rows))
    return rows
