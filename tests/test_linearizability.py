"""The checker against histories that are known to be good or bad, and against a slow twin; then real histories through two servers over one bucket."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from crash.arena import Arena
from linearizability import NEVER, Event, record, unexplained


def write(value: str | None, began_s: float, ended_s: float = NEVER) -> Event:
    return Event("k", False, value, began_s, ended_s)


def read(value: str | None, began_s: float, ended_s: float, *, max_age_s: float = 0.0) -> Event:
    return Event("k", True, value, began_s - max_age_s, ended_s)


GOOD = {
    "nothing": [],
    "one after the other": [write("a", 0, 1), read("a", 2, 3), write(None, 4, 5), read(None, 6, 7)],
    "a read beside a write finds the old": [write("a", 0, 1), write("b", 2, 6), read("a", 3, 4)],
    "a read beside a write finds the new": [write("a", 0, 1), write("b", 2, 6), read("b", 3, 4), read("b", 4.5, 5)],
    "two writes at once end either way": [write("a", 0, 5), write("b", 0, 5), read("a", 6, 7)],
    "an unknown write that took effect late": [write("a", 0, 1), write("b", 2), read("a", 3, 4), read("b", 5, 6)],
    "an unknown write that never took effect": [write("a", 0, 1), write("b", 2), read("a", 3, 4), read("a", 5, 6)],
    "an unknown delete that took effect": [write("a", 0, 1), write(None, 2), read("a", 3, 4), read(None, 5, 6)],
    "a delete that a write overtook": [write("a", 0, 1), write("b", 2, 5), write(None, 2, 6), read("b", 7, 8)],
    "an old read within its bound": [write("a", 0, 1), write("b", 2, 3), read("a", 4, 5, max_age_s=1.5)],
}
BAD = {
    "a lost write": [write("a", 0, 1), read(None, 2, 3)],
    "a stale read": [write("a", 0, 1), write("b", 2, 3), read("a", 4, 5)],
    "a value that nobody wrote": [write("a", 0, 1), read("b", 2, 3)],
    "a value from the future": [read("a", 0, 1), write("a", 2, 3)],
    "a deleted document comes back": [write("a", 0, 1), write(None, 2, 3), read(None, 4, 5), read("a", 6, 7)],
    "new, then old again": [write("a", 0, 1), write("b", 2, 9), read("b", 3, 4), read("a", 5, 6)],
    "two readers see two writes in different orders": [
        write("a", 0, 9),
        write("b", 0, 9),
        read("a", 1, 2),
        read("b", 3, 4),
        read("a", 5, 6),
    ],
    "an unknown write that took effect and was taken back": [write("a", 0, 1), write("b", 2), read("b", 3, 4), read("a", 5, 6)],
    "a read older than its bound": [write("a", 0, 1), write("b", 2, 3), read("a", 6, 7, max_age_s=1.5)],
    "an acknowledged delete without effect": [write("a", 0, 1), write(None, 2, 3), read("a", 4, 5)],
}


@pytest.mark.parametrize("name", GOOD)
def test_a_history_that_some_order_explains_is_linearizable(name: str) -> None:
    assert unexplained(GOOD[name]) == []


@pytest.mark.parametrize("name", BAD)
def test_a_history_that_no_order_explains_is_not(name: str) -> None:
    [problem] = unexplained(BAD[name])
    assert problem.startswith("k: ")


def test_each_key_is_a_register_of_its_own() -> None:
    history = [Event("k", False, "a", 0, 1), Event("l", True, None, 2, 3), Event("k", True, "a", 2, 3)]
    assert unexplained(history) == []
    assert len(unexplained([*history, Event("l", True, "a", 4, 5)])) == 1


def test_the_checker_agrees_with_one_that_tries_every_order() -> None:
    """Random histories of up to six calls; about half of them are linearizable."""
    rng = random.Random(11)
    n_good = 0
    for _ in range(600):
        events = _with_every_value_written_once([_random_event(rng) for _ in range(rng.randint(1, 6))])
        expected = any(_explains(order) for some in _with_or_without_unknown(events) for order in itertools.permutations(some))
        assert (unexplained(events) == []) == expected, events
        n_good += expected
    assert 100 < n_good < 500


def _random_event(rng: random.Random) -> Event:
    began_s = rng.randrange(10)
    ended_s = began_s + rng.randint(1, 6)
    value = rng.choice(("a", "b", "c", None))
    is_read = rng.random() < 0.5
    return Event("k", is_read, value, began_s, ended_s if is_read or rng.random() < 0.7 else NEVER)


def _with_every_value_written_once(events: list[Event]) -> list[Event]:
    written: set[str | None] = {None}
    kept = []
    for event in events:
        if event.is_read or event.value is None or event.value not in written:
            kept.append(event)
        if not event.is_read:
            written.add(event.value)
    return kept


def _with_or_without_unknown(events: list[Event]) -> Iterator[list[Event]]:
    known = [event for event in events if event.ended_s < NEVER]
    unknown = [event for event in events if event.ended_s == NEVER]
    for n in range(len(unknown) + 1):
        for some in itertools.combinations(unknown, n):
            yield known + list(some)


def _explains(order: tuple[Event, ...]) -> bool:
    value = None
    for n, event in enumerate(order):
        if any(later.ended_s < event.began_s for later in order[n + 1 :]):
            return False
        if event.is_read and event.value != value:
            return False
        value = value if event.is_read else event.value
    return True


@pytest.mark.parametrize("kind", ["s3", pytest.param("directory", marks=pytest.mark.slow)])
async def test_what_two_servers_answer_is_linearizable_and_an_eventual_read_is_no_older_than_asked_for(kind: str, tmp_path: Path) -> None:
    arena = Arena(tmp_path / "arena", kind, {"server": 2})
    try:
        history = await record(arena, 2.0)
    finally:
        arena.close()
    assert history.problems() == []
    assert len(history.writes) > 5
    assert len(history.strong) > 5
    assert len(history.eventual) > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", "directory"])
async def test_histories_stay_linearizable_while_servers_and_a_compactor_are_killed(kind: str, tmp_path: Path) -> None:
    arena = Arena(tmp_path / "arena", kind, {"server": 3, "compactor": 1}, seed=3)
    try:
        history = await record(arena, 20.0, kill_every_s=1.5)
    finally:
        arena.close()
    assert history.problems() == []
    assert len(history.writes) > 100
