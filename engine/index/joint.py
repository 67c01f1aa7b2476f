"""A bulk build by many processes: one prepares, each input is a share that any process may build, one commits.

    prepare   a codec for all shares, and what the build consists of, as the build's first progress record
    share     one input to quantised segments, resumable; records of its own, the last of which says that the input is done
    finish    one commit of all segments, in the order of the inputs; then the records go, the first one first

Everything may happen twice, at the same time, or half: records are written once, whoever comes second goes on from what it finds, and what nobody names is
garbage. Nothing is visible before the commit. Running a build again goes on where it was. It rests on bulk.py, whose states and records it shares:

    builds/{build}/00000000                   codec, columns, the plan (as the record's `source`)
    builds/{build}/{part}                     says that the build was taken up once more: by `resumed` or `finish`
    builds/{build}-{begun}-{number}/{part}    segments of input `number`; a record without segment and codec is the end of the input

`begun` is a digest of the first record. A process that is late may note a segment after the build was given up or forgotten by garbage collection, and prepared
again: that segment belongs to another codec, and is nobody's. A share whose last segment is noted needs no more; who takes up all of them, whose last progress
may be a week old, races with a sweep as bulk.py does: write a record, which makes the build young, then look whether it is doomed already.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from engine.codec.residual import Codec
from engine.config import MaintenanceParams
from engine.errors import Conflict, CorruptData, InvalidRequest, NotFound, Unavailable
from engine.format import names
from engine.format.manifest import CodecRef, Column, Manifest
from engine.format.markers import BuildProgress, read_marker
from engine.index.build import Part, column_pairs, column_refs
from engine.index.bulk import Block, BuildReport, BulkBuild, Progress, Source, _State, follows
from engine.index.commit import load_head
from engine.index.reader import Reader
from engine.index.snapshots import archived, manifest_at
from engine.index.sweep import doomed_by_sweeps
from engine.metadata import schema
from engine.store.base import Buffer, ObjectStore

MAX_INPUTS = 20_000
"""Of one build: their numbers must fit what a state machine carries."""
MAX_TURNS = 50
"""How often a share gives way to another process that builds the same input before it gives up."""
_READS = 32


@dataclass(frozen=True)
class Prepared:
    """A build that shares may join. begun: of this preparation, of the same build another has another; plan: as it was given to `prepare`."""

    build: str
    begun: str
    plan: str
    codec: CodecRef
    columns: tuple[Column, ...]
    life: str


@dataclass(frozen=True)
class ShareReport:
    """How far one input is. is_over: the build is committed (or unknown), so there is nothing to do."""

    number: int
    n_documents: int = 0
    n_tokens: int = 0
    n_segments: int = 0
    is_done: bool = False
    is_over: bool = False


@dataclass(frozen=True)
class BuildStatus:
    """A build under way: its shares that have begun, and whether its documents are committed already."""

    build: str
    plan: str
    created_s: float
    shares: tuple[ShareReport, ...]
    is_committed: bool

    @property
    def n_documents(self) -> int:
        return sum(share.n_documents for share in self.shares)

    @property
    def n_done(self) -> int:
        return sum(share.is_done for share in self.shares)


class _Paused(Exception):
    """The time is up; a segment has just been noted."""


# Preparing


async def prepare(
    reader: Reader,
    index: str,
    plan: str,
    sampled: Source,
    *,
    columns: Sequence[Column] = (),
    rows: Sequence[dict[str, object]] = (),
    params: MaintenanceParams | None = None,
    n_threads: int = 1,
    progress: Progress | None = None,
) -> Prepared:
    """Choose or train the codec, and write down what the build consists of. Again with the same plan: what is written already.

    plan     any text that says all inputs and settings; the same text is the same build
    sampled  gives the sample and the number of tokens of all inputs; its blocks are not asked for
    columns  that the index is to have; then the types of others come from `rows`, the fields of some documents. A column that neither
             brings gets its type in each share by itself, and `finish` refuses shares that do not agree
    """
    with suppress(NotFound):
        return await resumed(reader, index, plan)
    head = await reader.head(index)
    build = build_id(index, head.manifest.index_id, plan)
    work = _Preparation(reader, index, _Planned(sampled, plan), params=params, n_threads=n_threads, progress=progress)
    await work.write(build, head.manifest, columns, rows)
    return await prepared(reader, index, build)


def build_id(index: str, life: str, plan: str) -> str:
    """Of an index that was deleted and made again nothing is resumed."""
    return xxhash.xxh3_128_hexdigest(f"{index}\n{life}\n{plan}".encode())


async def prepared(reader: Reader, index: str, build: str) -> Prepared:
    """What `prepare` wrote. NotFound if there is no such build, or it is over."""
    name = names.build(index, build, 0)
    data = (await reader.store.get(name)).data
    record = read_marker(data, BuildProgress, name=name)
    if record.codec is None:
        raise NotFound("not a build of several inputs", object=name)
    life = (await reader.head(index)).manifest.index_id
    return Prepared(build, _begun(data), record.source, record.codec, record.columns, life)


async def is_prepared(reader: Reader, index: str, build: str) -> bool:
    """Whether `prepared` would find it."""
    try:
        await prepared(reader, index, build)
    except NotFound:
        return False
    return True


def _begun(first_record: Buffer) -> str:
    return xxhash.xxh3_64_hexdigest(first_record)


async def resumed(reader: Reader, index: str, plan: str) -> Prepared:
    """What `prepare` wrote for this plan earlier; for a week from now on garbage collection keeps it. NotFound if there is no such build, Conflict
    while it is being forgotten. Cost: eight requests, and a GET for each time before."""
    life = (await reader.head(index)).manifest.index_id
    found = await prepared(reader, index, build_id(index, life, plan))
    await _Joined(reader, index, _Nothing()).take_up(found.build)
    return found


class _Planned:
    """The sampled source with the plan in place of its fingerprint: that is what the first record keeps."""

    def __init__(self, sampled: Source, plan: str) -> None:
        self.fingerprint, self.n_documents, self.n_tokens, self.sample = plan, sampled.n_documents, sampled.n_tokens, sampled.sample

    def blocks(self, first_document: int) -> Iterator[Block]:
        raise AssertionError("a build of several inputs is prepared from a sample")


class _Preparation(BulkBuild):
    async def write(self, build: str, manifest: Manifest, columns: Sequence[Column], rows: Sequence[dict[str, object]]) -> None:
        self.build_id = build
        self._check_dimension(manifest)
        pairs = schema.adopt(column_pairs(manifest.columns), column_pairs(columns))
        if pairs is None:
            raise InvalidRequest("the index has a column of this name with another type", columns=[column.name for column in columns])
        self.state.columns = column_refs(schema.extend(pairs, rows).columns)
        with suppress(Conflict):  # another process prepared the same build; its codec is as good
            await self._codec(manifest)


# One share


async def build_share(
    reader: Reader,
    index: str,
    build: str,
    number: int,
    source: Source,
    *,
    params: MaintenanceParams | None = None,
    n_threads: int = 1,
    progress: Progress | None = None,
    stop_s: float | None = None,
) -> ShareReport:
    """Build input `number`, from where its records say, to its end or until a segment ends after `stop_s` (monotonic).

    Raises InvalidRequest for documents that cannot be indexed; NotFound if the build is unknown or over.
    """
    for _ in range(MAX_TURNS):
        share = _Share(reader, index, source, params=params, n_threads=n_threads, progress=progress)
        try:
            return await share.go_on(build, number, stop_s)
        except Conflict:  # somebody else builds the same input and was first to note a segment: go on behind it
            await prepared(reader, index, build)
        except CorruptData:  # the codec of a build that was forgotten meanwhile is gone, too
            await prepared(reader, index, build)
            raise
    raise Conflict("another process builds the same input, and is faster each time", index=index, build=build, input=number)


class _Share(BulkBuild):
    _stop_s: float | None = None

    async def go_on(self, build: str, number: int, stop_s: float | None) -> ShareReport:
        plan = await self._join(build, number)
        self._stop_s = stop_s
        is_done = _has_end(self.state)
        if not is_done:
            manifest = (await self.reader.head(self.index)).manifest
            if manifest.index_id != plan.life:
                raise InvalidRequest("the index was deleted and made again meanwhile", index=self.index)
            try:
                await self._build_segments(await self._codec(manifest), manifest)
                await self._note([])
                is_done = True
            except _Paused:
                pass
        return _report(number, self.state, is_done)

    async def _join(self, build: str, number: int) -> Prepared:
        plan = await prepared(self.reader, self.index, build)
        self.build_id = share_id(build, plan.begun, number)
        for _ in range(2):  # a listing may miss a record that another process is just writing, but not twice
            self.state = _State(plan.codec, columns=plan.columns)
            if await self._load_progress():
                return plan
        await self._begin_anew(_State(plan.codec, columns=plan.columns))  # a sweep that died has forgotten some of the records
        return plan

    async def _finish_segment(self, codec: Codec, manifest: Manifest, waiting: list[Part]) -> None:
        await super()._finish_segment(codec, manifest, waiting)
        if self._stop_s is not None and self.reader.clock.monotonic_s() > self._stop_s:
            raise _Paused


def share_id(build: str, begun: str, number: int) -> str:
    return f"{build}-{begun}-{number:06d}"


def _has_end(state: _State) -> bool:
    """Whether a share's last record is the end of its input: every other record brought a segment."""
    return state.n_parts == len(state.segments) + 1


