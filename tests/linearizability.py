"""Histories of concurrent calls through several servers, and a checker that says whether one register per key explains them.

A history is linearizable if each call can be given one moment between its beginning and its end at which it takes effect, so that every
read finds what the last write before it left. A call of unknown outcome may take effect at any moment after it began, or never. An eventual
read with a bound of `max_age_s` may find what was there up to so long before it began: its moment may lie that much earlier, and nothing
else is different; so one checker serves both promises.

The search is that of Wing and Gong (1993), with Lowe's memory of configurations (2017): the first call to take effect is one that began
before every other one ended. A read that fits is taken at once, because it changes nothing. Keys are independent registers, so each is
checked alone (Herlihy and Wing 1990: linearizability is local).

    PYTHONPATH=.:tests python -m linearizability --seconds 60 --store s3 --servers 3
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from crash.actors import vectors_of
from crash.arena import Arena

NEVER = float("inf")
KEYS = 6
PAIR = ("left", "right")
"""Two keys that are always written together: whoever sees one sees the other."""


@dataclass(frozen=True)
class Event:
    """One call on one key: a write of `value` (None: a delete) or a read that found it. An unknown outcome has no end."""

    key: str
    is_read: bool
    value: str | None
    began_s: float
    ended_s: float
    why: str = ""

    def __str__(self) -> str:
        what = "read" if self.is_read else "wrote"
        return f"{self.began_s:.4f}..{self.ended_s:.4f} {what} {self.value} {self.why}"


def unexplained(history: Sequence[Event]) -> list[str]:
    """For each key whose events no order explains: the key and the events around the place where every attempt ended. Empty: linearizable."""
    problems = []
    for key in sorted({event.key for event in history}):
        stuck = _stuck([event for event in history if event.key == key])
        if stuck:
            problems.append(f"{key}: no order explains\n" + "\n".join(f"    {event}" for event in stuck))
    return problems


def _stuck(events: Sequence[Event]) -> list[Event]:
    """Nothing if the events of one register, absent at first, are linearizable; else the calls that were open when the best attempt ended.

    Cost: exponential in the number of calls that overlap, at worst; linear where few do.
    """
    events = sorted(_bounded(events), key=lambda event: event.began_s)
    must = sum(1 << n for n, event in enumerate(events) if event.ended_s < NEVER)
    tried: set[tuple[int, str | None]] = set()
    waiting: list[tuple[int, str | None]] = [(0, None)]
    best, best_done = -1, 0
    while waiting:
        done, value = _with_reads(events, *waiting.pop())
        if done & must == must:
            return []
        if (done, value) in tried:
            continue
        tried.add((done, value))
        if done.bit_count() > best:
            best, best_done = done.bit_count(), done
        waiting += [(done | 1 << n, events[n].value) for n in _writes_to_try(events, done, value)]
    return [events[n] for n in _open(events, best_done)]


def _bounded(events: Sequence[Event]) -> list[Event]:
    """The same question with less to try. A write of unknown outcome that nobody read may as well not have been (no value is written twice);
    one that somebody read took effect before that read ended."""
    first_seen_s: dict[str | None, float] = {}
    for event in events:
        if event.is_read and event.ended_s < first_seen_s.get(event.value, NEVER):
            first_seen_s[event.value] = event.ended_s
    bounded = []
    for event in events:
        if event.ended_s < NEVER or event.value is None:
            bounded.append(event)
        elif event.value in first_seen_s:
            bounded.append(replace(event, ended_s=max(first_seen_s[event.value], event.began_s)))
    return bounded


def _writes_to_try(events: Sequence[Event], done: int, value: str | None) -> list[int]:
    """Writes that may come next. Of deletes of unknown outcome only the first: where a later one fits, it fits too."""
    found, has_unknown = [], False
    for n in _open(events, done):
        if events[n].is_read or (events[n].ended_s == NEVER and (has_unknown or value is None)):
            continue
        has_unknown |= events[n].ended_s == NEVER
        found.append(n)
    return found


def _with_reads(events: Sequence[Event], done: int, value: str | None) -> tuple[int, str | None]:
    """The configuration after all reads that may come next and fit."""
    while fitting := [n for n in _open(events, done) if events[n].is_read and events[n].value == value]:
        for n in fitting:
            done |= 1 << n
    return done, value


def _open(events: Sequence[Event], done: int) -> list[int]:
    """Events that may be the next to take effect: begun before any other that is left has ended."""
    found: list[int] = []
    first_end_s = NEVER
    for n, event in enumerate(events):
        if event.began_s > first_end_s:
            break
        if not done >> n & 1:
            found.append(n)
            first_end_s = min(first_end_s, event.ended_s)
    return [n for n in found if events[n].began_s <= first_end_s]


# Recording


@dataclass
class History:
    """What several clients did and were told. `strong` and `eventual` are explained each together with the writes."""

    writes: list[Event] = field(default_factory=list)
    strong: list[Event] = field(default_factory=list)
    eventual: list[Event] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def problems(self) -> list[str]:
        """Everything that breaks a promise."""
        return self.wrong + unexplained(self.writes + self.strong) + unexplained(self.writes + self.eventual)


class Recorder:
    """Clients that write, delete and read over HTTP, each call through a server chosen at random."""

    def __init__(self, servers: Sequence[str], *, seed: int = 1) -> None:
        self.servers, self.rng = servers, random.Random(seed)
        self.history = History()
        self.n_values = itertools.count()
        self.stopping = False

    async def run(self, seconds: float, n_clients: int = 4) -> History:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(timeout=30, limits=limits) as http:
            self.http = http
            await self._put(PAIR)  # makes the columns that deletes name
            clients = [asyncio.create_task(self._client()) for _ in range(n_clients)]
            await asyncio.sleep(seconds)
            self.stopping = True
            await asyncio.gather(*clients)
        return self.history

    async def _client(self) -> None:
        while not self.stopping:
            choice = self.rng.random()
            if choice < 0.3:
                await self._put((f"k{self.rng.randrange(KEYS)}",))
            elif choice < 0.36:
                await self._put(PAIR)
            elif choice < 0.5:
                await self._delete(f"k{self.rng.randrange(KEYS)}")
            elif choice < 0.8:
                await self._read(0.0)
            else:
                await self._read(self.rng.choice((0.05, 0.5, 3.0)))

    async def _ask(self, method: str, path: str, body: dict[str, Any]) -> httpx.Response | None:
        """None if the outcome is unknown."""
        try:
            answer = await self.http.request(method, self.rng.choice(self.servers) + path, json=body)
        except httpx.HTTPError as error:
            self.history.counts[type(error).__name__] += 1
            await asyncio.sleep(0.05)
            return None
        self.history.counts[f"HTTP {answer.status_code}"] += 1
        if answer.status_code in (503, 408):
            return None
        if answer.status_code not in (200, 202, 409):
            self.history.wrong.append(f"{method} {path} was answered with {answer.status_code} {answer.text[:300]}")
        return answer

    def _note_write(self, keys: Sequence[str], value: str | None, began_s: float, answer: httpx.Response | None) -> None:
        if answer is not None and answer.status_code not in (200, 202):
            return  # refused: it took no effect, and if it did, a read of its value will be one that nobody wrote
        ended_s = NEVER if answer is None else time.monotonic()
        self.history.writes += [Event(key, False, value, began_s, ended_s) for key in keys]

    async def _put(self, keys: Sequence[str]) -> None:
        value = f"v{next(self.n_values)}"
        documents = [{"embeddings": vectors_of(value).tolist()} for _ in keys]
        body = {"documents": documents, "metadata": [{"k": key, "v": value} for key in keys], "ids": list(keys)}
        began_s = time.monotonic()
        self._note_write(keys, value, began_s, await self._ask("POST", "/indices/a/update", body))

    async def _delete(self, key: str) -> None:
        """By condition: it selects in one generation and deletes in the next; what replaced the document in between stays, and came later."""
        began_s = time.monotonic()
        answer = await self._ask("DELETE", "/indices/a/documents", {"condition": "k = ?", "parameters": [key]})
        self._note_write((key,), None, began_s, answer)

    async def _read(self, max_age_s: float) -> None:
        """One search that finds everything: a read of every key."""
        body: dict[str, Any] = {"queries": [{"embeddings": vectors_of("q").tolist()}], "params": {"top_k": 50}}
        body |= {"consistency": "eventual", "max_age_s": max_age_s} if max_age_s else {"consistency": "strong"}
        began_s = time.monotonic()
        answer = await self._ask("POST", "/indices/a/search", body)
        ended_s = time.monotonic()
        if answer is None or answer.status_code != 200:
            return
        rows = [row for row in answer.json()["results"][0]["metadata"] if row.get("k") is not None]
        found = {row["k"]: row["v"] for row in rows}
        if len(found) != len(rows):
            self.history.wrong.append(f"one key is there twice: {sorted((row['k'], row['v']) for row in rows)}")
        if found.get(PAIR[0]) != found.get(PAIR[1]):
            self.history.wrong.append(f"half a write was seen: {[found.get(key) for key in PAIR]}")
        events = self.history.eventual if max_age_s else self.history.strong
        for key in (*(f"k{n}" for n in range(KEYS)), *PAIR):
            events.append(Event(key, True, found.get(key), began_s - max_age_s, ended_s, f"max_age_s={max_age_s}"))


async def record(arena: Arena, seconds: float, *, seed: int = 1, kill_every_s: float = 0.0) -> History:
    """A history over the servers of an arena, which are started here; a server is killed now and then if asked for."""
    await arena.prepare()
    for name in arena.names:
        arena.start(name)
    await arena.wait_for_servers()
    recorder = Recorder(arena.config.servers, seed=seed)
    recording = asyncio.create_task(recorder.run(seconds))
    while not recording.done():
        await asyncio.wait([recording], timeout=kill_every_s or None)
        if kill_every_s and not recording.done():
            arena.kill_and_start_again(arena.rng.choice(arena.names))
    return await recording


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m linearizability", description="record a history through several servers and check it")
    parser.add_argument("--store", choices=("directory", "s3"), default="s3")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--kill-every-s", type=float, default=0.0, help="kill a server or the compactor so often")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tartan-linear-") as folder:
        arena = Arena(Path(folder), args.store, {"server": args.servers, "compactor": 1}, seed=args.seed)
        try:
            history = asyncio.run(record(arena, args.seconds, seed=args.seed, kill_every_s=args.kill_every_s))
        finally:
            arena.close()
    problems = history.problems()
    unknown = sum(event.ended_s == NEVER for event in history.writes)
    print(
        f"{len(history.writes)} writes ({unknown} of unknown outcome), {len(history.strong)} strong and {len(history.eventual)} eventual reads of a key"
    )
    print(dict(sorted(history.counts.items())), dict(arena.report.kills))
    print("\n".join(problems[:5]) or "every one has its place")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
