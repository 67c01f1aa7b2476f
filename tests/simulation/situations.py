"""Situations that a protocol is most afraid of, as scenes with drawn parameters (scenes.py): who stands still, and at which of his requests; what
the others do in that time; how old everything is. Chance alone brings each of them together once in hundreds of thousands of steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .actors import INDICES

if TYPE_CHECKING:
    from .scenes import Stage

LONGER_THAN_GRACE_S = (3700.0, 4000.0, 8000.0)
STANDING_S = (3.0, 3.0, 3.0, 290.0)
"""A request that is answered after its client's patience (4 s) is often given up, and with it the call."""
ASKED_AGAIN_S = 6.0
"""Longer than a client's patience, and short enough that it sends the request once more."""
WRITERS = ("add", "add", "keyed", "delete", "update", "compact", "rollback")


async def parting(stage: Stage, index: str) -> None:
    """A branch, mostly of a branch, is being made while those that it comes from are deleted."""
    family = await _family(stage, index, stage.rng.choice((0, 0, 1, 1, 2)))
    player = stage.rng.choice(stage.players)

    async def others(n: int) -> None:
        if n:
            return
        victims = family[:-1] if stage.rng.random() < 0.7 else [stage.rng.choice(family[:-1])]
        for victim in stage.rng.sample(victims, len(victims)):
            await stage.one_does("drop", victim, player)
        if stage.rng.random() < 0.2:
            await stage.one_does("remade", stage.rng.choice(victims), player)

    halts, places = (
        [_pause_s(stage)],
        [stage.rng.choice(("put branches 1", "put branches 1", "put branches 2", "put pins 1", "put CURRENT 1"))],
    )
    if len(family) == 2 and stage.rng.random() < 0.7:  # the maker dies before it has looked back
        halts, places = [3.0, 0.0], ["put branches 1", "put CURRENT 1"]
    await stage.interrupted(player, "branch_to", family[-2], halts, others, places, name=family[-1])
    if stage.rng.random() < 0.5:
        await stage.one_does("drop", stage.rng.choice(family[:-1]))
    await _an_hour_later(stage, family)


async def again(stage: Stage, index: str) -> None:
    """A branch that was deleted is made once more while the remains of the first one are collected; then the others part with what they share."""
    family = await _family(stage, index, stage.rng.choice((0, 0, 1)))
    player = stage.rng.choice(stage.players)
    await stage.one_does("branch_to", family[-2], name=family[-1])
    await stage.one_does("drop", family[-1])
    await asyncio.sleep(stage.rng.choice((10.0, *LONGER_THAN_GRACE_S)))

    async def others(_: int) -> None:
        await stage.one_does("sweep" if len(family) < 3 or stage.rng.random() < 0.6 else "drop", index, player)

    place = stage.rng.choice(("put branches 1", "put branches 1", "put pins 1", "put CURRENT 1"))
    await stage.interrupted(player, "branch_to", family[-2], [_pause_s(stage)], others, [place], name=family[-1])
    for parent in family[:-1]:
        await stage.one_does(stage.rng.choice(("drop", "drop", "empty")), parent)
    await _an_hour_later(stage, family)


async def handing(stage: Stage, index: str) -> None:
    """An index is deleted or swept and stands still while one of its branches is branched and deleted itself."""
    family = await _family(stage, index, stage.rng.choice((1, 1, 2)))
    player = stage.rng.choice(stage.players)
    call = stage.rng.choice(("drop", "drop", "sweep"))
    if call == "sweep":
        await stage.one_does("empty", index)
        await asyncio.sleep(stage.rng.choice(LONGER_THAN_GRACE_S))

    async def others(_: int) -> None:
        await stage.one_does("branch_to", family[-2], player, name=family[-1])
        for between in reversed(family[1:-1]):
            await stage.one_does("drop", between, player)

    places = ["list pins 1", "list branches 1", "list branches 1", "get branches 1"]
    if call == "sweep":
        places += ["list branches 2", "get branches 2"]
    await stage.interrupted(player, call, index, [_pause_s(stage)], others, [stage.rng.choice(places)])
    await _an_hour_later(stage, family)


