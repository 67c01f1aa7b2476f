"""The soak and the overload for some seconds; what they decide by, against figures whose answer is known; and the admission that the overload measures."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handler.problems import Problem
from handler.routes.limits import LOOK_S, Places
from handler.server import http_settings
from handler.settings import Settings
from handler.threads import Threads
from serving import ROOT
from soak.load import Done
from soak.model import NEVER, Document, Model
from soak.overload import run as overload
from soak.pauses import AFTER_S, Pauses
from soak.report import Report, fit, judge, measured, quarters_of, slope
from soak.soak import Outcome
from soak.soak import run as soak

# The real thing


def check(outcome: Outcome) -> None:
    """Everything but what depends on how fast this machine is just now."""
    report = outcome.report
    assert report.wrong == []
    assert report.errors == []
    assert report.recall == 1.0
    assert not [text for text in report.failures if not re.match("p(50|95) of searches", text)]


def test_some_seconds_of_mixed_load_on_two_replicas_show_nothing_wrong(tmp_path: Path) -> None:
    outcome = soak("directory", 4.0, tmp_path, per_s=25.0, n_documents=100)
    check(outcome)
    assert {"search", "add", "delete", "ids", "rows"} <= outcome.report.calls.keys()
    assert {"rss_mib.0", "fds.1", "threads.0", "generation.1", "store_objects"} <= set().union(*outcome.rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_a_minute_of_mixed_load_with_compaction_and_garbage_collection_grows_nothing(kind: Any, tmp_path: Path) -> None:
    outcome = soak(kind, 75.0, tmp_path, per_s=12.0, n_documents=1200)
    check(outcome)
    objects = [row["store_objects"] for row in outcome.rows if "store_objects" in row]
    assert any(after < before - 20 for before, after in itertools.pairwise(objects)), "nothing was collected"
    assert any("maintenance_rss_mib.0" in row or "maintenance_rss_mib.1" in row for row in outcome.rows), "nothing was compacted"


@pytest.mark.slow
def test_four_times_the_capacity_is_refused_in_good_order_and_nothing_is_lost(tmp_path: Path) -> None:
    found = overload("directory", tmp_path, n_documents=400, query_tokens=32, seconds=15.0, times=4.0)
    assert not [text for text in found["failures"] if not text.startswith(("p99 of", "recovery took"))]
    assert found["acknowledged"] > 0 == found["lost"]
    assert found["capacity"]["refused"] == 0, "eight clients wait for each other"


# What they decide by


def test_a_slope_is_found_with_an_interval_that_holds_it_and_a_flat_line_has_none() -> None:
    rng = np.random.default_rng(1)
    times_s = np.arange(0.0, 3600.0)
    wandering = 5 * np.sin(times_s / 40) + rng.normal(0, 2, len(times_s))
    leaking = slope(times_s.tolist(), (200 + 30 * times_s / 3600 + wandering).tolist())
    assert leaking.low < 30 < leaking.high < 36
    assert leaking.sure_growth > 24
    flat = slope(times_s.tolist(), (200 + wandering).tolist())
    assert flat.low < 0 < flat.high
    assert flat.sure_growth == 0
    assert slope([0.0, 1, 2, 3, 4, 5, 6, 7], [3.0] * 8).sure_growth == 0


def _report(**more: Any) -> Report:
    settings: dict[str, Any] = {
        "settings": {}, "seconds": 3600.0, "paused_s": 0.0, "warm_up_s": 0.0, "calls": {}, "errors": [], "errors_in_pauses": 0, "wrong": [],
        "recall": 1.0,
    }  # fmt: skip
    return Report(**{**settings, **more})


def _rows(**series: Any) -> list[dict[str, float]]:
    return [{"t_s": float(t), **{name: float(of(t)) for name, of in series.items()}} for t in range(3600)]


def test_the_verdict_sees_leaks_errors_lost_recall_and_garbage_that_stays() -> None:
    sound = _report()
    fit(sound, _rows(**{"rss_mib.0": lambda t: 200 + t % 7, "fds.0": lambda t: 40, "store_objects": lambda t: 300 + t % 90}))
    judge(sound)
    assert sound.failures == []
    ill = _report(errors=["add: 500"], wrong=["d1 is gone"], recall=0.9)
    fit(ill, _rows(**{"anon_mib.1": lambda t: 200 + t / 100, "fds.0": lambda t: 40 + t // 200, "store_objects": lambda t: 300 + t}))
    ill.quarters = quarters_of(
        measured([Done("search", t, t + (0.01 if t < 2700 else 0.03), 200) for t in np.arange(0, 3600, 4.0)], 0.0, 3600.0)
    )
    judge(ill)
    joined = "\n".join(ill.failures)
    for part in (
        "d1 is gone",
        "add: 500",
        "recall",
        "anon_mib.1 grew",
        "fds.0 grew",
        "objects in the store",
        "p50 of searches",
        "p95 of searches",
    ):
        assert part in joined, part


@pytest.mark.parametrize(("grown_mib", "is_too_much"), [(20, False), (80, True)])
def test_in_the_first_minutes_caches_may_fill(grown_mib: int, is_too_much: bool) -> None:
    found = _report(seconds=60.0)
    fit(found, _rows(**{"anon_mib.0": lambda t: 130 + grown_mib * t / 60})[:60])
    judge(found)
    assert bool(found.failures) is is_too_much


def test_what_happened_while_everything_stood_still_is_known() -> None:
    pauses = Pauses([(100.0, 130.0 + AFTER_S)])
    assert not pauses.touch(98.0, 99.9)
    assert pauses.touch(99.0, 131.0)
    assert pauses.touch(131.0, 131.1)
    assert not pauses.touch(136.0, 137.0)
    assert pauses.total_s == pytest.approx(30.0)


async def test_a_pause_is_noticed() -> None:
    pauses = Pauses()
    watching = asyncio.create_task(pauses.watch())
    await asyncio.sleep(0.05)
    time.sleep(1.4)  # noqa: ASYNC251  # the whole loop stands still
    await asyncio.sleep(0.2)
    watching.cancel()
    assert pauses.total_s > 1.0


def _document(**more: Any) -> Document:
    return Document(1, 0, **{"id": 7, "added_s": 10.0, "revisions": [(0, 9.0, 10.0)], **more})


def test_the_model_knows_what_a_read_may_show() -> None:
    there, deleted = _document(), _document(delete_began_s=20.0, deleted_s=21.0)
    assert there.must_be_seen(10.1, 11.0)
    assert not there.must_be_seen(9.9, 11.0), "the read may be of the moment before"
    assert not deleted.must_be_seen(19.0, 20.5), "the delete may have taken effect"
    assert deleted.must_be_seen(18.0, 19.5)
    assert deleted.must_not_be_seen(21.1)
    assert not deleted.must_not_be_seen(20.9)
    updated = _document(revisions=[(0, 9.0, 10.0), (5, 12.0, 13.0), (6, 15.0, NEVER)])
    assert [value for value in (0, 5, 6) if updated.may_show(value, 12.5, 12.6)] == [0, 5]
    assert [value for value in (0, 5, 6) if updated.may_show(value, 13.5, 14.0)] == [5]
    assert [value for value in (0, 5, 6) if updated.may_show(value, 15.5, 16.0)] == [5, 6]
    lost = _document(is_known=False)
    assert not lost.must_be_seen(11.0, 12.0)
    assert not lost.must_not_be_seen(11.0)


LIES: dict[str, Any] = {
    "lost": lambda model: model.check_all("a read", [_document()], set(), 11.0, 12.0),
    "a ghost": lambda model: model.check_hits("a read", ["d99"], 11.0),
    "deleted and there": lambda model: model.check_hits("a read", ["d1"], 30.0),
    "another id": lambda model: model.check_rows("a read", [{"label": "d1", "batch": 0, "revision": 0, "_subset_": 8}], 11.0, 12.0),
    "an update lost": lambda model: model.check_rows("a read", [{"label": "d1", "batch": 0, "revision": 3, "_subset_": 7}], 11.0, 12.0),
    "too few ids": lambda model: model.added([_document(), _document()], [1]),
}


@pytest.mark.parametrize("lie", LIES)
def test_the_model_sees_what_is_wrong(lie: str) -> None:
    model = Model(1)
    model.by_label["d1"] = _document(delete_began_s=20.0, deleted_s=21.0)
    LIES[lie](model)
    assert len(model.wrong) == 1


# Admission


@pytest.fixture
def threads() -> Any:
    made = Threads(2)
    yield made
    made.shutdown(wait=False, cancel_futures=True)


async def _served(places: Places, seconds: float = 0.0) -> int:
    """One request: 1 if it was served, 0 if it was refused."""
    try:
        await places.take(5.0)
    except Problem as problem:
        return 0 if (problem.status, problem.headers["Retry-After"]) == (503, "2") else -1000
    try:
        await asyncio.sleep(seconds)
    finally:
        places.give()
    return 1


async def test_clients_that_wait_for_their_answers_wait_for_each_other_and_are_never_refused(threads: Threads) -> None:
    places = Places(threads, 2, 48)

    async def client() -> int:
        return sum([await _served(places, 0.001) for _ in range(20)])

    assert await asyncio.gather(*(client() for _ in range(40))) == [20] * 40
    assert places.n_taken == 0


async def test_an_overrun_refuses_who_waits_lets_nobody_wait_and_ends_when_it_would_have_been_worked_off(threads: Threads) -> None:
    places = Places(threads, 2, 10)
    hold = asyncio.Event()

    async def held() -> int:
        await places.take(5.0)
        await hold.wait()
        places.give()
        return 1

    working = [asyncio.create_task(held()) for _ in range(2)]
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(_served(places)) for _ in range(10)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    assert await asyncio.gather(*(_served(places) for _ in range(5))) == [0] * 5
    assert await asyncio.gather(*waiting) == [0] * 10, "the queue was full"
    hold.set()
    assert await asyncio.gather(*working) == [1, 1]
    assert [await _served(places) for _ in range(8)] == [1] * 8, "a place is a place, also then"
    both = [asyncio.create_task(_served(places, 0.01)) for _ in range(3)]
    assert sum(await asyncio.gather(*both)) == 3, "after ten were served they wait again"
    assert places.n_taken == 0


async def test_places_become_more_while_threads_are_free_and_in_an_overrun_fewer_while_work_waits(threads: Threads) -> None:
    places = Places(threads, 100, 20)
    loop = asyncio.get_running_loop()
    first = int(places.n_places)
    taken = [asyncio.create_task(_served(places, 100.0)) for _ in range(first + 10)]
    await asyncio.sleep(0)
    assert places.n_taken == first
    await asyncio.sleep(40 * LOOK_S)
    assert places.n_taken == first + 10, "nothing waits for a thread, so there is room for more"
    stop = threading.Event()
    busy = [loop.run_in_executor(threads, stop.wait, 30.0) for _ in range(8)]
    more = [asyncio.create_task(_served(places, 100.0)) for _ in range(int(places.n_places) - places.n_taken + 5)]
    await asyncio.sleep(20 * LOOK_S)
    assert places.n_taken == first + 10 + len(more) - 5, "six tasks wait for a thread, but there is no overrun"
    assert sum(await asyncio.gather(*(_served(places) for _ in range(20)))) == 0
    for _ in range(20):
        await asyncio.sleep(LOOK_S)
        assert await _served(places) == 0
    assert places.n_places == 1.0
    assert sum(task.done() for task in more) == 5
    stop.set()
    await asyncio.gather(*busy)
    for task in taken + more:
        task.cancel()
    await asyncio.gather(*taken, *more, return_exceptions=True)
    assert places.n_taken == 0
    assert places.n_places >= first, "it is over"


async def test_who_gives_up_waiting_takes_no_place(threads: Threads) -> None:
    places = Places(threads, 1, 48)
    await places.take(5.0)
    gone, late, there = (asyncio.create_task(_served(places)) for _ in range(3))
    await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(Problem):
        await places.take(0.01)
    places.give()
    assert await asyncio.gather(late, there) == [1, 1]
    assert places.n_taken == 0


async def test_threads_know_how_long_work_waited_for_them_and_forget_what_was_cancelled(threads: Threads) -> None:
    assert threads.waited_s() == 0
    stop = threading.Event()
    futures = [threads.submit(stop.wait, 30.0) for _ in range(3)]
    time.sleep(0.2)  # noqa: ASYNC251  # one task of three waits
    waited_s = threads.waited_s()
    assert waited_s > 0.15
    assert futures[2].cancel()
    before_s = threads.waited_s()
    time.sleep(0.1)  # noqa: ASYNC251
    assert threads.waited_s() == before_s
    stop.set()
    threads.shutdown()
    with pytest.raises(RuntimeError):
        threads.submit(stop.wait, 30.0)
    after_s = threads.waited_s()
    time.sleep(0.05)  # noqa: ASYNC251
    assert threads.waited_s() == after_s


# Connections


def test_an_idle_connection_outlives_the_patience_of_the_balancer_in_front() -> None:
    """A server that closes first loses the requests that are just on their way; a balancer answers 502 for them. Found by the soak: 30 s."""
    [balancer_s] = re.findall(r'idle_timeout.timeout_seconds, Value: "(\d+)"', (ROOT / "infra" / "ecs.yaml").read_text())
    assert http_settings(Settings()).header_read_timeout > int(balancer_s) * 1000
