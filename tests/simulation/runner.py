"""Episodes: one world after another until the steps are used up; final checks; shrinking of what fails; the command line."""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from engine.index.sweep import sweep
from engine.index.verify import verify

from .actors import INDICES, OF_GARBAGE, WEIGHTS, Fate
from .scenes import SCENES, Stage
from .scheduler import PROCESS, Process
from .store import CALM, Weather
from .world import Settings, Violation, World

EPISODE_STEPS = 2500
STORMY = Weather(throttled=0.02, failed=0.02, lost=0.03, busy=0.02, slow=0.01, torn=0.02)


@dataclass
class Outcome:
    """What one or several episodes came to."""

    trace_hash: str = ""
    steps: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    violation: Violation | None = None
    settings: Settings | None = None
    trace: list[str] = field(default_factory=list)


def settings_of(seed: int, episode: int, steps: int) -> Settings:
    """Circumstances of one episode, drawn from its seed: how bad the weather is, how many processes, how much chance."""
    rng = random.Random(f"settings {seed} {episode}")
    scenes = SCENES if episode % 2 else ()
    storm = rng.choice((0.0, 0.0, 0.3, 1.0) if scenes else (0.0, 0.3, 1.0, 2.0, 5.0))
    weather = Weather(**{name: storm * getattr(STORMY, name) * rng.choice((0, 1, 1)) for name in Weather.__dataclass_fields__})
    flavour = rng.choice(("both", "garbage", "garbage", "writing"))
    weights = {kind: weight * rng.choice((0.3, 1, 1, 3)) for kind, weight in WEIGHTS.items()}
    for kind in WEIGHTS:  # garbage and what keeps it needs many a deletion; much happens only to an index that lives long
        if flavour != "both":
            weights[kind] *= 3.0 if (kind in OF_GARBAGE) == (flavour == "garbage") else 0.3
    for kind in ("drop", "remake", "part", "chain") if flavour == "writing" else ():
        weights[kind] = 0.0
    return Settings(
        seed=f"{seed}.{episode}",
        steps=steps,
        scenes=scenes,
        weather=weather,
        n_processes=rng.randint(2, 4),
        n_clients=rng.randint(1, 4),
        weights=weights,
        kills=rng.choice((0.0, 0.02, 0.1)),
        freezes=rng.choice((0.0, 0.01, 0.05)),
        skew_s=rng.choice((0.0, 5.0, 3600.0, 3600.0)),
        think_s=rng.choice((0.05, 0.4, 0.4)),
        hot=rng.choice((0.0, 0.5, 0.9)),
        lulls=0.12 if flavour == "garbage" else 0.05,
    )


def run_episode(settings: Settings) -> Outcome:
    """One world from nothing to rest, and the final checks."""
    world = World(settings)
    asyncio.set_event_loop(None)
    with world.installed(), _collector_at_rest():
        main = world.loop.create_task(_episode(world))
        main.add_done_callback(lambda _: world.loop.stop())
        world.loop.run_forever()
        if world.violation is None and main.done() and not main.cancelled() and main.exception() is not None:
            error = main.exception()
            assert error is not None
            if not isinstance(error, Violation):
                raise error
            world.violation = error
        if world.violation is None and world.loop.errors:
            world.violation = Violation("background", world.loop.errors[0])
        _bury(world)
    counts = Counter(world.counts)
    counts["virtual seconds"] = int(world.loop.now)
    counts["callbacks"] = world.loop.n_callbacks
    return Outcome(world.trace_hash, world.steps, counts, world.violation, settings, list(world.trace))


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Garbage is collected between episodes: a collection closes coroutines at a moment that no seed decides."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def _episode(world: World) -> None:
    await (Stage(world) if world.settings.scenes else Fate(world)).run()
    world.weather, world.bucket.lag_s = CALM, 0.0
    await asyncio.sleep(120)  # what is still on its way arrives
    await _check_at_rest(world)
    await asyncio.sleep(86_400 * 8)  # every grace period and every forgotten build is over
    await _check_garbage(world)


async def _check_at_rest(world: World) -> None:
    """A new process reads everything: it verifies, and is what the model says."""
    reader = world.reader_of(Process("auditor", 0.0), 1 << 26)
    for index in INDICES:
        record = world.current(index)
        if record is None:
            continue
        if record.life.damage:
            raise Violation("dangling", f"{index}: {record.life.damage}")
        report = await verify(reader, index, all_generations=True)
        if report.problems:
            raise Violation("verify", f"{index}: {report.problems[0]}")
        ids = (await (await reader.snapshot(index)).live_ids()).tolist()
        if ids != sorted(record.state.docs):
            raise Violation("read", f"{index} at rest holds {ids}, should hold {sorted(record.state.docs)}")


async def _check_garbage(world: World) -> None:
    """After two sweeps of each index nothing is left that nobody needs, and what is pinned is."""
    reader = world.reader_of(Process("sweeper", 0.0), 1 << 26)
    token = PROCESS.set(None)
    for _ in range(2):
        for index in INDICES:
            await sweep(reader.store, index, params=world.params)
        await asyncio.sleep(2 * world.params.grace_s)
    PROCESS.reset(token)
    await _check_at_rest(world)
    needed: set[str] = set()
    for record in world.records.values():
        if world.is_protected(record):
            needed |= record.objects | {record.archive}
    left = [name for name in sorted(world.bucket.objects) if name not in needed and not _is_marker(name)]
    world.counts["objects left over"] += len(left)
    world.leftovers = left


