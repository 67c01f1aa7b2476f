"""A bulk build by many processes: its shares live and go together, whoever takes it up while garbage collection forgets it loses nothing, and what an
earlier preparation left behind is no part of it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import TypeVar

import msgspec
import numpy as np
import pytest

from corpus import make_corpus
from engine.config import IndexConfig, MaintenanceParams
from engine.errors import Conflict, CorruptData, InvalidRequest, NotFound
from engine.format import names
from engine.index import joint
from engine.index.bulk import Block
from engine.index.commit import create, load_head
from engine.index.reader import Reader
from engine.index.sweep import sweep, whole_build
from engine.index.verify import verify
from engine.store.base import Listed, ObjectStore
from engine.store.objects import open_store
from engine.store.wrappers import AroundStore, Call

T = TypeVar("T")
N_INPUTS, N_EACH = 2, 8
CORPUS = make_corpus(N_INPUTS * N_EACH, dim=16)
SMALL = MaintenanceParams(max_segment_documents=4)


class Input:
    """Eight documents of the corpus, in blocks that each become a segment."""

    n_documents, block = N_EACH, 4

    def __init__(self, number: int) -> None:
        self.number, self.fingerprint, self.n_tokens = number, f"input {number}", int(CORPUS.offsets[-1])

    def sample(self, n_tokens: int) -> np.ndarray:
        return CORPUS.tokens[:n_tokens]

    def blocks(self, first_document: int) -> Iterator[Block]:
        for first in range(first_document, N_EACH, self.block):
            start, n = self.number * N_EACH, min(self.block, N_EACH - first)
            yield Block(*CORPUS.part(start + first, start + first + n))


async def made() -> ObjectStore:
    store = open_store("memory://")
    await create(store, "a", IndexConfig())
    return store


async def prepare(store: ObjectStore, plan: str = "plan") -> str:
    return (await joint.prepare(Reader(store), "a", plan, Input(0), params=SMALL)).build


async def build_share(store: ObjectStore, build: str, number: int, source: Input | None = None) -> joint.ShareReport:
    return await joint.build_share(Reader(store), "a", build, number, source or Input(number), params=SMALL)


async def built(store: ObjectStore, plan: str = "plan") -> str:
    """A build whose shares are all done."""
    build = await prepare(store, plan)
    for number in range(N_INPUTS):
        assert (await build_share(store, build, number)).is_done
    return build


async def records(store: ObjectStore, build: str = "") -> list[str]:
    return [listed.name async for listed in store.list(names.builds("a") + build)]


async def check_whole(store: ObjectStore, n_documents: int = N_INPUTS * N_EACH) -> None:
    """The corpus once, and nothing missing of what any generation names."""
    snapshot = await Reader(store).snapshot("a")
    assert (await snapshot.live_ids()).tolist() == list(range(n_documents))
    assert {segment.codec for segment in snapshot.segments} <= {codec.id for codec in snapshot.manifest.codecs}
    assert (await verify(Reader(store), "a", all_generations=True)).problems == []


class Weeks(AroundStore):
    """A store to whose users what lies there now is eight days old, as long as it is not written anew; `act` runs before their call number `at`."""

    def __init__(self, inner: ObjectStore, old: list[Listed], at: int = -1, act: Callable[[], Awaitable[object]] | None = None) -> None:
        super().__init__(inner)
        self.old, self.n_calls, self._at, self._act = set(old), 0, at, act

    async def _around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        self.n_calls += 1
        if self.n_calls == self._at and self._act is not None:
            await self._act()
        return await run()

    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[Listed]:
        async for listed in super().list(prefix, after=after):
            yield msgspec.structs.replace(listed, modified_s=listed.modified_s - 8 * 86_400) if listed in self.old else listed


async def everything(store: ObjectStore, prefix: str = "") -> list[Listed]:
    found = [listed async for listed in store.list(prefix)]
    await asyncio.sleep(0.002)  # what is written from here on has another time
    return found


async def copied(store: ObjectStore) -> ObjectStore:
    copy = open_store("memory://")
    for listed in await everything(store):
        await copy.put_if_absent(listed.name, (await store.get(listed.name)).data)
    return copy


async def with_a_build(n_done: int = N_INPUTS) -> tuple[ObjectStore, str]:
    store = await made()
    build = await prepare(store)
    for number in range(n_done):
        await build_share(store, build, N_INPUTS - 1 - number)
    return store, build


async def at_each_call(
    store: ObjectStore, slow: Callable[[ObjectStore], Awaitable[object]], fast: Callable[[ObjectStore], Awaitable[object]], *, is_old: str
) -> AsyncIterator[ObjectStore]:
    """Copies of the store on which `fast` ran between one call of `slow` and the next; to the one of them that `is_old` names all that lay there is a
    week old. Errors of both that a state machine would report are nobody's failure here: what is left in the store counts."""
    for at in itertools.count(1):
        own = await copied(store)
        before = await everything(own)
        interrupted = Weeks(own, before if is_old == "slow" else [], at, partial(fast, Weeks(own, before if is_old == "fast" else [])))
        await slow(interrupted)
        if interrupted.n_calls < at:
            return
        yield own


REPORTED = (Conflict, NotFound, InvalidRequest, CorruptData)


async def sweeping(store: ObjectStore) -> None:
    await sweep(store, "a")


