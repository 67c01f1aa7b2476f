"""Who has the shards of a plan scored somewhere: the interface, and the order of steps for transports that talk to each process themselves.

Transports are in handler/fanout.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from engine.errors import EngineError
from engine.fanout.merge import bars_of
from engine.fanout.messages import Failed, Mode, Outcome, Plan, Ranked, Scored, Step, failure


class Transport(Protocol):
    """Has the shards of a plan scored somewhere.

    max_state_bytes  what one message may hold; None for no limit
    mode             how those who score hold their segments
    """

    max_state_bytes: int | None
    mode: Mode

    def shard_count(self, size_bytes: int) -> int:
        """How many shards an index of this size is cut into."""
        ...

    async def run(self, plan: Plan) -> list[Outcome]:
        """One outcome per shard, in any order. Raises Unavailable if the machinery itself fails."""
        ...


async def run_steps(plan: Plan, ask: Callable[[Step], Awaitable[Ranked | Scored]]) -> list[Outcome]:
    """A plan step by step; `ask` has a step done, with the retries it sees fit. For transports that talk to each process themselves."""
    bars, lost = None, {}
    if plan.needs_ranking:
        rankings = await _all([Step(do="rank", job=plan.job, shard=shard) for shard in plan.shards], ask)
        lost = {one.shard: one for one in rankings if isinstance(one, Failed)}
        if lost and not plan.job.allow_partial:
            return list(lost.values())
        bars = bars_of(plan.job, [one for one in rankings if isinstance(one, Ranked)])
    steps = [Step(do="score", job=plan.job, shard=shard, bars=bars) for shard in plan.shards if shard.number not in lost]
    return [*lost.values(), *(one for one in await _all(steps, ask) if not isinstance(one, Ranked))]


async def _all(steps: Sequence[Step], ask: Callable[[Step], Awaitable[Ranked | Scored]]) -> list[Ranked | Scored | Failed]:
    found = await asyncio.gather(*(ask(step) for step in steps), return_exceptions=True)
    outcomes: list[Ranked | Scored | Failed] = []
    for step, one in zip(steps, found, strict=True):
        if isinstance(one, BaseException) and not isinstance(one, (EngineError, TimeoutError)):
            raise one
        outcomes.append(failure(step.shard, one) if isinstance(one, BaseException) else one)
    return outcomes
