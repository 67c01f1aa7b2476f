"""The threads for arithmetic, and how much work waits for one of them, for the interpreter or for a core: what routes/limits.py decides by."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads(ThreadPoolExecutor):
    """A ThreadPoolExecutor that knows how much waits. Costs about 3 microseconds a task more."""

    def __init__(self, n_threads: int) -> None:
        super().__init__(n_threads, thread_name_prefix="tartan")
        self.n_threads = n_threads
        self._lock = threading.Lock()
        self._n_waiting = 0
        self._waited_s = 0.0
        self._counted_s = time.monotonic()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        def work() -> T:
            self._count(-1)
            began_s, cpu_s = time.monotonic(), time.thread_time()
            try:
                return fn(*args, **kwargs)
            finally:
                self._count(0, (time.monotonic() - began_s) - (time.thread_time() - cpu_s))

        self._count(1)
        try:
            future = super().submit(work)
        except RuntimeError:  # shut down
            self._count(-1)
            raise
        future.add_done_callback(self._note_cancelled)
        return future

    def waited_s(self) -> float:
        """Seconds that tasks have spent waiting, all together, since the beginning: for a thread, or on one without computing. What it grows by in a
        second is the mean number of tasks that waited."""
        return self._count(0)

    def _count(self, change: int, stood_still_s: float = 0.0) -> float:
        with self._lock:
            now_s = time.monotonic()
            self._waited_s += self._n_waiting * (now_s - self._counted_s) + max(0.0, stood_still_s)
            self._counted_s = now_s
            self._n_waiting += change
            return self._waited_s

    def _note_cancelled(self, future: Future[T]) -> None:
        if future.cancelled():  # before it began
            self._count(-1)
