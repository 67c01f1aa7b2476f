"""Which wanted ranges become which GETs, and the wanted bytes back out of the answers. Pure: nothing here waits.

    plan = plan_reads(wanted, policy)
    answers = await store.get_ranges(name, plan.gets)
    views = plan.slice(answers)

On S3 a GET costs its price and about 0.1 ms of CPU, whatever its size; GETs in flight together cost little extra latency (the slowest of
them counts). So a small gap is read and thrown away, a large one is not, and a long span is cut so that its parts travel side by side.
What "small" and "long" mean is a price: `ReadPolicy.priced`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from engine.errors import InvalidRequest
from engine.store.base import Buffer, Range

KIB = 1024
MIB = 1024 * KIB
CONNECTION_BYTES_PER_S = 80e6
"""What one connection to S3 brings within a region, as published measurements put it."""


class ReadPolicy(msgspec.Struct, frozen=True):
    """What a GET is worth.

    max_gap_bytes        no larger gap is ever read through, whatever a request costs; bounds waste and memory
    request_cost_bytes   unwanted bytes that cost as much as one more GET; a gap up to this is read through. 256 KiB: a GET
                         costs what a 2 GB Lambda costs in 12 ms, in which one connection at 80 MB/s brings 1 MiB; a
                         quarter of that, because those bytes are also held in memory and in the cache
    max_get_bytes        longer spans become several GETs: one connection to S3 brings about 80 MB/s, several bring more
    max_gets             if set, never more GETs than this; it overrules the other three
    """

    max_gap_bytes: int = MIB
    request_cost_bytes: int = 256 * KIB
    max_get_bytes: int = 8 * MIB
    max_gets: int | None = None

    def __post_init__(self) -> None:
        if self.max_gap_bytes < 0 or self.request_cost_bytes < 0:
            raise InvalidRequest("gaps and costs are not negative", policy=self)
        if self.max_get_bytes < 1 or (self.max_gets is not None and self.max_gets < 1):
            raise InvalidRequest("a plan needs at least one byte per GET and one GET", policy=self)

    @classmethod
    def priced(
        cls,
        *,
        usd_per_get: float,
        usd_per_s: float,
        bytes_per_s: float = CONNECTION_BYTES_PER_S,
        max_gets: int | None = None,
    ) -> ReadPolicy:
        """The policy of a process that pays `usd_per_s` while it waits (its memory times the price of a GB-second; engine/cost.py).

        A gap of g bytes keeps the process g / bytes_per_s longer, a GET costs its price: they are equal at usd_per_get / usd_per_s ·
        bytes_per_s bytes. A span of n bytes in two GETs arrives n / 2 / bytes_per_s earlier for one more price, which pays above twice
        that; the bound is twice as high again, because one more GET is one more chance of a slow one.
        """
        if usd_per_get < 0 or usd_per_s <= 0 or bytes_per_s <= 0:
            raise InvalidRequest("a second and a byte have a price", usd_per_get=usd_per_get, usd_per_s=usd_per_s, bytes_per_s=bytes_per_s)
        equal = int(usd_per_get / usd_per_s * bytes_per_s)
        return cls(max_gap_bytes=max(equal, MIB), request_cost_bytes=equal, max_get_bytes=max(4 * equal, MIB), max_gets=max_gets)

    def cost_bytes(self, gets: Iterable[Range]) -> int:
        """What some GETs cost, in bytes: those they bring, and request_cost_bytes each."""
        return sum(end - start + self.request_cost_bytes for start, end in gets)


DEFAULT_POLICY = ReadPolicy()


class ReadPlan(msgspec.Struct, frozen=True):
    """`gets` are ascending, never empty, never overlap, and together cover every wanted range."""

    wanted: tuple[Range, ...]
    gets: tuple[Range, ...]

    @property
    def n_bytes(self) -> int:
        return sum(end - start for start, end in self.gets)

    def slice(self, answers: Sequence[Buffer]) -> list[Buffer]:
        """The bytes of each wanted range, in the order wanted, from one answer per GET.

        Views of the answers, so they keep the whole answer in memory; copies only where a wanted range was cut into several GETs.
        """
        starts = [start for start, _ in self.gets]
        return [self._cut(wanted, starts, answers) for wanted in self.wanted]

    def _cut(self, wanted: Range, starts: list[int], answers: Sequence[Buffer]) -> Buffer:
        start, end = wanted
        if start == end:
            return b""
        first = bisect_right(starts, start) - 1
        if end <= self.gets[first][1]:
            return _part(answers[first], start - starts[first], end - starts[first])
        last = bisect_right(starts, end - 1) - 1
        pieces = (_part(answers[i], max(start - starts[i], 0), min(end, self.gets[i][1]) - starts[i]) for i in range(first, last + 1))
        return b"".join(pieces)


def plan_reads(wanted: Iterable[Range], policy: ReadPolicy = DEFAULT_POLICY) -> ReadPlan:
    """Cover the wanted ranges (any order, overlapping, empty allowed) with GETs.

    A GET ends where a wanted range ends wherever that is possible; only a single range (or overlapping ones) longer than
    max_get_bytes is cut inside. Cost: n log n for n ranges, about 1 us each.
    Raises InvalidRequest for a range that is not 0 <= start <= end.
    """
    wanted = tuple(wanted)
    for start, end in wanted:
        if not 0 <= start <= end:
            raise InvalidRequest("a range is 0 <= start <= end", start=start, end=end)
    spans = _join_neighbours(_join_overlapping(wanted), policy)
    if policy.max_gets is not None:
        spans = _close_smallest_gaps(spans, policy.max_gets)
    return ReadPlan(wanted, tuple(_split_long(spans, policy)))


def _join_overlapping(wanted: Iterable[Range]) -> list[Range]:
    """Ascending; ranges that only touch stay apart, so that a later cut can fall between them."""
    joined: list[Range] = []
    for start, end in sorted(wanted):
        if start == end:
            continue
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _join_neighbours(spans: list[Range], policy: ReadPolicy) -> list[Range]:
    """Read through a gap that costs no more than the GET it saves, while the GET stays within max_get_bytes."""
    gap_worth_reading = min(policy.max_gap_bytes, policy.request_cost_bytes)
    joined: list[Range] = []
    for start, end in spans:
        if joined and start - joined[-1][1] <= gap_worth_reading and end - joined[-1][0] <= policy.max_get_bytes:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _close_smallest_gaps(spans: list[Range], max_gets: int) -> list[Range]:
    n_surplus = len(spans) - max_gets
    if n_surplus <= 0:
        return spans
    gaps = [after[0] - before[1] for before, after in pairwise(spans)]
    closed = set(sorted(range(len(gaps)), key=gaps.__getitem__)[:n_surplus])
    kept = [spans[0]]
    for i, (start, end) in enumerate(spans[1:]):
        if i in closed:
            kept[-1] = (kept[-1][0], end)
        else:
            kept.append((start, end))
    return kept


def _split_long(spans: list[Range], policy: ReadPolicy) -> list[Range]:
    """Cut spans longer than max_get_bytes into equal parts, as far as max_gets leaves room."""
    spare = None if policy.max_gets is None else policy.max_gets - len(spans)
    parts: list[Range] = []
    for start, end in spans:
        n_parts = -(-(end - start) // policy.max_get_bytes)
        if spare is not None:
            n_parts = min(n_parts, spare + 1)
            spare -= n_parts - 1
        size = -(-(end - start) // n_parts)
        parts += [(cut, min(cut + size, end)) for cut in range(start, end, size)]
    return parts


def _part(answer: Buffer, start: int, end: int) -> Buffer:
    return answer if start == 0 and end == len(answer) else memoryview(answer)[start:end]
