"""The kinds of failure, by what the caller does next, and their stable codes.

Every error the engine raises on purpose is one of the seven kinds below; a programming mistake stays an ordinary exception.
This module knows no HTTP: handler/problems.py maps kinds and codes to statuses.
"""

from __future__ import annotations

CODES: dict[str, str] = {
    "invalid-request": "the request can never work as it stands",
    "dimension-mismatch": "vectors have another number of dimensions than the index",
    "invalid-condition": "a filter condition does not parse or names an unknown column",
    "index-not-found": "no index of this name",
    "generation-not-found": "the generation does not exist or is no longer kept",
    "object-not-found": "an object is not in the store",
    "pin-not-found": "no pin of this name",
    "index-exists": "an index of this name exists already",
    "commit-conflict": "somebody else committed first, and retries ran out",
    "already-exists": "an object that must be new is there already",
    "limit-exceeded": "the request would pass a declared limit",
    "store-unavailable": "the object store failed or did not answer in time",
    "store-denied": "the object store refused our credentials or permissions",
    "store-unsuitable": "the object store ignores conditional writes",
    "timeout": "a deadline passed",
    "shard-failed": "a process that searched a part of the index failed or did not answer",
    "unsupported-format": "sound bytes of a format version this release cannot read",
    "checksum-mismatch": "bytes differ from what was written",
    "malformed": "bytes have the right checksum or name but an impossible content",
    "missing-object": "an object that a manifest names is gone",
}
"""Append-only; the manual (engine/README.md) lists the same codes and a test compares them."""


class EngineError(Exception):
    """Base of all deliberate failures. `code` is stable, `message` is one lower-case line, `details` are facts."""

    default_code = "invalid-request"

    def __init__(self, message: str, *, code: str | None = None, **details: object) -> None:
        self.code = code or self.default_code
        self.message = message
        self.details = details
        super().__init__(message)

    def __str__(self) -> str:
        facts = " ".join(f"{key}={value}" for key, value in self.details.items())
        return f"{self.message} {facts}" if facts else self.message


class InvalidRequest(EngineError, ValueError):
    """This request can never work: change it."""


class NotFound(EngineError, LookupError):
    """No such index, generation, pin or object: check the name."""

    default_code = "object-not-found"


class Conflict(EngineError):
    """Someone else was first: reload and repeat."""

    default_code = "commit-conflict"


class LimitExceeded(EngineError):
    """It would pass a declared limit: ask for less."""

    default_code = "limit-exceeded"


class Unavailable(EngineError):
    """The store or a deadline failed us: wait `retry_after_s`, repeat."""

    default_code = "store-unavailable"

    def __init__(self, message: str, *, code: str | None = None, retry_after_s: float = 1.0, **details: object) -> None:
        super().__init__(message, code=code, **details)
        self.retry_after_s = retry_after_s


class UnsupportedFormat(EngineError):
    """Sound bytes of a format this release cannot read: upgrade, or migrate."""

    default_code = "unsupported-format"


class CorruptData(EngineError):
    """Bytes are not what was promised: restore, page someone, never retry.

    `details` carries object (name), section, range, expected and found wherever they are known.
    """

    default_code = "checksum-mismatch"
