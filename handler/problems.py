"""Failures on the wire: one table from the engine's codes to NextPlaid's codes and HTTP statuses, one shape for every error body.

Every error answer is `{"code", "message"}` (RATE_LIMITED adds `retry_after_seconds`), whatever went wrong and wherever. A client's
library decides by these codes, so INDEX_NOT_FOUND carries the index name alone and no other 404 says "not found". Nothing else maps errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import msgspec

from engine.errors import (
    Conflict,
    CorruptData,
    EngineError,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Unavailable,
    UnsupportedFormat,
)

STATUSES: dict[str, int] = {
    "BAD_REQUEST": 400,
    "DIMENSION_MISMATCH": 400,
    "MODEL_NOT_LOADED": 400,
    "UNAUTHORIZED": 401,
    "FORBIDDEN": 403,
    "READ_ONLY": 403,
    "INDEX_NOT_FOUND": 404,
    "INDEX_NOT_DECLARED": 404,
    "METADATA_NOT_FOUND": 404,
    "GENERATION_NOT_FOUND": 404,
    "PIN_NOT_FOUND": 404,
    "ALIAS_NOT_FOUND": 404,
    "UPLOAD_NOT_FOUND": 404,
    "NO_SUCH_ROUTE": 404,
    "METHOD_NOT_ALLOWED": 405,
    "TIMEOUT": 408,
    "INDEX_ALREADY_EXISTS": 409,
    "CONFLICT": 409,
    "PAYLOAD_TOO_LARGE": 413,
    "UNSUPPORTED_MEDIA_TYPE": 415,
    "UNPROCESSABLE": 422,
    "RATE_LIMITED": 429,
    "INTERNAL_ERROR": 500,
    "MODEL_ERROR": 500,
    "CORRUPT_DATA": 500,
    "UNSUPPORTED_FORMAT": 500,
    "SERVICE_UNAVAILABLE": 503,
}
"""Every code that an answer of ours can carry, and its status. Append-only; the OpenAPI document is written from it."""

_WIRE_CODES: dict[str, str] = {
    "dimension-mismatch": "DIMENSION_MISMATCH",
    "index-not-found": "INDEX_NOT_FOUND",
    "generation-not-found": "GENERATION_NOT_FOUND",
    "pin-not-found": "PIN_NOT_FOUND",
    "index-exists": "INDEX_ALREADY_EXISTS",
}
"""Engine codes with a code of their own on the wire; the others go by their kind."""

_WIRE_KINDS: tuple[tuple[type[EngineError], str], ...] = (
    (InvalidRequest, "BAD_REQUEST"),
    (NotFound, "CORRUPT_DATA"),  # an object that should be there; names of users' things have codes of their own above
    (Conflict, "CONFLICT"),
    (LimitExceeded, "PAYLOAD_TOO_LARGE"),
    (Unavailable, "SERVICE_UNAVAILABLE"),
    (UnsupportedFormat, "UNSUPPORTED_FORMAT"),
    (CorruptData, "CORRUPT_DATA"),
)

_INWARD = frozenset(("cause", "model", "peer", "machine", "url", "root", "folder", "file", "profile"))
"""Details that name servers, addresses, folders and what they said: for the log, which has all of them, and not for clients."""

RATE_LIMIT_RETRY_S = 2
"""NextPlaid's Retry-After on 429."""


class Problem(Exception):
    """An answer that is an error. `code` is a key of STATUSES; `headers` go out with it."""

    def __init__(self, code: str, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        self.code = code
        self.status = STATUSES[code]
        self.message = message
        self.headers = dict(headers or {})
        super().__init__(f"{code}: {message}")

    def body(self) -> bytes:
        """The JSON object of API.md 1.2."""
        content: dict[str, object] = {"code": self.code, "message": self.message}
        if self.code == "RATE_LIMITED":
            content["retry_after_seconds"] = RATE_LIMIT_RETRY_S
        try:
            return msgspec.json.encode(content)
        except UnicodeEncodeError:  # an unpaired surrogate that came with a name: JSON of Lambda's events may hold one
            return msgspec.json.encode(content | {"message": self.message.encode(errors="replace").decode()})


def bad_request(message: str) -> Problem:
    """400: the request can never work."""
    return Problem("BAD_REQUEST", message)


def index_not_found(name: str) -> Problem:
    """404 as the clients know it: the message is the name and nothing else."""
    return Problem("INDEX_NOT_FOUND", name)


def index_not_declared(name: str) -> Problem:
    """404 for an add to an index that nobody declared."""
    return Problem("INDEX_NOT_DECLARED", f"index '{name}' is not declared; create it with POST /indices before adding documents")


def metadata_not_found(name: str) -> Problem:
    return Problem("METADATA_NOT_FOUND", name)


def model_not_loaded() -> Problem:
    return Problem("MODEL_NOT_LOADED", "no model is loaded: start the server with --model (TARTAN_MODEL), or send embeddings")


def unavailable(message: str, retry_after_s: float = 1.0) -> Problem:
    """503 with Retry-After in whole seconds, at least one."""
    return Problem("SERVICE_UNAVAILABLE", message, headers={"Retry-After": str(max(1, math.ceil(retry_after_s)))})


def read_only() -> Problem:
    """403 from a server whose settings make it a replica that only searches."""
    return Problem("READ_ONLY", "this server only reads: send changes to one that may write")


def problem_of(error: BaseException, *, index: str | None = None) -> Problem:
    """The answer for anything that was raised. Programming mistakes become a 500 that says nothing about the inside."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, TimeoutError):
        return Problem("TIMEOUT", "the request took longer than the server allows")
    if not isinstance(error, EngineError):
        return Problem("INTERNAL_ERROR", "the server failed; the request id is in its log")
    code = _WIRE_CODES.get(error.code) or next(code for kind, code in _WIRE_KINDS if isinstance(error, kind))
    if code in ("INDEX_NOT_FOUND", "INDEX_ALREADY_EXISTS"):
        return Problem(code, str(error.details.get("index", index or "")))
    if error.code == "store-denied" and error.details.get("refused") == "write":
        return Problem("READ_ONLY", "the object store lets this server read and not write: send changes to one that may write")
    if isinstance(error, Unavailable):
        return unavailable(shown(error), error.retry_after_s)
    return Problem(code, shown(error))


def outward(text: str) -> str:
    """An error that came as text from another process, without the details that are not for clients and what follows them."""
    return re.sub(rf" (?:{'|'.join(sorted(_INWARD | {'why'}))})=.*", "", text, flags=re.DOTALL)


def shown(error: EngineError) -> str:
    """The error as clients may read it."""
    hidden = _INWARD | {"why"} if isinstance(error, Unavailable) else _INWARD
    facts = "".join(f" {key}={value}" for key, value in error.details.items() if key not in hidden)
    return error.message + facts
