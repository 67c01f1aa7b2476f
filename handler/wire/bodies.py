"""Structures out of JSON and into it: one place that says what is 400 and what 422."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from engine.errors import InvalidRequest
from handler.problems import Problem, bad_request

T = TypeVar("T")


def read_body(body: bytes | bytearray, kind: type[T]) -> T:
    """A request out of its JSON. Problem BAD_REQUEST (400) if it is no JSON, UNPROCESSABLE (422) if it has the wrong shape."""
    try:
        try:
            return msgspec.json.decode(body, type=kind, strict=True)
        except msgspec.ValidationError as error:
            if not str(error).startswith(_BAD_BASE64):
                raise
            return msgspec.convert(_without_bad_base64(msgspec.json.decode(body)), kind, strict=True)
    except msgspec.ValidationError as error:
        raise Problem("UNPROCESSABLE", f"the body does not fit: {error}") from error
    except InvalidRequest as error:
        raise bad_request(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem("BAD_REQUEST", f"the body is no JSON: {error}") from error


_BAD_BASE64 = "Invalid base64"


def _without_bad_base64(body: Any) -> Any:
    """The body with texts that are no base64 emptied. No shape fits nothing, so `matrix` refuses them where API.md has vectors checked,
    and ignores them where they are not used."""
    if isinstance(body, dict):
        for holder in (body, *_dicts_in(body.get("documents")), *_dicts_in(body.get("queries"))):
            for name in ("embeddings_b64", "query_b64"):
                if isinstance(holder.get(name), str) and not _is_base64(holder[name]):
                    holder[name] = ""
    return body


def _dicts_in(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _is_base64(text: str) -> bool:
    try:
        msgspec.convert(text, bytes)
    except msgspec.ValidationError:
        return False
    return True


_encoder = msgspec.json.Encoder(decimal_format="number")


def encode(answer: object) -> bytes:
    """JSON of an answer."""
    return _encoder.encode(answer)
