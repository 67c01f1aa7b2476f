"""How an index ends: by a commit like any other, the last one, so that whoever is faster or late loses nothing that is not his."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import pytest

from corpus import make_corpus
from engine.config import IndexConfig
from engine.errors import Conflict, NotFound, Unavailable
from engine.format.markers import Deletion, read_marker
from engine.index import snapshots
from engine.index.commit import Head, create
from engine.index.indices import drop, list_indices
from engine.index.reader import Reader
from engine.store.base import ObjectStore
from engine.store.objects import open_store
from engine.store.wrappers import AroundStore, Call

T = TypeVar("T")
CORPUS = make_corpus(40, dim=16)


async def _made() -> Reader:
    """ "x", with thirty documents of which five are deleted."""
    reader = Reader(open_store("memory://"))
    await create(reader.store, "x", IndexConfig())
    await reader.writer("x").add(*CORPUS.part(0, 30), fields=[{"n": n} for n in range(30)])
    await reader.writer("x").delete(np.arange(5))
    return reader


async def _ids(reader: Reader, index: str) -> list[int]:
    return (await (await reader.snapshot(index)).live_ids()).tolist()


class _Meanwhile(AroundStore):
    """Somebody is faster, once: `act` runs before the first write or deletion of CURRENT of one index, through a store of its own."""

    def __init__(self, inner: ObjectStore, index: str, act: Callable[[], Awaitable[None]]) -> None:
        super().__init__(inner)
        self._name, self._act = f"{index}/CURRENT", act

    async def _around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        act = self._act
        if call.kind in ("put", "replace", "delete") and call.name == self._name:
            self._act = _nothing
            await act()
        return await run()


async def _nothing() -> None: ...


async def test_a_branch_that_is_withdrawn_leaves_the_index_that_took_its_name_after_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, between its last look and its last request."""
    reader = await _made()

    async def replaced() -> None:
        await drop(reader.store, "y")
        await create(reader.store, "y", IndexConfig())

    async def create_and_lose_the_parent(*args: Any, **kwargs: Any) -> Head:
        made = await create(reader.store, *args[1:], **kwargs)
        await drop(reader.store, "x")
        return made

    monkeypatch.setattr(snapshots, "create", create_and_lose_the_parent)
    with pytest.raises(NotFound):
        await snapshots.branch(_Meanwhile(reader.store, "y", replaced), "x", "y")
    assert list(await list_indices(reader.store)) == ["y"]


async def test_two_deletions_of_an_index_leave_the_one_that_was_made_between_them() -> None:
    reader = await _made()

    async def deleted_and_made_again() -> None:
        await drop(reader.store, "x")
        await create(reader.store, "x", IndexConfig())
        await Reader(reader.store).writer("x").add(*CORPUS.part(0, 2))

    await drop(_Meanwhile(reader.store, "x", deleted_and_made_again), "x")
    assert await _ids(Reader(reader.store), "x") == [0, 1]


async def test_a_deletion_meets_a_commit_and_ends_what_it_made() -> None:
    reader = await _made()

    async def grown() -> None:
        await Reader(reader.store).writer("x").add(*CORPUS.part(0, 2))

    assert await drop(_Meanwhile(reader.store, "x", grown), "x")
    assert await list_indices(reader.store) == {}


async def test_a_creation_that_arrives_late_or_twice_brings_back_nothing_that_was_deleted() -> None:
    store = open_store("memory://")
    await create(store, "x", IndexConfig())
    first = bytes((await store.get("x/CURRENT")).data)
    await drop(store, "x")
    with pytest.raises(Conflict):
        await store.put_if_absent("x/CURRENT", first)
    assert await list_indices(store) == {}


async def test_a_creation_of_which_nobody_can_tell_whether_it_took_effect_is_not_made_twice() -> None:
    """Between its look and its request the name was used and given up: by somebody else, or by this very request, whose answer was lost."""
    store = open_store("memory://")

    async def came_and_went() -> None:
        await create(store, "x", IndexConfig())
        await drop(store, "x")

    with pytest.raises(Unavailable):
        await create(_Meanwhile(store, "x", came_and_went), "x", IndexConfig())
    assert await list_indices(store) == {}
    await create(store, "x", IndexConfig())


async def test_a_damaged_index_can_be_deleted_and_made_again() -> None:
    store = open_store("memory://")
    await store.put_if_absent("x/CURRENT", b"not an index")
    assert await drop(store, "x")
    assert not await drop(store, "x")
    await create(store, "x", IndexConfig())


async def test_what_is_left_of_a_deleted_index_is_its_deletion() -> None:
    reader = await _made()
    life = (await reader.snapshot("x")).manifest
    await drop(reader.store, "x")
    [left] = [listed async for listed in reader.store.list("x/")]
    found = read_marker((await reader.store.get(left.name)).data, Deletion, name=left.name)
    assert (left.name, found.index_id, found.generation) == ("x/CURRENT", life.index_id, life.generation)
    assert left.size_bytes < 300
