"""The indices under one root: which there are, and how one ends. (How one begins: commit.create.)"""

from __future__ import annotations

import asyncio

from engine.config import INDEX_NAME
from engine.errors import CorruptData, EngineError, NotFound, UnsupportedFormat
from engine.format import names
from engine.index.commit import Head, end, load_head
from engine.index.sweep import names_held, names_kept_for_branches, names_of_successor
from engine.store.base import ObjectStore

_HEADS_AT_ONCE = 64


async def list_indices(store: ObjectStore) -> dict[str, Head]:
    """Every index and its manifest in force, by name in order; an error if one of them cannot be read. A listing and one GET for each index."""
    heads, unreadable = await survey(store)
    for error in unreadable.values():
        raise error
    return heads


async def survey(store: ObjectStore) -> tuple[dict[str, Head], dict[str, EngineError]]:
    """The same for those who look after all indices: (what can be read, why the others cannot: damaged, or of a newer format), by name.

    One bad index must not stop what is done for the others. A store that fails is an error here, too.
    """
    folders = [folder async for folder in store.list_folders("") if INDEX_NAME.fullmatch(folder)]
    bound = asyncio.Semaphore(_HEADS_AT_ONCE)

    async def head_of(name: str) -> Head | EngineError | None:
        async with bound:
            try:
                return await load_head(store, name)
            except NotFound:
                return None  # what a deleted index left for its branches, or for garbage collection
            except (CorruptData, UnsupportedFormat) as error:
                return error

    found = dict(zip(folders, await asyncio.gather(*map(head_of, folders)), strict=True))
    heads = {name: head for name, head in found.items() if isinstance(head, Head)}
    return heads, {name: error for name, error in found.items() if isinstance(error, EngineError)}


async def drop(store: ObjectStore, index: str) -> bool:
    """Delete an index: it is gone for everybody when its deletion is committed, then its objects follow, except those that branches share.

    Returns whether there was one. Objects are listed before, so an index made again under the same name at the same time loses nothing.
    What a writer uploads meanwhile is left for garbage collection. What stays is the deletion, some 250 bytes in CURRENT (commit.py).
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
