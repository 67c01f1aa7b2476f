"""When this process, and so most likely everything beside it, stood still: a suspended machine, a stopped container, a debugger."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

TICK_S = 0.1
PAUSE_S = 1.0
"""A tick that is late by more is a pause; the loop itself is never busy for so long."""
AFTER_S = 5.0
"""What is under way after a pause is not normal either: timers of everybody have run out at once."""


@dataclass
class Pauses:
    """Spans of the monotonic clock, in seconds, each up to AFTER_S beyond its end."""

    spans: list[tuple[float, float]] = field(default_factory=list)

    async def watch(self) -> None:
        """Until cancelled."""
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            if now_s - last_s > TICK_S + PAUSE_S:
                self.spans.append((last_s, now_s + AFTER_S))
            last_s = now_s

    def touch(self, began_s: float, ended_s: float) -> bool:
        """Whether something that lasted from `began_s` to `ended_s` was under way in a pause."""
        return any(began_s < end_s and ended_s > start_s for start_s, end_s in self.spans)

    @property
    def total_s(self) -> float:
        return sum(end_s - start_s - AFTER_S for start_s, end_s in self.spans)
