"""A store around the store that tells monitoring of each call: how long, how it failed, and a span of it. Changes nothing.

It stands beneath CountingStore, so it sees what is paid for and not what a cache answers.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from engine.errors import Conflict, EngineError, NotFound
from engine.store.base import ObjectStore
from engine.store.wrappers import AroundStore, Call
from handler import tracing

if TYPE_CHECKING:
    from handler.metrics import Metrics

T = TypeVar("T")


def store_usd(requests: Mapping[str, int]) -> float:
    """List price of requests by kind, in dollars; deleting is free."""
    usd_of = _usd_of() if requests else {}
    return sum(usd_of.get(kind, 0.0) * n for kind, n in requests.items())


@cache
def _usd_of() -> dict[str, float]:
    from engine.cost import DEFAULT_REGION, prices  # 10 ms of a cold start, and no request needs it before its end

    at = prices(DEFAULT_REGION)
    gets = dict.fromkeys(("get", "get_if_changed", "range"), at.s3_get)
    return gets | {"put": at.s3_put, "replace": at.s3_put, "list": at.s3_list}


class ObservedStore(AroundStore):
    """`metrics` may be None; spans go to the trace of the request that calls. Cost: 1 to 4 µs a call.

    A refused `replace` is a commit (or an alias) that lost a race; it is no failure, and neither is an object that is not there.
    """

    def __init__(self, inner: ObjectStore, metrics: Metrics | None) -> None:
        super().__init__(inner)
        self._metrics = metrics

    async def _around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        began_s = time.perf_counter()
        outcome = "ok"
        try:
            return await run()
        except EngineError as error:
            outcome = error.code
            self._note_failure(call, error)
            raise
        finally:
            self._note(call, began_s, outcome)

    async def _pages(self, prefix: str, lines: AsyncIterator[T]) -> AsyncIterator[T]:
        """A listing fails while it is read, not where the funnel passes."""
        try:
            async for line in super()._pages(prefix, lines):
                yield line
        except EngineError as error:
            self._note_failure(Call("list", prefix), error)
            raise

    def _note_failure(self, call: Call, error: EngineError) -> None:
        if isinstance(error, Conflict):
            if call.kind == "replace":
                self._note_conflict()
        elif self._metrics is not None and not isinstance(error, NotFound):
            self._metrics.store_failures.labels(error.code).inc()

    def _note_conflict(self) -> None:
        if (trace := tracing.current.get()) is not None:
            trace.conflicts += 1
        if self._metrics is not None:
            self._metrics.conflicts.inc()

    def _note(self, call: Call, began_s: float, outcome: str) -> None:
        ended_s = time.perf_counter()
        if self._metrics is not None:
            self._metrics.store_s.labels(call.kind).observe(ended_s - began_s)
        trace = tracing.current.get()
        if trace is not None and trace.spans is not None:
            facts: dict[str, str | int | float] = {"object": call.name, "requests": call.n_requests, "outcome": outcome}
            trace.add(tracing.Span(f"store {call.kind}", began_s, ended_s, is_call=True, facts=facts))
