"""Garbage collection: delete what nothing names any more, and never what somebody may still read.

Kept: whatever is named by CURRENT; by each generation that was in force within the grace period; by each pinned generation; by any
generation of a branch; by the progress of an unfinished bulk build; and every object younger than the grace period, because a writer may
be about to name it (a commit whose uploads have become older than that gives up, commit.py).

Order, which makes it safe against pins, readers and writers that appear meanwhile (see snapshots.py for the pinner's half):

    list all objects -> read who names what -> write down the doomed names -> read again who names what -> delete manifests -> delete the rest

All ages are taken by the store's own clock, as the difference of two of its timestamps. A crash at any point leaves rubbish and at
most a marker that makes pinning a doomed generation fail until the next sweep.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from engine.config import MaintenanceParams
from engine.errors import NotFound
from engine.format import names
from engine.format.manifest import Manifest, decode_manifest
from engine.format.markers import Branch, BuildProgress, Pin, Sweep, read_marker, write_marker
from engine.index.clock import Clock, SystemClock
from engine.index.commit import load_head
from engine.index.references import objects_of
from engine.store.base import Listed, ObjectStore

TEMPORARY_PIN_LIFE_S = 86_400.0
BUILD_LIFE_S = 7 * 86_400.0
"""An unfinished bulk build may be resumed for a week after its last progress."""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep found and did. Bytes are those of the deleted (or, on a dry run, doomed) objects."""

    n_objects: int
    n_kept: int
    n_young: int
    n_deleted: int
    deleted_bytes: int
    deleted: tuple[str, ...]
    dry_run: bool


async def sweep(
    store: ObjectStore,
    index: str,
    *,
    params: MaintenanceParams | None = None,
    clock: Clock | None = None,
    dry_run: bool = False,
) -> SweepReport:
    """Collect the garbage of one index, or what a deleted index of that name left behind.

    Cost: a listing, one GET per kept generation, pin and branch generation (twice), two PUTs, and the deletes.
    """
    grace_s = (params or MaintenanceParams()).grace_s
    now_s = await _store_now_s(store, index, clock or SystemClock())
    listing = {listed.name: listed async for listed in store.list(names.of_index(index))}
    kept = await _kept_names(store, index, listing, now_s, grace_s)
    old = {name for name, listed in listing.items() if now_s - listed.modified_s > grace_s and not _is_root(name, index)}
    doomed = sorted(old - kept)
    n_young = len(listing.keys() - old - kept)
    if doomed and not dry_run:
        doomed = await _delete_unless_named_now(store, index, listing, doomed, now_s, grace_s, clock or SystemClock())
    return SweepReport(
        n_objects=len(listing),
        n_kept=len(kept & listing.keys()),
        n_young=n_young,
        n_deleted=len(doomed),
        deleted_bytes=sum(listing[name].size_bytes for name in doomed),
        deleted=tuple(doomed),
        dry_run=dry_run,
    )


async def doomed_by_sweeps(store: ObjectStore, index: str) -> set[str]:
    """Names that sweeps under way (or broken off) are about to delete."""
    doomed: set[str] = set()
    async for listed in store.list(names.sweeps(index)):
        try:
            doomed.update(read_marker((await store.get(listed.name)).data, Sweep, name=listed.name).names)
        except NotFound:
            continue
    return doomed


async def _delete_unless_named_now(
    store: ObjectStore, index: str, listing: dict[str, Listed], doomed: list[str], now_s: float, grace_s: float, clock: Clock
) -> list[str]:
    """Second half: write down, look again, delete. Returns what was deleted."""
    marker = await _put_marker(store, index, doomed, clock)
    try:
        kept = await _kept_names(store, index, listing, now_s, grace_s)
        doomed = [name for name in doomed if name not in kept]
        manifests = [name for name in doomed if name.startswith(names.manifests(index))]
        await store.delete(manifests)
        await store.delete([name for name in doomed if not name.startswith(names.manifests(index))])
    finally:
        await store.delete([marker])
    return doomed


async def _put_marker(store: ObjectStore, index: str, doomed: list[str], clock: Clock) -> str:
    """Write down what is about to be deleted; returns the marker's name."""
    sweep_id = names.fresh_id()
    generations = tuple(names.generation_of(name)[1] for name in doomed if name.startswith(names.manifests(index)))
    plan = Sweep(writer=sweep_id, created_s=clock.now_s(), names=tuple(doomed), generations=generations)
    await store.put_if_absent(names.sweep(index, sweep_id), write_marker(plan))
    return names.sweep(index, sweep_id)