def _report(number: int, state: _State, is_done: bool) -> ShareReport:
    n_tokens = sum(segment.n_tokens for segment in state.segments)
    return ShareReport(number, state.n_documents, n_tokens, len(state.segments), is_done)


# All of them


async def finish(reader: Reader, index: str, build: str, n_inputs: int) -> BuildReport:
    """Commit the segments of all shares as one generation and remove the records. Again: says that it was done.

    Raises Conflict if a share is not done, if two inputs carry the same external id, or if their columns do not agree (all of it before anything is
    visible); InvalidRequest if there is no such build.
    """
    try:
        return await _Joined(reader, index, _Nothing()).commit_all(build, n_inputs)
    except (Conflict, NotFound):
        if await is_prepared(reader, index, build):
            raise
    return await _over(reader, index, build)


async def _over(reader: Reader, index: str, build: str) -> BuildReport:
    """The records are gone: either the build was committed, and some generation says so, or it never was."""
    current = (await reader.head(index)).manifest
    if current.cause.endswith(build):
        return BuildReport(generation=current.generation, was_committed_before=True)
    async for generation, _ in archived(reader.store, index, current.index_id):
        with suppress(NotFound):
            if (await manifest_at(reader.store, index, generation)).cause.endswith(build):
                return BuildReport(generation=generation, was_committed_before=True)
    raise InvalidRequest("no such build", index=index, build=build)


