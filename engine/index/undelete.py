"""Recovery of an index whose objects were deleted or overwritten behind the engine's back, from the old versions that the bucket keeps.

A generation names every object that it needs, with its size and checksums; so exactly those are brought back, nothing else is touched, and
what comes back is known to be right:

    plan     the wanted manifest, from versions of CURRENT and of manifests/; for each object: sound, or which version it has to be
    hold     its manifest and a temporary pin, so that garbage collection keeps what reappears
    bring back   remove the delete markers over a version, or copy it back (the store copies); read, check; else try the version before
    show     CURRENT last. Numbers of generations never fall: an older generation becomes a new one, as a rollback does

A plan by itself changes nothing and reads no object but manifests. An interrupted recovery goes on when it is asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from engine.errors import Conflict, CorruptData, NotFound, UnsupportedFormat
from engine.format import names
from engine.format.manifest import Manifest, decode_manifest, encode_manifest
from engine.format.markers import Pin, write_marker
from engine.index.clock import Clock, SystemClock
from engine.index.commit import install, load_head
from engine.index.references import homes_of
from engine.index.snapshots import rollback
from engine.index.verify import Expected, expected_objects
from engine.store.base import Buffer, ObjectStore
from engine.store.bucket import Bucket, Version

Progress = Callable[[str, int, int], None]
_AT_ONCE = 8


@dataclass(frozen=True)
class Repair:
    """An object that is not there as the generation needs it, and its versions of the right size, newest first; without any it is lost."""

    expected: Expected
    candidates: tuple[Version, ...]

    @property
    def is_lost(self) -> bool:
        return not self.candidates


@dataclass
class Recovery:
    """What has to be done, or was.

    wanted        the generation that is recovered; `data` its bytes
    newest        the last generation that the bucket remembers, which numbers go on from
    n_sound       objects that are there, in the right size
    shows         what happens to CURRENT: "" nothing, "return" it comes back as it was, "renew" an older generation becomes a new one
    brought_back  names; lost: names of which no version is right
    generation    in force when all was done
    """

    wanted: Manifest
    newest: Manifest
    data: Buffer
    n_sound: int
    repairs: list[Repair]
    shows: str
    brought_back: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    generation: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every object has a version that may be right."""
        return not self.lost and not any(repair.is_lost for repair in self.repairs)


async def plan_recovery(store: ObjectStore, bucket: Bucket, index: str, as_of: int | float | None = None) -> Recovery:
    """Find out what recovering a generation takes: its number (int), a time (float, unix seconds), or None for the newest.

    Raises NotFound (`generation-not-found`) if the bucket remembers no such generation, Conflict if the index was deleted and made again since.
    Cost: a listing of all versions, one GET for each version of CURRENT that is looked at.
    """
    versions = await bucket.versions(names.of_index(index))
    newest, newest_data = await _newest(bucket, index, versions)
    wanted, data = await _wanted(bucket, index, versions, newest, newest_data, as_of)
    live = await _live(store, index)
    if live is not None and live.index_id != wanted.index_id:
        raise Conflict("the index was deleted and made again since: its former self cannot come back beside it", index=index)
    for home in homes_of(wanted, index):
        versions |= await bucket.versions(names.of_index(home))
    repairs, n_sound = [], 0
    for expected in expected_objects(wanted, index):
        found = versions.get(expected.name, [])
        if found and not found[0].is_marker and found[0].size_bytes == expected.size_bytes:
            n_sound += 1
            continue
        repairs.append(Repair(expected, _candidates(expected, found)))
    shows = "" if live is not None else "return"
    if wanted.generation < (live or newest).generation:
        shows = "renew"
    return Recovery(wanted, newest, data, n_sound, repairs, shows)


async def recover(
    store: ObjectStore, bucket: Bucket, index: str, plan: Recovery, *, progress: Progress | None = None, clock: Clock | None = None
) -> Recovery:
    """Carry a plan out, reading and checking every object of the generation. CURRENT stays as it is if anything is lost for good."""
    clock = clock or SystemClock()
    versions = {
        name: found
        for home in {index, *homes_of(plan.wanted, index)}
        for name, found in (await bucket.versions(names.of_index(home))).items()
    }
    archive = names.manifest(index, plan.wanted.index_id, plan.wanted.generation)
    marker = names.pin(index, f"undelete-{names.fresh_id()}")
    pin = Pin(
        index_id=plan.wanted.index_id, generation=plan.wanted.generation, created_s=clock.now_s(), id=names.fresh_id(), temporary=True
    )
    with suppress(Conflict):  # it is there, in bytes of its own
        await store.put_if_absent(archive, plan.data)
    await store.put_if_absent(marker, write_marker(pin))
    try:
        wanted = list(expected_objects(plan.wanted, index))
        bound = asyncio.Semaphore(_AT_ONCE)
        n_done = 0

        async def one(expected: Expected) -> None:
            nonlocal n_done
            async with bound:
                await _bring_back(store, bucket, expected, versions.get(expected.name, []), plan)
            n_done += 1
            if progress is not None:
                progress("recover", n_done, len(wanted))

        await asyncio.gather(*(one(expected) for expected in wanted))
        if not plan.lost:
            await _show(store, index, plan, clock)
    finally:
        await store.delete([marker])
    return plan


