"""The one place where CURRENT moves.

A commit takes the manifest in force, lets the caller derive the next one, uploads what the next one names, keeps the bytes that are
about to be replaced as `manifests/{generation}`, and replaces CURRENT if it is unchanged. Two rounds of PUTs, whatever the change:

    segment data, metadata, tombstones ... and manifests/{g}     all together
    CURRENT g -> g+1                                             if its etag is still the one we read

An index ends by a commit, too: a deletion takes the manifest's place in CURRENT, under the same condition, and stays there. CURRENT is
never removed, so no request that is late or sent again can bring an index back, and none that ends one can meet the next of its name.

A refusal is a conflict only if CURRENT really holds another commit: the store reads back before it refuses (store/base.py), and each
attempt carries its own `writer` id, so equal bytes mean our own write whose answer was lost. A crash before the last PUT leaves
objects that nobody names; garbage collection takes them. This module never deletes and never caches.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import msgspec

from engine.config import CommitParams, IndexConfig, check_index_name
from engine.errors import Conflict, CorruptData, NotFound, Unavailable, UnsupportedFormat
from engine.format import names
from engine.format.envelope import Kind, parse_header
from engine.format.manifest import Manifest, decode_manifest, encode_manifest
from engine.format.markers import Deletion, read_marker, write_marker
from engine.index.clock import Clock, SystemClock
from engine.store.base import Buffer, Object, ObjectStore


class Head(msgspec.Struct, frozen=True):
    """The manifest in force at one moment, the bytes it was read from, and their etag."""

    manifest: Manifest
    data: Buffer
    etag: str


class Draft(msgspec.Struct):
    """What a change wants: the next manifest (commit sets generation, time, cause and writer) and the objects it newly names."""

    manifest: Manifest
    uploads: dict[str, Buffer] = msgspec.field(default_factory=dict)


Apply = Callable[[Manifest], Awaitable[Draft | None]]
"""Derives a change from the manifest in force. Called again, on the newer manifest, after each conflict; None means nothing to do.
It must not assume that an earlier call's result was committed."""


class Ended(NotFound):
    """There is no index of this name, because it was deleted: CURRENT holds the deletion."""


async def load_head(store: ObjectStore, index: str) -> Head:
    """Read CURRENT: one request. NotFound (`index-not-found`) if there is no such index."""
    try:
        found = await store.get(names.current(index))
    except NotFound as error:
        raise NotFound("no such index", code="index-not-found", index=index) from error
    return _head(found, index)


async def refresh_head(store: ObjectStore, index: str, head: Head) -> Head:
    """`head` itself if CURRENT has not moved, else the newer one: one conditional request, no bytes if unchanged."""
    try:
        found = await store.get_if_changed(names.current(index), head.etag)
    except NotFound as error:
        raise NotFound("no such index", code="index-not-found", index=index) from error
    return head if found is None else _head(found, index)


def _current(found: Object, index: str) -> Head | Deletion:
    """What CURRENT holds."""
    name = names.current(index)
    if parse_header(found.data, name=name).kind is Kind.DELETION:
        return read_marker(found.data, Deletion, name=name)
    return Head(decode_manifest(found.data, name=name), found.data, found.etag)


def _head(found: Object, index: str) -> Head:
    """The same, where an index is wanted: Ended if it was deleted."""
    there = _current(found, index)
    if isinstance(there, Deletion):
        raise Ended("no such index", code="index-not-found", index=index)
    return there


async def create(
    store: ObjectStore,
    index: str,
    config: IndexConfig,
    *,
    contents: Manifest | None = None,
    cause: str = "create",
    clock: Clock | None = None,
) -> Head:
    """Make an index: empty, or holding the documents of `contents` (a branch, a restore). Two requests.

    Raises Conflict (`index-exists`) if there is one of this name, InvalidRequest for a bad name, Unavailable if one came and went meanwhile
    and nobody can tell any more whether it was ours.
    """
    check_index_name(index)
    first = Manifest(
        index_id=names.fresh_id(),
        generation=0,
        created_s=(clock or SystemClock()).now_s(),
        cause=cause,
        writer=names.fresh_id(),
        config=config,
    )
    if contents is not None:
        kept = {name: getattr(contents, name) for name in ("dim", "next_id", "codecs", "segments", "columns")}
        first = msgspec.structs.replace(first, **kept)
    data = encode_manifest(first)
    try:
        return Head(first, data, await _put_first(store, index, data))
    except Conflict as error:
        if await _was_first(store, index, first):
            return Head(first, data, etag="")
        raise Conflict("an index of this name exists already", code="index-exists", index=index) from error


