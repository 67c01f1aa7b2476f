"""Garbage collection: delete what nothing names any more, and never what somebody may still read.

Kept: whatever is named by CURRENT; by each generation that was in force within the grace period; by each pinned generation; by any
generation of a branch; by the progress of an unfinished bulk build (and the generation that shows its commit, if it died right after);
and every object younger than the grace period, because a writer may be about to name it (a commit whose uploads have become older than
that gives up, commit.py).

Order, which makes it safe against pins, readers and writers that appear meanwhile (see snapshots.py for the pinner's half):

    list all objects -> read who names what -> write down the doomed names -> read again who names what
    -> delete records of forgotten builds -> delete manifests -> delete the rest

All ages are taken by the store's own clock, as the difference of two of its timestamps. A crash at any point leaves rubbish and at
most a marker that makes pinning a doomed generation fail until the next sweep.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

from engine.config import MaintenanceParams
from engine.errors import NotFound
from engine.format import names
from engine.format.manifest import Manifest, decode_manifest
from engine.format.markers import Branch, BuildProgress, Pin, Sweep, read_marker, write_marker
from engine.index.clock import Clock, SystemClock
from engine.index.commit import load_head
from engine.index.references import objects_of
from engine.index.turns import in_turns
from engine.store.base import Listed, ObjectStore

TEMPORARY_PIN_LIFE_S = 86_400.0
UPLOAD_LIFE_S = 86_400.0
"""A presigned upload may be committed, and a large answer fetched, for a day."""
BUILD_LIFE_S = 7 * 86_400.0
"""An unfinished bulk build may be resumed for a week after its last progress. Its records live and go together: what is left when only the first
one is gone looks like a build that was committed (bulk.py)."""
MANIFESTS_AT_ONCE = 16
"""A manifest of a thousand segments is megabytes, and an hour of commits leaves hundreds of them."""


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
    kept = await _kept_names(store, index, now_s, grace_s)
    old = {
        name for name, listed in listing.items() if now_s - listed.modified_s > _life_s(name, index, grace_s) and not _is_root(name, index)
    }
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
        kept = await _kept_names(store, index, now_s, grace_s)
        doomed = [name for name in doomed if name not in kept]
        roots = (names.builds(index), names.manifests(index))
        for root in roots:
            await store.delete([name for name in doomed if name.startswith(root)])
        await store.delete([name for name in doomed if not name.startswith(roots)])
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


def _life_s(name: str, index: str, grace_s: float) -> float:
    """How old an object that nothing names must be."""
    return max(grace_s, UPLOAD_LIFE_S) if name.startswith(names.uploads(index)) else grace_s


def _is_root(name: str, index: str) -> bool:
    """Objects that are deleted by their own verbs only, never because nothing names them."""
    return name == names.current(index) or name.startswith(names.pins(index))


async def _kept_names(store: ObjectStore, index: str, now_s: float, grace_s: float) -> set[str]:
    """Every object name that must stay, read from the store now."""
    kept, pinned = await _pinned_names(store, index, now_s)
    builds = await _unfinished_builds(store, index, now_s)
    kept |= await names_kept_for_branches(store, index) | set().union(*builds.values())
    try:
        head = (await load_head(store, index)).manifest
    except NotFound:
        return kept
    kept |= objects_of(head, index)
    archived, replaced_s = await _history(store, index, head)
    # The archive of the one in force may be old, and the next commit relies on it.
    wanted = [g for g in archived if g >= head.generation or g in pinned or now_s - replaced_s[g] <= grace_s]
    async for name, manifest in _manifests(store, [archived[generation].name for generation in wanted]):
        kept |= objects_of(manifest, index) | {name}
    newest_first = [archived[generation].name for generation in sorted(archived, reverse=True)]
    async for name, proof in _proofs(store, index, builds.values(), head, newest_first):
        kept |= objects_of(proof, index) | {name}
    return kept


async def _manifests(store: ObjectStore, archives: Sequence[str]) -> AsyncIterator[tuple[str, Manifest]]:
    """(name, manifest) of those that are still there, in this order."""
    for some in in_turns(archives, MANIFESTS_AT_ONCE):
        found = await asyncio.gather(*(_manifest(store, name) for name in some))
        for name, manifest in zip(some, found, strict=True):
            if manifest is not None:
                yield name, manifest


async def _proofs(
    store: ObjectStore, index: str, builds: Iterable[set[str]], head: Manifest, archives: Sequence[str]
) -> AsyncIterator[tuple[str, Manifest]]:
    """For each bulk build that was committed but not tidied, the last generation that shows it, unless that is the one in force: a resumed
    run looks for it (bulk.py). archives: newest first."""
    in_force = objects_of(head, index)
    missing = [own for own in ({name for name in build if name.startswith(names.segments(index))} for build in builds) if own]
    missing = [own for own in missing if not own & in_force]
    if not missing:
        return
    async for name, manifest in _manifests(store, archives):
        shown = objects_of(manifest, index)
        if any(own & shown for own in missing):
            missing = [own for own in missing if not own & shown]
            yield name, manifest
        if not missing:
            return


async def _history(store: ObjectStore, index: str, head: Manifest) -> tuple[dict[int, Listed], dict[int, float]]:
    """Archived generations, listed after `head` was read so that none is missed, and when each was replaced at the latest (store's clock).

    A generation was replaced before its successor was archived, or, if the successor is in force, when CURRENT was written. Its own
    archive may be much older than that: a pin or an attempt that lost writes it early. No writer's clock is asked.
    """
    archived: dict[int, Listed] = {}
    async for listed in store.list(names.manifests(index)):
        life, generation = names.generation_of(listed.name)
        if life == head.index_id:
            archived[generation] = listed
    written_s = {generation: listed.modified_s for generation, listed in archived.items()}
    async for listed in store.list(names.current(index)):
        written_s[head.generation] = listed.modified_s
    return archived, {generation: written_s.get(generation + 1, written_s[generation]) for generation in archived}


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


async def names_held(store: ObjectStore, index: str) -> set[str]:
    """What rollbacks and branches under way hold by temporary pins: the pins, the generations and their objects."""
    kept: set[str] = set()
    async for listed in store.list(names.pins(index)):
        try:
            pin = read_marker((await store.get(listed.name)).data, Pin, name=listed.name)
        except NotFound:
            continue
        if pin.temporary:
            archive = names.manifest(index, pin.index_id, pin.generation)
            manifest = await _manifest(store, archive)
            kept |= {listed.name, archive} | (objects_of(manifest, index) if manifest is not None else set())
    return kept


async def names_kept_for_branches(store: ObjectStore, index: str) -> set[str]:
    """Objects of this index that living branches name in any of their kept generations, and the markers of those branches.

    A branch of a branch may be made, and the one between deleted, while we read: so markers are listed again until no new one has come, and
    branches that were not there yet are looked for once more. Not seen are two that are handed on so after the last listing.
    """
    kept: set[str] = set()
    seen: set[str] = set()
    while new := [listed.name async for listed in store.list(names.branches(index)) if listed.name not in seen]:
        for marker in new:
            seen.add(marker)
            kept |= await _names_of_branch(store, marker)
    for marker in sorted(seen - kept):
        kept |= await _names_of_branch(store, marker)
    return kept


async def names_of_successor(store: ObjectStore, index: str) -> set[str]:
    """What an index names that was made under the name of one that is being deleted, in any generation: as a branch of a branch of that one, it shares
    its objects, and has no marker. Asked after the branches, one of which it may be made of."""
    try:
        head = (await load_head(store, index)).manifest
    except NotFound:
        return set()
    kept = objects_of(head, index)
    archives = [listed.name async for listed in store.list(names.manifests(index)) if names.generation_of(listed.name)[0] == head.index_id]
    async for _, manifest in _manifests(store, archives):
        kept |= objects_of(manifest, index)
    return kept


async def _names_of_branch(store: ObjectStore, marker: str) -> set[str]:
    """What the branch that a marker speaks of names, and the marker; nothing if there is no such index."""
    try:
        branch = read_marker((await store.get(marker)).data, Branch, name=marker).index
        kept = objects_of((await load_head(store, branch)).manifest, branch) | {marker}
    except NotFound:
        return set()
    async for archived in store.list(names.manifests(branch)):
        manifest = await _manifest(store, archived.name)
        if manifest is not None:
            kept |= objects_of(manifest, branch)
    return kept


async def _unfinished_builds(store: ObjectStore, index: str, now_s: float) -> dict[str, set[str]]:
    """Of each unfinished bulk build, by its id: the objects that it has uploaded and its progress records, while it may still be resumed."""
    found: dict[str, set[str]] = {}
    records = [listed async for listed in store.list(names.builds(index))]
    last_s: dict[str, float] = {}
    for listed in records:
        last_s[whole_build(listed.name)] = max(listed.modified_s, last_s.get(whole_build(listed.name), 0.0))
    for listed in records:
        if now_s - last_s[whole_build(listed.name)] > BUILD_LIFE_S:
            continue
        try:
            progress = read_marker((await store.get(listed.name)).data, BuildProgress, name=listed.name)
        except NotFound:
            continue
        found.setdefault(progress.id, set()).update({listed.name}, progress.objects)
    return found


def whole_build(record_name: str) -> str:
    """The build that a progress record belongs to; the shares of a build by many processes (joint.py) have its id with a number."""
    return record_name.split("/")[-2].partition("-")[0]