def finishing(build: str) -> Callable[[ObjectStore], Awaitable[None]]:
    async def finish(store: ObjectStore) -> None:
        with suppress(*REPORTED):
            await joint.finish(Reader(store), "a", build, N_INPUTS)

    return finish


async def starting_again(store: ObjectStore) -> None:
    """What a state machine does with the same request: prepare, every input, finish."""
    with suppress(*REPORTED):
        await joint.finish(Reader(store), "a", await built(store), N_INPUTS)


async def check_nothing_or_whole(store: ObjectStore) -> bool:
    """Whether the documents were there; if not, they are when the build is started again."""
    was_committed = (await load_head(store, "a")).manifest.n_documents > 0
    if not was_committed:
        assert (await joint.finish(Reader(store), "a", await built(store), N_INPUTS)).n_documents == N_INPUTS * N_EACH
    await check_whole(store)
    return was_committed


# Garbage collection


def test_a_record_belongs_to_its_build_whichever_share_wrote_it() -> None:
    build = joint.build_id("a", "life", "plan")
    owners = {
        whole_build(names.build("a", own, part))
        for own in (build, joint.share_id(build, "begun", 0), joint.share_id(build, "begun", 19_999))
        for part in (0, 7)
    }
    assert owners == {build}
    assert whole_build(names.build("a", joint.build_id("a", "life", "other"), 0)) != build


async def test_shares_of_a_build_are_kept_together_for_a_week_after_the_last_progress_of_any() -> None:
    store, _ = await with_a_build()
    own = await everything(store, names.builds("a"))
    for young in own:
        report = await sweep(Weeks(store, [listed for listed in await everything(store) if listed.name != young.name]), "a")
        assert report.n_deleted == 0, young.name
    await built(store, "another plan")
    report = await sweep(Weeks(store, [listed for listed in await everything(store) if listed in own]), "a")
    assert set(report.deleted) == {listed.name for listed in own}, "progress of another build keeps nothing"


@pytest.mark.parametrize("slow", ["sweep", "finish"])
async def test_a_build_that_is_finished_while_a_sweep_forgets_it_is_committed_whole_or_not_at_all(slow: str) -> None:
    store, build = await with_a_build()
    race = (sweeping, finishing(build)) if slow == "sweep" else (finishing(build), sweeping)
    committed = [
        await check_nothing_or_whole(own) async for own in at_each_call(store, *race, is_old="slow" if slow == "sweep" else "fast")
    ]
    assert set(committed) == {False, True}


@pytest.mark.parametrize("slow", ["sweep", pytest.param("start", marks=pytest.mark.slow)])
async def test_a_build_that_is_started_again_while_a_sweep_forgets_it_is_committed_whole_or_not_at_all(slow: str) -> None:
    store, _ = await with_a_build(n_done=N_INPUTS - 1)
    race = (sweeping, starting_again) if slow == "sweep" else (starting_again, sweeping)
    committed = [
        await check_nothing_or_whole(own) async for own in at_each_call(store, *race, is_old="slow" if slow == "sweep" else "fast")
    ]
    assert set(committed) == {False, True}


async def test_finishing_twice_at_the_same_time_is_finishing_once() -> None:
    store, build = await with_a_build()
    reports: list[bool] = []

    async def finish(own: ObjectStore) -> None:
        reports.append((await joint.finish(Reader(own), "a", build, N_INPUTS)).was_committed_before)

    async for own in at_each_call(store, finish, finish, is_old="neither"):
        assert sorted(reports) == [False, True]
        reports.clear()
        await check_whole(own)


# What an earlier run left behind


async def test_a_share_that_is_late_is_no_part_of_a_build_that_was_given_up_and_prepared_again() -> None:
    """Its segments are of the codec of the first preparation."""
    store, build = await with_a_build(n_done=0)

    async def late(own: ObjectStore) -> None:
        with suppress(*REPORTED):
            await build_share(own, build, 0)

    async def prepared_again(own: ObjectStore) -> None:
        await joint.give_up(own, "a", build)
        assert await prepare(own) == build

    async for own in at_each_call(store, late, prepared_again, is_old="neither"):
        assert not await check_nothing_or_whole(own)


@pytest.mark.parametrize("block", [4, 8])
async def test_a_share_of_whose_records_some_are_gone_begins_anew(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that died while it forgot the build leaves any of them; the release that goes on may cut segments elsewhere."""
    store, build = await with_a_build()
    own_records = (await records(store, build + "-"))[:3]
    monkeypatch.setattr(Input, "block", block)
    for n_gone in range(1, 4):
        for gone in itertools.combinations(own_records, n_gone):
            own = await copied(store)
            await own.delete(list(gone))
            assert not await check_nothing_or_whole(own)


async def test_records_that_do_not_follow_one_another_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second record of a share in place of a first one that covers as much as both."""
    store, build = await with_a_build()
    other = await copied(store)
    first, second = (await records(store, build + "-"))[:2]
    await other.delete(await records(other, build + "-"))
    monkeypatch.setattr(Input, "block", 8)
    for number in range(N_INPUTS):
        await build_share(other, build, number)
    await store.delete([first])
    await store.put_if_absent(first, (await other.get(first)).data)
    assert second in await records(store)
    with pytest.raises(Conflict, match="not done"):
        await joint.finish(Reader(store), "a", build, N_INPUTS)