async def _store_now_s(store: ObjectStore, index: str, clock: Clock) -> float:
    """The time by the store's clock: the timestamp of an object written just now."""
    name = await _put_marker(store, index, [], clock)
    try:
        async for listed in store.list(name):
            return listed.modified_s
    finally:
        await store.delete([name])
    raise NotFound("an object that was just written is not listed", object=name)


def _is_root(name: str, index: str) -> bool:
    """Objects that are deleted by their own verbs only, never because nothing names them."""
    return name == names.current(index) or name.startswith((names.pins(index), names.branches(index)))


async def _kept_names(store: ObjectStore, index: str, listing: dict[str, Listed], now_s: float, grace_s: float) -> set[str]:
    """Every object name that must stay, read from the store now."""
    kept, pinned = await _pinned_names(store, index, now_s)
    kept |= await names_kept_for_branches(store, index) | await _build_names(store, index, now_s)
    try:
        head = (await load_head(store, index)).manifest
    except NotFound:
        return kept
    kept |= objects_of(head, index)
    archived = {
        generation: listed
        for listed in listing.values()
        if listed.name.startswith(names.manifests(index)) and (spelt := names.generation_of(listed.name))[0] == head.index_id
        for generation in [spelt[1]]
    }
    manifests = dict(zip(archived, await asyncio.gather(*(_manifest(store, listed.name) for listed in archived.values())), strict=True))
    manifests[head.generation] = head
    for generation, listed in archived.items():
        manifest = manifests[generation]
        if manifest is None:
            continue
        if generation in pinned or not _is_expired(generation, listed, manifests, now_s, grace_s):
            kept |= objects_of(manifest, index) | {listed.name}
    return kept


def _is_expired(generation: int, listed: Listed, manifests: dict[int, Manifest | None], now_s: float, grace_s: float) -> bool:
    """Whether a generation stopped being in force longer ago than the grace period.

    It stopped when its successor was committed: not before its archive was written (store's clock), nor before the time that the
    successor itself carries (its writer's clock; an archive may be written early, by a pin or by an attempt that lost).
    """
    successor = manifests.get(generation + 1)
    superseded_s = max(listed.modified_s, successor.created_s if successor is not None else listed.modified_s)
    return now_s - superseded_s > grace_s


async def _manifest(store: ObjectStore, name: str) -> Manifest | None:
    try:
        return decode_manifest((await store.get(name)).data, name=name)
    except NotFound:
        return None


async def _pinned_names(store: ObjectStore, index: str, now_s: float) -> tuple[set[str], set[int]]:
    """(names that pinned generations need, pinned generations of the living index). Forgotten temporary pins are removed."""
    kept: set[str] = set()
    generations: set[int] = set()
    async for listed in store.list(names.pins(index)):
        try:
            pin = read_marker((await store.get(listed.name)).data, Pin, name=listed.name)
        except NotFound:
            continue
        if pin.temporary and now_s - listed.modified_s > TEMPORARY_PIN_LIFE_S:
            await store.delete([listed.name])
            continue
        archive = names.manifest(index, pin.index_id, pin.generation)
        manifest = await _manifest(store, archive)
        generations.add(pin.generation)
        if manifest is not None:
            kept |= objects_of(manifest, index) | {archive}
    return kept, generations


async def names_kept_for_branches(store: ObjectStore, index: str) -> set[str]:
    """Objects of this index that living branches name in any of their kept generations, and the markers of those branches."""
    kept: set[str] = set()
    async for listed in store.list(names.branches(index)):
        try:
            branch = read_marker((await store.get(listed.name)).data, Branch, name=listed.name).index
            kept |= objects_of((await load_head(store, branch)).manifest, branch) | {listed.name}
        except NotFound:
            continue
        async for archived in store.list(names.manifests(branch)):
            manifest = await _manifest(store, archived.name)
            if manifest is not None:
                kept |= objects_of(manifest, branch)
    return kept


async def _build_names(store: ObjectStore, index: str, now_s: float) -> set[str]:
    """Objects that unfinished bulk builds have uploaded, and their progress records, while they may still be resumed."""
    kept: set[str] = set()
    async for listed in store.list(names.builds(index)):
        if now_s - listed.modified_s > BUILD_LIFE_S:
            continue
        try:
            progress = read_marker((await store.get(listed.name)).data, BuildProgress, name=listed.name)
        except NotFound:
            continue
        kept.add(listed.name)
        kept.update(progress.objects)
    return kept
