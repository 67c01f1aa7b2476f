"""Directed episodes: one call stands still, or dies, between two of its requests, while others do what may hurt it; then time passes and somebody looks.

Chance alone seldom brings together what a protocol is most afraid of: a sweep that stops between its second look and its deletions, just
when a generation that is an hour old is made the next one's ancestor. Here the seed draws which call stands still and after which of its
requests, what the others do meanwhile, and how old everything is by then. The checks are the same as everywhere (world.py).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from engine.index import snapshots
from engine.index.aliases import Aliases

from .actors import INDICES, Client
from .scheduler import PROCESS, Process
from .situations import SITUATIONS
from .world import World

SCENES = ("standstill", "standstill", "standstill", "abandoned", "growth", *SITUATIONS)
STANDING = {
    "sweep": 9.0,
    "drop": 5.0,
    "add": 3.0,
    "delete": 1.0,
    "compact": 1.5,
    "rollback": 1.0,
    "pin": 1.5,
    "branch": 1.5,
    "create": 0.5,
    "build": 1.5,
    "old": 1.0,
    "point": 0.5,
}
"""Calls that stand still, and how often."""
WRITING = ("add", "keyed", "delete", "update", "compact", "rollback", "empty")
MEANWHILE = {
    "sweep": ("rollback", "rollback", "rollback", "add", "delete", "empty", "compact", "pin", "branch", "handover", "remade", "resume"),
    "drop": ("remade", "remade", "remade", "handover", "handover", "handover", "branch", "add", "pin", "rollback"),
    "pin": ("sweep", "sweep", "drop", "remade", "add", "compact"),
    "branch": ("sweep", "drop", "drop", "remade", "handover", "rollback"),
    "rollback": ("sweep", "sweep", "remade", *WRITING),
    "create": ("create", "remade", "drop", "branch"),
    "build": ("resume", "resume", "remade", "sweep", *WRITING),
    "old": ("sweep", "compact", "remade"),
    "point": ("point", "point", "unpoint", "resolve"),
}
"""What others do while a call stands still; for what is not here, WRITING and more."""
ELSE = (*WRITING, "add", "remade", "sweep", "configure")
BEFORE = ("add", "add", "keyed", "group", "delete", "update", "compact", "glance", "pin", "branch", "rollback", "unpin", "empty")
AFTER = ("stale", "stale", "read", "sweep", "old", "pinned", "add", "resume", "search", "compact")
HOUR_S = 3600.0
WEEK_S = 7 * 86_400.0


class Player(Client):
    """A client with a few more habits."""

    async def _remade(self, index: str) -> None:
        """The index ends if it has not, and begins anew, with documents."""
        if self.world.current(index) is not None and self.rng.random() < 0.7:
            await self._drop(index)
        await self._create(index)
        await self._add(index)

    async def _handover(self, index: str) -> None:
        """A branch of a branch is made, and the one between deleted."""
        branches = [other for other in INDICES if (found := self.world.current(other)) and other != index and _leans_on(found.objects, index)]
        between = self.rng.choice(branches) if branches else self._living(self.rng.choice(INDICES))
        free = [other for other in INDICES if other not in (index, between)]
        last = self.rng.choice([other for other in free if self.world.current(other) is None] or free)
        if self.world.current(last) is not None:
            await self._drop(last)
        await self._branch_to(between, last)
        await self._drop(between)

    async def _empty(self, index: str) -> None:
        """Every document is deleted."""
        record = self.world.current(index)
        if record is not None and record.state.docs:
            ids = sorted(record.state.docs)
            op = self.world.begin("delete", index, self.process, ids=ids)
            await self._call(op, self.reader.writer(index).delete(np.array(ids)), lambda n: n)

    async def _revive(self, index: str) -> None:
        """Back to a generation that names what the one in force does not."""
        now = self.world.current(index)
        if now is None:
            return
        there = self.world.bucket.objects
        of_life = [record for (life, _), record in self.world.records.items() if life == now.life.id]
        wanted = [one.generation for one in of_life if one.archive in there and one.objects - now.objects and one.objects <= there.keys()]
        if wanted:
            op = self.world.begin("rollback", index, self.process, generation=self.rng.choice(wanted))
            await self._call(op, snapshots.rollback(self.reader.store, index, op.args["generation"], clock=self.reader.clock))

    async def _take_up(self, index: str) -> None:
        """The build of this index that was left last is run again."""
        left = [one for one in self.world.unfinished if one[0] == index]
        if left:
            self.world.counts["builds resumed"] += 1
            await self._build_from(*left[-1])


def _leans_on(objects: frozenset[str], index: str) -> bool:
    return any(name.startswith(index + "/") for name in objects)


class _Watch:
    """Counts the requests of one process, and stops the process after some of them.

    A *place* is a kind of request, what it is about, and the how-manieth of that sort it is ("get CURRENT 2"). Places of each call are remembered, so that
    the next one can be stopped at any of them with like chance, however many requests of one sort there are.
    """

    def __init__(self, stage: Stage, player: Player, known: dict[str, None], halts: list[float], at: Sequence[str] = ()) -> None:
        self.stage, self.player, self.known, self.halts, self.at = stage, player, known, halts, list(at)
        self.of_one = ""
        """Not empty: requests about other indices are of other sorts."""
        self.n_halted = 0
        self.stopped = asyncio.Event()
        """Set at each stop, and when the call has ended."""
        self.seen: Counter[str] = Counter()
        self.n_left, self.place = 0, ""
        self._aim()

    def _aim(self) -> None:
        """Where the next stop is to be: at the place that is given, or a drawn one, or after a number of requests."""
        rng = self.stage.rng
        if self.at:
            self.place = self.at.pop(0)
            return
        places = [place for place in self.known if self.seen[place.rpartition(" ")[0]] < int(place.rpartition(" ")[2])]
        weights = [_weight(place) for place in places]
        self.place = rng.choices(places, weights)[0] if len(places) > 3 and rng.random() < 0.85 else ""
        self.n_left = rng.randint(1, 12)

    def __call__(self, kind: str, name: str) -> None:
        folder = name.partition("/")[2].partition("/")[0] or "all"
        if self.of_one and not name.startswith(self.of_one):
            folder = f"other-{folder}"  # a sweep looks into indices that it does not sweep
        sort = f"{kind} {'data' if folder in ('segments', 'codecs', 'tombstones', 'patches') else folder}"
        self.seen[sort] += 1
        place = f"{sort} {self.seen[sort]}"
        if self.seen[sort] <= (1 if kind == "range" or (kind == "get" and folder != "CURRENT") else 3):
            self.known[place] = None
        self.n_left -= 1
        if not self.halts or not (place == self.place or (not self.place and self.n_left == 0)):
            return
        for_s = self.halts.pop(0)
        self.n_halted += 1
        self.stopped.set()
        if for_s:
            self.player.process.frozen_until = self.stage.world.loop.now + for_s
            self.stage.world.note(f"{self.player.process.name} stands still after {place} for {for_s:.0f} s")
            self._aim()
        else:
            self.stage.kill(self.player)


def _weight(place: str) -> float:
    """What others can see, or what decides, is worth more than what is only carried."""
    kind, about, _ = place.split(" ")
    if about in ("data", "all"):
        return 1.0
    return 3.0 if kind in ("put", "delete") else 2.0


class Stage:
    """Three processes with one client each, and what happens to them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = random.Random(f"stage {world.settings.seed}")
        self.places: dict[str, dict[str, None]] = {}
        self.n_started = 0
        self.players = [self._player() for _ in range(max(2, world.settings.n_processes))]

    async def run(self) -> None:
        """Scene after scene until the steps are used up."""
        while not self.world.stopping:
            scene = self.rng.choice(self.world.settings.scenes)
            self.world.note(f"scene {scene}")
            self.world.counts[f"scene {scene}"] += 1
            index = self.rng.choice(INDICES)
            await (SITUATIONS[scene](self, index) if scene in SITUATIONS else getattr(self, f"_{scene}")(index))

    def _player(self) -> Player:
        name = f"p{self.n_started}"
        self.n_started += 1
        skew_s = self.world.settings.skew_s
        process = Process(name, self.rng.uniform(-skew_s, skew_s))
        reader = self.world.reader_of(process, self.rng.choice((0, 20_000, 1 << 26)))
        self.world.note(f"{name} starts, clock wrong by {process.skew_s:.1f} s")
        return Player(self.world, process, reader, Aliases(reader.store, clock=reader.clock), name)

    def kill(self, player: Player) -> None:
        """The process dies, and another one takes its place."""
        self.world.note(f"{player.process.name} is killed")
        self.world.counts["kills"] += 1
        player.process.kill()
        self.players[self.players.index(player)] = self._player()

    # Calls

    def _begin(self, player: Player, call: str, index: str, **kwargs: Any) -> asyncio.Task[None]:
        work: Coroutine[Any, Any, None] = getattr(player, f"_{call}")(index, **kwargs)
        token = PROCESS.set(player.process)
        try:
            return asyncio.create_task(work)
        finally:
            PROCESS.reset(token)

    async def _end(self, *tasks: asyncio.Task[None]) -> None:
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, asyncio.CancelledError):
                raise result

    async def _do(self, calls: list[str], index: str, but: Player | None = None) -> None:
        """Some calls of drawn processes, one after the other or at once."""
        at_once = self.rng.random() < 0.3
        tasks = []
        for call in calls:
            if self.world.stopping:
                break
            player = self.rng.choice([player for player in self.players if player is not but])
            tasks.append(self._begin(player, call, index))
            if not at_once:
                await self._end(tasks.pop())
        await self._end(*tasks)

    async def one_does(self, call: str, index: str, but: Player | None = None, **kwargs: Any) -> None:
        """One call of a drawn process."""
        if not self.world.stopping:
            player = self.rng.choice([player for player in self.players if player is not but])
            await self._end(self._begin(player, call, index, **kwargs))

    def _some(self, of: tuple[str, ...], least: int, most: int) -> list[str]:
        return self.rng.choices(of, k=self.rng.randint(least, most))

    async def _prepare(self, index: str) -> None:
        """An index with some history, part of it mostly old enough to be collected."""
        if self.world.current(index) is None or self.rng.random() < 0.3:
            await self._do(["remade"], index)
        await self._do(self._some(BEFORE, 1, 4), index)
        if self.rng.random() < 0.8:
            if self.rng.random() < 0.4:
                await self._do(["glance"], index)
            await asyncio.sleep(self.rng.choice((3000.0, 3700.0, 4000.0, 8000.0)))
            if self.rng.random() < 0.5:
                await self._do(self._some(BEFORE, 1, 2), index)

    # Scenes

    async def _standstill(self, index: str) -> None:
        """A call stops once or twice for some minutes, or for good; others go on; then all look."""
        call = self.rng.choices(list(STANDING), list(STANDING.values()))[0]
        await self._prepare(index)
        if call == "drop" and self.rng.random() < 0.5:
            await self._do(["branch"], index)
        halts = [self.rng.choice((3.0, 20.0, 290.0)) for _ in range(self.rng.choice((1, 2, 2, 3)))]
        if self.rng.random() < 0.15:
            halts[-1] = 0.0
        player = self.rng.choice(self.players)
        await self.interrupted(player, call, index, halts, self._any_of(MEANWHILE.get(call, ELSE), index, player))
        await self._look_after(player, index)

    def _any_of(self, calls: tuple[str, ...], index: str, player: Player) -> Callable[[int], Coroutine[Any, Any, None]]:
        """Some of these calls by others."""
        return lambda _: self._do(self._some(calls, 1, 3), index, but=player)

    async def interrupted(
        self,
        player: Player,
        call: str,
        index: str,
        halts: list[float],
        others: Callable[[int], Coroutine[Any, Any, None]],
        at: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """One call with halts (seconds, 0: it dies), at given places or drawn ones, and what others do during each."""
        n_halts = len(halts)
        watch = player.process.on_served = _Watch(self, player, self.places.setdefault(call, {}), halts, at)
        watch.of_one = f"{index}/" if call == "sweep" else ""
        task = self._begin(player, call, index, **kwargs)
        task.add_done_callback(lambda _: watch.stopped.set())
        for n in range(n_halts):
            if watch.n_halted <= n and not task.done():
                watch.stopped.clear()
                await watch.stopped.wait()
            if watch.n_halted <= n:
                break
            await others(n)
            await asyncio.sleep(max(0.0, player.process.frozen_until - self.world.loop.now))
        await self._end(task)
        player.process.on_served = None

    async def _look_after(self, player: Player, index: str) -> None:
        """The one that stood still is asked for what it knows, mostly; somebody sweeps, perhaps later."""
        if not player.process.dead and self.rng.random() < 0.6:
            await self._end(self._begin(player, "stale", index))
        if self.rng.random() < 0.3:
            await asyncio.sleep(self.rng.choice((5.0, 3700.0)))
        await self._do(self._some(AFTER, 1, 3), self.rng.choice((index, index, self.rng.choice(INDICES))))

    async def _abandoned(self, index: str) -> None:
        """A bulk build is left lying, around the time after which sweeps take things; then somebody takes it up."""
        if self.world.current(index) is None or self.rng.random() < 0.5:
            await self._do(["remade"], index)
        player = self.rng.choice(self.players)
        began_s = self.world.loop.now
        halts = [290.0 for _ in range(self.rng.choice((0, 1, 2)))]
        await self.interrupted(player, "build", index, [*halts, 0.0], self._any_of(("add", "empty", "compact", "delete"), index, player))
        await self._do(self._some(("empty", "empty", "compact", "add", "delete", "rollback"), 0, 3), index)
        life_s = self.rng.choice((HOUR_S, HOUR_S, HOUR_S, WEEK_S))
        took_s = self.world.loop.now - began_s
        await asyncio.sleep(max(0.0, life_s - took_s + self.rng.choice((took_s * self.rng.random(), 400.0))))
        await self._do(["sweep"] * self.rng.choice((1, 1, 2)), index)
        if self.rng.random() < 0.5:
            await asyncio.sleep(HOUR_S)
            await self._do(["sweep"], index)
        if self.rng.random() < 0.3:
            player = self.rng.choice(self.players)
            await self.interrupted(player, "sweep", index, [20.0], self._any_of(("resume", "resume", "add"), index, player))
        await self._do(["resume"], index)
        await self._do(self._some(("sweep", "resume", "read", "compact"), 0, 2), index)

    async def _growth(self, index: str) -> None:
        """An index grows, and processes whose clocks disagree compact it by turns."""
        if self.world.current(index) is None or self.rng.random() < 0.5:
            await self._do(["remade"], index)
        for _ in range(self.rng.randint(2, 4)):
            await self._do(self._some(("add", "add", "group", "keyed", "build"), 2, 5), index)
            await self._do(["fold"] * self.rng.choice((1, 1, 2)), index)
        await self._do(self._some(AFTER, 1, 3), index)
