"""Copying the objects of some generations from one store to another, or within one, under another index's prefix.

Every object is checked against the manifest before it is written and read back afterwards. What the target holds already is not copied
again: taken as it is if the caller trusts it (an earlier copy put it there and checked it), else read and checked, and replaced if it is
damaged. Nothing here makes a generation visible; backup.py does, when all of this is done.

Objects pass through this process: stores of different kinds and accounts have no other way to one another.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from engine.errors import CorruptData, NotFound
from engine.format import names
from engine.format.envelope import checksum
from engine.format.manifest import Manifest
from engine.index.parts import missing
from engine.index.references import standalone
from engine.index.verify import Expected, expected_objects
from engine.store.base import ObjectStore

Progress = Callable[[str, int, int], None]
N_AT_ONCE = 16
MAX_BYTES_IN_FLIGHT = 512 << 20
"""Held at once: two of the largest segments that compaction makes, each as it was read and as it was read back; or many small ones."""
_MB = 1_000_000


@dataclass
class Copied:
    """What a copy took. n_present were there already; n_repaired of them were damaged and have been replaced."""

    n_objects: int = 0
    n_copied: int = 0
    n_present: int = 0
    n_repaired: int = 0
    bytes_copied: int = 0
    bytes_checked: int = 0


@dataclass(frozen=True)
class _Job:
    """An object under its name in the source, and what the target wants."""

    source_name: str
    expected: Expected


class Copier:
    """The way from `index` in one store to `name` in another."""

    def __init__(self, source: ObjectStore, index: str, target: ObjectStore, name: str, progress: Progress | None = None) -> None:
        self._source, self._index, self._target, self._name = source, index, target, name
        self._progress = progress or (lambda *_: None)
        self._room = _Room(MAX_BYTES_IN_FLIGHT)
        self._done_bytes = self._all_bytes = 0
        self.copied = Copied()

    async def run(self, manifests: Iterable[Manifest], trusted: Collection[str] = ()) -> None:
        """Bring everything that these generations of the source name into the target.

        trusted  names in the target that need no checking if they are there
        Raises CorruptData, naming the object, if the source is damaged or the target gives back other bytes; what was copied till then stays.
        """
        jobs = list(self._jobs(manifests))
        present = {listed.name: listed.size_bytes async for listed in self._target.list(names.of_index(self._name))}
        self.copied.n_objects = len(jobs)
        there = [job for job in jobs if job.expected.name in present]
        to_check = [job for job in there if job.expected.name not in trusted or present[job.expected.name] != job.expected.size_bytes]
        absent = [job for job in jobs if job.expected.name not in present]
        self.copied.n_present += len(there)
        self._all_bytes += sum(job.expected.size_bytes for job in to_check + absent)
        await _all(N_AT_ONCE, [self._check_or_replace(job) for job in to_check] + [self._copy(job) for job in absent])

    async def lacking(self, manifests: Iterable[Manifest]) -> list[str]:
        """Names that the target does not hold, in the right size, at this moment. One listing."""
        present = {listed.name: listed.size_bytes async for listed in self._target.list(names.of_index(self._name))}
        wanted = [job.expected for job in self._jobs(manifests)]
        return [expected.name for expected in wanted if present.get(expected.name) != expected.size_bytes]

    def _jobs(self, manifests: Iterable[Manifest]) -> Iterator[_Job]:
        """Each object once."""
        seen: set[str] = set()
        for manifest in manifests:
            sources = expected_objects(manifest, self._index)
            for source, expected in zip(sources, expected_objects(standalone(manifest), self._name), strict=True):
                if expected.name not in seen:
                    seen.add(expected.name)
                    yield _Job(source.name, expected)

    async def _copy(self, job: _Job) -> None:
        expected = job.expected
        async with self._room.taken(2 * expected.size_bytes):
            try:
                data = (await self._source.get(job.source_name)).data
            except NotFound as error:
                raise missing(job.source_name) from error
            await asyncio.to_thread(expected.verify, data)
            await self._target.put_if_absent(expected.name, data)
            back = (await self._target.get(expected.name)).data
            if checksum(memoryview(back)) != checksum(memoryview(data)):
                raise CorruptData("the store gives back other bytes than were written", object=expected.name)
        self.copied.n_copied += 1
        self.copied.bytes_copied += expected.size_bytes
        self._advance(expected.size_bytes)

    async def _check_or_replace(self, job: _Job) -> None:
        expected = job.expected
        try:
            async with self._room.taken(expected.size_bytes):
                await asyncio.to_thread(expected.verify, (await self._target.get(expected.name)).data)
        except (CorruptData, NotFound):
            await self._target.delete([expected.name])
            self.copied.n_present -= 1
            self.copied.n_repaired += 1
            return await self._copy(job)
        self.copied.bytes_checked += expected.size_bytes
        self._advance(expected.size_bytes)

    def _advance(self, n_bytes: int) -> None:
        self._done_bytes += n_bytes
        self._progress("copy", self._done_bytes // _MB, self._all_bytes // _MB)


class _Room:
    """Bytes that may be held at once; who wants more than there are in all waits until he is alone."""

    def __init__(self, n_bytes: int) -> None:
        self._all = self._free = n_bytes
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def taken(self, n_bytes: int) -> AsyncIterator[None]:
        n_bytes = min(n_bytes, self._all)
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= n_bytes)
            self._free -= n_bytes
        try:
            yield
        finally:
            async with self._changed:
                self._free += n_bytes
                self._changed.notify_all()


async def _all(n_at_once: int, work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Do all of it, so many at a time. After a failure nothing more is begun, and what is under way ends before this does: a write that was
    merely cancelled may still reach the store, behind the back of a caller who cleans up."""
    queue = iter(work)

    async def worker() -> None:
        for one in queue:
            try:
                await one
            except BaseException:
                for left in queue:
                    left.close()
                raise

    outcomes = await asyncio.gather(*(worker() for _ in range(min(n_at_once, len(work)))), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