async def _put_first(store: ObjectStore, index: str, data: Buffer) -> str:
    """Put a manifest where there is no index: nothing, or the deletion of one. Returns the etag; Conflict if there is or comes one."""
    name = names.current(index)
    try:
        found = await store.get(name)
    except NotFound:
        return await store.put_if_absent(name, data)
    if isinstance(_current(found, index), Head):
        raise Conflict("there is one already", object=name)
    try:
        return await store.replace_if_unchanged(name, data, found.etag)
    except NotFound as error:
        raise Conflict("CURRENT was removed by hand meanwhile", object=name) from error


async def _was_first(store: ObjectStore, index: str, first: Manifest) -> bool:
    """Whether the index that is there, or was there last, is the one we made: our answer was lost, and others were here before the store looked."""
    there = _current(await store.get(names.current(index)), index)
    if isinstance(there, Head):
        return there.manifest.index_id == first.index_id
    if there.index_id == first.index_id:
        return True
    raise Unavailable("an index of this name was made and deleted meanwhile; perhaps it was this one", index=index)


async def end(
    store: ObjectStore, index: str, *, life: str | None = None, rng: random.Random | None = None, clock: Clock | None = None
) -> bool:
    """Delete an index: put its deletion into CURRENT, whether that can be read or not. Returns whether there was one. Two requests.

    life  end only the index of this id; None: the one that is there at the first look. Whichever takes its name meanwhile stays
    Raises Conflict (`commit-conflict`) when commits were faster each time.
    """
    params, rng, clock = CommitParams(), rng or random.Random(), clock or SystemClock()
    for attempt in range(params.max_attempts):
        try:
            found = await store.get(names.current(index))
            there, generation = _life(found, index)
        except NotFound:
            return attempt > 0  # our answer was lost, or somebody ended it with us
        if life not in (None, there):
            return attempt > 0
        life = there
        deletion = Deletion(index_id=there, generation=generation, created_s=clock.now_s(), id=names.fresh_id())
        with suppress(Conflict, NotFound):
            await store.replace_if_unchanged(names.current(index), write_marker(deletion), found.etag)
            return True
        await clock.sleep(_backoff_s(params, attempt, rng))
    raise Conflict("other writers were faster each time", index=index, attempts=params.max_attempts)


def _life(found: Object, index: str) -> tuple[str, int]:
    """(index_id, generation) of what CURRENT holds, ("", 0) if that cannot be read. Ended if it is a deletion."""
    try:
        manifest = _head(found, index).manifest
    except (CorruptData, UnsupportedFormat):
        return "", 0
    return manifest.index_id, manifest.generation


async def install(store: ObjectStore, index: str, data: Buffer, *, over_damage: bool = False) -> bool:
    """Put a generation in force that was committed elsewhere or earlier, as it is: in a copy of an index, or after its CURRENT was lost.

    data         the bytes of its manifest; everything that it names must be there
    over_damage  replace a CURRENT that cannot be read, too
    returns      whether CURRENT moved: it goes forward only, and stays where it is if that generation or a later one is in force
    Raises Conflict (`index-exists`) if CURRENT belongs to another index, or has another commit of that number. An index that was deleted
    comes back.
    """
    manifest = decode_manifest(data, name=names.current(index))
    while True:
        try:
            found = await store.get(names.current(index))
        except NotFound:
            with suppress(Conflict):
                await store.put_if_absent(names.current(index), data)
                return True
            continue
        try:
            head = _head(found, index)
        except Ended:
            pass
        except CorruptData:
            if not over_damage:
                raise
        else:
            if not _goes_forward(head.manifest, manifest, index):
                return False
            await archive(store, index, head)
        with suppress(Conflict, NotFound):
            await store.replace_if_unchanged(names.current(index), data, found.etag)
            return True


def _goes_forward(there: Manifest, manifest: Manifest, index: str) -> bool:
    """Whether a manifest is of a later generation than the one in force; Conflict if it does not belong to the same history."""
    if there.index_id != manifest.index_id:
        raise Conflict("another index of this name is there", code="index-exists", index=index)
    if there.generation == manifest.generation and there.writer != manifest.writer:
        raise Conflict("this copy was written to: it has a history of its own", code="index-exists", index=index)
    return there.generation < manifest.generation