async def _newest(bucket: Bucket, index: str, versions: dict[str, list[Version]]) -> tuple[Manifest, Buffer]:
    """The last CURRENT that can be read, deleted or not."""
    async for manifest, data in _currents(bucket, index, versions):
        return manifest, data
    raise NotFound("the bucket keeps no version of this index's CURRENT", code="index-not-found", index=index)


async def _currents(bucket: Bucket, index: str, versions: dict[str, list[Version]]) -> AsyncIterator[tuple[Manifest, Buffer]]:
    """(manifest, bytes) of each version of CURRENT that can be read, newest first."""
    name = names.current(index)
    for version in versions.get(name, []):
        if version.is_marker:
            continue
        with suppress(CorruptData, UnsupportedFormat):
            data = await bucket.read(name, version)
            yield decode_manifest(data, name=name), data


async def _wanted(
    bucket: Bucket, index: str, versions: dict[str, list[Version]], newest: Manifest, data: Buffer, as_of: int | float | None
) -> tuple[Manifest, Buffer]:
    if as_of is None or as_of == newest.generation:
        return newest, data
    if isinstance(as_of, int):
        name = names.manifest(index, newest.index_id, as_of)
        for version in versions.get(name, []):
            if not version.is_marker:
                with suppress(CorruptData):
                    old = await bucket.read(name, version)
                    return decode_manifest(old, name=name), old
    async for manifest, found in _currents(bucket, index, versions):
        if manifest.index_id != newest.index_id:
            continue
        if manifest.generation == as_of if isinstance(as_of, int) else manifest.created_s <= as_of:
            return manifest, found
    raise NotFound("the bucket keeps no version of that generation", code="generation-not-found", index=index, as_of=as_of)


async def _live(store: ObjectStore, index: str) -> Manifest | None:
    """What is in force, if that can be read."""
    try:
        return (await load_head(store, index)).manifest
    except (NotFound, CorruptData):
        return None


def _candidates(expected: Expected, versions: list[Version]) -> tuple[Version, ...]:
    return tuple(version for version in versions if not version.is_marker and version.size_bytes == expected.size_bytes)


async def _bring_back(store: ObjectStore, bucket: Bucket, expected: Expected, versions: list[Version], plan: Recovery) -> None:
    """Make the object be what the manifest promises; its name goes to `brought_back` or `lost` unless it was right."""
    if await _is_right(store, expected):
        return
    for candidate in _candidates(expected, versions):
        for way in (_uncover, _copy_back):
            if await way(bucket, expected.name, candidate, versions) and await _is_right(store, expected):
                plan.brought_back.append(expected.name)
                return
    plan.lost.append(expected.name)


async def _uncover(bucket: Bucket, name: str, candidate: Version, versions: list[Version]) -> bool:
    """Remove the delete markers over a version; False, and nothing done, if another version lies over it too."""
    above = versions[: versions.index(candidate)]
    if not all(version.is_marker for version in above):
        return False
    for marker in [version for version in versions if version.is_marker and version.modified_s >= candidate.modified_s]:
        await bucket.remove_marker(name, marker)
        versions.remove(marker)
    return True


async def _copy_back(bucket: Bucket, name: str, candidate: Version, versions: list[Version]) -> bool:
    await bucket.copy_back(name, candidate)
    return True


async def _is_right(store: ObjectStore, expected: Expected) -> bool:
    try:
        data = (await store.get(expected.name)).data
        await asyncio.to_thread(expected.verify, data)
    except (NotFound, CorruptData):
        return False
    return True


async def _show(store: ObjectStore, index: str, plan: Recovery, clock: Clock) -> None:
    """Let CURRENT name the generation, now that all of it is there."""
    live = await _live(store, index)
    if live is not None:
        plan.generation = live.generation
        if plan.shows == "renew":
            plan.generation = (await rollback(store, index, plan.wanted.generation, clock=clock)).manifest.generation
        return
    data, generation = plan.data, plan.wanted.generation
    if plan.shows == "renew":
        generation = plan.newest.generation + 1
        renewed = msgspec.structs.replace(
            plan.wanted,
            generation=generation,
            created_s=max(clock.now_s(), plan.newest.created_s),
            cause=f"undelete generation {plan.wanted.generation}",
            writer=names.fresh_id(),
            next_id=max(plan.wanted.next_id, plan.newest.next_id),
        )
        data = encode_manifest(renewed)
    await install(store, index, data, over_damage=True)
    plan.generation = generation
