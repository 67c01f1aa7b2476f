"""An event loop that owns time and chance: virtual clock, seeded choice among ready callbacks, no threads, no sockets.

A *process* is a group of tasks that die and freeze together. It is found through a context variable, which tasks inherit.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
from collections.abc import Callable, Coroutine
from typing import Any

EMPTY = contextvars.Context()
EPOCH_S = 1_800_000_000.0
"""Virtual time 0 as unix time."""


class ProcessDied(BaseException):
    """Raised in a dead process by whatever would reach the outside. Not an Exception: nobody recovers from it."""


class Process:
    """One process: its tasks, its clock's error, and whether it is frozen or dead."""

    def __init__(self, name: str, skew_s: float) -> None:
        self.name, self.skew_s = name, skew_s
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.frozen_until = 0.0
        self.dead = False
        self.on_served: Callable[[str, str], None] | None = None
        """Is told of each request of this process that was served: kind and name."""

    def kill(self) -> None:
        """Nothing of it runs on: each task gets an exception at its await, and every further call to a store or clock fails."""
        self.dead = True
        for task in list(self.tasks):
            task.cancel()


PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class Loop(asyncio.BaseEventLoop):
    """`n_callbacks` counts what ran. Same seed, same program: same order."""

    def __init__(self, seed: str) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.now = 0.0
        self.n_callbacks = 0
        self.errors: list[str] = []
        self.set_task_factory(_task_in_process)  # type: ignore[arg-type]
        self.set_exception_handler(self._note_error)

    def time(self) -> float:
        return self.now

    def _process_events(self, event_list: Any) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _note_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None and not isinstance(error, ProcessDied | asyncio.CancelledError):
            self.errors.append(f"{context.get('message')}: {error!r}")

    def _run_once(self) -> None:
        ready, timers = self._ready, self._scheduled  # type: ignore[attr-defined]
        while timers and timers[0]._cancelled:
            heapq.heappop(timers)._scheduled = False
        if not ready:
            if not timers:
                raise RuntimeError("the simulation waits for nothing")
            self.now = max(self.now, timers[0]._when)
        while timers and timers[0]._when <= self.now:
            handle = heapq.heappop(timers)
            handle._scheduled = False
            ready.append(handle)
        at = self.rng.randrange(len(ready)) if len(ready) > 1 else 0
        handle = ready[at]
        del ready[at]
        if handle._cancelled:
            return
        process = handle._context.get(PROCESS)
        if process is not None and process.frozen_until > self.now and not process.dead:
            self.call_at(process.frozen_until, _run_unless_cancelled, handle, context=EMPTY)
            return
        self.n_callbacks += 1
        handle._run()

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Arithmetic takes no processor time of others but some virtual time."""
        done = self.create_future()
        context = contextvars.copy_context()

        def work() -> None:
            if done.done():
                return
            try:
                done.set_result(context.run(func, *args))
            except Exception as error:
                done.set_exception(error)

        mean_s = 0.005 if self.rng.random() < 0.9 else 0.5
        self.call_later(self.rng.expovariate(1 / mean_s), work, context=EMPTY)
        return done


def _run_unless_cancelled(handle: asyncio.Handle) -> None:
    if not handle._cancelled:  # type: ignore[attr-defined]
        handle._run()  # type: ignore[attr-defined]


def _task_in_process(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **kwargs: Any) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **kwargs)
    process = PROCESS.get()
    if process is not None:
        process.tasks[task] = None
        task.add_done_callback(lambda done: process.tasks.pop(done, None), context=EMPTY)
        if process.dead:
            task.cancel()
    return task


class SimulatedClock:
    """engine.index.clock.Clock of the process that asks, or of one that is given."""

    def __init__(self, process: Process | None = None) -> None:
        self._process = process

    def _who(self) -> Process | None:
        return self._process or PROCESS.get()

    def now_s(self) -> float:
        who = self._who()
        return EPOCH_S + asyncio.get_running_loop().time() + (who.skew_s if who else 0.0)

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, duration_s: float) -> None:
        who = self._who()
        if who is not None and who.dead:
            raise ProcessDied
        await asyncio.sleep(duration_s)
