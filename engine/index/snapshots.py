"""Time: generations, pins, rollback, branches.

A *pin* is a named generation that garbage collection keeps. A *branch* is a new index over the same objects; each index whose prefix
holds objects of a branch carries a marker naming it, so that its garbage collection asks there too.

Pinning races with garbage collection, and no clock decides the race: the sweeper first writes down what it is about to delete and then
reads the pins; the pinner first writes its pin and then reads what sweepers wrote down. One of them sees the other, and if the pinner
does, it withdraws with a clear error. Everything here that revives an old generation (rollback, branch) pins it first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from engine.config import CommitParams, check_index_name
from engine.errors import Conflict, InvalidRequest, NotFound
from engine.format import names
from engine.format.manifest import Manifest, decode_manifest
from engine.format.markers import Branch, Pin, read_marker, write_marker
from engine.index.clock import Clock, SystemClock
from engine.index.commit import Draft, Head, archive, commit, create, end, load_head
from engine.index.references import homes_of, objects_of, rehomed
from engine.index.sweep import MANIFESTS_AT_ONCE, doomed_by_sweeps
from engine.index.turns import in_turns
from engine.store.base import ObjectStore


class Generation(msgspec.Struct, frozen=True):
    """One line of an index's history."""

    generation: int
    created_s: float
    cause: str
    n_documents: int
    n_segments: int
    pins: tuple[str, ...]
    is_current: bool


async def manifest_at(store: ObjectStore, index: str, generation: int | None, *, head: Head | None = None) -> Manifest:
    """The manifest of a kept generation; None is the one in force. NotFound (`generation-not-found`) if it is not kept."""
    head = head or await load_head(store, index)
    if generation is None or generation == head.manifest.generation:
        return head.manifest
    name = names.manifest(index, head.manifest.index_id, generation)
    try:
        found = await store.get(name)
    except NotFound as error:
        raise NotFound(
            "no such generation, or it is no longer kept",
            code="generation-not-found",
            index=index,
            generation=generation,
            current=head.manifest.generation,
        ) from error
    return decode_manifest(found.data, name=name)


async def generations(store: ObjectStore, index: str, *, last: int | None = None) -> list[Generation]:
    """Every kept generation, newest first; at most `last` of them. One GET each, MANIFESTS_AT_ONCE together, beside a listing."""
    head = await load_head(store, index)
    numbers = sorted([number async for number, _ in archived(store, index, head.manifest.index_id)], reverse=True)
    wanted = [number for number in numbers if number != head.manifest.generation][: None if last is None else max(last - 1, 0)]
    pinned: dict[int, list[str]] = {}
    for name, pin in (await pins(store, index)).items():
        pinned.setdefault(pin.generation, []).append(name)
    lines = [_line(head.manifest, pinned, is_current=True)]
    for some in in_turns(wanted, MANIFESTS_AT_ONCE):
        manifests = await asyncio.gather(*(manifest_at(store, index, number, head=head) for number in some))
        lines += [_line(manifest, pinned, is_current=False) for manifest in manifests]
    return lines


def _line(manifest: Manifest, pinned: dict[int, list[str]], *, is_current: bool) -> Generation:
    pin_names = tuple(sorted(pinned.get(manifest.generation, ())))
    return Generation(
        manifest.generation, manifest.created_s, manifest.cause, manifest.n_documents, len(manifest.segments), pin_names, is_current
    )


async def archived(store: ObjectStore, index: str, index_id: str) -> AsyncIterator[tuple[int, float]]:
    """(generation, when it was archived by the store's clock) of each archived manifest of this life of the index."""
    async for listed in store.list(names.manifests(index)):
        life, generation = names.generation_of(listed.name)
        if life == index_id:
            yield generation, listed.modified_s


async def generation_at_time(store: ObjectStore, index: str, time_s: float) -> int:
    """The generation that was in force at a time (unix seconds). NotFound if the index or its history is younger."""
    for line in await generations(store, index):
        if line.created_s <= time_s:
            return line.generation
    raise NotFound("no kept generation is that old", code="generation-not-found", index=index, time_s=time_s)


async def pins(store: ObjectStore, index: str) -> dict[str, Pin]:
    """Name to pin. A pin deleted while we look is not there."""
    found: dict[str, Pin] = {}
    async for listed in store.list(names.pins(index)):
        try:
            found[listed.name.removeprefix(names.pins(index))] = read_marker((await store.get(listed.name)).data, Pin, name=listed.name)
        except NotFound:
            continue
    return found


