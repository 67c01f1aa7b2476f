"""The indices under one root: which there are, and how one ends. (How one begins: commit.create.)"""

from __future__ import annotations

import asyncio

from engine.config import INDEX_NAME
from engine.errors import NotFound
from engine.format import names
from engine.index.commit import Head, load_head
from engine.index.sweep import names_held, names_kept_for_branches
from engine.store.base import ObjectStore

_HEADS_AT_ONCE = 64


async def list_indices(store: ObjectStore) -> dict[str, Head]:
    """Every index and its manifest in force, by name in order. A listing and one GET for each index."""
    folders = [folder async for folder in store.list_folders("") if INDEX_NAME.fullmatch(folder)]
    bound = asyncio.Semaphore(_HEADS_AT_ONCE)

    async def head_of(name: str) -> Head | None:
        async with bound:
            try:
                return await load_head(store, name)
            except NotFound:
                return None  # what a deleted index left for its branches, or for garbage collection

    heads = await asyncio.gather(*(head_of(name) for name in folders))
    return {name: head for name, head in zip(folders, heads, strict=True) if head is not None}


async def drop(store: ObjectStore, index: str) -> bool:
    """Delete an index: it is gone for everybody when CURRENT is, then its objects follow, except those that branches share.

    Returns whether there was one. Objects are listed before CURRENT goes, so an index made again under the same name at the same
    time loses nothing. What a writer uploads meanwhile is left for garbage collection.
    """
    listed = [listed.name async for listed in store.list(names.of_index(index))]
    existed = names.current(index) in listed
    await store.delete([names.current(index)])
    # A branch that is being made holds what it needs, and may be there before its maker dies; garbage collection takes the rest.
    kept = await names_held(store, index) | await names_kept_for_branches(store, index)
    await store.delete([name for name in listed if name not in kept and name != names.current(index)])
    return existed
