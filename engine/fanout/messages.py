"""What travels between the processes of a search, and how it becomes JSON and is read again.

A message comes from another process, perhaps of another release, so it is read strictly: anything else than its structure is InvalidRequest,
and numbers that do not read are refused where they are used (merge.py).
"""

from __future__ import annotations

import re
import zlib
from typing import Any, Literal

import msgspec
import numpy as np

from engine.config import SearchParams
from engine.errors import CorruptData, EngineError, InvalidRequest, LimitExceeded, NotFound, Unavailable, UnsupportedFormat
from engine.near import Bars
from engine.searcher import SearchStats

Mode = Literal["warm", "cold"]
STATE_BYTES = 256 << 10
"""Most that a Step Functions execution carries from state to state (and accepts as input), in bytes of UTF-8."""
MAX_CAUSE = 600
"""Characters of an error that travel."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what travels."""


class Job(_Message, frozen=True, kw_only=True):
    """One query over one generation of an index, for any number of shards.

    life       index_id of the manifest: an index that was deleted and made again is another one
    query      float16 or float32 (Q, dim) little-endian; float16 only if nothing is lost by it
    mode       "warm" loads segments into memory, "cold" reads of them what the query needs
    subset     ids that may be hits (packed by `pack_ids`); None allows all
    condition  what documents must meet, with its parameters; each shard asks its own segments. Not together with subset
    trace      on whose behalf, for the log lines of whoever does a step; nothing here reads it
    """

    index: str
    life: str
    generation: int
    query: bytes
    query_type: Literal["f2", "f4"]
    dim: int
    params: SearchParams
    mode: Mode
    subset: bytes | None = None
    condition: str | None = None
    parameters: list[Any] = []
    allow_partial: bool = False
    trace: dict[str, str] = {}

    def vectors(self) -> np.ndarray:
        """float32 (Q, dim)."""
        dtype = np.dtype("<" + self.query_type)
        if self.dim < 1 or len(self.query) % (self.dim * dtype.itemsize):
            raise InvalidRequest("a job's query does not have its dimension", expected=self.dim, found_bytes=len(self.query))
        query = np.frombuffer(self.query, dtype).reshape(-1, self.dim).astype(np.float32)
        if not np.isfinite(query).all():
            raise InvalidRequest("a job's query has a value that is not finite")
        return query


class Shard(_Message, frozen=True, kw_only=True):
    """Segments that one process searches, by their positions in the manifest."""

    number: int
    segments: tuple[int, ...]
    size_bytes: int


class Plan(_Message, frozen=True, kw_only=True):
    """A job and how it is cut. needs_ranking: whether `rank` comes before `score`."""

    job: Job
    shards: tuple[Shard, ...]
    needs_ranking: bool


class WireBars(_Message, frozen=True, kw_only=True):
    """Bars; None is minus infinity, which JSON cannot say."""

    approximate: float | None = None
    exact: float | None = None

    @classmethod
    def of(cls, bars: Bars) -> WireBars:
        return cls(approximate=_finite(bars.approximate), exact=_finite(bars.exact))

    def bars(self) -> Bars:
        return Bars(
            -np.inf if self.approximate is None else self.approximate,
            -np.inf if self.exact is None else self.exact,
        )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


class Ranked(_Message, frozen=True, kw_only=True):
    """A shard's Ranking: float32 little-endian both."""

    shard: int
    approximate: bytes
    exact: bytes
    stats: SearchStats


class Scored(_Message, frozen=True, kw_only=True):
    """A shard's best k: ids int64, scores float32, positions uint32 of segments, ordinals uint32, little-endian."""

    shard: int
    ids: bytes
    scores: bytes
    positions: bytes
    ordinals: bytes
    stats: SearchStats


class Failed(_Message, frozen=True, kw_only=True):
    """A shard that gave no answer: `error` is the kind (a class of engine.errors, or whatever the platform calls it), `cause` says why."""

    shard: int
    segments: tuple[int, ...] = ()
    error: str
    cause: str

    def as_error(self) -> EngineError:
        """What fails the search: the shard's own kind of failure where it is one of ours, else Unavailable (`shard-failed`)."""
        kind, code, why = heard(self.error, self.cause)
        return kind("a shard of the search failed", code=code, **{"shard": self.shard, "error": self.error, "why": why})


Outcome = Scored | Failed


class Step(_Message, frozen=True, kw_only=True):
    """One shard's share of a job. bars: with `score`, what `rank` decided."""

    do: Literal["rank", "score"]
    job: Job
    shard: Shard
    bars: WireBars | None = None


_KINDS: dict[str, type[EngineError]] = {
    kind.__name__: kind for kind in (InvalidRequest, NotFound, LimitExceeded, Unavailable, UnsupportedFormat, CorruptData)
}


def heard(error: str, cause: str) -> tuple[type[EngineError], str, str]:
    """What a failure that travelled (`told`) was: its kind, code and text. What is none of ours is Unavailable (`shard-failed`)."""
    found = re.match(r"\[([a-z-]+)\] (.*)", cause, re.DOTALL)
    kind = _KINDS.get(error)
    if kind is None:
        return Unavailable, "shard-failed", f"{error}: {cause}"[:MAX_CAUSE]
    return (kind, found[1], found[2][:MAX_CAUSE]) if found else (kind, kind.default_code, cause[:MAX_CAUSE])


def failure(shard: Shard, error: BaseException) -> Failed:
    """A failure as it travels."""
    return Failed(shard=shard.number, segments=shard.segments, error=type(error).__name__, cause=told(error))


def told(error: BaseException) -> str:
    """An error in one short line, its code in front, as Failed.as_error reads it."""
    code = f"[{error.code}] " if isinstance(error, EngineError) else ""
    return f"{code}{str(error) or type(error).__name__}"[:MAX_CAUSE]


def encode(item: object) -> bytes:
    """JSON of a structure of this file; bytes as base64."""
    return msgspec.json.encode(item)


def plain(item: object) -> Any:
    """The same as dicts, lists, strings and numbers."""
    return msgspec.json.decode(encode(item))


def read(data: bytes | Any, kind: Any) -> Any:
    """A structure from its JSON, or from what a JSON decoder made of it. InvalidRequest if it is none."""
    try:
        if isinstance(data, bytes):
            return msgspec.json.decode(data, type=kind)
        found = msgspec.convert(data, kind)
        encode(found)  # events of Lambda may hold unpaired surrogates, which can be neither stored nor sent
        return found
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidRequest("not a message of a fan-out", expected=getattr(kind, "__name__", str(kind)), found=str(error)[:200]) from error


def pack_ids(ids: np.ndarray) -> bytes:
    """Document ids, any order, as few bytes: differences of the sorted ids, deflated."""
    rising = np.unique(np.asarray(ids, np.int64))
    return zlib.compress(np.diff(rising, prepend=np.int64(0)).astype("<i8").tobytes(), 6)


def unpack_ids(data: bytes) -> np.ndarray:
    """int64, ascending."""
    try:
        return np.cumsum(np.frombuffer(zlib.decompress(data), "<i8"), dtype=np.int64)
    except (zlib.error, ValueError) as error:
        raise InvalidRequest("a job's subset cannot be read", found=str(error)) from error