async def commit(
    store: ObjectStore,
    index: str,
    apply: Apply,
    *,
    cause: str,
    head: Head | None = None,
    params: CommitParams | None = None,
    rng: random.Random | None = None,
    clock: Clock | None = None,
) -> Head:
    """Apply a change as one new generation and return it; the head unchanged if `apply` finds nothing to do.

    head    what the caller believes is in force, to save a read; a stale one costs one conflict
    Raises Conflict (`commit-conflict`) when `max_attempts` others were faster, NotFound when the index was deleted meanwhile,
    Unavailable when uploads grew too old to be safe from garbage collection, and whatever `apply` raises.
    Cost: two rounds of PUTs without contention; a lost race adds a GET and the same again without the uploads already made.
    """
    params = params or CommitParams()
    rng, clock = rng or random.Random(), clock or SystemClock()
    uploaded: set[str] = set()
    believed, life = head, ""
    started_s = clock.monotonic_s()
    for attempt in range(params.max_attempts):
        if head is None:
            head = await load_head(store, index)
        if uploaded and head.manifest.index_id != life:  # what we uploaded may be on the list of the one who deleted the index
            raise Conflict("the index was deleted and made again meanwhile", index=index)
        draft = await apply(head.manifest)
        if draft is None and head is believed:  # "nothing to do" is an answer too, and must not rest on an old generation
            head = await refresh_head(store, index, head)
            draft = None if head is believed else await apply(head.manifest)
        if draft is None:
            return head
        life = head.manifest.index_id
        following = _successor(head.manifest, draft.manifest, cause, clock)
        await _upload(store, index, head, draft.uploads, uploaded)
        if clock.monotonic_s() - started_s > params.max_upload_age_s:
            raise Unavailable(
                "the commit took so long that its uploads may have been collected", index=index, limit_s=params.max_upload_age_s
            )
        data = encode_manifest(following)
        try:
            etag = await store.replace_if_unchanged(names.current(index), data, head.etag)
        except Conflict:
            head = await load_head(store, index)
            if await _was_made(store, index, following, head):
                return Head(following, data, etag="")
            await clock.sleep(_backoff_s(params, attempt, rng))
            head = await refresh_head(store, index, head)
            continue
        except NotFound as error:
            raise NotFound("the index was deleted meanwhile", code="index-not-found", index=index) from error
        return Head(following, data, etag)
    raise Conflict("other writers were faster each time", index=index, attempts=params.max_attempts)


def _successor(before: Manifest, after: Manifest, cause: str, clock: Clock) -> Manifest:
    """`after` as the generation that follows `before`. Time never runs backwards within an index, whatever a machine's clock says."""
    if after.next_id < before.next_id or after.index_id != before.index_id:
        raise AssertionError("a change may not reuse document ids or turn into another index")
    return msgspec.structs.replace(
        after,
        generation=before.generation + 1,
        created_s=max(clock.now_s(), before.created_s),
        cause=cause,
        writer=names.fresh_id(),
    )


async def _was_made(store: ObjectStore, index: str, ours: Manifest, head: Head) -> bool:
    """Whether our own commit is part of the history of `head`, although the store refused it.

    It is if our answer was lost and others committed on top before we looked. Applying the change again would make it twice.
    """
    if head.manifest.index_id != ours.index_id or head.manifest.generation <= ours.generation:
        return head.manifest.writer == ours.writer
    name = names.manifest(index, ours.index_id, ours.generation)
    try:
        return decode_manifest((await store.get(name)).data, name=name).writer == ours.writer
    except NotFound:
        return False  # collected, so it was superseded a grace period ago: before this attempt, whose head was an old one


async def _upload(store: ObjectStore, index: str, head: Head, uploads: Mapping[str, Buffer], uploaded: set[str]) -> None:
    """Put what is not there yet, and the archive of the generation about to be replaced, all in one round."""
    archive = names.manifest(index, head.manifest.index_id, head.manifest.generation)
    wanted: dict[str, Buffer] = {name: data for name, data in uploads.items() if name not in uploaded}
    if archive not in uploaded:
        wanted[archive] = head.data
    results = await asyncio.gather(*(store.put_if_absent(name, data) for name, data in wanted.items()), return_exceptions=True)
    for name, result in zip(wanted, results, strict=True):
        if isinstance(result, Conflict):
            raise CorruptData("an object that is written once holds other bytes", code="malformed", object=name) from result
        if isinstance(result, BaseException):
            raise result
        uploaded.add(name)


async def archive(store: ObjectStore, index: str, head: Head) -> None:
    """Make sure that `manifests/{generation}` of `head` exists, as the next commit would."""
    await _upload(store, index, head, {}, set())


def _backoff_s(params: CommitParams, attempt: int, rng: random.Random) -> float:
    """Full jitter: anything between nothing and the doubled delay."""
    return rng.uniform(0, min(params.max_delay_s, params.first_delay_s * 2**attempt))
