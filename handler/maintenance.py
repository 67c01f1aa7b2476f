"""Compaction and garbage collection beside a running server: who looks, when, and the child process that does the work.

    looking   one worker of a host holds a lock. It looks at every index now and then, and within a second at those whose writers saw a backlog
    working   a child process, so that searches do not share an interpreter lock with it; low priority, one numeric thread. It works on one
              index at a time, is kept while there is work (starting one costs a third of a second of CPU), and is gone, with its memory, when there is none

Commits decide between hosts that do the same work: the loser's is rubbish. Killed anywhere, a child leaves rubbish and no damage.
Nothing here serves requests; server.py starts Maintenance in its workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine.errors import EngineError, NotFound
from engine.format.manifest import Manifest
from engine.index.commit import Ended
from engine.index.compact import compact
from engine.index.indices import left_something, survey
from engine.index.plan import next_step
from engine.index.sweep import sweep
from handler.index_facts import IndexFacts
from handler.runtime import Runtime
from handler.settings import Settings, child_environment

SWEEP_INTERVAL_S = 3600.0
POLL_S = 0.5
LINGER_S = 20.0
"""How long a child without work is kept."""
MEMORY_BYTES = 128 << 20
NICENESS = 5
"""A third of a search thread's share of a busy core. At 19 a fold of one second took 69 beside searches on both cores, and the backlog, which every
search pays for, grew faster than it was folded."""


class Outcome(msgspec.Struct, frozen=True):
    """A child's answer to one order, a line of JSON after ANSWER; its other lines are the log's, and those begin with a brace.

    code  why it failed, None if it did not; seconds that it took
    """

    took_s: float
    code: str | None = None


ANSWER = b"="
DIED = "died"
"""The code of an order whose child ended without an answer."""


@dataclass
class Maintenance:
    """Looks for indices that want compaction or garbage collection, and has a child work on them, one at a time.

    folder  shared by the workers of a host: who holds the lock in it maintains (the lock goes with the process that held it), and an empty
            file in `wanted/` says that the index of its name has a backlog
    """

    runtime: Runtime
    folder: Path
    _lock: int | None = None
    _child: asyncio.subprocess.Process | None = None
    _idle_since_s: float = 0.0
    _swept_s: dict[str, float] = field(default_factory=dict)

    @property
    def _wanted(self) -> Path:
        return self.folder / "wanted"

    def saw(self, name: str, manifest: Manifest) -> None:
        """A writer's new generation: if it has a backlog, the worker that maintains will know. May be called in any worker."""
        if next_step(manifest, self.runtime.maintenance) is not None:
            self._wanted.mkdir(exist_ok=True)
            (self._wanted / name).touch()

    async def run(self) -> None:
        """Until cancelled; the child ends with it."""
        try:
            due_s = self._next_look_s()
            while True:
                await asyncio.sleep(min(POLL_S, self.runtime.settings.maintenance_interval_s))
                if self.runtime.is_draining() or not self._holds_lock():
                    continue
                with self._failures_noted():
                    for name in self._take_wanted():
                        await self._work_on(name, "compact")
                    if time.monotonic() >= due_s:
                        due_s = self._next_look_s()
                        await self._look_at_all()
                if self._child is not None and time.monotonic() > self._idle_since_s + LINGER_S:
                    await self._end_child()
        finally:
            await self._end_child(kill=True)

    def _next_look_s(self) -> float:
        return time.monotonic() + self.runtime.settings.maintenance_interval_s * random.uniform(0.8, 1.2)

    def _holds_lock(self) -> bool:
        if self._lock is None:
            lock = os.open(self.folder / "maintenance.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                return False
            self._lock = lock
        return True

    @contextlib.contextmanager
    def _failures_noted(self):  # type: ignore[no-untyped-def]
        try:
            yield
        except (EngineError, OSError) as error:
            self._note_failure(error)

    def _take_wanted(self) -> list[str]:
        try:
            found = sorted(os.listdir(self._wanted))
        except FileNotFoundError:
            return []
        for name in found:
            (self._wanted / name).unlink(missing_ok=True)
        return found

    async def _look_at_all(self) -> None:
        found = await survey(self.runtime.store)
        if self.runtime.metrics is not None:
            self.runtime.metrics.saw_all({name: IndexFacts.of(head.manifest) for name, head in found.heads.items()})
        for name, error in found.unreadable.items():
            self._note_failure(error, index=name)
        for name, head in found.heads.items():
            if self._takes_turn_to_sweep(name):
                await self._work_on(name, "sweep")
            elif next_step(head.manifest, self.runtime.maintenance) is not None:
                await self._work_on(name, "compact")
        for name in await left_something(self.runtime.store, [name for name in found.ended if self._takes_turn_to_sweep(name)]):
            await self._work_on(name, "sweep")

    def _takes_turn_to_sweep(self, name: str) -> bool:
        """Whether it is time again to sweep this name, which from now on counts as done. A name that is seen for the first time waits for its turn."""
        now_s = time.monotonic()
        is_due = now_s >= self._swept_s.setdefault(name, now_s) + SWEEP_INTERVAL_S
        if is_due:
            self._swept_s[name] = now_s
        return is_due

    # The child

    async def _work_on(self, name: str, verb: str) -> None:
        """One piece of work, waited for."""
        child = self._child or await self._start_child()
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(f"{verb} {name}\n".encode())
        outcome: Outcome | None = None
        while outcome is None:
            line = await child.stdout.readline()
            if not line:
                self._child = None
                code = await child.wait()
                self.runtime.log.error("maintenance failed", index=name, verb=verb, error=f"the child process ended ({code})")
                outcome = Outcome(0.0, DIED)
            elif line.startswith(ANSWER):
                outcome = msgspec.json.decode(line[len(ANSWER) :], type=Outcome)
            else:
                sys.stdout.write(line.decode())
                sys.stdout.flush()
        self._idle_since_s = time.monotonic()
        self._note(verb, outcome)

    def _note(self, verb: str, outcome: Outcome) -> None:
        metrics = self.runtime.metrics
        if metrics is None:
            return
        metrics.maintenance.labels("done" if outcome.code is None else "failed").inc()
        if outcome.code is None:
            metrics.maintenance_s.labels(verb).observe(outcome.took_s)
        elif outcome.code != DIED:
            metrics.errors.labels(outcome.code).inc()

    def _note_failure(self, error: EngineError | OSError, **facts: str) -> None:
        """What failed before a child had anything to do with it."""
        if isinstance(error, EngineError):
            facts["code"] = error.code
        self.runtime.log.error("maintenance failed", **facts, error=str(error))
        if self.runtime.metrics is not None:
            self.runtime.metrics.maintenance.labels("failed").inc()
            if isinstance(error, EngineError):
                self.runtime.metrics.errors.labels(error.code).inc()

    async def _start_child(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        environment = child_environment(self.runtime.settings)
        self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "handler.maintenance", stdin=pipe, stdout=pipe, env=environment, limit=1 << 20
        )
        return self._child

    async def _end_child(self, *, kill: bool = False) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        assert child.stdin is not None
        child.stdin.close()
        if kill:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
        await child.wait()


# In the child


async def maintain(runtime: Runtime, name: str, verb: str) -> None:
    """Compact an index until it is in good order, and collect its garbage if `verb` is "sweep"."""
    began_s = time.monotonic()
    facts: dict[str, object] = {}
    try:
        report = await compact(runtime.reader, name, params=runtime.maintenance)
        facts |= {"steps": report.steps, "documents": report.n_documents, "given_up": report.n_given_up}
    except Ended:
        pass  # its garbage is collected all the same
    except NotFound as error:
        if error.code != "index-not-found":
            raise
        return
    if verb == "sweep":
        swept = await sweep(runtime.store, name, params=runtime.maintenance)
        facts |= {"objects_deleted": swept.n_deleted, "objects_kept": swept.n_kept}
    runtime.log.info("maintained", index=name, verb=verb, s=round(time.monotonic() - began_s, 3), **facts)


async def _work(runtime: Runtime) -> None:
    """Lines of "compact INDEX" or "sweep INDEX" on standard input, until it ends; an Outcome for each on standard output."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        verb, name = line.split()
        began_s, code = time.monotonic(), None
        try:
            await maintain(runtime, name, verb)
        except EngineError as error:
            runtime.log.error("maintenance failed", index=name, verb=verb, code=error.code, error=str(error))
            code = error.code
        outcome = Outcome(round(time.monotonic() - began_s, 3), code)
        sys.stdout.write(f"{ANSWER.decode()}{msgspec.json.encode(outcome).decode()}\n")
        sys.stdout.flush()


def main() -> None:
    os.nice(NICENESS)
    try:
        asyncio.run(_work(Runtime(Settings.from_environment(memory_bytes=MEMORY_BYTES, search_threads=1))))
    except BrokenPipeError:
        # The worker that gave the order was killed. What it ordered is done; nobody is left to be told, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
