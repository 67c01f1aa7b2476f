"""Access control: who may call what. Off until keys are configured.

A key is 32 random bytes, so its sha256 is enough at rest: a slow hash protects secrets that people choose, and nobody searches 2^256 keys.
What is stored is a record (id, sha256, scopes, index pattern, note); the key itself is shown once, when minted, and never logged.
Scopes do not imply one another: a key that writes and searches has both.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from handler.problems import Problem

Scope = Literal["search", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("search", "write", "admin")
_PREFIX = "tartan_"
_SECRET_BYTES = 32


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the server keeps of a key. `indices` is a glob over index names, matched with case."""

    id: str
    sha256: str
    scopes: tuple[Scope, ...]
    indices: str = "*"
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or not set(self.sha256) <= set("0123456789abcdef"):
            raise ValueError("sha256 is 64 lower-case hexadecimal digits")

    def may_see(self, index: str) -> bool:
        return fnmatch.fnmatchcase(index, self.indices)


def mint_key(scopes: Sequence[Scope], *, indices: str = "*", note: str = "") -> tuple[str, KeyRecord]:
    """A new key and the record to configure the server with. Only the caller ever sees the key."""
    wrong = set(scopes) - set(SCOPES)
    if wrong or not scopes:
        raise ValueError(f"scopes are some of {', '.join(SCOPES)}")
    secret = base64.urlsafe_b64encode(secrets.token_bytes(_SECRET_BYTES)).decode().rstrip("=")
    key = _PREFIX + secret
    record = KeyRecord(id=secrets.token_hex(4), sha256=digest(key), scopes=tuple(scopes), indices=indices, note=note)
    return key, record


def digest(key: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def parse_records(text: str) -> tuple[KeyRecord, ...]:
    """Key records from the JSON list that a setting or a file holds; ValueError if it is anything else. Blank means none."""
    if not text.strip():
        return ()
    try:
        records = msgspec.json.decode(text, type=tuple[KeyRecord, ...], strict=True)
    except msgspec.MsgspecError as error:
        raise ValueError(f"the API keys are no list of key records: {error}") from error
    if len({record.id for record in records}) != len(records):
        raise ValueError("two API keys have the same id")
    return records


class Gate:
    """Decides for each request. Without records everything is open.

    `open_areas` are the areas ("health", "docs", "metrics") that need no key even when keys are configured.
    """

    def __init__(self, records: Sequence[KeyRecord], open_areas: frozenset[str]) -> None:
        self._records = tuple(records)
        self._open_areas = open_areas | {"probe"}  # liveness and readiness: a balancer has no key

    @property
    def is_open(self) -> bool:
        return not self._records

    def caller(self, headers: Mapping[str, str]) -> KeyRecord | None:
        """The record of the key that came with a request, None if none came. Problem UNAUTHORIZED if an unknown one came.

        Every record is compared, each in constant time, so that the time says nothing about which one was nearly right.
        """
        key = _key_in(headers)
        if key is None:
            return None
        presented = digest(key).encode()
        found: KeyRecord | None = None
        for record in self._records:
            if hmac.compare_digest(presented, record.sha256.encode()):
                found = record
        if found is None:
            raise _unauthorized("the API key is not valid")
        return found

    def admit(self, headers: Mapping[str, str], scope: Scope | None, *, area: str = "", index: str | None = None) -> KeyRecord | None:
        """The caller if it may pass, None if no key was needed and none came.

        scope None  nothing beyond a valid key is asked; an open area asks for no key at all
        Raises Problem UNAUTHORIZED without a valid key, FORBIDDEN where the key does not reach.
        """
        if self.is_open:
            return None
        caller = self.caller(headers)
        if area in self._open_areas:
            return caller
        if caller is None:
            raise _unauthorized("an API key is needed: send it as 'Authorization: Bearer' or 'X-API-Key'")
        if scope is not None and scope not in caller.scopes:
            raise Problem("FORBIDDEN", f"the API key lacks the scope '{scope}'")
        if index is not None:
            self.admit_index(caller, index)
        return caller

    def admit_index(self, caller: KeyRecord | None, index: str) -> None:
        """Check the index pattern for a name that came in a body."""
        if caller is not None and not caller.may_see(index):
            raise Problem("FORBIDDEN", "the API key does not reach this index")

    def visible(self, caller: KeyRecord | None, names: Sequence[str]) -> list[str]:
        """Those of `names` that a caller may know of: all while access control is off, none without a key."""
        if self.is_open:
            return list(names)
        return [name for name in names if caller is not None and caller.may_see(name)]


def _key_in(headers: Mapping[str, str]) -> str | None:
    authorization = headers.get("authorization")
    if authorization is not None:
        kind, _, key = authorization.partition(" ")
        if kind.lower() == "bearer" and key.strip():
            return key.strip()
    return headers.get("x-api-key") or None


def _unauthorized(message: str) -> Problem:
    return Problem("UNAUTHORIZED", message, headers={"WWW-Authenticate": "Bearer"})