async def revival(stage: Stage, index: str) -> None:
    """A sweep stands still twice: first an old generation is put in force again, then it goes again."""
    if stage.rng.random() < 0.7:
        await stage.one_does("remade", index)
    await _fill(stage, index)
    await stage.one_does(stage.rng.choice(("empty", "empty", "fold")), index)
    if stage.rng.random() < 0.5:
        await stage.one_does("add", index)
    await asyncio.sleep(stage.rng.choice(LONGER_THAN_GRACE_S))
    player = stage.rng.choice(stage.players)

    async def others(n: int) -> None:
        calls = ("revive",) if n == 0 else ("empty", "empty", "empty", "empty", "fold", "pin", "branch")
        await stage.one_does(stage.rng.choice(calls), index, player)

    first = stage.rng.choice(("get CURRENT 1", "list manifests 1", "list all 2", "get CURRENT 2", "get CURRENT 2", "get CURRENT 2"))
    second = stage.rng.choice(("put sweeps 2", "list pins 2", "list manifests 2", "list manifests 2", "list manifests 2"))
    await stage.interrupted(player, "sweep", index, [_pause_s(stage), _pause_s(stage)], others, [first, second])
    await stage.one_does(stage.rng.choice(("read", "old", "pinned", "stale")), index)


async def late_writer(stage: Stage, index: str) -> None:
    """A writer whose uploads are there, and the archive from long ago, stands still before its commit while somebody sweeps."""
    await _fill(stage, index)
    if stage.rng.random() < 0.7:
        await stage.one_does("glance", index)
    await asyncio.sleep(stage.rng.choice((10.0, *LONGER_THAN_GRACE_S)))
    player = stage.rng.choice(stage.players)

    async def others(_: int) -> None:
        if stage.rng.random() < 0.2:
            await stage.one_does(stage.rng.choice(WRITERS), index, player)
        await stage.one_does("sweep", index, player)

    place = stage.rng.choice(
        ("get manifests 1", "get manifests 1", "put manifests 1", "put data 1")
    )  # get: what was there already is read back
    await stage.interrupted(player, stage.rng.choice(WRITERS), index, [_pause_s(stage)], others, [place])
    await stage.one_does(stage.rng.choice(("read", "stale", "old")), index)


async def reborn(stage: Stage, index: str) -> None:
    """The deletion of an index stands still while the index is made again."""
    await _fill(stage, index)
    if stage.rng.random() < 0.3:
        await stage.one_does("branch", index)
    player = stage.rng.choice(stage.players)

    async def others(_: int) -> None:
        for _ in range(stage.rng.choice((1, 1, 2))):
            await stage.one_does("remade", index, player)

    place = stage.rng.choice(("list all 1", "list all 2", "put CURRENT 1", "put CURRENT 1", "list pins 1", "list branches 1"))
    pause_s = stage.rng.choice((ASKED_AGAIN_S, _pause_s(stage))) if place == "put CURRENT 1" else _pause_s(stage)
    await stage.interrupted(player, "drop", index, [pause_s], others, [place])
    await stage.one_does("read", index)


async def withdrawn(stage: Stage, index: str) -> None:
    """A branch has lost its parent and is about to be withdrawn, while its name is given to another index, or to nobody."""
    family = await _family(stage, index, 0)
    player = stage.rng.choice(stage.players)

    async def others(n: int) -> None:
        if n == 0:
            await stage.one_does(stage.rng.choice(("drop", "drop", "remade")), index, player)
        for _ in range(0 if n == 0 and stage.rng.random() < 0.5 else stage.rng.choice((1, 1, 2))):
            await stage.one_does(stage.rng.choice(("remade", "remade", "drop", "add")), family[-1], player)

    places = ["put CURRENT 1", stage.rng.choice(("get CURRENT 4", "get CURRENT 5", "get CURRENT 5", "put CURRENT 2"))]
    await stage.interrupted(player, "branch_to", index, [stage.rng.choice(STANDING_S), _pause_s(stage)], others, places, name=family[-1])
    await stage.one_does("read", family[-1])


async def taken_up(stage: Stage, index: str) -> None:
    """A bulk build dies around its commit, its documents go, and when its generation is an hour old it is swept and taken up."""
    if stage.world.current(index) is None or stage.rng.random() < 0.3:
        await stage.one_does("remade", index)
    player = stage.rng.choice(stage.players)

    async def others(_: int) -> None:
        await stage.one_does(stage.rng.choice(("empty", "empty", "fold", "add")), index, player)

    is_committed = stage.rng.random() < 0.6
    places = ("put CURRENT 1", "put CURRENT 1", "delete builds 1") if is_committed else ("put builds 2", "put builds 3", "put manifests 1")
    await stage.interrupted(player, "build", index, [0.0], others, [stage.rng.choice(places)])
    await asyncio.sleep(stage.rng.choice((1800.0, *LONGER_THAN_GRACE_S)))

    async def sweeps(_: int) -> None:
        for _ in range(stage.rng.choice((1, 1, 2))):
            await stage.one_does("sweep", index)

    if is_committed:
        await sweeps(0)
        await stage.one_does("take_up", index)
    else:
        place = stage.rng.choice(("put manifests 1", "put manifests 1", "put manifests 1", "put builds 1", "get builds 1"))
        await stage.interrupted(stage.rng.choice(stage.players), "take_up", index, [_pause_s(stage)], sweeps, [place])
    await stage.one_does(stage.rng.choice(("read", "sweep", "take_up")), index)


