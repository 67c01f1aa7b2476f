"""Backup and restore: an index copied to another store, and brought back.

A copy is an index like any other. It can be listed, verified, searched and served where it lies; it names nothing outside its own prefix,
for what a branch shares with its home is copied too.

backup    keeps the index's identity: generations have the numbers, times and causes that they have in the source, and CURRENT of the copy
          goes forward only. Each backup leaves a pin `backup-{generation}` in the copy, so that garbage collection there keeps it.
restore   begins a history of its own: a new index, or a new generation of one that is there. (Numbers of generations that were lost must not
          be given out again: a reader that saw the lost ones would take the new for old.)

    hold the generations in the source (pins)
    copy what the target lacks; check, read back           copying.py
    write manifests and pins, look for sweepers            as a pinner does, snapshots.py
    move CURRENT                                           commit.py
    write a record of it, for doctor

Whenever it is killed, CURRENT of the target still names a whole generation; the same command goes on where it stopped. What a killed run
leaves in the source is a temporary pin, which garbage collection forgets after a day.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from engine.config import check_index_name
from engine.errors import Conflict, CorruptData, InvalidRequest, NotFound, Unavailable
from engine.format import names
from engine.format.manifest import Manifest, decode_manifest, encode_manifest
from engine.format.markers import Pin, write_marker
from engine.index.clock import Clock, SystemClock
from engine.index.commit import Apply, Draft, Head, commit, create, install, load_head
from engine.index.references import objects_of, standalone
from engine.index.snapshots import generation_at_time, held, manifest_at, pins, unpin
from engine.index.sweep import doomed_by_sweeps, sweep
from engine.store.base import Buffer, ObjectStore
from engine.transfer.copying import Copied, Copier, Progress

BACKUP_PIN = "backup-"
KEPT_RECORDS = 100
_ROUNDS = 3
"""Copying again what a sweeper of the target took meanwhile; it takes nothing twice, because by then we have pinned it."""
R = TypeVar("R", bound=msgspec.Struct)


class BackupRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One backup that succeeded, as doctor reads it. Times are unix seconds of the machine that made it.

    started_s   what was in force then is in the backup
    changed_s   when the generation was committed
    """

    index: str
    index_id: str
    generation: int
    started_s: float
    finished_s: float
    changed_s: float
    n_objects: int
    n_copied: int
    bytes_copied: int


@dataclass(frozen=True)
class BackupReport:
    """generations: those that the copy was asked to hold. moved: whether CURRENT of the copy did. dropped: generations of backups let go."""

    record: BackupRecord
    copied: Copied
    generations: tuple[int, ...]
    moved: bool
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True)
class RestoreReport:
    """from_generation is the backup's; `generation` the one that the restored index has now."""

    index: str
    from_generation: int
    generation: int
    n_documents: int
    copied: Copied
    is_new: bool


