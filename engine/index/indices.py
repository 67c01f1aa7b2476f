"""The indices under one root: which there are, and how one ends. (How one begins: commit.create.)"""

from __future__ import annotations

import asyncio

import msgspec

from engine.config import INDEX_NAME
from engine.errors import CorruptData, EngineError, NotFound, UnsupportedFormat
from engine.format import names
from engine.index.commit import Ended, Head, end, load_head
from engine.index.sweep import names_held, names_kept_for_branches, names_of_successor
from engine.store.base import ObjectStore

_HEADS_AT_ONCE = 64


class Survey(msgspec.Struct, frozen=True):
    """All indices under a root, by name in order.

    heads       those that can be read
    unreadable  why the others cannot: damaged, or of a newer format
    ended       names of deleted indices
    """

    heads: dict[str, Head]
    unreadable: dict[str, EngineError]
    ended: list[str]


async def list_indices(store: ObjectStore) -> dict[str, Head]:
    """Every index and its manifest in force, by name in order; an error if one of them cannot be read. A listing and one GET for each name."""
    found = await survey(store)
    for error in found.unreadable.values():
        raise error
    return found.heads


async def survey(store: ObjectStore) -> Survey:
    """The same for those who look after all indices.

    One bad index must not stop what is done for the others. A store that fails is an error here, too. A folder that has no CURRENT never was
    an index: what lies there is somebody else's.
    """
    folders = [folder async for folder in store.list_folders("") if INDEX_NAME.fullmatch(folder)]
    bound = asyncio.Semaphore(_HEADS_AT_ONCE)

    async def head_of(name: str) -> Head | EngineError | None:
        async with bound:
            try:
                return await load_head(store, name)
            except (Ended, CorruptData, UnsupportedFormat) as error:
                return error
            except NotFound:
                return None

    found = dict(zip(folders, await asyncio.gather(*map(head_of, folders)), strict=True))
    return Survey(
        heads={name: head for name, head in found.items() if isinstance(head, Head)},
        unreadable={name: error for name, error in found.items() if isinstance(error, CorruptData | UnsupportedFormat)},
        ended=[name for name, error in found.items() if isinstance(error, Ended)],
    )


async def left_something(store: ObjectStore, ended: list[str]) -> list[str]:
    """Those deleted indices of which there is more than the deletion: shared by branches, or uploaded when it was too late. One LIST for each."""
    bound = asyncio.Semaphore(_HEADS_AT_ONCE)

    async def has_more(name: str) -> bool:
        async with bound:
            async for _ in store.list(names.of_index(name), after=names.current(name)):
                return True
            return False

    return [name for name, more in zip(ended, await asyncio.gather(*map(has_more, ended)), strict=True) if more]


async def drop(store: ObjectStore, index: str) -> bool:
    """Delete an index: it is gone for everybody when its deletion is committed, then its objects follow, except those that branches share.

    Returns whether there was one. Objects are listed before, so an index made again under the same name at the same time loses nothing.
    What a writer uploads meanwhile is left for garbage collection. What stays is the deletion, some 165 bytes in CURRENT (commit.py).
    Raises Conflict (`commit-conflict`) if commits were faster each time.
    """
    listed = [listed.name async for listed in store.list(names.of_index(index))]
    existed = await end(store, index)
    # A branch that is being made holds what it needs, and may be there before its maker dies; garbage collection takes the rest. Of a branch
    # of a branch that is being made, we see the marker and not yet the index: no marker goes before it is old.
    kept = await names_held(store, index) | await names_kept_for_branches(store, index)
    kept |= await names_of_successor(store, index)
    left = (names.current(index), names.branches(index))
    await store.delete([name for name in listed if name not in kept and not name.startswith(left)])
    return existed


async def erase(store: ObjectStore, index: str) -> None:
    """Delete an index whose name nobody uses a second time (one made of a fresh id), and its deletion as well: nothing stays."""
    await drop(store, index)
    await store.delete([names.current(index)])