class _Nothing:
    """A build that only commits reads no source."""

    fingerprint, n_documents, n_tokens = "", 0, 0

    def sample(self, n_tokens: int) -> np.ndarray:
        raise AssertionError

    def blocks(self, first_document: int) -> Iterator[Block]:
        raise AssertionError


class _Joined(BulkBuild):
    async def commit_all(self, build: str, n_inputs: int) -> BuildReport:
        head = await self.reader.head(self.index)
        self._began_at = head.manifest.generation
        await self.take_up(build)
        self.state.columns = (await prepared(self.reader, self.index, build)).columns
        shares = await read_shares(self.store, self.index, build)
        await self._join_all(shares, n_inputs)
        if not self.state.segments:
            raise InvalidRequest("the inputs hold no documents", build=build)
        await self._check_keys()
        head, n_replaced, was_committed = await self._commit(head.manifest.index_id)
        await self._tidy()
        n_tokens, n_segments = sum(segment.n_tokens for segment in self.state.segments), len(self.state.segments)
        return BuildReport(self.state.n_documents, n_tokens, n_segments, 0, n_replaced, head.manifest.generation, was_committed)

    async def take_up(self, build: str) -> None:
        """Read the build's own records and make it young. NotFound if it is over, Conflict if garbage collection was faster."""
        self.build_id = build
        await self._load_progress()
        if self.state.codec_ref is None:
            raise NotFound("no such build", index=self.index, build=build)
        with suppress(Conflict):  # somebody else takes it up just now, which is as good
            await self._note([])
        first = names.build(self.index, build, 0)
        if first in await doomed_by_sweeps(self.store, self.index):
            raise Conflict(
                "the build was left for a week, and garbage collection is forgetting it: start it again", index=self.index, build=build
            )
        await self._check_no_other_run_finished()

    async def _join_all(self, shares: dict[int, _State], n_inputs: int) -> None:
        missing = [number for number in range(n_inputs) if number not in shares or not _has_end(shares[number])]
        if missing:
            raise Conflict("inputs of the build are not done", build=self.build_id, missing=missing[:20], n_missing=len(missing))
        for number in range(n_inputs):
            share = shares[number]
            columns = schema.adopt(column_pairs(self.state.columns), column_pairs(share.columns)) if share.segments else ()
            if columns is None:
                facts: dict[str, Any] = {"input": number, "columns": [f"{column.name} {column.type}" for column in share.columns]}
                raise Conflict(
                    "an input has columns of other types than the inputs before it; name the columns' types in the request", **facts
                )
            self.state.segments += [segment.rebased(segment.base + self.state.n_documents) for segment in share.segments]
            self.state.n_documents += share.n_documents
            self.state.columns = column_refs(columns) if share.segments else self.state.columns

    async def _check_keys(self) -> None:
        """Refuse external ids that come in two segments of this build."""
        with_keys = [segment for segment in self.state.segments if segment.has_keys]
        if len(with_keys) < 2:
            return
        hashes = np.zeros(sum(segment.n_documents for segment in with_keys), np.uint64)  # of all keys: 8 bytes each, where a set takes 100
        n_keys = 0
        for segment in with_keys:
            own = (await self.parts.keys(self.index, segment)).hashes
            hashes[n_keys : n_keys + len(own)] = own
            n_keys += len(own)
        hashes = hashes[:n_keys]
        hashes.sort()
        twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        seen: set[bytes] = set()
        for segment in with_keys if len(twice) else ():
            keys = await self.parts.keys(self.index, segment)
            for row in np.flatnonzero(np.isin(keys.hashes, twice)).tolist():
                key = keys.raw(row)
                if key in seen:
                    raise Conflict("an external id comes twice in the inputs of a build", id=repr(key.decode())[:140], build=self.build_id)
                seen.add(key)

    async def _tidy(self) -> None:
        with suppress(Unavailable):
            await self.store.delete([names.build(self.index, self.build_id, 0)])
            await self.store.delete([name async for name in _records(self.store, self.index, self.build_id)])