async def pin(
    store: ObjectStore,
    index: str,
    name: str,
    *,
    generation: int | None = None,
    note: str = "",
    temporary: bool = False,
    clock: Clock | None = None,
) -> Pin:
    """Keep a generation (None: the one in force) under a name, until `unpin`.

    Raises Conflict (`already-exists`) if the name is taken by another generation, NotFound if the generation is not kept or is just
    being collected. Cost: two or three rounds.
    """
    if not names.is_pin_name(name):
        raise InvalidRequest("a pin's name is 1 to 128 letters, digits, dots, dashes or underscores", name=repr(name)[:140])
    head = await load_head(store, index)
    manifest = await manifest_at(store, index, generation, head=head)
    if manifest is head.manifest:
        await archive(store, index, head)
    wanted = Pin(
        index_id=manifest.index_id,
        generation=manifest.generation,
        created_s=(clock or SystemClock()).now_s(),
        note=note,
        id=names.fresh_id(),
        temporary=temporary,
    )
    await store.put_if_absent(names.pin(index, name), write_marker(wanted))
    if await _is_being_collected(store, index, manifest):
        await store.delete([names.pin(index, name)])
        raise NotFound("the generation is just being collected", code="generation-not-found", index=index, generation=manifest.generation)
    return wanted


async def _is_being_collected(store: ObjectStore, index: str, manifest: Manifest) -> bool:
    """Whether a sweep has written down an object of this generation, or has deleted its manifest already."""
    archive_name = names.manifest(index, manifest.index_id, manifest.generation)
    wanted = objects_of(manifest, index) | {archive_name}
    for home in sorted({index, *homes_of(manifest, index)}):
        if wanted & await doomed_by_sweeps(store, home):
            return True
    try:
        await store.get(archive_name)
    except NotFound:
        return True
    return False


async def unpin(store: ObjectStore, index: str, name: str) -> None:
    """Forget a pin. NotFound (`pin-not-found`) if there is none."""
    try:
        await store.get(names.pin(index, name))
    except NotFound as error:
        raise NotFound("no pin of this name", code="pin-not-found", index=index, pin=name) from error
    await store.delete([names.pin(index, name)])


@asynccontextmanager
async def held(store: ObjectStore, index: str, generation: int | None, purpose: str) -> AsyncIterator[Manifest]:
    """A generation that cannot be collected while the block runs. A crash leaves a temporary pin, which
    garbage collection ignores after a day."""
    name = f"{purpose}-{names.fresh_id()}"
    kept = await pin(store, index, name, generation=generation, note=f"held by {purpose}", temporary=True)
    try:
        manifest = await manifest_at(store, index, kept.generation)
        if manifest.index_id != kept.index_id:
            raise Conflict("the index was deleted and made again meanwhile", index=index)
        yield manifest
    finally:
        await store.delete([names.pin(index, name)])


async def rollback(
    store: ObjectStore, index: str, generation: int, *, params: CommitParams | None = None, clock: Clock | None = None
) -> Head:
    """Make the documents and settings of an old generation current again, as a new generation. Ids stay unique: next_id never falls."""
    async with held(store, index, generation, "rollback") as old:

        async def apply(manifest: Manifest) -> Draft:
            if manifest.index_id != old.index_id:
                raise Conflict("the index was deleted and made again meanwhile", index=index)
            return Draft(msgspec.structs.replace(old, next_id=max(manifest.next_id, old.next_id)))

        return await commit(store, index, apply, cause=f"roll back to generation {generation}", params=params, clock=clock)


async def branch(store: ObjectStore, index: str, name: str, *, generation: int | None = None, clock: Clock | None = None) -> Head:
    """Make a new index `name` over the objects of a generation, without copying them. Both then go their own ways.

    Raises Conflict (`index-exists`) if `name` is taken. Costs a handful of requests whatever the size.
    """
    check_index_name(name)
    if name == index:
        raise InvalidRequest("a branch needs a name of its own", index=index)
    async with held(store, index, generation, "branch") as manifest:
        shared = rehomed(manifest, index)
        homes = homes_of(shared, name)
        marker = write_marker(Branch(index=name, generation=manifest.generation, created_s=(clock or SystemClock()).now_s()))
        own_name = (
            f"{name}-{names.fresh_id()}"  # of this branching: a marker left by an earlier one may be about to be deleted with its home
        )
        for home in sorted(homes):
            await store.put_if_absent(names.branch(home, own_name), marker)
        cause = f"branch of {index} generation {manifest.generation}"
        made = await create(store, name, manifest.config, contents=shared, cause=cause, clock=clock)
        try:
            parent: Head | None = await load_head(store, index)
        except NotFound:
            parent = None
        if parent is None or parent.manifest.index_id != manifest.index_id:  # deleted meanwhile, perhaps before it could see the branch
            await end(store, name, life=made.manifest.index_id, clock=clock)
            raise NotFound("the index was deleted meanwhile", code="index-not-found", index=index)
        return made