async def backup(
    source: ObjectStore,
    index: str,
    target: ObjectStore,
    *,
    generations: Sequence[int] | None = None,
    keep: int | None = None,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> BackupReport:
    """Copy an index to the same name in another store.

    generations  which to hold; None: the one in force and every pinned one
    keep         after success, let go of all but so many backups in the target and collect its garbage; None keeps all
    Raises Conflict (`index-exists`) if the target holds another index of the name, or a copy that was written to; NotFound
    (`generation-not-found`) for a generation that is not kept; CorruptData if the source is damaged.
    Cost: what the target lacks is read once, written once and read back; a listing of the target; some ten requests a generation.
    """
    check_index_name(index)
    clock = clock or SystemClock()
    started_s = clock.now_s()
    there = await _head_or_none(target, index)
    async with AsyncExitStack() as holding:
        manifests = await _hold(holding, source, index, generations)
        newest = max(manifests, key=lambda manifest: manifest.generation)
        await _check_same_life(source, index, there, newest)
        copier = Copier(source, index, target, index, progress)
        trusted = set() if there is None else objects_of(there.manifest, index)
        await copier.run(manifests, trusted)
        data = {manifest.generation: await _manifest_data(source, index, manifest, there) for manifest in manifests}
        await _pin_in_copy(target, index, manifests, data, await _pins_of(source, index, manifests), started_s)
        await _hold_against_sweeps(copier, target, index, manifests)
        moved = await install(target, index, data[newest.generation])
    record = BackupRecord(
        index=index,
        index_id=newest.index_id,
        generation=newest.generation,
        started_s=started_s,
        finished_s=clock.now_s(),
        changed_s=newest.created_s,
        n_objects=copier.copied.n_objects,
        n_copied=copier.copied.n_copied,
        bytes_copied=copier.copied.bytes_copied,
    )
    await write_record(target, "backups", index, record)
    dropped = await _drop_backups(target, index, keep) if keep is not None else ()
    return BackupReport(record, copier.copied, tuple(sorted(data)), moved, dropped)


async def restore(
    source: ObjectStore,
    index: str,
    target: ObjectStore,
    name: str,
    *,
    generation: int | None = None,
    replace: bool = False,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> RestoreReport:
    """Bring an index back from a copy: `index` in `source` becomes `name` in `target`.

    generation  of the copy; None is the one in force there
    replace     if `name` is there, make the copy's documents its next generation (what it held can be rolled back to); without
                it that is refused: Conflict (`index-exists`)
    Objects that lie in the target already are read and checked, and damaged ones are replaced: restoring heals.
    """
    check_index_name(name)
    existing = await _head_or_none(target, name)
    if existing is not None and not replace:
        raise Conflict(
            "an index of this name is there; restore under another name, or say that it is to be replaced", code="index-exists", index=name
        )
    async with _held_if_writable(source, index, generation) as manifest:
        contents = standalone(manifest)
        copier = Copier(source, index, target, name, progress)
        await copier.run([manifest])
        async with _guarded(copier, target, name, manifest):
            cause = f"restore generation {manifest.generation} of {index}"
            if existing is None:
                made = await create(target, name, manifest.config, contents=contents, cause=cause, clock=clock)
            else:
                made = await commit(target, name, _takes_over(contents, existing), cause=cause, clock=clock)
    return RestoreReport(name, manifest.generation, made.manifest.generation, made.manifest.n_documents, copier.copied, existing is None)


async def generation_of(store: ObjectStore, index: str, as_of: int | float | str | None) -> int | None:
    """A generation as people name it: its number (int), a time in unix seconds (float), a pin (str), or None for the one in force."""
    if isinstance(as_of, float):
        return await generation_at_time(store, index, as_of)
    if isinstance(as_of, str):
        found = await pins(store, index)
        if as_of not in found:
            raise NotFound("no pin of this name", code="pin-not-found", index=index, pin=as_of)
        return found[as_of].generation
    return as_of


async def write_record(store: ObjectStore, kind: str, index: str, record: msgspec.Struct) -> None:
    """Leave a record where `newest_record` finds it, and drop the oldest beyond KEPT_RECORDS."""
    await store.put_if_absent(names.record(kind, index, names.fresh_id()), msgspec.json.encode(record))
    listed = [line.name async for line in store.list(names.records(kind, index))]
    await store.delete(listed[:-KEPT_RECORDS])


async def newest_record(store: ObjectStore, kind: str, index: str, type: type[R]) -> R | None:
    """The last record of this kind, by the clock of who wrote it; None if there is none."""
    last = [line.name async for line in store.list(names.records(kind, index))][-1:]
    if not last:
        return None
    try:
        return msgspec.json.decode((await store.get(last[0])).data, type=type)
    except msgspec.MsgspecError as error:
        raise CorruptData("not a record of a backup or drill", code="malformed", object=last[0], cause=str(error)) from error


# Holding, in the source


async def _hold(holding: AsyncExitStack, source: ObjectStore, index: str, generations: Sequence[int] | None) -> list[Manifest]:
    """Pin the generations that are wanted for as long as `holding` lasts; a pinned one that goes away meanwhile is not wanted any more."""
    if generations is not None:
        if not generations:
            raise InvalidRequest("a backup holds a generation at least", index=index)
        return [await holding.enter_async_context(held(source, index, number, "backup")) for number in sorted(set(generations))]
    current = await holding.enter_async_context(held(source, index, None, "backup"))
    manifests = {current.generation: current}
    for pin in (await pins(source, index)).values():
        if pin.temporary or pin.index_id != current.index_id or pin.generation in manifests:
            continue
        with suppress(NotFound):
            manifests[pin.generation] = await holding.enter_async_context(held(source, index, pin.generation, "backup"))
    return list(manifests.values())


@asynccontextmanager
async def _held_if_writable(store: ObjectStore, index: str, generation: int | None) -> AsyncIterator[Manifest]:
    """A generation held by a pin; merely read, if the store lets us only read: then nobody else had better collect garbage there."""
    async with AsyncExitStack() as holding:
        try:
            manifest = await holding.enter_async_context(held(store, index, generation, "restore"))
        except Unavailable as error:
            if error.code != "store-denied":
                raise
            manifest = await manifest_at(store, index, generation)
        yield manifest


async def _head_or_none(store: ObjectStore, index: str) -> Head | None:
    try:
        return await load_head(store, index)
    except NotFound:
        return None


async def _check_same_life(source: ObjectStore, index: str, there: Head | None, newest: Manifest) -> None:
    """Refuse early what `install` would refuse late, and a copy that went ahead of its original."""
    if there is None:
        return
    copy = there.manifest
    if copy.index_id != newest.index_id:
        raise Conflict(
            "the target holds another index of this name, such as one that was deleted and made again; choose another prefix",
            code="index-exists",
            index=index,
        )
    try:
        original = await manifest_at(source, index, copy.generation)
    except NotFound as error:
        if copy.generation < newest.generation:
            return  # no longer kept; nothing to compare with
        raise Conflict("the copy is ahead of the index", code="index-exists", index=index, generation=copy.generation) from error
    if original.writer != copy.writer:
        raise Conflict("the copy was written to: it has a history of its own", code="index-exists", index=index)


# Making visible, in the target


async def _manifest_data(source: ObjectStore, index: str, manifest: Manifest, there: Head | None) -> Buffer:
    """The bytes that a generation has in the copy: the source's, unless homes had to be changed."""
    if there is not None and there.manifest.generation == manifest.generation:
        return there.data
    alone = standalone(manifest)
    if alone is not manifest:
        return encode_manifest(alone)
    return (await source.get(names.manifest(index, manifest.index_id, manifest.generation))).data


async def _pins_of(source: ObjectStore, index: str, manifests: Sequence[Manifest]) -> dict[str, Pin]:
    """The index's own pins on these generations."""
    wanted = {(manifest.index_id, manifest.generation) for manifest in manifests}
    found = await pins(source, index)
    return {name: pin for name, pin in found.items() if not pin.temporary and (pin.index_id, pin.generation) in wanted}


async def _pin_in_copy(
    target: ObjectStore, index: str, manifests: Sequence[Manifest], data: dict[int, Buffer], own: dict[str, Pin], started_s: float
) -> None:
    for manifest in manifests:
        name = names.manifest(index, manifest.index_id, manifest.generation)
        try:
            await target.put_if_absent(name, data[manifest.generation])
        except Conflict as error:  # written by another release in other bytes, or by somebody else
            if decode_manifest((await target.get(name)).data, name=name).writer != manifest.writer:
                raise Conflict("the copy was written to: it has a history of its own", code="index-exists", index=index) from error
    newest = max(manifests, key=lambda manifest: manifest.generation)
    note = "made by tartan backup"
    mark = Pin(index_id=newest.index_id, generation=newest.generation, created_s=started_s, note=note, id=names.fresh_id())
    for name, pin in {**own, f"{BACKUP_PIN}{newest.generation}": mark}.items():
        await _put_pin(target, index, name, pin)


async def _put_pin(target: ObjectStore, index: str, name: str, pin: Pin) -> None:
    """A pin as the source has it; one of the name that says something else has been moved there since."""
    there = (await pins(target, index)).get(name)
    if there is not None and (there.index_id, there.generation) == (pin.index_id, pin.generation):
        return
    if there is not None:
        await target.delete([names.pin(index, name)])
    await target.put_if_absent(names.pin(index, name), write_marker(pin))


async def _hold_against_sweeps(copier: Copier, target: ObjectStore, index: str, manifests: Sequence[Manifest]) -> None:
    """Now that they are pinned: copy again what a sweeper took before it saw the pins."""
    for _ in range(_ROUNDS):
        doomed = await doomed_by_sweeps(target, index)
        lost = await copier.lacking(manifests)
        wanted = {name for manifest in manifests for name in objects_of(standalone(manifest), index)}
        if not lost and not doomed & wanted:
            return
        await copier.run(manifests, wanted - set(lost))
    raise Unavailable("garbage collection of the target takes away what is copied", index=index, retry_after_s=60.0)


@asynccontextmanager
async def _guarded(copier: Copier, target: ObjectStore, name: str, manifest: Manifest) -> AsyncIterator[None]:
    """Safe from garbage collection of the target while no generation names what was copied: a temporary pin on a manifest of a life of its own."""
    guard = msgspec.structs.replace(standalone(manifest), index_id=names.fresh_id())
    archive = names.manifest(name, guard.index_id, guard.generation)
    marker = names.pin(name, f"restore-{names.fresh_id()}")
    pin = Pin(index_id=guard.index_id, generation=guard.generation, created_s=guard.created_s, id=names.fresh_id(), temporary=True)
    await target.put_if_absent(archive, encode_manifest(guard))
    await target.put_if_absent(marker, write_marker(pin))
    try:
        await _hold_against_sweeps(copier, target, name, [manifest])
        yield
    finally:
        await target.delete([marker, archive])


def _takes_over(contents: Manifest, existing: Head) -> Apply:
    """The change that gives an index the documents and settings of another; ids stay unique, for next_id never falls."""

    async def apply(manifest: Manifest) -> Draft:
        if manifest.index_id != existing.manifest.index_id:
            raise Conflict("the index was deleted and made again meanwhile", index_id=existing.manifest.index_id)
        kept = {name: getattr(contents, name) for name in ("config", "dim", "codecs", "segments", "columns")}
        return Draft(msgspec.structs.replace(manifest, **kept, next_id=max(manifest.next_id, contents.next_id)))

    return apply


async def _drop_backups(target: ObjectStore, index: str, keep: int) -> tuple[int, ...]:
    """Unpin all but the newest `keep` backups, and sweep; the generation in force stays in any case."""
    if keep < 1:
        raise InvalidRequest("at least one backup is kept", keep=keep)
    found = {pin.generation: name for name, pin in (await pins(target, index)).items() if name.startswith(BACKUP_PIN)}
    dropped = tuple(sorted(found)[:-keep])
    for generation in dropped:
        with suppress(NotFound):
            await unpin(target, index, found[generation])
    if dropped:
        await sweep(target, index)
    return dropped