async def _records(store: ObjectStore, index: str, build: str) -> AsyncIterator[str]:
    """Names of a build's records and those of its shares."""
    async for listed in store.list(f"{names.builds(index)}{build}"):
        yield listed.name


async def read_shares(store: ObjectStore, index: str, build: str) -> dict[int, _State]:
    """How far each share is that has begun."""
    try:
        begun = _begun((await store.get(names.build(index, build, 0))).data)
    except NotFound:
        return {}
    wanted: dict[str, int] = {}
    async for name in _records(store, index, build):
        own, _, digits = name.split("/")[-2].rpartition("-")
        if own == f"{build}-{begun}":
            wanted[name] = int(digits)
    places = asyncio.Semaphore(_READS)

    async def read(name: str) -> BuildProgress | None:
        async with places:
            try:
                return read_marker((await store.get(name)).data, BuildProgress, name=name)
            except NotFound:
                return None

    shares: dict[int, _State] = {}
    records = await asyncio.gather(*map(read, wanted))
    for number, record in zip(wanted.values(), records, strict=True):
        state = shares.setdefault(number, _State())
        if record is None or not follows(state, record):
            continue
        state.n_parts += 1
        if record.segment is not None:
            state.segments.append(record.segment)
            state.columns, state.n_documents = record.columns, record.n_documents
    return shares


async def builds(store: ObjectStore, index: str) -> list[BuildStatus]:
    """Builds of several inputs that are under way, or were given up: oldest first. Cost: a listing, and a GET for each record."""
    found = []
    async for listed in store.list(names.builds(index)):
        build = listed.name.split("/")[-2]
        if "-" in build or not listed.name.endswith("/" + "0" * 8):
            continue
        with suppress(NotFound):
            record = read_marker((await store.get(listed.name)).data, BuildProgress, name=listed.name)
            if record.codec is not None and record.segment is None and record.source.startswith("{"):
                found.append(await _status(store, index, build, record))
    return sorted(found, key=lambda status: status.created_s)


async def _status(store: ObjectStore, index: str, build: str, record: BuildProgress) -> BuildStatus:
    shares = await read_shares(store, index, build)
    reports = tuple(_report(number, state, _has_end(state)) for number, state in sorted(shares.items()))
    current = (await load_head(store, index)).manifest
    ours = {segment.id for state in shares.values() for segment in state.segments}
    return BuildStatus(build, record.source, record.created_s, reports, any(segment.id in ours for segment in current.segments))


async def give_up(store: ObjectStore, index: str, build: str) -> int:
    """Remove the records of a build that will not be finished; garbage collection takes its segments. Returns how many records there were."""
    doomed = [name async for name in _records(store, index, build)]
    first = names.build(index, build, 0)
    await store.delete([first])
    await store.delete([name for name in doomed if name != first])
    return len(doomed)


__all__ = [
    "BuildStatus",
    "Prepared",
    "ShareReport",
    "build_share",
    "builds",
    "finish",
    "give_up",
    "is_prepared",
    "prepare",
    "prepared",
    "resumed",
]
