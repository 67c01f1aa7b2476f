"""The blob of one document: its key and its fields, msgpack [key or nil, fields or nil]; no bytes at all if it has neither."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from engine.errors import InvalidRequest
from engine.format.envelope import DECODE_ERRORS, Buffer, corrupt

MAX_FIELDS_BYTES = 16 << 20
"""Of one document. An answer carries the fields of its hits, so this is already far more than anybody should want."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[str | None, dict[str, Any] | None])


def encode_fields(key: str | None, fields: Mapping[str, Any] | None) -> bytes:
    """The blob of a document.

    key     the caller's own name of the document, if it has one
    fields  JSON values by name, if any; an empty mapping stays an empty mapping

    Raises InvalidRequest if a value is none of JSON's, or the blob would pass MAX_FIELDS_BYTES.
    """
    if key is None and fields is None:
        return b""
    try:
        blob = _encoder.encode((key, fields))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequest("fields of a document cannot be stored", reason=error) from error
    if len(blob) > MAX_FIELDS_BYTES:
        raise InvalidRequest("fields of a document are too large", limit_bytes=MAX_FIELDS_BYTES, found=len(blob))
    return blob


def decode_fields(blob: Buffer, *, name: str, section: int) -> tuple[str | None, dict[str, Any] | None]:
    """The key and the fields of a document; CorruptData if the blob is not such a pair."""
    if not len(blob):
        return None, None
    try:
        return _decoder.decode(blob)
    except DECODE_ERRORS as error:
        raise corrupt("fields of a document do not decode", name=name, section=section, expected="[key, fields]", found=error) from error