async def twins(stage: Stage, index: str) -> None:
    """A bulk build is only slow; another process takes it up and dies; the first one goes on, and dies later; a third one takes it up. Or the other one
    begins and ends it while the first has not yet noted anything."""
    if stage.world.current(index) is None or stage.rng.random() < 0.3:
        await stage.one_does("remade", index)
    first, second = stage.rng.sample(stage.players, 2)

    async def nobody(_: int) -> None:
        pass

    async def others(n: int) -> None:
        if n == 0:
            place = stage.rng.choice(("put builds 1", "put builds 1", "put builds 2", "put CURRENT 1"))
            await stage.interrupted(second, "take_up", index, [0.0], nobody, [place])

    async def another_ends_it(_: int) -> None:
        await stage.one_does("take_up", index, first)

    if stage.rng.random() < 0.3:
        place = stage.rng.choice(("get CURRENT 1", "get CURRENT 2", "put data 1"))
        await stage.interrupted(first, "build", index, [stage.rng.choice((3.0, ASKED_AGAIN_S))], another_ends_it, [place])
    else:
        places = [
            stage.rng.choice(("put data 1", "put data 2", "put data 3")),
            stage.rng.choice(("put builds 2", "put builds 3", "put builds 4")),
        ]
        await stage.interrupted(first, "build", index, [3.0, 0.0], others, places)
    await stage.one_does("take_up", index)
    await stage.one_does("read", index)


async def overtaken(stage: Stage, index: str) -> None:
    """A compaction stands still while the documents that it carries change."""
    if stage.world.current(index) is None or stage.rng.random() < 0.4:
        await stage.one_does("remade", index)
    for _ in range(stage.rng.randint(2, 4)):
        await stage.one_does(stage.rng.choice(("add", "keyed", "group")), index)
    player = stage.rng.choice(stage.players)

    async def others(_: int) -> None:
        for _ in range(stage.rng.randint(1, 3)):
            await stage.one_does(stage.rng.choice(("delete", "delete", "update", "update", "add", "rollback")), index, player)

    place = stage.rng.choice(("range data 1", "get data 1", "get data 1", "put data 1", "put manifests 1"))
    await stage.interrupted(player, "fold", index, [_pause_s(stage)], others, [place])
    await stage.one_does("read", index)


SITUATIONS: dict[str, Callable[[Stage, str], Coroutine[Any, Any, None]]] = {
    scene.__name__: scene for scene in (parting, again, handing, revival, late_writer, reborn, withdrawn, taken_up, twins, overtaken)
}


def _pause_s(stage: Stage) -> float:
    """How long somebody stands still; now and then he dies."""
    return 0.0 if stage.rng.random() < 0.07 else stage.rng.choice(STANDING_S)


async def _fill(stage: Stage, index: str) -> None:
    """An index with documents."""
    if stage.world.current(index) is None or stage.rng.random() < 0.3:
        await stage.one_does("remade", index)
    if stage.rng.random() < 0.4:
        await stage.one_does(stage.rng.choice(("group", "keyed", "delete", "update", "fold", "pin")), index)
    await stage.one_does("add", index)


async def _family(stage: Stage, index: str, n_branches: int) -> list[str]:
    """An index with documents, branches each of the one before, and last a name that is free."""
    await _fill(stage, index)
    family = [index, *stage.rng.sample([other for other in INDICES if other != index], n_branches + 1)]
    for name in family[1:]:
        if stage.world.current(name) is not None:
            await stage.one_does("drop", name)
    for parent, name in pairwise(family[:-1]):
        await stage.one_does("branch_to", parent, name=name)
        if stage.rng.random() < 0.2:
            await stage.one_does("add", name)
    return family


async def _an_hour_later(stage: Stage, family: list[str]) -> None:
    """What is left of each is swept, and what should be there is read. A branch whose maker died is whole, or is not there."""
    await asyncio.sleep(stage.rng.choice(LONGER_THAN_GRACE_S))
    last = stage.world.current(family[-1])
    if last is not None and last.life.damage:
        stage.world.fail("dangling", f"{family[-1]}, at rest: {last.life.damage}")
    for name in family[:-1]:
        if name == family[0] or stage.rng.random() < 0.5:
            await stage.one_does("sweep", name)
    await stage.one_does("read", family[-1])