def _is_marker(name: str) -> bool:
    return any(f"/{folder}/" in name for folder in ("pins", "branches", "sweeps", "builds")) or name.endswith("/CURRENT")


def _bury(world: World) -> None:
    """End all tasks so that none is closed by the garbage collector."""
    loop = world.loop
    world.stopping = True
    world.bucket.witness = _Nobody()
    last = loop.create_task(_cancel_all(loop))
    last.add_done_callback(lambda _: loop.stop())
    while not last.done():
        loop.run_forever()
    loop.close()


async def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for _ in range(20):
        tasks = [task for task in asyncio.all_tasks(loop) if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.sleep(60)
    await loop.shutdown_asyncgens()


class _Nobody:
    def put(self, *_: object) -> None: ...

    def delete(self, *_: object) -> None: ...

    def step(self, *_: object) -> None: ...


def simulate(seed: int, steps: int, *, episode_steps: int = EPISODE_STEPS, report: bool = False) -> Outcome:
    """Episode after episode until `steps` requests were served or a promise was broken. The hash covers all traces."""
    total, digest, episode = Outcome(), hashlib.blake2b(digest_size=16), 0
    while total.steps < steps and total.violation is None:
        settings = settings_of(seed, episode, min(episode_steps, steps - total.steps))
        outcome = run_episode(settings)
        total.steps += outcome.steps
        total.counts.update(outcome.counts)
        digest.update(outcome.trace_hash.encode())
        if outcome.violation is not None:
            total.violation, total.settings, total.trace = outcome.violation, outcome.settings, outcome.trace
        episode += 1
        if report:
            print(f"episode {episode}: {total.steps} steps, hash so far {digest.hexdigest()}", file=sys.stderr, flush=True)
    total.counts["episodes"] = episode
    total.trace_hash = digest.hexdigest()
    return total


# Shrinking


def shrink(settings: Settings, violation: Violation, *, max_runs: int = 60) -> Outcome:
    """A smaller episode that breaks the same promise: fewer steps, kinds of calls, faults, processes and clients, taken away greedily."""
    best = run_episode(replace(settings, keep_trace=True))
    for candidate in _simpler(settings, max_runs):
        tried = candidate(best.settings or settings)
        if tried is None:
            continue
        outcome = run_episode(replace(tried, keep_trace=True))
        if outcome.violation is not None and outcome.violation.kind == violation.kind and len(outcome.trace) <= len(best.trace):
            best = replace(outcome, settings=tried)
    return best


def _simpler(settings: Settings, max_runs: int):  # type: ignore[no-untyped-def]
    """Ways to take something away, each from what is left when it is tried."""
    ways = [
        lambda now: replace(now, weather=CALM),
        lambda now: replace(now, kills=0.0),
        lambda now: replace(now, freezes=0.0),
        lambda now: replace(now, skew_s=0.0),
        lambda now: replace(now, lulls=0.0),
        lambda now: replace(now, hot=1.0),
    ]
    ways += [lambda now, scene=scene: replace(now, scenes=(scene,)) if now.scenes else None for scene in dict.fromkeys(SCENES)]
    ways += [lambda now, fault=fault: replace(now, weather=now.weather.without(fault)) for fault in Weather.__dataclass_fields__]
    ways += [lambda now: replace(now, n_clients=now.n_clients - 1) if now.n_clients > 1 else None] * 3
    ways += [lambda now: replace(now, n_processes=now.n_processes - 1) if now.n_processes > 1 else None] * 3
    ways += [lambda now, kind=kind: replace(now, weights={**now.weights, kind: 0.0}) for kind in WEIGHTS]
    for n in range(3):
        ways.append(lambda now, n=n: replace(now, seed=f"{settings.seed}/{n}"))
    return ways[:max_runs]


def concise(outcome: Outcome, last: int = 80) -> list[str]:
    """The trace without reads of immutable objects: calls, writes, moves of CURRENT."""
    dull = (" get ", " range ", " list ")
    lines = [line for line in outcome.trace if not any(word in line for word in dull) or "CURRENT" in line]
    return lines[-last:]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="simulate the engine; print a hash of the trace")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20_000, help="requests served by the simulated store")
    parser.add_argument("--episode-steps", type=int, default=EPISODE_STEPS)
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--mutations", action="store_true", help="plant each known mistake in turn and state how many are caught")
    parser.add_argument("--only", default="", help="with --mutations: those whose name contains this")
    parser.add_argument("--processes", type=int, default=1, help="with --mutations: how many at once")
    args = parser.parse_args()
    if args.mutations:
        from .mutations import main as mutate

        return mutate(args.steps, args.seed, args.only, args.processes)
    outcome = simulate(args.seed, args.steps, episode_steps=args.episode_steps, report=args.verbose)
    if args.verbose:
        for name, n in sorted(outcome.counts.items()):
            print(f"{n:10d}  {name}")
    print(f"seed {args.seed}  steps {outcome.steps}  trace {outcome.trace_hash}")
    if outcome.violation is None:
        return 0
    print(f"\nBROKEN  {outcome.violation}\n")
    assert outcome.settings is not None
    small = outcome if args.no_shrink else shrink(outcome.settings, outcome.violation)
    print("\n".join(concise(small)))
    print(f"\n{small.settings}\n{small.violation}")
    return 1
